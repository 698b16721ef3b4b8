"""Turns files of text or conversations into rows of tokens and labels.

    python data.py show sharegpt.json                     # token by token, supervised ones marked
    python data.py show sharegpt.json --ckpt=out/vicuna   # with the loss of each of them
    python data.py stats sharegpt.json                    # conversations, turns, tokens, lengths

The format is detected from the content: ShareGPT or Alpaca conversations, JSON documents, or plain
text, gzipped or not. recipes/ has the preprocessing that other projects apply to such files.

Tokens and labels are built together, span by span, by `render`. FastChat and others tokenize the
whole conversation, then locate the replies by tokenizing each round again and adding up lengths.
Where the sums disagree, they mask out the conversation or supervise the wrong tokens.
"""

import bisect
import contextlib
import gzip
import io
import itertools
import json
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from tools.config import UserError, check_regular, run

# The same values as in model.py, repeated so that this file does not import the model.
IGNORE = -100  # label of a token excluded from the loss (cross_entropy's ignore_index)
IMAGE_SLOT = -1  # placeholder token, replaced by an image vector


# -- tokenizer ------------------------------------------------------------------------------------

class Tokenizer:
    """A SentencePiece BPE model with LLaMA's ids: unk 0, bos 1, eos 2.

    BPE pieces are frequent sequences of characters, with "▁" for a space. Byte fallback: characters
    without a piece are spelled in bytes, such as <0x0A>, the newline.
    """

    def __init__(self, path):
        if not Path(path).is_file():
            raise UserError(f"no tokenizer at {path}: give --tokenizer=FILE, or train one with "
                            "python train_sft.py")
        check_regular(path)
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise UserError(f"{path} is not a SentencePiece model") from None
        self.path = Path(path)
        self.unk, self.bos, self.eos = self.sp.unk_id(), self.sp.bos_id(), self.sp.eos_id()
        self.vocab_size = self.sp.vocab_size()
        self._newline = self.sp.piece_to_id("<0x0A>")
        if reason := self.why_unusable():
            raise UserError(f"{path} is not like LLaMA's tokenizer: {reason}")

    def why_unusable(self) -> str | None:
        """Why texts cannot be rendered with this tokenizer, or None."""
        if min(self.bos, self.eos) < 0:
            return "it has no <s> or no </s>"
        if not self.sp.is_byte(self._newline):
            return "it has no byte fallback"
        if self.sp.decode(self.sp.encode(NORMALIZED)) != NORMALIZED:
            return "it normalizes text, which changes it"
        if self.sp.encode("\n\n")[-2:] != [self._newline] * 2:
            return "a newline is not the single piece <0x0A>"
        return None

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids without bos and eos. No text can produce a control token such as </s>.

        SentencePiece prepends a space to its input. Text that continues a line must not get it, so
        "\\n" + text is encoded, and everything up to the newline, always a token of its own, is
        dropped.
        """
        if not continues:
            return self.sp.encode(text)
        ids = self.sp.encode("\n" + text)
        return ids[ids.index(self._newline) + 1:]

    def decode(self, ids: Sequence[int], continues: bool = False) -> str:
        """Text of ids. Some published models pad the vocabulary; ids of the padding are skipped."""
        ids = [i for i in ids if i < self.vocab_size]
        if continues:
            return self.sp.decode([self._newline, *ids])[1:]
        return self.sp.decode(ids)


# Changed by SentencePiece's normalizations: letters, capitals, spaces, and control characters.
NORMALIZED = " A  ﬁ e\u0301 １\t\u3000\u200b\x07 "
# bos, eos, unk, 256 bytes, and the space
N_FIXED_PIECES = 260


def train_tokenizer(texts: Iterable[str], vocab_size: int, path) -> Tokenizer:
    """Trains a BPE tokenizer with LLaMA's settings: byte fallback and no normalization. A small
    text may yield fewer than `vocab_size` pieces."""
    lines = non_blank_lines(texts)
    if not lines:
        raise UserError("no text to train a tokenizer on")
    # Mix in the text of Vicuna's and Alpaca's templates, so that their words become single pieces.
    lines += template_lines() * max(1, len(lines) // 200)
    # SentencePiece refuses an alphabet larger than the vocabulary. So lines are split at the rarest
    # characters, which are left to byte fallback.
    characters = Counter(itertools.chain.from_iterable(lines))
    n_kept = max(1, vocab_size - N_FIXED_PIECES)
    rare = [character for character, _ in characters.most_common()[n_kept:]]
    rare.append("\u2585")  # SentencePiece skips lines that contain it
    cut_at = {ord(character): "\n" for character in rare}
    lines = non_blank_lines(line.translate(cut_at) for line in lines)
    trained = io.BytesIO()  # a file that SentencePiece writes would hold its own path
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, model_type="bpe",
        vocab_size=vocab_size, hard_vocab_limit=False, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=0.99995,
        max_sentence_length=1 << 20, minloglevel=2, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    with atomic_write(path, "wb") as file:
        file.write(trained.getvalue())
    return Tokenizer(path)


def non_blank_lines(texts: Iterable[str]) -> list[str]:
    # Cut, because SentencePiece would skip a line of a megabyte.
    return [line for text in texts for line in re.findall(".{1,10000}", text) if line.strip()]


def template_lines() -> list[str]:
    """The fixed text of Vicuna's and Alpaca's templates."""
    parts = []
    for t in (TEMPLATES["vicuna_v1.1"], TEMPLATES["alpaca"]):
        parts += [t.system, t.system_with_input, t.ask, t.ask_with_input]
    return non_blank_lines(part.format(text="", input="") for part in parts)


def find_tokenizer(path) -> Tokenizer:
    """The tokenizer of a checkpoint folder (its latest step), or a tokenizer.model."""
    path = Path(path)
    if (path / "latest").exists():
        from tools import checkpoint
        path = checkpoint.find(path)
    return Tokenizer(path / "tokenizer.model" if path.is_dir() else path)


# -- conversations and templates ------------------------------------------------------------------

class Turn(NamedTuple):
    role: str  # "user" or "assistant"
    text: str
    input: str = ""  # Alpaca's input field
    slots: int = 0  # image slots before the text
    supervised: bool = True  # False: a reply that is not in the loss

    def whole(self) -> str:
        """The text, with Alpaca's input below it."""
        return f"{self.text}\n{self.input}" if self.input else self.text


