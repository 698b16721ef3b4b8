"""Koala's data: conversations from many sources, mixed by weight.

    python -m recipes.koala split.json,oasst.json:0.5,lumi.json:5 --out=mix.json

Koala-Distill mixes ShareGPT, HC3 and, with weight 5, conversations about who the model is.
Koala-All adds Alpaca, OIG, HH-RLHF, WebGPT and summarize-from-feedback. All other weights are 1.

Besides ShareGPT, Alpaca and OpenAssistant files, it reads the other sources in the format in which
they were published. Those were tried on handmade records only.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import data
from data import Conversation, Report, one_round
from recipes import openassistant
from recipes.output import refuse_overwrite, write_result
from tools.config import UserError, run

# -- sources: each function makes ShareGPT records of one record ----------------------------------


def transcript(text: str, speaker: str) -> dict:
    """`speaker` matches where a speaker begins. Text before the first one is the system text."""
    parts = ["system", *re.split(speaker, text)]
    messages = [{"from": role, "value": value.strip()}
                for role, value in zip(parts[::2], parts[1::2])]
    return dict(conversations=messages)


def parse_hc3(record: dict) -> list[dict]:
    """Questions with answers by people and by ChatGPT. Koala learned from both."""
    answers = record["human_answers"] + record["chatgpt_answers"]
    return [one_round(record["question"], answer) for answer in answers]


def parse_hh(record: dict) -> list[dict]:
    """Two dialogues that differ in the last reply. Koala calls all replies of the rejected one
    unhelpful; here only the last one counts as rejected."""
    speaker = r"(?:\A|\n\n)(Human|Assistant):"
    return [{**transcript(record["chosen"], speaker), "rejected": False},
            {**transcript(record["rejected"], speaker), "rejected": True}]


def parse_webgpt(record: dict) -> list[dict]:
    """Two answers, each with its sources. A tie gives no conversation: both may be bad."""
    if record["score_0"] == record["score_1"]:
        return []
    found = []
    for i in (0, 1):
        question, quotes = record["question"]["full_text"], record[f"quotes_{i}"]
        lines = [f"[{n}] {title}: {extract}" for n, (title, extract)
                 in enumerate(zip(quotes["title"], quotes["extract"]), 1)]
        if lines:
            question = "\n".join([question, "", "Sources for your answer:", *lines])
        rejected = record[f"score_{i}"] < record[f"score_{1 - i}"]
        found.append(one_round(question, record[f"answer_{i}"], extra=dict(rejected=rejected)))
    return found


def parse_summaries(record: dict) -> list[dict]:
    """Summaries of one text, of which people chose the better one."""
    question = "Summarize this text.\n\n" + record["info"]["post"]
    found = []
    for i, summary in enumerate(record["summaries"]):
        extra = dict(rejected=i != record["choice"])
        found.append(one_round(question, summary["text"].strip(), extra=extra))
    return found


def parse_oig(record: dict) -> list[dict]:
    return [transcript(record["text"], r"(?:\A|\n)<(human|bot)>:")]


PARSERS = {"sharegpt": data.as_sharegpt, "alpaca": data.as_sharegpt, "hc3": parse_hc3,
           "hh": parse_hh, "webgpt": parse_webgpt, "summaries": parse_summaries, "oig": parse_oig}
KINDS = {**openassistant.KINDS, **data.KINDS,
         "hc3": ({"question", "human_answers", "chatgpt_answers"},),
         "hh": ({"chosen", "rejected"},),
         "webgpt": ({"question", "answer_0", "score_0"},),
         "summaries": ({"info", "summaries", "choice"},)}


def load(path, report: Report, rejected: bool = False) -> tuple[str, list[Conversation]]:
    """The kind of a file and its conversations; rejected replies only if `rejected`. Raises
    UserError when nothing can be used."""
    kind, records = data.read_file(path, KINDS)
    if kind == "documents" and "<human>:" in str(records[0]):
        kind = "oig"
    if kind == "oasst":
        found = openassistant.to_conversations(records, report)
    elif kind in PARSERS:
        found = data.parse_conversations(records, Path(path).stem, report, PARSERS[kind])
    else:
        raise UserError(f"{path} is plain text, not conversations")
    kept = []
    for c in found:
        if c.extra.get("rejected") is True and not rejected:
            report.add(c.id, "dropped: a rejected reply (--rejected keeps it)")
        else:
            kept.append(c)
    if not kept:
        raise UserError(f"{path}: no usable conversation{report}")
    return kind, kept


# -- mix ------------------------------------------------------------------------------------------

def mix(sources: Sequence[tuple[list[Conversation], float]], seed: int) -> list[Conversation]:
    """(conversations, weight) of each source, shuffled together. Weight 2 takes all of them twice,
    0.5 a random half."""
    rng, mixed = random.Random(seed), []
    for conversations, weight in sources:
        n = round(weight % 1 * len(conversations))
        mixed += conversations * int(weight) + rng.sample(conversations, n)
    rng.shuffle(mixed)
    return mixed


@dataclass
class Config:
    files: str  # FILE:WEIGHT,FILE,...; 2: all of it twice, 0.5: a random half
    out: str = "mix.json"  # the mix; the report is written beside it
    rejected: bool = False  # keep replies that people rejected, for --template=koala
    seed: int = 0  # of the order and of the random halves


def main(cfg: Config) -> dict:
    report, sources, kinds = Report(), [], set()
    for item in cfg.files.split(","):
        file, weight = re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", item).groups()
        weight = float(weight or 1)
        refuse_overwrite(file, cfg.out)
        kind, found = load(file, report, cfg.rejected)
        print(f"{file}: {len(found)} conversations, weight {weight:g}")
        sources.append((found, weight))
        kinds.add(kind)
    kind = "alpaca" if kinds == {"alpaca"} else "sharegpt"
    return write_result(mix(sources, cfg.seed), cfg.out, report, kind)


if __name__ == "__main__":
    run(main, Config)
