"""Alpaca's data: tasks that a model writes when asked to continue a list of tasks (Wang et al.
2022, Self-Instruct, arXiv 2212.10560).

    python -m recipes.self_instruct --seeds=seed_tasks.jsonl --teacher=MODEL@URL --count=1000
    python -m recipes.self_instruct completions.jsonl    # replies that were received elsewhere

Each request shows three seed tasks. The replies are kept beside the output, so the same command
resumes, and a larger --count goes on. The defaults are Alpaca's, except that it asked a completion
model, with the penalty of -100 on the end of the text.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import data
from recipes.output import (
    count_tokens,
    open_teacher,
    refuse_overwrite,
    replies_beside,
    write_result,
)
from tools.config import UserError, check_above, check_at_least, refuse_unused, run

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


class Filter:
    """Alpaca's filters for machine-written tasks, which see one task after the other."""

    def __init__(self, report: data.Report, seeds: Sequence[data.Conversation] = ()):
        self.report = report
        self.earlier = [words_of(task) for task in seeds]  # of the seeds and of what was kept

    def keeps(self, task: data.Conversation) -> bool:
        """True if the instruction is fit, and not too similar to that of an earlier task."""
        instruction, reply = (turn.text.strip() for turn in task.turns[:2])
        words = words_of(task)
        reason = why_unfit(instruction)
        if not reason and reply == instruction:
            reason = "is also the output"
        if not reason and any(rouge_l(words, other) > 0.7 for other in self.earlier):
            reason = "is like an earlier one"
        if reason:
            self.report.add(task.id, f"dropped: the instruction {reason}")
            return False
        self.earlier.append(words)
        return True


def words_of(task: data.Conversation) -> list[str]:
    return re.findall(r"\w+", task.turns[0].text.lower())


def filter_tasks(tasks: Iterable[data.Conversation],
                 report: data.Report) -> list[data.Conversation]:
    new = Filter(report)
    return [task for task in tasks if new.keeps(task)]


# -- asking a teacher -----------------------------------------------------------------------------

# Our own words; what it asks for is what Alpaca asked for.
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
DRY = 10  # after so many requests in a row without a new instruction, it stops


def request(seeds: Sequence[data.Conversation], seed: int, number: int) -> data.Conversation:
    """Request `number`. It depends on nothing that was received, so that a run that was killed asks
    the same again, and finds the replies in its file."""
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
    ask = open_teacher(cfg)
    new, kept, asked, dry, tokens = Filter(report, seeds), [], 0, 0, 0
    with replies_beside(cfg.out) as cache, tqdm(total=cfg.count, desc="tasks kept") as bar:
        while len(kept) < cfg.count and dry < DRY:
            numbers = range(asked, asked + BATCH)
            requests = [request(seeds, cfg.seed, number) for number in numbers]
            # The number is in the key: asked once more, the same three seeds give other tasks.
            settings = [cfg.temperature, cfg.max_new_tokens, asked]
            replies = cache.ask(ask, requests, settings, label="")
            for number, reply in zip(numbers, replies):
                found = read_reply(reply, number, report)
                found = [task for task in found if new.keeps(task)]
                dry = 0 if found else dry + 1
                kept += found
            asked += BATCH
            tokens += count_tokens(replies)
            bar.set_postfix(requests=asked, tokens=tokens, refresh=False)
            bar.update(len(kept) - bar.n)
    print(f"{len(kept)} tasks kept from {asked} requests; {tokens} tokens")
    if dry >= DRY:
        print(f"stopped: the last {dry} requests gave nothing new")
    for task in kept[cfg.count:]:
        report.add(task.id, "dropped: more than --count")
    return kept[:cfg.count]


@dataclass
class Config:
    # FILE: a server's replies, one a line, each with its `choices`
    file: str = field(default="", metadata=dict(positional=True))  # replies, one a line
    seeds: str = ""  # instead of FILE: tasks to show to the teacher; Self-Instruct's 175, or Alpaca
    teacher: str = ""  # who writes tasks: MODEL@URL, a checkpoint; for toy seeds, oracle
    count: int = 1000  # how many tasks to keep
    out: str = "alpaca.json"  # the tasks; beside it a report and the teacher's replies
    temperature: float = 1.0  # of the teacher
    max_new_tokens: int = 3072  # of one reply
    seed: int = 0  # which seed tasks are shown together

    def __post_init__(self):
        check_above(self, 0, "count", "max_new_tokens")
        check_at_least(self, 0, "temperature")


def main(cfg: Config) -> dict:
    report = data.Report()
    if cfg.file:
        refuse_unused(cfg, ("seeds", "teacher", "count", "temperature", "max_new_tokens", "seed"),
                      f"{cfg.file} holds replies, so that nothing is asked")
        refuse_overwrite(cfg.file, cfg.out)
        kept = filter_tasks(read_completions(cfg.file, report), report)
    elif cfg.seeds and cfg.teacher:
        refuse_overwrite(cfg.seeds, cfg.out)
        kept = generate(cfg, report)
    else:
        raise UserError("give --seeds=FILE and --teacher, or a file of completions")
    if not kept:
        raise UserError(f"{cfg.file or cfg.teacher}: no task in it can be used{report}")
    return write_result(kept, cfg.out, report, "alpaca")


def read_completions(path: str, report: data.Report) -> list[data.Conversation]:
    records = data.parse_records(data.read_text(path), path)
    if not data.kind_of_records(records, KINDS):
        raise UserError(f"{path} has no completions: no record has `choices`")
    return list(data.parse_conversations(records, Path(path).stem, report, parse_choices))


if __name__ == "__main__":
    run(main, Config)
