"""Tests of data.py: tokens, masks, rows, replies. Each says which mistake it is there to catch.

    pytest tests/test_data.py
    pytest tests/test_data.py --impl=my_data.py     # your own classes and functions instead of ours
    NANOVICUNA_DATA=FOLDER pytest tests/test_data.py    # also with real files

FOLDER holds llama_tokenizer.model (LLaMA's tokenizer.model), sharegpt_identity.json (FastChat's
dummy_conversation.json) and seed_tasks.jsonl (Stanford Alpaca).
"""

import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch

import data
from tools import checkpoint, show
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


def conversation(*texts: str, **more):
    """Question, reply, question, ..."""
    turns = [data.Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return data.Conversation(turns, **more)


def supervised(tokenizer, example, template: str) -> list[str]:
    """Each run of supervised tokens as text, with </s>."""
    tokens, labels = example
    assert len(tokens) == len(labels)
    for token, label in zip(tokens, labels):
        assert label in (-100, token), "a label is its own token, or -100"
    space = "" if data.TEMPLATES[template].reply_continues else " "  # SentencePiece's
    found = [tokens[begin:end] for begin, end, in_loss in data.runs(labels) if in_loss]
    return [data.spell(tokenizer, run).removeprefix(space) for run in found]


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
    """Bytes for what has no piece, no normalization: NFKC would make "fi 1 12" of "ﬁ ① １２".
    And no text can spell a control token, or users could end the model's turn."""
    for continues in (False, True):
        ids = tokenizer.encode(text, continues)
        assert tokenizer.decode(ids, continues) == text, f"continues={continues}"
        assert not {0, 1, 2} & set(ids), "text has produced a control token"


def test_continuation_adds_no_space(tokenizer):
    """SentencePiece begins each text with a space. In mid-line it would be a real one."""
    ids = tokenizer.encode("Response:")
    assert tokenizer.decode(ids + tokenizer.encode("Yes", continues=True)) == "Response:Yes"
    assert tokenizer.decode(ids + tokenizer.encode("Yes")) == "Response: Yes"


@pytest.mark.parametrize("texts, size", [
    (["a tiny text"], 5000), (["".join(map(chr, range(0xac00, 0xb200)))] * 3, 400)],
    ids=["more pieces than there are", "more letters than pieces"])
def test_vocab_size_is_an_upper_bound(tmp_path, texts, size):
    """A small text cannot give many pieces; rare letters of a large alphabet have their bytes."""
    t = data.train_tokenizer(texts, size, tmp_path / "t.model")
    assert 259 < t.vocab_size <= size
    assert t.decode(t.encode(texts[0])) == texts[0]


def test_a_long_line_is_not_skipped(tmp_path):
    """SentencePiece skips what is longer than a megabyte; a book in one line gave a tokenizer of
    bytes. It also skips lines with a block character."""
    words = "elephant banana " * 100_000
    for text in (words, words[:20_000] + "\n" + words, "elephant banana \u2585\n" * 100):
        t = data.train_tokenizer([text], 400, tmp_path / "t.model")
        assert len(t.encode("elephant banana")) == 2


def test_a_tokenizer_does_not_depend_on_its_folder(tmp_path):
    """Its file held its own path, so that a copy of a run "was trained with another tokenizer"."""
    a, b = (data.train_tokenizer(CORPUS, 300, tmp_path / name / "t.model") for name in "ab")
    assert a.path.read_bytes() == b.path.read_bytes()
    assert [file.name for file in a.path.parent.iterdir()] == ["t.model"]


@pytest.mark.parametrize("options, reason", [
    (dict(bos_id=-1), "no <s>"), (dict(eos_id=-1), "no </s>"), (dict(byte_fallback=False), "byte"),
    (dict(user_defined_symbols="\n"), "newline"), (dict(user_defined_symbols="\n\n"), "newline"),
    (dict(remove_extra_whitespaces=True), "normalizes"),
    *[(dict(normalization_rule_name=name), "normalizes") for name in ("nfkc", "nmt_nfkc_cf")]])
def test_other_tokenizers_are_refused(tmp_path, options, reason):
    """Newlines became spaces and two spaces one; and no reply ended where </s> was -1."""
    ours = dict(byte_fallback=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, hard_vocab_limit=False, model_type="bpe",
                minloglevel=2, num_threads=1)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 30), model_writer=trained, vocab_size=400,
        **{**ours, **options})
    (tmp_path / "t.model").write_bytes(trained.getvalue())
    with pytest.raises(UserError, match=f"t.model is not like LLaMA's tokenizer: .*{reason}"):
        data.Tokenizer(tmp_path / "t.model")


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
    """Letter by letter. Vicuna v1.1 has no newline anywhere; in Alpaca the preamble depends on the
    input, and the reply follows the colon."""
    tokens = data.render(chat, template, tokenizer).tokens
    assert data.spell(tokenizer, tokens) == f"<s> {want}"


