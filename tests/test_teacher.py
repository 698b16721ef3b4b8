"""Tests of tools/teacher.py: a fake server that fails in every way, checkpoints, the oracle."""

import contextlib
import gzip
import json
import os
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data
import vision
from tools import checkpoint, teacher
from tools.config import UserError
from toy import world

KEY = "sk-very-secret-0123456789"
MICRO = Path(__file__).parent / "micro"


class FakeServer(ThreadingHTTPServer):
    """Speaks OpenAI's chat format, on this machine.

    `script` says what to do with the next requests: (status, message[, headers]), ("text", body),
    ("half",), ("sleep", seconds), ("endless", head, bytes, seconds), None for a good reply, or a
    function from the request to one of these. All requests after that get a good reply.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list = []
        self.requests: list = []  # (headers, body) in the order they came
        self.answered: list = []  # the bodies that got a good reply
        self.says = lambda body: "echo: " + body["messages"][-1]["content"]
        self.finish_reason, self.delay = "stop", 0.0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def good_reply(self, body: dict) -> str:
        choice = dict(message=dict(role="assistant", content=self.says(body)),
                      finish_reason=self.finish_reason)
        return json.dumps(dict(choices=[choice], usage=dict(prompt_tokens=7, completion_tokens=3)))


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        fake = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.requests.append((self.headers, body))
        action = fake.script.pop(0) if fake.script else None
        if callable(action):
            action = action(body)
        kind, *details = action or ("sleep", fake.delay)
        if kind == "endless":
            return self.send_endlessly(*details)
        status, text, headers = 200, fake.good_reply(body), {}
        if kind == "sleep":
            time.sleep(details[0])
            fake.answered.append(body)  # before it is sent: the test may look at once
        elif kind == "text":
            text = details[0]
        elif kind != "half":
            status, text = kind, json.dumps(dict(error=dict(message=details[0])))
            headers = details[1] if len(details) > 1 else {}
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text)),
                                "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write((text[:20] if kind == "half" else text).encode())
        except (BrokenPipeError, ConnectionResetError):  # the client did not wait
            pass

    def send_endlessly(self, head: bytes, chunk: bytes, pause: float) -> None:
        with contextlib.suppress(OSError):  # the client does not wait
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: " + head)
            for _ in range(10 ** 6):
                self.wfile.write(chunk)
                time.sleep(pause)

    def log_message(self, *_):
        pass


@pytest.fixture
def fake(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    server = FakeServer()
    yield server
    server.shutdown()
    server.server_close()


def client(fake, **options) -> teacher.Server:
    settings = dict(temperature=0.0, max_new_tokens=16, timeout=5.0)
    return teacher.Server(f"gpt-4@{fake.url}", **{**settings, **options})


def asking(*texts) -> list[data.Conversation]:
    return [data.Conversation([data.Turn("user", text)]) for text in texts]


# -- a server -------------------------------------------------------------------------------------

def test_request_and_reply(fake):
    ask = client(fake, temperature=0.2, max_new_tokens=99)
    turns = [data.Turn("user", "one"), data.Turn("assistant", "two"),
             data.Turn("user", "three", "with this")]
    replies = ask([data.Conversation(turns, system="Be brief.")])
    assert replies == [teacher.Reply("echo: three\nwith this", True, 7, 3)]
    headers, body = fake.requests[0]
    assert headers["authorization"] == f"Bearer {KEY}" and ask.name.startswith("gpt-4@127.0.0.1:")
    assert body == dict(model="gpt-4", temperature=0.2, max_tokens=99, messages=[
        dict(role="system", content="Be brief."), dict(role="user", content="one"),
        dict(role="assistant", content="two"), dict(role="user", content="three\nwith this")])
    fake.finish_reason = "length"
    assert ask(asking("hello"))[0].ended is False


@pytest.mark.parametrize("failure", [(429, "slow down"), (500, "oops"), ("half",), ("sleep", 0.6)],
                         ids=str)
def test_a_failure_that_may_pass_is_tried_again(fake, failure):
    fake.script = [failure, failure]
    assert [reply.text for reply in client(fake, timeout=0.2)(asking("hello"))] == ["echo: hello"]
    assert len(fake.requests) == 3


def test_a_dead_server_stops_the_run_and_replies_are_kept(fake):
    """A refusal is not tried again. It may quote the key, and the message goes to the terminal."""
    fake.script = [None, None] + [(401, f"Incorrect API key provided: {KEY}")] * 9
    ask, kept = client(fake, workers=1), {}
    with pytest.raises(UserError, match="401.*three requests in a row") as error:
        ask(asking(*"abcdefgh"), kept.__setitem__)
    assert KEY not in str(error.value) + ask.why and "\n" not in str(error.value)
    assert {i: reply.text for i, reply in kept.items()} == {0: "echo: a", 1: "echo: b"}
    assert len(fake.requests) == 2 + 3, "no further request was sent"


def test_bad_replies_do_not_stop_the_others(fake):
    """A proxy's HTML page with status 200 must neither crash the run nor count as a reply."""
    fake.script = [(400, "too long"), None, ("text", "<html>no json</html>"), None,
                   ("text", '{"choices": []}')]  # three, but not in a row
    ask = client(fake, workers=1)
    replies = ask(asking(*"abcdef"))
    assert [reply and reply.text for reply in replies] == [
        None, "echo: b", None, "echo: d", None, "echo: f"]
    assert ask.why.startswith("gpt-4@127.0.0.1:")


