"""Tests of sample.py: the chat, its cache, its window, its commands. The model is tiny and random,
and says only words."""

import io
import os
import sys
from pathlib import Path

import pytest
import torch

import data
import model
import sample
from tools import checkpoint, config, terminal
from tools.config import UserError
from toy import world

WORDS = "cat dog red house tree river stone bird cloud lamp green moon".split()
MICRO = Path(__file__).parent / "micro"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = [f"USER: {a} {b} ASSISTANT: {b} {a}" for a in WORDS for b in WORDS]
    lines += [data.TEMPLATES[name].system for name in ("vicuna_v1.1", "alpaca")] * 50
    return data.train_tokenizer(lines, 500, tmp_path_factory.mktemp("sample") / "words.model")


def talker(tokenizer):
    """A random network that can only say WORDS and </s>. A reply of whole words can be encoded in
    one way only, so that reading it in the next prompt gives the ids that were written."""
    c = model.LLaMAConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48,
                          vocab_size=tokenizer.vocab_size, max_seq_len=512)
    net = model.LLaMA(c).eval()
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
    cfg = sample.SampleConfig(max_new_tokens=12)
    return sample.Chat(talker(tokenizer), tokenizer, request.param, cfg)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A trained model, as train_sft.py leaves it behind."""
    meta, out = dict(step=1, template="vicuna_v1.1", window=300), tmp_path / "out" / "vicuna"
    return str(checkpoint.save(out, talker(tokenizer), meta, tokenizer.path).parent)


def ask(chat, *questions: str) -> list[str]:
    return ["".join(chat.answer(question)) for question in questions]


def fresh(chat):
    """A new chat with the same model: nothing read, nothing said."""
    return sample.Chat(chat.net, chat.tokenizer, chat.template, chat.cfg, chat.window)


def answered_afresh(chat) -> str:
    """The last reply again, by a chat that has to read the whole history first."""
    other = fresh(chat)
    other.turns, other.system = chat.turns[:-2], chat.system
    return ask(other, chat.turns[-2].text)[0]


def never_ends(chat) -> None:
    chat.net.output.weight.data[chat.tokenizer.eos] = 0


def say(chat, ids: list[int]) -> None:
    """The network will say these tokens, whatever it is asked."""
    chat.net.generate = lambda *_, **__: ([i] for i in ids)


# -- the chat -------------------------------------------------------------------------------------

def test_cache_changes_nothing(chat):
    """What was read once is not read again. Off by one token anywhere, and replies drift after some
    turns."""
    said = []
    for question in WORDS:
        said += ask(chat, question + " and stone")
        assert said[-1] == answered_afresh(chat), f"round {len(said)} depends on the cache"
        assert len(chat.cached) == chat.cache.length, "the cache is not what the chat believes"
    lengths = [len(reply.split()) for reply in said]
    assert len(set(said)) > 4 and max(lengths) == 12 > min(lengths), "this test cannot fail"


def test_a_turn_reads_only_what_is_new(chat):
    """Reading everything again makes each turn of a long chat slower than the one before."""
    ask(chat, *WORDS[:5])
    held = len(chat.cached)
    ask(chat, "cat")
    asked = data.Conversation(chat.turns[:-1])
    whole = len(data.render(asked, chat.template, chat.tokenizer).tokens)
    assert f"{whole - held} of {whole} prompt tokens" in chat.speed


def test_undo_retry_reset(chat, capsys):
    """Back to an earlier turn, and on from there: the cache must forget what was taken back."""
    first, _, third = ask(chat, *WORDS[:3])
    terminal.command(chat, "/undo")
    assert WORDS[2] in capsys.readouterr().out
    assert ask(chat, WORDS[2]) == [third]
    terminal.command(chat, "/undo")
    assert ask(chat, "green bird") == [answered_afresh(chat)], "something was not taken back"
    heard, before = set(), chat.turns[:-1]
    for _ in range(4):
        terminal.command(chat, "/retry")
        assert chat.turns[:-1] == before
        assert capsys.readouterr().out.endswith(chat.turns[-1].text + "\n")
        heard.add(chat.turns[-1].text)
    assert len(heard) > 1, "the same answer again is no use"
    terminal.command(chat, "/reset")
    assert chat.turns == [] and ask(chat, WORDS[0]) == [first]
    terminal.command(chat, "/undo")
    with pytest.raises(UserError, match="nothing to retry"):
        terminal.command(chat, "/retry")


def test_a_retry_that_fails_keeps_the_answer(chat):
    """It was taken back before the new one was asked for."""
    ask(chat, *WORDS[:2])
    before = list(chat.turns)
    chat.window, chat.cached = 8, []
    chat.cache = model.KVCache(chat.net.config, 1, 8, torch.float32, "cpu")  # too short
    with pytest.raises(UserError, match=" 8"):
        terminal.command(chat, "/retry")
    assert chat.turns == before


def test_save_and_load(chat, tmp_path, capsys):
    """In ShareGPT's format: what people say to a model can be trained on. Without its system text,
    the model would play another part."""
    chat.system = "Be brave!"
    ask(chat, "cat 한국 🙂", "dog")
    file = tmp_path / "my chat.json"
    terminal.command(chat, f"/save {file}")
    assert data.load_conversations(file)[0].turns == chat.turns
    other = fresh(chat)
    ask(other, "bird")
    terminal.command(other, f"/load {file}")
    assert other.turns == chat.turns and "> cat 한국 🙂\n" in capsys.readouterr().out
    assert ask(other, "stone") == ask(chat, "stone")
    assert "Be brave!" in chat.tokenizer.decode(other.cached)


# -- commands -------------------------------------------------------------------------------------

def printed(chat, capsys, line: str) -> str:
    capsys.readouterr()
    terminal.command(chat, line)
    return capsys.readouterr().out


def test_help_and_typos(chat, capsys):
    """A typo got the list of all commands, without a word on what they do."""
    lines = printed(chat, capsys, "/help").splitlines()
    for name in terminal.COMMANDS:
        (line,) = [line for line in lines if line.split()[0] == name]
        assert len(line[22:]) > 5 and len(line) <= 80
    for typed, message in (("/sve a.json", "did you mean /save?"), ("/xyzzy", "/help lists"),
                           ("/save", "needs a file"), ("/undo 2", "takes no argument")):
        with pytest.raises(UserError, match=message):
            terminal.command(chat, typed)


def test_settings_change_in_the_chat(chat, capsys):
    """It took a new start with --temperature, and the chat was gone."""
    listed = printed(chat, capsys, "/set")
    assert "temperature 0.0 " in listed and len(listed.splitlines()) == len(terminal.SETTINGS)
    assert printed(chat, capsys, "/set max_new_tokens").startswith("max_new_tokens 12 ")
    never_ends(chat)
    assert len(ask(chat, "cat")[0].split()) == 12
    assert printed(chat, capsys, "/set max_new_tokens 5").startswith("max_new_tokens 5 ")
    assert len(ask(chat, "cat")[0].split()) == 5
    terminal.command(chat, "/set temperature=1.5")
    assert chat.cfg.temperature == 1.5
    before = chat.cfg
    for wrong, message in (("temperature hot", "expected float"), ("top_p 2", "at most 1"),
                           ("temprature 1", "did you mean temperature?"), ("port 1", "no setting"),
                           ("top_k -1", "at least 0"), ("temperature nan", "finite")):
        with pytest.raises(UserError, match=message) as error:
            terminal.command(chat, f"/set {wrong}")
        assert "\n" not in str(error.value) and "--" not in str(error.value)
    assert chat.cfg == before


def test_the_system_text_changes_in_the_chat(chat, capsys):
    template = data.TEMPLATES[chat.template].system
    assert template in printed(chat, capsys, "/system")
    ask(chat, "cat")
    printed(chat, capsys, "/system Be  brave ~ now!")
    assert "Be  brave ~ now!" in printed(chat, capsys, "/system")
    ask(chat, "dog")
    read = chat.tokenizer.decode(chat.cached)
    assert "Be  brave ~ now!" in read and template not in read
    assert "(no system text)" in printed(chat, capsys, '/system ""')
    terminal.command(chat, "/reset")
    assert template in printed(chat, capsys, "/system")


def test_a_file_in_the_home_folder(chat, tmp_path, monkeypatch):
    """~/chat.json was looked for in a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    ask(chat, "cat")
    terminal.command(chat, "/save ~/chat.json")
    assert (tmp_path / "chat.json").exists()
    other = fresh(chat)
    terminal.command(other, "/load ~/chat.json")
    assert other.turns == chat.turns
    chat.open_picture = lambda path: sample.Picture(path, 1, None)
    terminal.command(chat, "/image ~/cat.png")
    assert chat.pending.path == str(tmp_path / "cat.png")


