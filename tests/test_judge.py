"""Tests of judge.py: questions, answers, reading scores, reviews, figures, people, the report."""

import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import browser
import judge
from test_teacher import KEY, fake  # noqa: F401  (fake is a fixture)
from tools import config, teacher
from tools.config import UserError
from tools.report import PAGE, agreement, biases, compare, findings, main_pair, print_report
from toy import pictures, world

ROOT = Path(judge.__file__).parent
MICRO = ROOT / "tests" / "micro"


def write(path: Path, records: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def lines(path) -> list[dict]:
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def run(out, **options) -> dict:
    settings = dict(out=str(out), players="noisy,oracle")
    return judge.main(judge.JudgeConfig(**{**settings, **options}))


def report(folder) -> dict:
    return judge.report_files(judge.ReportConfig(str(folder)))


# -- reading scores -------------------------------------------------------------------------------

READABLE = {
    "9  8 \r": (9, 8),
    "\n\n9/10, 8 / 10": (9, 8),
    "**Scores: 9 8**": (9, 8),
    "9 8.75\nBoth": (9, 8.75),
    "<think>\n7 6? No.\n</think>\n\n9 8\nBoth": (9, 8),
    "<thinking>Scores: 1 2</thinking> <think></think>Assistant 1: 9\nAssistant 2: 8": (9, 8),
    "0 10\nThe first point is (10, 4), not 3 of 5.": (0, 10),
    "Both are good.\n\n9 8": (9, 8),
    "First I solve it.\n```python\n(9, 8)\n```\nWhy: ...": (9, 8),
    "Assistant 2: 8, Assistant 1: 9": (9, 8),
    "**Assistant 1:** 9\n**Assistant 2:** 7.5\n\nThe first is better.": (9, 7.5),
    "Assistant 1: 2 (no steps)\nAssistant 2: 1/10 (wrong)": (2, 1),
    "Assistant 1: 1/10 - It is wrong.\n\nAssistant 2: 2/10 - So is this.\n\nWeak.": (1, 2),
    "Points are (2, -2) and (10, 4).\nThe output tuple is (10, 1). Assistant 1 is better.": (10, 1),
    "It is 39.\n\nOutput: (1, 10)": (1, 10),
    "The scores for Assistant 1 and Assistant 2 are (9, 8), respectively.": (9, 8),
    "Assistant 1:\n3x + 10 = 5(x - 2)\nScores:\nAssistant 1: 10\nAssistant 2: 1\n\nOk.": (10, 1),
}
UNREADABLE = [
    "", "error", "11 5", "-1 -1", "nan inf", "9", "9 8 7", "9 out of 5, 8 out of 5", "9% 8%",
    "8,5 9", "9 8 out of 100", "1*0 8", "Assistant 1: 9", "Assistant 1: 9/100 Assistant 2: 8/100",
    "The segment ends in (2, -2) and (10, 4), so it is 10 long.",
    "The lines meet in (10, 4).\n\n(10, 4)",
    "The output of the program is (3, 4).",
    "Assistant 1: 5 * 8 - 4 = 36\nAssistant 2: 40 - 4 = 36",
    "9 8\nThey are good.\n7 6", "<think>\n9 8\n", "<think>9 8</think>",
    "Assistant 1: 9\nAssistant 2: 8\n\nOn reflection:\nAssistant 1: 7\nAssistant 2: 8",
    "Scores: (9, 8)\n\nOutput: (8, 9)", "[[8/10]]", "Year 2023: 9 of 10 say 8 is enough.",
]


@pytest.mark.parametrize("text", [*READABLE, *UNREADABLE], ids=lambda t: t[:40])
def test_scores_are_read_as_a_person_would_and_not_guessed(text):
    assert judge.read_scores(text) == READABLE.get(text)


# -- questions ------------------------------------------------------------------------------------

def test_toy_questions():
    """Figures are comparable only over the same questions: they must not change by accident."""
    questions = judge.toy_questions()
    text = json.dumps([[q.id, q.category, q.turns, q.reference] for q in questions])
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "c658c10d2d9df4b8935532fe256707f2a2b281b4416df828032b79e41ba51705"
    for q in questions:
        assert len(q.truths) == len(q.turns) and q.truths[-1].text in q.turns[-1]
        assert q.grade(q.truths[-1].full) == 1


def test_our_own_questions():
    questions = judge.load_questions(str(ROOT / "assets" / "questions.jsonl"))
    counts = {c: sum(q.category == c for q in questions) for c in judge.CATEGORIES}
    assert counts == judge.CATEGORIES and [q.id for q in questions] == list(range(1, 81))
    assert [q.id for q in questions if q.reference] == list(range(61, 71))


def test_question_files(tmp_path):
    mt_bench = dict(question_id=81, category="stem", turns=["a {b}", "c"], reference=["", "d"])
    vicuna = dict(question_id=82, category="cooking", text="e")
    one, two = judge.load_questions(write(tmp_path / "q.jsonl", [mt_bench, vicuna]))
    assert (one.turns, one.reference, two.turns) == (["a {b}", "c"], ["", "d"], ["e"])
    for records, message in (([vicuna, vicuna], "duplicate"),
                             ([dict(question_id=1, turns=["a", 3])], "turns"),
                             ([dict(id=1, text="a")], "must hold questions")):
        with pytest.raises(UserError, match=message):
            judge.load_questions(write(tmp_path / "bad.jsonl", records))


# -- answers --------------------------------------------------------------------------------------

QUESTIONS = [
    judge.Question(1, "generic", ["Say something."]),
    judge.Question(2, "math", ["1 + 1?"], ["It is 2."]),
    judge.Question(3, "coding", ["First.", "Second."], ["", "Reference {answer_1}."]),
]


def test_answer_files_are_checked(tmp_path):
    """An answer that stands beside another question would give wrong figures."""
    a, b, c = (dict(question_id=i, text="abc"[i - 1]) for i in (1, 2, 3))
    path = tmp_path / "a.jsonl"
    good = judge.read_answers(write(path, [b, a]), QUESTIONS[:2])
    assert [r["text"] for r in good] == ["a", "b"]
    for records, questions, message in (([a], QUESTIONS[:2], "question: 2"),
                                        ([a, b, c], QUESTIONS[:2], "question: 3"),
                                        ([a, b, c], QUESTIONS, "question 3 must have 2 turns")):
        with pytest.raises(UserError, match=message):
            judge.read_answers(write(path, records), questions)


class Player:
    """Numbers its replies, and gives None when its patience is over."""
    name, why = "player", "the line went dead"

    def __init__(self, patience: int):
        self.patience, self.heard = patience, []

    def __call__(self, conversations, keep):
        for i, c in enumerate(conversations):
            if not self.patience:
                return
            self.patience -= 1
            self.heard.append([turn.text for turn in c.turns])
            keep(i, teacher.Reply(f"reply {len(self.heard)}", True))


def test_a_second_turn_shows_the_first_answer_and_an_interrupted_run_resumes(tmp_path):
    """Nothing is asked twice, and a line that was cut off when the machine stopped is no reply."""
    path, player = tmp_path / "replies.jsonl", Player(patience=3)  # the second turn fails
    twin = judge.Question(4, "generic", ["Say something."])  # has an answer of its own

    def answer(*settings) -> list[dict]:
        cache = teacher.ReplyCache(path)
        return judge.answer(player, [*QUESTIONS, twin], cache, [*settings], "player")

    with pytest.raises(UserError, match="no answer to question 3.*line went dead.*same command"):
        answer()
    path.write_text(path.read_text() + '\n{"key": "half')
    player.patience = 99
    got = answer()
    assert player.heard == [["Say something."], ["1 + 1?"], ["First."],
                            ["First.", "reply 3", "Second."]]
    assert [judge.said_in(a) for a in got] == [["reply 1"], ["reply 2"], ["reply 3", "reply 4"],
                                               ["reply 1"]]
    assert got[0]["answer_id"] != got[3]["answer_id"]
    answer("another temperature")
    assert len(player.heard) == 8 and answer() == got


# -- prompts --------------------------------------------------------------------------------------

def test_prompts_have_the_published_structure():
    prompts = judge.load_prompts(ROOT / "assets" / "prompts.jsonl")
    texts = []
    for q in QUESTIONS:
        turns = ["A {question}", "B"][:len(q.turns)]
        record = dict(choices=[dict(turns=turns)])
        texts.append(judge.judge_prompt(q, record, record, prompts).turns[0].text)
    assert re.findall(r"^\[.*?\]$", texts[0], re.M) == [
        "[Question]",
        "[The Start of Assistant 1's Answer]", "[The End of Assistant 1's Answer]",
        "[The Start of Assistant 2's Answer]", "[The End of Assistant 2's Answer]",
        "[System]"]
    # Braces stay as they are: with str.format, the answer would show the question.
    assert "1's Answer]\nA {question}\n\n[The End" in texts[0] and "Reference" not in texts[0]
    assert "[Reference Answer]\nIt is 2." in texts[1] and "tuple" in texts[1]
    assert "first line" in texts[0] + texts[2] and "first line" not in texts[1]
    assert "Turn 1: First.\n\nTurn 2: Second." in texts[2] and "Turn 2: B" in texts[2]
    assert "Reference {answer_1}." in texts[2] and "Rate only the last answer" in texts[2]


def test_prompts_from_a_published_file(tmp_path):
    record = dict(
        prompt_id=1, category="general", system_prompt="S", defaults=dict(prompt="P"),
        prompt_template='{"json": [1]} Q {question} 1 {answer_1} 2 {answer_2} {prompt}')
    prompts = judge.load_prompts(write(tmp_path / "p.jsonl", [record]))
    asked = judge.judge_prompt(QUESTIONS[0], dict(text="a"), dict(text="b"), prompts)
    assert asked.system == "S"
    assert asked.turns[0].text == '{"json": [1]} Q Say something. 1 a 2 b P'
    with pytest.raises(UserError, match="no prompt of category general"):
        judge.load_prompts(write(tmp_path / "p.jsonl", [{**record, "category": "math"}]))


# -- the whole run, on the toy world --------------------------------------------------------------

@pytest.fixture(scope="module")
def terse(tmp_path_factory) -> str:
    """An answer file: right wherever a terse answer can be right, and empty once."""
    records = []
    for q in judge.toy_questions():
        turns = [""] * (len(q.turns) - 1) + [q.truths[-1].short]
        records.append(dict(question_id=q.id, choices=[dict(index=0, turns=turns)]))
    records[4]["choices"][0]["turns"][-1] = ""
    return write(tmp_path_factory.mktemp("answers") / "answer_terse.jsonl", records)


def test_a_run_with_a_checkpoint_and_a_file_counts_right(tmp_path, terse):
    figures = run(tmp_path, players=f"{MICRO},{terse},noisy,oracle")
    assert [p["title"] for p in figures["pairs"]] == [
        "terse : micro", "noisy : micro", "oracle : micro", "oracle : terse", "oracle : noisy"]
    grades = {}
    for name in ("micro", "terse", "noisy", "oracle"):
        records = lines(tmp_path / "answer" / f"answer_{name}.jsonl")
        grades[name] = [q.grade(judge.said_in(r)[-1])
                        for q, r in zip(judge.toy_questions(), records)]
    for p in figures["pairs"]:  # counted again from the answers
        a, b = grades[p["a"]], grades[p["b"]]
        wins, losses = sum(x < y for x, y in zip(a, b)), sum(x > y for x, y in zip(a, b))
        assert p["totals"] == pytest.approx([sum(1 + 9 * g for g in a), sum(1 + 9 * g for g in b)])
        assert p["percent"]["value"] == pytest.approx(p["totals"][1] / p["totals"][0])
        assert (p["wins"], p["ties"], p["losses"]) == (wins, 80 - wins - losses, losses)
        assert p["preferred"]["value"] == pytest.approx(wins / (wins + losses))
    assert figures["biases"]["truth"]["all"] == figures["biases"]["consistent"]["value"] == 1
    assert figures["verdict"].startswith("Terse beats Micro on ")
    assert figures["baseline"] == "oracle"
    means = {player["name"].lower(): player["mean"] for player in figures["players"]}
    assert list(means) == ["oracle", "terse", "noisy", "micro"]  # the best one first
    for name, mean in means.items():
        assert mean == pytest.approx(sum(1 + 9 * g for g in grades[name]) / 80)
    record = lines(tmp_path / "review" / "review_oracle_terse.jsonl")[4]
    assert set(record) == {"review_id", "question_id", "answer1_id", "answer2_id", "text", "score",
                           "reviewer_id", "metadata"}  # as published
    assert record["score"] == [10, 1] and record["reviewer_id"] == "oracle"


def test_both_orders_remove_a_position_bias(tmp_path, capsys):
    honest = run(tmp_path / "honest")["pairs"][0]
    one_order = run(tmp_path / "one", judge="first", swap=False)["pairs"][0]
    assert one_order["losses"] == 80 and honest["losses"] < 30  # noisy comes second, and loses
    both = run(tmp_path / "both", judge="first")
    pair = both["pairs"][0]
    assert pair["wins"] == 0 and pair["losses"] <= honest["losses"]
    printed = capsys.readouterr().out
    assert "No position bias found: both orders agree on 100%" in printed  # the honest judge
    assert "The judge prefers the first answer: both orders agree on " in printed
    assert both["biases"]["position"]["low"] > 0 and both["biases"]["consistent"]["value"] < 0.5
    equal = [r for r in pair["rows"] if r["truth"] == 0]
    assert equal and all(r["scores"][0] == r["scores"][1] for r in equal)
    again = run(tmp_path / "both", judge="first", swap=False)  # without the other order's files
    assert again["pairs"][0]["losses"] == 80 and again["biases"]["consistent"] is None


def test_a_length_bias_is_detected(tmp_path, capsys, terse):
    for judge_kind in ("oracle", "longer"):
        figures = run(tmp_path / judge_kind, players=f"{terse},oracle", judge=judge_kind)
        printed = capsys.readouterr().out
        assert ("The judge prefers longer answers" in printed) == (judge_kind == "longer")
        assert ("No length bias found" in printed) == (judge_kind == "oracle")
    assert figures["biases"]["length"]["low"] > 0 and figures["biases"]["truth"]["all"] < 1


@pytest.mark.parametrize("options, message", [
    (dict(players="noisy,noisy"), "two or more different players"),
    (dict(players="nowhere,oracle"), "no checkpoint in nowhere"),
    (dict(questions="assets/questions.jsonl"), "noisy works only with --questions=toy")], ids=str)
def test_options_that_cannot_work(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **options)


def test_players_of_the_same_name_keep_apart():
    players = judge.name_players("out/a/vicuna, out/b/vicuna,answer_x.jsonl")
    assert players == {"out-a-vicuna": "out/a/vicuna", "out-b-vicuna": "out/b/vicuna",
                       "answer-x.jsonl": "answer_x.jsonl"}
    names = judge.name_players("out/vicuna-v1.5,gpt-3.5@https://api.example.com/v1,a/answer_x.jsonl")
    assert list(names) == ["vicuna-v1.5", "gpt-3.5", "x"]  # they were cut at the dot


def test_command_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "judge.py"), "--players=noisy,oracle"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "wrote out/judge/report.html" in done.stdout, done.stderr


