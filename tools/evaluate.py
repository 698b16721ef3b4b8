"""LLaMA's evaluation: multiple choice by likelihood.

    python -m tools.evaluate piqa.jsonl --ckpt=llama-7b          # zero-shot, as in LLaMA's table 3
    python -m tools.evaluate arc.jsonl --ckpt=llama-7b --shots=5
    python -m toy.world --facts=facts.jsonl                      # where do the people live?
    python -m tools.evaluate facts.jsonl --ckpt=out/base         # accuracy by group, too

Section 3 of LLaMA (arXiv 2302.13971): the answer is the choice with the highest
log P(choice | question) / number of its characters. For OpenBookQA and BoolQ, it is the one with
the highest log P(choice | question) - log P(choice | "Answer:"). Every model, even one that was
trained to chat, reads plain text: bos, the question, the choice.

The file holds JSON lines with question, choices, and answer: the right choice, or its index from 0.
The published files of PIQA, HellaSwag, ARC, OpenBookQA and BoolQ are recognized by their fields.
The paper does not print its prompts; these are lm-evaluation-harness's, and ARC's for OpenBookQA.
AI2's file of OpenBookQA has the fields of ARC: it needs --normalize=answer. A record may also have
a group, which gets an accuracy of its own.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import model
import vision
from tools import checkpoint, config
from tools.config import UserError, run


@dataclass
class EvaluateConfig:
    file: str  # questions, as JSON lines
    ckpt: str = "out/vicuna"  # a folder of ours, Meta's or Hugging Face's
    shots: int = 0  # this many questions become solved examples before each of the others
    normalize: Literal["auto", "characters", "answer"] = "auto"  # auto: the paper's for each task
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 above 1 B parameters
    quantize: Literal["", "q8", "q4"] = ""  # quantize to llama.cpp's 8- or 4-bit blocks

    def __post_init__(self):
        config.check_at_least(self, 0, "shots")


@dataclass
class Item:
    question: str  # the text before the choice
    choices: list[str]
    right: int | None  # index of the right choice; None if the file does not say
    normalize: str  # by "characters", or by "answer"
    group: str = ""


# -- the fields of published files: each function returns question, choices, right ----------------

def find(answer, names: Sequence) -> int | None:
    """The index of the answer among the names of the choices, or None."""
    names = [str(name).strip() for name in names]
    answer = str(answer).strip()
    return names.index(answer) if answer in names else None


def ask(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def piqa(r: dict) -> tuple:
    return ask(r["goal"]), [r["sol1"], r["sol2"]], find(r.get("label"), (0, 1))


def hellaswag(r: dict) -> tuple:
    text = r["ctx"]
    if "ctx_b" in r:
        text = f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"
    texts = []
    for part in (text, *r["endings"]):  # from WikiHow, with marks such as [header]
        part = re.sub(r"\[.*?\]", "", part.replace(" [title]", ". "))
        texts.append(part.replace("  ", " "))
    return texts[0], texts[1:], find(r.get("label"), range(len(texts) - 1))


def arc(r: dict) -> tuple:
    """AI2's files have question: {stem, choices: [{text, label}, ...]}. Hugging Face's have
    choices: {text: [...], label: [...]}, and for OpenBookQA question_stem."""
    if isinstance(r.get("question"), dict):
        question, choices = r["question"]["stem"], r["question"]["choices"]
        texts = [choice["text"] for choice in choices]
        labels = [choice["label"] for choice in choices]
    else:
        question = r["question_stem"] if "question_stem" in r else r["question"]
        texts, labels = r["choices"]["text"], r["choices"]["label"]
    return ask(question), texts, find(r["answerKey"], labels)


def boolq(r: dict) -> tuple:
    question = r["passage"] + "\n" + ask(r["question"].rstrip("?") + "?")
    return question, ["no", "yes"], find(str(r.get("answer")).lower(), ("false", "true"))


def plain(r: dict) -> tuple:
    """The question is used as it is, so it may be the beginning of a sentence."""
    choices, answer = r["choices"], r.get("answer")
    names = choices if isinstance(answer, str) else range(len(choices))
    return r["question"], choices, find(answer, names)


# A record is read by the first function whose keys it has.
LAYOUTS = (
    ({"goal", "sol1", "sol2"}, piqa, "characters"),
    ({"ctx", "endings"}, hellaswag, "characters"),
    ({"question_stem", "answerKey"}, arc, "answer"),  # OpenBookQA
    ({"question", "answerKey"}, arc, "characters"),
    ({"question", "passage"}, boolq, "answer"),
    ({"question", "choices"}, plain, "characters"),
)


def parse(record) -> Item | None:
    """None for a record that is in none of the layouts."""
    keys = record.keys() if isinstance(record, dict) else set()
    for needed, layout, normalize in LAYOUTS:
        if needed <= keys:
            try:
                question, choices, right = layout(record)
                choices = [choice.strip() for choice in choices]
                group = str(record.get("group") or "")
                return Item(question.strip(), choices, right, normalize, group)
            except (LookupError, TypeError, AttributeError):  # such as a number instead of text
                return None
    return None


def why_unusable(item: Item | None) -> str | None:
    if item is None:
        return "unknown fields"
    if len(item.choices) < 2 or not all(item.choices):
        return "fewer than two choices, or an empty one"
    if item.right is None:
        return "no right answer"
    return None


def read_items(path) -> tuple[list[Item], data.Report]:
    """The usable questions of a file, and the others, counted by the reason to skip them."""
    items, skipped = [], data.Report()
    for number, record in enumerate(data.parse_records(data.read_text(path), path), 1):
        item = parse(record)
        if reason := why_unusable(item):
            skipped.add(f"record {number}", reason)
        else:
            items.append(item)
    if not items:
        raise UserError(f"{path}: no usable question{skipped}; expected question, choices, answer, "
                        "or the fields of PIQA, HellaSwag, ARC, OpenBookQA or BoolQ")
    return items, skipped


# -- scores ---------------------------------------------------------------------------------------

@torch.inference_mode()
def log_likelihoods(net: model.LLaMA, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """log P(choice | context) in nats, (B,), for B pairs of context and choice, as token ids.

    Rows are padded on the right: attention is causal, so no choice sees the padding after it.
    """
    device = net.tok_embeddings.weight.device
    tokens = [torch.tensor(context + choice) for context, choice in rows]
    labels = [torch.tensor([data.IGNORE] * len(context) + choice) for context, choice in rows]
    tokens = pad_sequence(tokens, batch_first=True).to(device)
    labels = pad_sequence(labels, batch_first=True, padding_value=data.IGNORE).to(device)
    targets = model.shift_labels(labels, None)  # (B, T-1)
    in_choice = targets != data.IGNORE
    x = net.hidden(tokens)[:, :-1][in_choice]  # (N, C): logits only where a choice is predicted
    log_p = net.output(net.norm(x)).float().log_softmax(-1)  # (N, V)
    log_p = log_p.gather(1, targets[in_choice][:, None])[:, 0]
    row = in_choice.nonzero()[:, 0]  # of each of the N tokens
    return torch.zeros(len(rows), device=device).index_add(0, row, log_p).cpu()


def make_rows(item: Item, shots: str, tokenizer: data.Tokenizer) -> list[tuple]:
    """(context, choice) for each choice after the question, as token ids. To normalize by
    "answer", each choice follows once more, after "Answer:"."""
    contexts = [shots + item.question]
    if item.normalize == "answer":
        contexts.append("Answer:")
    rows = []
    for context in contexts:
        ids = [tokenizer.bos, *tokenizer.encode(context)]
        rows += [(ids, tokenizer.encode(choice)) for choice in item.choices]  # " choice"
    return rows


def scores(net: model.LLaMA, item: Item, rows: list[tuple]) -> torch.Tensor:
    """The normalized score of each choice."""
    log_p = log_likelihoods(net, rows)
    if item.normalize == "answer":
        after_question, after_answer = log_p.chunk(2)
        return after_question - after_answer
    return log_p / torch.tensor([len(choice) for choice in item.choices])


# -- python -m tools.evaluate ---------------------------------------------------------------------

def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval for a share of n. It stays within 0 to 1, even when all are right."""
    z, p = 1.96, right / n
    middle = p + z ** 2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z ** 2 / (4 * n ** 2))
    return (middle - half) / (1 + z ** 2 / n), (middle + half) / (1 + z ** 2 / n)


