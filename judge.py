"""Vicuna's evaluation: models answer 80 questions, a judge compares their answers in pairs, and a
report says which model answers better.

    python judge.py                   # toy world: vicuna, alpaca, base, noisy oracle, oracle
    python judge.py --judge=first     # a judge that prefers the first answer: the report detects it
    python judge.py --questions=assets/questions.jsonl --judge=gpt-4@https://api.openai.com/v1 \\
                    --players=out/mine,gpt-3.5-turbo@https://api.openai.com/v1
    python judge.py rate alpaca vicuna     # people compare the answers, blind, in the terminal
    python judge.py report FOLDER          # a report of review files in the published format

The first of the --players is compared with every other one. The last one is the baseline: every
other player is compared with it, too. Every reply is saved in --out as soon as it arrives; rerun
the same command to resume.

References: Vicuna's blog post (March 2023) for questions, prompts and totals; Zheng et al. 2023,
Judging LLM-as-a-Judge (arXiv 2306.05685) for both orders, reference answers, biases and agreement.
"""

import getpass
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import data
from tools import teacher
from tools.config import UserError, check_at_least, refuse_unused, run
from tools.report import compare, in_turns, listing, said_in, write_report

ASSETS = Path(__file__).parent / "assets"
CATEGORIES = {"generic": 10, "knowledge": 10, "roleplay": 10, "common-sense": 10, "fermi": 10,
              "counterfactual": 10, "coding": 7, "math": 3, "writing": 10}  # as published
REFERENCED = ("coding", "math", "reasoning")  # the judge sees the reference answer, if any


@dataclass
class JudgeConfig:
    questions: str = "toy"  # toy, or a file in Vicuna's or MT-bench's format
    players: str = "out/vicuna,out/alpaca,out/base,noisy,oracle"  # or MODEL@URL, answer files
    judge: str = "oracle"  # oracle, MODEL@URL, a checkpoint; or biased: first, longer
    swap: bool = True  # judge each pair in both orders
    prompts: str = ""  # a file in the published format; assets/prompts.jsonl by default
    out: str = "out/judge"  # folder of the run
    temperature: float = 0.0  # of the players; the judge is greedy
    max_new_tokens: int = 0  # longest answer, in tokens; 0: 64 for toy questions, else 1024
    quantize: Literal["", "q8", "q4"] = ""  # quantize checkpoints to 8 or 4 bits
    seed: int = 0  # of the toy questions

    def __post_init__(self):
        check_at_least(self, 0, "temperature", "max_new_tokens", "seed")


# -- questions ------------------------------------------------------------------------------------

@dataclass
class Question:
    id: int | str
    category: str
    turns: list[str]
    reference: list[str] = field(default_factory=list)  # one for each turn, "" for none
    truths: list = field(default_factory=list)  # a toy.world.Question for each turn
    image: str = ""  # file of the picture that the question is about

    def grade(self, reply: str) -> float | None:
        """The fraction of the true answer in the last reply; None if the truth is unknown."""
        if not self.truths:
            return None
        from toy import world
        return world.grade(self.truths[-1], reply)


def load_questions(where: str, seed: int = 0) -> list[Question]:
    """Toy questions, or a file in Vicuna's format (text) or MT-bench's (turns, reference)."""
    if where == "toy":
        return toy_questions(seed)
    questions = []
    for r in read_lines(where, "question_id", "questions"):
        turns = r.get("turns") or [r.get("text")]
        if not isinstance(turns, list) or not all(isinstance(text, str) for text in turns):
            raise UserError(f"{where}: question {r['question_id']} needs text, or turns: a list of "
                            "strings")
        questions.append(Question(
            r["question_id"], r.get("category", "generic"), turns, r.get("reference") or [],
            image=r.get("image") or ""))
    if not questions:
        raise UserError(f"{where} holds no questions")
    return questions