# -- a server as the judge ------------------------------------------------------------------------

def test_a_server_judges_and_no_reply_is_paid_for_twice(tmp_path, capsys, fake):  # noqa: F811
    rng = random.Random(0)
    fake.says = lambda body: f"{rng.randint(1, 10)} {rng.randint(1, 10)}\nYour key is {KEY}."
    trouble = [(429, "wait", {"Retry-After": "0"}), (500, KEY), ("text", "garbage"), ("half",)]
    fake.script = [None] * 20 + trouble + [None] * 20 + [(401, KEY)] * 9
    options = dict(judge=f"gpt-4@{fake.url}")
    with pytest.raises(UserError, match="401.*same command resumes"):
        run(tmp_path, **options)
    texts = [r["text"] for r in lines(tmp_path / "replies.jsonl")]
    assert sum(text.endswith("Your key is [key].") for text in texts) == len(fake.answered) >= 40
    n = len(fake.answered)
    fake.script = []
    figures = run(tmp_path, **options)
    printed = capsys.readouterr()
    assert figures["pairs"][0]["n"] == 80 and run(tmp_path, **options) == figures
    asked = {json.dumps(body) for body in fake.answered}
    assert len(fake.answered) == len(asked)
    tokens = f"{7 * (80 - n)} prompt tokens, {3 * (80 - n)} completion tokens"
    assert f"review_oracle_noisy: {tokens}" in printed.out
    files = "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file())
    assert KEY not in printed.out + printed.err + files
    assert {body["messages"][0]["role"] for _, body in fake.requests} == {"system"}


