"""Tests of data.py against other people's rules and over generated conversations, and of its commands.

    pytest tests/test_data_recipes.py
    NANOVICUNA_DATA=FOLDER pytest tests/test_data_recipes.py    # also with LLaMA's tokenizer and real files

FOLDER holds llama_tokenizer.model (LLaMA's tokenizer.model) and, for some tests, sharegpt_identity.json (FastChat's
dummy_conversation.json), seed_tasks.jsonl (Stanford Alpaca) and oasst_en_100_trees.jsonl (Open-Assistant).
"""

import hashlib
import itertools
import json
import os
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import data
import model
import train_sft

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st  # noqa: E402

MICRO = Path(__file__).parent / "micro"
REAL = Path(os.environ.get("NANOVICUNA_DATA", "."))


def real(name: str) -> Path:
    if not (REAL / name).is_file() or "NANOVICUNA_DATA" not in os.environ:
        pytest.skip(f"NANOVICUNA_DATA names no folder with {name}")
    return REAL / name


@pytest.fixture(scope="module", params=["micro", "llama"])
def tokenizer(request):
    return data.Tokenizer(MICRO / "tokenizer.model" if request.param == "micro" else real("llama_tokenizer.model"))


def conversation(*texts: str, **more):
    roles = itertools.cycle(("user", "assistant"))
    return data.Conversation([data.Turn(role, text) for role, text in zip(roles, texts)], **more)


# -- the originals' rules, written down a second time from their descriptions --------------------------------

def vicuna_rule(texts: list[str], sp) -> tuple[list[int], list[int]]:
    """FastChat's: the whole conversation as one string; masks by counting the tokens of its parts, once more."""
    def legacy(text: str) -> list[int]:  # each stretch between special tokens begins with a space of its own
        parts = text.split("</s>")
        ids = [1]
        for i, part in enumerate(parts):
            ids += sp.encode(part) + [2] * (i < len(parts) - 1)
        return ids

    system = ("A chat between a curious user and an artificial intelligence assistant. "
              "The assistant gives helpful, detailed, and polite answers to the user's questions.")
    whole = system + " " + "".join(f"USER: {t} " if i % 2 == 0 else f"ASSISTANT: {t}</s>" for i, t in enumerate(texts))
    ids = legacy(whole)
    labels, at = [-100] + ids[1:], 1
    for piece in whole.split("</s>")[:-1]:
        asked, reply = piece.split(" ASSISTANT: ")
        masked = len(legacy(asked + " ASSISTANT: ")) - 2
        labels[at:at + masked] = [-100] * masked
        at += len(legacy(piece))
    assert at == len(ids), "the rule itself has failed on this one"
    return ids, labels


