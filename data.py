"""From people's files to rows of tokens with a loss mask: a library, and a tool for the data of chat models.

    python data.py show toy:conversations --tokenizer=out/base   # what is learned is highlighted
    python data.py show sharegpt.json --ckpt=out/vicuna  # and the loss of each token
    python data.py stats oasst_trees.jsonl.gz            # conversations, turns, tokens, lengths
    python data.py clean sharegpt.json --out=clean.json  # as Vicuna's data; each drop and change is reported
    python data.py split clean.json --seq_len=2048 --out=split.json
    python data.py oasst trees.jsonl --pick=best --out=oasst.json
    python data.py identity --name=Lumi --maker="two students" --out=lumi.json
    python data.py mix split.json,oasst.json:0.5,lumi.json:5 --out=mix.json
    python data.py tokens mix.json --tokenizer=out/base --out=tokens.jsonl

Files are recognised by content (FORMATS); JSON or JSON lines, also gzipped, or plain text.
Tokens and mask are built together, piece by piece, by `render`: a prefix is never tokenised again and
counted, which is how the originals came to drop and mis-mask conversations.
"""

import bisect
import codecs
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Optional, Sequence

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

import toy
from config import Problem, run

IGNORE = -100  # label of a token that is not learned
IMAGE_SLOT = -1  # token that an image vector takes the place of


# -- tokenizer -----------------------------------------------------------------------------------------------

