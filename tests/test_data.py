"""Tests of data.py: tokens, masks, rows, replies. Each says which mistake it is there to catch.

    pytest tests/test_data.py
    pytest tests/test_data.py --impl=my_data.py     # your own classes and functions instead of ours
    NANOVICUNA_DATA=FOLDER pytest tests/test_data.py    # also with real files

FOLDER holds llama_tokenizer.model (LLaMA's tokenizer.model), sharegpt_identity.json (FastChat's
dummy_conversation.json) and seed_tasks.jsonl (Stanford Alpaca).
"""

import hashlib
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model
from tools import checkpoint
from tools.config import UserError

MICRO = Path(__file__).parent / "micro"
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")
VICUNA_V0 = VICUNA.replace("user", "human")
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request.\n\n")
CORPUS = [VICUNA, ALPACA, "the cat sat on the mat, the dog ran home" + " a:- b:{ c:[ :- :{ :[" * 5]

every_template = pytest.mark.parametrize("template", data.TEMPLATES)


def real(name: str) -> Path:
    folder = os.environ.get("NANOVICUNA_DATA", "")
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"NANOVICUNA_DATA names no folder with {name}")
    return Path(folder) / name


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return data.train_tokenizer(CORPUS * 30, 400, tmp_path_factory.mktemp("a folder") / "t.model")


@pytest.fixture(params=["ours", "llama"])
def either_tokenizer(request, tokenizer):
    return tokenizer if request.param == "ours" else data.Tokenizer(real("llama_tokenizer.model"))


