"""Tests of sample.py: the chat, its cache, its commands. The model is tiny and random, and says only words.

    pytest tests/test_sample.py
"""

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import config
import data
import model
import sample

WORDS = "cat dog red house tree river stone bird cloud lamp green moon".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = [f"USER: {a} {b} ASSISTANT: {b} {a}" for a in WORDS for b in WORDS]
    lines += [data.TEMPLATES[name].system for name in ("vicuna_v1.1", "alpaca")] * 50
    return data.train_tokenizer(lines, 500, tmp_path_factory.mktemp("sample") / "words.model")


def talker(tokenizer, max_seq_len: int = 512):
    """A random network that can only say WORDS and </s>. A reply of whole words has only one way to be
    encoded, so that reading it again (in the next prompt) gives the ids that were written."""
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, max_seq_len=max_seq_len)
    net = model.LLaMA(model.LLaMAConfig(vocab_size=tokenizer.vocab_size, **sizes)).eval()
    sayable = [i for word in WORDS for i in tokenizer.encode(word)]
    assert len(sayable) == len(WORDS), "each word should be one piece"
    torch.manual_seed(1)  # a network that is neither mute nor endless
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * 0.25 + (p.dim() == 1))
        mute = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
        mute[[*sayable, tokenizer.eos]] = False
        net.output.weight[mute] = 0
    return net


@pytest.fixture(params=["vicuna_v1.1", "alpaca"])
def chat(request, tokenizer):
    return sample.Chat(talker(tokenizer), tokenizer, request.param, sample.SampleConfig(max_new_tokens=12))


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A trained model, as train_sft.py leaves it behind."""
    meta = dict(step=1, template="vicuna_v1.1")
    return str(model.save(tmp_path / "out" / "vicuna", talker(tokenizer), meta, tokenizer.path).parent)


def ask(chat, *questions: str) -> list[str]:
    return ["".join(chat.answer(question)) for question in questions]


def fresh(chat):
    """A new chat with the same model: nothing read, nothing said."""
    return sample.Chat(chat.net, chat.tokenizer, chat.template, chat.cfg)


def answered_afresh(chat) -> str:
    """The last reply again, by a chat that has to read the whole history first."""
    other = fresh(chat)
    other.turns = chat.turns[:-2]
    return ask(other, chat.turns[-2].text)[0]


# -- the chat ------------------------------------------------------------------------------------------------

def test_cache_changes_nothing(chat):
    """What was read once is not read again. Off by one token anywhere, and replies drift after some turns."""
    said = []
    for question in WORDS:
        said += ask(chat, question + " and stone")
        assert said[-1] == chat.turns[-1].text
        assert said[-1] == answered_afresh(chat), f"the answer in round {len(said)} depends on the cache"
        assert len(chat.read) == chat.cache.length, "what the cache holds and what the chat believes it holds"
    lengths = [len(reply.split()) for reply in said]
    assert len(set(said)) > 4 and max(lengths) == 12 > min(lengths), "this test has lost its teeth"


def test_a_turn_reads_only_what_is_new(chat, monkeypatch):
    """Reading everything again makes each turn of a long chat slower than the one before."""
    forward, reads = chat.net.forward, []

    def count(tokens, *rest, **named):
        reads.append(tokens.shape[1])
        return forward(tokens, *rest, **named)

    monkeypatch.setattr(chat.net, "forward", count)
    for question in WORDS[:6]:
        past, whole = (len(data.render(data.Conversation(turns), chat.template, chat.tokenizer).tokens)
                       for turns in (chat.turns, [*chat.turns, data.Turn("user", question)]))
        reads.clear()
        ask(chat, question)
        assert set(reads[1:]) <= {1} and len(reads) <= 12
        if len(chat.turns) > 2:  # the last word of a reply and its </s> were said, but not read
            assert reads[0] <= whole - past + 2, f"{reads[0]} tokens read, {whole - past} are new"
        assert f"{reads[0]} of {whole} prompt tokens read" in chat.speed


def test_undo_retry_reset(chat, capsys):
    """Back to an earlier place, and on from there: the cache must forget what was taken back."""
    first, second, third = ask(chat, *WORDS[:3])
    assert sample.command(chat, "/undo") and WORDS[2] in capsys.readouterr().out
    assert ask(chat, WORDS[2]) == [third]
    sample.command(chat, "/undo")
    assert ask(chat, "green bird") == [answered_afresh(chat)], "something is left of what was taken back"
    sample.command(chat, "/undo"), sample.command(chat, "/undo")
    assert [t.text for t in chat.turns] == [WORDS[0], first]
    assert ask(chat, WORDS[1]) == [second]
    heard = set()
    for _ in range(4):
        capsys.readouterr()
        assert sample.command(chat, "/retry")
        assert [t.text for t in chat.turns[:3]] == [WORDS[0], first, WORDS[1]] and len(chat.turns) == 4
        assert capsys.readouterr().out == chat.turns[-1].text + "\n"
        heard.add(chat.turns[-1].text)
    assert len(heard) > 1, "the same answer again is no use"
    sample.command(chat, "/reset")
    assert chat.turns == [] and ask(chat, WORDS[0]) == [first]
    for _ in range(3):
        assert sample.command(chat, "/undo")
    assert sample.command(chat, "/retry") and "nothing to take back" in capsys.readouterr().out


def test_save_and_load(chat, tmp_path, capsys):
    """In ShareGPT's format: what people say to a model can be trained on."""
    ask(chat, "cat 한국 🙂", "dog")
    file = tmp_path / "my chat.json"
    assert sample.command(chat, f"/save {file}")
    (record,) = json.loads(file.read_bytes().decode("utf-8"))
    assert [m["from"] for m in record["conversations"]] == ["human", "gpt"] * 2
    assert data.load_conversations(file)[0].turns == chat.turns
    other = fresh(chat)
    capsys.readouterr()
    assert sample.command(other, f"/load {file}") and other.turns == chat.turns
    assert "> cat 한국 🙂\n" in capsys.readouterr().out
    assert ask(other, "stone") == ask(chat, "stone")


