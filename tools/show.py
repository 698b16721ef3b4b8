"""The commands of data.py: conversations token by token, and statistics of a file.

    python data.py show sharegpt.json                     # token by token, supervised ones marked
    python data.py show sharegpt.json --ckpt=out/vicuna   # with the loss of each of them
    python data.py show sharegpt.json --html=tokens.html  # the same as a page
    python data.py stats sharegpt.json                    # conversations, turns, tokens, lengths

The file holds ShareGPT or Alpaca conversations.
"""

import html
import itertools
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
from data import IGNORE, IMAGE_SLOT, Conversation, Example, Report, Tokenizer
from tools import checkpoint
from tools.config import UserError, refuse_unused


@dataclass
class ShowConfig:
    file: str  # ShareGPT or Alpaca
    tokenizer: str = ""  # folder or tokenizer.model; default: --ckpt's, out/base's, or a new one
    template: str = ""  # default: --ckpt's, or alpaca for Alpaca files and vicuna_v1.1 for others
    ckpt: str = ""  # checkpoint folder: show the loss of each supervised token, in nats
    html: str = ""  # write a page to this file instead of printing
    count: int = 2  # conversations to show
    seed: int = 0  # for choosing them


def show(cfg: ShowConfig) -> dict:
    """Shows rendered conversations token by token. Supervised tokens are green on a terminal and in
    the page, and stand in [[ ]] elsewhere."""
    if cfg.ckpt:
        refuse_unused(cfg, ("tokenizer",), f"{cfg.ckpt} has its own")
    report, meta, model = Report(), {}, None
    conversations = data.load_conversations(cfg.file, report)
    if cfg.ckpt:
        model, _, meta = checkpoint.load(cfg.ckpt)
    tokenizer = tokenizer_to_show(cfg, conversations)
    template = cfg.template or meta.get("template") or data.default_template(data.kind_of(cfg.file))
    total, supervised, sections = 0, 0, []
    chosen = random.Random(cfg.seed).sample(conversations, min(cfg.count, len(conversations)))
    for c in chosen:
        example = data.render(c, template, tokenizer)
        counts = token_counts(c, example, template, tokenizer)
        title = f"{c.id} (template {template}): {counts}"
        losses = token_losses(model, example) if model else None
        chips = split_into_chips(example, tokenizer, losses)
        if losses is not None and not np.isnan(losses).all():
            title += f", loss {np.nanmean(losses):.3f} nats per supervised token"
        if not cfg.html:
            print(f"\n--- {title}\n{print_chips(chips, sys.stdout.isatty())}")
        sections.append((title, chips))
        total += len(example.tokens)
        supervised += n_supervised(example)
    if cfg.html:
        with data.atomic_write(cfg.html) as file:
            file.write(page_of_chips(sections))
        print(f"wrote {cfg.html}")
    print(f"\n{len(conversations)} conversations in {cfg.file}{report}")
    return dict(conversations=len(chosen), tokens=total, supervised=supervised, **report)


def tokenizer_to_show(cfg: ShowConfig, conversations: Sequence[Conversation]) -> Tokenizer:
    """The tokenizer that was asked for or out/base's. Without either, a new one is trained on the
    file itself, which is enough to see where tokens and the loss mask begin and end."""
    if cfg.tokenizer or cfg.ckpt or Path("out/base/latest").exists():
        return data.find_tokenizer(cfg.tokenizer or cfg.ckpt or "out/base")
    print("no --tokenizer, and none in out/base: a new one, trained on this file")
    texts = [turn.whole() for c in conversations[:3000] for turn in c.turns]
    with tempfile.TemporaryDirectory() as folder:
        return data.train_tokenizer(texts, 1024, Path(folder) / "tokenizer.model")


def n_supervised(example: Example) -> int:
    return sum(label != IGNORE for label in example.labels)


def token_counts(c: Conversation, example: Example, template: str, tokenizer: Tokenizer) -> str:
    """Token counts by source. bos and the template's text count as the user's, the end of a reply
    as the assistant's."""
    without_system = data.render(replace(c, system=""), template, tokenizer)
    total, assistant = len(example.tokens), n_supervised(example)
    system = total - len(without_system.tokens)
    slots = list(example.tokens).count(IMAGE_SLOT)
    user = total - system - slots - assistant
    images = f", image slots {slots}" if slots else ""
    return f"{total} tokens: system {system}, user {user}{images}, assistant {assistant}"


class Chip(NamedTuple):
    """A token as it is shown, or several image slots."""
    text: str
    supervised: bool
    loss: float  # in nats; NaN where there is none


def split_into_chips(example: Example, tokenizer: Tokenizer,
                     losses: np.ndarray | None = None) -> list[Chip]:
    tokens, chips = example.tokens, []
    for slots, group in itertools.groupby(range(len(tokens)), lambda i: tokens[i] == IMAGE_SLOT):
        places = list(group)
        if slots:
            chips.append(Chip(f"<{len(places)} image slots>", False, math.nan))
            continue
        for i in places:
            loss = math.nan if losses is None else float(losses[i])
            chips.append(Chip(spell_one(tokenizer, tokens[i]), example.labels[i] != IGNORE, loss))
    return chips