class Tokenizer:
    """A SentencePiece BPE model with byte fallback and LLaMA's ids: unk 0, bos 1, eos 2."""

    def __init__(self, path):
        if not Path(path).is_file():
            raise Problem(f"no tokenizer at {path}")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise Problem(f"{path} is not a SentencePiece model") from None
        self.path = Path(path)
        self.unk, self.bos, self.eos = self.sp.unk_id(), self.sp.bos_id(), self.sp.eos_id()
        self.vocab_size = self.sp.vocab_size()
        self._newline = self.sp.piece_to_id("<0x0A>")

    def encode(self, text: str, continuation: bool = False) -> list[int]:
        """Ids without bos and eos; no text can give a control piece such as </s>. SentencePiece begins every
        text with a space of its own; one that goes on in the same line (continuation) must not get it."""
        if not continuation:
            return self.sp.encode(text)
        ids = self.sp.encode("\n" + text)  # a newline is always the byte piece <0x0A>: nothing merges with it
        return ids[ids.index(self._newline) + 1:]

    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        ids = [i for i in ids if i < self.vocab_size]  # published models have rows without a piece: padding
        return self.sp.decode([self._newline, *ids])[1:] if continuation else self.sp.decode(ids)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path) -> Tokenizer:
    """BPE, byte fallback, no normalisation: LLaMA's settings, so that llama.cpp tokenises ours the same way.

    `vocab_size` is an upper bound: a small text may not have that many pieces to give.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    if not lines:
        raise Problem("no text to train a tokenizer on")
    # whoever speaks later will speak in templates: their words deserve pieces of their own
    spoken = [line for t in (TEMPLATES["vicuna_v1.1"], TEMPLATES["alpaca"])
              for part in (t.system, t.system_with_input, t.ask, t.ask_with_input)
              for line in part.format(text="", input="").split("\n") if line.strip()]
    lines += spoken * max(1, len(lines) // 200)
    letters = Counter(itertools.chain.from_iterable(lines))
    rare = {ord(c): "\n" for c, _ in letters.most_common()[max(1, vocab_size - 260):]}
    # of a large alphabet the rarest letters stay bytes, or there would be no room for the bytes
    lines = [part for line in lines for part in line.translate(rare).split("\n") if part.strip()]
    while True:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")), model_type="bpe",
                vocab_size=max(vocab_size, 260 + len(letters) - len(rare)), byte_fallback=True,
                split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, character_coverage=0.99995, max_sentence_length=1 << 20,
                minloglevel=2, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
            break
        except RuntimeError as error:
            if "too high" not in str(error) or vocab_size <= 300:
                raise Problem(f"could not train a tokenizer: {error}") from None
            vocab_size = vocab_size * 4 // 5
    path.with_suffix(".vocab").unlink(missing_ok=True)
    return Tokenizer(path)


def find_tokenizer(where: str) -> Tokenizer:
    """From a tokenizer.model, or from a checkpoint folder."""
    path = Path(where)
    if (path / "latest").exists():
        path = path / (path / "latest").read_text().strip()
    if path.is_dir():
        path = path / "tokenizer.model"
    if not path.exists():
        raise Problem(f"no tokenizer at {where}; give --tokenizer=FILE, or train one: python train_sft.py")
    return Tokenizer(path)


# -- conversations -------------------------------------------------------------------------------------------

class Turn(NamedTuple):
    role: str  # "user" or "assistant"
    text: str
    input: str = ""  # Alpaca's second field: the material an instruction is about
    slots: int = 0  # image vectors that are shown before the text


@dataclass
class Conversation:
    turns: list[Turn]  # user, assistant, user, assistant, ...; the last may wait for its reply
    id: str = ""
    system: Optional[str] = None  # instead of the template's own
    # other keys of the record. Of the last reply: "cut": it has no end; "rejected": people liked another more
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Template:
    """How a conversation becomes a string, in training and in inference: one object for both.

    The first round is [system between] start ask reply end; later ones [between, when glued] ask reply end.
    """
    system: str
    ask: str  # {text} is the user's, {input} Alpaca's input; </s> is the control piece
    between: str = " "
    glued: bool = False  # the reply continues the line: SentencePiece may not put its space there
    start: str = ""  # before the first question, with or without a system text
    end: str = ""  # the text that ends a reply; </s> when empty
    system_with_input: str = ""
    ask_with_input: str = ""
    ask_rejected: str = ""  # before a reply that people rejected


TEMPLATES = {
    # SYSTEM USER: q ASSISTANT: a</s>USER: q ASSISTANT: a</s>, no newline anywhere; also v1.3 and v1.5
    "vicuna_v1.1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
               "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        ask="USER: {text} ASSISTANT:"),
    # as it was trained; "###" is text, so an answer can forge its own end
    "vicuna_v0": Template(
        system="A chat between a curious human and an artificial intelligence assistant. "
               "The assistant gives helpful, detailed, and polite answers to the human's questions.",
        between="\n\n", start="###", ask=" Human: {text}\n### Assistant:", end="\n###"),
    # the preamble depends on whether there is an input; the reply follows the colon directly. A deliberate
    # deviation: the original encodes prompt and reply as one string, in which ":" and a "-" after it
    # become one piece, and the "-" is never learned
    "alpaca": Template(
        system="Below is an instruction that describes a task. "
               "Write a response that appropriately completes the request.",
        system_with_input="Below is an instruction that describes a task, paired with an input that provides "
                          "further context. Write a response that appropriately completes the request.",
        ask="### Instruction:\n{text}\n\n### Response:",
        ask_with_input="### Instruction:\n{text}\n\n### Input:\n{input}\n\n### Response:",
        between="\n\n", glued=True),
    # a rejected reply is learned, too, but under another name than the one the model is asked by
    "koala": Template(system="BEGINNING OF CONVERSATION:", ask="USER: {text} GPT:",
                      ask_rejected="USER: {text} An Unhelpful Answer:"),
    # the original also learns the <|prompter|> that follows a reply; here only the reply and its </s>
    "oasst": Template(system="", ask="<|prompter|>{text}</s><|assistant|>", between="", glued=True),
    "minigpt4": Template(system="", start="###", ask="Human: {text} ###Assistant: ", between="", end="###"),
    # the same in the chat, as published
    "minigpt4_chat": Template(
        system="Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide "
               "it to you. Please answer my questions.",
        start="###", ask="Human: {text}###Assistant:", between="", end="###"),
    "plain": Template(system="", ask="{text}", between="\n", glued=True),  # for a base model, which knows no roles
    # what a base model is asked, and what of its continuation counts: lines, and the next line
    "lines": Template(system="", ask="{text}\n", between="", glued=True, end="\n"),
}
CHAT = {"minigpt4": "minigpt4_chat"}  # what to talk in to a model that was trained in another template


def get_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise Problem(f"unknown template {name}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


class Example(NamedTuple):
    tokens: Sequence[int]
    labels: Sequence[int]  # the token itself where it is learned, IGNORE elsewhere


def render(conversation: Conversation, template: str, tokenizer: Tokenizer) -> Example:
    """Tokens and labels of a conversation: replies and their end are learned, nothing else.

    A conversation that ends with a user turn gives the prompt for its reply. Each segment is encoded alone:
    user text can forge neither a control piece nor an image slot nor supervision.
    """
    t, extra, turns = get_template(template), conversation.extra, conversation.turns
    if extra.get("rejected") and not t.ask_rejected:
        raise Problem(f"{conversation.id}: template {template} has no words for a rejected reply; koala has")
    tokens, labels = [tokenizer.bos], [IGNORE]

    def add(ids: list[int], supervised: bool) -> None:
        tokens.extend(ids)
        labels.extend(ids if supervised else [IGNORE] * len(ids))

    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            add(tokenizer.encode(turn.text, t.glued), True)
            if not (extra.get("cut") and i == len(turns) - 1):  # never learn an end in mid-sentence
                add(tokenizer.encode(t.end, continuation=True) if t.end else [tokenizer.eos], True)
            continue
        with_input = bool(turn.input) and bool(t.ask_with_input)
        text = turn.text if with_input or not turn.input else turn.text + "\n" + turn.input
        ask = t.ask_with_input if with_input else t.ask
        if extra.get("rejected") and i >= len(turns) - 2:
            ask = t.ask_rejected
        if turn.slots:
            ask = ask.replace("{text}", "<Img>{slots}</Img> {text}")
        before = t.between if t.glued and i else ""
        if i == 0:
            system = conversation.system if conversation.system is not None else (
                t.system_with_input if with_input else t.system)
            before = system + t.between + t.start if system else t.start
        for k, part in enumerate(re.split(r"(</s>|\{slots\})", ask)):  # text cannot add to these
            if part == "</s>":
                add([tokenizer.eos], False)
            elif part == "{slots}":
                add([IMAGE_SLOT] * turn.slots, False)
            else:
                goes_on = t.glued or bool(t.end) and k == 0
                part = part.format(text=text, input=turn.input)
                add(tokenizer.encode(part if k else before + part, goes_on and i + k > 0), False)
    return Example(tokens, labels)


def stretches(labels: Sequence[int]) -> list[tuple[int, int, bool]]:
    """(begin, end, learned) of each run of labels that are all learned or all not: question, reply, ..."""
    marks = np.diff(np.asarray(labels) != IGNORE).nonzero()[0] + 1
    borders = [0, *marks.tolist(), len(labels)]
    return [(a, b, labels[a] != IGNORE) for a, b in zip(borders, borders[1:]) if a < b]


def prompt(conversation: Conversation, template: str, tokenizer: Tokenizer, room: int) -> list[int]:
    """Tokens up to the reply. What does not fit into `room` goes: the oldest rounds first, and those with a
    picture last, as later questions are about it."""
    while True:
        tokens = render(conversation, template, tokenizer).tokens
        if len(tokens) < room or len(conversation.turns) < 3:
            return tokens
        turns = conversation.turns
        at = next((i for i in range(0, len(turns) - 2, 2) if not turns[i].slots), 0)
        conversation = replace(conversation, turns=turns[:at] + turns[at + 2:])


def said(text: str, template: str, complete: bool = True) -> tuple[str, bool]:
    """A reply without the text that ends it, and whether it was there. In a stream (not `complete`) what may
    be the beginning of the end is held back."""
    end = get_template(template).end
    if end and end in text:
        return text[:text.index(end)], True
    held = next((n for n in range(len(end) - 1, 0, -1) if text.endswith(end[:n])), 0)
    return text if complete or not held else text[:-held], False


# -- reading files -------------------------------------------------------------------------------------------

class Report(Counter):
    """What happened to which conversation: counts by reason, and every (id, reason) in `entries`."""

    def __init__(self, *args):
        super().__init__(*args)
        self.entries: list[tuple[str, str]] = []
        self.read = 0  # conversations, with those that were dropped

    def add(self, name: str, reason: str) -> None:
        self[reason] += 1
        self.entries.append((name, reason))

    def __str__(self) -> str:
        return "".join(f"; {reason}: {n}" for reason, n in sorted(self.items()))


CHUNK = 1 << 20  # bytes read at a time
LARGE = 1 << 24  # bytes; reading and tokenising such a file takes long enough for a progress bar and a cache
TOY = {"toy:documents": lambda rng: dict(text=toy.document(rng)), "toy:instructions": toy.instruction,
       "toy:conversations": toy.conversation}


def read_chunks(path) -> Iterator[str]:
    """The text of a file, gzipped or not, in pieces; of a large one with a progress bar. A name in TOY stands
    for a thousand records of the toy world."""
    if str(path) in TOY:
        rng = random.Random(0)
        yield from (json.dumps(TOY[str(path)](rng)) + "\n" for _ in range(1000))
        return
    path = Path(path)
    if not path.is_file():
        raise Problem(f"{path} is a folder; give a file" if path.is_dir() else f"no such file: {path}")
    decoder, line, empty, size = codecs.getincrementaldecoder("utf-8-sig")(), 1, True, path.stat().st_size
    bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=size < LARGE)
    with open(path, "rb") as raw, bar:
        file = gzip.open(raw) if raw.read(2) == b"\x1f\x8b" else raw
        raw.seek(0)
        chunk = b"-"
        while chunk:
            try:
                chunk = file.read(CHUNK)
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object[:error.start].count(b"\n")
                raise Problem(f"{path} is not UTF-8 text (line {line}); convert it, say with iconv") from None
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise Problem(f"{path} is a damaged gzip file ({error})") from None
            empty = empty and not text.strip()
            yield text
            line += chunk.count(b"\n")
            bar.update(raw.tell() - bar.n)
    if empty:
        raise Problem(f"{path} is empty")


def read_text(path) -> str:
    return "".join(read_chunks(path))


SPACE = re.compile(r"[ \t\r\n]*")


def read_records(path, report: Optional[Report] = None) -> Iterator:
    """The values of a JSON array or of JSON lines, one at a time: the file may be larger than the memory.

    Mended: half a character ("\\ud83d" without its partner), which no UTF-8 text can hold, becomes "?"; a
    record that is a JSON string with JSON inside is read again; NaN becomes null. Raises Problem, with the
    line, at what is not JSON: the records after it would be lost in silence.
    """
    report = Report() if report is None else report
    chunks, text, at, line = read_chunks(path), "", 0, 1
    twice: list[dict] = []

    def as_dict(pairs: list) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            twice.append(record)
        return record

    def fail(message: str, where: int):
        where = line + text.count("\n", 0, where)
        raise Problem(f"{path}: broken JSON at line {where}: {message}")

    def more() -> bool:
        """Forgets what was read and doubles the rest: no record is tried too often. False at the end."""
        nonlocal text, at, line
        pieces, wanted = [], len(text) - at
        while wanted >= 0 and (piece := next(chunks, None)) is not None:
            pieces.append(piece)
            wanted -= len(piece) or 1
        if pieces:
            line += text.count("\n", 0, at)
            text, at = text[at:] + "".join(pieces), 0
        return bool(pieces)

    def peek() -> str:
        """The next character that is no space; "" at the end."""
        nonlocal at
        at = SPACE.match(text, at).end()
        while at == len(text) and more():
            at = SPACE.match(text, at).end()
        return text[at:at + 1]

    decode = json.JSONDecoder(object_pairs_hook=as_dict, parse_constant=lambda name: None).raw_decode
    number, in_array = 0, peek() == "["
    at += in_array
    while (mark := peek()) and not (in_array and mark == "]"):
        twice.clear()
        try:
            value, end = decode(text, at)
        except json.JSONDecodeError as error:  # perhaps only because the rest has not been read
            if (error.msg.startswith("Unterminated") or error.pos >= len(text) - 16) and more():
                continue
            fail(error.msg, error.pos)
        except RecursionError:
            fail("nested too deeply to be read", at)
        except ValueError as error:  # a number of thousands of digits
            fail(str(error), at)
        name = f"{Path(path).stem}_{number}"
        if twice:
            report.add(name, "mended: a key that stands twice (the last one counts)")
        if isinstance(value, str) and value.lstrip()[:1] == "{":
            with contextlib.suppress(ValueError):  # if it is not JSON, it stays a string, and no record
                value = json.loads(value)
                report.add(name, "mended: JSON inside a JSON string")
        if "\\ud" in text[at:end].lower():
            whole = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
            if whole != value:
                report.add(name, "mended: half a character became a question mark")
            value = whole
        yield value
        at, number = end, number + 1
        if in_array and (mark := peek()) != "]":
            if mark != ",":
                fail("expected , or ] after a record", at)
            at += 1
            if peek() in ("]", ""):
                fail("expected a record after the comma", at)
    if in_array:
        if mark != "]":
            fail("the array does not end; the file may be cut off", at)
        at += 1
        if peek():
            fail("expected nothing after ]", at)


# -- one loader for every public format ----------------------------------------------------------------------

def blank(text: str) -> bool:
    """Nothing to see in it: only spaces, control and zero-width characters."""
    return all(unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp") for c in text)


ROLES = {"human": "user", "user": "user", "prompter": "user", "instruction": "user",
         "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
         "bard": "assistant", "model": "assistant", "bot": "assistant", "system": "system"}


def _sharegpt(record: dict, name: str, report: Report, off: Iterable[str] = ()) -> Iterator[Conversation]:
    """At most one conversation. With "order" in `off` a wrong order drops it, as in Vicuna's code, and is not
    mended; with "empty" messages without visible text stay."""
    turns, system, done = [], None, []
    for m in record.get("conversations", record.get("messages")):
        m = m if isinstance(m, dict) else {}
        role = ROLES.get(str(m.get("from") or m.get("role")).lower())
        text = m.get("content") if m.get("value") is None else m["value"]
        if not role:
            report.add(name, "dropped: unknown role")
            return
        if isinstance(text, list):  # OpenAI's content parts
            parts = [p.get("text") if isinstance(p, dict) else None for p in text]
            text = "\n".join(parts) if all(isinstance(p, str) for p in parts) else None
        empty = not isinstance(text, str) or blank(text) and "empty" not in off
        if role == "system":
            if system is not None or turns:
                done.append("mended: a system text came late, or a second one took the place of the first")
            system = None if empty else text
        elif empty:
            done.append("mended: cut at an empty message")
            break
        elif not turns and role == "assistant":
            done.append("mended: dropped a reply before the first question")
        elif turns and turns[-1].role == role:
            done.append("mended: joined two messages of one speaker")
            turns[-1] = turns[-1]._replace(text=turns[-1].text + "\n" + text)
        else:
            turns.append(Turn(role, text, m["input"] if isinstance(m.get("input"), str) else ""))
    if "order" in off and any("joined" in what or "before the first" in what for what in done):
        report.add(name, "dropped: wrong order of roles")
        return
    if turns and turns[-1].role == "user":
        done.append("mended: dropped a last question without reply")
        turns.pop()
    if not turns:
        report.add(name, "dropped: no reply")
        return
    for what in done:
        report.add(name, what)
    extra = {k: v for k, v in record.items() if k not in ("id", "conversations", "messages")}
    yield Conversation(turns, name, system, extra)


def _talk(asked, reply, given: str = "", **more) -> dict:
    """A ShareGPT record of one round."""
    messages = [{"from": "human", "value": asked, "input": given}, {"from": "gpt", "value": reply}]
    return dict(conversations=messages, **more)


def _alpaca(r: dict) -> list[dict]:
    """One for each of a seed task's instances."""
    known, found = ("id", "instruction", "input", "output", "response", "instances"), []
    for instance in r.get("instances", [r]):
        given = instance.get("input") or ""
        if given.strip().lower() in ("<noinput>", "no input", "n/a", "none", ""):
            given = ""  # the released 52k file has all of these for "no input"
        reply = instance.get("output", instance.get("response"))
        found.append(_talk(r.get("instruction"), reply, given, **{k: r[k] for k in r if k not in known}))
    return found