@pytest.mark.parametrize("replies", [80, 0])
def test_a_judge_without_scores_ranks_nobody(tmp_path, capsys, monkeypatch, replies):
    """It gives no scores, or no reply at all. A score that a person adds survives the next run,
    which writes the files again."""
    oracle = teacher.Oracle
    monkeypatch.setattr(teacher, "Oracle",
                        lambda kind: Player(replies) if kind == "first" else oracle(kind))
    pair = run(tmp_path, judge="first", swap=False)["pairs"][0]
    assert pair["n"] == 0 and pair["percent"] is pair["preferred"] is None
    assert len(pair["left_out"]) == 80
    missing = "80 reviews failed (the line went dead); rerun the same command"
    assert (missing in capsys.readouterr().out) == (replies == 0)
    file = tmp_path / "review" / "review_oracle_noisy.jsonl"
    records = lines(file)
    assert {tuple(r["score"]) for r in records} == {(-1, -1)}  # as published
    records[7]["score"] = [9, 8]
    write(file, records)
    again = run(tmp_path, judge="first", swap=False)["pairs"][0]
    assert again["totals"] == [9, 8] and len(again["left_out"]) == 79


def test_an_oracle_with_other_rules_gives_other_scores(tmp_path, monkeypatch):
    """A student edits how the oracle judges and runs the same command: the scores of the last run
    are not shown again."""
    before = run(tmp_path, swap=False)["pairs"][0]
    monkeypatch.setattr(teacher.Oracle, "review", lambda self, conversation: "5 5")
    assert run(tmp_path, swap=False)["pairs"][0]["totals"] == [400, 400] != before["totals"]