def spell_one(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token. A part of a character is shown as its byte, a newline also as ↵."""
    text = data.spell(tokenizer, [token])
    if "\ufffd" in text:
        text = tokenizer.sp.id_to_piece(token)
    return text.replace("\n", "↵\n")


def print_chips(chips: Sequence[Chip], colored: bool) -> str:
    """Chips in alternating shades of gray and green for a terminal. Elsewhere | is between tokens,
    and [[ ]] around those that are supervised."""
    texts = []
    for chip in chips:
        texts.append(chip.text if math.isnan(chip.loss) else f"{chip.text}({chip.loss:.2f})")
    if colored:
        out = ""
        for i, (chip, text) in enumerate(zip(chips, texts)):
            shade = (22, 28)[i % 2] if chip.supervised else (236, 240)[i % 2]  # of 256 colors
            out += f"\033[97;48;5;{shade}m{text}\033[0m"
        return out
    groups = []
    for supervised, group in itertools.groupby(zip(chips, texts), lambda pair: pair[0].supervised):
        joined = "|".join(text for _, text in group)
        groups.append(f"[[{joined}]]" if supervised else joined)
    return "|".join(groups)


CHIP_STYLE = """body { font: 15px/2 monospace; max-width: 60em; margin: 2em auto; padding: 0 1em }
h2 { font: bold 15px sans-serif } p { white-space: pre-wrap; overflow-wrap: anywhere }
span { border-radius: 3px; padding: 2px 0; margin: 0 1px; background: #ddd; color: #111 }
span.supervised { background: #7ecb81 }"""


def page_of_chips(sections: Sequence[tuple[str, list[Chip]]]) -> str:
    """A page that needs nothing else: a title and chips for each conversation. Pointing at a chip
    shows its loss, and the darker it is, the higher."""
    parts = [f"<!doctype html>\n<meta charset=utf-8>\n<title>Tokens and loss mask</title>\n"
             f"<style>\n{CHIP_STYLE}\n</style>"]
    for title, chips in sections:
        parts.append(f"<h2>{html.escape(title)}</h2>\n<p>")
        for chip in chips:
            marks = ' class="supervised"' if chip.supervised else ""
            if not math.isnan(chip.loss):
                lightness = 85 - 40 * min(chip.loss, 2) / 2  # percent: 85 at 0 nats, 45 from 2 on
                marks += f' style="background: hsl(122 45% {lightness:.0f}%)"'
                marks += f' title="{chip.loss:.3f} nats"'
            parts.append(f"<span{marks}>{html.escape(chip.text)}</span>")
        parts.append("</p>\n")
    return "".join(parts)


def token_losses(model, example: Example) -> np.ndarray:
    """(T,) in nats; NaN where a token is not supervised, or beyond the model's context."""
    if IMAGE_SLOT in example.tokens:
        raise UserError("--ckpt: the loss of a conversation with images needs the images")
    losses = np.full(len(example.tokens), np.nan)
    n = min(len(example.tokens), model.config.max_seq_len)
    with torch.inference_mode():
        logits = model(torch.tensor([example.tokens[:n]]))  # (1, n, V)
        logp = logits[0].float().log_softmax(-1)
    for i in range(1, n):
        if example.labels[i] != IGNORE:
            losses[i] = -logp[i - 1, example.labels[i]].item()
    return losses


@dataclass
class StatsConfig:
    file: str  # ShareGPT or Alpaca
    tokenizer: str = "out/base"  # checkpoint folder or tokenizer.model
    template: str = ""  # default: alpaca for Alpaca files, vicuna_v1.1 for others


def stats(cfg: StatsConfig) -> dict:
    """Prints the size of a file, what was dropped, and a histogram of lengths."""
    tokenizer = data.find_tokenizer(cfg.tokenizer)
    template = cfg.template or data.default_template(data.kind_of(cfg.file))
    report, lengths, turns, supervised = Report(), [], 0, 0
    for c in data.load_conversations(cfg.file, report):
        example = data.render(c, template, tokenizer)
        lengths.append(len(example.tokens))
        turns += len(c.turns)
        supervised += n_supervised(example)
    total = sum(lengths)
    share = 100 * supervised / total
    print(f"{cfg.file}: {len(lengths)} conversations, {turns} turns, {total} tokens, "
          f"{supervised} supervised ({share:.1f}%), template {template}{report}")
    median = sorted(lengths)[len(lengths) // 2]
    print(f"tokens in a conversation: median {median}, longest {max(lengths)}")
    bins = Counter(max(5, (n - 1).bit_length()) for n in lengths)  # powers of two, from 32
    for power in range(min(bins), max(bins) + 1):
        bar = "#" * round(50 * bins[power] / max(bins.values()))
        print(f"up to {1 << power:>7} {bins[power]:>8} {bar}")
    return dict(conversations=len(lengths), turns=turns, tokens=total, supervised=supervised,
                **report)