def test_an_example_of_the_toy_world(chat, capsys):
    """What can one ask a model of a world one does not know? The scene is told, and it was not in
    the training data; a base model gets a sentence to complete. A model of another world does not
    know what a scene is."""
    micro = sample.open_chat(sample.SampleConfig(ckpt=str(MICRO), device="cpu"))
    for _ in range(5):
        shown = printed(micro, capsys, "/example")
        scene = world.objects_in(shown)
        assert len(scene) == 2 and world.split_of(tuple(scene)) == "scenes"
        assert ask(micro, shown.removeprefix("try: "))
    micro.template = "plain"
    shown = printed(micro, capsys, "/example")
    assert len(world.objects_in(shown)) == 2 and shown.rstrip()[-1].isalpha()
    with pytest.raises(UserError, match="toy world"):
        terminal.command(chat, "/example")


def test_why_shows_what_else_could_have_been_said(chat, capsys):
    """For each token of the last answer: its probability where it stands, and the likeliest others.
    Off by one, it would explain the token before."""
    for question in ("cat", "dog"):  # the second with a cache
        ask(chat, question)
    lines = printed(chat, capsys, "/why").splitlines()[1:]
    prompt, reply = chat.reply_prompt, chat.reply_ids
    assert len(lines) == len(reply) > 3
    for i, (token, line) in enumerate(zip(reply, lines)):
        logits = chat.net(torch.tensor([prompt + reply[:i]]))[0, -1]
        top = logits.softmax(-1).topk(4)
        assert top.indices[0] == token, "greedy: the likeliest one was said"
        words = line.split()
        assert words[0] == chat.spell(token).replace(" ", "·")
        assert words[1] == f"{top.values[0]:.1%}"
        others = zip(top.indices[1:].tolist(), top.values[1:].tolist())
        expected = [(chat.spell(t).replace(" ", "·"), f"{p:.1%}") for t, p in others if p >= 0.0005]
        assert list(zip(words[2::2], words[3::2])) == expected
    for gone in ("/undo", "/reset"):
        terminal.command(chat, gone)
        with pytest.raises(UserError, match="no answer to explain"):
            terminal.command(chat, "/why")