# -- published review files -----------------------------------------------------------------------

def test_stored_scores_count_and_else_the_text_is_read(tmp_path):
    """Even where they contradict the text, as some published ones do."""
    categories = ["generic", "generic", "math", "math", "generic", "generic"]
    write(tmp_path / "question.jsonl", [dict(question_id=i, category=category, text="?")
                                        for i, category in enumerate(categories, 1)])
    name = "vicuna-13b:20230322-new-hp-fp16"
    file = tmp_path / "review" / "vicuna-13b" / f"review_llama_{name}.jsonl"
    records = [
        dict(question_id=1, text="7 8.5\nFine.", score=[7.0, 8.5]),
        dict(question_id=2, text="9 8", score=[-1, -1]),  # as the published code marks no scores
        dict(question_id=3, text="The scores are (10, 4).", score=[10, 2]),
        dict(question_id=4, text="Scores: 6 6"),
        dict(question_id=5, text=None, score=[True, 2]),
        dict(question_id=6, text="?", score=[99, 8])]  # not on the scale
    write(file, records)
    p = report(tmp_path)["pairs"][0]
    assert (p["a"], p["b"], p["n"], p["left_out"]) == ("llama", name, 4, [5, 6])
    assert (p["totals"], p["wins"], p["ties"], p["losses"]) == ([32, 24.5], 1, 1, 2)
    assert p["categories"]["math"]["totals"] == [16, 8]
    write(file, [records[0], records[0]])
    with pytest.raises(UserError, match="duplicate question_id 1"):
        report(tmp_path)