def toy_questions(seed: int = 0) -> list[Question]:
    """80 questions in the published proportions, as far as the toy world has these categories; the
    rest are about scenes.

    Questions about a scene have two turns; the first one describes a held-out scene. The others are
    about held-out facts and tasks.
    """
    from toy import world
    rng, n = random.Random(f"judge {seed}"), sum(CATEGORIES.values())
    scenes = [world.converse(rng, "scenes", 2) for _ in range(15 * n)]  # enough of each kind
    scenes = [item for item in scenes if item.later]  # the last question needs the first turn
    items = scenes + world.test_set("facts", n, seed + 2)
    items += world.test_set("closed", 2 * n, seed + 2)
    chosen: dict[str, tuple] = {}  # by the last question, to avoid duplicates

    def choose(candidates: list, categories: Iterable[str], quota: int) -> None:
        for item in candidates:
            category, text = item.question.category, item.turns[-1][1]
            category = "generic" if category == "memory" else category
            if quota and category in categories and text not in chosen:
                chosen[text] = (category, item)
                quota -= 1

    for category, quota in CATEGORIES.items():
        choose(items, [category], quota)
    choose(scenes, CATEGORIES, n - len(chosen))
    questions = []
    for i, (category, item) in enumerate(chosen.values(), 1):
        turns = [text for _, text in item.turns[::2]]
        replies = [text for _, text in item.turns[1::2]]
        truths = []
        for text, reply in zip(turns, replies):
            truths.append(world.Question(kind="", category="", text=text, short=reply, full=reply,
                                         truth={}))
        truths.append(item.question)
        reference = [truth.full for truth in truths] if category in REFERENCED else []
        questions.append(Question(i, category, turns, reference, truths))
    return questions


# -- files ----------------------------------------------------------------------------------------

def read_lines(path, key: str, what: str) -> list[dict]:
    """The records of a file. Raises UserError unless each has its own `key`."""
    records = data.parse_records(data.read_text(path), path)
    if not all(isinstance(r, dict) and isinstance(r.get(key), (int, str)) for r in records):
        raise UserError(f"{path} must hold {what}: JSON lines, each with {key}")
    repeated = [i for i, n in Counter(r[key] for r in records).items() if n > 1]
    if repeated:
        raise UserError(f"{path}: duplicate {key} {listing(repeated)}")
    return records


def write_lines(path: Path, records: Iterable[dict]) -> None:
    with data.atomic_write(path) as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


# -- answers --------------------------------------------------------------------------------------

def answer(player, questions: list[Question], cache: teacher.ReplyCache, settings: list,
           name: str) -> list[dict]:
    """The player's answers, as records valid in both Vicuna's and MT-bench's format."""
    replies: dict[int, list[teacher.Reply]] = {q.id: [] for q in questions}
    for turn in range(max(len(q.turns) for q in questions)):
        asked = [q for q in questions if turn < len(q.turns)]
        got = cache.ask(player, [player_prompt(q, replies[q.id]) for q in asked], settings, name)
        missing = [q.id for q, reply in zip(asked, got) if reply is None]
        if missing:
            raise UserError(f"{name}: no answer to question {listing(missing)} ({player.why}); the "
                            "others are saved: rerun the same command to retry")
        for q, reply in zip(asked, got):
            replies[q.id].append(reply)
    records = []
    for q in questions:
        said, last = [reply.text for reply in replies[q.id]], replies[q.id][-1]
        records.append(dict(
            answer_id=teacher.digest(player.name, settings, q.id, said), question_id=q.id,
            model_id=player.name, text=last.text, choices=[dict(index=0, turns=said)],
            metadata=dict(ended=last.ended, grade=q.grade(last.text))))
    return records


def player_prompt(q: Question, replies: list[teacher.Reply]) -> data.Conversation:
    """The next turn of a question, after the earlier ones with the player's own replies."""
    turns = []
    for text, reply in zip(q.turns, replies):
        turns += [data.Turn("user", text), data.Turn("assistant", reply.text)]
    turns.append(data.Turn("user", q.turns[len(replies)]))
    truth = q.truths[len(replies)] if q.truths else None
    return data.Conversation(turns, extra=dict(question=truth, image=q.image))