@dataclass
class Conversation:
    turns: list[Turn]  # alternating, user first; the last one may be a question without a reply
    id: str = ""
    system: str | None = None  # replaces the template's system prompt
    # Other keys of the record. Two of them describe the last reply if they are True: "cut" (it was
    # truncated, so its end is not supervised) and "rejected" (people preferred another one).
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Template:
    """Formats a conversation as text.

    First round: [system + between] + start + ask + reply + end. Later rounds: later + ask + reply
    + end.
    """
    system: str
    ask: str  # {text} is the user's text, {input} Alpaca's input, </s> the eos token
    between: str = " "  # after the system prompt
    start: str = ""  # before the first question, with or without a system prompt
    later: str = ""  # before every later question
    end: str = ""  # the text that ends a reply; the eos token when empty
    # SentencePiece puts a space before each text that it tokenizes. A text that "continues" what
    # stands before it does not get that space.
    reply_continues: bool = False  # Alpaca: "### Response:Hi". Vicuna: "ASSISTANT: Hi"
    ask_continues: bool = False  # later questions. Vicuna: "</s> USER: ..."
    system_with_input: str = ""  # Alpaca's other system prompt, for an instruction with an input
    ask_with_input: str = ""
    ask_rejected: str = ""  # prompt for a reply that people rejected


TEMPLATES = {
    # Also v1.3 and v1.5. No newlines: SYSTEM USER: q ASSISTANT: a</s>USER: q ASSISTANT: a</s>
    "vicuna_v1.1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. The "
               "assistant gives helpful, detailed, and polite answers to the user's questions.",
        ask="USER: {text} ASSISTANT:"),
    # The end is ordinary text, so a reply is cut at a line that begins with "###".
    "vicuna_v0": Template(
        system="A chat between a curious human and an artificial intelligence assistant. The "
               "assistant gives helpful, detailed, and polite answers to the human's questions.",
        between="\n\n", start="###", ask=" Human: {text}\n### Assistant:", end="\n###",
        ask_continues=True),
    # The original tokenizes prompt and reply together: ":" and a following "-" merge into one
    # token, and the "-" is never supervised. Here the reply is tokenized by itself.
    "alpaca": Template(
        system="Below is an instruction that describes a task. Write a response that "
               "appropriately completes the request.",
        system_with_input="Below is an instruction that describes a task, paired with an input "
                          "that provides further context. Write a response that appropriately "
                          "completes the request.",
        ask="### Instruction:\n{text}\n\n### Response:",
        ask_with_input="### Instruction:\n{text}\n\n### Input:\n{input}\n\n### Response:",
        between="\n\n", later="\n\n", reply_continues=True, ask_continues=True),
    # Koala also trains on rejected replies, after a prompt that is never used at inference.
    "koala": Template(system="BEGINNING OF CONVERSATION:", ask="USER: {text} GPT:",
                      ask_rejected="USER: {text} An Unhelpful Answer:"),
    # The original also supervises the <|prompter|> that follows a reply.
    "oasst": Template(system="", between="", ask="<|prompter|>{text}</s><|assistant|>",
                      reply_continues=True, ask_continues=True),
    "minigpt4": Template(system="", between="", start="###", ask="Human: {text} ###Assistant: ",
                         end="###", ask_continues=True),
    # MiniGPT-4 as its published demo prompts it
    "minigpt4_chat": Template(
        system="Give the following image: <Img>ImageContent</Img>. You will be able to see the "
               "image once I provide it to you. Please answer my questions.",
        between="", start="###", ask="Human: {text}###Assistant:", end="###", ask_continues=True),
    # a base model: no roles
    "plain": Template(system="", ask="{text}", between="\n", later="\n",
                      reply_continues=True, ask_continues=True),
    # a base model that is asked something: the reply is the next line
    "lines": Template(system="", between="", ask="{text}\n", end="\n",
                      reply_continues=True, ask_continues=True),
}
# Templates to chat in, where they differ from the one the model was trained in.
CHAT_TEMPLATES = {"minigpt4": "minigpt4_chat"}
# MiniGPT-4's published instructions of stage 2, and its request for descriptions to be curated.
IMAGE_INSTRUCTIONS = ("Describe this image in detail.",
                      "Take a look at this image and describe what you notice.",
                      "Please provide a detailed description of the picture.",
                      "Could you describe the contents of this image for me?")
