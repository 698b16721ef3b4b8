"""Alpaca's data: tasks that a model wrote when asked to continue a list of tasks (Wang et al. 2022,
Self-Instruct, arXiv 2212.10560).

    python -m recipes.self_instruct completions.jsonl --out=alpaca.json
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import data
from recipes.output import refuse_overwrite, write_result
from tools.config import UserError, run

KINDS = {"completions": ({"choices"},)}
FIELD = re.compile(r"^(?:#{3}\s*)?\d+\.\s*(Instruction|Input|Output):", re.M)


def parse_completion(text: str, cut_off: bool = False) -> list[dict]:
    """Alpaca records from "4. Instruction: ... 4. Input: ... 4. Output: ... ###" and so on. The
    first "Instruction:" may be missing, since the request can end with it.

    A task with other fields than these three gets no output; nor does the last one if the
    completion was cut off by its length. In the original the numbers have to be right, and "###"
    or "20." within an answer spoils it.
    """
    text = text.replace("\r\n", "\n").strip()
    if not FIELD.match(text):
        text = "1. Instruction:" + text
    parts = FIELD.split(text)[1:]
    groups: list[list[tuple[str, str]]] = [[]]  # the first one holds what precedes any instruction
    for name, value in zip(parts[::2], parts[1::2]):
        if name == "Instruction":
            groups.append([])
        groups[-1].append((name, value.strip().removesuffix("###").strip()))
    tasks = []
    for group in groups[1:]:
        names, values = zip(*group)
        is_whole = names == ("Instruction", "Input", "Output")
        if not is_whole or cut_off and group is groups[-1]:
            values = (values[0], "", "")
        tasks.append(dict(zip(("instruction", "input", "output"), values)))
    return tasks


def parse_choices(record: dict) -> list[dict]:
    """ShareGPT records from a server's reply, of /completions or of /chat/completions."""
    found = []
    for choice in record["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        for task in parse_completion(text, choice.get("finish_reason") == "length"):
            found += data.parse_alpaca(task)
    return found


NEEDS_MORE_THAN_TEXT = re.compile(
    r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart|"
    r"diagram)\b", re.I)  # whole words: "mapping" is fine


def why_unfit(instruction: str) -> str | None:
    """Alpaca's filter for machine-written instructions: the reason to drop one, or None. The
    original also drops those that begin with a letter beyond ASCII."""
    if not 3 < len(instruction.split()) <= 150:
        return "is too short or too long"
    if NEEDS_MORE_THAN_TEXT.search(instruction):
        return "asks for something text cannot show"
    if instruction.startswith("Write a program"):
        return "asks for a program"
    if not instruction[0].isalnum():
        return "does not begin with a letter or digit"
    return None


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence. row[j] is that of the words so far and b[:j]."""
    common = set(a) & set(b)  # only these matter, and most instructions share few words
    a = [word for word in a if word in common]
    b = [word for word in b if word in common]
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L of two lists of words, as an F measure."""
    return 2 * lcs(a, b) / max(1, len(a) + len(b))


def filter_tasks(tasks: Iterable[data.Conversation],
                 report: data.Report) -> list[data.Conversation]:
    """Tasks whose instruction is fit, and not too similar to that of an earlier one."""
    kept, kept_words = [], []
    for task in tasks:
        instruction = task.turns[0].text.strip()
        reason = why_unfit(instruction)
        words = re.findall(r"\w+", instruction.lower())
        if not reason and any(rouge_l(words, other) > 0.7 for other in kept_words):
            reason = "is like an earlier one"
        if reason:
            report.add(task.id, f"dropped: the instruction {reason}")
        else:
            kept.append(task)
            kept_words.append(words)
    return kept


@dataclass
class Config:
    file: str  # a server's replies, one a line, each with its `choices`
    out: str = "alpaca.json"  # the tasks; the report is written beside it


def main(cfg: Config) -> dict:
    refuse_overwrite(cfg.file, cfg.out)
    records = data.parse_records(data.read_text(cfg.file), cfg.file)
    if not data.kind_of_records(records, KINDS):
        raise UserError(f"{cfg.file} has no completions: no record has `choices`")
    report = data.Report()
    tasks = list(data.parse_conversations(records, Path(cfg.file).stem, report, parse_choices))
    kept = filter_tasks(tasks, report)
    if not kept:
        raise UserError(f"{cfg.file}: no task in it can be used{report}")
    return write_result(kept, cfg.out, report, "alpaca")


if __name__ == "__main__":
    run(main, Config)