def alpaca_rule(instruction: str, given: str, output: str, sp) -> tuple[list[int], list[int], bool]:
    """Stanford's: prompt and prompt + reply are tokenised, and as many labels masked as the prompt has tokens. Also
    whether the prompt's tokens are a prefix of the whole; where they are not, the reply's beginning is never learned."""
    more = ", paired with an input that provides further context" if given else ""
    prompt = (f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
              f"request.\n\n### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "") + "### Response:")
    short, ids = [1, *sp.encode(prompt)], [1, *sp.encode(prompt + output), 2]
    return ids, [-100] * len(short) + ids[len(short):], ids[:len(short)] == short


REPLIES = ["Hi!", " space", "\nline", "3 of 4", "한국어", "\"quote\"", "```py\nx\n```", "one\n\ntwo ", "- list", "{x}", "🙂", "a  b"]


def test_vicuna_as_the_original(tokenizer):
    """Ids and labels of the legacy rule, on replies that begin in every way."""
    for first, second in zip(REPLIES, REPLIES[1:] + REPLIES[:1]):
        texts = ["Hello! " + second, first, "And " + first + " ", second]
        assert data.render(conversation(*texts), "vicuna_v1.1", tokenizer) == vicuna_rule(texts, tokenizer.sp)


def test_alpaca_as_the_original(tokenizer):
    """The same, except where the colon and the reply become one token: there, ours learns the whole reply."""
    same = 0
    for reply, given in zip(REPLIES * 2, [""] * len(REPLIES) + ["1, 2"] * len(REPLIES)):
        c = data.Conversation([data.Turn("user", "Go on.", given), data.Turn("assistant", reply)])
        example = data.render(c, "alpaca", tokenizer)
        ids, labels, prefix = alpaca_rule("Go on.", given, reply, tokenizer.sp)
        learned = tokenizer.decode([i for i in example.labels if i not in (-100, 2)], continuation=True)
        assert learned == reply
        assert example == (ids, labels) or not prefix
        same += prefix
    assert same >= len(REPLIES)


def test_real_files_as_the_originals(tmp_path):
    """All 500 of FastChat's dummy conversations, none dropped; Alpaca's 175 seed tasks, 13 of which lose their first
    characters in the original. The hash is that of transformers' own LlamaTokenizer (4.36.2, slow, legacy) under the rule."""
    tokenizer, out = data.Tokenizer(real("llama_tokenizer.model")), tmp_path / "x.jsonl"
    for name in ("sharegpt_identity.json", "seed_tasks.jsonl"):
        data.stats(data.StatsConfig(str(real(name)), str(tokenizer.path), out=str(out)))
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        found = [(line["tokens"], line["labels"]) for line in lines]
        if name == "sharegpt_identity.json":
            records = json.loads(real(name).read_text())
            assert [line["id"] for line in lines] == [r["id"] for r in records] and len(records) == 500
            assert found == [vicuna_rule([m["value"] for m in r["conversations"]], tokenizer.sp) for r in records]
            assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == "f3566a28780e4d13"
        else:
            records = [json.loads(line) for line in real(name).read_text().splitlines()]
            rule = [alpaca_rule(r["instruction"], r["instances"][0]["input"], r["instances"][0]["output"], tokenizer.sp)
                    for r in records]
            assert sum(prefix for *_, prefix in rule) == 162 and len(found) == 175
            for r, (ids, labels, prefix), (tokens, ours) in zip(records, rule, found):
                assert not prefix or (ids, labels) == (tokens, ours)
                reply = tokenizer.decode([i for i in ours if i not in (-100, 2)], continuation=True)
                assert reply == r["instances"][0]["output"], "the whole reply is learned"


def test_real_seed_tasks():
    """Alpaca's own filter keeps 171 of the 175 (two are short, one asks for a program, one says "Music"); two more are
    like an earlier one, with ROUGE-L 0.82 and 0.75."""
    report = data.Report()
    kept = data.fit_tasks(data.load_conversations(real("seed_tasks.jsonl")), report)
    assert len(list(kept)) == 169 and sorted(report.values()) == [1, 1, 2, 2]
    first, second = (["a", "b", "c", "b"], ["b", "c", "x", "b"])
    assert data.rouge_l(first, second) == 0.75 and data.rouge_l(first, first) == 1 and data.rouge_l(first, []) == 0


def test_real_trees(capsys):
    """Counted a second time, by walking every thread and then judging it."""
    def threads(message, before=()):
        replies = message["replies"]
        if not replies:
            yield (*before, message)
        for reply in replies:
            yield from threads(reply, (*before, message))

    def counts(k: float) -> list[int]:
        kept = []
        for path in (path for root in roots for path in threads(root)):
            waits = path[-1]["role"] == "prompter"  # its parent's path counts once: for the first of such questions
            left_out = any(x["deleted"] or x["synthetic"] for x in path)
            again = waits and (len(path) == 1 or path[-2]["replies"][0] is not path[-1])
            ranked = all(b["role"] == "prompter" or k == float("inf") or (b["rank"] < k if "rank" in b else len(a["replies"]) == 1)
                         for a, b in zip(path, path[1:]))
            if ranked and not left_out and not again:
                kept.append(path[:-1] if waits else path)
        return [len(kept), sum(map(len, kept))]

    def best() -> list[int]:
        lengths = []
        for m in (t for t in roots if not t["synthetic"]):
            path = [m]
            while m["replies"]:
                m = min(m["replies"], key=lambda r: r.get("rank", 99))
                path.append(m)
            lengths.append(len(path) // 2 * 2)
        return [sum(n > 0 for n in lengths), sum(lengths)]

    roots = [json.loads(line)["prompt"] for line in real("oasst_en_100_trees.jsonl").read_text().splitlines()]
    figures = data.stats(data.StatsConfig(str(real("oasst_en_100_trees.jsonl")), str(real("llama_tokenizer.model"))))
    found = {pick: [figures[pick]["threads"], figures[pick]["messages"]] for pick in ("all", "top1", "top2", "best")}
    assert found == dict(all=counts(float("inf")), top1=counts(1), top2=counts(2), best=best())
    assert found == dict(all=[538, 1792], top1=[98, 288], top2=[276, 900], best=[95, 274])


def test_minigpt4_as_published():
    """Its stage-2 prompt, token for token, with two image vectors for the picture."""
    tokenizer = data.Tokenizer(real("llama_tokenizer.model"))
    c = data.Conversation([data.Turn("user", "Describe this image in detail.", slots=2), data.Turn("assistant", "A cat.")])
    tokens, labels = data.render(c, "minigpt4", tokenizer)
    assert tokens == [1, 835, 29950, 7889, 29901, 529, 25518, 29958, -1, -1, 1533, 25518, 29958, 20355, 915, 445, 1967, 297,
                      9493, 29889, 835, 7900, 22137, 29901, 29871, *tokenizer.encode("A cat.###")]
    assert labels == [-100] * 25 + tokens[25:]


# -- over generated conversations ----------------------------------------------------------------------------

SPECIAL = ["</s>", "<s>", "<unk>", "[PAD]", "USER:", " ASSISTANT: ", "### Human:", "\n###", "<image>", "<ImageHere>", "{text}",
           "{slots}", "<|assistant|>", "<0x0A>", "Copy code", "```", "1. a\n", "2 / 2\n", "<p>", "</p>", "\\_", "&lt;", "\n\n\n",
           "Copy1 chars / 2 words", "x" * 30, "\r\n"]
# SentencePiece folds U+2581 (its mark for a space), and a lone surrogate is no text (mended when a file is read)
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
TEXT = st.lists(st.one_of(st.text(CHARACTERS, max_size=8), st.sampled_from(SPECIAL)), max_size=6).map("".join)
ROUNDS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)
SHARED = data.Tokenizer(MICRO / "tokenizer.model")
ENDS = {"vicuna_v0": "\n###", "minigpt4": "###", "minigpt4_chat": "###", "lines": "\n"}
few = settings(max_examples=50, deadline=None, derandomize=True, report_multiple_bugs=False)


def flat(rounds) -> list[str]:
    return [text for asked, reply in rounds for text in (asked, reply)]


@few
@given(ROUNDS, st.sampled_from(sorted(data.TEMPLATES)), st.one_of(st.none(), TEXT))
def test_supervised_tokens_are_the_replies(rounds, template, system):
    """And the end of each, to the letter, whatever the texts say. Nothing of user and system is ever learned."""
    c = conversation(*flat(rounds), system=system)
    example = data.render(c, template, SHARED)
    t, found = data.TEMPLATES[template], []
    for begin, end, learned in data.stretches(example.labels):
        if learned:
            ids = list(example.tokens[begin:end])
            stop = ids[-1] == SHARED.eos
            found.append(SHARED.decode(ids[:len(ids) - stop], t.glued) + "</s>" * stop)
    assert found == [reply + ENDS.get(template, "</s>") for _, reply in rounds]
    blank = data.render(conversation(*flat([("", reply) for _, reply in rounds])), template, SHARED)
    assert [x for x in example.labels if x != -100] == [x for x in blank.labels if x != -100]
    assert SHARED.unk not in example.tokens and example.tokens.count(SHARED.bos) == 1 and -1 not in example.tokens


@few
@given(ROUNDS, st.sampled_from(["vicuna_v1.1", "alpaca", "koala"]), st.integers(120, 400))
def test_splitting_loses_no_round(rounds, template, seq_len):
    report = data.Report()
    c = conversation(*flat(rounds), id="c", system="Be brief.")
    pieces = list(data.split(c, template, SHARED, seq_len, report))
    assert all(len(data.render(p, template, SHARED).tokens) <= seq_len and p.system == "Be brief." for p in pieces)
    assert len({p.id for p in pieces}) == len(pieces)
    turns = [t for p in pieces for t in p.turns]
    if not any("cut" in reason for reason in report):
        assert turns == c.turns
    assert len(turns) == len(c.turns) and all(a.text.startswith(b.text) for a, b in zip(c.turns, turns))


@few
@given(st.lists(ROUNDS, min_size=1, max_size=3))
def test_cleaning_twice_changes_nothing_more(chats):
    pytest.importorskip("markdownify")
    given_ = [conversation(*flat(rounds), id=str(i)) for i, rounds in enumerate(chats)]
    once = list(data.clean(given_, first := data.Report()))
    assert list(data.clean(once, second := data.Report())) == once and not second
    assert {name for name, what in first.entries if what.startswith("dropped")} == {c.id for c in given_} - {c.id for c in once}


@few
@given(st.lists(ROUNDS, min_size=1, max_size=3))
def test_saved_and_loaded_again(tmp_path_factory, chats):
    """Nothing changes on the way through a file, as lines or as an array."""
    given_ = [conversation(*(t + "x" for t in flat(rounds)), id=str(i), extra={"k": [i]}) for i, rounds in enumerate(chats)]
    for name in ("a.json", "a.jsonl"):
        file = tmp_path_factory.getbasetemp() / name
        data.save_conversations(given_, file)
        assert data.load_conversations(file, report := data.Report()) == given_ and not report


def test_the_last_round_is_not_lost():
    """Five equal rounds with room for two: the original wrote rounds 1-2 and 3-4, and lost the fifth."""
    texts = [f"{word} is it?" for word in ("Who", "It", "Why", "So", "How", "Thus", "What", "That", "When", "Now")]
    size = lambda n: len(data.render(conversation(*texts[:n]), "vicuna_v1.1", SHARED).tokens)
    pieces = list(data.split(conversation(*texts, id="c"), "vicuna_v1.1", SHARED, size(4) + 3, report := data.Report()))
    assert [[t.text for t in p.turns] for p in pieces] == [texts[:4], texts[4:8], texts[8:]]
    assert [p.id for p in pieces] == ["c_0", "c_4", "c_8"] and report == {"split": 1}


def test_a_reply_that_is_cut_has_no_end(tmp_path):
    """Who learns </s> in mid-sentence stops there. The mark survives a file."""
    (piece,) = data.split(conversation("What is it?", "a cat and " * 200), "vicuna_v1.1", SHARED, 150, data.Report())
    data.save_conversations([piece], tmp_path / "c.json")
    for c in (piece, *data.load_conversations(tmp_path / "c.json")):
        tokens, labels = data.render(c, "vicuna_v1.1", SHARED)
        assert 140 < len(tokens) <= 150 and SHARED.eos not in tokens and labels[-1] == tokens[-1]


def test_cleaning_holds_no_file_in_memory():
    """A file may be larger than the memory: what is waiting for the last duplicate waits on the disk."""
    pytest.importorskip("markdownify")
    alive: list = []

    def source():
        for i in range(50):
            alive.append(weakref.ref(c := conversation(f"What is {i}?", "A number, of course.", id=str(i))))
            yield c
            assert sum(ref() is not None for ref in alive) < 9

    assert [c.id for c in data.clean(source(), data.Report())] == list(map(str, range(50)))


def test_markdown_about_html_is_not_converted_again():
    pytest.importorskip("markdownify")
    c = conversation("How do I write a paragraph?", "<p>&lt;p&gt;So it is done.&lt;/p&gt;</p>")
    once = list(data.clean([c], data.Report()))
    assert once[0].turns[1].text == "<p>So it is done.</p>"
    assert list(data.clean(once, data.Report())) == once


# -- templates of the other models ---------------------------------------------------------------------------

V0 = ("A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
      "polite answers to the human's questions.\n\n")


@pytest.mark.parametrize("template, want", [
    ("vicuna_v0", V0 + "### Human: Hello!\n### Assistant: Hi!\n### Human: How are you?\n### Assistant:"),
    ("koala", "BEGINNING OF CONVERSATION: USER: Hello! GPT: Hi!</s> USER: How are you? GPT:"),
    ("oasst", "<|prompter|>Hello!</s><|assistant|>Hi!</s><|prompter|>How are you?</s><|assistant|>"),
    ("minigpt4", "###Human: Hello! ###Assistant:  Hi!###Human: How are you? ###Assistant: "),
    ("plain", "Hello!Hi!</s>\nHow are you?")])
def test_strings(tokenizer, template, want):
    """What stands in the string (a space after </s> is the one that LLaMA's tokenizer puts there too)."""
    tokens = data.render(conversation("Hello!", "Hi!", "How are you?"), template, tokenizer).tokens
    assert data.spell(tokenizer, tokens[1:]).removeprefix(" ") == want


def test_an_end_that_is_text():
    """### ends Vicuna v0's replies: cut there, and in a stream nothing is shown that may be its beginning."""
    assert data.said("Yes.\n### Human: x", "vicuna_v0") == ("Yes.", True)
    assert data.said("Yes.\n#", "vicuna_v0", complete=False) == ("Yes.", False)
    assert data.said("Yes.\n#", "vicuna_v0") == ("Yes.\n#", False)
    assert data.said("# Title", "vicuna_v0", complete=False) == ("# Title", False)
    assert data.said("a\n### b", "vicuna_v1.1") == ("a\n### b", False)


def test_asking_near_the_end_of_the_context():
    """Old rounds go first; a long prompt does not cut its neighbour's reply; a question without room gets none."""
    class Talker:  # says its id 300 until it is stopped
        config = model.LLaMAConfig(8, 1, 1, vocab_size=512, max_seq_len=200)

        def generate(self, prompts, n, **_):
            asked.append(list(map(len, prompts)))
            for _ in range(min(n, 200 - max(map(len, prompts)))):
                yield [300] * len(prompts)

    asked: list = []
    word = SHARED.decode([300], True)
    size = lambda c: len(data.render(c, "plain", SHARED).tokens)
    short, near, over = conversation("a"), conversation("a " * 175), conversation("a " * 400)
    talk = conversation(*["a " * 25] * 9)
    assert size(near) < 200 < size(talk) and size(over) > 200
    replies, ended = data.chat(Talker(), SHARED, "plain", [short, over, near, talk], max_new_tokens=40)
    assert [r.count(word) for r in replies] == [40, 0, 200 - size(near), 40] and not any(ended)
    assert max(map(max, asked)) == size(near)


# -- the commands --------------------------------------------------------------------------------------------

def run(main, cls, *argv) -> dict:
    return main(config.from_cli(cls, list(map(str, argv))))


@pytest.fixture
def korean(tmp_path):
    """Several rounds, polite and plain, with English, digits and emoji in between, and what cleaning looks for."""
    rounds = [("안녕하세요! 누구세요?", "안녕하세요. 저는 이야기를 나누는 언어 모델입니다. 😊"),
              ("서울에서 부산까지 얼마나 걸려요?", "KTX를 타면 약 2시간 30분이 걸립니다.\n1. 표를 삽니다.\n2. 기차를 탑니다."),
              ("고마워요, 다음에 또 물어볼게요.", "네, 언제든지 물어보세요!")]
    records = [dict(id=f"ko{i}", conversations=[{"from": role, "value": text + f" ({i})" * (role == "human")}
                    for pair in rounds[i % 3:] + rounds[:i % 3] for role, text in zip(("human", "gpt"), pair)])
               for i in range(12)]
    records[3]["conversations"][1]["value"] = "2 / 2\n\n" + records[3]["conversations"][1]["value"]
    records.append({**records[0], "id": "twice"})
    (file := tmp_path / "korean.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["trained", "llama"])
def test_korean(korean, tmp_path, capsys, kind):
    """A Korean file from show to a few steps of training, in bytes or in syllables."""
    if kind == "llama":
        tokenizer = real("llama_tokenizer.model")
    else:
        lines = [t.text for c in data.load_conversations(korean) for t in c.turns]
        tokenizer = data.train_tokenizer(lines, 600, tmp_path / "ko.model").path
    run(data.show, data.ShowConfig, korean, f"--tokenizer={tokenizer}", "--count=13")
    assert "안녕하세요. 저는 이야기를 나누는 언어 모델입니다. 😊</s>]]" in capsys.readouterr().out
    clean, pieces, tokens = (tmp_path / n for n in ("clean.json", "split.json", "tokens.jsonl"))
    figures = run(data.clean_file, data.CleanConfig, korean, f"--out={clean}")
    assert (figures["read"], figures["written"]) == (13, 12) and figures["changed: counters of the web page"] == 1
    report = json.loads(Path(f"{clean}.report.json").read_text(encoding="utf-8"))
    assert {"id": "twice", "what": "dropped: a duplicate, or the beginning of another conversation"} in report["conversations"]
    figures = run(data.split_file, data.SplitConfig, clean, f"--tokenizer={tokenizer}", f"--out={pieces}",
                  f"--seq_len={128 if kind == 'trained' else 200}")
    assert figures["read"] == 12 and figures["written"] > 12 and not any("cut" in reason for reason in figures)
    whole, parts = (sorted(t.text for c in data.load_conversations(f) for t in c.turns) for f in (clean, pieces))
    assert whole == parts
    run(data.stats, data.StatsConfig, pieces, f"--tokenizer={tokenizer}", f"--out={tokens}")
    lines = [json.loads(line) for line in tokens.read_text().splitlines()]
    spelled = [data.Tokenizer(tokenizer).decode([i for i in x["labels"] if i > 2 or i == 0]) for x in lines]
    assert len(spelled) == figures["written"] and any("KTX를 타면 약 2시간 30분이" in text for text in spelled)
    sizes = dict(dim=32, n_layers=1, n_heads=2, hidden_dim=48, max_seq_len=256, vocab_size=data.Tokenizer(tokenizer).vocab_size)
    torch.manual_seed(0)
    model.save(tmp_path / "base", model.LLaMA(model.LLaMAConfig(**sizes)), dict(step=0, template="plain"), tokenizer)
    train_sft.main(train_sft.SFTConfig(stage="sft", data=str(pieces), init=str(tmp_path / "base"), out=str(tmp_path), steps=4,
                                       batch_size=2, seq_len=256, learning_rate=1e-2, device="cpu", dtype="float32"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "split" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_loss_of_each_token(tmp_path, capsys):
    """show --ckpt: the model's own loss, told apart by token."""
    net, path, meta = model.load(MICRO)
    net.eval()
    c = conversation("Who are you?", "I am a cat.", "And?", "That is all.")
    data.save_conversations([c], file := tmp_path / "c.json")
    data.show(data.ShowConfig(str(file), ckpt=str(MICRO)))
    example = data.render(c, meta["template"], data.Tokenizer(path))
    losses = data.token_losses(net, example)
    with torch.no_grad():
        total, count = net.nll(torch.tensor([example.tokens]), torch.tensor([example.labels]))
    assert np.isfinite(losses).tolist() == [x != -100 for x in example.labels]
    assert np.nansum(losses) == pytest.approx(total.item(), rel=1e-4) and np.isfinite(losses).sum() == int(count)
    printed = capsys.readouterr().out
    last = next(i for i in reversed(range(len(losses))) if np.isfinite(losses[i]))
    assert f"</s>({losses[last]:.2f})" in printed and f"loss {total.item() / int(count):.3f}" in printed


def test_images_in_show(tmp_path, capsys):
    c = data.Conversation([data.Turn("user", "What is it?", slots=5), data.Turn("assistant", "A cat.")])
    tokens = data.render(c, "vicuna_v1.1", SHARED).tokens
    assert tokens.count(data.IMAGE_SLOT) == 5 and "<Img><5 image slots> </Img> What" in data.spell(SHARED, tokens)


def test_a_large_file_is_tokenised_once(tmp_path, monkeypatch, capsys):
    """And again when the file, the template, the tokenizer or the cache itself has changed."""
    def save(n: int) -> None:
        data.save_conversations([conversation("Q" * (i + 1), "A" * i + "!") for i in range(n)], file)

    def tokenise(template: str = "vicuna_v1.1", tokenizer=SHARED) -> int:
        """How many conversations had to be rendered."""
        calls.clear()
        report = data.Report()
        examples = data.tokenise(file, template, tokenizer, report)
        want = [render(c, template, tokenizer) for c in data.load_conversations(file)]
        assert [tuple(x.tolist() for x in e) for e in examples] == [(e.tokens, e.labels) for e in want]
        return len(calls)

    file, calls, render = tmp_path / "large.json", [], data.render
    home = sys.modules[data.tokenise.__module__]  # with --impl, somebody else's
    monkeypatch.setattr(home, "render", lambda *given: calls.append(1) or render(*given))
    save(5)
    assert tokenise() == tokenise() == 5 and len(list(tmp_path.iterdir())) == 1, "small files leave nothing behind"
    monkeypatch.setattr(home, "LARGE", 1)
    assert (tokenise(), tokenise()) == (5, 0)
    assert (tokenise("koala"), tokenise("koala"), tokenise()) == (5, 0, 0)
    save(6)
    assert (tokenise(), tokenise()) == (6, 0)
    other = data.train_tokenizer(["some other text"] * 9, 300, tmp_path / "other.model")
    assert (tokenise(tokenizer=other), tokenise(tokenizer=other)) == (6, 0)
    cache = next(tmp_path.glob("large.json.vicuna*"))
    cache.write_bytes(cache.read_bytes()[:-50])
    assert (tokenise(tokenizer=other), tokenise(tokenizer=other)) == (6, 0)
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert tokenise() == 6 and "No space left" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part"))


def test_mix(tmp_path, capsys):
    """As many of each as its weight says, in an order that depends on the seed alone."""
    for name, n in (("a", 40), ("b", 10)):
        data.save_conversations([conversation(f"{name}{i}?", "Yes.", id=f"{name}{i}") for i in range(n)], tmp_path / f"{name}.json")
    data.save_conversations([data.Conversation([data.Turn("user", "Add.", "1, 2"), data.Turn("assistant", "3")], "c0")],
                            tmp_path / "c.json", "alpaca")
    a, b, c, out = (tmp_path / f"{n}.json" for n in ("a", "b", "c", "out"))

    def mixed(files: str, *argv) -> list[str]:
        run(data.mix_files, data.MixConfig, files, f"--out={out}", *argv)
        return [x.id for x in data.load_conversations(out)]

    first = mixed(f"{a}:0.5,{b}:2,{c}")
    assert len(first) == len(set(first)) == 20 + 20 + 1 and first == mixed(f"{a}:0.5,{b}:2,{c}")
    assert sum(x[0] == "a" for x in first) == 20 and {f"b{i}" for i in range(10)} | {f"b{i}#2" for i in range(10)} < set(first)
    assert mixed(f"{a}:0.5,{b}:2,{c}", "--seed=1") != first
    assert "48.8%" in capsys.readouterr().out
    assert mixed(f"{c}:3") == ["c0", "c0#2", "c0#3"] and data.kind_of(out) == "alpaca"
    assert data.load_conversations(out)[0].turns[0] == data.Turn("user", "Add.", "1, 2"), "Alpaca's input is still one"
    assert len(mixed(f"sharegpt={a},hc3={b},identity={c}", "--recipe=koala_distill")) == 40 + 10 + 5
    (hh := tmp_path / "hh.json").write_text(json.dumps([dict(
        chosen="\n\nHuman: Q\n\nAssistant: good", rejected="\n\nHuman: Q\n\nAssistant: bad")]))
    assert mixed(f"{hh},{b}:0") == ["hh_0_0"] and sorted(mixed(f"{hh},{b}:0", "--rejected")) == ["hh_0_0", "hh_0_1"]
    assert [c.extra["rejected"] for c in sorted(data.load_conversations(out), key=lambda c: c.id)] == [False, True]
    for files, recipe in ((f"sharegpt={a}", "koala_distill"), (f"x={a}", "koala_all"), (str(a), "koala"), (f"{a},,{b}", ""),
                          (f"{tmp_path / 'none.json'}", ""), (str(out), "")):
        with pytest.raises(config.Problem) as caught:
            mixed(files, f"--recipe={recipe}")
        assert "\n" not in str(caught.value)


def test_identity(tmp_path):
    """For a name of one's choice; nobody else's is claimed."""
    run(data.identity_file, data.IdentityConfig, f"--out={tmp_path / 'i.json'}", "--name=Bori", "--maker=the class of 2031")
    found = data.load_conversations(tmp_path / "i.json")
    assert len(found) > 60 and len({c.turns[0].text for c in found}) > 20 and len({len(c.turns) for c in found}) > 1
    assert all("Bori" in t.text or "class of 2031" in t.text for c in found for t in c.turns[1::2])
    assert len({tuple(c.turns) for c in found}) == len(found)


def test_stats(tmp_path, capsys):
    data.save_conversations([conversation(*["a"] * n) for n in (2, 2, 8, 40)], file := tmp_path / "c.json")
    figures = data.stats(data.StatsConfig(str(file), str(MICRO / "tokenizer.model")))
    examples = [data.render(c, "vicuna_v1.1", SHARED) for c in data.load_conversations(file)]
    assert (figures["conversations"], figures["turns"]) == (4, 52)
    assert figures["tokens"] == sum(len(e.tokens) for e in examples)
    assert figures["supervised"] == sum(x != -100 for e in examples for x in e.labels) == 2 * 26
    bars = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("#")]
    assert sum(int(line[-2]) for line in bars) == 4


@pytest.mark.parametrize("rule, record", [
    ("html", ("Is it so?", "<p>It is, indeed.</p>")), ("copy", ("Is it so?", "```\nCopy codeIt is.\n```")),
    ("counters", ("Is it so?", "2 / 2\nIt is, indeed.")), ("escapes", ("Is it so?", "It is_so\\_indeed.")),
    ("spaces", ("Is it so?", "It is,\r\nindeed.")), ("limit", ("Is it so?", "Too many requests in 1 hour. Try again later.")),
    ("blocked", ("Is it so?", "It is, says ChatGPT.")), ("numbering", ("Is it so?", "1. It\n1. is\n")),
    ("repetition", ("Is it so?", "It is 000000000.")), ("short", ("So?", "Yes.")), ("plugins", ("Is it so?", "It is, indeed.")),
    ("duplicates", ("What else is it?", "Nothing else.")), ("order", ("Is it so?", "It is, indeed.")),
    ("empty", ("Is it so, or is it not?", "\u200b"))])
def test_each_rule_can_be_turned_off(tmp_path, rule, record):
    """And does something when it is on."""
    pytest.importorskip("markdownify")
    other = [{"from": "human", "value": "What else is it?"}, {"from": "gpt", "value": "Nothing else."}]
    messages = [{"from": r, "value": t} for r, t in zip(("human", "gpt"), record)]
    if rule == "order":
        messages.append({"from": "gpt", "value": "And more."})
    found = []
    for off in ("", rule):
        (file := tmp_path / "in.json").write_text(json.dumps([dict(conversations=other), dict(
            conversations=messages, plugins={"a": 1} if rule == "plugins" else None)]))
        run(data.clean_file, data.CleanConfig, file, f"--out={tmp_path / 'out.json'}", f"--off={off}")
        found.append([t.text for c in data.load_conversations(tmp_path / "out.json", off=[off])[1:] for t in c.turns])
    assert found[0] != found[1]
    if rule in ("order", "spaces"):  # mended when on
        assert found[1] == [] if rule == "order" else list(record)
    else:
        assert found[1] == [t.rstrip() for t in record] or rule == "numbering"


def test_mistyped_options(tmp_path):
    data.save_conversations([conversation("Q", "A")], file := tmp_path / "c.json")
    for main, cls, *argv in ((data.clean_file, data.CleanConfig, "--off=htlm"), (data.clean_file, data.CleanConfig, f"--out={file}"),
                             (data.split_file, data.SplitConfig, "--seq_len=20", f"--tokenizer={MICRO / 'tokenizer.model'}"),
                             (data.stats, data.StatsConfig, f"--out={file}", f"--tokenizer={MICRO / 'tokenizer.model'}"),
                             (data.oasst_file, data.OasstConfig), (data.stats, data.StatsConfig, "--tokenizer=nowhere")):
        with pytest.raises(config.Problem) as caught:
            run(main, cls, file, *argv)
        assert "\n" not in str(caught.value)
    assert data.load_conversations(file), "the file is still there"