IMAGE_REQUEST = ("Describe this image in detail. Give as many details as possible. Say everything "
                 "you see.")


def get_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name}; choose from {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# -- rendering: tokens and labels together --------------------------------------------------------

class Span(NamedTuple):
    """A piece of a rendered conversation: text, the eos token, or image slots."""
    text: str = ""
    eos: bool = False
    slots: int = 0
    supervised: bool = False  # in the loss
    continues: bool = False  # text without SentencePiece's leading space


class Example(NamedTuple):
    tokens: Sequence[int]
    labels: Sequence[int]  # the token itself where it is supervised, IGNORE elsewhere


def spans(conversation: Conversation, t: Template) -> Iterator[Span]:
    """The spans of a conversation, in order."""
    last = len(conversation.turns) - 1
    for i, turn in enumerate(conversation.turns):
        if turn.role == "user":
            yield from question_spans(conversation, i, t)
        else:
            yield Span(turn.text, supervised=turn.supervised, continues=t.reply_continues)
            truncated = i == last and conversation.extra.get("cut") is True
            if t.end and not truncated:
                yield Span(t.end, supervised=turn.supervised, continues=True)
            elif not truncated:
                yield Span(eos=True, supervised=turn.supervised)


def question_spans(conversation: Conversation, i: int, t: Template) -> Iterator[Span]:
    """The user's turn i, with the system prompt or the separator before it."""
    turn = conversation.turns[i]
    text, system, ask = turn.text, t.system, t.ask
    if turn.input and t.ask_with_input:
        system, ask = t.system_with_input, t.ask_with_input
    elif turn.input:
        text = turn.whole()
    if conversation.extra.get("rejected") is True and i >= len(conversation.turns) - 2:
        ask = t.ask_rejected
    if conversation.system is not None:
        system = conversation.system
    if i > 0:
        before = t.later
    else:
        before = (system + t.between if system else "") + t.start
    if turn.slots:
        image = "<Img>{slots}</Img>"
        ask = ask.replace("{text}", f"{image} {{text}}" if text else image)
    continues = i > 0 and t.ask_continues
    # Split before filling in the text, so that it cannot inject </s> or an image slot.
    for part in re.split(r"(</s>|\{slots\})", ask):
        if part == "</s>":
            yield Span(eos=True)
        elif part == "{slots}":
            yield Span(slots=turn.slots)
        else:
            yield Span(before + part.format(text=text, input=turn.input), continues=continues)
        before, continues = "", t.reply_continues  # after </s> or slots, as a reply is


def encode_span(span: Span, tokenizer: Tokenizer) -> list[int]:
    if span.slots:
        return [IMAGE_SLOT] * span.slots
    if span.eos:
        return [tokenizer.eos]
    return tokenizer.encode(span.text, span.continues)


def render(conversation: Conversation, template: str, tokenizer: Tokenizer) -> Example:
    """Token ids and labels. A label is the token id where it is supervised, IGNORE elsewhere. Only
    replies and their ends are supervised. If the last turn is the user's, the tokens are a prompt.
    """
    t = get_template(template)
    if conversation.extra.get("rejected") is True and not t.ask_rejected:
        raise UserError(f"{conversation.id} has a rejected reply, but template {template} has no "
                        "prompt for one; use koala")
    tokens, labels = [tokenizer.bos], [IGNORE]
    for span in spans(conversation, t):
        ids = encode_span(span, tokenizer)
        tokens += ids
        labels += ids if span.supervised else [IGNORE] * len(ids)
    return Example(tokens, labels)


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, with control tokens and image slots spelled out."""
    def is_text(i: int) -> bool:
        return i not in (IMAGE_SLOT, tokenizer.unk) and not tokenizer.sp.is_control(i)

    out = []
    for readable, group in itertools.groupby(ids, is_text):
        group = list(group)
        if readable:
            out.append(tokenizer.decode(group, continues=True))
            continue
        if IMAGE_SLOT in group:
            out.append(f"<{group.count(IMAGE_SLOT)} image slots>")
        out += [tokenizer.sp.id_to_piece(i) for i in group if i != IMAGE_SLOT]
    return "".join(out)


def runs(labels: Sequence[int]) -> list[tuple[int, int, bool]]:
    """(begin, end, supervised) of each maximal run of labels that are all supervised or all not."""
    supervised = np.asarray(labels) != IGNORE
    borders = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(labels)]
    return [(a, b, bool(supervised[a])) for a, b in zip(borders, borders[1:]) if a < b]


def fit_prompt(conversation: Conversation, template: str, tokenizer: Tokenizer, room: int,
               block: int = 0) -> tuple[list[int], int]:
    """The tokens up to the reply, and how many rounds were dropped to make them fewer than `room`.

    Text-only rounds are dropped first, then rounds with an image, the oldest first. The last
    question always stays, so the prompt can still be too long. Text is dropped in blocks of at
    least `block` tokens, so that the prompts of a growing conversation begin alike for some turns.
    """
    turns = conversation.turns
    order = sorted(range((len(turns) - 1) // 2), key=lambda i: turns[2 * i].slots > 0)
    n_text = sum(not turns[2 * i].slots for i in order)
    choices, length = [0], 0  # how many rounds may be dropped
    for n, i in enumerate(order, start=1):
        alone = Conversation(turns[2 * i:2 * i + 2], system="")
        length += len(render(alone, template, tokenizer).tokens)
        if length >= block or n >= n_text:
            choices.append(n)
            length = 0

    def tokens_without(n: int) -> list[int]:
        dropped = set(order[:n])
        kept = [turn for i, turn in enumerate(turns) if i // 2 not in dropped]
        return render(replace(conversation, turns=kept), template, tokenizer).tokens

    # The first choice that fits, found by bisection, or else the last one.
    found = bisect.bisect_left(choices[:-1], True, key=lambda n: len(tokens_without(n)) < room)
    return tokens_without(choices[found]), choices[found]


def strip_end(text: str, template: str, complete: bool = True) -> tuple[str, bool]:
    """A reply without the template's end, and whether it was found. While streaming (not
    `complete`), a suffix that may be the start of the end is held back."""
    end = get_template(template).end
    if end and end in text:
        return text[:text.index(end)], True
    if not complete:
        for n in range(len(end) - 1, 0, -1):
            if text.endswith(end[:n]):
                return text[:-n], False
    return text, False


# -- reading files --------------------------------------------------------------------------------

class Report(Counter):
    """What was dropped or repaired: counts by reason, and in `entries` every (id, reason)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.entries: list[tuple[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        self[reason] += 1
        self.entries.append((name, reason))

    def __str__(self) -> str:
        return "".join(f"; {reason}: {n}" for reason, n in sorted(self.items()))


def read_text(path) -> str:
    """The text of a UTF-8 file, gzipped or not. Raises OSError or UserError."""
    check_regular(path)
    raw = Path(path).read_bytes()
    if raw.startswith(b"\x1f\x8b"):
        try:
            raw = gzip.decompress(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a corrupt gzip file ({error})") from None
    for first_bytes, kind in NOT_TEXT.items():
        if raw.startswith(first_bytes):
            raise UserError(f"{path} is {kind}; give JSON or text, which may be gzipped")
    if b"\0" in raw:
        raise UserError(f"{path} is not text: it has NUL bytes; convert UTF-16 with iconv")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8 (line {line}); convert it with iconv") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


# What a file begins with that is not text.
NOT_TEXT = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"PK\3\4": "a zip file",
            b"\xfd7zXZ": "an xz file", b"BZh": "a bzip2 file", b"\x28\xb5\x2f\xfd": "a zstd file",
            b"7z\xbc\xaf": "a 7z file", b"%PDF": "a PDF", b"SQLite format": "an SQLite database"}
# The beginning of JSON: a quoted string in an object or array, and what follows it there. Python
# quotes with "'".
JSON_BEGINS = re.compile(
    r"""\s*[\[{][\s\[{]*("([^"\\\n]|\\.)*"|'([^'\\\n]|\\.)*')\s*[:,\]]""")


def looks_like_json(text: str) -> bool:
    """True for text that is meant as JSON, by its beginning or by quoted keys in a quarter of
    its lines. Where it is broken, that is reported, and it is not read as prose."""
    n_keys = len(re.findall(r"""["'] *:""", text))
    return bool(JSON_BEGINS.match(text)) or 4 * n_keys > text.count("\n") + 10


def parse_records(text: str, path) -> list:
    """The values of a JSON array or of JSON lines, in which lone surrogates become "?"."""
    records = parse_json(text, path)
    if re.search(r"\\u[dD][89a-fA-F]", text):  # maybe a lone surrogate: UTF-8 cannot encode it
        records = json.loads(json.dumps(records, ensure_ascii=False).encode("utf-8", "replace"))
    return records


def parse_json(text: str, path) -> list:
    """The values in JSON arrays or JSON lines, also in files that were joined by cat. Raises
    UserError with the broken line, so that no record is lost silently."""
    decoder, between, records, at = json.JSONDecoder(), re.compile(r"[\s\ufeff]*"), [], 0
    are_arrays = text.lstrip().startswith("[")
    while (at := between.match(text, at).end()) < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line_number = getattr(error, "lineno", text.count("\n", 0, at) + 1)
            raise broken_json(path, line_number, error) from None
        records += value if are_arrays and isinstance(value, list) else [value]
    return records


def broken_json(path, line_number: int, error: Exception) -> UserError:
    reason = getattr(error, "msg", error)
    if isinstance(error, json.JSONDecodeError) and error.doc.startswith("'", error.pos):
        reason = "Python's single quotes; write the file with json.dump"
    return UserError(f"{path}: broken JSON at line {line_number}: {reason}")


# A record is of a kind if it has values for all keys of one of these sets.
KINDS = {
    "sharegpt": ({"conversations"}, {"messages"}),
    "alpaca": ({"instruction", "output"}, {"instruction", "response"},
               {"instruction", "instances"}),  # the last one: Self-Instruct's seed tasks
    "documents": ({"text"},),
}


def read_file(path, kinds: dict | None = None) -> tuple[str, list | str]:
    """("text", the text), or one of KINDS and the records. Raises UserError for other JSON."""
    text, records = read_text(path), None
    is_json = looks_like_json(text)
    if is_json or text.lstrip()[0] in '[{"':
        try:
            records = parse_records(text, path)
        except UserError:
            if is_json:
                raise
    if records is None:
        return "text", text.replace("\ufeff", "")  # the byte order marks of files joined by cat
    # a list of lists: each is the messages of a conversation
    records = [dict(messages=r) if isinstance(r, list) else r for r in records]
    kind = kind_of_records(records, kinds or KINDS)
    if kind is None:
        objects = [record for record in records if isinstance(record, dict)]
        found = f"the keys {', '.join(list(objects[0])[:5])}" if objects else "no objects"
        raise UserError(f"{path} is JSON in an unknown format, with {found}. Expected ShareGPT "
                        "(conversations or messages), Alpaca (instruction, output) or documents "
                        "(text); recipes/openassistant.py and recipes/koala.py read others")
    return kind, records


def kind_of_records(records: list, kinds: dict) -> str | None:
    """The kind of the first record that has one."""
    for record in records:
        given = set(filled(record)) if isinstance(record, dict) else set()
        for kind, key_sets in kinds.items():  # the first match wins
            if any(keys <= given for keys in key_sets):
                return kind
    return None


def filled(record: dict, *keys: str) -> list[str]:
    """Those of the keys (by default all) that have a value. Tables give every record all columns,
    with null or nothing in some."""
    return [key for key in keys or record if record.get(key) not in (None, "", [], {})]


def kind_of(path) -> str:
    return read_file(path)[0]


def default_template(kind: str) -> str:
    return "alpaca" if kind == "alpaca" else "vicuna_v1.1"


def is_blank(text: str) -> bool:
    """True if the text has only space, control and zero-width characters."""
    return all(unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp") for c in text)


ROLES = {
    "human": "user", "user": "user", "prompter": "user", "instruction": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant",
    "system": "system", "developer": "system",
}


def parse_message(message, report: Report) -> Turn:
    """A ShareGPT or OpenAI message. Its text is None if it has none that can be used, and its role
    is as in the file if it is unknown. Weight 0 excludes a reply from the loss."""
    message = message if isinstance(message, dict) else {}
    name = str(message.get("from") or message.get("role")).strip(" \t\n\xa0:#*<|>[]").lower()
    keys = filled(message, "value", "content", "text")
    text = message[keys[0]] if keys else None
    if isinstance(text, list):  # OpenAI's content parts
        parts = [part if isinstance(part, dict) else {} for part in text]
        parts.sort(key=lambda part: "text" in part)  # pictures first
        texts = [part.get("text", "<image>" if "image" in str(part) else None) for part in parts]
        text = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(text, str) or is_blank(text):
        text, keys = None, []
    used = {"from", "role", "input", *keys[:1]}
    if message.get("weight") in (0, 1):
        used.add("weight")
    report.update(f"not trained on: {key} of a message" for key in set(filled(message)) - used)
    alpaca_input = message["input"] if isinstance(message.get("input"), str) else ""
    return Turn(ROLES.get(name, name), text, alpaca_input, supervised=message.get("weight") != 0)


def split_record(record: dict, report: Report) -> tuple[list, dict]:
    """The messages of a ShareGPT record, its system prompt first, and what else it has. Keys that
    are not trained on are counted."""
    extra = {key: record[key] for key in filled(record) if key != "id"}
    forms = filled(extra, "conversations", "messages")
    messages = extra.pop(forms[0]) if forms else []
    if not isinstance(messages, list):
        messages = []
    if isinstance(extra.get("system"), str):
        messages = [{"from": "system", "value": extra.pop("system")}, *messages]
    report.update(f"not trained on: {key}" for key in extra if key not in ("cut", "rejected"))
    return messages, extra


def parse_sharegpt(record: dict, name: str, report: Report) -> Conversation | None:
    """A conversation of alternating turns, or None if it cannot be used. Repairs and drops go into
    the report."""
    turns, system, repairs, stopped = [], None, [], False
    messages, extra = split_record(record, report)
    for message in messages:
        turn = parse_message(message, report)
        if turn.role not in ROLES.values():
            report.add(name, f"dropped: unknown role {turn.role[:40]}")
            return None
        if turn.role == "system":
            if turns or system is not None:
                repairs.append("repaired: used the last system prompt, although late or repeated")
            system = turn.text or system
        elif turn.text is None:
            repairs.append("repaired: truncated at an empty message")
            stopped = True
            break
        elif turn.role == "assistant" and not turns:
            repairs.append("repaired: dropped a leading reply")
        elif turns and turns[-1].role == turn.role:
            repairs.append("repaired: merged consecutive messages of one role")
            turns[-1] = turns[-1]._replace(text=f"{turns[-1].text}\n{turn.whole()}",
                                           supervised=turns[-1].supervised and turn.supervised)
        else:
            turns.append(turn)
    if turns and turns[-1].role == "user":
        repairs.append("repaired: dropped an unanswered last question")
        turns.pop()
    if not turns:
        report.add(name, "dropped: no reply")
        return None
    for repair in repairs:
        report.add(name, repair)
    if stopped:  # these described a later reply
        extra = {k: v for k, v in extra.items() if k not in ("cut", "rejected")}
    return Conversation(turns, name, system, extra)


def refuse_pictures(c: Conversation) -> None:
    """Raises UserError for a question about a picture, as in LLaVA's and OpenAI's records."""
    has_picture = bool(filled(c.extra, "image", "images"))
    for question in c.turns[::2]:
        text = question.whole().strip()
        begins_or_ends = text.startswith("<image>") or text.endswith("<image>")
        if begins_or_ends or has_picture and "<image>" in text:
            raise UserError(f"{c.id} has an <image>, and this reads text alone; `python "
                            "train_vlm.py --images=FOLDER` trains on pictures with captions")


def one_round(question, reply, alpaca_input: str = "", extra: dict | None = None) -> dict:
    """A ShareGPT record with one question, its Alpaca input, and one reply."""
    asked = {"from": "human", "value": question, "input": alpaca_input}
    return {**(extra or {}), "conversations": [asked, {"from": "gpt", "value": reply}]}


NO_INPUT = ("", "<noinput>", "no input", "n/a", "none")  # all occur in Alpaca's 52k file


def parse_alpaca(record: dict) -> list[dict]:
    """One ShareGPT record, or one per instance of a Self-Instruct seed task. Dolly has "context"
    for the input; LLaMA-Factory also has "history", rounds before this one, and "system"."""
    rest = {key: record[key] for key in filled(record)}
    question, history = rest.pop("instruction", None), rest.pop("history", [])
    before = []
    for item in history:  # a pair of texts, or a message
        before += one_round(*item)["conversations"] if isinstance(item, list) else [item]
    instances, records = rest.pop("instances", None), []
    if instances is None:
        instances, rest = [rest], {}
    for instance in instances:
        extra = {**rest, **instance}
        inputs = [extra.pop(key) for key in filled(instance, "input", "context")]
        inputs = [text for text in inputs if text.strip().lower() not in NO_INPUT]
        reply = extra.pop("output", None) or extra.pop("response", None)
        record = one_round(question, reply, "\n".join(inputs), extra)
        record["conversations"] = before + record["conversations"]
        records.append(record)
    return records


def as_sharegpt(record: dict) -> list[dict]:
    """ShareGPT records from one of either kind: a file may mix them."""
    kind = kind_of_records([record], KINDS)
    if kind == "alpaca":
        return parse_alpaca(record)
    return [record] if kind == "sharegpt" else []


def parse_conversations(records: Iterable, prefix: str, report: Report,
                        to_sharegpt=as_sharegpt) -> Iterator[Conversation]:
    """Yields the conversations of each record; what cannot be used is counted in the report.
    `to_sharegpt` maps a record to a list of ShareGPT records."""
    for number, record in enumerate(records):
        name = record.get("id") if isinstance(record, dict) else None
        if not isinstance(name, (str, int)) or name == "":
            name = f"{prefix}_{number}"
        try:
            parts = to_sharegpt(record)
        except (LookupError, TypeError, AttributeError, ValueError):
            parts = []
        if not parts:
            report.add(str(name), "dropped: no conversation in this record")
            continue
        for k, part in enumerate(parts):
            part_name = str(name) if len(parts) == 1 else f"{name}_{k}"
            conversation = parse_sharegpt(part, part_name, report)
            if conversation:
                refuse_pictures(conversation)
                yield conversation


def load_conversations(path, report: Report | None = None) -> list[Conversation]:
    """All conversations of a ShareGPT or Alpaca file. `report` counts what was dropped or
    repaired. Raises UserError when nothing can be used."""
    report = Report() if report is None else report
    kind, records = read_file(path)
    if kind in ("text", "documents"):
        raise UserError(f"{path} holds {kind}, not conversations")
    found = list(parse_conversations(records, Path(path).stem, report))
    if not found:
        raise UserError(f"{path}: no usable conversation{report}")
    return found


def load_documents(path) -> list[str]:
    """The "text" of each JSON record, or a plain text as a single document."""
    kind, content = read_file(path)
    if kind == "text":
        return [content]
    if kind != "documents":
        raise UserError(f"{path} holds conversations ({kind}); pre-training needs plain text")
    texts, report = [], Report()
    for record in content:
        record = record if isinstance(record, dict) else {}
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            report["skipped: no text"] += 1
            continue
        texts.append(text)
        report.update(f"not trained on: {k}" for k in filled(record) if k not in ("id", "text"))
    if report:
        print(f"{path}: {len(texts)} of {len(content)} documents{report}")
    return texts


# -- writing files --------------------------------------------------------------------------------

def to_record(c: Conversation, kind: str = "sharegpt") -> dict:
    """A record of an Alpaca file, or of a ShareGPT file, in which an Alpaca input is part of the
    question."""
    if kind == "alpaca":
        *before, asked, reply = c.turns
        fields = dict(instruction=asked.text, input=asked.input, output=reply.text)
        if c.system:
            fields["system"] = c.system
        if before:
            fields["history"] = [[q.whole(), a.text] for q, a in zip(before[::2], before[1::2])]
        return {"id": c.id, **c.extra, **fields}
    messages = [{"from": "system", "value": c.system}] if c.system else []
    for turn in c.turns:
        message = {"from": "human" if turn.role == "user" else "gpt", "value": turn.whole()}
        messages.append(message if turn.supervised else {**message, "weight": 0})
    return {"id": c.id, "conversations": messages, **c.extra}


def save_conversations(conversations: Iterable[Conversation], path, kind: str = "sharegpt") -> int:
    """Writes ShareGPT or Alpaca: JSON lines if the name ends in .jsonl, else an array. Returns the
    number of records."""
    records = [json.dumps(to_record(c, kind), ensure_ascii=False) for c in conversations]
    with atomic_write(path) as file:
        if str(path).endswith(".jsonl"):
            file.write("\n".join(records) + "\n")
        else:
            file.write("[" + ",\n".join(records) + "]\n")
    return len(records)


@contextlib.contextmanager
def atomic_write(path, mode: str = "w"):
    """Writes to PATH.part and renames it when it is complete. Creates the folder. A device or a
    pipe is written to as it is, and a link stays a link."""
    path, encoding = Path(path), None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file():
        with open(path, mode, encoding=encoding) as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    try:
        with open(part, mode, encoding=encoding) as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# -- rows of tokens: a batch is a pure function of (data, seed, index, size) ----------------------

class Rows:
    """Tokens, labels and segments, each (rows, row length), reshuffled in every epoch. Resuming
    needs no state. Labels align with tokens; the loss shifts them."""

    def __init__(self, tokens: np.ndarray, labels: np.ndarray, segments: np.ndarray | None = None,
                 seed: int = 0):
        self.tokens, self.labels, self.segments, self.seed = tokens, labels, segments, seed
        self._epoch, self._order = -1, None

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, i: int) -> int:
        """Index of the i-th row that is drawn, counted over all epochs."""
        epoch = i // len(self)
        if self._epoch != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self))
        return self._order[i % len(self)]

    def indices(self, index: int, size: int) -> list[int]:
        """The rows of one batch."""
        return [self.row(i) for i in range(index * size, (index + 1) * size)]

    def batch(self, index: int, size: int) -> tuple:
        """tokens, labels (size, row length), and segments or None, as int64 tensors."""
        return self.at(self.indices(index, size))

    def at(self, rows: Sequence[int]) -> tuple:
        parts = (self.tokens, self.labels, self.segments)
        return tuple(None if p is None else torch.from_numpy(p[rows].astype(np.int64))
                     for p in parts)


