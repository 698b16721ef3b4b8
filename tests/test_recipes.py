"""Tests of recipes/: what is kept, changed and dropped, and what the commands write.

    pytest tests/test_recipes.py
    NANOVICUNA_DATA=FOLDER pytest tests/test_recipes.py    # also with real files

FOLDER holds seed_tasks.jsonl (Stanford Alpaca) and oasst_en_100_trees.jsonl (Open-Assistant).
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import data
from conftest import ROOT
from recipes import evol_instruct, identity, koala, openassistant, self_instruct, sharegpt
from test_data import conversation, real
from test_data_files import check_reasons, write
from test_teacher import fake  # noqa: F401  (a fixture)
from tools import config, teacher
from toy import instruct

pytest.importorskip("markdownify")
pytest.importorskip("py3langid")

MICRO = Path(__file__).parent / "micro" / "tokenizer.model"
SHARED = data.Tokenizer(MICRO)


def texts(conversations) -> list[list[str]]:
    return [[turn.text for turn in c.turns] for c in conversations]


def run(main, cls, *argv) -> dict:
    return main(config.from_cli(cls, [str(word) for word in argv]))


# -- sharegpt: clean ------------------------------------------------------------------------------

def block(body: str, info: str = "", mark: str = "```") -> str:
    return f"{mark}{info}\n{body}\n{mark}"


HTML_CODE = ('<div class="markdown"><p>So:</p><pre><div><span>python</span><button>Copy code'
             '</button></div><div><code class="hljs language-python"><span class="hljs-title">def'
             '</span> f(a_b):\n    return a_b &lt; 1\n</code></div></pre></div>')
LIMIT = "Too many requests in 1 hour. Try again later."

# (a reply, what becomes of it, what the report says)
EDITED = [
    ("<p>a &lt; b &amp;&amp; c&nbsp;&#39;d&#39; &amp;lt;</p>", "a < b && c\xa0'd' &lt;", "HTML"),
    ("<div><p>One<p>two<ul><li>a_b*c<ul><li>deep</ul></ul></div>",
     "One\n\ntwo\n\n- a_b*c\n  - deep", "HTML"),
    ("<table><tr><th>x</th></tr><tr><td>1</td></tr></table>", "| x |\n| --- |\n| 1 |", "HTML"),
    (HTML_CODE, "So:\n\n" + block("def f(a_b):\n    return a_b < 1", "python"), "HTML"),
    ("<p>See</p><pre><code>a ``` b\n<p>x</p></code></pre>",
     "See\n\n" + block("a ``` b\nx", mark="````"), "HTML"),
    ("<p>Yes, it is.</p><script>alert(1)</script><style>p {}</style>", "Yes, it is.", "HTML"),
    # the copy button
    (block("Copy codeCopy code  x = 1"), block("  x = 1"), "Copy code"),
    (block("x", "bashCopy code"), block("x", "bash"), "Copy code"),
    (block("one\ntwo") + "\nand\n" + block("pythonCopy codeprint(1)"),
     block("one\ntwo") + "\nand\n" + block("print(1)", "python"), "Copy code"),
    ("So:\n" + block("Copy code") + "\nThat is all.", "So:\n\nThat is all.", "Copy code"),
    ("python\nCopy code\nprint(1) and more", "python\nprint(1) and more", "Copy code"),
    # what else the web page added
    ("2 / 2\n\nSure, here it is.", "Sure, here it is.", "counters"),
    ("2 / 2네, 여기 있습니다.", "네, 여기 있습니다.", "counters"),
    ("It is short.Copy12 chars / 3 words", "It is short.", "counters"),
    ("my\\_long\\_name but \\_this and \\*that", "my_long_name but \\_this and \\*that", "escaped"),
    ("\nOne,\r\n\n\n\ntwo. \n", "One,\n\ntwo.", "line ends"),
]
# replies that stay as they are
KEPT = [
    "</s> USER: ASSISTANT: ### Human: <image> <0x0A> <|prompter|> {text} [PAD]",
    "vector<int> x; map<a,b>", "&lt;p&gt; &amp; &#39;", "<3 you </3",
    "<divider>It is no div</divider>", "<div>x</div> is a block in HTML.",
    "Press Copy code to copy the code.", block("a\n\n\n\nb  \n  c", "py"),
    block("r'\\_x' # a\\*b"), "an open\n```py\nblock",
    "1 / 2 cup of sugar", "9 / 3\nis three, of course", "See https://openai.com/x for more.",
    "There are 1000000000.", "At 0x000000000000dEaD.", "It is 3.33333333333, about.",
    block("000000000"), "1. one\n2. two\n\nThen:\n1. three\n2. four",
]
DROPPED = [
    ("No, says CHATGPT to that.", "blocked"), ("So it is: 1111111111, yes.", "repetitive"),
    ("1. one of 2\n1. two of 2", "broken numbers"), (LIMIT, "too short"),
    ("<div>" * 3000 + "x" + "</div>" * 3000, "too short"),
]


@pytest.mark.parametrize("reply, want, reason", EDITED + [(text, text, None) for text in KEPT]
                         + [(reply, None, reason) for reply, reason in DROPPED], ids=lambda x: "")
def test_clean(reply, want, reason):
    """What is edited or dropped is in the report; the good conversation beside it stays as it is.
    In the user's words, nothing counts as a broken list."""
    good, report = conversation("What is a cat?", "An animal with whiskers."), data.Report()
    asked = conversation("1. Why?\n1. So?", reply)
    cleaned = sharegpt.clean([good, asked], sharegpt.CleanConfig(""), report)
    kept = [] if want is None else [conversation("1. Why?\n1. So?", want)]
    assert cleaned == [good, *kept]
    check_reasons(report, [reason] if reason else [])