def read_answers(path, questions: list[Question]) -> list[dict]:
    """Reads an answer file, ours or anyone's. Raises UserError unless it answers each question
    once."""
    answers = {r["question_id"]: r for r in read_lines(path, "question_id", "answers")}
    wrong = answers.keys() ^ {q.id for q in questions}
    if wrong:
        raise UserError(f"{path}: unknown or missing question: {listing(sorted(wrong, key=str))}")
    for q in questions:
        record = answers[q.id]
        said = said_in(record)
        if len(said) != len(q.turns) or None in said:
            raise UserError(f"{path}: the answer to question {q.id} must have {len(q.turns)} "
                            "turns, each a string")
        record.setdefault("answer_id", teacher.digest(str(path), q.id, said))
        record["metadata"] = dict(record.get("metadata") or {}, grade=q.grade(said[-1]))
    return [answers[q.id] for q in questions]


# -- the judge's prompts --------------------------------------------------------------------------

FIELDS = re.compile(r"\{(question|answer_1|answer_2|prompt)\}")


def load_prompts(path) -> dict[str, dict]:
    """category -> record in the published format; "general" is for all other categories."""
    prompts = {r.get("category"): r for r in read_lines(path, "prompt_id", "prompts")}
    if "general" not in prompts:
        raise UserError(f"{path}: there is no prompt of category general")
    for r in prompts.values():
        if not {"system_prompt", "prompt_template", "defaults"} <= r.keys():
            raise UserError(f"{path}: prompt {r['prompt_id']} is not in the published format")
    return prompts


def judge_prompt(q: Question, first: dict, second: dict, prompts: dict) -> data.Conversation:
    """The request to compare two answers."""
    record = prompts.get(q.category, prompts["general"])
    question, instruction = in_turns(q.turns), record["defaults"]["prompt"]
    if len(q.turns) > 1:
        instruction += ("\nThe user sent several messages. Rate only the last answer, in the "
                        "context of the earlier ones.")
    if q.category in REFERENCED and any(q.reference):
        reference = in_turns(q.reference)
        question += f"\n\n[Reference Answer]\n{reference}\n\n[The End of Reference Answer]"
        instruction += "\nThe reference answer is correct: compare both answers with it."
    said = [said_in(first), said_in(second)]
    parts = dict(question=question, prompt=instruction, answer_1=in_turns(said[0]),
                 answer_2=in_turns(said[1]))
    # In one pass, so that braces in questions and answers are left alone.
    text = FIELDS.sub(lambda match: parts[match[1]], record["prompt_template"])
    truth = q.truths[-1] if q.truths else None
    extra = dict(question=truth, answers=[turns[-1] for turns in said])
    return data.Conversation([data.Turn("user", text)], system=record["system_prompt"],
                             extra=extra)


# -- reading scores -------------------------------------------------------------------------------

NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)"
OF_TEN = r"(?: ?/ ?10\b| out of 10\b)"
SCORE = rf"{NUMBER}{OF_TEN}?"  # 9, 9/10, 9 out of 10
NAME = (r"(?:\b(?:scores?|ratings?|tuple)(?: (?:for|of) assistants? 1 and (?:assistant )?2)?"
        r"(?: is| are)? ?[:=]?|^output ?:) ?")
NAMED_TUPLE = re.compile(rf"{NAME}[(\[] ?{SCORE} ?, ?{SCORE} ?[)\]]")  # "The scores are (9, 8)"
PAIR = re.compile(rf"(?:[a-z ]*{NAME})?{SCORE} ?(?:[,;] ?| and | ){SCORE} ?\.?")  # a whole line
# "Assistant 1: 9 (correct)", but not "Assistant 1: 9 * 4 = 36"
LABEL = re.compile(
    r"assistant ([12])(?:'s)?(?: (?:final|overall|score|rating|answer|solution|code))* ?[:=] ?"
    rf"{NUMBER}(?:{OF_TEN}|(?=\.?$| ?\([a-z]|,? (?:and )?assistant| ?[,;–—-] [a-z]{{2}}))")


def read_scores(text: str) -> tuple[float, float] | None:
    """The two scores of a review, 0 to 10 each; None if it has none or contradicts itself.

    The general prompt asks for a first line with the two scores and nothing else. Without such a
    line, scores are read where they have a label or a line of their own. What a reasoning model
    thinks first is not part of the review.
    """
    review = re.split(r"</think\w*>", text.lower())[-1].partition("<think")[0]
    lines = [line.split() for line in re.sub(r"[*_`#>\"]", " ", review).splitlines()]
    lines = [" ".join(words) for words in lines if words]
    if lines and read_pair(lines[0]):
        found = {read_pair(lines[0]), read_pair(lines[-1])} - {None}
    else:
        found = other_scores(lines)
    if len(found) != 1:
        return None
    scores = found.pop()
    return scores if all(0 <= score <= 10 for score in scores) else None


