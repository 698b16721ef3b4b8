"""Tests of teacher.py: a server that misbehaves in every way (it runs in the test), checkpoints, the oracle.

pytest tests/test_teacher.py
"""

import email.utils
import json
import os
import re
import shutil
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import data
import model
import sample
import teacher
import toy
import train_sft
from config import Problem

KEY = "sk-very-secret-0123456789"
MICRO = Path(__file__).parent / "micro"


class FakeServer:
    """Speaks OpenAI's chat format. `script` holds what to do with the next requests; then all goes well."""

    def __init__(self):
        self.script: list = []
        self.requests: list = []  # (headers, body) of each, in the order they came
        self.answered = []  # one entry for each good reply that was sent
        self.says = lambda body: "echo: " + body["messages"][-1]["content"]
        self.delay = 0.0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append((dict(self.headers), body))
                do = fake.script.pop(0) if fake.script else None
                if callable(do):
                    do = do(body)
                time.sleep(do[1] if do and do[0] == "sleep" else fake.delay)
                good = json.dumps(
                    dict(
                        choices=[
                            dict(
                                message=dict(role="assistant", content=fake.says(body)), finish_reason="stop"
                            )
                        ],
                        usage=dict(prompt_tokens=7, completion_tokens=3),
                    )
                ).encode()
                code, text, headers = 200, good, {}
                if do and isinstance(do[0], int):
                    code, text, headers = (*do, {}, {})[:3] if len(do) > 2 else (do[0], do[1], {})
                    text = text.encode()
                elif do and do[0] == "text":
                    text = do[1].encode()
                try:
                    self.send_response(code)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    if code == 200 and text is good and (not do or do[0] != "half"):
                        fake.answered.append(body)  # before it is read: the test looks as soon as it is
                    self.wfile.write(text[:20] if do and do[0] == "half" else text)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def do_GET(self):  # where a redirection leads
                fake.requests.append((dict(self.headers), {}))
                self.send_error(404)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    server = FakeServer()
    yield server
    server.close()


def client(fake, **options):
    return teacher.teacher(f"gpt-4@{fake.url}", **{"timeout": 5.0, "pause": 0.01, **options})


def asking(*texts, system=None):
    return [data.Conversation([data.Turn("user", t)], system=system) for t in texts]


# -- a server ------------------------------------------------------------------------------------------------


