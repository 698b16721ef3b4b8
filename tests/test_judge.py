"""Tests of judge.py: questions, answers, reading scores, reviews, figures, people, captions, the report.

pytest tests/test_judge.py
"""

import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import config
import data
import judge
import teacher
import toy
from config import Problem
from test_teacher import KEY, FakeServer, fake  # noqa: F401  the fixture

ROOT = Path(judge.__file__).parent
MICRO = ROOT / "tests" / "micro"


def write(path: Path, records: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# -- reading scores ------------------------------------------------------------------------------------------

READABLE = {
    "9 8": (9, 8),
    "9, 8": (9, 8),
    "9,8": (9, 8),
    "9  8": (9, 8),
    "9 8 ": (9, 8),
    "9 8\r": (9, 8),
    "\n\n9 8\nBoth": (9, 8),
    "9/10 8/10": (9, 8),
    "9/10, 8 / 10": (9, 8),
    "**9 8**": (9, 8),
    "Scores: 9 8": (9, 8),
    "(9, 8)": (9, 8),
    "[[9, 8]]": (9, 8),
    "nine eight": (9, 8),
    "8.75 9": (8.75, 9),
    "9 8.5\nBoth": (9, 8.5),
    "0 9\nThe first gave no answer.": (0, 9),
    "10 10": (10, 10),
    "9 8\nThe point is (10, 4).": (9, 8),
    "7 4\nAssistant 1: 3 of 5 tests pass.": (7, 4),
    "Both are good.\n\n9 8": (9, 8),
    "They differ.\n\n(9, 8)": (9, 8),
    "First I solve it.\n```python\n(9, 8)\n```\nWhy: ...": (9, 8),
    "Assistant 1: 9 Assistant 2: 8": (9, 8),
    "Assistant 1: 9, Assistant 2: 8": (9, 8),
    "Assistant 2: 8\nAssistant 1: 9": (9, 8),
    "Scores:\nAssistant 1: 10\nAssistant 2: 4\n\nThe first is better.": (10, 4),
    "**Assistant 1:** 9\n**Assistant 2:** 7.5": (9, 7.5),
    "Assistant 1: 10/10\nAssistant 2: 4/10 (wrong)": (10, 4),
    "Assistant 1: 2 (no steps)\nAssistant 2: 1 (wrong)": (2, 1),
    "Assistant 1: 1/10 - The answer is wrong.\n\nAssistant 2: 2/10 - So is this.\n\nBoth are weak.": (1, 2),
    "Points are (2, -2) and (10, 4).\nScores:\nAssistant 1: 10\nAssistant 2: 3": (10, 3),
    "Points are (2, -2) and (10, 4).\nThe output tuple is (10, 1). Assistant 1 is better.": (10, 1),
    "The tuple containing the scores is (1, 3). Both are wrong.": (1, 3),
    "It is 39.\n\nOutput: (1, 10)": (1, 10),
    "I give Assistant 1 a score of 10 and Assistant 2 a score of 4.\n\nThe output tuple is (10, 4).": (10, 4),
    "I rate Assistant 1's code a 7 out of 10 and Assistant 2's code a 9 out of 10.\n\nIt is accurate.": (
        7,
        9,
    ),
    "It is 39.\nTherefore, Assistant 1's score is 10, while Assistant 2's score is 5. Assistant 1 wins.": (
        10,
        5,
    ),
    "Assistant 1:\nf(2) = 5(2)^3\nAssistant 2:\nf(2) = 2\nScores:\nAssistant 1: 10\nAssistant 2: 4": (
        10,
        4,
    ),
    "Assistant 1:\n3x + 10 = 5(x - 2)\n20 = 2x\nScores:\nAssistant 1: 10\nAssistant 2: 1\n\nYes.": (
        10,
        1,
    ),
}
UNREADABLE = [
    "",
    " \n\n",
    "error",
    "$ERROR$",
    "11 5",
    "9 11",
    "-1 -1",
    "-3 99",
    "nan inf",
    "9",
    "9 8 7",
    "9 out of 5, 8 out of 5",
    "90 80",
    "45/50 40/50",
    "9% 8%",
    "8,5 9",
    "Both are good.",
    "Assistant 1: 9",
    "Assistant 1: 9/100 Assistant 2: 8/100",
    "The segment ends in (2, -2) and (10, 4), so it is 10 long.",
    "The answer is the point (10, 4).",
    "The lines meet in (10, 4).\n\n(10, 4)",
    "Both scored full marks for the point (10, 4).",
    "Assistant 1: 5 * 8 - 4 = 36\nAssistant 2: 40 - 4 = 36",
    "Assistant 1:\n40 - 1\nAssistant 2:\n41 - 2",
    "9 8\nThey are good.\n7 6",
    "Assistant 1: 9\nAssistant 2: 8\n\nOn reflection:\nAssistant 1: 7\nAssistant 2: 8",
    "Scores: (9, 8)\n\nOutput: (8, 9)",
    "[[A]]",
    "[[A]] [[B]]",
    "[[10]]",
    "[10]",
    "[[8/10]]",
    "Rating: [[8]] ... Rating: [[9]]",
    "９ ８",
    "9 8 out of 100",
    "1*0 8",
    "First of all, 2 8 14 are even.",
    "Year 2023: 9 of 10 say 8 is enough.",
]


@pytest.mark.parametrize("text", READABLE, ids=lambda t: t[:40])
def test_scores_that_a_reader_could_read(text):
    assert judge.read_scores(text) == READABLE[text]


@pytest.mark.parametrize("text", UNREADABLE, ids=lambda t: t[:40])
def test_scores_are_not_guessed(text):
    assert judge.read_scores(text) is None


def test_verdicts_without_scores():
    assert [
        judge.read_winner(t)
        for t in ("so [[A]]", "[[B]]", "[[C]] a tie", "[[A]] or [[B]]", "A", "", "[[A]] yes [[A]]")
    ] == [-1, 1, 0, None, None, None, -1]


def test_no_score_is_read_that_is_not_written():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    bits = [
        "Assistant 1",
        "Assistant 2",
        "'s",
        ":",
        " ",
        " ",
        "\n",
        "\n",
        "(",
        ")",
        "[",
        "]",
        ", ",
        "**",
        "/10",
        "/",
        "-",
        ".",
        "score of",
        "Scores",
        "tuple",
        "output",
        "is",
        "out of 10",
        "and",
        "nine",
        "ten",
        "%",
        "=",
        "\u00a0",
        "\u2028",
        "1e1",
    ]
    parts = st.one_of(
        st.sampled_from(bits),
        st.integers(-3, 12).map(str),
        st.text(max_size=3),
        st.floats(0, 12).map(lambda f: f"{f:.2f}"),
    )

    @hypothesis.settings(max_examples=400, deadline=None)
    @hypothesis.given(st.lists(parts, max_size=14).map("".join))
    def check(text):
        scores = judge.read_scores(text)
        if scores is not None:
            written = {float(n) for n in re.findall(r"[0-9]+(?:\.[0-9]+)?", text)}
            written |= {float(judge.WORDS.index(w)) for w in re.findall("|".join(judge.WORDS), text.lower())}
            assert len(scores) == 2 and set(scores) <= written and all(0 <= s <= 10 for s in scores)

    check()


# -- questions and answers -----------------------------------------------------------------------------------


def test_toy_questions():
    questions = judge.toy_questions()
    assert questions == judge.toy_questions() != judge.toy_questions(1)
    assert [q.id for q in questions] == list(range(1, 81))
    assert len({q.turns[-1] for q in questions}) == 80
    assert sum(len(q.turns) == 2 for q in questions) >= 40
    assert {q.category for q in questions} <= set(judge.CATEGORIES)
    for q in questions:
        assert len(q.truths) == len(q.turns) and q.truths[-1].text in q.turns[-1]
        assert q.grade(q.truths[-1].full) == 1 and (q.truths[-1].open or q.grade(q.truths[-1].short) == 1)
        assert bool(q.reference) == (q.category in ("coding", "math"))
        if len(q.turns) == 2 and q.truths[-1].needs_scene:  # it cannot be answered without the first turn
            assert all(any(word in q.turns[0].lower() for word in words) for words in (toy.COLORS, toy.SHAPES, toy.PLACES))


def test_our_own_questions():
    questions = judge.load_questions(str(ROOT / "assets" / "questions.jsonl"))
    counts = {c: sum(q.category == c for q in questions) for c in judge.CATEGORIES}
    assert counts == judge.CATEGORIES and [q.id for q in questions] == list(range(1, 81))
    assert len({q.turns[0] for q in questions}) == 80
    assert [q.id for q in questions if q.reference] == list(range(61, 71))


def test_question_files(tmp_path, capsys):
    path = write(
        tmp_path / "q.jsonl",
        [
            dict(question_id=81, category="stem", turns=["a {b}", "c"], reference=["", "d"]),
            dict(question_id=82, category="cooking", text="e"),
        ],
    )
    one, two = judge.load_questions(path)
    assert (one.turns, one.reference, two.turns) == (["a {b}", "c"], ["", "d"], ["e"])
    assert "unknown category cooking (82); the general prompt is used" in capsys.readouterr().out
    for records, message in (
        ([dict(question_id=1, text="a")] * 2, "question_id 1 more than once"),
        ([dict(question_id=1, text=" ")], "question 1 has neither text nor turns"),
        ([dict(question_id=1, turns=["a", 3])], "question 1 has neither text nor turns"),
        ([dict(id=1, text="a")], "no questions: JSON lines with question_id"),
    ):
        with pytest.raises(Problem, match=message):
            judge.load_questions(write(tmp_path / "bad.jsonl", records))


QUESTIONS = [
    judge.Question(1, "generic", ["Say something."]),
    judge.Question(2, "math", ["1 + 1?"], ["It is 2."]),
    judge.Question(3, "coding", ["First.", "Second."], ["", "Reference {answer_1}."]),
]


def replies(*texts):
    return [dict(question_id=i, answer_id=f"id-{i}", text=t) for i, t in enumerate(texts, 1)]


def test_answer_files_are_checked(tmp_path):
    questions = QUESTIONS[:2]
    good = judge.read_answers(write(tmp_path / "a.jsonl", replies("a", "b")[::-1]), questions)
    assert [a["text"] for a in good] == ["a", "b"]
    for records, message in (
        (replies("a"), "no answer to question 2"),
        (replies("a", "b", "c"), "there is no question 3"),
        (replies("a", "b") + replies("c"), "question_id 1 more than once"),
        ([dict(question_id=1, text="a"), dict(question_id=2)], "answer to question 2 is not text"),
        ([{"instruction": "a"}], "holds no answers"),
        ([*replies("a"), dict(question_id=7, text="b")], "no answer to question 2; there is no question 7"),
    ):
        with pytest.raises(Problem, match=message) as error:
            judge.read_answers(write(tmp_path / "a.jsonl", records), questions)
        assert "\n" not in str(error.value)
    with pytest.raises(Problem, match="question 3 has 2 turns, its answer 1"):
        judge.read_answers(write(tmp_path / "a.jsonl", replies("a", "b", "c")), QUESTIONS)


def test_a_second_turn_hears_the_own_first_answer_and_an_interrupted_run_goes_on(tmp_path):
    heard = []

    class Player:
        name, why = "player", "the line went dead"
        patience = 99

        def __call__(self, conversations, keep):
            for i, c in enumerate(conversations):
                if not self.patience:
                    return [None]
                self.patience -= 1
                heard.append([t.text for t in c.turns])
                keep(i, teacher.Reply(f"reply {len(heard)}", True))
            return [True] * len(conversations)

    player, path = Player(), tmp_path / "answer_player.jsonl"
    player.patience = 3  # the first turns; then the second one fails
    with pytest.raises(Problem, match="no answer to question 3.*the line went dead.*same command"):
        judge.answer(player, QUESTIONS, path, [])
    path.write_text(path.read_text() + '{"answer_id": "half')  # and the machine died while it wrote
    player.patience = 99
    answers = judge.answer(player, QUESTIONS, path, [])
    assert heard == [["Say something."], ["1 + 1?"], ["First."], ["First.", "reply 3", "Second."]]
    assert [judge.said_in(a) for a in answers] == [
        ["reply 1"],
        ["reply 2"],
        ["reply 3", "reply 4"],
    ] and answers == lines(path)
    judge.answer(player, QUESTIONS, path, ["another temperature"])  # asked anew; what was there is not lost
    assert len(heard) == 8 and len(lines(path.with_suffix(".old.jsonl"))) == 3
    judge.answer(player, QUESTIONS, path, [])
    assert len(heard) == 8 and lines(path) == answers


# -- prompts -------------------------------------------------------------------------------------------------


def test_prompts_have_the_published_structure():
    prompts = judge.load_prompts("")
    a, b = dict(text="A {question}"), dict(text="B")
    texts = [
        judge.ask_judge(
            q,
            *(
                said
                if len(q.turns) == 1
                else [dict(choices=[dict(turns=[s["text"], s["text"] + "2"])]) for s in said]
            ),
            prompts,
        )
        .turns[0]
        .text
        for q in QUESTIONS
        for said in [(a, b)]
    ]
    for text in texts:
        marks = re.findall(
            r"^\[.*?\]$",
            text.replace("[Reference Answer]\n", "").replace("[The End of Reference Answer]\n", ""),
            re.M,
        )
        assert marks == [
            "[Question]",
            "[The Start of Assistant 1's Answer]",
            "[The End of Assistant 1's Answer]",
            "[The Start of Assistant 2's Answer]",
            "[The End of Assistant 2's Answer]",
            "[System]",
        ]
    assert (
        "1's Answer]\nA {question}\n\n[The End" in texts[0]
        and "Reference" not in texts[0]
        and "first line" not in texts[1]
    )
    assert "[Reference Answer]\nIt is 2." in texts[1] and "tuple" in texts[1]
    assert "Turn 1: First.\n\nTurn 2: Second." in texts[2] and "Reference {answer_1}." in texts[2]
    assert "Turn 2: B2" in texts[2] and "in the light of" in texts[2] and "code" in texts[2]


def test_prompts_from_a_published_file(tmp_path):
    record = dict(
        prompt_id=1,
        category="general",
        system_prompt="S",
        defaults=dict(prompt="P"),
        prompt_template=('{"json": [1]} Q {question} 1 {answer_1} 2 {answer_2} {prompt}'),
    )
    prompts = judge.load_prompts(write(tmp_path / "p.jsonl", [record]))
    asked = judge.ask_judge(QUESTIONS[0], dict(text="{answer_2}"), dict(text="b"), prompts)
    assert (asked.system, asked.turns[0].text) == ("S", '{"json": [1]} Q Say something. 1 {answer_2} 2 b P')
    for change, message in (
        (dict(prompt_template="Q {question}"), "prompt 1 needs"),
        (dict(defaults=None), "prompt 1 needs"),
        (dict(category="math"), "no prompt of category general"),
    ):
        with pytest.raises(Problem, match=message):
            judge.load_prompts(write(tmp_path / "p.jsonl", [{**record, **change}]))


# -- the whole run, on the toy world -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def terse(tmp_path_factory) -> str:
    """An answer file: right wherever a terse answer can be, and empty once."""
    records = [
        dict(
            question_id=q.id, choices=[dict(index=0, turns=[""] * (len(q.turns) - 1) + [q.truths[-1].short])]
        )
        for q in judge.toy_questions()
    ]
    records[4]["choices"][0]["turns"][-1] = ""
    return write(tmp_path_factory.mktemp("answers") / "answer_terse.jsonl", records)


def run(out, **options) -> dict:
    return judge.main(
        judge.JudgeConfig(**{"out": str(out), "players": "noisy,oracle", "model": "noisy", **options})
    )


def test_a_run_with_a_checkpoint_and_a_file_counts_right(tmp_path, capsys, terse):
    figures = run(tmp_path, players=f"{MICRO},{terse},noisy,oracle", model="micro")
    printed = capsys.readouterr().out
    assert (
        "terse: 80 answers; empty ones, judged as they are: 5" in printed
        and "judge and people: not measured" in printed
    )
    assert [(p["a"], p["b"]) for p in figures["pairs"]] == [
        ("terse", "micro"),
        ("noisy", "micro"),
        ("oracle", "micro"),
        ("oracle", "terse"),
        ("oracle", "noisy"),
    ]
    questions = judge.toy_questions()
    answers = {
        n: lines(tmp_path / "answer" / f"answer_{n}.jsonl") for n in ("micro", "terse", "noisy", "oracle")
    }
    grades = {
        n: [q.grade(a["choices"][0]["turns"][-1]) for q, a in zip(questions, some)]
        for n, some in answers.items()
    }
    for p in figures["pairs"]:  # counted again from the answers
        a, b = grades[p["a"]], grades[p["b"]]
        assert p["totals"] == pytest.approx([sum(1 + 9 * g for g in a), sum(1 + 9 * g for g in b)])
        assert p["percent"]["value"] == pytest.approx(p["totals"][1] / p["totals"][0])
        assert p["percent"]["low"] <= p["percent"]["value"] <= p["percent"]["high"]
        wins, losses = sum(x < y for x, y in zip(a, b)), sum(x > y for x, y in zip(a, b))
        assert (p["wins"], p["ties"], p["losses"]) == (wins, 80 - wins - losses, losses)
        assert sum(c["n"] for c in p["categories"].values()) == 80
        assert p["preferred"] is None or p["preferred"]["value"] == pytest.approx(wins / (wins + losses))
    assert figures["biases"]["truth"]["all"] == figures["biases"]["consistent"]["value"] == 1
    assert "BIAS" not in printed and figures["unread"] == 0 and not (tmp_path / "unread.jsonl").exists()
    record = lines(tmp_path / "review" / "review_oracle_terse.jsonl")[4]
    assert set(record) == {
        "review_id",
        "question_id",
        "answer1_id",
        "answer2_id",
        "text",
        "score",
        "reviewer_id",
        "metadata",
    }
    assert record["score"] == [10, 1] and record["reviewer_id"] == "oracle"


def test_the_same_command_does_nothing_twice(tmp_path):
    first = run(tmp_path)
    path = tmp_path / "review" / "review_oracle_noisy.jsonl"
    before = path.read_text()
    kept = [json.dumps({**r, "text": r["text"] + " kept"}) for r in lines(path)[:30]]
    path.write_text("\n".join(kept) + '\n{"review_id": "half a li')
    again = run(tmp_path)
    assert sum(r["text"].endswith(" kept") for r in lines(path)) == 30
    assert path.read_text().replace(" kept", "") == before
    assert [p["totals"] for p in again["pairs"]] == [p["totals"] for p in first["pairs"]]


def test_swapping_the_order_removes_a_position_bias(tmp_path, capsys):
    honest = run(tmp_path / "honest")["pairs"][0]
    one_order = run(tmp_path / "one", judge="first", swap=False)["pairs"][0]
    assert one_order["losses"] == 80 and honest["losses"] < 30  # noisy stands second, and always loses
    capsys.readouterr()
    both = run(tmp_path / "both", judge="first")
    printed, pair = capsys.readouterr().out, both["pairs"][0]
    assert pair["wins"] == 0 and pair["losses"] <= honest["losses"] and pair["ties"] >= honest["ties"]
    assert "BIAS: it prefers first" in printed and both["biases"]["position"]["low"] > 0
    assert both["biases"]["consistent"]["value"] < 0.5
    equal = [r for r in pair["rows"] if r["truth"] == 0]  # those who are equally good get equal scores again
    assert equal and all(r["scores"][0] == r["scores"][1] for r in equal)


def test_a_judge_who_likes_it_long_is_caught(tmp_path, capsys, terse):
    run(tmp_path / "honest", players=f"{terse},oracle", model="terse")
    assert "BIAS" not in capsys.readouterr().out
    figures = run(tmp_path / "longer", players=f"{terse},oracle", model="terse", judge="longer")
    printed = capsys.readouterr().out
    assert "BIAS: it prefers the longer" in printed and "BIAS: it prefers first" not in printed
    assert figures["biases"]["length"]["low"] > 0 and figures["biases"]["truth"]["all"] < 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(players="oracle"), "two or more different players"),
        (dict(players="noisy,noisy"), "two or more different players"),
        (dict(players="first,oracle"), "first is a judge"),
        (dict(model="vicuna"), "--model=vicuna is none of the players: noisy, oracle"),
        (dict(baseline="x"), "--baseline=x is none"),
        (dict(baseline="noisy"), "are the same"),
        (dict(judge="gpt-4@https://api.example.com/v1"), "needs a key"),
        (dict(players="nowhere,oracle", model="nowhere"), "no checkpoint in nowhere"),
        (dict(questions="assets/questions.jsonl"), "noisy knows the toy world only"),
        (dict(questions="no.jsonl", players="a,b"), "no such file"),
    ],
)
def test_what_cannot_work_is_one_clear_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(Problem, match=message) as error:
        run(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_command_lines(tmp_path):
    def shell(*args):
        return subprocess.run(
            [sys.executable, str(ROOT / "judge.py"), *args], capture_output=True, text=True, cwd=tmp_path
        )

    done = shell("--players=noisy,oracle", "--model=noisy", "--seed=3")
    assert done.returncode == 0 and "look at it: out/judge/report.html" in done.stdout, done.stderr
    bad = shell("raet", "a", "b")
    assert bad.returncode == 1 and bad.stderr.strip() == "judge.py: unknown command raet; did you mean rate?"


# -- a server as the judge -----------------------------------------------------------------------------------


def test_a_server_judges_and_nothing_paid_for_is_lost(tmp_path, capsys, fake):  # noqa: F811
    rng = random.Random(0)
    fake.says = lambda body: f"{rng.randint(1, 10)} {rng.randint(1, 10)}\nYour key is {KEY}."
    trouble = [(429, "wait", {"Retry-After": "0"}), (500, KEY), ("text", "garbage"), ("half",)]
    fake.script = [None] * 20 + trouble + [None] * 20 + [(401, KEY)] * 9
    options = dict(judge=f"gpt-4@{fake.url}", price_read=30, price_written=60)
    judge.teacher, plain = (
        (
            lambda spec, *args, **more: plain(
                spec, *args, **more, **(dict(pause=0.01, timeout=5) if "@" in spec else {})
            )
        ),
        judge.teacher,
    )
    try:
        with pytest.raises(Problem, match="HTTP 401.*same command goes on"):
            run(tmp_path, **options)
        kept = sum(len(lines(f)) for f in (tmp_path / "review").rglob("*.jsonl"))
        assert kept == len(fake.answered) >= 40
        fake.script = []
        figures = run(tmp_path, **options)
    finally:
        judge.teacher = plain
    assert len(fake.answered) == 160 and figures["pairs"][0]["n"] == 80  # each review was paid for once
    printed = capsys.readouterr()
    assert (
        "160 reviews to come from gpt-4@127.0.0.1: about" in printed.out
        and "requests repeated, $0.0" in printed.out
    )
    everything = (
        printed.out + printed.err + "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file())
    )
    assert KEY not in everything and "Your key is [key]." in everything
    assert {body["messages"][0]["role"] for _, body in fake.requests} == {"system"}


def test_a_judge_who_talks_nonsense_ranks_nobody(tmp_path, capsys, fake):  # noqa: F811
    fake.says = lambda body: "I like turtles."
    figures = run(tmp_path, judge=f"gpt-4@{fake.url}")
    printed = capsys.readouterr().out
    pair = figures["pairs"][0]
    assert pair["n"] == 0 and pair["percent"] is pair["preferred"] is None and figures["unread"] == 160
    assert (
        "no review could be read: nothing is claimed" in printed
        and "160 reviews could not be read" in printed
    )
    unread = lines(tmp_path / "unread.jsonl")
    assert (
        len(unread) == 160
        and {r["text"] for r in unread} == {"I like turtles."}
        and unread[0]["score"] is None
    )


# -- published review files ----------------------------------------------------------------------------------

MATH = {
    68: "Scores:\nAssistant 1: 10\nAssistant 2: 4\n\nThe first is right.",
    69: "It is 10.\nThe output tuple is (7, 7).",
    70: "Ends: (2, -2) and (10, 4).\nAssistant 1: 10\nAssistant 2: 4",
}


def published(folder: Path, stored: bool = True) -> Path:
    """A table/ in the published layout: half points, a 0, scores at the end, one against its text, one that
    only a person could read, reviewer ids of two types."""
    questions = judge.load_questions(str(ROOT / "assets" / "questions.jsonl"))
    write(
        folder / "question.jsonl",
        [dict(question_id=q.id, text=q.turns[0], category=q.category) for q in questions],
    )
    rng = random.Random(0)
    for a, b in (("gpt35", "vicuna-13b"), ("llama", "vicuna-13b:20230322-new-hp-fp16")):
        records = []
        for q in questions:
            score = [rng.choice((7.0, 8.0, 8.5, 9.0)), rng.choice((8.0, 9.0, 9.5))]
            text = f"{score[0]:g} {score[1]:g}\nBoth are fine."
            if q.id in MATH:
                text, score = MATH[q.id], {68: [10, 4], 69: [7, 7], 70: [10, 2]}[q.id]
            if q.id == 74:
                text, score = "0 9\nNo answer.", [0.0, 9.0]
            if q.id == 5:
                text, score = "The first is a nine, I feel, the second rather an eight.", [9.0, 8.0]
            record = dict(
                review_id=f"{a}{q.id}",
                question_id=q.id,
                answer1_id=f"{a}-{q.id}",
                answer2_id=f"v-{q.id}",
                text=text,
                score=score,
                reviewer_id=1 if a == "llama" else "gpt-4-0328-generic",
                metadata={},
            )
            records.append(record if stored else {k: v for k, v in record.items() if k != "score"})
        write(folder / "review" / b.split(":")[0] / f"review_{a}_{b}.jsonl", records)
    return folder


def test_published_reviews_with_their_scores(tmp_path, capsys):
    table = published(tmp_path)
    figures = judge.report_files(judge.ReportConfig(str(table)))
    assert [(p["a"], p["b"]) for p in figures["pairs"]] == [
        ("gpt35", "vicuna-13b"),
        ("llama", "vicuna-13b:20230322-new-hp-fp16"),
    ]
    for p, file in zip(figures["pairs"], sorted((table / "review").rglob("*.jsonl"))):
        records = lines(file)
        assert p["totals"] == [sum(r["score"][0] for r in records), sum(r["score"][1] for r in records)]
        assert p["wins"] == sum(r["score"][1] > r["score"][0] for r in records)
        assert (
            p["losses"] == sum(r["score"][1] < r["score"][0] for r in records)
            and p["n"] == 80
            and not p["left_out"]
        )
        assert p["categories"]["math"]["totals"] == [27, 13] and p["categories"]["writing"]["n"] == 10
    assert (
        len(figures["doubts"]) == 2 and "question 70: stored 10 2, the text says 10 4" in figures["doubts"][0]
    )
    assert (
        "stored score against text" in (printed := capsys.readouterr().out)
        and "position: not measured" in printed
    )


def test_published_reviews_without_their_scores_and_with_scores_read_by_hand(tmp_path, capsys):
    table = published(tmp_path, stored=False)
    figures = judge.report_files(judge.ReportConfig(str(table)))
    assert [p["left_out"] for p in figures["pairs"]] == [[5], [5]] and figures["unread"] == 2
    assert figures["pairs"][0]["categories"]["math"]["totals"] == [27, 15] and figures["pairs"][0]["n"] == 79
    printed = capsys.readouterr().out
    assert (
        "left out of gpt35 : vicuna-13b: question 5" in printed and "2 reviews could not be read" in printed
    )
    unread = lines(table / "unread.jsonl")
    assert [(r["review_id"], r["question_id"], r["score"]) for r in unread] == [
        ("gpt355", 5, None),
        ("llama5", 5, None),
    ]
    unread[0]["score"] = [9, 8]
    write(table / "unread.jsonl", unread)
    again = judge.report_files(judge.ReportConfig(str(table)))
    assert [p["left_out"] for p in again["pairs"]] == [[], [5]] and again["unread"] == 1
    assert again["pairs"][0]["totals"] == [
        figures["pairs"][0]["totals"][0] + 9,
        figures["pairs"][0]["totals"][1] + 8,
    ]
    assert [r["score"] for r in lines(table / "unread.jsonl")] == [[9, 8], None]
    unread[0]["score"] = [99, 8]
    write(table / "unread.jsonl", unread)
    with pytest.raises(Problem, match="score of review gpt355 must be two numbers, 0 to 10"):
        judge.report_files(judge.ReportConfig(str(table)))


def test_review_files_that_are_odd(tmp_path, capsys):
    review = dict(review_id="a", question_id=1, text="9 8", score=[-1, -1])
    one = write(
        tmp_path / "review_a_b.jsonl",
        [review, dict(question_id=2, text="[[B]]"), dict(question_id=3, text=None, score=[True, 2])],
    )
    figures = judge.report_files(judge.ReportConfig(one))
    pair = figures["pairs"][0]
    assert (pair["totals"], pair["losses"], pair["wins"], pair["left_out"]) == (
        [9, 8],
        1,
        1,
        [3],
    )  # a verdict has no score
    assert "categories are unknown" in capsys.readouterr().out
    for name, records, message in (
        ("review_a_b.jsonl", [review] * 2, "question_id 1 more than once"),
        ("review_a.jsonl", [review], "called review_A_B.jsonl"),
        ("review_a_b.jsonl", ["x"], "holds no reviews"),
    ):
        path = write(tmp_path / "odd" / name, records)
        with pytest.raises(Problem, match=message):
            judge.report_files(judge.ReportConfig(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Problem, match="no review_A_B.jsonl"):
        judge.report_files(judge.ReportConfig(str(tmp_path / "empty")))


# -- people --------------------------------------------------------------------------------------------------


def test_people_rate_blind_and_their_agreement_is_counted(tmp_path, capsys, monkeypatch):
    run(tmp_path)
    truth = {q.id: q for q in judge.toy_questions()}
    capsys.readouterr()

    def sit(rater: str, answer) -> tuple[dict, str]:
        monkeypatch.setattr("builtins.input", lambda prompt: answer(capsys.readouterr().out))
        figures = judge.rate(judge.RateConfig("noisy", "oracle", out=str(tmp_path), rater=rater))
        return figures, capsys.readouterr().out

    shown = []

    def honest(screen: str) -> str:
        shown.append(screen)
        asked, first, second = re.split(r"--- answer [12]\n", screen)
        q = next(
            q for q in truth.values() if q.turns[-1] in asked and (len(q.turns) == 1 or q.turns[0] in asked)
        )
        a, b = (q.grade(said.strip().split("Turn 2: ")[-1]) for said in (first, second))
        return "1" if a > b else "2" if b > a else "tie"

    assert sit("anna", lambda screen: "q")[0] == dict(rated=0)
    assert sit("anna", honest)[0] == dict(rated=80)
    assert not any("noisy" in s or "oracle" in s for s in shown)  # blind
    assert sit("anna", honest)[0] == dict(rated=0)  # nothing twice
    tired = iter(["2"] * 40 + ["what?", "q"])
    figures, printed = sit("bert", lambda screen: next(tired))
    assert figures == dict(rated=40) and "40 ratings added" in printed
    sides = [r["models"][0] for r in lines(tmp_path / "rating" / "anna.jsonl")]
    assert 20 < sides.count("noisy") < 60  # sides are shuffled
    b = judge.report_files(judge.ReportConfig(str(tmp_path)))["biases"]
    anna, bert = (
        {r["question_id"]: r["winner"] for r in lines(tmp_path / "rating" / f"{n}.jsonl")}
        for n in ("anna", "bert")
    )
    same = sum(anna[i] == bert[i] for i in bert)
    assert b["people_people"]["n"] == 40 and b["people_people"]["all"] == pytest.approx(same / 40)
    assert b["people"]["n"] == 120 and b["people"]["all"] == b["people_truth"]["all"] == pytest.approx(
        (80 + same) / 120
    )
    assert "agreement of judge and people: " in capsys.readouterr().out


def test_agreement_with_and_without_ties():
    votes = [(1, 1), (1, -1), (0, 0), (0, 1), (-1, -1), (1, 0)]
    assert judge.agreement(votes) == dict(n=6, all=0.5, n_decided=3, decided=pytest.approx(2 / 3))
    assert judge.agreement([]) is None and judge.agreement([(0, 1)])["decided"] is None


# -- captions ------------------------------------------------------------------------------------------------


def test_failures_of_captions():
    good = "There is a large red circle at the top left and a small blue star in the middle."
    assert judge.failure(good, True) == "" and judge.failure(good, False) == "does not stop"
    assert judge.failure("", True) == judge.failure(" \n", False) == "empty"
    assert judge.failure("a red circle a red", True) == "fragment" == judge.failure("Circle.", True)
    assert judge.failure("The cat is red. The dog is blue. The cat is red.", True) == "repeats"
    assert judge.failure("on the red table " * 4, True) == "repeats"


def test_chair_counts_objects_that_are_not_there():
    captions = ["There is a large red circle and a small blue star.", "A pink moon.", "Nothing."]
    present = [{("red", "circle")}, {("pink", "moon"), ("red", "ring"), ("blue", "ring")}, set()]
    figures = judge.chair(captions, present)
    assert figures == dict(
        instances=pytest.approx(1 / 3), mentioned=3, sentences=pytest.approx(1 / 3), words=5
    )
    scene = toy.pick_scene(random.Random(0), "more")
    assert judge.mentions(toy.caption(scene)) == {(o.color, o.shape) for o in scene}
    assert judge.chair([], [])["instances"] == 0


def test_pope_is_balanced_and_counts_right():
    rng, questions = random.Random(0), []
    for _ in range(20):
        questions += judge.pope_questions(toy.pick_scene(rng), rng)
    truth = [next(iter(q.truth["yesno"])) for q in questions]
    assert truth.count("yes") == truth.count("no") == 20
    assert judge.pope(questions, [q.full for q in questions])["f1"] == pytest.approx(1)
    always = judge.pope(questions, ["Yes, there is."] * 40)
    assert (always["accuracy"], always["recall"], always["yes"]) == (0.5, 1, 1) and always["precision"] == 0.5
    silent = judge.pope(questions, ["Hm."] * 40)
    assert (silent["accuracy"], silent["unread"], silent["yes"]) == (0, 40, 0)


def test_coverage_by_a_yes_no_judge():
    rng = random.Random(1)
    scenes = [toy.pick_scene(rng, "more") for _ in range(10)]
    whole = [f"There is {toy.caption(s)}." for s in scenes]
    part = [f"There is {toy.caption(s[:2])}." for s in scenes]
    oracle = teacher.teacher("oracle")
    assert judge.coverage(oracle, whole, part) == dict(covered=1, n=10, unread=0)
    assert judge.coverage(oracle, part, whole)["covered"] == 0
    mumbling = lambda asked: [teacher.Reply(t, True) for t in ("**Yes**, it does", "No.", "Perhaps")] + [None]
    assert judge.coverage(mumbling, [""] * 4, [""] * 4) == dict(covered=0.5, n=2, unread=2)


# -- the page ------------------------------------------------------------------------------------------------

EVIL = "</script><img src=x onerror=document.title='gone'>{{DATA}}"


def test_the_page_stands_alone_and_no_answer_can_break_it(tmp_path, terse):
    records = lines(terse)
    records[0]["choices"][0]["turns"][-1] = EVIL
    path = write(tmp_path / "answer_evil.jsonl", records)
    run(tmp_path, players=f"{path},oracle", model="evil")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(
        r"https?://|\bsrc=|@import|<link", page.split('<script id="data"')[0] + page.split("</script>", 1)[1]
    )
    assert page.count("</script>") == 2
    inside = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    assert inside["pairs"][0]["rows"][0]["said"][1].endswith(EVIL)
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["pairs"][0]["totals"] == inside["pairs"][0]["totals"] and "rows" not in figures["pairs"][0]
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        return
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--dump-dom",
            f"file://{tmp_path}/report.html",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "80 of 80 questions" in done.stdout and "<title>Who answers better?</title>" in done.stdout
    assert done.stdout.count('class="case"') == 80 and "&lt;/script&gt;&lt;img" in done.stdout