REPLY = '{"choices": [{"message": {"content": %s}, "finish_reason": "stop"}], "usage": %s}'


@pytest.mark.parametrize("text, said", [
    (REPLY % (r'"half \ud83d, whole \ud83d\ude42"', "{}"), "half ?, whole 🙂"),
    (REPLY % ('"a"', '{"prompt_tokens": 1e999, "completion_tokens": "7"}'), "a"),
    (REPLY % ('"a"', '{"prompt_tokens": null, "completion_tokens": -1e400}'), "a"),
    (REPLY % ('"a"', "[3]"), "a"),
    (REPLY % ('"a"', '"many"'), "a"),
    (REPLY % ('["a"]', "null"), None),
    (REPLY % ("5", "null"), None),
    (REPLY % ('"a"', "9" * 5000), None),
    ("[" * 100_000, None), ('{"choices":' * 100_000, None), ("", None), ("null", None),
    ('{"choices": {"0": 1}}', None), ('{"error": "\\ud800"}', None), ("\0", None),
], ids=lambda text: str(text)[:30])
def test_whatever_a_server_sends(fake, tmp_path, text, said):
    """A reply or one line. What was paid for is in the file, and the next run can read it: a lone
    surrogate could not be written, a count of `null` or 1e999 not be added up."""
    fake.script = [("text", text)]
    cache, ask = teacher.ReplyCache(tmp_path / "replies.jsonl"), client(fake)
    (reply,) = cache.ask(ask, asking("hello"), [], "test")
    assert (reply and reply.text) == said
    assert said or ask.why.startswith(ask.name) and "\n" not in ask.why
    again = teacher.ReplyCache(tmp_path / "replies.jsonl").ask(ask, asking("hello"), [], "test")
    assert again == [reply] if reply else again[0].text == "echo: hello"


@pytest.mark.parametrize("head", [b"application/json\r\n\r\n", b""], ids=["body", "headers"])
def test_an_answer_that_does_not_end(fake, head):
    """The library's timeout starts anew with every byte. Only the request itself is lost."""
    fake.script = [("endless", head, b" ", 0.02)]
    ask = client(fake, timeout=1, retries=0, workers=1)
    first, second = ask(asking("a", "b"))
    assert first is None and second.text == "echo: b"
    assert ask.why.endswith("no answer in time")


@pytest.mark.parametrize("chunk, encoding", [
    (b" " * 65536, b""), (gzip.compress(bytes(1 << 24)), b"\r\nContent-Encoding: gzip")])
def test_an_answer_that_fills_the_memory(fake, chunk, encoding):
    """It was read until the deadline, a gigabyte in every second."""
    fake.script = [("endless", b"application/json" + encoding + b"\r\n\r\n", chunk, 0)]
    ask = client(fake, timeout=10, retries=0, workers=1)
    first, second = ask(asking("a", "b"))
    assert first is None and second.text == "echo: b"
    assert ask.why.endswith("the answer is larger than 4 MB")


