"""Alpaca's data: tasks that a model writes when asked to continue a list of tasks (Wang et al.
2022, Self-Instruct, arXiv 2212.10560).

    python -m recipes.self_instruct --seeds=seed_tasks.jsonl --teacher=MODEL@URL --count=1000
    python -m recipes.self_instruct completions.jsonl    # replies that you already have

Each request shows three seed tasks. The replies are kept beside the output, so the same command
resumes, also with a larger --count. The defaults are Alpaca's. Alpaca asked a completion model and
kept it from ending early by a logit bias of -100 on the end of text; chat models need no bias.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import data
from recipes.output import (
    open_teacher,
    refuse_overwrite,
    write_result,
)
from tools.config import UserError, check_above, check_at_least, refuse_unused, run

KINDS = {"completions": ({"choices"},)}
FIELD = re.compile(r"^(?:#{3}\s*)?\d+\.\s*(Instruction|Input|Output):", re.M)


def parse_completion(text: str, cut_off: bool = False) -> list[dict]:
    """Alpaca records from "4. Instruction: ... 4. Input: ... 4. Output: ... ###" and so on. The
    first "Instruction:" may be missing, since the request can end with it.

    The output is empty for a task that does not have exactly these three fields, and for the last
    task of a completion that was cut off; such tasks are dropped later. The original also loses a
    task with a wrong number, or with "###" or "20." in an answer.
    """
    text = text.replace("\r\n", "\n").strip()
    if not FIELD.match(text):
        text = "1. Instruction:" + text
    parts = FIELD.split(text)[1:]
    groups: list[list[tuple[str, str]]] = [[]]  # one for each task, after what precedes the first
    for name, value in zip(parts[::2], parts[1::2]):
        if name == "Instruction":
            groups.append([])
        groups[-1].append((name, value.strip().removesuffix("###").strip()))
    tasks = []
    for group in groups[1:]:
        names, values = zip(*group)
        is_cut = cut_off and group is groups[-1]
        if is_cut or names != ("Instruction", "Input", "Output"):
            values = (values[0], "", "")
        tasks.append(dict(zip(("instruction", "input", "output"), values)))
    return tasks


def parse_choices(record: dict) -> list[dict]:
    """ShareGPT records from a server's response to /completions or /chat/completions."""
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
    """Alpaca's filter for machine-written instructions: what is wrong with one, or None. The
    original also drops those that begin with a non-ASCII letter."""
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
    """Length of the longest common subsequence. After each word of a, row[j] is the length for
    the words of a so far and the first j of b."""
    common = set(a) & set(b)  # other words never match, and most instructions share few
    a = [word for word in a if word in common]
    b = [word for word in b if word in common]
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L of two lists of words: the F measure, 0 to 1."""
    return 2 * lcs(a, b) / max(1, len(a) + len(b))


class Filter:
    """Alpaca's filters for machine-written tasks. Each task is compared with all earlier ones."""

    def __init__(self, report: data.Report, seeds: Sequence[data.Conversation] = ()):
        self.report = report
        self.earlier = [words_of(task) for task in seeds]  # the words of seeds and of kept tasks

    def keeps(self, task: data.Conversation) -> bool:
        """Whether the task passes all filters. If it does, later tasks are compared with it; if
        not, the report says why."""
        instruction, reply = (turn.text.strip() for turn in task.turns[:2])
        words = words_of(task)
        reason = why_unfit(instruction)
        if not reason and reply == instruction:
            reason = "is also the output"
        if not reason and any(rouge_l(words, other) > 0.7 for other in self.earlier):
            reason = "resembles an earlier one"
        if reason:
            self.report.add(task.id, f"dropped: the instruction {reason}")
            return False
        self.earlier.append(words)
        return True


def words_of(task: data.Conversation) -> list[str]:
    """The words of the instruction, in lower case."""
    return re.findall(r"\w+", task.turns[0].text.lower())


def filter_tasks(tasks: Iterable[data.Conversation],
                 report: data.Report) -> list[data.Conversation]:
    filters = Filter(report)
    return [task for task in tasks if filters.keeps(task)]


# -- asking a teacher -----------------------------------------------------------------------------

# Alpaca's requirements in our own words
REQUEST = """Continue this list up to task 20. Each task is for an assistant that reads and writes \
text, and each has an instruction, an input and an output.
- Let the tasks differ in topic, in the verb, and in form: questions as well as commands.
- Mix many kinds: writing, editing, classifying, explaining, open questions, and more.
- A language model must be able to do it. Nothing to look at, to hear, to open, or to remember.
- An instruction has one or two sentences, in English.
- An input is a concrete example for the instruction, at most 100 words. Where none is needed, \
write <noinput>.
- An output is a good answer to the instruction and its input, at most 100 words.
"""
BATCH = 4  # requests that are sent at once
PATIENCE = 10  # stop after this many requests in a row without a new task