def test_languages():
    german = conversation("Was ist das für ein Tier, und wo lebt es am liebsten?",
                          "Das ist eine Katze. Sie lebt gern in einem warmen Haus.")
    korean = conversation("이것은 어떤 동물이고 어디에서 사는 것을 좋아합니까?",
                          "이것은 고양이이며 따뜻한 집을 좋아합니다.")
    code = conversation("x = 1?", block("print(x)\nprint(y)"))  # in no language
    given = [german, korean, code]
    for language, kept in (("en", [code]), ("-ko", [german, code]), ("de,ko", given)):
        cfg = sharegpt.CleanConfig("", language=language)
        assert sharegpt.clean(given, cfg, data.Report()) == kept


WHAT = ("What is it?", "A thing or two.")


@pytest.mark.parametrize("conversations, want, reasons", [
    # the rounds before a notice, or before a message without visible text
    ([conversation(*WHAT, "More?", "!" + LIMIT)], [WHAT], ["rate limit"]),
    ([conversation(*WHAT, "More?", "<p>\u200b</p>")], [WHAT], ["HTML", "visible text"]),
    # of duplicates the longest; other continuations are no duplicates
    ([conversation(*WHAT), conversation(*WHAT)], [WHAT], ["duplicate"]),
    ([conversation(*WHAT), conversation(*WHAT, "And?", "No.")], [(*WHAT, "And?", "No.")],
     ["duplicate"]),
    ([conversation(*WHAT, "And?", "1."), conversation(*WHAT, "And?", "2.")],
     [(*WHAT, "And?", "1."), (*WHAT, "And?", "2.")], []),
    ([conversation(*WHAT, extra=dict(plugins={"a": 1}))], [], ["plugins"]),
    # short in letters, not in bytes
    ([conversation("이것은 뭐죠?", "고양이입니다.")], [("이것은 뭐죠?", "고양이입니다.")], []),
], ids=lambda x: "")
def test_clean_whole_conversations(conversations, want, reasons):
    report = data.Report()
    cleaned = sharegpt.clean(conversations, sharegpt.CleanConfig(""), report)
    assert texts(cleaned) == list(map(list, want))
    check_reasons(report, reasons)


# -- sharegpt: split ------------------------------------------------------------------------------

LONG = "the cat sat on the mat " * 36
ALPACA = data.Conversation([data.Turn("user", "Sum up.", LONG), data.Turn("assistant", "Gone.")])


def check_pieces(c, pieces, template: str, seq_len: int) -> None:
    """Every piece fits, and none of the rounds is lost; a text that was cut is a beginning, and has
    no end."""
    turns = []
    for piece in pieces:
        tokens = data.render(piece, template, SHARED).tokens
        assert len(tokens) <= seq_len
        assert (tokens[-1] == SHARED.eos) != bool(piece.extra.get("cut"))
        turns += piece.turns
    assert len(turns) == len(c.turns)
    for whole, part in zip(c.turns, turns):
        assert whole.text.startswith(part.text) and whole.input.startswith(part.input)
        assert part.text or not whole.text


@pytest.mark.parametrize("c, reasons", [
    (conversation(LONG, "yes"), ["question"]),
    (conversation(LONG, LONG[:140]), ["question"]),
    (conversation(LONG[:140], LONG), ["reply"]),
    (conversation("the cat", "한국어 🙂👩‍👩‍👧 " * 60), ["reply"]),
    (conversation("the cat", "the mat", LONG, LONG), ["split", "question", "reply"]),
    (ALPACA, ["question"])], ids=lambda x: "")
def test_a_round_that_is_too_long_is_cut(c, reasons):
    """It is not lost. Question and reply get half of the room each, and either may use what the
    other does not need."""
    template, report = "alpaca" if c is ALPACA else "vicuna_v1.1", data.Report()
    pieces = sharegpt.split(c, template, SHARED, 300, report)
    check_pieces(c, pieces, template, 300)
    check_reasons(report, reasons)
    assert len(data.render(pieces[-1], template, SHARED).tokens) > 295


def test_the_last_round_is_not_lost():
    """Five equal rounds with room for two: the original wrote rounds 1-2 and 3-4, and lost the
    fifth."""
    lines = [f"{letter} is it?" for letter in "ABCDEFGHIJ"]
    size = len(data.render(conversation(*lines[:4]), "vicuna_v1.1", SHARED).tokens)
    c = conversation(*lines, id="c")
    pieces = sharegpt.split(c, "vicuna_v1.1", SHARED, size + 3, data.Report())
    assert texts(pieces) == [lines[:4], lines[4:8], lines[8:]]
    assert [p.id for p in pieces] == ["c_0", "c_4", "c_8"]