class TextRows(Rows):
    """Plain text: one stream of ids, cut into rows at a different offset in each epoch. Every row
    begins with bos."""

    def __init__(self, ids: np.ndarray, seq_len: int, bos: int, seed: int = 0):
        self.ids, self.width, self.bos = ids, seq_len - 1, bos
        n_rows = max(0, len(ids) // self.width - 1)  # one fewer: room for the offset
        empty = np.empty((n_rows, 0))  # rows are cut when they are needed
        super().__init__(empty, empty, None, seed)

    def batch(self, index: int, size: int) -> tuple:
        rows = []
        for i in range(index * size, (index + 1) * size):
            epoch = i // len(self)
            # the 1: random numbers that are independent of the permutation's
            offset = np.random.default_rng((self.seed, epoch, 1)).integers(self.width)
            begin = offset + self.row(i) * self.width
            rows.append(np.append(self.bos, self.ids[begin:begin + self.width]))
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tokens, tokens, None


def windows(ids: np.ndarray, seq_len: int, bos: int) -> Rows:
    """Sliding-window rows for a validation loss, with a stride of half a row. Each token is scored
    once, after at least half a row of context (less only at the start of the text)."""
    half = seq_len // 2
    starts = range(0, len(ids), half)
    tokens = np.full((len(starts), seq_len), bos, np.int32)
    labels = np.full(tokens.shape, IGNORE, np.int32)
    for row, at in enumerate(starts):
        begin, end = max(0, at - half + 1), min(len(ids), at + half)
        tokens[row, 1:1 + end - begin] = ids[begin:end]
        labels[row, 1 + at - begin:1 + end - begin] = ids[at:end]
    return Rows(tokens, labels)


def encode_text(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """One stream of ids. Encoded in chunks, which end at a line break if possible, because
    SentencePiece is slow on long strings."""
    ids, begin = [], 0
    while begin < len(text):
        end = min(len(text), begin + 50000)
        newline = text.rfind("\n", begin, end)
        if newline >= 0:
            end = newline + 1
        ids.extend(tokenizer.encode(text[begin:end], continues=begin > 0))
        begin = end
    return np.array(ids, dtype=np.int32)


def render_file(path, template: str, tokenizer: Tokenizer, report: Report) -> list[Example]:
    """All conversations of a file, as int32 arrays: lists would take ten times the memory."""
    examples = []
    conversations = load_conversations(path, report)
    quick = len(conversations) < 20000
    for c in tqdm(conversations, desc="tokenizing", leave=False, disable=quick):
        tokens, labels = render(c, template, tokenizer)
        examples.append(Example(np.array(tokens, np.int32), np.array(labels, np.int32)))
    return examples


# -- packing --------------------------------------------------------------------------------------

def pack_textbook(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """First fit, a simpler rule than pack_best_fit's: each example goes into the first row that has
    room. Takes more time, and usually more rows. Returns the examples of each row."""
    rows, used = [], []
    for i, length in enumerate(lengths):
        length = min(length, seq_len)
        r = next((r for r, n in enumerate(used) if n + length <= seq_len), len(rows))
        if r == len(rows):
            rows.append([])
            used.append(0)
        rows[r].append(i)
        used[r] += length
    return rows


def pack_best_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Best-fit decreasing: longest first, each into the fullest row that has room."""
    rows: list[list[int]] = []
    free: list[tuple[int, int, int]] = []  # sorted: (room left, tie-break: latest first, row)
    longest_first = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    for n, i in enumerate(longest_first):
        length = min(lengths[i], seq_len)
        fullest = bisect.bisect_left(free, (length,))
        if fullest < len(free):
            room, _, r = free.pop(fullest)
        else:
            room, r = seq_len, len(rows)
            rows.append([])
        rows[r].append(i)
        if room > length:
            bisect.insort(free, (room - length, -n, r))
    return rows


def pack(examples: Sequence[Example], seq_len: int, seed: int = 0, pad: int = 0) -> Rows:
    """Several conversations in each row of `seq_len` tokens. `segments` numbers those of a row, so
    that attention stays within each. Examples longer than a row are truncated."""
    lengths = [len(e.tokens) for e in examples]
    packed = pack_best_fit(lengths, seq_len)
    tokens = np.full((len(packed), seq_len), pad, np.int32)
    labels = np.full((len(packed), seq_len), IGNORE, np.int32)
    segments = np.full((len(packed), seq_len), -1, np.int32)  # padding is a segment of its own
    for r, row in enumerate(packed):
        end = 0
        for s, i in enumerate(row):
            columns = slice(end, end + min(lengths[i], seq_len))
            tokens[r, columns] = examples[i].tokens[:seq_len]
            labels[r, columns] = examples[i].labels[:seq_len]
            segments[r, columns] = s
            end = columns.stop
    return Rows(tokens, labels, segments, seed)


# -- replies to many conversations at once --------------------------------------------------------

def generate_replies(model, tokenizer: Tokenizer, template: str,
                     conversations: Sequence[Conversation], max_new_tokens: int = 96,
                     batch: int = 64, images: Sequence | None = None,
                     **sampling) -> tuple[list[str], list[bool]]:
    """The replies to conversations, and whether each ended with eos or the template's end.

    images: for each conversation a tensor of its image, as model.generate takes it, or None.
    Old rounds are dropped if a prompt is too long; a question that fills the context by itself
    gets an empty reply. Prompts of similar length are batched together. Only eos stops a row; text
    after a template's other end is cut off.
    """
    limit = model.config.max_seq_len  # may exceed the length it was trained on
    room = limit - min(max_new_tokens, limit // 2)
    prompts = [fit_prompt(c, template, tokenizer, room)[0] for c in conversations]
    replies, ended = [""] * len(prompts), [False] * len(prompts)
    waiting = [i for i in range(len(prompts)) if len(prompts[i]) < limit]
    waiting.sort(key=lambda i: len(prompts[i]))
    while waiting:
        # A prompt without room for max_new_tokens runs alone, or it would shorten the others.
        group = [i for i in waiting[:batch] if len(prompts[i]) + max_new_tokens <= limit]
        group = group or waiting[:1]
        shown = [images[i] for i in group if IMAGE_SLOT in prompts[i]]
        steps = list(model.generate(
            [prompts[i] for i in group], max_new_tokens, stop=tokenizer.eos,
            images=torch.cat(shown) if shown else None, **sampling))  # ids (steps, group)
        for i, ids in zip(group, zip(*steps)):
            replies[i], ended[i] = decode_reply(ids, template, tokenizer)
        waiting = waiting[len(group):]  # shortest first, so the group came first
    return replies, ended


def decode_reply(ids: Sequence[int], template: str, tokenizer: Tokenizer) -> tuple[str, bool]:
    """The text of generated tokens, and whether it ended with eos or the template's end."""
    stopped = tokenizer.eos in ids
    if stopped:
        ids = ids[:ids.index(tokenizer.eos)]
    text = tokenizer.decode(ids, continues=get_template(template).reply_continues)
    reply, found_end = strip_end(text, template)
    return reply, stopped or found_end


if __name__ == "__main__":
    from tools.show import ShowConfig, StatsConfig, show, stats
    run(None, dict(show=(show, ShowConfig), stats=(stats, StatsConfig)))