def test_a_question_that_is_readable_in_one_order_only_is_left_out(tmp_path):
    """One order alone would bring the position bias back."""
    write(tmp_path / "question.jsonl", [dict(question_id=i, text="?") for i in (1, 2, 3)])
    write(tmp_path / "review_a_b.jsonl",
          [dict(question_id=i, text="9 7") for i in (1, 2)] + [dict(question_id=3, text="5 6")])
    write(tmp_path / "swapped" / "review_b_a.jsonl",
          [dict(question_id=1, text="8 7"), dict(question_id=2, text="error")])
    pair = report(tmp_path)["pairs"][0]
    assert (pair["totals"], pair["ties"], pair["left_out"]) == ([8, 7.5], 1, [2, 3])


def test_reviews_of_unknown_questions_are_not_totaled(capsys):
    """Of another version of the questions, say. They were a category of their own."""
    ids = ("x", "y")
    order = {1: judge.Review((9, 8), "", ids), 99: judge.Review((1, 10), "", ids)}
    swapped = {1: judge.Review((8, 9), "", ids), "1": judge.Review((1, 10), "", ids)}
    figures = compare("a", "b", [order, swapped], {1: "generic", 2: "math"}, {}, {})
    assert figures["totals"] == [9, 8] and list(figures["categories"]) == ["generic"]
    assert figures["left_out"] == [2, 99, "1"]
    print_report(dict(pairs=[figures], findings=[]))
    assert "a : b: left out question 2, 99, 1: no readable scores" in capsys.readouterr().out


# -- people ---------------------------------------------------------------------------------------