def test_ids(tokenizer):
    """Each span is encoded by itself: with SentencePiece's space in Vicuna, as LLaMA's tokenizer
    continues after </s>, and without it in Alpaca."""
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
    t = data.TEMPLATES[template]
    space = "" if t.reply_continues else " "  # SentencePiece's, as in the originals
    string = data.spell(tokenizer, example.tokens)
    assert f"<Img><3 image slots>{space}</Img> What </Img>?" in string
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

SPECIAL = ["</s>", "<s>", "<unk>", "[PAD]", "USER:", " ASSISTANT: ", "### Human:", "a\n###",
           "\n\n### Response:", "<image>", "<ImageHere>", "{text}", "{slots}", "{} {0} %s {{",
           "<|assistant|>", "<0x0A>", "```", "\n\n\n", "\r\n", "e\u0301", "👩‍👩‍👧", ""]


@every_template
def test_only_replies_are_supervised(tokenizer, template):
    """With their ends, or the model never stops. If the finished string were split at </s>, a
    user's text could become supervised; if it were formatted twice, braces would get lost."""
    texts = SPECIAL + SPECIAL[::-1]  # each as a question and as a reply
    t, odd = data.TEMPLATES[template], conversation(*texts, system="{text} {slots} </s>")
    example = data.render(odd, template, tokenizer)
    want = [reply + (t.end or "</s>") for reply in texts[1::2]]
    assert supervised(tokenizer, example, template) == want
    tokens, n_asks = example.tokens, t.ask.count("</s>")
    assert tokenizer.unk not in tokens and -1 not in tokens and tokens.count(1) == 1
    assert tokens.count(2) == len(want) * (n_asks + (not t.end))
    string = data.spell(tokenizer, tokens)
    assert all(question in string for question in texts[::2])


@every_template
def test_a_prompt_is_a_prefix(tokenizer, template):
    """Otherwise the model meets at inference what it has never seen in training."""
    texts = ("Hello: -", "- Hi!", "{a}", "[b]", "c", "d")
    full = data.render(conversation(*texts), template, tokenizer)
    for n in (1, 3, 5):
        prompt = data.render(conversation(*texts[:n]), template, tokenizer)
        end = len(prompt.tokens)
        assert (full.tokens[:end], full.labels[:end]) == prompt
        assert full.labels[end] != -100, "the reply begins where the prompt ends"


def test_fit_prompt_drops_the_oldest_rounds(tokenizer):
    """As few as will do. Rounds with a picture go last: later questions are about it. The last
    question stays whatever its length."""
    rounds = []
    for i, n in enumerate([0, 0, 3, 0, 0]):
        rounds.append([data.Turn("user", f"cat {i}", slots=n), data.Turn("assistant", "mat")])
    rounds[4].pop()

    def chat(kept) -> data.Conversation:
        return data.Conversation(sum((rounds[i] for i in kept), []))

    room = 1000
    for dropped, kept in enumerate([(0, 1, 2, 3, 4), (1, 2, 3, 4), (2, 3, 4), (2, 4), (4,)]):
        want = data.render(chat(kept), "plain", tokenizer).tokens, dropped
        for least in (room, len(want[0]) + 1):  # fewer tokens than this
            assert data.fit_prompt(chat(range(5)), "plain", tokenizer, least) == want
        room = len(want[0])
    assert data.fit_prompt(chat(range(5)), "plain", tokenizer, 2) == want


# -- the originals' rules -----------------------------------------------------------------------

def count_like_alpacas(tokenizer, conversations) -> int:
    """Stanford masks as many labels as the prompt alone has tokens. If the whole begins with other
    tokens, the beginning of the reply is never supervised. Returns how often it does not."""
    same = 0
    for c in conversations:
        question, reply = c.turns
        given = f"### Input:\n{question.input}\n\n" if question.input else ""
        preamble = ALPACA_INPUT if given else ALPACA
        prompt = f"{preamble}### Instruction:\n{question.text}\n\n{given}### Response:"
        masked = [1, *tokenizer.encode(prompt)]
        ids = [1, *tokenizer.encode(prompt + reply.text), 2]
        is_prefix = ids[:len(masked)] == masked
        example = data.render(c, "alpaca", tokenizer)
        if is_prefix:
            assert example == (ids, [-100] * len(masked) + ids[len(masked):])
        assert supervised(tokenizer, example, "alpaca") == [reply.text + "</s>"]
        same += is_prefix
    return same