def test_a_reply_that_is_cut_has_no_end(tmp_path):
    """A model that learns </s> in mid-sentence stops there. The mark survives a file."""
    c = conversation("What is it?", "a cat and " * 200)
    (piece,) = sharegpt.split(c, "vicuna_v1.1", SHARED, 150, data.Report())
    data.save_conversations([piece], tmp_path / "c.json")
    for c in (piece, *data.load_conversations(tmp_path / "c.json")):
        tokens, labels = data.render(c, "vicuna_v1.1", SHARED)
        assert 140 < len(tokens) <= 150 and SHARED.eos not in tokens and labels[-1] == tokens[-1]


def test_only_the_last_piece_is_cut_or_rejected():
    """"cut" and "rejected" describe the last reply. An earlier piece that was measured as if it
    were cut, too, came out one token too long."""
    lines, extra = [f"{n} is a number?" for n in range(20)], dict(cut=True, rejected=True, k=1)
    for seq_len in range(90, 130):
        c = conversation(*lines, extra=dict(extra))
        pieces = sharegpt.split(c, "koala", SHARED, seq_len, data.Report())
        check_pieces(c, pieces, "koala", seq_len)
        assert [p.extra for p in pieces] == [{"k": 1}] * (len(pieces) - 1) + [extra]
    c = conversation(*WHAT, "More?", LIMIT, extra=dict(rejected=True, k=1))
    (c,) = sharegpt.clean([c], sharegpt.CleanConfig(""), data.Report())
    assert c.extra == {"k": 1}


def test_clean_and_split_files(tmp_path):
    """Commands on a file: the report says which conversation was changed and why."""
    rounds = ["누구세요?", "2 / 2\n\n언어 모델입니다. 😊"] * 8
    raw, clean, split = (tmp_path / f"{name}.json" for name in ("raw", "clean", "split"))
    data.save_conversations([conversation(*rounds, id=name) for name in ("ko", "twice")], raw)
    run(sharegpt.clean_file, sharegpt.CleanConfig, raw, f"--out={clean}")
    report = json.loads(Path(f"{clean}.report.json").read_text(encoding="utf-8"))
    assert report["written"] == 1
    ids = [entry["id"] for entry in report["conversations"] if "duplicate" in entry["what"]]
    assert ids == ["twice"]
    run(sharegpt.split_file, sharegpt.SplitConfig, clean, f"--out={split}", "--seq_len=300",
        f"--tokenizer={MICRO}")
    pieces = texts(data.load_conversations(split))
    assert len(pieces) > 1
    assert sum(pieces, []) == [text.removeprefix("2 / 2\n\n") for text in rounds]


# -- self_instruct --------------------------------------------------------------------------------

def wrote(text: str, why: str = "stop") -> dict:
    return dict(choices=[dict(text=text, finish_reason=why)])


def task(number: int, instruction: str, text: str = "<noinput>", out: str = "Yes.") -> str:
    return (f"{number}. Instruction: {instruction}\n{number}. Input:\n{text}\n"
            f"{number}. Output:\n{out}\n###\n")


SAY, QUIET = "Say it once more.", "Now be quiet, please."
ODD = "It costs 20. Not\n20. That.\n### Title\n###\nOutput: x"
# (record, texts of each task that is kept, reasons in the report)
COMPLETIONS = [
    (wrote(task(4, SAY) + task(5, QUIET, "2\nthings")), [[SAY, "Yes."], [QUIET, "Yes."]], []),
    # any number; the first field's name is in the request
    (wrote(f" {SAY}\n4. Input: <noinput>\n4. Output: Yes.\n###\n" + task(1, QUIET)),
     [[SAY, "Yes."], [QUIET, "Yes."]], []),
    # a field is doubled, or the completion is cut off
    (wrote(task(4, SAY, out="Yes.\n4. Output: No.") + task(5, QUIET)), [[QUIET, "Yes."]],
     ["no reply"]),
    (wrote(task(4, SAY) + task(5, QUIET), "length"), [[SAY, "Yes."]], ["no reply"]),
    # what the original stumbles over within an answer
    (wrote(task(4, SAY, out=ODD)), [[SAY, ODD]], []),
    (wrote(task(4, SAY, out="a\nb").replace("\n", "\r\n")), [[SAY, "a\nb"]], []),
    ({"choices": [dict(message=dict(content=task(4, SAY)), finish_reason="stop")]},
     [[SAY, "Yes."]], []),
    ({"choices": [dict(finish_reason="stop")]}, [], ["no conversation"]),
    (wrote(task(4, SAY, out=SAY)), [], ["also the output"]),
    # Alpaca's filter
    *[(wrote(task(4, text)), [[text, "Yes."]], [])
      for text in ("a " * 149 + "a", "Is mapping or drawing filed here?",
                   "이것을 한 번 더 말해 주세요.", "3 cats: what are they?")],
    *[(wrote(task(4, text)), [], [reason]) for text, reason in (
        ("Say it again", "too short"), ("a " * 150 + "a", "too long"),
        ("DRAW me a sheep.", "cannot show"), ("Write a programme for us.", "program"),
        ("- Say it once more.", "begin with a letter"))],
    # ROUGE-L above 0.7 is too similar; exactly 0.7 is not
    (wrote(task(4, "a b c d e f g h i j") + task(5, "a b c d e f g x y z")
           + task(6, "a b c d e f g h y z")),
     [["a b c d e f g h i j", "Yes."], ["a b c d e f g x y z", "Yes."]], ["resembles an earlier"]),
]