def request(seeds: Sequence[data.Conversation], seed: int, number: int) -> data.Conversation:
    """Request `number`, with three of the seed tasks. It does not depend on earlier replies, so a
    resumed run makes the same requests and finds their replies in the cache."""
    lines = [REQUEST]
    for n, task in enumerate(random.Random(f"{seed} {number}").sample(seeds, 3), start=1):
        asked, reply = task.turns[:2]
        instruction = " ".join(asked.text.split()).rstrip(":")
        lines += ["###", f"{n}. Instruction: {instruction}", f"{n}. Input:",
                  asked.input or "<noinput>", f"{n}. Output:", reply.text]
    lines += ["###", "4. Instruction:"]
    return data.Conversation([data.Turn("user", "\n".join(lines))], extra=dict(wanted="tasks"))


def read_reply(reply, number: int, report: data.Report) -> list[data.Conversation]:
    """The tasks in the reply to request `number`."""
    name = f"request_{number}"
    if reply is None:
        report.add(name, "dropped: no answer from the teacher")
        return []
    tasks = parse_completion(reply.text, cut_off=not reply.ended)
    return list(data.parse_conversations(tasks, name, report, data.parse_alpaca))


def generate(cfg, report: data.Report) -> list[data.Conversation]:
    """Asks until cfg.count tasks are kept, or the teacher has nothing new to say."""
    seeds = data.load_conversations(cfg.seeds)
    if len(seeds) < 3:
        raise UserError(f"{cfg.seeds} has {len(seeds)} tasks; each request shows three")
    filters, kept = Filter(report, seeds), []
    asked, in_vain = 0, 0  # requests in all, and those since the last new task
    with open_teacher(cfg) as teacher, tqdm(total=cfg.count, desc="tasks kept") as bar:
        while len(kept) < cfg.count and in_vain < PATIENCE:
            numbers = range(asked, asked + BATCH)
            requests = [request(seeds, cfg.seed, number) for number in numbers]
            replies = teacher.ask(requests, asked)  # another number: other tasks for equal seeds
            for number, reply in zip(numbers, replies):
                found = read_reply(reply, number, report)
                new = [task for task in found if filters.keeps(task)]
                in_vain = 0 if new else in_vain + 1
                kept += new
            asked += BATCH
            bar.set_postfix(requests=asked, tokens=teacher.tokens, refresh=False)
            bar.update(len(kept) - bar.n)
    print(f"{len(kept)} tasks kept from {asked} requests; {teacher.tokens} tokens")
    if in_vain >= PATIENCE:
        print(f"stopped: the last {in_vain} requests gave nothing new")
    for task in kept[cfg.count:]:
        report.add(task.id, "dropped: more than --count")
    return kept[:cfg.count]


@dataclass
class Config:
    # The responses of a server, each with its `choices`
    file: str = field(default="", metadata=dict(positional=True))  # replies to filter, one per line
    seeds: str = ""  # instead of FILE: seed tasks, in Self-Instruct's or in Alpaca's format
    teacher: str = ""  # who writes tasks: MODEL@URL, a checkpoint, or oracle (for toy seeds)
    count: int = 1000  # how many tasks to keep
    out: str = "alpaca.json"  # the tasks; beside it a report and the teacher's replies
    temperature: float = 1.0  # of the teacher
    max_new_tokens: int = 3072  # of one reply
    seed: int = 0  # which seed tasks each request shows

    def __post_init__(self):
        check_above(self, 0, "count", "max_new_tokens")
        check_at_least(self, 0, "temperature")


def main(cfg: Config) -> dict:
    report = data.Report()
    if cfg.file:
        refuse_unused(cfg, ("seeds", "teacher", "count", "temperature", "max_new_tokens", "seed"),
                      f"{cfg.file} holds replies, so no teacher is asked")
        refuse_overwrite(cfg.file, cfg.out)
        kept = filter_tasks(read_completions(cfg.file, report), report)
    elif cfg.seeds and cfg.teacher:
        refuse_overwrite(cfg.seeds, cfg.out)
        kept = generate(cfg, report)
    else:
        raise UserError("give --seeds=FILE and --teacher, or a file of completions")
    if not kept:
        raise UserError(f"{cfg.file or cfg.teacher}: no usable task{report}")
    return write_result(kept, cfg.out, report, "alpaca")


def read_completions(path: str, report: data.Report) -> list[data.Conversation]:
    records = data.parse_records(data.read_text(path), path)
    if not data.kind_of_records(records, KINDS):
        raise UserError(f"{path} has no completions: no record has `choices`")
    return list(data.parse_conversations(records, Path(path).stem, report, parse_choices))


if __name__ == "__main__":
    run(main, Config)