def test_what_is_sent_and_what_comes_back(fake):
    ask = client(fake, temperature=0.2, max_new_tokens=99)
    chat = data.Conversation(
        [data.Turn("user", "one"), data.Turn("assistant", "two"), data.Turn("user", "three", "with this")],
        system="Be brief.",
    )
    assert ask([chat]) == [teacher.Reply("echo: three\nwith this", True, 7, 3)]
    headers, body = fake.requests[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == dict(
        model="gpt-4",
        temperature=0.2,
        max_tokens=99,
        messages=[
            dict(role="system", content="Be brief."),
            dict(role="user", content="one"),
            dict(role="assistant", content="two"),
            dict(role="user", content="three\nwith this"),
        ],
    )
    assert (ask.read, ask.written, ask.retries, ask.name) == (7, 3, 0, "gpt-4@127.0.0.1")


@pytest.mark.parametrize(
    "trouble",
    [
        (429, "slow down"),
        (500, "oops"),
        (503, ""),
        (529, "overloaded"),
        ("half",),
        ("text", "<html>no json</html>"),
        ("text", '{"error": "odd"}'),
        ("text", '{"choices": []}'),
        ("text", '{"choices": [{"message": null}]}'),
        ("text", "[]"),
        ("text", '"choices"'),
        ("sleep", 0.6),
    ],
    ids=str,
)
def test_what_passes_is_tried_again(fake, trouble):
    fake.script = [trouble, trouble]
    ask = client(fake, timeout=0.2)
    assert [r.text for r in ask(asking("hello"))] == ["echo: hello"]
    assert ask.retries == 2 and len(fake.requests) == 3
    assert (ask.read, ask.written) == (7, 3)


def test_retry_after_is_kept_to_by_all(fake):
    fake.script = [(429, "slow down", {"Retry-After": "0.5"})]
    start = time.monotonic()
    assert all(client(fake, workers=1)(asking("a", "b")))
    assert time.monotonic() - start >= 0.5
    assert len(fake.requests) == 3


def test_retry_after_may_be_a_date_or_nonsense():
    assert teacher.seconds_of(None) is None and teacher.seconds_of("soon") is None
    assert teacher.seconds_of("7") == 7
    assert 3 < teacher.seconds_of(email.utils.formatdate(time.time() + 5, usegmt=True)) <= 5
    assert teacher.seconds_of(email.utils.formatdate(0, usegmt=True)) == 0
    assert teacher.seconds_of("999999") == 600


@pytest.mark.parametrize("code", [400, 401, 403, 404])
def test_a_refusal_is_not_tried_again_and_does_not_show_the_key(fake, code):
    fake.script = [(code, f"Incorrect API key provided: {KEY}")] * 9
    kept = []
    ask = client(fake, workers=1)
    with pytest.raises(Problem, match=f"HTTP {code}.*three requests in a row") as error:
        ask(asking(*"abcdefg"), lambda i, reply: kept.append(i))
    assert KEY not in str(error.value) and KEY not in ask.why
    assert len(fake.requests) == 3 and kept == []


def test_no_money_left_is_said_at_once(fake):
    fake.script = [(429, '{"error": {"code": "insufficient_quota"}}')]
    ask = client(fake)
    assert ask(asking("hello")) == [None] and "insufficient_quota" in ask.why and ask.retries == 0


def test_a_key_in_an_answer_is_taken_out(fake):
    fake.says = lambda body: f"you sent {KEY}, did you not?"
    assert client(fake)(asking("hello"))[0].text == "you sent [key], did you not?"


def test_a_dead_server_stops_the_run_but_not_what_was_kept(fake):
    fake.script = [None, None] + [(500, "dead")] * 99
    kept = {}
    with pytest.raises(Problem, match="did not answer in 2 tries.*HTTP 500.*same command goes on"):
        client(fake, workers=1, tries=2)(asking(*"abcdefgh"), kept.__setitem__)
    assert [kept[i].text for i in sorted(kept)] == ["echo: a", "echo: b"]
    assert len(fake.requests) == 2 + 3 * 2  # the rest was not begun


def test_one_bad_question_does_not_stop_the_others(fake):
    fake.script = [lambda body: (400, "too long") if "bad" in str(body) else None] * 6
    ask = client(fake, workers=1)
    assert [r and r.text for r in ask(asking("a", "bad", "c", "bad", "e", "f"))] == [
        "echo: a",
        None,
        "echo: c",
        None,
        "echo: e",
        "echo: f",
    ]
    assert "too long" in ask.why


def test_ctrl_c_keeps_what_is_under_way(fake):
    fake.delay = 0.5
    kept = {}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with Ctrl-C ignored
    threading.Timer(0.25, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        client(fake, workers=2)(asking(*"abcdefgh"), kept.__setitem__)
    assert len(fake.requests) == len(fake.answered) == len(kept) <= 4


def test_requests_a_minute_are_limited(fake):
    start = time.monotonic()
    client(fake, per_minute=300)(asking("a", "b", "c"))  # 0.2 s apart
    assert 0.4 <= time.monotonic() - start


def test_keys_are_needed_far_away_only_and_do_not_follow_a_redirection(fake, monkeypatch):
    other = FakeServer()
    try:
        fake.script = [(302, "", {"Location": other.url})]
        client(fake, tries=1)(asking("hello"))
        assert KEY in str(fake.requests) and other.requests and KEY not in str(other.requests)
    finally:
        other.close()
    monkeypatch.delenv("OPENAI_API_KEY")
    client(fake)(asking("hello"))
    assert "Authorization" not in fake.requests[-1][0]
    with pytest.raises(Problem, match="api.example.com needs a key.*OPENAI_API_KEY"):
        teacher.teacher("gpt-4@https://api.example.com/v1")


def test_pictures_are_refused_by_who_cannot_see(fake):
    seen = data.Conversation([data.Turn("user", "What is this?")], extra={"image": "cat.jpg"})
    for ask in (client(fake), teacher.teacher(str(MICRO))):
        with pytest.raises(Problem, match="cannot see"):
            ask([seen])


# -- a checkpoint --------------------------------------------------------------------------------------------


def test_a_checkpoint_answers_as_data_chat_does():
    ask = teacher.Checkpoint(str(MICRO), 0.0, 24, batch=2)
    chats, kept = asking("Who are you?", "How are you? Is there a red circle?", "What is 3 + 4?"), {}
    replies = ask(chats, kept.__setitem__)
    net, path, meta = model.load(MICRO)
    texts, ended = data.chat(net, data.Tokenizer(path), meta["template"], chats, 24)
    assert [r.text for r in replies] == texts and [r.ended for r in replies] == ended
    assert kept == dict(enumerate(replies))


def test_a_base_model_reads_plain_text_and_says_one_line(tmp_path):
    shutil.copytree(MICRO, tmp_path / "base")
    meta = json.loads((tmp_path / "base" / "meta.json").read_text())
    (tmp_path / "base" / "meta.json").write_text(json.dumps({**meta, "template": "plain"}))
    ask = teacher.teacher(str(tmp_path / "base"), max_new_tokens=30)
    chat = data.Conversation(
        [
            data.Turn("user", "There is a red circle."),
            data.Turn("assistant", "Yes."),
            data.Turn("user", "Where?"),
        ]
    )
    joined = data.Conversation([data.Turn("user", "There is a red circle.\nYes.\nWhere?\n")])
    expected = data.chat(ask.net, ask.tokenizer, "plain", [joined], 30)[0][0].split("\n")[0]
    assert expected.strip() == ask([chat])[0].text != ""
    items = toy.test_set("scenes", 3)  # the table of train_sft.py asks it the same
    chats = [data.Conversation([data.Turn(*turn) for turn in item.turns]) for item in items]
    said, _ = train_sft.model_player(ask.net, ask.tokenizer, "lines")(items)
    assert [r.text for r in teacher.Checkpoint(str(tmp_path / "base"), 0.0, 64)(chats)] == [text.strip() for text in said]


def test_a_checkpoint_in_four_bits_answers_as_the_chat_does():
    ask = teacher.teacher(str(MICRO), max_new_tokens=24, quantize="q4")
    chat = sample.open_chat(sample.SampleConfig(ckpt=str(MICRO), max_new_tokens=24, device="cpu", quantize="q4"))
    assert ask(asking("Who are you?"))[0].text == "".join(chat.answer("Who are you?")).strip()
    assert ask.name.endswith(":q4") and any("Quant" in type(part).__name__ for part in ask.net.modules())


def test_what_does_not_fit_is_left_unanswered():
    ask = teacher.teacher(str(MICRO), max_new_tokens=4)
    long, short = ask(asking("red " * 600, "Who are you?"))
    assert long is None and short is not None and re.search(r"\d+ tokens does not fit into 512", ask.why)


def test_two_trainings_have_two_names(tmp_path):
    net, path, meta = model.load(MICRO)
    names = []
    for step in (1, 2):
        with torch.no_grad():
            net.norm.weight += 0.1
        model.save(tmp_path / "vicuna", net, {**meta, "step": step}, path)
        names.append(teacher.teacher(str(tmp_path / "vicuna")).name)
    assert names[0] != names[1] and all(n.startswith("vicuna:") for n in names)
    assert teacher.teacher(str(tmp_path / "vicuna")).name == names[1]


# -- the oracle ----------------------------------------------------------------------------------------------

ITEMS = toy.test_set("scenes", 120)


def test_the_oracle_is_right_and_the_noisy_one_mostly():
    asked = [data.Conversation([], extra={"question": item.question}) for item in ITEMS]
    right = lambda kind: [
        toy.grade(i.question, r.text) == 1 for i, r in zip(ITEMS, teacher.teacher(kind)(asked))
    ]
    assert all(right("oracle"))
    assert 0.6 < sum(right("noisy")) / len(ITEMS) < 0.9
    assert right("noisy") == right("noisy")


def judged(kind: str, question: toy.Question, *answers: str, prompt: str = "rate") -> str:
    return teacher.teacher(kind)(
        [data.Conversation([data.Turn("user", prompt)], extra=dict(question=question, answers=answers))]
    )[0].text


def test_the_oracle_rates_truth_and_its_crooked_brothers_something_else():
    q = next(i.question for i in ITEMS if i.question.kind == "color" and "color" in i.question.truth)
    wrong = "It is " + next(c for c in toy.COLORS if c not in q.truth["color"])
    assert judged("oracle", q, q.full, wrong).startswith("10 1\n")
    assert judged("oracle", q, wrong, q.short).startswith("1 10\n")
    assert judged("oracle", q, q.full, q.full + " " + q.full).startswith("10 10\n")
    assert judged("oracle", q, wrong, q.full, prompt="a Python tuple").endswith("\nScores: (1, 10)")
    assert judged("first", q, q.full, q.full).startswith("10 8\n")
    assert judged("first", q, wrong, wrong).startswith("3 1\n")
    assert judged("longer", q, q.full, q.full + " " + q.full).startswith("8 10\n")
    assert judged("longer", q, q.full, q.full).startswith("10 10\n")


def test_the_oracle_knows_nothing_but_the_toy_world():
    with pytest.raises(Problem, match="toy world only"):
        teacher.teacher("oracle")(asking("Who won the cup?"))