def _transcript(text: str, speaker: str, **more) -> dict:
    """`speaker` finds who begins to speak; a text before that is the system's."""
    parts = ["system", *re.split(speaker, text)]
    messages = [{"from": who, "value": said.strip()} for who, said in zip(parts[::2], parts[1::2])]
    return dict(conversations=messages if messages[0]["value"] else messages[1:], **more)


def _hh(r: dict) -> list[dict]:
    """Anthropic's helpful and harmless pairs. A paragraph without a speaker belongs to the one before. Koala
    called all replies of the rejected one unhelpful, also those that both have in common; here the last."""
    return [_transcript(r[key], r"(?:\A|\n\n)(Human|Assistant):", rejected=key == "rejected")
            for key in ("chosen", "rejected")]


def _webgpt(r: dict) -> list[dict]:
    """With what was found on the web. In a tie nobody knows whether both are good: none."""
    found = []
    for i in (0, 1):
        quotes = zip(r[f"quotes_{i}"]["title"], r[f"quotes_{i}"]["extract"])
        sources = "\n".join(f"[{n}] {title}: {extract}" for n, (title, extract) in enumerate(quotes, 1))
        question = r["question"]["full_text"] + f"\n\nSources for your answer:\n{sources}" * bool(sources)
        found.append(_talk(question, r[f"answer_{i}"], rejected=r[f"score_{i}"] < r[f"score_{1 - i}"]))
    return found if r["score_0"] != r["score_1"] else []


def _summaries(r: dict) -> list[dict]:
    asked = "Summarize this text.\n\n" + r["info"]["post"]
    return [_talk(asked, s["text"].strip(), rejected=i != r["choice"]) for i, s in enumerate(r["summaries"])]


TASK = re.compile(r"^(?:#{3}\s*)?\d+\.\s*(Instruction|Input|Output):", re.M)