@pytest.mark.parametrize("record, want, reasons", COMPLETIONS, ids=range(len(COMPLETIONS)))
def test_completions(tmp_path, record, want, reasons):
    """Tasks are read as they are, or dropped with a reason; the result is an Alpaca file."""
    good, out = "Tell me what a cat is.", tmp_path / "alpaca.json"
    file = write(tmp_path / "completions.jsonl", [wrote(task(4, good)), record])
    run(self_instruct.main, self_instruct.Config, file, f"--out={out}")
    assert texts(data.load_conversations(out)) == [[good, "Yes."], *want]
    assert data.kind_of(out) == "alpaca"
    report = json.loads(Path(f"{out}.report.json").read_text(encoding="utf-8"))
    entries = [entry["what"] for entry in report["conversations"]]
    assert len(entries) == len(reasons)
    assert all(reason in entry for reason, entry in zip(reasons, entries))


def test_rouge_l():
    assert self_instruct.rouge_l("a b c b".split(), "b c x b".split()) == 0.75
    assert self_instruct.rouge_l("c a b d".split(), "a b c".split()) == pytest.approx(4 / 7)


def test_real_seed_tasks():
    """Alpaca's own filter keeps 171 of the 175 (two are short, one asks for a program, one says
    "Music"); two more resemble an earlier one, with ROUGE-L 0.82 and 0.75."""
    report = data.Report()
    tasks = data.load_conversations(real("seed_tasks.jsonl"))
    kept = self_instruct.filter_tasks(tasks, report)
    assert len(tasks) == 175 and len(kept) == 169 and sorted(report.values()) == [1, 1, 2, 2]


# -- self_instruct and evol_instruct with a teacher -----------------------------------------------

def reasons(out) -> dict:
    return json.loads(Path(f"{out}.report.json").read_text(encoding="utf-8"))["reasons"]


@pytest.fixture
def seeds(tmp_path) -> Path:
    return write(tmp_path / "seeds.json", instruct.seed_tasks(0))


def test_a_request_shows_three_seeds_and_ends_where_the_list_goes_on(seeds):
    tasks = data.load_conversations(seeds)
    text = self_instruct.request(tasks, 0, 7).turns[0].text
    assert text == self_instruct.request(tasks, 0, 7).turns[0].text
    assert text != self_instruct.request(tasks, 0, 8).turns[0].text
    assert text.endswith("###\n4. Instruction:")
    listed = text.partition("###\n")[2].removesuffix("4. Instruction:")
    shown = self_instruct.parse_completion(listed)
    by_text = {c.turns[0].text.rstrip(":"): c.turns for c in tasks}
    assert len(shown) == 3
    for found in shown:
        asked, reply = by_text[found["instruction"]]
        assert found["output"] == reply.text and found["input"] == (asked.input or "<noinput>")


def write_list(body: dict) -> str:
    text = body["messages"][-1]["content"]
    return instruct.write_tasks(text, random.Random(text))[0]


def test_a_server_that_fails_in_the_usual_ways(tmp_path, seeds, fake):  # noqa: F811
    """Busy and broken for a while, empty, a chat instead of a list, cut off: what is good is kept,
    the rest has a reason, and what was paid for is counted."""
    lists = {"empty": "", "chat": "Sure! Which kind of tasks do you want?",
             "seed": task(4, data.load_conversations(seeds)[0].turns[0].text),
             "cut": task(4, SAY) + "5. Instruction: Now be quiet, please.\n5. Output: Ye"}
    said, replies = iter(lists.values()), {}

    def says(body):
        text = body["messages"][-1]["content"]
        if text not in replies:  # a request that is tried again gets the reply of its first time
            replies[text] = next(said, task(4, QUIET))
        return replies[text]

    fake.says, fake.script = says, [(429, "slow down"), (500, "oops")]
    out = tmp_path / "out.json"
    run(self_instruct.main, self_instruct.Config, f"--seeds={seeds}", f"--out={out}",
        f"--teacher=gpt@{fake.url}", "--count=9")
    # The replies of a batch may come in any order.
    assert sorted(texts(data.load_conversations(out))) == [[QUIET, "Yes."], [SAY, "Yes."]]
    counts = reasons(out)
    asked = len(fake.answered)
    assert counts == {"dropped: no reply": 3, "dropped: the instruction resembles an earlier one":
                      asked - 4}
    body = fake.requests[-1][1]
    assert body["temperature"] == 1.0 and body["max_tokens"] == 3072
    assert len(teacher.ReplyCache(Path(f"{out}.replies.jsonl")).replies) == asked


def test_a_teacher_that_says_nothing_new_stops_the_run(tmp_path, seeds, fake, capsys):  # noqa: F811
    fake.says = lambda body: task(4, SAY)
    figures = run(self_instruct.main, self_instruct.Config, f"--seeds={seeds}",
                  f"--out={tmp_path / 'out.json'}", f"--teacher=gpt@{fake.url}", "--count=50")
    assert figures["written"] == 1 and len(fake.answered) <= self_instruct.PATIENCE + 2 * 4
    printed = capsys.readouterr().out
    assert "gave nothing new" in printed and f"{10 * len(fake.answered)} tokens" in printed


# Prompts that a test can read
PLAIN = {name: f"{name}|{{prompt}}" for name in evol_instruct.OPERATIONS}
PLAIN["equal"] = "equal|{prompt}|{evolved}"
HARD = "Say it in three words."