REPLIES = ["Hi!", " space", "\nline", "3 of 4", "한국어", "\"quote\"", "```py\nx\n```",
           "one\n\ntwo ", "- list", "{x}", "🙂", "a  b"]


def test_alpaca_as_the_original(tokenizer):
    """Equal, except where the colon and the reply become one token."""
    chats = []
    for reply in REPLIES:
        for question in (data.Turn("user", "Go on."), ADD):
            chats.append(data.Conversation([question, data.Turn("assistant", reply)]))
    assert len(REPLIES) <= count_like_alpacas(tokenizer, chats) < len(chats)


def test_fastchat_file_as_the_original():
    """All 500 of FastChat's dummy conversations, none dropped. The hash is that of FastChat's rule
    with transformers' own LlamaTokenizer (4.36.2, slow, legacy)."""
    tokenizer, file = data.Tokenizer(real("llama_tokenizer.model")), real("sharegpt_identity.json")
    found = [data.render(c, "vicuna_v1.1", tokenizer) for c in data.load_conversations(file)]
    assert len(found) == 500
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == "f3566a28780e4d13"


def test_alpaca_seeds_as_the_original():
    """Alpaca's 175 seed tasks, 13 of which lose their first characters in the original."""
    tokenizer, file = data.Tokenizer(real("llama_tokenizer.model")), real("seed_tasks.jsonl")
    conversations = data.load_conversations(file)
    assert len(conversations) == 175 and count_like_alpacas(tokenizer, conversations) == 162


# -- rows -----------------------------------------------------------------------------------------

def examples(lengths) -> list:
    """Each token occurs only once, so that it can be found again; two of three are supervised."""
    ends = list(itertools.accumulate(lengths, initial=1000))
    tokens = [list(range(a, b)) for a, b in zip(ends, ends[1:])]
    return [data.Example(t, [-100 if i % 3 == 0 else i for i in t]) for t in tokens]


def test_packed_examples_stay_whole():
    """Each exactly once, in a segment of its own; only what is longer than a row is cut."""
    given = examples([5, 30, 9, 9, 1, 17, 32, 2, 31, 70, 12, 3])
    rows, found = data.pack(given, 32, pad=7), []
    for tokens, labels, segments in zip(rows.tokens, rows.labels, rows.segments):
        for number in np.unique(segments[tokens != 7]):
            own = segments == number
            found.append(data.Example(tokens[own].tolist(), labels[own].tolist()))
    want = [data.Example(e.tokens[:32], e.labels[:32]) for e in given]
    assert sorted(found) == sorted(want), "a conversation is lost, cut, doubled, or in two segments"


def test_padding_is_not_supervised():
    rows = data.pack(examples([20, 20, 20]), 32, pad=7)
    assert (rows.tokens == 7).sum() == 36
    assert (rows.labels[rows.tokens == 7] == -100).all()


def test_packing_by_hand():
    """First fit: the first row that has room, also when a fuller one fits better. Best fit, the
    longest first, needs fewer rows. An example longer than a row fills it."""
    lengths = [4, 11, 4, 4, 6, 6, 6]
    assert data.pack_textbook(lengths, 10) == [[0, 2], [1], [3, 4], [5], [6]]
    assert data.pack_best_fit(lengths, 10) == [[1], [4, 3], [5, 2], [6, 0]]


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
    for step in (8, 0, 5, 2):
        tokens, labels, segments = some_rows(kind).batch(step, 3)
        assert torch.equal(tokens, rows.batch(step, 3)[0]), f"step {step} depends on the past"
        one_by_one = order(rows, 3 * step, 3 * step + 3)
        assert tokens[:, 1].tolist() == one_by_one, "3 at a time, other rows"
        if kind == "rows":
            assert torch.equal(labels, tokens + 1000), "these labels belong to another row"
            assert torch.equal(segments, tokens % 5), "these segments belong to another row"