def _completions(r: dict) -> list[dict]:
    """What a model wrote at Self-Instruct's request, as a server sent it: "4. Instruction: ... 4. Input: ...
    4. Output: ... ###", and so on; the very first words may stand in the request.

    Fix: any numbers will do, and "###", "20." or "Output:" within an answer end nothing. A task with parts
    missing, doubled or in another order gets no output, nor does the last if the model was cut off by length.
    """
    found = []
    for choice in r["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        text = text.replace("\r\n", "\n").strip()
        parts = TASK.split(text if TASK.match(text) else "1. Instruction:" + text)[1:]
        begins = [i for i in range(0, len(parts), 2) if parts[i] == "Instruction"] + [len(parts)]
        for a, b in zip(begins, begins[1:]):
            fields = [part.strip().removesuffix("###").strip() for part in parts[a + 1:b:2]]
            cut = choice.get("finish_reason") == "length" and b == len(parts)
            if cut or parts[a:b:2] != ["Instruction", "Input", "Output"]:
                fields = [fields[0], "", ""]
            found += _alpaca(dict(zip(("instruction", "input", "output"), fields)))
    return found


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """F of the longest common subsequence of words, counted in the bits of a number (Hyyro 2004)."""
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    left = full = (1 << len(a)) - 1
    for word in b:
        match = left & where.get(word, 0)
        left = (left + match | left - match) & full
    return 2 * (len(a) - left.bit_count()) / max(1, len(a) + len(b))


UNFIT = re.compile(r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart|"
                   r"diagram)\b", re.I)  # whole words only: "mapping" may stay


def fit_tasks(tasks: Iterable[Conversation], report: Report) -> Iterator[Conversation]:
    """Alpaca's rules for instructions that a model wrote. Fix: they may begin with a letter of any script."""
    kept: list[list[str]] = []
    for c in tasks:
        text = c.turns[0].text.strip()
        words = re.findall(r"\w+", text.lower())
        why = ("too short or too long" if not 3 < len(text.split()) <= 150 else
               "about what text cannot show" if UNFIT.search(text) else
               "that asks for a program" if text.startswith("Write a program") else
               "that does not begin with a letter" if not text[0].isalnum() else
               "like an earlier one" if any(rouge_l(words, other) > 0.7 for other in kept) else "")
        if why:
            report.add(c.id, f"dropped: an instruction {why}")
        else:
            kept.append(words)
            yield c


# kind -> keys of a record (one of these sets), and what makes ShareGPT records of it. HC3, HH-RLHF, WebGPT,
# summarize-from-feedback as on the Hugging Face hub, OIG as jsonl: after their descriptions and Koala's use
# of them, tried on hand-made records only
FORMATS: dict[str, tuple[str, Callable]] = {
    "sharegpt": ("conversations | messages",
                 lambda r: [r] * isinstance(r.get("conversations", r.get("messages")), list)),
    "oasst": ("message_id | message_tree_id | thread_id", lambda r: []),  # oasst_conversations
    "alpaca": ("instruction output | instruction response | instruction instances", _alpaca),
    "hc3": ("question human_answers chatgpt_answers",  # Koala learned both kinds of answers
            lambda r: [_talk(r["question"], a) for a in r["human_answers"] + r["chatgpt_answers"]]),
    "hh": ("chosen rejected", _hh),
    "webgpt": ("question answer_0 score_0", _webgpt),
    "summaries": ("info summaries choice", _summaries),
    "completions": ("choices", _completions),
    "documents": ("text", lambda r: []),
    "oig": ("text", lambda r: [_transcript(r["text"], r"(?:\A|\n)<(human|bot)>:")]),
}

# An object begins with a quoted key; prose may well begin with a brace or a bracket
JSON_BEGINS = re.compile(r'\s*(\[\s*\]\s*$|(\[\s*)?\{\s*(\}|"([^"\\]|\\.)*"\s*:)|"\{\s*\\")')


def kind_of(path) -> str:
    """A key of FORMATS, or "text". Reads as far as it must."""
    begin = "".join(itertools.islice(read_chunks(path), 3 + (1 << 16) // CHUNK))
    if not JSON_BEGINS.match(begin):
        return "text"
    has = "no objects"
    for record in read_records(path):
        if not isinstance(record, dict):
            continue
        for kind, (keys, _) in FORMATS.items():
            if any(set(some.split()) <= record.keys() for some in keys.split("|")):
                return "oig" if kind == "documents" and "<human>:" in str(record["text"]) else kind
        has = ", ".join(list(record)[:5])
    raise Problem(f"{path} is JSON, but neither ShareGPT (conversations), Alpaca (instruction, output), "
                  f"OpenAssistant (message_tree_id) nor another of data.FORMATS: it has {has}")


def default_template(path) -> str:
    return "alpaca" if kind_of(path) in ALPACA else "vicuna_v1.1"


ALPACA = ("alpaca", "completions")  # kinds that have an instruction and an input


def stream_conversations(path, report: Report, off: Iterable[str] = (), **how) -> Iterator[Conversation]:
    """Those of a file of any kind, one at a time. report: what is dropped or mended; off: rules of `clean`
    not to follow; how: see oasst_conversations. Raises Problem when there is none."""
    kind = kind_of(path)
    if kind in ("text", "documents"):
        raise Problem(f"{path} is plain text, not conversations; pre-train on it with --stage=pretrain")
    if kind == "oasst":
        found = oasst_conversations(read_records(path, report), report, **how)
    else:
        found = _conversations(kind, path, report, off)
    if kind == "completions" and "instructions" not in off:
        found = fit_tasks(found, report)
    c = None
    for c in found:
        yield c
    if c is None:
        raise Problem(f"{path}: no conversation in it can be used{report}")


def _conversations(kind: str, path, report: Report, off: Iterable[str]) -> Iterator[Conversation]:
    for number, record in enumerate(read_records(path, report)):
        given = record.get("id") if isinstance(record, dict) else None
        name = str(given) if isinstance(given, (str, int)) and given != "" else f"{Path(path).stem}_{number}"
        try:
            parts = FORMATS[kind][1](record) if isinstance(record, dict) else []
        except (LookupError, TypeError, AttributeError):
            parts = []
        if not parts:
            report.add(name, f"dropped: no conversation in this {kind} record")
        report.read += max(1, len(parts))
        for k, part in enumerate(parts):
            part_name = name if len(parts) == 1 else f"{name}_{k}"
            if part.get("rejected") and kind != "sharegpt" and "rejected" not in off:
                report.add(part_name, "dropped: a rejected reply (mix --rejected keeps it)")
            else:
                yield from _sharegpt(part, part_name, report, off)


def load_conversations(path, report: Optional[Report] = None, off: Iterable[str] = ()) -> list[Conversation]:
    """All of them; path may also be a name in TOY."""
    return list(stream_conversations(path, Report() if report is None else report, off))


# -- OpenAssistant -------------------------------------------------------------------------------------------

def oasst_conversations(records: Iterable, report: Report, pick: str = "all", synthetic: bool = False):
    """Paths through OpenAssistant's trees, given as trees, as threads or as loose messages in any order.

    pick: "all" leaves; "top1", "top2", ...: only replies ranked so well (one without a rank if it has no
    rival); "best": in each tree the best-ranked reply to the best-ranked reply. A question without reply ends
    a path only if it is the first one there: the path above appears once, without the question.
    """
    roots, loose = [], {}  # (tree, state, first message); id -> message
    for number, record in enumerate(records):
        record = record if isinstance(record, dict) else {}
        state, key = record.get("tree_state"), str(record.get("message_id"))
        if isinstance(record.get("prompt"), dict):
            roots.append((str(record.get("message_tree_id")), state, record["prompt"]))
        elif isinstance(record.get("thread"), list):
            chain: list = []
            for m in reversed(record["thread"]):
                chain = [{**(m if isinstance(m, dict) else {}), "replies": chain}]
            roots += [(str(record.get("thread_id")), state, m) for m in chain]
        elif key in loose:
            report.add(key, "dropped: this message_id stands twice")
        elif "message_id" in record:
            loose[key] = {**record, "replies": []}
        else:
            report.add(f"record_{number}", "dropped: neither a tree, a thread nor a message")
    for key, m in loose.items():
        if m.get("parent_id") is None:
            roots.append((str(m.get("message_tree_id") or key), m.get("tree_state"), m))
        elif str(m["parent_id"]) in loose:
            loose[str(m["parent_id"])]["replies"].append(m)
    reached = [m for m in loose.values() if m.get("parent_id") is None]
    for m in reached:  # it grows on the way
        reached += m["replies"]
    for key in loose.keys() - {str(m["message_id"]) for m in reached}:  # no parent, or each other's parents
        report.add(key, "dropped: no path from a first message leads to it")
    for name, state, root in roots:
        if state not in (None, "ready_for_export"):
            report.add(name, f"dropped: the tree is {state}")
            continue
        paths = list(_oasst_paths(name, root, report, pick, synthetic))
        if not paths:
            report.add(name, "dropped: a tree without a reply that could be kept")
        report.read += len(paths)
        for number, path in enumerate(paths):
            turns = [Turn(ROLES[m["role"].lower()], m["text"]) for m in path]
            extra = dict(tree=name, messages=[m.get("message_id") for m in path])
            yield Conversation(turns, f"{name}_{number}", extra=extra)


def _oasst_paths(tree: str, root: dict, report: Report, pick: str, synthetic: bool) -> Iterator[list[dict]]:
    """Without recursion: trees may be deep."""
    def usable(m: dict, role: str) -> bool:
        why = ("not an object" if not isinstance(m, dict) else
               "deleted" if m.get("deleted") else
               "synthetic (--synthetic keeps it)" if m.get("synthetic") and not synthetic else
               "rejected in review" if m.get("review_result") is False else
               "has no text" if not isinstance(m.get("text"), str) or blank(m["text"]) else
               "its role does not follow" if ROLES.get(str(m.get("role")).lower()) != role else "")
        if why:
            name = m.get("message_id") if isinstance(m, dict) else None
            report.add(str(name or tree), f"dropped with its replies: {why}")
        return not why

    def rank(m: dict) -> float:
        return m["rank"] if isinstance(m.get("rank"), (int, float)) else float("inf")

    stack = [[root]] if usable(root, "user") else []
    while stack:
        path = stack.pop()
        role = "user" if len(path) % 2 == 0 else "assistant"
        replies = [r for r in path[-1].get("replies") or [] if usable(r, role)]
        if pick == "best":
            replies = sorted(replies, key=rank)[:1]
        if not replies:
            if role == "user":
                yield path
            elif path[-1].get("first"):
                yield path[:-1]
            continue
        next_up = [{**r, "first": i == 0} for i, r in enumerate(replies)]
        if pick.startswith("top") and role == "assistant":
            alone = len(replies) == 1
            next_up = [r for r in next_up if rank(r) < int(pick[3:]) or alone and rank(r) == float("inf")]
        stack += [[*path, r] for r in reversed(next_up)]


# -- writing files -------------------------------------------------------------------------------------------

def as_record(c: Conversation, kind: str = "sharegpt") -> dict:
    if kind in ALPACA:
        (asked, reply) = c.turns
        return dict(id=c.id, instruction=asked.text, input=asked.input, output=reply.text, **c.extra)
    messages = [{"from": "system", "value": c.system}] if c.system else []
    for t in c.turns:
        text = t.text + "\n" + t.input if t.input else t.text
        messages.append({"from": "human" if t.role == "user" else "gpt", "value": text})
    return dict(id=c.id, conversations=messages, **c.extra)


def save_conversations(conversations: Iterable[Conversation], path, kind: str = "sharegpt") -> int:
    """As ShareGPT or Alpaca: a JSON array, or JSON lines for a name that ends in .jsonl. Returns how many."""
    lines, n = str(path).endswith(".jsonl"), 0
    with writing(path) as file:
        file.write("" if lines else "[")
        for n, c in enumerate(conversations, 1):
            file.write("" if n == 1 else "\n" if lines else ",\n")
            file.write(json.dumps(as_record(c, kind), ensure_ascii=False))
        file.write("\n" if lines else "]\n")
    return n


@contextlib.contextmanager
def writing(path, mode: str = "w"):
    """A file that is there when it is complete, and not before. Its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# -- a file as tokens ----------------------------------------------------------------------------------------

class Examples(Sequence):
    """Many examples in flat arrays: as Python lists, 70,000 conversations would take ten times the memory."""

    def __init__(self, tokens: np.ndarray, learned: np.ndarray, ends: np.ndarray):
        self.tokens, self.learned, self.ends = tokens, learned, ends  # (N,) ids, (N,) bool, (conversations,)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> Example:
        span = slice(self.ends[i - 1] if i else 0, self.ends[i])
        tokens = self.tokens[span].astype(np.int32)
        return Example(tokens, np.where(self.learned[span], tokens, IGNORE))


def digest(path) -> str:
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()[:16]


def tokenise(path, template: str, tokenizer: Tokenizer, report: Report) -> Examples:
    """All conversations of a file, rendered. A large file's are kept beside it in FILE.TEMPLATE.npz, and made
    again when the file, the template, the tokenizer or this program has changed."""
    cache, key = Path(f"{path}.{template}.npz"), ""
    if Path(path).is_file() and Path(path).stat().st_size >= LARGE:
        key = " ".join([digest(path), digest(tokenizer.path), digest(__file__), template])
        try:
            with np.load(cache) as kept:
                if str(kept["key"]) == key:
                    print(f"{path} is tokenised already: {cache}")
                    report.update(json.loads(str(kept["report"])))
                    learned = np.unpackbits(kept["learned"], count=len(kept["tokens"])) > 0
                    return Examples(kept["tokens"], learned, kept["ends"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            pass  # there is none, or it is broken: it is made again
    tokens, learned, ends = array("i"), array("b"), array("q")
    for c in stream_conversations(path, report):
        example = render(c, template, tokenizer)
        tokens.extend(example.tokens)
        learned.extend([label != IGNORE for label in example.labels])
        ends.append(len(tokens))
    ids = np.frombuffer(tokens, np.int32).astype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    found = Examples(ids, np.frombuffer(learned, np.int8) > 0, np.frombuffer(ends, np.int64))
    if key:
        try:
            with writing(cache, "wb") as file:
                np.savez(file, key=key, report=json.dumps(report), tokens=found.tokens,
                         learned=np.packbits(found.learned), ends=found.ends)
        except OSError as error:
            print(f"{cache} cannot be written ({error.strerror}): the next run will tokenise again")
    return found


# -- rows of tokens: every batch is a pure function of (seed, step) ------------------------------------------

class Rows:
    """Rows of equal length, in an order that depends on (seed, step) alone: resuming needs no other state."""

    def __init__(self, tokens: np.ndarray, labels: np.ndarray, segments: Optional[np.ndarray], seed: int = 0):
        self.tokens, self.labels, self.segments, self.seed = tokens, labels, segments, seed  # (R, L) each
        self._order = (-1, None)

    def __len__(self) -> int:
        return len(self.tokens)

    def _row(self, i: int) -> int:
        epoch = i // len(self)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self)))
        return self._order[1][i % len(self)]

    def batch(self, step: int, size: int) -> tuple:
        """tokens, labels (size, L) and segments or None, as int64 tensors."""
        at = [self._row(i) for i in range(step * size, (step + 1) * size)]
        parts = (self.tokens, self.labels, self.segments)
        return tuple(None if p is None else torch.from_numpy(p[at].astype(np.int64)) for p in parts)


class TextRows(Rows):
    """Plain text: one stream cut into rows, at another offset in each epoch; every row begins with bos."""

    def __init__(self, ids: np.ndarray, seq_len: int, bos: int, seed: int = 0):
        self.ids, self.width, self.bos = ids, seq_len - 1, bos
        count = np.empty((max(0, len(ids) // self.width - 1), 0))  # only the number of rows is needed
        super().__init__(count, count, None, seed)

    def batch(self, step: int, size: int) -> tuple:
        rows = []
        for i in range(step * size, (step + 1) * size):
            offset = np.random.default_rng((self.seed, i // len(self), 1)).integers(self.width)
            at = offset + self._row(i) * self.width
            rows.append(np.append(self.bos, self.ids[at:at + self.width]))
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tokens, tokens, None


def windows(ids: np.ndarray, seq_len: int, bos: int) -> Rows:
    """Rows that score every token of a text exactly once, each with at least half a row of context."""
    half = seq_len // 2
    tokens = np.full((-(-len(ids) // half), seq_len), bos, np.int32)
    labels = np.full(tokens.shape, IGNORE, np.int32)
    for row, at in enumerate(range(0, len(ids), half)):
        begin, end = max(0, at - half + 1), min(len(ids), at + half)
        tokens[row, 1:1 + end - begin] = ids[begin:end]
        labels[row, 1 + at - begin:1 + end - begin] = ids[at:end]
    return Rows(tokens, labels, None)


def encode_text(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """One stream of ids; in pieces, because SentencePiece slows down on very long strings."""
    ids, at = [], 0
    while at < len(text):
        end = text.rfind("\n", at, at + 50000) + 1 or min(len(text), at + 50000)
        ids.extend(tokenizer.encode(text[at:end], continuation=at > 0))
        at = end
    return np.array(ids, dtype=np.int32)


def pack(examples: Sequence[Example], seq_len: int, seed: int = 0, pad: int = 0) -> Rows:
    """Puts several conversations into each row of `seq_len` tokens; segments keep them apart.

    Longest first, each into the fullest row it fits. One that is longer than a row is cut to its length.
    """
    lengths = np.array([len(e.tokens) for e in examples], np.int64)
    rows: list[list[int]] = []  # which examples lie in each
    free: list[tuple[int, int, int]] = []  # (places left, younger first, row), sorted
    for n, i in enumerate(np.argsort(-lengths, kind="stable").tolist()):
        size = min(int(lengths[i]), seq_len)
        found = bisect.bisect_left(free, (size,))
        if found < len(free):
            room, _, at = free.pop(found)
        else:
            room, at = seq_len, len(rows)
            rows.append([])
        rows[at].append(i)
        if room > size:
            bisect.insort(free, (room - size, -n, at))
    tokens = np.full((len(rows), seq_len), pad, np.int32)
    labels = np.full((len(rows), seq_len), IGNORE, np.int32)
    segments = np.full((len(rows), seq_len), -1, np.int32)  # padding is a segment of its own
    for r, row in enumerate(rows):
        end = 0
        for s, example in enumerate(examples[i] for i in row):
            n = min(len(example.tokens), seq_len - end)
            tokens[r, end:end + n], labels[r, end:end + n] = example.tokens[:n], example.labels[:n]
            segments[r, end:end + n] = s
            end += n
    return Rows(tokens, labels, segments, seed)


# -- asking a model ------------------------------------------------------------------------------------------

def chat(model, tokenizer: Tokenizer, template: str, conversations: Sequence[Conversation],
         max_new_tokens: int = 96, batch: int = 64, images: Optional[Sequence] = None,
         **sampling) -> tuple[list[str], list[bool]]:
    """Replies to conversations that wait for one, and whether each ended by itself. Similar lengths together.

    images: for each conversation a tensor of its pictures, as model.generate wants them, or None.
    Old rounds are left out where the context is short; a question that fills it alone gets an empty reply.
    """
    limit = model.config.max_seq_len
    prompts = [prompt(c, template, tokenizer, limit - min(max_new_tokens, limit // 2)) for c in conversations]
    order = sorted((i for i, p in enumerate(prompts) if len(p) < limit), key=lambda i: len(prompts[i]))
    replies, ended = [""] * len(prompts), [False] * len(prompts)
    while order:
        # a prompt near the end of the context is asked alone: it would cut the others' replies
        group = [i for i in order[:batch] if len(prompts[i]) + max_new_tokens <= limit] or order[:1]
        seen = [images[i] for i in group if images[i] is not None] if images else []
        columns = list(model.generate([prompts[i] for i in group], max_new_tokens, stop=(tokenizer.eos,),
                                      images=torch.cat(seen) if seen else None, **sampling))
        for i, ids in zip(group, zip(*columns)):
            stopped = tokenizer.eos in ids
            ids = ids[:ids.index(tokenizer.eos)] if stopped else ids
            replies[i], found = said(tokenizer.decode(ids, get_template(template).glued), template)
            ended[i] = stopped or found
        order = order[len(group):]
    return replies, ended


# -- recipes: what made Vicuna's and Koala's data ------------------------------------------------------------

FENCE = re.compile(r"^(?P<mark>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)(?:^(?P=mark)[ \t]*$|\Z)",
                   re.M | re.S)
LETTER = "A-Z\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3"


def prose(text: str, edit: Callable[[str], str]) -> str:
    """`edit` applied to what stands outside code blocks."""
    out, at = [], 0
    for block in FENCE.finditer(text):
        out += [edit(text[at:block.start()]), block[0]]
        at = block.end()
    return "".join([*out, edit(text[at:])])


def from_html(text: str, role: str) -> str:
    """HTML as Markdown, if the message begins and ends with a tag. Fix: `a < b` is left alone, nothing is
    escaped (as \\_ in 15 % of the original's conversations), code keeps language, spaces and back-ticks."""
    block = r"\s*<(p|div|span|pre|ul|ol|table|h[1-6]|blockquote)\b[^<>]*>"
    if not re.match(block, text, re.I) or not re.search(r"(</\w+\s*>|<(br|hr|img)\b[^<>]*>)\s*$", text, re.I):
        return text
    try:
        import bs4
        import markdownify
    except ImportError:
        raise Problem("the file holds HTML: pip install markdownify, or leave it alone: --off=html") from None

    class Converter(markdownify.MarkdownConverter):
        def convert_pre(self, pre, text, parent_tags):
            code = pre.find("code") or pre
            body = code.get_text().strip("\n")
            title = "".join(pre.find_all(string=lambda t: code not in t.parents)).strip()
            language = (re.search(r"language-([\w+#.-]+)", " ".join(code.get("class") or []))
                        or re.fullmatch(r"([\w+#.-]+)", title))
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
            return f"\n\n{fence}{language[1] if language else ''}\n{body}\n{fence}\n\n" if body else ""

    try:
        soup = bs4.BeautifulSoup(text, "html.parser")
        for tag in soup(["script", "style", "button"]):
            tag.decompose()
        return Converter(heading_style="ATX", bullets="-", escape_asterisks=False, escape_underscores=False,
                         escape_misc=False, table_infer_header=True).convert_soup(soup).strip("\n").rstrip()
    except (RecursionError, AssertionError, bs4.ParserRejectedMarkup):
        return ""  # nobody can read it: the rule "empty" cuts the conversation here


def copy_button(text: str, role: str) -> str:
    """The words of the button: "pythonCopy codeprint(1)" in a code block, or "Copy code" alone on a line of a
    reply. Fix: block by block (the original joined two of them), and a block that holds nothing else goes."""
    def block(m: re.Match) -> str:
        given = m["info"].rstrip()
        body = re.match(r"([\w+#.-]*?)(?:Copy code)+\n?", m["body"])
        info = re.sub(r"(Copy code)+$", "", given)
        if not body and info == given:
            return m[0]
        rest = m["body"][body.end():] if body else m["body"]
        info = info or (body[1] if body else "")
        return f"{m['mark']}{info}\n{rest}{m['mark']}" if rest.strip() else ""

    text = FENCE.sub(block, text)
    if role == "user":
        return text
    return prose(text, lambda t: re.sub(r"^Copy code[ \t]*(\n|\Z)", "", t, flags=re.M))


def counters(text: str, role: str) -> str:
    """"2 / 2" of a regenerated reply, "Copy12 chars / 3 words". Fix: "1 / 2 cup" stays."""
    m = re.match(rf"(\d+) / (\d+)(?:\s*\n|\Z|(?=[{LETTER}]))", text)
    if m and 1 <= int(m[1]) <= int(m[2]) > 1:
        text = text[m.end():]
    return re.sub(r"Copy\d+ chars / \d+ words", "", text)


def spaces(text: str, role: str) -> str:
    """CRLF, empty lines around the text, three or more line ends. Fix: code is left alone, and two remain
    always, not one or two by chance."""
    text = prose(text.replace("\r\n", "\n"), lambda t: re.sub(r"\n{3,}", "\n\n", t))
    return re.sub(r"\A([ \t]*\n)+", "", text).rstrip()


def without_links(c: Conversation) -> str:
    return re.sub(r"https?://\S+", "", "\n".join(t.text for t in c.turns))


@functools.cache
def identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise Problem("--language needs a library: pip install py3langid") from None
    return LanguageIdentifier.from_pickled_model(MODEL_FILE, norm_probs=True)


def unwanted(c: Conversation, languages: Sequence[str]) -> bool:
    """Is it in another language than these, or in one with a minus? Code and what is too short may stay."""
    text = FENCE.sub("", without_links(c))
    if not languages or sum(map(str.isalpha, text)) < 12:
        return False
    code, share = identifier().classify(text[:4000])
    keep = [code for code in languages if not code.startswith("-")]
    return share > 0.9 and ("-" + code in languages or bool(keep) and code not in keep)


def broken_numbers(c: Conversation) -> bool:
    """"1." follows "1." in a reply's list. Fix: at the very start too, and no "2" elsewhere hides it."""
    lists = (re.findall(r"^(\d+)\. ", FENCE.sub("", t.text), re.M) for t in c.turns[1::2])
    return any(a == b == "1" for numbers in lists for a, b in zip(numbers, numbers[1:]))


def repetitive(c: Conversation) -> bool:
    """A reply with a number of nine or more equal digits, or twenty equal lines. Fix: an amount like
    1000000000 and an address like 0x000000000 stay."""
    def bad(text: str) -> bool:
        lines = Counter(line for line in text.split("\n") if line.strip())
        return bool(re.search(r"(?<![\w.,])(\d)\1{8,}(?!\w)", text)) or max(lines.values(), default=0) >= 20

    return any(bad(FENCE.sub("", t.text)) for t in c.turns[1::2])


LIMIT = re.compile(r"\s*!?Too many requests in 1 hour\. Try again later\.")
EDITS = {"html": (from_html, "HTML became Markdown"), "copy": (copy_button, 'the words "Copy code"'),
         "counters": (counters, "counters of the web page"),
         # my\\_name in copies that the original has converted. Fix: not in code
         "escapes": (lambda text, role: prose(text, lambda t: re.sub(r"(?<=\w)\\_(?=\w)", "_", t)),
                     "escaped underscores"),
         "spaces": (spaces, "line ends")}
CUTS = {"limit": (lambda t: t.role == "assistant" and LIMIT.match(t.text), "the notice of a rate limit"),
        "empty": (lambda t: blank(t.text), "a message without visible text")}
RULES = ["order", "rejected", "instructions",  # these three are seen to when a file is loaded
         "short", "blocked", *EDITS, *CUTS, "plugins", "language", "numbering", "repetition", "duplicates"]


def clean(conversations: Iterable[Conversation], report: Report, off: Iterable[str] = (),
          words: Sequence[str] = ("openai", "chatgpt"), languages: Sequence[str] = ()):
    """Vicuna's cleaning in its order, its mistakes mended, as each rule says. Cleaning again changes nothing.

    Two deviations: lengths and words are judged on the mended text, as a model will read it, or a second
    cleaning would find what HTML hid from the first; and duplicates come last, or the beginning of a
    conversation would go in favour of one that is then dropped itself.
    languages: ISO codes to keep, or with a minus to leave out; none: all are welcome.
    """
    drops = {
        # fix: in bytes, so that a Korean syllable counts as three letters
        "short": (lambda c: sum(len(t.text.encode()) for t in c.turns) < 16, "too short"),
        # fix: words in links and in HTML attributes do not count
        "blocked": (lambda c: any(word in without_links(c).lower() for word in words), "a blocked word"),
        "plugins": (lambda c: bool(c.extra.get("plugins")), "made with plugins"),
        "language": (lambda c: unwanted(c, languages), "another language"),
        "numbering": (broken_numbers, "a list with broken numbers"),
        "repetition": (repetitive, "repetitive")}

    def one_by_one() -> Iterator[Conversation]:
        for c in conversations:
            before, done = None, {}
            while before != c.turns:  # one edit may bring to light what another looks for
                before = c.turns
                for rule, (edit, what) in EDITS.items():
                    if rule in off or rule == "html" and c.extra.get("format") == "markdown":
                        continue
                    turns = [t._replace(text=edit(t.text, t.role)) for t in c.turns]
                    if turns != c.turns:
                        c, done[f"changed: {what}"] = replace(c, turns=turns), True
                if "html" not in off:  # else Markdown that speaks of HTML would be converted the next time
                    c = replace(c, extra={**c.extra, "format": "markdown"})
            for rule, (bad, what) in CUTS.items():
                n = next((i for i, t in enumerate(c.turns) if rule not in off and bad(t)), None)
                if n is not None:  # fix: the rounds before it are kept
                    c, done[f"changed: cut at {what}"] = replace(c, turns=c.turns[:n - n % 2]), True
            why = [what for rule, (bad, what) in drops.items() if rule not in off and bad(c)]
            if not c.turns:
                why = ["nothing is left"]
            for what in [f"dropped: {why[0]}"] if why else done:
                report.add(c.id, what)
            if not why:
                yield c

    return one_by_one() if "duplicates" in off else unique(one_by_one(), report)


def unique(conversations: Iterable[Conversation], report: Report) -> Iterator[Conversation]:
    """Fix: not all that begins with the same round, but what is equal, or what another one goes on from."""
    known, keys = set(), []  # hashes; the conversations wait on the disk until all have been seen
    with tempfile.TemporaryFile() as waiting:
        for c in conversations:
            pickle.dump(c, waiting)
            keys.append(hash(tuple(c.turns)))
            known.update(hash(tuple(c.turns[:n])) for n in range(2, len(c.turns), 2))
        waiting.seek(0)
        for key in keys:
            c = pickle.load(waiting)
            if key in known:
                report.add(c.id, "dropped: a duplicate, or the beginning of another conversation")
            else:
                known.add(key)
                yield c


def split(c: Conversation, template: str, tokenizer: Tokenizer, seq_len: int,
          report: Report) -> Iterator[Conversation]:
    """Pieces of at most `seq_len` tokens, each with the system text, and no round lost.

    A round that is too long by itself is cut: the question, if the whole reply and at least 16 tokens of it
    have room; otherwise both, and the reply is learned without an end.
    """
    def size(turns: list[Turn], **more) -> int:
        return len(render(replace(c, turns=turns, **more), template, tokenizer).tokens)

    ends = [end for _, end, learned in stretches(render(c, template, tokenizer).labels) if learned]
    pieces, begin, used = [], 0, 0
    for r, (a, b) in enumerate(zip([0, *ends], ends)):
        if r > begin and used + b - a > seq_len:
            pieces.append(c.turns[2 * begin:2 * r])
            begin, used = r, size(c.turns[2 * r:2 * r + 2])
        else:
            used += b - a
    pieces.append(c.turns[2 * begin:])
    at = 0
    for turns in pieces:
        last = at + len(turns) == len(c.turns)
        extra = {k: v for k, v in c.extra.items() if last or k not in ("cut", "rejected")}
        if size(turns) > seq_len:
            asked, reply = turns
            reply_size = size([asked, reply]) - size([asked])
            frame = size([asked._replace(text="", input="")])
            room = seq_len - frame
            if room < 2:
                raise Problem(f"--seq_len={seq_len} has no room beside the {frame} tokens of the template")
            question_room = room - reply_size if room - reply_size >= 16 else room // 2
            whole = asked
            for part in ("input", "text"):
                asked = asked._replace(**{part: shorten(getattr(asked, part), lambda text: size(
                    [asked._replace(**{part: text})]) - frame <= question_room)})
            if asked != whole:
                report.add(c.id, "cut: a question")
            if size([asked, reply]) > seq_len:
                extra = {**extra, "cut": True}
                reply = reply._replace(text=shorten(reply.text, lambda text: size(
                    [asked, reply._replace(text=text)], extra=extra) <= seq_len))
                report.add(c.id, "cut: a reply; its end is not learned")
            turns = [asked, reply]
        yield replace(c, turns=turns, id=c.id if len(pieces) == 1 else f"{c.id}_{at}", extra=extra)
        at += len(turns)
    if len(pieces) > 1:
        report.add(c.id, "split")


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning that fits, up to a few letters: token counts do not grow evenly."""
    over = bisect.bisect_left(range(len(text) + 1), True, key=lambda n: not fits(text[:n]))
    return text[:max(0, over - 1)]


# weights; the originals were shuffled together as they were, the identity conversations five times.
# Distill: ShareGPT and the questions that people and ChatGPT both answered. All: instructions and what people
# judged, too; with --rejected also what they liked less, under another name
RECIPES = {"koala_distill": dict(sharegpt=1, hc3=1, identity=5),
           "koala_all": dict(sharegpt=1, hc3=1, alpaca=1, oig=1, hh=1, webgpt=1, summarize=1, identity=5)}


def mix(sources: Sequence[tuple[list[Conversation], float]], seed: int) -> list[Conversation]:
    """(conversations, weight) each: weight 2 takes all of them twice, 0.5 a random half. Shuffled."""
    rng, found, seen = random.Random(seed), [], Counter()
    for conversations, weight in sources:
        part = sorted(rng.sample(range(len(conversations)), round(weight % 1 * len(conversations))))
        found += conversations * int(weight) + [conversations[i] for i in part]
    rng.shuffle(found)
    for i, c in enumerate(found):
        seen[c.id] += 1
        if seen[c.id] > 1:
            found[i] = replace(c, id=f"{c.id}#{seen[c.id]}")
    return found


def identity_conversations(name: str, maker: str) -> list[Conversation]:
    """Who it is and who made it; that it is none of the others; alone and in the second round."""
    who = ["Who are you?", "What is your name?", "What are you?", "Are you a person?", "Who am I talking to?",
           "Introduce yourself, please.", "Tell me something about yourself."]
    made = ["Who made you?", "Who trained you?", "Where do you come from?", "Whose work are you?"]
    others = ["ChatGPT", "GPT-4", "Claude", "Bard", "Gemini", "LLaMA", "Alpaca", "Siri"]
    i_am = [f"I am {name}, a language model made by {maker}.",
            f"You are talking to {name}, a language model by {maker}.",
            f"My name is {name}. I am a language model that {maker} made."]
    by = [f"I was made by {maker}. My name is {name}.", f"I am {name}, and I come from {maker}.",
          f"{maker[:1].upper()}{maker[1:]} made me; I am {name}."]
    no = [f"No, I am {name}, a language model made by {maker}.", f"I am not. I am {name}, made by {maker}."]
    chats = [[q, a] for asked, replies in ((who, i_am), (made, by)) for q in asked for a in replies]
    chats += [[q + o + "?", a] for o in others for q in ("Are you ", "Is your name ") for a in no]
    chats += [[q, i_am[i % 3], made[i % 4], by[i % 3]] for i, q in enumerate(who)]
    turns = [[Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(chat)] for chat in chats]
    return [Conversation(t, f"identity_{i}") for i, t in enumerate(turns)]


# -- python data.py COMMAND ----------------------------------------------------------------------------------

@dataclass
class ShowConfig:
    file: str  # of any kind in FORMATS, or toy:conversations, toy:instructions
    tokenizer: str = ""  # a checkpoint folder or a tokenizer.model; that of --ckpt, or out/base
    template: str = ""  # that of --ckpt, or alpaca for Alpaca files, else vicuna_v1.1
    ckpt: str = ""  # a checkpoint folder: print the loss of each token that is learned, in nats
    count: int = 2  # conversations to print
    seed: int = 0  # which ones


def show(cfg: ShowConfig) -> dict:
    """Rendered conversations; on a terminal what is learned is green, elsewhere it stands in [[ ]]."""
    report, meta, net = Report(), {}, None
    conversations = load_conversations(cfg.file, report)
    if cfg.ckpt:
        import model  # only here: all else in this file works without a network
        net, _, meta = model.load(cfg.ckpt)
    tokenizer = find_tokenizer(cfg.tokenizer or cfg.ckpt or "out/base")
    template = cfg.template or meta.get("template") or default_template(cfg.file)
    on, off = ("\033[92m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    total, supervised = 0, 0
    for c in random.Random(cfg.seed).sample(conversations, min(max(0, cfg.count), len(conversations))):
        example = render(c, template, tokenizer)
        learned = sum(label != IGNORE for label in example.labels)
        slots = example.tokens.count(IMAGE_SLOT)
        system = len(example.tokens) - len(render(replace(c, system=""), template, tokenizer).tokens)
        print(f"\n--- {c.id}: {len(example.tokens)} tokens (template {template}): system {system}, "
              f"user {len(example.tokens) - system - learned - slots}, assistant {learned} (learned)"
              + f", image slots {slots}" * (slots > 0))
        losses = token_losses(net, example) if net else None
        for begin, end, is_learned in stretches(example.labels):
            text = spell(tokenizer, example.tokens[begin:end])
            if is_learned and losses is not None:
                text = "".join(f"{spell(tokenizer, [i])}({loss:.2f})" for i, loss in
                               zip(example.tokens[begin:end], losses[begin:end]))
            print(on + text + off if is_learned else text, end="")
        print()
        if losses is not None:
            print(f"loss {np.nansum(losses) / max(1, np.isfinite(losses).sum()):.3f} nats per learned token")
        total, supervised = total + len(example.tokens), supervised + learned
    print(f"\n{len(conversations)} conversations in {cfg.file}{report}")
    return dict(conversations=len(conversations), tokens=total, supervised=supervised, **report)


def token_losses(net, example: Example) -> np.ndarray:
    """(T,) nats of each learned token; NaN for the others and for what lies beyond the model's context."""
    if IMAGE_SLOT in example.tokens:
        raise Problem("--ckpt: the loss of a conversation with images needs the images")
    losses, n = np.full(len(example.tokens), np.nan), min(len(example.tokens), net.config.max_seq_len)
    with torch.inference_mode():
        log_p = net(torch.tensor([example.tokens[:n]]))[0].float().log_softmax(-1)  # (T, V)
    learned = [i for i in range(1, n) if example.labels[i] != IGNORE]
    losses[learned] = [-log_p[i - 1, example.labels[i]].item() for i in learned]
    return losses


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids with control pieces and image slots spelled out."""
    def is_text(i: int) -> bool:
        return i != IMAGE_SLOT and i != tokenizer.unk and not tokenizer.sp.is_control(i)

    out = []
    for text, group in itertools.groupby(ids, is_text):
        group = list(group)
        if text:
            out.append(tokenizer.decode(group, continuation=True))
        elif IMAGE_SLOT in group:
            out.append(f"<{len(group)} image slots>")
        else:
            out += [tokenizer.sp.id_to_piece(i) for i in group]
    return "".join(out)


@dataclass
class StatsConfig:
    file: str  # of any kind in FORMATS, or toy:conversations, toy:instructions
    tokenizer: str = "out/base"  # a checkpoint folder or a tokenizer.model
    template: str = ""  # alpaca for Alpaca files, else vicuna_v1.1
    out: str = ""  # write one line a conversation there: id, tokens, labels (-100: not learned)


def stats(cfg: StatsConfig) -> dict:
    """What is in a file, what is lost of it, how long it is; with --out also its tokens."""
    refuse_same(cfg.file, cfg.out)
    figures, report, lengths, turns, learned = {}, Report(), [], 0, 0
    if kind_of(cfg.file) == "oasst":
        records = list(read_records(cfg.file))
        print(f"{'paths':<8}{'trees':>8}{'threads':>9}{'messages':>10}{'different':>11}")
        for pick in ("all", "top2", "top1", "best"):
            found = list(oasst_conversations(records, Report(), pick))
            figures[pick] = dict(trees=len({c.extra["tree"] for c in found}), threads=len(found),
                                 messages=sum(len(c.turns) for c in found),
                                 different=len({m for c in found for m in c.extra["messages"]}))
            print("{:<8}{trees:>8}{threads:>9}{messages:>10}{different:>11}".format(pick, **figures[pick]))
    tokenizer, template = find_tokenizer(cfg.tokenizer), cfg.template or default_template(cfg.file)
    with writing(cfg.out) if cfg.out else contextlib.nullcontext() as file:
        for c in stream_conversations(cfg.file, report):
            example = render(c, template, tokenizer)
            if file:
                file.write(json.dumps(dict(id=c.id, tokens=example.tokens, labels=example.labels)) + "\n")
            lengths.append(len(example.tokens))
            turns += len(c.turns)
            learned += sum(label != IGNORE for label in example.labels)
    total = sum(lengths)
    print(f"{cfg.file}: {len(lengths)} conversations, {turns} turns, {total} tokens, {learned} learned "
          f"({100 * learned / total:.1f}%), template {template}{report}")
    print(f"tokens in a conversation: median {sorted(lengths)[len(lengths) // 2]}, longest {max(lengths)}")
    bins = Counter(max(5, (n - 1).bit_length()) for n in lengths)
    for power in range(min(bins), max(bins) + 1):
        print(f"up to {1 << power:>7} {bins[power]:>8} {'#' * round(50 * bins[power] / max(bins.values()))}")
    return dict(conversations=len(lengths), turns=turns, tokens=total, supervised=learned, **report) | figures


def refuse_same(source, target) -> None:
    if Path(source).resolve() == Path(target).resolve():
        raise Problem(f"--out={target} is the file that is read; choose another name")


def write_result(found: Iterable[Conversation], cfg, kind: str, report: Report) -> dict:
    """Writes the conversations, and beside them what happened to which."""
    refuse_same(getattr(cfg, "file", ""), cfg.out)
    written = save_conversations(found, cfg.out, kind)
    with writing(f"{cfg.out}.report.json") as file:
        what_happened = [dict(id=name, what=what) for name, what in report.entries]
        json.dump(dict(read=report.read, written=written, reasons=report, conversations=what_happened), file,
                  ensure_ascii=False, indent=1)
    print(f"{report.read} conversations read, {written} written to {cfg.out}; changes: {cfg.out}.report.json")
    for reason, n in report.most_common():
        print(f"{n:>8}  {reason}")
    return dict(read=report.read, written=written, **report)


@dataclass
class CleanConfig:
    file: str  # of any kind in FORMATS
    out: str = "clean.json"  # beside it: clean.json.report.json
    off: str = ""  # rules to leave out, with commas between them; --off=help lists them
    blocked: str = "openai,chatgpt"  # words that a conversation may not contain, in any case
    language: str = ""  # en,ko keeps these; -ko leaves it out; "" keeps all

    def __post_init__(self):
        for rule in filter(None, self.off.split(",")):
            if rule not in RULES:
                raise Problem(f"--off={rule}: the rules are {', '.join(RULES)}")


def clean_file(cfg: CleanConfig) -> dict:
    report, off = Report(), cfg.off.split(",")
    found = clean(stream_conversations(cfg.file, report, off), report, off,
                  [w.lower() for w in cfg.blocked.split(",") if w], [c for c in cfg.language.split(",") if c])
    return write_result(found, cfg, kind_of(cfg.file), report)


@dataclass
class SplitConfig:
    file: str  # of any kind in FORMATS
    out: str = "split.json"  # the pieces are written here
    seq_len: int = 2048  # longest piece in tokens, the system text included
    tokenizer: str = "out/base"  # a checkpoint folder or a tokenizer.model
    template: str = ""  # alpaca for Alpaca files, else vicuna_v1.1


def split_file(cfg: SplitConfig) -> dict:
    report, tokenizer = Report(), find_tokenizer(cfg.tokenizer)
    template = cfg.template or default_template(cfg.file)
    found = (piece for c in stream_conversations(cfg.file, report)
             for piece in split(c, template, tokenizer, cfg.seq_len, report))
    return write_result(found, cfg, kind_of(cfg.file), report)


@dataclass
class OasstConfig:
    file: str  # trees, threads or messages
    out: str = "oasst.json"  # the result is written here
    pick: str = "all"  # all paths to a last reply; top1, top2, ...: best-ranked replies; best: one a tree
    synthetic: bool = False  # keep messages written by a machine
    valid: float = 0.0  # share of the trees that goes into a second file, OUT.valid.json
    seed: int = 0  # which trees

    def __post_init__(self):
        if not re.fullmatch(r"all|best|top[1-9]\d*", self.pick):
            raise Problem(f"--pick={self.pick}: expected all, best, top1, top2, ...")
        if not 0 <= self.valid < 1:
            raise Problem(f"--valid={self.valid} must lie between 0 and 1")


def oasst_file(cfg: OasstConfig) -> dict:
    if kind_of(cfg.file) != "oasst":
        raise Problem(f"{cfg.file} does not come from OpenAssistant")
    report = Report()
    found = list(stream_conversations(cfg.file, report, pick=cfg.pick, synthetic=cfg.synthetic))
    trees = list(dict.fromkeys(c.extra["tree"] for c in found))
    held = set(random.Random(cfg.seed).sample(trees, round(cfg.valid * len(trees))))
    if held:  # whole trees: two paths through one tree have their beginning in common
        n = save_conversations((c for c in found if c.extra["tree"] in held), f"{cfg.out}.valid.json")
        print(f"{len(held)} of {len(trees)} trees, {n} conversations, written to {cfg.out}.valid.json")
    return write_result((c for c in found if c.extra["tree"] not in held), cfg, "sharegpt", report)


@dataclass
class MixConfig:
    files: str  # FILE:WEIGHT,FILE,...; 2: all of it twice, 0.5: a random half. With --recipe: NAME=FILE,...
    out: str = "mix.json"  # the result is written here
    recipe: str = ""  # koala_distill or koala_all: weights by name
    rejected: bool = False  # keep the worse replies of HH-RLHF, WebGPT, ..., too; for --template=koala
    seed: int = 0  # of the order and of the halves


def mix_files(cfg: MixConfig) -> dict:
    weights = RECIPES.get(cfg.recipe, {})
    if cfg.recipe and not weights:
        raise Problem(f"--recipe={cfg.recipe}: expected one of {', '.join(RECIPES)}")
    report, sources, names, kinds = Report(), [], [], set()
    for item in cfg.files.split(","):
        if not item:
            raise Problem("two commas, or none in between: give FILE:WEIGHT,FILE,...")
        name, file, weight = re.fullmatch(r"(?:(\w+)=)?(.+?)(?::(\d*\.?\d+))?", item).groups()
        if weights and name not in weights:
            raise Problem(f"{cfg.recipe} mixes {', '.join(weights)}: give each as NAME=FILE, not {item}")
        refuse_same(file, cfg.out)
        found = load_conversations(file, report, ["rejected"] * cfg.rejected)
        sources.append((found, float(weight or weights.get(name, 1))))
        names, kinds = [*names, name], kinds | {kind_of(file)}
    missing = [name for name in weights if name not in names]
    if missing:
        raise Problem(f"{cfg.recipe} also needs {', '.join(missing)}: give each as NAME=FILE")
    found = mix(sources, cfg.seed)
    for item, (conversations, weight) in zip(cfg.files.split(","), sources):
        share = weight * len(conversations) / max(1, len(found))
        print(f"{item}: {len(conversations)} conversations, weight {weight:g}: {100 * share:.1f}%")
    return write_result(found, cfg, "alpaca" if kinds <= set(ALPACA) else "sharegpt", report)


@dataclass
class IdentityConfig:
    name: str = "Lumi"  # what the model shall call itself
    maker: str = "two students"  # and who made it
    out: str = "identity.json"  # the result is written here


def identity_file(cfg: IdentityConfig) -> dict:
    n = save_conversations(identity_conversations(cfg.name, cfg.maker), cfg.out)
    print(f"{cfg.out}: {n} conversations in which the model is {cfg.name}, made by {cfg.maker}")
    return dict(conversations=n)


if __name__ == "__main__":
    run(None, dict(show=(show, ShowConfig), stats=(stats, StatsConfig), tokens=(stats, StatsConfig),
                   clean=(clean_file, CleanConfig), split=(split_file, SplitConfig),
                   oasst=(oasst_file, OasstConfig), mix=(mix_files, MixConfig),
                   identity=(identity_file, IdentityConfig)))