def test_people_rate_blind_and_their_agreement_is_counted(tmp_path, capsys, monkeypatch):
    run(tmp_path)
    questions = judge.toy_questions()
    capsys.readouterr()

    def sit(rater: str, choose) -> int:
        monkeypatch.setattr("builtins.input", lambda prompt: choose(capsys.readouterr().out))
        config = judge.RateConfig("noisy", "oracle", out=str(tmp_path), rater=rater)
        return judge.rate(config)["rated"]

    def honest(screen: str) -> str:
        assert not re.search("noisy|oracle", screen), "not blind"
        asked, first, second = re.split(r"--- answer [12]\n", screen)
        q = next(q for q in questions if all(turn in asked for turn in q.turns))
        a, b = (q.grade(said.strip().split("Turn 2: ")[-1]) for said in (first, second))
        if a == b:
            return "t"
        return "1" if a > b else "2"

    tired = iter(["2"] * 40 + ["what?", "q"])
    assert sit("anna", honest) == 80
    assert sit("anna", honest) == 0  # nothing is asked twice
    assert sit("bert", lambda screen: next(tired)) == 40
    anna, bert = (lines(tmp_path / "rating" / f"{name}.jsonl") for name in ("anna", "bert"))
    assert 20 < sum(r["models"][0] == "noisy" for r in anna) < 60  # sides are shuffled
    winners = {r["question_id"]: r["winner"] for r in anna}
    same = sum(winners[r["question_id"]] == r["winner"] for r in bert)
    b = report(tmp_path)["biases"]
    assert (b["people_people"]["n"], b["people"]["n"]) == (40, 120)
    # the judge knows the truth, and so does anna
    assert b["people"]["all"] == pytest.approx((80 + same) / 120)
    assert "The judge agrees with people on " in capsys.readouterr().out


def test_a_rating_of_unknown_words_is_refused(tmp_path):
    """It was counted as a tie; one without a rater ended the report with a traceback."""
    good = dict(models=["a", "b"], answer_ids=["x", "y"], winner="b", rater="anna")
    tie = dict(good, answer_ids=["z", "y"], winner="tie")
    write(tmp_path / "anna.jsonl", [good, tie])
    assert judge.read_ratings(tmp_path) == {
        frozenset("xy"): {"anna": "y"}, frozenset("zy"): {"anna": None}}
    bad = [dict(good, winner=word) for word in ("both", "B", "", None, 1, ["a"], "model_a")]
    bad += [{k: v for k, v in good.items() if k != key} for key in good]
    for rating in [*bad, 5, "b", dict(good, answer_ids=None), dict(good, rater=[])]:
        write(tmp_path / "anna.jsonl", [good, rating])
        with pytest.raises(UserError, match="anna.jsonl.* is not a rating") as error:
            judge.read_ratings(tmp_path)
        assert "\n" not in str(error.value)


def test_ctrl_d_ends_a_rating(tmp_path, monkeypatch, capsys):
    answers = [dict(question_id=q.id, text=None, choices=[dict(turns=q.turns)]) for q in QUESTIONS]
    write(tmp_path / "question.jsonl", [dict(question_id=q.id, turns=q.turns) for q in QUESTIONS])
    for name in "ab":
        write(tmp_path / "answer" / f"answer_{name}.jsonl", answers)
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    monkeypatch.setattr("sys.argv", ["judge.py", "a", "b", f"--out={tmp_path}", "--rater=anna"])
    with pytest.raises(SystemExit) as stopped:
        config.run(judge.rate, judge.RateConfig)
    assert stopped.value.code == 130 and len(judge.read_ratings(tmp_path / "rating")) == 1


def test_agreement_with_and_without_ties():
    votes = [(1, 1), (1, -1), (0, 0), (0, 1), (-1, -1), (1, 0)]
    assert agreement(votes) == dict(n=6, all=0.5, n_decided=3, decided=pytest.approx(2 / 3))
    assert agreement([]) is None and agreement([(0, 1)])["decided"] is None


# -- verdicts in words ----------------------------------------------------------------------------

def played(a: str, b: str, wins: int, ties: int, losses: int) -> dict:
    """The figures of a pair with so many wins of b."""
    scores = [(5, 9)] * wins + [(7, 7)] * ties + [(9, 5)] * losses
    order = {i: judge.Review(pair, "", ("x", "y")) for i, pair in enumerate(scores)}
    return compare(a, b, [order], dict.fromkeys(range(80), "generic"), {}, {})


@pytest.mark.parametrize("counts, words", [
    ((46, 30, 4), "Vicuna beats Alpaca on 92% of decided questions"),
    ((4, 30, 46), "Alpaca beats Vicuna on 92% of decided questions"),
    ((57, 23, 0), "Vicuna beats Alpaca on all 57 decided questions"),
    ((20, 44, 16), "Vicuna against Alpaca: too close to tell"),
    ((5, 75, 0), "Vicuna against Alpaca: too few decided questions to tell"),  # a coin does it, too
    ((0, 0, 6), "Alpaca beats Vicuna on all 6 decided questions"),
    ((0, 80, 0), "Vicuna against Alpaca: too few decided questions to tell"),
    ((0, 0, 0), "Vicuna against Alpaca: no readable review")], ids=str)