@pytest.mark.parametrize("address", [
    "http://[::1", "http://h:99999/v1", "http://h:a/v1", "http:///v1", "http://me:word@[::1",
    "http://a\x01b/v1"])
def test_a_wrong_address_is_one_line(address):
    """A bracket that was never closed was a traceback. A password is not repeated."""
    pytest.importorskip("openai")
    with pytest.raises(UserError, match="is not the address of a server") as error:
        teacher.teacher(f"gpt-4@{address}")
    assert "word" not in str(error.value)


@pytest.mark.parametrize("known, limit", [("max_completion_tokens", 16), ("", None)])
def test_a_setting_that_the_server_refuses_is_left_out(fake, known, limit, capsys):
    """Reasoning models know max_completion_tokens alone, and no temperature."""
    def refuse(body):
        unknown = [key for key in body if key not in ("model", "messages", known)]
        fake.script.append(refuse)
        return (400, f"Unsupported parameter: '{unknown[0]}'") if unknown else None

    fake.script = [refuse]
    replies = client(fake)(asking(*"abcdefgh"))
    assert [reply.text[-1] for reply in replies] == [*"abcdefgh"]
    assert fake.answered[-1].get("max_completion_tokens") == limit
    assert "temperature" not in fake.answered[-1]
    assert "refuses temperature=0.0" in capsys.readouterr().out


def test_a_prompt_that_is_too_long_is_no_refused_setting(fake):
    fake.script = [(400, "'max_tokens' is too large: 16. The maximum context length is 8 tokens")]
    ask = client(fake)
    assert ask(asking("a")) == [None] and "too large" in ask.why and len(fake.requests) == 1


def test_the_key_is_cut_out_before_the_message_is_shortened(fake):
    """Else its first half stands at the end."""
    for n in range(440, 505, 5):
        fake.script = [(400, "\x1b[31m\n" + "x" * n + KEY + "y" * 99)]
        ask = client(fake)
        ask(asking("a"))
        assert "sk-very" not in ask.why and len(ask.why) < 540 and ask.why.isprintable()