def test_a_completion_follows_its_prompt(tokenizer, capsys):
    """A base model goes on with the user's text. Without that text, its first words read like an
    answer that makes no sense."""
    cfg = sample.SampleConfig(max_new_tokens=12)
    chat = sample.Chat(talker(tokenizer), tokenizer, "plain", cfg)
    terminal.print_answer(chat, chat.answer("cat and"))
    assert capsys.readouterr().out == "cat and" + chat.turns[-1].text + "\n"
    shown = printed(chat, capsys, "/retry")
    assert shown == "cat and" + chat.turns[-1].text + "\n"


# -- the window -----------------------------------------------------------------------------------

def small_chat(tokenizer, max_new_tokens: int = 12, window: int = 64):
    """The context of the model is longer than 64 tokens, but it was trained on 64."""
    cfg = sample.SampleConfig(max_new_tokens=max_new_tokens)
    chat = sample.Chat(talker(tokenizer), tokenizer, "vicuna_v1.1", cfg, window)
    chat.system = ""
    return chat


def test_old_rounds_leave_the_window(tokenizer):
    """The user is told, and there is room for the reply. The chat itself forgets nothing."""
    chat = small_chat(tokenizer)
    for n in range(8):  # two rounds fit
        (reply,) = ask(chat, f"{WORDS[n]} and stone")
        assert len(chat.turns) == 2 * n + 2 and reply == answered_afresh(chat)
        assert not any("cut, because" in notice for notice in chat.notices)
    assert "no longer sees 6 earlier rounds" in chat.notices[0]