def evolving(rewritten: str = HARD, verdict: str = "Different", answer: str = "As you wish."):
    """What a server says to the three kinds of requests."""
    def says(body: dict) -> str:
        text = body["messages"][-1]["content"]
        if text.startswith("equal|"):
            return verdict
        return rewritten if "|" in text else answer
    return says


LONG_SORRY = "I am sorry, " + "but here it is, " * 20
# (what the teacher says, the reason in the report, requests until then)
EVOLVED = [
    ({}, None, 3),
    (dict(rewritten=f"#Rewritten Prompt#: {HARD}"), "words of the evolving prompt", 1),
    (dict(rewritten="Given prompt: so."), "words of the evolving prompt", 1),
    (dict(rewritten=""), "empty or cut off", 1),
    (dict(rewritten=f" {SAY}"), "no information gain", 1),
    (dict(verdict="Equal."), "no information gain", 2),
    (dict(verdict="Not equal"), None, 3),
    (dict(verdict="I like both."), "unreadable", 2),
    (dict(answer="I'm sorry, I can not."), "says sorry", 3),
    (dict(answer=LONG_SORRY), None, 3),
    (dict(answer="It is what it is..."), "punctuation and stop words", 3),
    (dict(answer="?!"), "punctuation and stop words", 3),
    (dict(answer="42."), None, 3),
]


@pytest.mark.parametrize("said, reason, requests", EVOLVED, ids=range(len(EVOLVED)))
def test_eliminations(tmp_path, fake, said, reason, requests):  # noqa: F811
    """What is eliminated costs no further request, and only the parent is in the file."""
    file, out = tmp_path / "alpaca.json", tmp_path / "out.json"
    write(file, [dict(id="a", instruction=SAY, input="Hm.", output="Yes.")])
    fake.says = evolving(**said)
    run(evol_instruct.main, evol_instruct.Config, file, f"--teacher=gpt@{fake.url}", "--rounds=1",
        f"--out={out}", f"--prompts={write(tmp_path / 'p.json', [PLAIN])}")
    assert len(fake.answered) == requests
    parent, *children = data.load_conversations(out)
    assert parent.turns[0].text == SAY and parent.extra == {"round": 0}
    assert [name for name in reasons(out) if reason and reason in name] == list(reasons(out))
    assert len(children) == (reason is None)
    for child in children:
        answer = said.get("answer", "As you wish.").strip()
        assert child.turns == [data.Turn("user", HARD, "Hm."), data.Turn("assistant", answer)]
        operation = child.extra["operation"]
        assert child.id == "a.1" and child.extra == dict(parent="a", operation=operation, round=1)
        asked = [body["messages"][-1]["content"] for body in fake.answered]
        before, after = f"{SAY}\nHm.", f"{HARD}\nHm."
        assert asked == [f"{operation}|{before}", f"equal|{before}|{after}", after]


def test_what_is_cut_off_is_dropped():
    whole, cut = (teacher.Reply("Say it in three words.", ended) for ended in (True, False))
    assert evol_instruct.why_no_instruction(whole, SAY) is None
    assert "cut off" in evol_instruct.why_no_instruction(cut, SAY)
    assert evol_instruct.why_no_answer(whole) is None
    assert "cut off" in evol_instruct.why_no_answer(cut)
    for why in (evol_instruct.why_no_instruction(None, SAY), evol_instruct.why_no_gain(None),
                evol_instruct.why_no_answer(None)):
        assert why == "no answer from the teacher"


def test_what_fails_stays_in_the_pool(tmp_path, fake):  # noqa: F811
    """It is asked again in the next round, even if the operation and so the request is the same:
    with the reply of the first round it would fail forever. What has evolved evolves further."""
    file, out = tmp_path / "alpaca.json", tmp_path / "out.json"
    write(file, [dict(id="a", instruction=SAY, output="Yes."),
                 dict(id="b", instruction=QUIET, output="Yes.")])
    only = {name: "x|{prompt}" for name in PLAIN} | dict(equal=PLAIN["equal"])
    said = iter(["", HARD])

    def says(body):
        text = body["messages"][-1]["content"]
        if text == f"x|{SAY}":
            return next(said)
        return evolving(text.removeprefix("x|") + " Hush!")(body)

    fake.says = says
    run(evol_instruct.main, evol_instruct.Config, file, f"--teacher=gpt@{fake.url}", "--rounds=2",
        f"--out={out}", f"--prompts={write(tmp_path / 'p.json', [only])}")
    found = {c.id: (c.turns[0].text, c.extra.get("parent")) for c in data.load_conversations(out)}
    assert found == {"a": (SAY, None), "b": (QUIET, None), "a.2": (HARD, "a"),
                     "b.1": (f"{QUIET} Hush!", "b"), "b.1.2": (f"{QUIET} Hush! Hush!", "b.1")}


def test_a_round_in_which_nothing_evolves_is_the_last(tmp_path, fake, capsys):  # noqa: F811
    file = write(tmp_path / "alpaca.json", [dict(instruction=SAY, output="Yes.")])
    fake.says = lambda body: ""
    run(evol_instruct.main, evol_instruct.Config, file, f"--teacher=gpt@{fake.url}",
        f"--out={tmp_path / 'out.json'}")
    assert len(fake.answered) == 1 and "nothing evolved" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    (dict(deepn="{prompt}"), "unknown prompt deepn; did you mean deepen"),
    (dict(breadth=None), "the prompt breadth is missing"),
    (dict(equal="{prompt}"), r"the prompt equal has no \{evolved\}"),
    (dict(reasoning="Harder!"), r"the prompt reasoning has no \{prompt\}")])