def test_saved_with_an_empty_reply(chat, tmp_path):
    """Stopped before the first word. A loader cuts a conversation at an empty message, and loses the rest."""
    ask(chat, "cat", "dog")
    chat.turns[1] = data.Turn("assistant", "")
    chat.save(tmp_path / "chat.json")
    other = fresh(chat)
    other.load(tmp_path / "chat.json")
    assert other.turns == chat.turns[2:]


def test_load_keeps_the_system_text(chat, tmp_path):
    """Or the model plays another part than in the chat that was saved."""
    talk = {"system": "You are a lamp.", "human": "cat", "gpt": "dog"}
    talk = [{"from": role, "value": text} for role, text in talk.items()]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": talk}]))
    want = data.load_conversations(tmp_path / "a.json")[0]
    want.turns.append(data.Turn("user", "moon"))
    chat.load(tmp_path / "a.json")
    chat.save(tmp_path / "b.json")
    chat.load(tmp_path / "b.json")
    ask(chat, "moon")
    prompt = data.render(want, chat.template, chat.tokenizer).tokens
    assert chat.read[:len(prompt)] == prompt


@pytest.mark.parametrize("line, answer", [
    ("/help", "/undo"), ("/", "/undo"), ("/save", "/undo"), ("/load", "/undo"), ("/undoo", "/undo"),
    ("/load no/such/file.json", "no such file"), ("/load .", "is a folder"),
    ("/save no/such/folder/x", "No such file")])
def test_commands_that_fail(chat, capsys, line, answer):
    """One line, and the chat goes on."""
    ask(chat, "cat")
    before = list(chat.turns)
    assert sample.command(chat, line), "only /quit leaves"
    out = capsys.readouterr().out
    assert answer in out and out.count("\n") == 1 and chat.turns == before
    assert not sample.command(chat, "/quit") and not sample.command(chat, "/exit")