def other_scores(lines: list[str]) -> set[tuple[float, float]]:
    """Scores in a named tuple, after the names of the assistants, in a line with nothing but a
    tuple, or alone in the last line."""
    found, given = set(), {"1": set(), "2": set()}
    for line in lines:
        found |= {numbers(match) for match in NAMED_TUPLE.finditer(line)}
        for match in LABEL.finditer(line):
            given[match[1]].add(float(match[2]))
        pair = read_pair(line)
        may_be_scores = line == lines[-1] or line.startswith(("(", "["))
        # A pair that occurs twice may be quoted from the question, such as a point (10, 4).
        if pair and may_be_scores and " ".join(lines).count(line) == 1:
            found.add(pair)
    return found | set(itertools.product(given["1"], given["2"]))  # several: a contradiction


def read_pair(line: str) -> tuple[float, float] | None:
    """The scores of a line that has nothing else."""
    match = PAIR.fullmatch(" ".join(re.sub(r"[()\[\]{}]", " ", line).split()))
    return numbers(match) if match else None


def numbers(match: re.Match) -> tuple[float, float]:
    return float(match[1]), float(match[2])


# -- reviews --------------------------------------------------------------------------------------

def review_files(folder: Path, a: str, b: str) -> list[Path]:
    """The two review files of a pair: with a's answers first, and with b's."""
    return [folder / f"review_{a}_{b}.jsonl", folder / "swapped" / f"review_{b}_{a}.jsonl"]


def names_of(path: Path) -> list[str]:
    """The two players of review_A_B.jsonl."""
    return path.stem.split("_", 2)[1:]


def review(judge, path: Path, answers: dict[str, list[dict]], questions: list[Question],
           prompts: dict, cache: teacher.ReplyCache) -> None:
    """Writes a review file. Its name says whose answers are shown first."""
    first, second = (answers[name] for name in names_of(path))
    prompts = [judge_prompt(q, a, b, prompts) for q, a, b in zip(questions, first, second)]
    replies = cache.ask(judge, prompts, [], path.stem)
    # The score of a review that is in the file takes precedence: a person may have corrected it.
    stored = {}
    for r in read_reviews(path):
        stored[r.get("review_id"), r.get("text")] = two_scores(r.get("score"))
    records = []
    for q, a, b, prompt, reply in zip(questions, first, second, prompts, replies):
        key = teacher.reply_key(judge, prompt, [])
        text = reply.text if reply else "error"  # as FastChat writes it
        score = stored.get((key, text)) or read_scores(text) or (-1, -1)
        records.append(dict(
            review_id=key, question_id=q.id, answer1_id=a["answer_id"], answer2_id=b["answer_id"],
            text=text, score=score, reviewer_id=judge.name, metadata={}))
    write_lines(path, records)
    if None in replies:
        print(f"{path}: {replies.count(None)} reviews failed ({judge.why}); rerun the same command "
              "to retry")


def read_reviews(path: Path) -> list[dict]:
    return read_lines(path, "question_id", "reviews") if path.exists() else []


class Review(NamedTuple):
    """The judge's review of two answers."""
    scores: tuple[float, float]
    text: str
    answers: tuple  # ids of the two answers


def parse_reviews(path: Path) -> dict[int, Review]:
    """question id -> Review, with the stored scores if they are valid, else those in the text.
    Reviews without scores are left out."""
    reviews = {}
    for r in read_reviews(path):
        text = r.get("text") or ""
        scores = two_scores(r.get("score")) or read_scores(text)
        if scores:
            answers = r.get("answer1_id"), r.get("answer2_id")
            reviews[r["question_id"]] = Review(scores, text, answers)
    return reviews