def summarize(name: str, graded: list[tuple[Item, bool]]) -> dict:
    """Prints and returns the accuracy on some of the questions."""
    n, right = len(graded), sum(correct for _, correct in graded)
    low, high = interval(right, n)
    chance = sum(1 / len(item.choices) for item, _ in graded) / n
    print(f"{name:<12}{100 * right / n:>6.1f}% of {n}, 95% interval {100 * low:.1f} to "
          f"{100 * high:.1f}; chance {100 * chance:.1f}%")
    return dict(accuracy=right / n, low=low, high=high, questions=n, chance=chance)


def main(cfg: EvaluateConfig) -> dict:
    items, skipped = read_items(cfg.file)
    if cfg.shots >= len(items):
        raise UserError(f"--shots={cfg.shots} leaves none of {len(items)} questions to ask")
    dtype = dict(auto=None, float32=torch.float32, bfloat16=torch.bfloat16)[cfg.dtype]
    net, path, meta = vision.load(cfg.ckpt, cfg.device, dtype=dtype, quantize=cfg.quantize)
    net = getattr(net, "llama", net)  # the language model of MiniGPT-4
    tokenizer, window = data.Tokenizer(path), checkpoint.window(meta, net.config)
    solved = [f"{item.question} {item.choices[item.right]}\n\n" for item in items[:cfg.shots]]
    graded = []
    for item in tqdm(items[cfg.shots:], "questions", leave=False, delay=1):
        if cfg.normalize != "auto":
            item.normalize = cfg.normalize
        rows = make_rows(item, "".join(solved), tokenizer)
        if max(len(context + choice) for context, choice in rows) > window:
            skipped.add(item.question, f"longer than the context of {window} tokens")
            continue
        best = int(scores(net, item, rows).argmax())
        graded.append((item, best == item.right))
    if not graded:
        raise UserError(f"{cfg.file}: no question could be asked{skipped}")
    kinds = " and ".join(sorted({item.normalize for item, _ in graded}))
    print(f"{cfg.ckpt} on {cfg.file}: {cfg.shots} shots, normalized by {kinds}; "
          f"{len(skipped.entries)} skipped{skipped}")
    figures, groups = summarize("right", graded), {}
    for name in sorted({item.group for item, _ in graded if item.group}):
        groups[name] = summarize(f"  {name}", [pair for pair in graded if pair[0].group == name])
    return dict(figures, groups=groups, skipped=dict(skipped))


if __name__ == "__main__":
    run(main, EvaluateConfig)