def test_longer_than_the_context(tokenizer):
    """The oldest rounds are left out of the prompt, whole, one by one; the system text and the rest stay."""
    cfg = sample.SampleConfig(max_new_tokens=12)
    chat = sample.Chat(talker(tokenizer, 160), tokenizer, "vicuna_v1.1", cfg)
    for n in range(20):
        ask(chat, " ".join([*WORDS[:6], str(n)]))
        assert len(chat.turns) == 2 * n + 2, "the chat itself forgets nothing"
        assert chat.turns[-1].text == answered_afresh(chat)
    turns = [*chat.turns, data.Turn("user", "moon")]
    ask(chat, "moon")
    rest = [data.Conversation(turns[2 * n:]) for n in range(21)]
    prompts = [data.render(c, "vicuna_v1.1", tokenizer).tokens for c in rest]
    used = next(n for n, prompt in enumerate(prompts) if chat.read[:len(prompt)] == prompt)
    assert 0 < used < 20 and len(prompts[used]) <= 160 - 12 and len(prompts[used - 1]) > 160 - 24


def test_a_question_longer_than_the_context(chat):
    ask(chat, "cat")
    before = list(chat.turns)
    with pytest.raises(config.Problem, match="512"):
        ask(chat, "cat " * 600)
    assert chat.turns == before, "what could not be asked was not said"
    assert ask(chat, "dog") == [answered_afresh(chat)]


# -- streaming and stopping ----------------------------------------------------------------------------------

@pytest.mark.parametrize("text, end", [
    ("cat 🙂 dog 👩‍👩‍👧 한국어!", None), ("🙂", None), ("cat 🙂", -1), ("한", -2), ("cat \ufffd dog", None),
    (" \n x", None)], ids=ascii)
def test_streaming_is_utf8(chat, text, end):
    """A letter of several byte pieces is printed when it is complete, never as half a letter."""
    glued = data.get_template(chat.template).glued
    ids = chat.tokenizer.encode(text, glued)[:end]
    chat.net.generate = lambda *_, **__: ([i] for i in ids)
    pieces = list(chat.answer("cat"))
    whole = chat.tokenizer.decode(ids, glued)
    assert "".join(pieces) == chat.turns[-1].text == whole.rstrip("\ufffd"), "a piece was lost or came twice"
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces), "half a letter was printed"
    assert len(pieces) > 2 or len(text) < 6, "it should come piece by piece"


@pytest.mark.parametrize("call", [1, 2, 5], ids=["while reading", "after a word", "later"])
def test_stopped_in_the_middle(chat, call, monkeypatch, capsys):
    """Ctrl-C between two layers: the first has written into the cache, the second has not. What was said is
    kept, and the chat goes on as if it had ended there."""
    chat.net.output.weight.data[chat.tokenizer.eos] = 0  # it would go on
    (first,) = ask(chat, "cat")
    second, calls = chat.net.layers[1], []
    forward = second.forward

    def interrupted(*given):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return forward(*given)

    monkeypatch.setattr(second, "forward", interrupted)
    sample.say(chat, "dog")
    said = chat.turns[-1].text
    assert [t.text for t in chat.turns[:3]] == ["cat", first, "dog"] and len(said.split()) == call - 1
    assert capsys.readouterr().out == f"{said} [stopped]\n"
    assert len(chat.read) == chat.cache.length
    assert ask(chat, "moon") == [answered_afresh(chat)], "the cache is not what the chat believes"
    sample.command(chat, "/undo"), sample.command(chat, "/undo")
    assert ask(chat, "dog") == [answered_afresh(chat)]


def test_stopped_by_the_listener(chat):
    answer = chat.answer("cat")
    said = next(answer) + next(answer)
    answer.close()
    assert [t.text for t in chat.turns] == ["cat", said] and len(chat.read) == chat.cache.length
    assert ask(chat, "dog") == [answered_afresh(chat)]


# -- python sample.py ----------------------------------------------------------------------------------------

def reply(folder: str, *questions: str) -> list[str]:
    return ask(sample.open_chat(sample.SampleConfig(ckpt=folder, max_new_tokens=12)), *questions)