def test_prompts_that_are_refused(tmp_path, change, message):
    prompts = {name: text for name, text in {**PLAIN, **change}.items() if text}
    with pytest.raises(config.UserError, match=message):
        evol_instruct.load_prompts(write(tmp_path / "prompts.json", [prompts]))


def test_a_task_that_quotes_a_blank_is_not_filled_in_twice():
    filled = evol_instruct.fill("{prompt}|{evolved}", prompt="{evolved}", evolved="{prompt} {x}")
    assert filled == "{evolved}|{prompt} {x}"


def toy_server(body: dict) -> str:
    """The toy's teacher behind a server: it reads the prompts of PLAIN, and writes lists."""
    text = body["messages"][-1]["content"]
    kind, _, rest = text.partition("|")
    if kind == "equal":
        return "Different"
    if kind in PLAIN:
        return f"{rest} Say it twice."
    return write_list(body) if "###" in text else f"About {text}"


def killed(fake, module: str, argv: list, after: int) -> None:  # noqa: F811
    """Runs a command that is killed when it has `after` replies and waits for others."""
    file = Path(f"{dict(word.split('=') for word in argv if '=' in word)['--out']}.replies.jsonl")

    def kill(body):
        while not file.exists() or file.read_bytes().count(b"\n") < after:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        return ("half",)

    fake.script = [None] * after + [kill] * 4
    process = subprocess.Popen([sys.executable, "-m", module, *argv], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, printed = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed
    fake.script = []


@pytest.mark.parametrize("recipe", [self_instruct, evol_instruct], ids=lambda x: x.__name__[8:])
def test_after_kill_9_nothing_is_asked_twice(tmp_path, seeds, fake, recipe):  # noqa: F811
    """Six replies were paid for, two of them in a batch that was not complete."""
    fake.says, argv = toy_server, [f"--seeds={seeds}", "--count=30"]
    if recipe is evol_instruct:
        argv = [str(write(tmp_path / "few.json", instruct.seed_tasks(0)[:5])), "--rounds=2",
                f"--prompts={write(tmp_path / 'prompts.json', [PLAIN])}"]
    argv.append(f"--teacher=gpt@{fake.url}")
    run(recipe.main, recipe.Config, *argv, f"--out={tmp_path / 'whole.json'}")
    undisturbed = Counter(json.dumps(body) for body in fake.answered)
    fake.answered.clear()
    argv.append(f"--out={tmp_path / 'killed.json'}")
    killed(fake, recipe.__name__, argv, after=6)
    assert len(fake.answered) == 6 and not (tmp_path / "killed.json").exists()
    run(recipe.main, recipe.Config, *argv)
    assert Counter(json.dumps(body) for body in fake.answered) == undisturbed
    for end in (".json", ".json.report.json"):
        whole, again = ((tmp_path / f"{name}{end}").read_text(encoding="utf-8")
                        for name in ("whole", "killed"))
        assert again == whole
    run(recipe.main, recipe.Config, *argv)
    assert sum(undisturbed.values()) == len(fake.answered), "a finished run asks nothing"


def test_ctrl_c_says_where_the_replies_are(tmp_path, seeds, fake):  # noqa: F811
    def interrupt(body):
        os.kill(os.getpid(), signal.SIGINT)

    fake.says, fake.script = toy_server, [None] * 5 + [interrupt]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore Ctrl-C
    with pytest.raises(config.Stopped, match=r"\d+ replies are kept in .*out.json.replies.jsonl"):
        run(self_instruct.main, self_instruct.Config, f"--seeds={seeds}",
            f"--teacher=gpt@{fake.url}", f"--out={tmp_path / 'out.json'}")


# -- openassistant --------------------------------------------------------------------------------

def m(name: str, *replies, **more) -> dict:
    """A message: p... asks, others answer."""
    role = "prompter" if name[0] == "p" else "assistant"
    return dict(message_id=name, text=f"text of {name}", role=role, replies=list(replies), **more)


def tree(root: dict) -> dict:
    return dict(message_tree_id=root["message_id"], tree_state="ready_for_export", prompt=root)


def paths(records, pick: str = "all") -> tuple[list[str], data.Report]:
    """The ids along each path, and the report."""
    report = data.Report()
    found = openassistant.to_conversations(records, report, pick)
    for c in found:
        assert [t.text for t in c.turns] == [f"text of {name}" for name in c.extra["messages"]]
        assert [t.role for t in c.turns] == ["user", "assistant"] * (len(c.turns) // 2)
    return [" ".join(c.extra["messages"]) for c in found], report


RANKED = tree(m("p", m("a2", rank=1),
                m("a1", m("p2", m("a3")), m("p3", m("a4"), m("a5")), rank=0), m("a6", rank=2)))


@pytest.mark.parametrize("pick, want", [
    ("all", ["p a2", "p a1 p2 a3", "p a1 p3 a4", "p a1 p3 a5", "p a6"]),
    ("top1", ["p a1 p2 a3"]),
    ("top2", ["p a2", "p a1 p2 a3"]),
    ("best", ["p a1 p2 a3"])])
def test_paths_through_a_tree(pick, want):
    """top-k goes by rank; a reply without one counts only if it is the only one."""
    assert paths([RANKED], pick)[0] == want


@pytest.mark.parametrize("root, want, reasons", [
    (m("p", m("a", rank=None), m("b", rank=None)), ["p a", "p b"], []),
    # questions without a reply: the path above appears once
    (m("p", m("a", m("p2"), m("p3"))), ["p a"], []),
    (m("p", m("a", m("p2"), m("p3", m("b")))), ["p a", "p a p3 b"], []),
    (m("p", m("a", m("p2", m("b")), m("p3"))), ["p a p2 b"], []),
    # what is left out goes with all that follows it
    (m("p", m("a", m("p2", m("b"), deleted=True))), ["p a"], ["deleted"]),
    (m("p", m("a", m("p2", m("b", synthetic=True)))), ["p a"], ["machine"]),
    (m("p", m("a"), review_result=None), ["p a"], []),
    (m("p", m("a"), review_result=False), [], ["review", "a tree without a reply"]),
    (m("p", m("a", m("b"))), ["p a"], ["role does not follow"]),
    (m("p", {**m("a"), "text": " "}, m("b")), ["p b"], ["no text"]),
    ({**m("p"), "replies": None}, [], ["a tree without a reply"]),
], ids=lambda x: "")
def test_odd_trees(root, want, reasons):
    found, report = paths([tree(root)])
    assert found == want
    check_reasons(report, reasons)


def test_loose_messages():
    """In any order. A cycle is not followed; a message without its parent is in the report."""
    flat = [m("p"), m("a", parent_id="p"), m("b", parent_id="p"), m("p2", parent_id="a"),
            m("c", parent_id="p2"), m("d", parent_id="nobody"), m("e", parent_id="f"),
            m("f", parent_id="e")]
    for order in (flat, flat[::-1]):
        found, report = paths(order)
        assert sorted(found) == ["p a p2 c", "p b"]
        check_reasons(report, ["lacks its parent"])


def test_openassistant_command(tmp_path, capsys):
    """Prints what each way of picking gives. Trees are never divided between the two files; what
    was given up is left out."""
    trees = []
    for i in range(10):
        root = m("p", m("a", m("p2", m("b")), m("p3", m("c")), rank=0), m("d", rank=1))
        trees.append({**tree(root), "message_tree_id": f"tree{i}"})
    trees.append({**trees[1], "tree_state": "aborted_low_grade"})
    del trees[0]["tree_state"]  # some files do not say
    file, out = write(tmp_path / "trees.jsonl", trees), tmp_path / "out.json"
    figures = run(openassistant.main, openassistant.Config, file, f"--out={out}", "--valid=0.3")
    assert ["all", "10", "30", "100", "7"] in map(str.split, capsys.readouterr().out.splitlines())
    files = [data.load_conversations(name) for name in (out, f"{out}.valid.json")]
    train, valid = (Counter(c.extra["tree"] for c in found) for found in files)
    assert len(train) == 7 and len(valid) == 3 and not train.keys() & valid.keys()
    assert set((train + valid).values()) == {3} and figures["written"] == 21


def test_real_trees(tmp_path):
    """Counted once by walking every thread and then judging it."""
    file = real("oasst_en_100_trees.jsonl")
    figures = run(openassistant.main, openassistant.Config, file, f"--out={tmp_path / 'o.json'}")
    found = {pick: (figures[pick]["threads"], figures[pick]["messages"])
             for pick in ("all", "top1", "top2", "best")}
    assert found == dict(all=(538, 1792), top1=(98, 288), top2=(276, 900), best=(95, 274))


# -- koala: sources as their publishers lay them out ----------------------------------------------

HUMAN, BOT = "\n\nHuman: ", "\n\nAssistant: "
HH = f"{HUMAN}Hi{BOT}Hello.{HUMAN}Human: or\n\nnot?{BOT}"
HH_TEXTS = ["Hi", "Hello.", "Human: or\n\nnot?"]
WEBGPT = dict(question=dict(dataset="eli5", id="q1", full_text="Why is it so?"),
              answer_0="It is [1].", answer_1="No.", score_0=0.5, score_1=-0.5,
              quotes_0=dict(title=["A page"], extract=["It is."]),
              quotes_1=dict(title=[], extract=[]))
POST = dict(info=dict(id="t3", post="A long story."), choice=0,
            summaries=[dict(text=" A story."), dict(text=" Nothing.")])
SUMMARIZE = "Summarize this text.\n\nA long story."


@pytest.mark.parametrize("kind, records, want, rejected", [
    ("hc3", [dict(question="Why?", human_answers=["So.", "Thus."], chatgpt_answers=["Because."]),
             dict(question="Why?", human_answers=None, chatgpt_answers=[])],
     [["Why?", "So."], ["Why?", "Thus."], ["Why?", "Because."]], []),
    ("hh", [dict(chosen=HH + "Yes.\n\nReally.", rejected=HH + "No.")],
     [[*HH_TEXTS, "Yes.\n\nReally."]], [[*HH_TEXTS, "No."]]),
    ("webgpt", [WEBGPT, {**WEBGPT, "score_0": 0.0, "score_1": 0.0}],
     [["Why is it so?\n\nSources for your answer:\n[1] A page: It is.", "It is [1]."]],
     [["Why is it so?", "No."]]),
    ("summaries", [POST], [[SUMMARIZE, "A story."]], [[SUMMARIZE, "Nothing."]]),
    ("oig", [dict(text="A play.\n<human>: Why <bot>: so?\n<bot>: So.\n<human>: And?\n<bot>: No.")],
     [["Why <bot>: so?", "So.", "And?", "No."]], []),
    ("oasst", [tree(m("p", m("a")))], [["text of p", "text of a"]], []),
], ids=lambda x: "")
def test_sources_of_koala(tmp_path, kind, records, want, rejected):
    """Each is recognized. A rejected reply is left out, or supervised under the name that Koala
    gave it, and no other. A second record here has nothing to give."""
    file, report = write(tmp_path / "people.json", records), data.Report()
    found_kind, found = koala.load(file, report)
    assert found_kind == kind and texts(found) == want
    assert found[0].system == ("A play." if kind == "oig" else None)
    check_reasons(report, ["rejected"] * len(rejected) + ["no conversation"] * (len(records) - 1))
    _, found = koala.load(file, data.Report(), rejected=True)
    assert texts(found) == want + rejected
    for c in found:
        string = data.spell(SHARED, data.render(c, "koala", SHARED).tokens)
        _, *unhelpful = string.split("An Unhelpful Answer: ")
        is_rejected = [turn.text for turn in c.turns] in rejected
        assert unhelpful == ([f"{c.turns[-1].text}</s>"] if is_rejected else [])
        if is_rejected:
            with pytest.raises(config.UserError, match="use koala"):
                data.render(c, "vicuna_v1.1", SHARED)


# -- koala: mix -----------------------------------------------------------------------------------

def mixed(out: Path, files: str, *argv) -> list[str]:
    """The ids in a mix."""
    run(koala.main, koala.Config, files, f"--out={out}", *argv)
    return [c.id for c in data.load_conversations(out)]


def test_mix(tmp_path):
    """As many of each as its weight says, in an order that depends on the seed alone."""
    a, b, out = (tmp_path / f"{name}.json" for name in ("a", "b", "out"))
    for file, n in ((a, 40), (b, 10)):
        many = [conversation("Yes?", "Yes.", id=f"{file.stem}{i}") for i in range(n)]
        data.save_conversations(many, file)
    ids = mixed(out, f"{a}:0.5,{b}:2")
    assert len({name for name in ids if name[0] == "a"}) == 20 == len(ids) - 20
    assert Counter(name for name in ids if name[0] == "b") == {f"b{i}": 2 for i in range(10)}
    assert mixed(out, f"{a}:0.5,{b}:2") == ids != mixed(out, f"{a}:0.5,{b}:2", "--seed=1")
    assert "".join(name[0] for name in ids) != 20 * "a" + 20 * "b", "one after the other"


def test_a_mix_of_alpaca_files_keeps_the_input_apart(tmp_path):
    turns = [data.Turn("user", "Add.", "1, 2"), data.Turn("assistant", "3")]
    file, out = tmp_path / "c.json", tmp_path / "out.json"
    data.save_conversations([data.Conversation(turns, "c0")], file, "alpaca")
    assert mixed(out, f"{file}:3") == ["c0"] * 3
    assert data.load_conversations(out)[0].turns == turns


# -- identity, and the commands -------------------------------------------------------------------

def test_identity(tmp_path):
    """For a name of one's choice; the model never claims to be another one."""
    out = tmp_path / "i.json"
    run(identity.main, identity.Config, f"--out={out}", "--name=Bori", "--maker=the class of 2031")
    found = data.load_conversations(out)
    assert len({tuple(c.turns) for c in found}) == len(found) > 60
    assert {len(c.turns) for c in found} == {2, 4}
    for c in found:
        assert all("Bori" in t.text or "class of 2031" in t.text for t in c.turns[1::2])


@pytest.mark.parametrize("main, cls, argv, message", [
    (sharegpt.clean_file, sharegpt.CleanConfig, ["--language=english"], "expected ISO codes"),
    (sharegpt.clean_file, sharegpt.CleanConfig, ["--out=c.json"], "is the input file"),
    (sharegpt.split_file, sharegpt.SplitConfig, ["--seq_len=20", f"--tokenizer={MICRO}"],
     "--seq_len=20"),
    (openassistant.main, openassistant.Config, [], "does not come from OpenAssistant"),
    (openassistant.main, openassistant.Config, ["--pick=top0"], "expected all, best"),
    (openassistant.main, openassistant.Config, ["--valid=1.0"], "less than 1"),
    (self_instruct.main, self_instruct.Config, [], "no record has `choices`"),
    (self_instruct.main, self_instruct.Config, ["--count=3"], "--count=3 has no effect"),
    (evol_instruct.main, evol_instruct.Config, [], "--teacher is missing"),
    (evol_instruct.main, evol_instruct.Config, ["--teacher=oracle", "--temperature=0.5"],
     "--temperature=0.5 has no effect")],
    ids=lambda x: x if isinstance(x, str) else "")
def test_mistyped_options(tmp_path, monkeypatch, main, cls, argv, message):
    """One line that says what to do, and the input file is still there."""
    monkeypatch.chdir(tmp_path)
    data.save_conversations([conversation("Q", "A")], "c.json")
    with pytest.raises(config.UserError, match=message) as caught:
        run(main, cls, "c.json", *argv)
    assert "\n" not in str(caught.value)
    assert len(data.load_conversations("c.json")) == 1