def test_a_verdict_is_claimed_only_if_the_interval_excludes_a_coin(counts, words):
    pair = played("alpaca", "vicuna", *counts)
    assert pair["verdict"] == words
    assert pair["record"] == "Vicuna against Alpaca: {} won, {} tied, {} lost".format(*counts)


def test_the_evidence_for_a_verdict_is_seen_from_the_winner():
    """The interval of a loser's 8% is turned around; 100% has none, since a bootstrap of equal
    verdicts says [100, 100] however few there are."""
    pair = played("gpt-4", "vicuna", 4, 30, 46)
    low, high = map(int, re.search(r"interval (\d+)% to (\d+)%", pair["evidence"]).groups())
    assert 80 <= low < 92 < high <= 100
    assert pair["evidence"] == (f"gpt-4 won 46 of the 50 decided questions (95% interval {low}% to "
                                f"{high}%); 30 of 80 questions tied")
    assert played("a", "b", 3, 1, 0)["evidence"] == (
        "B won 3 of the 3 decided questions; 1 of 4 questions tied; 76 left out, without readable "
        "scores")


def test_the_report_is_about_the_first_player_and_not_about_the_baseline():
    """Review files are read in alphabetical order."""
    names = ["base alpaca", "base noisy", "base vicuna", "alpaca vicuna", "noisy vicuna"]
    pairs = [played(*pair.split(), 1, 1, 1) for pair in names]
    assert main_pair(pairs)["title"] == "alpaca : vicuna"
    assert main_pair(pairs[:1])["title"] == "base : alpaca"


def test_a_judge_without_references_is_not_called_fair():
    """Without a review in both orders, and without a known truth, no bias was tested."""
    found = findings(biases(played("a", "b", 1, 1, 1)["rows"]))
    assert [finding["verdict"] for finding in found] == ["Position bias was not measured"]
    assert found[0]["biased"] is None


# -- the page -------------------------------------------------------------------------------------

EVIL = "</script><img src=x onerror=document.title='gone'>{{DATA}}"


def test_the_page_needs_no_network_and_no_answer_can_break_it(tmp_path, terse):
    records = lines(terse)
    records[0]["choices"][0]["turns"][-1] = EVIL
    run(tmp_path, players=write(tmp_path / "answer_evil.jsonl", records) + ",oracle")
    page = (tmp_path / "report.html").read_text()
    before, rest = page.split('<script id="data" type="application/json">')
    embedded, after = rest.split("</script>", 1)
    assert not re.search(r"https?://|\bsrc=|@import|<link", before + after)
    assert page.count("</script>") == 2
    inside = json.loads(embedded)
    assert inside["pairs"][0]["rows"][0]["said"][1].endswith(EVIL)
    assert set(re.findall(r"\bdata\.(\w+)", after)) <= set(inside)  # what the page reads is there
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser:
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             f"file://{tmp_path}/report.html"], capture_output=True, text=True, timeout=120)
        assert "<title>Who answers better?</title>" in done.stdout
        assert done.stdout.count('class="case"') == 80
        assert "&lt;/script&gt;&lt;img" in done.stdout