@pytest.mark.parametrize("kind", ["rows", "text"])
def test_each_epoch_has_every_row_once(kind):
    rows = some_rows(kind, 50)
    n = len(rows)
    epochs = [order(rows, e * n, e * n + n) for e in range(4)]
    assert all(len(set(epoch)) == n for epoch in epochs), "a row came twice, another not at all"
    assert len(set(map(tuple, epochs))) == 4, "the same order in each epoch"
    assert order(some_rows(kind, 50, seed=1), 0, n) != epochs[0], "the seed changes nothing"


def test_text_rows():
    """Consecutive words after a bos. Rows of an epoch do not overlap, and leave out little."""
    rows, offsets = some_rows("text", 20), set()
    for epoch in range(6):
        tokens, labels, segments = rows.batch(epoch, len(rows))
        words = tokens[:, 1:]
        assert segments is None and torch.equal(tokens, labels)
        assert (tokens[:, 0] == 1).all() and (words.diff() == 1).all()
        assert 100 <= words.min() and words.max() < 268
        assert words.unique().numel() == 8 * len(rows) > 168 - 16
        offsets.add(int(words.min()))
    assert len(offsets) > 2, "cut at the same places in each epoch: some pairs are never learned"


@pytest.mark.parametrize("seq_len", [8, 9])
@pytest.mark.parametrize("n", [1, 50])
def test_windows(n, seq_len):
    """Every token is scored once, and has half a row of context or all there is."""
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

@torch.no_grad()
@pytest.mark.parametrize("template", ["vicuna_v1.1", "alpaca"])
def test_generate_replies(template):
    """In batches, sorted by length, padded: each reply is what it is alone, and in its place."""
    net, path, _ = checkpoint.load(MICRO)
    tokenizer, want, ended = data.Tokenizer(path), [], []
    asked = [conversation("What is 3 + 4?"), conversation("Hi!", "Hello.", "Who are you?"),
             conversation("There is a red circle. What color is it?"), conversation("cat")]
    for c in asked:
        text = data.render(c, template, tokenizer).tokens
        begin, stop = len(text), len(text) + 10
        while len(text) < stop and text[-1] != tokenizer.eos:
            text.append(int(net(torch.tensor([text]))[0, -1].argmax()))
        ended.append(text[-1] == tokenizer.eos)
        ids = text[begin:-1] if ended[-1] else text[begin:]
        want.append(tokenizer.decode(ids, continues=template == "alpaca"))
    assert len(set(want)) == 4 and len(set(ended)) == 2, "this test cannot fail any more"
    for batch in (1, 2, 64):
        replies = data.generate_replies(net, tokenizer, template, asked, 10, batch)
        assert replies == (want, ended), f"in batches of {batch}"


def test_asking_near_the_end_of_the_context(tokenizer):
    """Old rounds are dropped first; a long prompt does not cut its neighbor's reply; a question
    without room gets none."""
    class Talker:  # repeats the id 300 until it is stopped
        config = SimpleNamespace(max_seq_len=200)

        def generate(self, prompts, n, **_):
            for _ in range(min(n, 200 - max(map(len, prompts)))):
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


# -- tools/show.py: python data.py show|stats -----------------------------------------------------

def test_show(tmp_path, tokenizer, capsys):
    """What is supervised stands in [[ ]], with | between tokens. Look at this before training on
    anything."""
    file = tmp_path / "c.json"
    data.save_conversations([FOUR], file)
    show.show(show.ShowConfig(str(file), str(tokenizer.path)))
    out = capsys.readouterr().out
    assert re.findall(r"\[\[ ?(.*?)\]\]", out) == ["A|</s>", "B|</s>"]
    example = data.render(FOUR, "vicuna_v1.1", tokenizer)
    assert "\n<s>|" in out and out.count("|") == len(example.tokens) - 1
    counts = re.search(r"(\d+) tokens: system (\d+), user (\d+), assistant (\d+)", out).groups()
    total, system, user, assistant = map(int, counts)
    assert system == len(tokenizer.encode(VICUNA)) and assistant == 4
    assert total == system + user + assistant


def test_data_as_a_script(tmp_path, tokenizer):
    """`python data.py` is the module __main__, and tools/show.py imports the same file again as
    data, so each of its classes exists twice. A UserError among them would not be caught."""
    def run(*options) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, data.__file__, *options], cwd=tmp_path,
                              capture_output=True, encoding="utf-8")

    option = f"--tokenizer={tokenizer.path}"
    data.save_conversations([FOUR], tmp_path / "c.json")
    shown = run("show", "c.json", option)
    assert shown.returncode == 0 and "|[[ A|</s>]]|" in shown.stdout
    (tmp_path / "text.txt").write_text("prose", encoding="utf-8")
    refused = run("stats", "text.txt", option)
    assert refused.returncode == 1
    assert refused.stderr == "data.py stats: text.txt holds text, not conversations\n"


