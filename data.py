"""From people's files to rows of tokens with a loss mask.

    python data.py show sharegpt.json --count=3                       # what is learned is highlighted
    python data.py show alpaca.json --tokenizer=out/base --template=alpaca

Files are recognised by content: plain text, ShareGPT JSON or JSON lines, Alpaca JSON or JSON lines.
Tokens and mask are built together, piece by piece, by `render`: a prefix is never tokenised again and counted,
which is how the originals came to drop and mis-mask conversations.
"""

import gzip
import itertools
import json
import random
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, NamedTuple, Optional, Sequence

import numpy as np
import sentencepiece
import torch

from config import Problem, run

IGNORE = -100  # label of a token that is not learned


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
        """Ids without bos and eos. SentencePiece begins every text with a space of its own; a text that goes on in
        the same line (continuation) must not get one. Control pieces such as </s> cannot be produced by text.
        """
        if not continuation:
            return self.sp.encode(text)
        ids = self.sp.encode("\n" + text)  # a newline is always the one byte piece <0x0A>, so nothing merges with it
        return ids[ids.index(self._newline) + 1:]

    def decode(self, ids: Sequence[int], continuation: bool = False) -> str:
        if not continuation:
            return self.sp.decode(list(ids))
        return self.sp.decode([self._newline, *ids])[1:]


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
    spoken = [line for t in TEMPLATES.values() for part in (t.system, t.system_with_input, t.ask, t.ask_with_input)
              for line in part.format(text="", input="").split("\n") if line.strip()]
    lines += spoken * max(1, len(lines) // 200)
    letters = Counter(itertools.chain.from_iterable(lines))
    rare = {ord(c): "\n" for c, _ in letters.most_common()[max(1, vocab_size - 260):]}
    if rare:  # a large alphabet: its rarest letters stay bytes, or there would be no room for the bytes
        lines = [part for line in lines for part in line.translate(rare).split("\n") if part.strip()]
    alphabet = len(letters) - len(rare)
    while True:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")), model_type="bpe",
                vocab_size=max(vocab_size, 260 + alphabet), byte_fallback=True, split_digits=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
                character_coverage=0.99995, max_sentence_length=1 << 20, minloglevel=2,
                unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
            break
        except RuntimeError as error:
            if "too high" not in str(error) or vocab_size <= 300:
                raise Problem(f"could not train a tokenizer: {error}") from None
            vocab_size = vocab_size * 4 // 5
    path.with_suffix(".vocab").unlink(missing_ok=True)
    return Tokenizer(path)


# -- conversations -------------------------------------------------------------------------------------------

class Turn(NamedTuple):
    role: str  # "user" or "assistant"
    text: str
    input: str = ""  # Alpaca's second field: the material an instruction is about


@dataclass
class Conversation:
    turns: list[Turn]  # user, assistant, user, assistant, ...; may end with a user turn that waits for its reply
    id: str = ""
    system: Optional[str] = None  # instead of the template's own
    extra: dict = field(default_factory=dict)  # other keys of the record


ROLES = {"human": "user", "user": "user", "prompter": "user", "instruction": "user",
         "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
         "bard": "assistant", "model": "assistant", "bot": "assistant", "system": "system"}


@dataclass(frozen=True)
class Template:
    """How a conversation becomes a string. The same object serves training and inference.

    Vicuna v1.1: `SYSTEM USER: q ASSISTANT: a</s>USER: q ASSISTANT: a</s>`, no newline anywhere.
    Alpaca: the preamble depends on whether the instruction has an input; the reply follows `:` without a space.
    """
    system: str
    ask: str  # {text} is the user's, {input} Alpaca's input
    between: str  # between the system text and the first question, and (when `glued`) between rounds
    glued: bool = False  # the reply continues the line: SentencePiece may not put its space there
    system_with_input: str = ""
    ask_with_input: str = ""


TEMPLATES = {
    "vicuna_v1.1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
               "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        ask="USER: {text} ASSISTANT:", between=" "),
    "alpaca": Template(
        system="Below is an instruction that describes a task. "
               "Write a response that appropriately completes the request.",
        system_with_input="Below is an instruction that describes a task, paired with an input that provides "
                          "further context. Write a response that appropriately completes the request.",
        ask="### Instruction:\n{text}\n\n### Response:",
        ask_with_input="### Instruction:\n{text}\n\n### Input:\n{input}\n\n### Response:",
        between="\n\n", glued=True),
    "plain": Template(system="", ask="{text}\n", between="\n", glued=True),  # for a base model, which knows no roles
}


class Example(NamedTuple):
    tokens: list[int]
    labels: list[int]  # the token itself where it is learned, IGNORE elsewhere


def render(conversation: Conversation, template: str, tokenizer: Tokenizer) -> Example:
    """Tokens and labels of a conversation: replies and their </s> are learned, nothing else.

    A conversation that ends with a user turn gives the prompt for its reply. Each segment is encoded by itself, so
    user text can forge neither a control piece nor supervision.
    """
    t = get_template(template)
    tokens, labels = [tokenizer.bos], [IGNORE]

    def add(ids: list[int], supervised: bool) -> None:
        tokens.extend(ids)
        labels.extend(ids if supervised else [IGNORE] * len(ids))

    for i, turn in enumerate(conversation.turns):
        if turn.role == "assistant":
            add(tokenizer.encode(turn.text, t.glued), True)
            add([tokenizer.eos], True)
            continue
        with_input = bool(turn.input) and bool(t.ask_with_input)
        text = turn.text if with_input or not turn.input else turn.text + "\n" + turn.input
        ask = (t.ask_with_input if with_input else t.ask).format(text=text, input=turn.input)
        if i == 0:
            system = conversation.system if conversation.system is not None else (
                t.system_with_input if with_input else t.system)
            ask = system + t.between + ask if system else ask
        elif t.glued:
            ask = t.between + ask
        add(tokenizer.encode(ask, t.glued and i > 0), False)
    return Example(tokens, labels)


def get_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise Problem(f"unknown template {name}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# -- reading files -------------------------------------------------------------------------------------------

def read_text(path) -> str:
    path = Path(path)
    if path.is_dir():
        raise Problem(f"{path} is a folder; give a file")
    if not path.exists():
        raise Problem(f"no such file: {path}")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise Problem(f"{path} is a damaged gzip file ({error})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem(f"{path} is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise Problem(f"{path} is empty")
    return text


def parse_json(text: str):
    """json.loads. Half a character ("\\ud83d" without its partner), which no UTF-8 text can hold, becomes "?"."""
    value = json.loads(text)
    if "\\ud" in text or "\\uD" in text:
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def read_records(path) -> Optional[list]:
    """The objects of a JSON array or of JSON lines; None when the file is plain text."""
    text = read_text(path)
    start = text.lstrip()
    if not (start[0] == "{" or (start[0] == "[" and start[1:].lstrip()[:1] in ("{", "]", "["))):
        return None
    try:
        first = json.loads(start.split("\n", 1)[0])
        lines = isinstance(first, dict)
    except json.JSONDecodeError:
        lines = False
    if not lines:
        try:
            records = parse_json(text)
        except json.JSONDecodeError as error:
            raise Problem(f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
        return records if isinstance(records, list) else [records]
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand inside a string
        if line.strip():
            try:
                records.append(parse_json(line))
            except json.JSONDecodeError as error:
                raise Problem(f"{path}: broken JSON at line {number}: {error.msg}") from None
    return records


def kind_of(records: Optional[list], path) -> str:
    """"text", "documents" (JSON lines with a "text"), "alpaca" or "sharegpt"."""
    if records is None:
        return "text"
    for r in records:
        if isinstance(r, dict) and ("conversations" in r or "messages" in r):
            return "sharegpt"
        if isinstance(r, dict) and "instruction" in r and ("output" in r or "response" in r):
            return "alpaca"
        if isinstance(r, dict) and isinstance(r.get("text"), str):
            return "documents"
    keys = ", ".join(list(records[0])[:5]) if records and isinstance(records[0], dict) else "no objects"
    raise Problem(f"{path} is JSON, but neither ShareGPT (conversations) nor Alpaca (instruction, output): it has {keys}")


def load_conversations(path, report: Optional[Counter] = None) -> list[Conversation]:
    """ShareGPT or Alpaca, by content. What is dropped or mended is counted by reason in `report`."""
    records = read_records(path)
    kind = kind_of(records, path)
    if kind in ("text", "documents"):
        raise Problem(f"{path} is plain text, not conversations; pre-train on it with --stage=pretrain")
    report = Counter() if report is None else report
    parse = _alpaca if kind == "alpaca" else _sharegpt
    found = [c for i, r in enumerate(records) if (c := parse(r, f"{Path(path).stem}_{i}", report))]
    if not found:
        why = "; ".join(f"{reason}: {n}" for reason, n in report.items())
        raise Problem(f"{path}: none of {len(records)} records is usable ({why})")
    return found


def _alpaca(record, name: str, report: Counter) -> Optional[Conversation]:
    record = record if isinstance(record, dict) else {}
    fields = record.get("instruction"), record.get("input"), record.get("output", record.get("response"))
    instruction, given, output = ("" if f is None else f for f in fields)
    if not all(isinstance(f, str) for f in (instruction, given, output)):
        report["dropped: a field is not text"] += 1
    elif not instruction.strip():
        report["dropped: no instruction"] += 1
    elif not output.strip():
        report["dropped: no output"] += 1
    else:
        if given.strip().lower() in ("<noinput>", "no input", "n/a", "none", ""):
            given = ""  # the released 52k file has all of these for "no input"
        return Conversation([Turn("user", instruction, given), Turn("assistant", output)], str(record.get("id", name)))
    return None


def _sharegpt(record, name: str, report: Counter) -> Optional[Conversation]:
    messages = record.get("conversations", record.get("messages")) if isinstance(record, dict) else None
    if not isinstance(messages, list):
        report["dropped: no list of messages"] += 1
        return None
    turns, system = [], None
    for m in messages:
        role = ROLES.get(str(m.get("from", m.get("role"))).lower()) if isinstance(m, dict) else None
        text = m.get("value", m.get("content")) if role else None
        if not role:
            report["dropped: unknown role"] += 1
            return None
        empty = not isinstance(text, str) or not text.strip()
        if role == "system":
            system = None if empty else text
        elif empty:
            report["cut at an empty message"] += 1
            break
        elif not turns and role == "assistant":
            report["mended: dropped a reply before the first question"] += 1
        elif turns and turns[-1].role == role:
            report["mended: joined two messages of one speaker"] += 1
            turns[-1] = Turn(role, turns[-1].text + "\n" + text)
        else:
            turns.append(Turn(role, text))
    if turns and turns[-1].role == "user":
        report["mended: dropped a last question without reply"] += 1
        turns.pop()
    if not turns:
        report["dropped: no reply"] += 1
        return None
    extra = {k: v for k, v in record.items() if k not in ("id", "conversations", "messages")}
    return Conversation(turns, str(record.get("id", name)), system, extra)


# -- rows of tokens: every batch is a pure function of (seed, step) ------------------------------------------

class Rows:
    """Rows of equal length, served in an order that depends on (seed, step) alone: resuming needs no sampler state."""

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
    """Rows that score every token of a text exactly once, each with at least half a row of context before it."""
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
    rooms: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rooms[r]: rows with r places left
    rows: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: -len(e.tokens)):
        size = min(len(example.tokens), seq_len)
        room = next((r for r in range(size, seq_len + 1) if rooms[r]), None)
        if room is None:
            rows.append([])
            at, room = len(rows) - 1, seq_len
        else:
            at = rooms[room].pop()
        rows[at].append(example)
        rooms[room - size].append(at)
    tokens = np.full((len(rows), seq_len), pad, np.int32)
    labels = np.full((len(rows), seq_len), IGNORE, np.int32)
    segments = np.full((len(rows), seq_len), -1, np.int32)  # padding is a segment of its own
    for r, row in enumerate(rows):
        end = 0
        for s, example in enumerate(row):
            n = min(len(example.tokens), seq_len - end)
            tokens[r, end:end + n], labels[r, end:end + n] = example.tokens[:n], example.labels[:n]
            segments[r, end:end + n] = s
            end += n
    return Rows(tokens, labels, segments, seed)


# -- asking a model ------------------------------------------------------------------------------------------

def chat(model, tokenizer: Tokenizer, template: str, conversations: Sequence[Conversation], max_new_tokens: int = 96,
         batch: int = 64, **sampling) -> tuple[list[str], list[bool]]:
    """Replies to conversations that wait for one, and whether each reply ended by itself. Similar lengths together."""
    prompts = [render(c, template, tokenizer).tokens for c in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies, ended = [""] * len(prompts), [False] * len(prompts)
    glued = get_template(template).glued
    for at in range(0, len(order), batch):
        group = order[at:at + batch]
        columns = list(model.generate([prompts[i] for i in group], max_new_tokens, stop=(tokenizer.eos,), **sampling))
        for i, ids in zip(group, zip(*columns)):
            ended[i] = tokenizer.eos in ids
            ids = ids[:ids.index(tokenizer.eos)] if ended[i] else ids
            replies[i] = tokenizer.decode(ids, glued)
    return replies, ended


# -- python data.py show -------------------------------------------------------------------------------------

@dataclass
class ShowConfig:
    file: str  # ShareGPT or Alpaca, JSON or JSON lines
    tokenizer: str = "out/base"  # a checkpoint folder or a tokenizer.model
    template: str = ""  # alpaca for Alpaca files, else vicuna_v1.1
    count: int = 2  # conversations to print
    seed: int = 0  # which ones

    def __post_init__(self):
        if self.count < 0:
            raise Problem(f"--count={self.count} must not be negative")


def show(cfg: ShowConfig) -> dict:
    """Rendered conversations; on a terminal what is learned is green, elsewhere it stands in [[ ]]."""
    report = Counter()
    conversations = load_conversations(cfg.file, report)
    tokenizer = find_tokenizer(cfg.tokenizer)
    template = cfg.template or default_template(cfg.file)
    on, off = ("\033[92m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    total, supervised = 0, 0
    for c in random.Random(cfg.seed).sample(conversations, min(cfg.count, len(conversations))):
        example = render(c, template, tokenizer)
        learned = sum(label != IGNORE for label in example.labels)
        print(f"\n--- {c.id}: {len(example.tokens)} tokens, {learned} learned (template {template})")
        start = 0
        for end in range(1, len(example.tokens) + 1):
            if end == len(example.tokens) or (example.labels[end] == IGNORE) != (example.labels[start] == IGNORE):
                text = spell(tokenizer, example.tokens[start:end])
                print(text if example.labels[start] == IGNORE else on + text + off, end="")
                start = end
        print()
        total, supervised = total + len(example.tokens), supervised + learned
    print(f"\n{len(conversations)} conversations in {cfg.file}" + "".join(f"; {k}: {n}" for k, n in report.items()))
    return dict(conversations=len(conversations), tokens=total, supervised=supervised, **report)


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids with control pieces spelled out."""
    out, run_ = "", []
    for i in [*ids, None]:
        if i is not None and not tokenizer.sp.is_control(i) and i != tokenizer.unk:
            run_.append(i)
            continue
        if run_:
            out += tokenizer.decode(run_, continuation=True)
            run_ = []
        out += "" if i is None else tokenizer.sp.id_to_piece(i)
    return out


def default_template(path) -> str:
    return "alpaca" if kind_of(read_records(path), path) == "alpaca" else "vicuna_v1.1"


def find_tokenizer(where: str) -> Tokenizer:
    """From a tokenizer.model, or from a checkpoint folder."""
    path = Path(where)
    if path.is_dir():
        steps = [path / (path / "latest").read_text().strip()] if (path / "latest").exists() else [path]
        path = steps[0] / "tokenizer.model"
    if not path.exists():
        raise Problem(f"no tokenizer at {where}; give --tokenizer=FILE, or train one: python train_sft.py")
    return Tokenizer(path)


if __name__ == "__main__":
    run(None, {"show": (show, ShowConfig)})