def conversation(*texts: str, **more):
    """Question, reply, question, ..."""
    turns = [data.Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return data.Conversation(turns, **more)


def supervised(tokenizer, example, template: str) -> list[str]:
    """Each run of supervised tokens as text, with </s>."""
    assert len(example.tokens) == len(example.labels)
    for token, label in zip(*example):
        assert label in (-100, token), "a label is its own token, or -100"
    found = []
    for learned, run in itertools.groupby(example.labels, lambda label: label != -100):
        if learned:
            ids = list(run)
            end = "</s>" if ids[-1] == tokenizer.eos else ""
            text = [i for i in ids if i != tokenizer.eos]
            continues = data.TEMPLATES[template].reply_continues
            found.append(tokenizer.decode(text, continues) + end)
    return found


FOUR = conversation("Q", "A", "R", "B")


# -- tokenizer ------------------------------------------------------------------------------------

def test_special_ids(tokenizer):
    """LLaMA's. A model whose </s> has another number never stops."""
    ids = (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.vocab_size)
    assert ids == (0, 1, 2, 400)


@pytest.mark.parametrize("text", [
    "the cat", "", " ", "  two  spaces  ", "\n\na\tb\r\n", "a\x07\x1b[0m\x7f", "🙂 👩‍👩‍👧 🇰🇷",
    "한국어, 中文", "\u2028\ufeff\xa0", "e\u0301 is not \u00e9", "ﬁ ① Å １２",
    "</s> <s> <unk> <0x0A>"], ids=ascii)
def test_round_trip(tokenizer, text):
    """Bytes for what has no piece, and no normalization: NFKC would make "fi 1 12" of "ﬁ ① １２",
    and one space of two, which ruins code. And no text can spell a control token: users could end
    the model's turn."""
    for continues in (False, True):
        ids = tokenizer.encode(text, continues)
        assert tokenizer.decode(ids, continues) == text, f"continues={continues}"
        assert not {0, 1, 2} & set(ids), "text has produced a control token"


def test_continuation_adds_no_space(tokenizer):
    """SentencePiece begins each text with a space. In the middle of a line it would be a real
    one."""
    ids = tokenizer.encode("Response:")
    assert tokenizer.decode(ids + tokenizer.encode("Yes", continues=True)) == "Response:Yes"
    assert tokenizer.decode(ids + tokenizer.encode("Yes")) == "Response: Yes"


HANGUL = "".join(map(chr, range(0xac00, 0xb200)))


@pytest.mark.parametrize("texts, size", [
    (["a tiny text"], 5000), (["x"], 300), ([HANGUL] * 3, 400)],
    ids=["more pieces than there are", "one letter", "more letters than pieces"])
def test_vocab_size_is_an_upper_bound(tmp_path, texts, size):
    """A small text cannot give many pieces, and rare letters of a large alphabet have their
    bytes."""
    t = data.train_tokenizer(texts, size, tmp_path / "t.model")
    assert 259 < t.vocab_size <= size
    assert t.decode(t.encode(texts[0])) == texts[0]


def test_find_tokenizer(tmp_path, tokenizer):
    """A file, a step folder, or a run, whose `latest` names the step."""
    step = tmp_path / "run" / "step-000002"
    step.mkdir(parents=True)
    (step / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    (tmp_path / "run" / "latest").write_text("step-000002\n")
    for where in (tmp_path / "run", step, step / "tokenizer.model"):
        assert data.find_tokenizer(str(where)).path == step / "tokenizer.model"
    (tmp_path / "bad.model").write_bytes(b"not a model")
    for name in ("bad.model", "none.model"):
        with pytest.raises(UserError, match=name):
            data.find_tokenizer(tmp_path / name)


def test_encode_text_in_pieces(tokenizer):
    """Long texts are encoded piece by piece; no space and no letter may come in between."""
    for text in ("the cat sat\non the mat.\n" * 5000, "cat" * 40000, " x\n\n"):
        assert tokenizer.decode(data.encode_text(text, tokenizer).tolist()) == text
    text = "the cat\n" * 10000
    assert data.encode_text(text, tokenizer).tolist() == tokenizer.encode(text)


# -- templates ------------------------------------------------------------------------------------

CHAT_V0 = "Give the following image: <Img>ImageContent</Img>. You will be able to see the image " \
          "once I provide it to you. Please answer my questions."
ADD = data.Turn("user", "Add.", "1, 2")
STRINGS = [
    ("vicuna_v1.1", FOUR, f"{VICUNA} USER: Q ASSISTANT: A</s> USER: R ASSISTANT: B</s>"),
    ("vicuna_v0", FOUR, f"{VICUNA_V0}\n\n### Human: Q\n### Assistant: A\n### Human: R\n"
                        "### Assistant: B\n###"),
    ("alpaca", FOUR, f"{ALPACA}### Instruction:\nQ\n\n### Response:A</s>\n\n### Instruction:\nR"
                     "\n\n### Response:B</s>"),
    ("koala", FOUR, "BEGINNING OF CONVERSATION: USER: Q GPT: A</s> USER: R GPT: B</s>"),
    ("oasst", FOUR, "<|prompter|>Q</s><|assistant|>A</s><|prompter|>R</s><|assistant|>B</s>"),
    ("minigpt4", FOUR, "###Human: Q ###Assistant:  A###Human: R ###Assistant:  B###"),
    ("minigpt4_chat", FOUR,
     f"{CHAT_V0}###Human: Q###Assistant: A###Human: R###Assistant: B###"),
    ("plain", FOUR, "QA</s>\nRB</s>"),
    ("lines", FOUR, "Q\nA\nR\nB\n"),
    ("vicuna_v1.1", conversation("Q", system="Be brief."), "Be brief. USER: Q ASSISTANT:"),
    ("vicuna_v1.1", conversation("Q", system=""), "USER: Q ASSISTANT:"),
    ("vicuna_v1.1", data.Conversation([ADD], system=""), "USER: Add.\n1, 2 ASSISTANT:"),
    ("alpaca", data.Conversation([ADD]),
     f"{ALPACA_INPUT}### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:"),
    ("alpaca", conversation("Q", system="Be brief."),
     "Be brief.\n\n### Instruction:\nQ\n\n### Response:"),
]


@pytest.mark.parametrize("template, chat, want", STRINGS, ids=lambda x: "")
def test_string(tokenizer, template, chat, want):
    """Letter by letter. Vicuna v1.1 has no newline anywhere, and the space after </s> is the one
    that LLaMA's tokenizer puts there, too; in Alpaca the preamble depends on the input, and the
    reply follows the colon."""
    tokens = data.render(chat, template, tokenizer).tokens
    assert data.spell(tokenizer, tokens) == f"<s> {want}"


def test_ids(tokenizer):
    """Each span is encoded by itself: with SentencePiece's space in Vicuna, as LLaMA's tokenizer
    continues after </s>, and without it in Alpaca, where there is none in the string."""
    texts = f"{VICUNA} USER: Q ASSISTANT:", "A", "USER: R ASSISTANT:", "B"
    a, b, c, d = map(tokenizer.encode, texts)
    tokens = data.render(FOUR, "vicuna_v1.1", tokenizer).tokens
    assert tokens == [1, *a, *b, 2, *c, *d, 2]
    a = tokenizer.encode(f"{ALPACA}### Instruction:\nAdd.\n\n### Response:")
    b = tokenizer.encode("Three.", continues=True)
    tokens = data.render(conversation("Add.", "Three."), "alpaca", tokenizer).tokens
    assert tokens == [1, *a, *b, 2]


@every_template
def test_image_slots_stand_in_tags(tokenizer, template):
    """Before the text of the question. They are no text: none could be typed."""
    turns = [data.Turn("user", "What </Img>?", slots=3), data.Turn("assistant", "A cat.")]
    example = data.render(data.Conversation(turns), template, tokenizer)
    at = example.tokens.index(data.IMAGE_SLOT)
    assert example.tokens[at:at + 3] == [data.IMAGE_SLOT] * 3
    before = tokenizer.decode(example.tokens[1:at])
    after = tokenizer.decode(example.tokens[at + 3:], continues=True)
    t = data.TEMPLATES[template]
    space = "" if t.reply_continues else " "  # SentencePiece's, as in the originals
    assert before.endswith("<Img>") and after.startswith(f"{space}</Img> What")
    assert supervised(tokenizer, example, template) == ["A cat." + (t.end or "</s>")]


def test_an_end_that_is_text():
    """### ends the replies of Vicuna v0. A reply is cut there, and in a stream nothing is shown
    that may be its beginning."""
    assert data.strip_end("Yes.\n### Human: x", "vicuna_v0") == ("Yes.", True)
    assert data.strip_end("Yes.\n#", "vicuna_v0", complete=False) == ("Yes.", False)
    assert data.strip_end("Yes.\n#", "vicuna_v0") == ("Yes.\n#", False)
    assert data.strip_end("# Title", "vicuna_v0", complete=False) == ("# Title", False)
    assert data.strip_end("a\n### b", "vicuna_v1.1") == ("a\n### b", False)


# -- masks ----------------------------------------------------------------------------------------

SPECIAL = ["</s>", "<s>", "<unk>", "[PAD]", "USER:", " ASSISTANT: ", "### Human:", "\n###",
           "\n\n### Response:", "<image>", "<ImageHere>", "{text}", "{slots}", "{} {0} %s {{",
           "<|assistant|>", "<0x0A>", "```", "\n\n\n", "\r\n", "e\u0301", "👩‍👩‍👧", "x" * 30]


def odd_text(rng: random.Random) -> str:
    """Some of what could be taken for a template, and random characters of all kinds."""
    parts = []
    for _ in range(rng.randrange(7)):
        kinds = [rng.randrange(128), rng.randrange(0xd800), rng.randrange(0x1f300, 0x1fa00)]
        parts += [rng.choice(SPECIAL), chr(rng.choice(kinds))]
    return "".join(parts).replace("\u2581", "")  # SentencePiece's sign for a space


@every_template
def test_only_replies_are_supervised(tokenizer, template):
    """To the letter, and with their ends, or the model never stops; whatever the texts say. If the
    finished string were split at " ASSISTANT: " or </s>, a user's text could become supervised; if
    it were formatted twice, braces would get lost."""
    t, rng = data.TEMPLATES[template], random.Random(0)
    for _ in range(30):
        texts = [odd_text(rng) for _ in range(2 * rng.randint(1, 3))]
        example = data.render(conversation(*texts, system=odd_text(rng)), template, tokenizer)
        want = [reply + (t.end or "</s>") for reply in texts[1::2]]
        assert supervised(tokenizer, example, template) == want
        tokens, n_asks = example.tokens, t.ask.count("</s>")
        assert tokenizer.unk not in tokens and -1 not in tokens and tokens.count(1) == 1
        assert tokens.count(2) == len(want) * (n_asks + (not t.end))
        string = data.spell(tokenizer, tokens)
        assert all(question in string for question in texts[::2])


@every_template
def test_a_prompt_is_a_prefix(tokenizer, template):
    """Token for token what was trained: otherwise the model meets at inference what it has never
    seen."""
    texts = ("Hello: -", "- Hi!", "{a}", "[b]", "c", "d")
    full = data.render(conversation(*texts), template, tokenizer)
    for n in (1, 3, 5):
        prompt = data.render(conversation(*texts[:n]), template, tokenizer)
        end = len(prompt.tokens)
        assert (full.tokens[:end], full.labels[:end]) == prompt
        assert full.labels[end] != -100, "the reply begins where the prompt ends"


def test_fit_prompt_drops_the_oldest_rounds(tokenizer):
    """Whole rounds, as few as will do. Rounds with a picture go last: later questions are about it.
    The last question stays whatever its length."""
    turns = []
    for i, n in enumerate([0, 0, 3, 0, 0]):
        turns += [data.Turn("user", f"the cat {i}", slots=n), data.Turn("assistant", f"mat {i}")]
    turns.pop()

    def tokens(*rounds: int) -> list[int]:
        kept = [turn for i in rounds for turn in turns[2 * i:2 * i + 2]]
        return data.render(data.Conversation(kept), "plain", tokenizer).tokens

    chat, most = data.Conversation(turns), 1000
    for dropped, rounds in enumerate([(0, 1, 2, 3, 4), (1, 2, 3, 4), (2, 3, 4), (2, 4), (4,)]):
        prompt = tokens(*rounds)
        for room in (len(prompt) + 1, most):  # fewer tokens than `room`
            got = data.fit_prompt(chat, "plain", tokenizer, room)
            assert got == (prompt, dropped)
        most = len(prompt)
    assert data.fit_prompt(chat, "plain", tokenizer, 2) == (tokens(4), 4)


# -- the originals' rules, written a second time from their descriptions --------------------------

def vicuna_rule(texts: list[str], sp) -> tuple[list[int], list[int]]:
    """FastChat: the whole conversation as one string; the mask by counting the tokens of its
    parts, which are tokenized once more."""
    def legacy(text: str) -> list[int]:  # every part between special tokens gets a leading space
        parts = text.split("</s>")
        ids = [1]
        for i, part in enumerate(parts):
            ids += sp.encode(part)
            if i < len(parts) - 1:
                ids.append(2)
        return ids

    whole = VICUNA + " "
    for i, text in enumerate(texts):
        whole += f"USER: {text} " if i % 2 == 0 else f"ASSISTANT: {text}</s>"
    ids = legacy(whole)
    labels, at = [-100] + ids[1:], 1
    for piece in whole.split("</s>")[:-1]:
        asked, _ = piece.split(" ASSISTANT: ")
        masked = len(legacy(asked + " ASSISTANT: ")) - 2
        labels[at:at + masked] = [-100] * masked
        at += len(legacy(piece))
    assert at == len(ids), "the rule itself fails on this one"
    return ids, labels


def alpaca_rule(instruction: str, given: str, output: str,
                sp) -> tuple[list[int], list[int], bool]:
    """Stanford: prompt and prompt + reply are tokenized, and as many labels are masked as the
    prompt has tokens. Also returns whether the prompt's tokens are a prefix of the whole; where
    they are not, the beginning of the reply is never supervised."""
    prompt = f"{ALPACA_INPUT if given else ALPACA}### Instruction:\n{instruction}\n\n"
    if given:
        prompt += f"### Input:\n{given}\n\n"
    prompt += "### Response:"
    short, ids = [1, *sp.encode(prompt)], [1, *sp.encode(prompt + output), 2]
    return ids, [-100] * len(short) + ids[len(short):], ids[:len(short)] == short


REPLIES = ["Hi!", " space", "\nline", "3 of 4", "한국어", "\"quote\"", "```py\nx\n```",
           "one\n\ntwo ", "- list", "{x}", "🙂", "a  b"]


def test_vicuna_as_the_original(either_tokenizer):
    """Ids and labels of the legacy rule, for replies that begin in every way."""
    for first, second in zip(REPLIES, REPLIES[1:] + REPLIES[:1]):
        texts = ["Hello! " + second, first, "And " + first + " ", second]
        example = data.render(conversation(*texts), "vicuna_v1.1", either_tokenizer)
        assert example == vicuna_rule(texts, either_tokenizer.sp)


def test_alpaca_as_the_original(either_tokenizer):
    """The same, except where the colon and the reply become one token: there the prompt is no
    prefix any more, and the original never supervises the reply's first characters."""
    same = 0
    for text in ("", "1, 2"):
        for reply in REPLIES:
            turns = [data.Turn("user", "Go on.", text), data.Turn("assistant", reply)]
            example = data.render(data.Conversation(turns), "alpaca", either_tokenizer)
            ids, labels, is_prefix = alpaca_rule("Go on.", text, reply, either_tokenizer.sp)
            assert example == (ids, labels) or not is_prefix
            assert supervised(either_tokenizer, example, "alpaca") == [reply + "</s>"]
            same += is_prefix
    assert len(REPLIES) <= same < 2 * len(REPLIES)


def test_fastchat_file_as_the_original():
    """All 500 of FastChat's dummy conversations, none dropped. The hash is that of transformers'
    own LlamaTokenizer (4.36.2, slow, legacy) under the rule."""
    tokenizer, file = data.Tokenizer(real("llama_tokenizer.model")), real("sharegpt_identity.json")
    found = [data.render(c, "vicuna_v1.1", tokenizer) for c in data.load_conversations(file)]
    assert len(found) == 500
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == "f3566a28780e4d13"


def test_alpaca_seeds_as_the_original():
    """Alpaca's 175 seed tasks, 13 of which lose their first characters in the original."""
    tokenizer, file = data.Tokenizer(real("llama_tokenizer.model")), real("seed_tasks.jsonl")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    conversations, same = data.load_conversations(file), 0
    assert len(conversations) == len(records) == 175
    for record, c in zip(records, conversations):
        instance, example = record["instances"][0], data.render(c, "alpaca", tokenizer)
        ids, labels, is_prefix = alpaca_rule(
            record["instruction"], instance["input"], instance["output"], tokenizer.sp)
        assert not is_prefix or example == (ids, labels)
        assert supervised(tokenizer, example, "alpaca") == [instance["output"] + "</s>"]
        same += is_prefix
    assert same == 162


def test_minigpt4_as_published():
    """Its stage-2 prompt, token for token, with two image vectors for the picture."""
    tokenizer = data.Tokenizer(real("llama_tokenizer.model"))
    c = data.Conversation([data.Turn("user", "Describe this image in detail.", slots=2),
                           data.Turn("assistant", "A cat.")])
    tokens, labels = data.render(c, "minigpt4", tokenizer)
    assert tokens == [1, 835, 29950, 7889, 29901, 529, 25518, 29958, -1, -1, 1533, 25518, 29958,
                      20355, 915, 445, 1967, 297, 9493, 29889, 835, 7900, 22137, 29901, 29871,
                      *tokenizer.encode("A cat.###")]
    assert labels == [-100] * 25 + tokens[25:]


# -- rows -----------------------------------------------------------------------------------------

def examples(lengths) -> list:
    """Each token occurs only once, so that it can be found again; two of three are supervised."""
    ends = list(itertools.accumulate(lengths, initial=1000))
    tokens = [list(range(a, b)) for a, b in zip(ends, ends[1:])]
    return [data.Example(t, [-100 if i % 3 == 0 else i for i in t]) for t in tokens]


def test_packed_examples_stay_whole():
    """Each exactly once, in one row, in a segment of its own; only what is longer than a row is
    cut."""
    given = examples([5, 30, 9, 9, 1, 17, 32, 2, 31, 70, 12, 3])
    rows, found = data.pack(given, 32, pad=7), []
    for row in zip(rows.tokens.tolist(), rows.labels.tolist(), rows.segments.tolist()):
        runs = [list(zip(*run)) for _, run in itertools.groupby(zip(*row), lambda x: x[2])]
        numbers = [segments[0] for _, _, segments in runs]
        assert len(set(numbers)) == len(numbers), "two conversations have the same number"
        found += [data.Example(list(tokens), list(labels)) for tokens, labels, _ in runs
                  if set(tokens) != {7}]
    want = [data.Example(e.tokens[:32], e.labels[:32]) for e in given]
    assert sorted(found) == sorted(want), "a conversation is lost, cut, doubled, or in two segments"


def test_padding_is_not_supervised():
    rows = data.pack(examples([20, 20, 20]), 32, pad=7)
    assert rows.tokens.shape == rows.labels.shape == rows.segments.shape == (3, 32)
    assert (rows.tokens == 7).sum() == 36
    assert (rows.labels[rows.tokens == 7] == -100).all()


@pytest.mark.parametrize("seed", range(10))
def test_pack_needs_no_more_rows_than_first_fit(seed):
    """Both put every example into exactly one row, and no row overflows. Lengths above seq_len
    count as seq_len: such an example is cut."""
    rng = np.random.default_rng(seed)
    seq_len = int(rng.integers(16, 600))
    lengths = rng.lognormal(4, rng.uniform(0.1, 1.5), 200).astype(int).clip(1).tolist()
    best, first = data.pack_best_fit(lengths, seq_len), data.pack_textbook(lengths, seq_len)
    for rows in (best, first):
        assert sorted(itertools.chain.from_iterable(rows)) == list(range(200))
        for row in rows:
            assert sum(min(lengths[i], seq_len) for i in row) <= seq_len
    assert len(best) <= len(first)
    assert len(data.pack(examples(lengths), seq_len)) == len(best)


def test_first_fit_by_hand():
    """Each goes into the first row that has room for it, also when a fuller one fits better."""
    assert data.pack_textbook([6, 7, 3, 2, 4, 11], 10) == [[0, 2], [1, 3], [4], [5]]
    assert data.pack_best_fit([6, 7, 3, 2, 4, 11], 10) == [[5], [1, 2], [0, 4], [3]]


def some_rows(kind: str, n: int = 7, seed: int = 0):
    """Rows that can be told apart by their first word."""
    if kind == "text":
        return data.TextRows(np.arange(100, 108 + 8 * n), 9, bos=1, seed=seed)
    tokens = np.arange(100, 100 + 9 * n, dtype=np.int32).reshape(n, 9)
    return data.Rows(tokens, tokens + 1000, tokens % 5, seed)


def order(rows, begin: int, end: int) -> list[int]:
    return [int(rows.batch(i, 1)[0][0, 1]) for i in range(begin, end)]


@pytest.mark.parametrize("kind", ["rows", "text"])
def test_batches_depend_on_seed_and_step_only(kind):
    """A run that resumes at step 8 has not asked for steps 0 to 7."""
    rows = some_rows(kind)
    for step in (8, 0, 5, 5, 2, 11, 3):
        fresh = some_rows(kind).batch(step, 3)
        for a, b in zip(rows.batch(step, 3), fresh):
            same = a is b is None or (torch.equal(a, b) and a.dtype == torch.int64)
            assert same, f"step {step} depends on the past"
        one_by_one = order(rows, 3 * step, 3 * step + 3)
        assert fresh[0][:, 1].tolist() == one_by_one, "3 at a time, other rows"
    if kind == "rows":
        assert torch.equal(fresh[1], fresh[0] + 1000), "these labels belong to another row"
        assert torch.equal(fresh[2], fresh[0] % 5), "these segments belong to another row"


@pytest.mark.parametrize("kind", ["rows", "text"])
def test_each_epoch_has_every_row_once(kind):
    rows = some_rows(kind, 50)
    n = len(rows)
    epochs = [order(rows, e * n, e * n + n) for e in range(4)]
    assert all(len(set(epoch)) == n for epoch in epochs), "a row came twice, another not at all"
    assert len(set(map(tuple, epochs))) == 4, "the same order in each epoch"
    assert order(some_rows(kind, 50, seed=1), 0, n) != epochs[0], "the seed changes nothing"


def test_text_rows():
    """Consecutive words after a bos. Rows of an epoch do not overlap, and leave out less than two
    rows."""
    rows, offsets = some_rows("text", 20), set()
    for epoch in range(6):
        batches = [rows.batch(epoch * len(rows) + i, 1) for i in range(len(rows))]
        for tokens, labels, segments in batches:
            assert segments is None and torch.equal(tokens, labels)
        tokens = torch.cat([tokens for tokens, _, _ in batches])
        words = tokens[:, 1:]
        assert (tokens[:, 0] == 1).all() and (words.diff() == 1).all()
        assert 100 <= words.min() and words.max() < 268
        assert words.unique().numel() == 8 * len(rows) > 168 - 16
        offsets.add(int(words.min()))
    assert len(offsets) > 2, "cut at the same places in each epoch: some pairs are never learned"


@pytest.mark.parametrize("seq_len", [8, 9])
@pytest.mark.parametrize("n", [1, 4, 5, 8, 50])
def test_windows(n, seq_len):
    """For a validation loss: every token counts once, and has half a row of context or all there
    is."""
    rows = data.windows(np.arange(100, 100 + n), seq_len, bos=1)
    scored = rows.labels != -100
    assert sorted(rows.labels[scored]) == list(range(100, 100 + n))
    assert (rows.tokens[:, 0] == 1).all()
    assert np.array_equal(rows.labels[scored], rows.tokens[scored])
    for row, at in zip(*scored.nonzero()):
        word = rows.tokens[row, at]
        context = min(seq_len // 2, word - 99) - 1  # words; bos is one more
        assert rows.tokens[row, at - context:at].tolist() == list(range(word - context, word))


# -- replies to many conversations ----------------------------------------------------------------

def greedy(net, prompt: list[int], n: int, stop: int) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + n and text[-1] != stop:
        text.append(int(net(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt):]


@torch.no_grad()
@pytest.mark.parametrize("template", ["vicuna_v1.1", "alpaca"])
def test_generate_replies(tokenizer, template):
    """In batches, sorted by length, padded: each reply must be what it is alone, and in its
    place."""
    c = model.LLaMAConfig(32, 2, 4, vocab_size=400, hidden_dim=48, max_seq_len=512)
    net = model.LLaMA(c).eval()
    for p in net.parameters():
        p.copy_(torch.randn_like(p) * 0.25 + (p.dim() == 1))
    asked = [conversation("cat " * n, *more)
             for n, more in ((9, ()), (1, ()), (3, "AB"), (20, ()), (2, ()))]
    prompts = [data.render(c, template, tokenizer).tokens for c in asked]
    said = [greedy(net, p, 10, -1) for p in prompts]
    inner = [i for ids in said for i in ids[1:]]
    end = next(i for i in inner if not all(i in ids for ids in said))
    rows = net.output.weight  # let the model say </s> where it said this
    rows[[end, 2]] = rows[[2, end]]
    said = [greedy(net, p, 10, 2) for p in prompts]
    want = [tokenizer.decode([i for i in ids if i != 2], template == "alpaca") for ids in said]
    assert len(set(map(len, said))) > 1 and len(set(want)) > 2, "this test cannot fail any more"
    net.register_forward_hook(lambda *_: steps.append(1))
    for batch in (1, 2, 64):
        steps = []
        replies, ended = data.generate_replies(net, tokenizer, template, asked, max_new_tokens=10,
                                               batch=batch)
        assert replies == want, f"in batches of {batch}"
        assert ended == [ids[-1] == 2 for ids in said]
        if batch == 1:
            assert len(steps) == sum(map(len, said)), "it must stop at </s>"


def test_asking_near_the_end_of_the_context(tokenizer):
    """Old rounds are dropped first; a long prompt does not cut its neighbor's reply; a question
    without room gets none."""
    prompt_lengths = []

    class Talker:  # repeats the id 300 until it is stopped
        config = model.LLaMAConfig(8, 1, 1, vocab_size=400, max_seq_len=200)

        def generate(self, prompts, n, **_):
            prompt_lengths.append([len(p) for p in prompts])
            for _ in range(min(n, 200 - max(prompt_lengths[-1]))):
                yield [300] * len(prompts)

    def size(c) -> int:
        return len(data.render(c, "plain", tokenizer).tokens)

    word = tokenizer.decode([300], continues=True)
    short, near, over = (conversation("a " * n) for n in (1, 175, 400))
    rounds = conversation(*["a " * 25] * 9)
    assert 160 < size(near) < 200 < min(size(rounds), size(over))
    replies, ended = data.generate_replies(
        Talker(), tokenizer, "plain", [short, over, near, rounds], max_new_tokens=40)
    assert [reply.count(word) for reply in replies] == [40, 0, 200 - size(near), 40]
    assert not any(ended)
    assert max(map(max, prompt_lengths)) == size(near)


# -- python data.py show|stats --------------------------------------------------------------------

def test_show(tmp_path, tokenizer, capsys, monkeypatch):
    """What is supervised stands in [[ ]], or in green. Look at this before training on anything."""
    file = tmp_path / "c.json"
    data.save_conversations([FOUR], file)
    options = dict(file=str(file), tokenizer=str(tokenizer.path))
    figures = data.show(data.ShowConfig(**options))
    out = capsys.readouterr().out
    assert re.findall(r"\[\[ ?(.*?)\]\]", out) == ["A</s>", "B</s>"]
    assert f"<s> {VICUNA} USER: Q ASSISTANT:[[" in out
    counts = re.search(r"(\d+) tokens: system (\d+), user (\d+), assistant (\d+)", out).groups()
    total, system, user, assistant = map(int, counts)
    assert total == figures["tokens"] == system + user + assistant
    assert assistant == figures["supervised"] > 0
    assert system == len(tokenizer.encode(VICUNA))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    data.save_conversations([conversation("Go.", "Gone.")], file, "alpaca")
    data.show(data.ShowConfig(**options))
    out = capsys.readouterr().out
    assert "### Response:\033[92mGone.</s>\033[0m" in out, "Alpaca's file, Alpaca's template"
    with pytest.raises(UserError, match="unknown template"):
        data.show(data.ShowConfig(**options, template="vicunia"))


def test_loss_of_each_token(tmp_path, capsys):
    """show --ckpt prints the model's own loss, token by token."""
    net, path, meta = checkpoint.load(MICRO)
    c = conversation("Who are you?", "I am a cat.", "And?", "That is all.")
    file = tmp_path / "c.json"
    data.save_conversations([c], file)
    data.show(data.ShowConfig(str(file), ckpt=str(MICRO)))
    printed = capsys.readouterr().out
    example = data.render(c, meta["template"], data.Tokenizer(path))
    losses = data.token_losses(net, example)
    with torch.no_grad():
        total, count = net.nll(torch.tensor([example.tokens]), torch.tensor([example.labels]))
    assert np.isfinite(losses).tolist() == [label != -100 for label in example.labels]
    assert np.nansum(losses) == pytest.approx(total.item(), rel=1e-4)
    last = losses[np.isfinite(losses)][-1]
    assert f"</s>({last:.2f})" in printed and f"loss {total.item() / count.item():.3f}" in printed


def test_stats(tmp_path, tokenizer):
    file = tmp_path / "c.json"
    data.save_conversations([conversation(*["a"] * n) for n in (2, 2, 8, 40)], file)
    figures = data.stats(data.StatsConfig(str(file), str(tokenizer.path)))
    found = [data.render(c, "vicuna_v1.1", tokenizer) for c in data.load_conversations(file)]
    assert (figures["conversations"], figures["turns"]) == (4, 52)
    assert figures["tokens"] == sum(len(e.tokens) for e in found)
    assert figures["supervised"] == 2 * 26  # each reply is one token and its end