def luminance(color: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG 2 defines it."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_can_be_read_and_told_apart_by_brightness(scheme):
    """White on beige had a contrast of 2.1; won and lost were equally bright: one gray in print."""
    blocks = re.findall(r":root \{(.*?)\}", PAGE.read_text(encoding="utf-8"), re.S)
    colors = dict(re.findall(r"--([\w-]+): (#\w+);", blocks[scheme == "dark"]))
    texts = [(text, fill) for text in ("text", "soft", "bad") for fill in ("page", "card")]
    texts += [(name, name.removeprefix("on-")) for name in colors if name.startswith("on-")]
    assert len(texts) == 16
    for text, fill in texts:
        assert contrast(colors[text], colors[fill]) >= 4.5, f"{text} on {fill}"
    for one, other in (("won", "tied"), ("tied", "lost"), ("won", "lost")):
        assert contrast(colors[one], colors[other]) > 1.6, f"{one} beside {other}"
    heat = [luminance(colors[f"heat{i}"]) for i in range(6)]
    assert heat == sorted(heat, reverse=scheme == "light")


SCENE = "<Img> small left green diamond ; nothing nothing nothing nothing nothing </Img>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report in which names, categories, questions, answers and reviews are hostile."""
    if not browser.CHROMIUM:
        pytest.skip("no chromium")
    folder = tmp_path_factory.mktemp("page")
    turns = [[f"Look: {SCENE} Where is it?"], ["<Img> a green dragon </Img> Is it (a+ real?"],
             ["First.", EVIL], ["Fourth."]]
    write(folder / "question.jsonl", [
        dict(question_id=i, category=EVIL if i == 2 else "generic", turns=texts)
        for i, texts in enumerate(turns)])
    name = "<img src=x onerror=document.title='gone'>"
    for player, text in ((name, EVIL), ("b", "At left. " * 200)):
        write(folder / "answer" / f"answer_{player}.jsonl",
              [dict(question_id=i, answer_id=f"{player}{i}", text=text) for i in range(4)])
    write(folder / f"review_{name}_b.jsonl", [
        dict(question_id=i, text=f"5 {score}\n{EVIL} {'needle' * (i == 3)}", reviewer_id=EVIL,
             answer1_id=f"{name}{i}", answer2_id=f"b{i}")
        for i, score in enumerate((9, 2, 5, 9))])
    figures = report(folder)
    with browser.open_page(f"file://{folder}/report.html", folder / "profile") as page:
        page.resize(1400, 900)
        page.until("document.readyState == 'complete'")
        page.figures = figures
        yield page
        assert not page.errors


def test_nothing_of_the_data_runs_in_the_page(page):
    assert page.run("document.querySelector('h1').textContent") == page.figures["verdict"]
    assert "onerror" in page.figures["verdict"]
    assert page.run("document.title") == "Who answers better?"
    assert page.run("[document.images.length, document.scripts.length]") == [0, 2]


def test_search_and_filters_of_the_page(page):
    def shown() -> list[str]:
        return page.run("[...document.querySelectorAll('.begin')].map(e => e.textContent[0])")

    assert shown() == list("0123")
    page.click("#search")
    page.type("NEEDLE")  # only in a review, in lower case
    assert shown() == ["3"] and page.run("document.querySelector('mark').textContent") == "needle"
    page.run("get('search').select()")
    page.type("(a+")  # is no pattern
    assert shown() == ["1"]
    page.run("get('search').value = ''; get('category').selectedIndex = 2; show()")
    assert shown() == ["2"] and page.run("get('category').value") == EVIL
    page.run("get('category').selectedIndex = 0")
    page.click(".bar .won")  # a part of a bar shows its questions
    assert shown() == ["0", "3"]
    page.run("get('filter').value = 2; show()")
    assert shown() == ["2"]
    assert page.run("get('count').textContent") == "1 of 4 questions"
    page.run("get('filter').value = 0; show()")


def test_scenes_are_drawn_as_the_toy_world_draws_them(page):
    assert page.run("document.querySelectorAll('.said .scene path').length") == 1
    assert page.run("document.querySelector('.said .scene title').textContent") == (
        "small green diamond at left")
    assert "<Img> a green dragon </Img> Is it" in page.run("get('cases').textContent")
    tables = page.run("[COLORS, CENTERS, RADIUS, Object.keys(SHAPES)]")
    centers = {place: list(center) for place, center in pictures.CENTERS.items()}
    colors = {color: list(rgb) for color, rgb in pictures.RGB.items()}
    assert tables == [colors, centers, pictures.RADIUS, list(world.SHAPES)]
    for shape in world.SHAPES:
        inside = page.run(f"""(() => {{
            draw(document.body, [{{size: "large", color: "red", shape: "{shape}", place: "top"}}]);
            const path = document.body.lastChild.lastChild, inside = [];
            for (let y = -1; y <= 1; y += .125) for (let x = -1; x <= 1; x += .125)
                inside.push(path.isPointInFill(new DOMPoint(x, y)));
            document.body.lastChild.remove();
            return inside;
        }})()""")
        x, y = np.meshgrid(np.arange(-1, 1.01, 0.125), np.arange(-1, 1.01, 0.125))
        outside = pictures.distance(shape, x, y).ravel()
        wrong = (np.array(inside) != (outside < 0)) & (abs(outside) > 0.04)
        assert not wrong.any(), shape


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_and_can_be_read(page, width, scheme):
    page.resize(width, 900, scheme)
    page.run("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    lowest, text = page.run(browser.LOWEST_CONTRAST)
    assert lowest >= 4.5, text