def two_scores(value) -> tuple[float, float] | None:
    """Stored scores; None for anything else, such as the [-1, -1] of an unreadable review."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    if not all(type(v) in (int, float) and 0 <= v <= 10 for v in value):
        return None
    return float(value[0]), float(value[1])


# -- people ---------------------------------------------------------------------------------------

@dataclass
class RateConfig:
    a: str  # a player of the run in --out
    b: str  # another one
    out: str = "out/judge"  # folder of the run
    rater: str = ""  # your name, for the agreement between raters; the login name by default


def rate(cfg: RateConfig) -> dict:
    """Asks a person which answer is better. Questions and sides are shuffled, names are hidden."""
    out, names = Path(cfg.out), sorted([cfg.a, cfg.b])
    if cfg.a == cfg.b:
        raise UserError(f"give two different players, not {cfg.a} twice")
    questions = load_questions(str(out / "question.jsonl"))
    answers = [read_answers(out / "answer" / f"answer_{name}.jsonl", questions) for name in names]
    rater = cfg.rater or getpass.getuser()
    path = out / "rating" / f"{rater}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    ratings = read_ratings(path.parent)
    rated = 0
    rng = random.Random(f"{rater} {names}")
    for n in rng.sample(range(len(questions)), len(questions)):
        q, sides = questions[n], rng.sample((0, 1), 2)
        ids = [answers[side][n]["answer_id"] for side in sides]
        if rater in ratings.get(frozenset(ids), {}):
            continue
        print(f"\n{'-' * 80}\n{in_turns(q.turns)}")
        for number, side in enumerate(sides, 1):
            print(f"\n--- answer {number}\n{in_turns(said_in(answers[side][n]))}")
        what = "last answer" if len(q.turns) > 1 else "answer"  # the judge is told the same
        choice = ""
        while choice not in ("1", "2", "t", "q"):
            choice = input(f"\nBetter {what}? [1 / 2 / t = tie / q = quit] ").strip().lower()
        if choice == "q":
            break
        winner = "tie" if choice == "t" else names[sides[int(choice) - 1]]
        rating = dict(question_id=q.id, models=[names[side] for side in sides], answer_ids=ids,
                      winner=winner, rater=rater)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(rating) + "\n")
        rated += 1
    print(f"\nadded {rated} ratings to {path}; `python judge.py report {out}` counts them")
    return dict(rated=rated)


def read_ratings(folder: Path) -> dict[frozenset, dict[str, str | None]]:
    """The ids of two answers -> {rater: the better one, None for a tie}, from all files."""
    ratings: dict[frozenset, dict[str, str | None]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for r in data.parse_records(data.read_text(path), path):
            try:
                better = dict(zip(r["models"], r["answer_ids"]), tie=None)[r["winner"]]
                ratings.setdefault(frozenset(r["answer_ids"]), {})[r["rater"]] = better
            except (LookupError, TypeError):
                raise UserError(f"{path}: {r!s:.200} is not a rating of its models") from None
    return ratings


# -- the report -----------------------------------------------------------------------------------

def report(files: Iterable[list[Path]], out: Path, questions: list[Question],
           answers: Iterable[dict], judge: str = "") -> dict:
    """The report of review files. `files` has a list for each pair: one file, or two if both orders
    were judged."""
    categories = {q.id: q.category for q in questions}
    by_id = {r["answer_id"]: r for r in answers if r.get("answer_id")}
    ratings = read_ratings(out / "rating")
    pairs = []
    for paths in files:
        orders = [parse_reviews(path) for path in paths]
        pairs.append(compare(*names_of(paths[0]), orders, categories, by_id, ratings))
    return write_report(pairs, questions, out, judge)


@dataclass
class ReportConfig:
    folder: str  # with question.jsonl, answer/ and review/, as published; the report goes there


def report_files(cfg: ReportConfig) -> dict:
    """A report of all review files in a folder."""
    folder, files = Path(cfg.folder), []
    for path in sorted(folder.rglob("review_*_*.jsonl")):
        if path.parent.name != "swapped":
            both = review_files(path.parent, *names_of(path))
            files.append([file for file in both if file.exists()])
    if not files:
        raise UserError(f"no review_A_B.jsonl in {folder}")
    questions = load_questions(str(folder / "question.jsonl"))
    answers = []
    for path in sorted((folder / "answer").glob("*.jsonl")):
        answers += read_lines(path, "question_id", "answers")
    judges = {str(r.get("reviewer_id", "")) for paths in files for r in read_reviews(paths[0])}
    return report(files, folder, questions, answers, ", ".join(sorted(judges)))


# -- python judge.py ------------------------------------------------------------------------------

def main(cfg: JudgeConfig) -> dict:
    players = name_players(cfg.players)
    check_options(cfg, list(players.values()))
    out, questions = Path(cfg.out), load_questions(cfg.questions, cfg.seed)
    prompts = load_prompts(cfg.prompts or ASSETS / "prompts.jsonl")
    judge = teacher.teacher(cfg.judge, quantize=cfg.quantize)
    write_lines(out / "question.jsonl", [
        dict(question_id=q.id, category=q.category, turns=q.turns, text=q.turns[-1],
             reference=q.reference, image=q.image) for q in questions])
    cache = teacher.ReplyCache(out / "replies.jsonl")
    answers = {name: get_answers(name, spec, questions, cache, cfg)
               for name, spec in players.items()}
    first, *others, baseline = players
    # (a, b): the report gives b's total in percent of a's
    pairs = [(name, first) for name in (*others, baseline)]
    pairs += [(baseline, name) for name in others]
    files = [review_files(out / "review", a, b) for a, b in pairs]
    if not cfg.swap:
        files = [paths[:1] for paths in files]
    n_reviews = len(questions) * sum(map(len, files))
    print(f"{first} against every other player, and every player against {baseline}: {n_reviews} "
          f"reviews by {judge.name}")
    for path in itertools.chain(*files):
        review(judge, path, answers, questions, prompts, cache)
    return report(files, out, questions, itertools.chain(*answers.values()), judge.name)


def name_players(players: str) -> dict[str, str]:
    """name -> spec. A player is named after the end of its path, or its server's model; if two
    names are equal, all players are named after their whole specs."""
    specs = [spec.strip() for spec in players.split(",") if spec.strip()]
    names = [spec.split("@http")[0].rstrip("/").split("/")[-1] for spec in specs]
    names = [name.removesuffix(".jsonl").removeprefix("answer_") for name in names]
    if len(set(names)) < len(specs):
        names = specs
    # An underscore separates the two names of review_A_B.jsonl.
    named = {re.sub(r"[^\w.-]+|_", "-", name).strip("-"): spec for name, spec in zip(names, specs)}
    if len(named) < max(2, len(specs)):
        raise UserError(f"--players={players}: give two or more different players")
    return named


def check_options(cfg: JudgeConfig, specs: list[str]) -> None:
    """Raises UserError for players that cannot play, and for options that would have no effect."""
    player_kinds = {teacher.kind(spec) for spec in specs if not spec.endswith(".jsonl")}
    kinds = player_kinds | {teacher.kind(cfg.judge)}
    for spec in (*specs, cfg.judge):
        if spec in teacher.TOYS and cfg.questions != "toy":
            raise UserError(f"{spec} works only with --questions=toy: change --players or --judge")
    if {"first", "longer"} & set(specs) or cfg.judge == "noisy":
        raise UserError("first and longer can only judge, noisy can only answer")
    unused = [
        (cfg.questions != "toy", ["seed"], "the questions come from a file"),
        (player_kinds <= {"toy"}, ["temperature", "max_new_tokens"], "no player is a model"),
        ("checkpoint" not in kinds, ["quantize"], "neither a player nor the judge is a checkpoint"),
    ]
    for is_unused, names, why in unused:
        if is_unused:
            refuse_unused(cfg, names, why)


def get_answers(name: str, spec: str, questions: list[Question], cache: teacher.ReplyCache,
                cfg: JudgeConfig) -> list[dict]:
    """One player's answers, from its file or from the player itself."""
    if spec.endswith(".jsonl"):
        answers = read_answers(spec, questions)
    else:
        settings = [cfg.temperature, cfg.max_new_tokens or (64 if cfg.questions == "toy" else 1024)]
        player = teacher.teacher(spec, *settings, cfg.quantize)
        answers = answer(player, questions, cache, settings, name)
    write_lines(Path(cfg.out) / "answer" / f"answer_{name}.jsonl", answers)
    print(f"{name}: {len(questions)} answers")
    return answers


if __name__ == "__main__":
    run(None, {"": (main, JudgeConfig), "rate": (rate, RateConfig),
               "report": (report_files, ReportConfig)})