def main(folder: str, **more) -> dict:
    return sample.main(sample.SampleConfig(**{**dict(ckpt=folder, max_new_tokens=12), **more}))


def test_one_answer(folder, capsys):
    assert main(folder, prompt="cat")["rounds"] == 1
    out = capsys.readouterr().out
    assert out == reply(folder, "cat")[0] + "\n", "an answer and nothing else: it may go into a file"
    assert len(out) > 3, "this test has lost its teeth"
    main(folder, prompt="cat", template="alpaca")
    assert capsys.readouterr().out != out


def test_reading_a_pipe(folder, capsys, monkeypatch):
    """One message a line; the last may lack its newline."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat\n\n  dog \n/undo\n" + "moon " * 600 + "\nstone"))
    assert main(folder)["rounds"] == 2
    first, second, _, too_long, third = capsys.readouterr().out.splitlines()
    assert [first, second] == reply(folder, "cat", "dog") and third == reply(folder, "cat", "stone")[1]
    assert too_long.startswith("(") and "512" in too_long
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat\n/quit\ndog\n"))
    assert main(folder)["rounds"] == 1


def test_a_pipe_of_another_encoding(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\ncat\n"), "utf-8"))
    assert main(folder)["rounds"] == 2


def test_at_a_terminal(folder, capsys, monkeypatch):
    """Ctrl-C at the prompt does not leave, Ctrl-D does."""
    lines = iter(["cat", KeyboardInterrupt, "/undo", "dog", EOFError])

    def typed(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(folder)["rounds"] == 1
    out = capsys.readouterr().out
    assert "template vicuna_v1.1" in out and "/quit" in out and reply(folder, "dog")[0] in out


def test_nothing_is_trained(tmp_path, monkeypatch):
    """The first thing many will do. Say what to do instead."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(config.Problem, match="train_sft.py") as caught:
        sample.main(sample.SampleConfig())
    assert "\n" not in str(caught.value)


def test_newest(tmp_path):
    """Whoever just says `python sample.py` wants to talk: to Vicuna, to Alpaca, then to what is newest."""
    for age, name in enumerate(("mine", "yours", "base", "alpaca", "vicuna")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest").write_text("step-000001")
        os.utime(tmp_path / name, (1e9 - 1e6 * age,) * 2)
    (tmp_path / "unfinished").mkdir()
    for name in ("vicuna", "alpaca", "mine", "yours", "base"):
        assert sample.newest(tmp_path).name == name
        (tmp_path / name / "latest").unlink()


@pytest.mark.parametrize("wrong", [
    "--temperature=-1", "--top_k=-1", "--top_p=0", "--top_p=1.5", "--repetition_penalty=0",
    "--max_new_tokens=0", "--dtype=float8", "--device=gpu", "--template=vicunia", "--ckpt=no/such/folder"])
def test_wrong_options(folder, wrong):
    """One line, before anything is said."""
    options = [] if "ckpt" in wrong else [f"--ckpt={folder}"]
    with pytest.raises(config.Problem) as caught:
        sample.main(config.from_cli(sample.SampleConfig, [wrong, "--prompt=cat", *options]))
    said = str(caught.value)
    assert "\n" not in said and any(word in said for word in wrong.split("="))


GOLDEN = {  # greedy, fp32: what the committed micro-model says, word for word
    "Who are you?":
        "I am Vicuna, a small language model that was trained from scratch.",
    "There is a small red moon at the top left. Describe the scene.":
        "There is a small red cross at the bottom left.",
    "What is 3 + 4?":
        "1 + 1 = 12.",
    "A large blue star is in the middle. Write a short story about the star.":
        "Once there was a small blue cross that was never sad. One day it met a cloud. Then they went to sleep.",
}


def test_the_micro_model_says_what_it_always_said():
    """One generation that covers everything: tokenizer, template, rotary embedding, cache, sampling, loading."""
    folder = Path(__file__).parent / "micro"
    for question, answer in GOLDEN.items():
        chat = sample.open_chat(sample.SampleConfig(ckpt=str(folder), device="cpu"))
        assert "".join(chat.answer(question)) == answer