@pytest.mark.parametrize("key", ["sk-two\nlines-0123456", "sk-two words-0123", "schlüssel-012345"])
def test_a_key_that_no_header_can_hold_is_not_quoted(fake, monkeypatch, key):
    """The library printed it: illegal header value b'Bearer sk-...'."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        client(fake)
    assert key[:6] not in str(error.value)


def test_replies_of_another_time_are_skipped(tmp_path):
    """A line that this version cannot use costs nothing but itself."""
    good = dict(key="a", text="Hi.", ended=True)
    lines = ["{", "null", "5", "[]", "{}", '{"key": []}', json.dumps(dict(good, key="b", x=1)),
             "[" * 100_000, json.dumps(good), '{"key": "c", "te']
    (tmp_path / "r.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert teacher.ReplyCache(tmp_path / "r.jsonl").replies == {"a": teacher.Reply("Hi.", True)}


def test_ctrl_c_keeps_open_requests(fake):
    """They were sent, so they are paid for."""
    def interrupt(body):
        os.kill(os.getpid(), signal.SIGINT)

    fake.script, fake.delay, kept = [None, None, interrupt], 1.0, {}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        client(fake, workers=2)(asking(*"abcdefgh"), kept.__setitem__)
    assert 3 <= len(fake.requests) == len(fake.answered) == len(kept) <= 4


def test_only_a_local_server_needs_no_key(fake, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    fake.says = lambda body: "none"  # which stands for the key, but is a word here
    assert client(fake)(asking("hello"))[0].text == "none"
    with pytest.raises(UserError, match="api.example.com needs a key.*OPENAI_API_KEY"):
        teacher.teacher("gpt-4@https://api.example.com/v1")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install openai"):
        teacher.teacher("llama@http://localhost:8080/v1")


def test_a_server_refuses_images(fake):
    seen = data.Conversation([data.Turn("user", "What is this?")], extra={"image": "cat.jpg"})
    with pytest.raises(UserError, match="does not accept"):
        client(fake)([seen])


# -- a checkpoint ---------------------------------------------------------------------------------

def test_a_checkpoint_replies_as_generate_replies_does():
    ask = teacher.Checkpoint(str(MICRO), 0.0, 24, "q4", batch=2)
    chats = asking("Who are you?", "How are you? Is there a red circle?", "What is 3 + 4?")
    kept = {}
    replies = ask(chats, kept.__setitem__)
    net, path, meta = vision.load(MICRO, quantize="q4")
    texts, ended = data.generate_replies(net, data.Tokenizer(path), meta["template"], chats, 24)
    assert [r.text for r in replies] == texts and [r.ended for r in replies] == ended
    assert kept == dict(enumerate(replies))
    assert ask.name.endswith("q4")
    assert any("Quant" in type(part).__name__ for part in ask.net.modules())


def test_a_base_model_reads_plain_text_and_says_one_line(monkeypatch):
    net, path, _ = vision.load(MICRO)
    monkeypatch.setattr(vision, "load", lambda *_, **__: (net, path, dict(template="plain")))
    ask = teacher.teacher(str(MICRO), max_new_tokens=30)
    turns = [data.Turn("user", "There is a red circle."), data.Turn("assistant", "Yes."),
             data.Turn("user", "Where?")]
    joined = asking("There is a red circle.\nYes.\nWhere?\n")
    texts, _ = data.generate_replies(net, ask.tokenizer, "plain", joined, 30)
    assert ask([data.Conversation(turns)])[0].text == texts[0].split("\n")[0].strip() != ""


def test_a_prompt_that_does_not_fit_has_no_reply():
    ask = teacher.teacher(str(MICRO), max_new_tokens=4)
    long, short = ask(asking("red " * 600, "Who are you?"))
    assert long is None and short is not None
    assert re.search(r"\d+ tokens, the context 512", ask.why)


def test_two_trainings_have_two_names(tmp_path):
    """Kept replies belong to a name: those of an earlier training must not be taken for new."""
    net, path, meta = checkpoint.load(MICRO)
    names = []
    for step in (1, 2, 2):
        net.norm.weight.data.fill_(step)
        checkpoint.save(tmp_path / "vicuna", net, {**meta, "step": step}, path)
        names.append(teacher.teacher(str(tmp_path / "vicuna")).name)
    assert names[0] != names[1] == names[2] and names[0].startswith("vicuna:")


# -- the oracle -----------------------------------------------------------------------------------

QUESTIONS = [item.question for item in world.test_set("scenes", 120)]


def test_the_oracle_is_always_right_and_the_noisy_one_mostly():
    asked = [data.Conversation([], extra={"question": q}) for q in QUESTIONS]
    right = {}
    for kind in ("oracle", "noisy"):
        replies = teacher.teacher(kind)(asked)
        right[kind] = sum(world.grade(q, r.text) == 1 for q, r in zip(QUESTIONS, replies))
        assert replies == teacher.teacher(kind)(asked)
    assert right["oracle"] == 120 and 72 < right["noisy"] < 108


def judged(kind: str, question, *answers: str, prompt: str = "rate") -> str:
    extra = dict(question=question, answers=answers)
    asked = data.Conversation([data.Turn("user", prompt)], extra=extra)
    return teacher.teacher(kind)([asked])[0].text


def test_the_oracle_judges_by_truth_and_the_biased_judges_do_not():
    q = next(q for q in QUESTIONS if q.kind == "color" and "color" in q.truth)
    wrong = "It is " + next(c for c in world.COLORS if c not in q.truth["color"])
    twice = q.full + " " + q.full
    assert judged("oracle", q, wrong, q.short).startswith("1 10\n")
    assert judged("oracle", q, q.full, twice).startswith("10 10\n")
    assert judged("oracle", q, wrong, q.full, prompt="a tuple").endswith("\nScores: (1, 10)")
    assert judged("first", q, wrong, wrong).startswith("3 1\n")
    assert judged("longer", q, q.full, twice).startswith("8 10\n")