def test_a_long_chat_costs_per_turn_what_the_turn_costs(tokenizer, monkeypatch):
    """Each turn dropped one round more, so that the whole prompt was read again; and to find out
    how many, the chat was rendered once for each dropped round: 0.7 s in the 300th turn."""
    chat = small_chat(tokenizer, max_new_tokens=4, window=128)
    encoded, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda *args: encoded.append(1) or encode(*args))
    read, forward = [], chat.net.forward

    def compare_with_uncached(tokens, *args, **kwargs):
        logits = forward(tokens, *args, **kwargs)
        if tokens.shape[1] > 1:  # a prompt, or what was new in it
            read.append(tokens.shape[1])
            whole = torch.tensor([chat.prompt()])
            torch.testing.assert_close(logits[:, -1], forward(whole)[:, -1], rtol=0, atol=1e-4)
        return logits

    monkeypatch.setattr(chat.net, "forward", compare_with_uncached)
    for n in range(120):
        ask(chat, f"{WORDS[n % 12]} and stone")
    said = data.render(data.Conversation(chat.turns, system=""), chat.template, tokenizer).tokens
    assert len(said) > 8 * 128, "this test cannot fail"
    assert sum(read) < 3 * len(said) and sorted(read)[len(read) // 2] < 30
    encoded.clear()
    ask(chat, "moon")
    assert len(encoded) < 15 * len(chat.turns), "the chat was rendered for each dropped round"


def test_an_answer_that_is_cut_says_so(tokenizer, capsys):
    """And why. One that ended by itself says nothing. Notices go to stderr: stdout may be a
    file."""
    chat = small_chat(tokenizer, max_new_tokens=60)
    never_ends(chat)
    terminal.print_answer(chat, chat.answer("cat"))
    full = "cut, because the context of 64 tokens is full"
    assert capsys.readouterr() == (chat.turns[-1].text + "\n", f"({full})\n")
    chat.cfg.max_new_tokens = 4
    ask(chat, "dog")
    assert chat.notices[-1] == "cut at max_new_tokens=4"
    say(chat, [*tokenizer.encode("cat dog red"), tokenizer.eos])
    chat.reset()
    assert ask(chat, "moon") == ["cat dog red"] and chat.notices == []


# -- streaming and stopping -----------------------------------------------------------------------

@pytest.mark.parametrize("text, end", [
    ("cat 🙂 dog 👩‍👩‍👧 한국어!", None), ("한", -2), (" \n x", None)], ids=ascii)
def test_streaming_is_utf8(chat, text, end):
    """A character of several byte pieces is printed when it is complete, never half of it."""
    continues = data.get_template(chat.template).reply_continues
    ids = chat.tokenizer.encode(text, continues)[:end]
    say(chat, ids)
    pieces = list(chat.answer("cat"))
    whole = chat.tokenizer.decode(ids, continues).rstrip("\ufffd")
    assert "".join(pieces) == chat.turns[-1].text == whole, "a piece was lost or came twice"
    assert not any("\ufffd" in piece for piece in pieces), "half a character was printed"
    assert len(pieces) > 2 or len(text) < 6, "it should come piece by piece"


def test_an_end_that_is_text_is_not_shown(tokenizer):
    """### ends a reply of Vicuna v0. Nothing is printed that may be its beginning, and what follows
    it is not generated."""
    chat = sample.Chat(talker(tokenizer), tokenizer, "vicuna_v0", sample.SampleConfig())
    ids = iter(tokenizer.encode("cat # dog\n### Human: moon"))
    say(chat, ids)
    assert ask(chat, "cat") == [chat.turns[-1].text] == ["cat # dog"] and chat.notices == []
    assert list(ids), "it has not read them all"
    say(chat, tokenizer.encode("# cat\n#"))  # cut there: it was no end
    assert ask(chat, "cat") == [chat.turns[-1].text] == ["# cat\n#"]


@pytest.mark.parametrize("call", [1, 2], ids=["while reading", "after a word"])
def test_stopped_in_the_middle(chat, call, monkeypatch, capsys):
    """Ctrl-C between two layers: the first has written into the cache, the second has not. What was
    said is kept, and the chat continues as if it had ended there."""
    never_ends(chat)
    (first,) = ask(chat, "cat")
    second, calls = chat.net.layers[1], []
    forward = second.forward

    def interrupted(*given):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return forward(*given)

    monkeypatch.setattr(second, "forward", interrupted)
    terminal.print_answer(chat, chat.answer("dog"))
    said = chat.turns[-1].text
    assert [t.text for t in chat.turns[:3]] == ["cat", first, "dog"]
    assert len(said.split()) == call - 1
    assert capsys.readouterr() == (f"{said} [stopped]\n", "")
    assert ask(chat, "moon") == [answered_afresh(chat)], "the cache is not what the chat believes"


# -- python sample.py -----------------------------------------------------------------------------

def reply(folder: str, *questions: str) -> list[str]:
    return ask(sample.open_chat(sample.SampleConfig(ckpt=folder, max_new_tokens=12)), *questions)


def main(folder: str, **options) -> dict:
    return sample.main(sample.SampleConfig(ckpt=folder, max_new_tokens=12, **options))


def test_one_answer(folder, capsys):
    assert main(folder, prompt="cat")["rounds"] == 1
    out = capsys.readouterr().out
    assert out == reply(folder, "cat")[0] + "\n", "nothing but the answer: it may go into a file"
    assert len(out) > 3, "this test cannot fail"


def pipe(folder: str, lines: list[str], monkeypatch) -> None:
    """python sample.py < lines"""
    stdin = io.BytesIO("\n".join(lines).encode("latin-1"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin, "utf-8"))
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--ckpt={folder}", "--max_new_tokens=12"])
    config.run(sample.main, sample.SampleConfig)


def test_reading_a_pipe(folder, capsys, monkeypatch):
    """One message per line; the last may lack its newline. Neither a question that is too long nor
    another encoding nor a mistyped command ends the chat."""
    lines = ["cat", "", "  dog ", "/undo", "moon " * 600, "/load no/file", "/image cat.jpg",
             "/undoo", "stone", "caf\xe9"]
    pipe(folder, lines, monkeypatch)
    out, err = capsys.readouterr()
    first, second, _, third, _ = out.splitlines()
    assert [first, second] == reply(folder, "cat", "dog")
    assert third == reply(folder, "cat", "stone")[1]
    assert "did you mean /undo?" in err and "No such file" in err and "cannot see" in err
    assert "context of 300" in err, "the window comes from the checkpoint"


@pytest.fixture
def at_terminal(monkeypatch, tmp_path):
    """Types lines, or raises what is typed instead, such as EOFError for Ctrl-D."""
    def typed(prompt: str) -> str:
        line = next(lines, None)
        assert line is not None, "it should have ended"
        if not isinstance(line, str):
            raise line
        return line

    def at_terminal(folder: str, *given) -> dict:
        nonlocal lines
        lines = iter(given)
        return main(folder)

    lines = iter(())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    return at_terminal


def test_at_a_terminal(folder, at_terminal, capsys):
    """Ctrl-C at the prompt does not leave, Ctrl-D does."""
    assert at_terminal(folder, "cat", KeyboardInterrupt, "/undo", "dog", EOFError)["rounds"] == 1
    assert reply(folder, "dog")[0] in capsys.readouterr().out


def test_quit_and_exit_need_no_slash(folder, at_terminal, capsys, monkeypatch):
    """Who wants to leave was answered by the model. In a pipe, they are messages: a file of
    questions was cut there without a word."""
    for word in ("quit", "exit", "/quit", "/exit"):
        assert at_terminal(folder, "cat", word)["rounds"] == 1  # the next line would be an error
    capsys.readouterr()
    pipe(folder, ["quit", "cat"], monkeypatch)
    assert capsys.readouterr().out.splitlines() == reply(folder, "quit", "cat")


def test_a_message_of_several_lines(folder, at_terminal, capsys, monkeypatch):
    """It was answered line by line. Between its quotation marks, / is no command, and indentation
    stays. Ctrl-C drops it; in a pipe, the end of the input ends it."""
    seen, answer = [], sample.Chat.answer
    monkeypatch.setattr(sample.Chat, "answer",
                        lambda chat, text: seen.append(text) or answer(chat, text))
    at_terminal(folder, '"""cat', "  /undo", "", 'dog"""', '"""', "red", '"""  ', '"""tree"""',
                '"""lamp', KeyboardInterrupt, "green", EOFError)
    assert seen == ["cat\n  /undo\n\ndog", "red", "tree", "green"]
    seen.clear()
    pipe(folder, ['"""cat', "dog"], monkeypatch)
    assert seen == ["cat\ndog"]


def test_lines_are_remembered(folder, at_terminal, tmp_path, monkeypatch):
    """In the user's folder for state. A folder that cannot be written ended the chat."""
    readline = pytest.importorskip("readline")

    def remembered() -> list[str]:
        count = readline.get_current_history_length()
        return [readline.get_history_item(i + 1) for i in range(count)]

    before = remembered()
    try:
        with terminal.history():
            readline.clear_history()
            readline.add_history("Who are you? 한국")
        readline.clear_history()
        with terminal.history():
            assert remembered() == ["Who are you? 한국"]
        assert "Who are you?" in (tmp_path / "state" / "nanovicuna" / "history").read_text("utf-8")
        monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/no")
        assert at_terminal(folder, "cat", EOFError)["rounds"] == 1
    finally:
        readline.clear_history()
        for line in before:
            readline.add_history(line)


def test_newest(tmp_path):
    """Who just says `python sample.py` wants to talk: to Vicuna, to Alpaca, then to the newest. Who
    has trained nothing is told what to do."""
    for age, name in enumerate(("mine", "yours", "base", "alpaca", "vicuna")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest").write_text("step-000001")
        os.utime(tmp_path / name, (1e9 - 1e6 * age,) * 2)
    (tmp_path / "unfinished").mkdir()
    for name in ("vicuna", "alpaca", "mine", "yours", "base"):
        assert sample.default_checkpoint(tmp_path).name == name
        (tmp_path / name / "latest").unlink()
    with pytest.raises(UserError, match="python train_sft.py"):
        sample.default_checkpoint(tmp_path)


GOLDEN = {  # greedy, fp32: what the committed model says, word for word
    "Who are you?":
        "I am Vicuna, a small language model that was trained from scratch.",
    "A large blue star is in the middle. Write a short story about the star.":
        "Once there was a small blue cross that was never sad. One day it met a cloud. "
        "Then they went to sleep.",
}


def test_the_micro_model_says_what_it_always_said():
    """One generation that covers everything: tokenizer, template, rotary embedding, cache,
    sampling, loading."""
    for question, answer in GOLDEN.items():
        chat = sample.open_chat(sample.SampleConfig(ckpt=str(MICRO), device="cpu"))
        assert ask(chat, question) == [answer]