def test_show_without_any_tokenizer(tmp_path, capsys, monkeypatch):
    """On the first day there is no model yet. It was an error; a misspelled one still is."""
    monkeypatch.chdir(tmp_path)
    data.save_conversations([FOUR], "c.json")
    show.show(show.ShowConfig("c.json"))
    out = capsys.readouterr().out
    assert "a new one, trained on this file" in out and "|[[" in out
    with pytest.raises(UserError, match="no tokenizer at out/bsae"):
        show.show(show.ShowConfig("c.json", "out/bsae"))


def test_chips(tokenizer):
    """One chip a token: bytes of a character without a piece, a newline that can be seen, image
    slots as one. On a terminal the shades alternate, and green is supervised."""
    turns = [data.Turn("user", "a\nb", slots=3), data.Turn("assistant", "🙂")]
    example = data.render(data.Conversation(turns, system=""), "alpaca", tokenizer)
    chips = show.split_into_chips(example, tokenizer)
    assert sum(chip.text == "<3 image slots>" for chip in chips) == 1
    assert len(chips) == len(example.tokens) - 2
    assert [chip.text for chip in chips if chip.supervised][-5:] == [
        "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "</s>"]
    assert "↵\n" in [chip.text for chip in chips]
    colored = show.print_chips(chips, colored=True)
    assert "\033[97;48;5;22m" in colored and "\033[97;48;5;28m" in colored and "[[" not in colored
    first = [show.Chip("a", True, 0.5), show.Chip("b", False, math.nan)]
    assert show.print_chips(first, colored=False) == "[[a(0.50)]]|b"


def test_the_page_of_chips(tmp_path):
    """No text of a conversation is markup, and nothing is loaded from elsewhere."""
    evil = "</span><script>alert(1)</script>"
    file, page = tmp_path / "c.json", tmp_path / "c.html"
    data.save_conversations([conversation(evil, evil, id=evil)], file)
    show.show(show.ShowConfig(str(file), ckpt=str(MICRO), html=str(page)))
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and not re.search(r"https?://|\bsrc=|@import|<link", text)
    shown = re.sub(r"<[^>]*>", "", text.split("<p>")[1])
    assert shown.count("&lt;/span&gt;&lt;script&gt;alert(1)") == 2
    assert text.count('class="supervised"') == text.count(" nats\">") > 5
    assert text.count("<span") == text.count("</span>")


def test_loss_of_each_token(tmp_path, capsys):
    """show --ckpt prints the model's own loss, token by token."""
    net, path, meta = checkpoint.load(MICRO)
    c = conversation("Who are you?", "I am a cat.", "And?", "That is all.")
    data.save_conversations([c], tmp_path / "c.json")
    show.show(show.ShowConfig(str(tmp_path / "c.json"), ckpt=str(MICRO)))
    printed = capsys.readouterr().out
    example = data.render(c, meta["template"], data.Tokenizer(path))
    losses = show.token_losses(net, example)
    with torch.no_grad():
        total, count = net.nll(torch.tensor([example.tokens]), torch.tensor([example.labels]))
    assert np.isfinite(losses).tolist() == [label != -100 for label in example.labels]
    assert np.nansum(losses) == pytest.approx(total.item(), rel=1e-4)
    assert f"</s>({losses[-1]:.2f})" in printed
    assert f"loss {total.item() / count.item():.3f}" in printed


def test_a_whole_file(tmp_path, tokenizer):
    """Rendered in its order, and counted right."""
    file, chats = tmp_path / "c.json", [conversation(*["a"] * n) for n in (2, 40, 2, 8)]
    data.save_conversations(chats, file)
    want = [data.render(c, "vicuna_v1.1", tokenizer) for c in chats]
    found = data.render_file(file, "vicuna_v1.1", tokenizer, data.Report())
    assert [(e.tokens.tolist(), e.labels.tolist()) for e in found] == want
    figures = show.stats(show.StatsConfig(str(file), str(tokenizer.path)))
    assert (figures["conversations"], figures["turns"]) == (4, 52)
    assert figures["tokens"] == sum(len(e.tokens) for e in want)
    assert figures["supervised"] == 2 * 26  # each reply is one token and its end
