"""Vicuna's evaluation: questions, answers, reviews by a judge in both orders, scores, a report to look at.

    python judge.py                   # toy world: base, alpaca, vicuna, noisy oracle, oracle; 80 questions
    python judge.py --judge=first     # judge lab: a judge that prefers who stands first, and is found out
    python judge.py --questions=assets/questions.jsonl --judge=gpt-4@https://api.openai.com/v1 \\
                    --players=out/mine,gpt-3.5-turbo@https://api.openai.com/v1
    python judge.py rate alpaca vicuna     # people judge: blind, in the terminal
    python judge.py report FOLDER          # review files that exist already, in the published format

Everything is kept in --out as it comes, in the published formats: the same command goes on where it stopped.
A review whose scores cannot be read goes to unread.jsonl: write them in there, and run the command again.
References: Vicuna's blog (March 2023) for questions, prompts and totals; 2306.05685 for both orders,
reference answers, biases and agreement; for captions MiniGPT-4 (2304.10592), CHAIR (1809.02156) and
POPE (2305.10355).
"""

import getpass
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Literal, NamedTuple, Optional, Sequence

import numpy as np
from tqdm import tqdm

import data
import toy
from config import Problem, describe, run
from teacher import TOYS, Reply, Server, teacher

CATEGORIES = {"generic": 10, "knowledge": 10, "roleplay": 10, "common-sense": 10, "fermi": 10,
              "counterfactual": 10, "coding": 7, "math": 3, "writing": 10}  # as published
REFERENCED = ("coding", "math", "reasoning")  # judged with a reference answer when the question has one


@dataclass
class JudgeConfig:
    questions: str = "toy"  # toy, or a file in the published format (Vicuna's or MT-bench's)
    players: str = "out/base,out/alpaca,out/vicuna,noisy,oracle"  # also MODEL@URL and answer files
    model: str = ""  # the player compared with each other one; when not given vicuna, else the first
    baseline: str = ""  # the player whose total is 100 %; when not given oracle, else the last
    judge: str = "oracle"  # oracle, MODEL@URL or a checkpoint; first and longer are biased on purpose
    swap: bool = True  # judge each pair in both orders
    prompts: str = ""  # the judge's prompts, a file in the published format; our own wording when not given
    out: str = "out/judge"  # folder of the run
    temperature: float = 0.0  # of the players; the judge has 0
    max_new_tokens: int = 0  # longest answer; 0: 64 for toy questions, else 1024
    quantize: Optional[Literal["q8", "q4"]] = None  # matrices of checkpoints in eight or four bits
    per_minute: float = 0.0  # requests to a server begun in a minute; 0: no limit
    price_read: float = 0.0  # US dollars for a million tokens the judge reads
    price_written: float = 0.0  # US dollars for a million tokens the judge writes
    seed: int = 0  # of the toy questions

    def __post_init__(self):
        for name in ("temperature", "max_new_tokens", "per_minute", "price_read", "price_written", "seed"):
            if getattr(self, name) < 0:
                raise Problem(f"--{name}={getattr(self, name)} must not be negative")


# -- questions -----------------------------------------------------------------------------------------------

@dataclass
class Question:
    id: int
    category: str
    turns: list[str]
    reference: list[str] = field(default_factory=list)  # one for each turn, "" where there is none
    truths: list[toy.Question] = field(default_factory=list)  # toy: one for each turn; the last one is rated
    image: str = ""  # file of a picture that the question is about

    def grade(self, reply: str) -> Optional[float]:
        return toy.grade(self.truths[-1], reply) if self.truths else None


def load_questions(where: str, seed: int = 0) -> list[Question]:
    """Vicuna's format (question_id, text, category) or MT-bench's (turns, reference)."""
    if where == "toy":
        return toy_questions(seed)
    questions = []
    for r in read_lines(where, "question_id", "questions"):
        turns, reference = r.get("turns") or [r.get("text")], r.get("reference") or []
        if not isinstance(turns, list) or not all(isinstance(t, str) and t.strip() for t in turns):
            raise Problem(f"{where}: question {r['question_id']} has neither text nor turns")
        questions.append(Question(r["question_id"], str(r.get("category", "generic")), turns,
                                  [reference] if isinstance(reference, str) else reference,
                                  image=r.get("image") or ""))
    known = {*CATEGORIES, "reasoning", "extraction", "stem", "humanities"}
    for category in sorted({q.category for q in questions} - known):
        ids = listing(q.id for q in questions if q.category == category)
        print(f"{where}: unknown category {category} ({ids}); the general prompt is used")
    return questions


def toy_questions(seed: int = 0) -> list[Question]:
    """80 questions, in the published proportions where the toy world has that kind. Those about a scene have
    two turns: the first one tells the scene, a held-out one. The others ask for what was never trained."""
    rng, n = random.Random(f"judge {seed}"), sum(CATEGORIES.values())
    scenes = [item for item in (toy.converse(rng, "scenes", 2) for _ in range(15 * n)) if item.later]
    items = scenes + toy.test_set("facts", n, seed + 2) + toy.test_set("closed", 2 * n, seed + 2)
    chosen: dict[str, tuple] = {}  # by the last question's text, so that nothing is asked twice
    for category, quota in [*CATEGORIES.items(), (None, n)]:  # None: fill up with questions about scenes
        for item in items if category else scenes:
            kind = {"memory": "generic"}.get(item.question.category, item.question.category)
            text = item.turns[-1][1]
            if quota and len(chosen) < n and kind in (category or CATEGORIES) and text not in chosen:
                chosen[text] = (kind, item)
                quota -= 1
    questions = []
    for i, (kind, item) in enumerate(chosen.values(), 1):
        turns = [text for _, text in item.turns]
        earlier = [toy.Question("", "", *pair_, pair_[1], {}) for pair_ in zip(turns[:-1:2], turns[1::2])]
        truths = [*earlier, item.question]
        reference = [q.full for q in truths] if kind in REFERENCED else []
        questions.append(Question(i, kind, turns[::2], reference, truths))
    return questions


def read_lines(path, key: str, what: str) -> list[dict]:
    """The objects of a JSON-lines file, each with `key`, none twice."""
    records = list(data.read_records(path))
    if not records or not all(isinstance(r, dict) and isinstance(r.get(key), (int, str)) for r in records):
        raise Problem(f"{path} holds no {what}: JSON lines with {key} are needed")
    double = [i for i, n in Counter(r[key] for r in records).items() if n > 1]
    if double:
        raise Problem(f"{path}: {key} {listing(double)} more than once")
    return records


def listing(ids: Iterable) -> str:
    ids = [str(i) for i in ids]
    return ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")


# -- what was paid for is kept -------------------------------------------------------------------------------

def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:22]


class Kept:
    """A JSON-lines file that grows as replies come. `key` holds a digest of all that a reply depends on, so
    that what an earlier run left counts only for the same request. The rest waits in *.old.jsonl until it is
    wanted again."""

    def __init__(self, path: Path, key: str, wanted: Sequence[str]):
        self.path, self.key, self.wanted = path, key, wanted
        path.parent.mkdir(parents=True, exist_ok=True)
        store, found = path.with_suffix(".old.jsonl"), {}
        for file in (store, path):
            for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # empty, or half a line: the machine stopped while writing
                    continue
                found[record.get(key)] = record
        self.records: dict[str, dict] = {i: found.pop(i) for i in wanted if i in found}
        if found:
            write_lines(store, found.values())
        self.write()

    def add(self, record: dict) -> None:
        self.records[record[self.key]] = record
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")

    def write(self) -> list[dict]:
        """All records, in order; the file is replaced in one step."""
        records = [self.records[k] for k in self.wanted if k in self.records]
        write_lines(self.path, records)
        return records


def write_lines(path: Path, records: Iterable[dict]) -> None:
    with data.writing(path) as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


# -- answers -------------------------------------------------------------------------------------------------

def answer(player, questions: list[Question], path: Path, settings: list) -> list[dict]:
    """The player's answers, MT-bench's and Vicuna's format in one. In a second turn it hears its own first
    answer."""
    ids = [digest(player.name, settings, q.turns) for q in questions]
    kept = Kept(path, "answer_id", ids)
    said = {i: said_in(record) for i, record in kept.records.items()}
    with tqdm(total=sum(len(q.turns) for q in questions), desc=path.stem, leave=False,
              initial=sum(map(len, said.values()))) as bar:
        for turn in range(max(len(q.turns) for q in questions)):
            todo = [(q, i) for q, i in zip(questions, ids) if len(q.turns) > turn == len(said.get(i, []))]
            asked = []
            for q, i in todo:
                told = [*itertools.chain(*zip(q.turns, said.get(i, []))), q.turns[turn]]
                turns = [data.Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(told)]
                asked.append(data.Conversation(turns, extra=dict(
                    question=q.truths[turn] if q.truths else None, image=q.image)))

            def keep(n: int, reply: Reply) -> None:
                q, i = todo[n]
                said[i] = said.get(i, []) + [reply.text]
                kept.add(dict(answer_id=i, question_id=q.id, model_id=player.name, text=reply.text,
                              choices=[dict(index=0, turns=said[i])],
                              metadata=dict(ended=reply.ended, grade=q.grade(reply.text))))
                bar.update()

            if any(reply is None for reply in player(asked, keep)):
                missing = listing(q.id for q, i in todo if len(said.get(i, [])) == turn)
                raise Problem(f"{player.name} gave no answer to question {missing} ({player.why}); what it "
                              "gave is kept: the same command asks again")
    return kept.write()


def read_answers(path, questions: list[Question]) -> list[dict]:
    """An answer file of anybody's, checked: each question exactly once."""
    answers = {r["question_id"]: r for r in read_lines(path, "question_id", "answers")}
    missing = [q.id for q in questions if q.id not in answers]
    extra = sorted(answers.keys() - {q.id for q in questions}, key=str)
    wrong = [f"no answer to question {listing(missing)}"] * bool(missing)
    wrong += [f"there is no question {listing(extra)}"] * bool(extra)
    if wrong:
        raise Problem(f"{path}: " + "; ".join(wrong))
    for q in questions:
        r = answers[q.id]
        if not all(isinstance(text, str) for text in said_in(r)):
            raise Problem(f"{path}: the answer to question {q.id} is not text")
        if len(said_in(r)) != len(q.turns):
            raise Problem(f"{path}: question {q.id} has {len(q.turns)} turns, its answer {len(said_in(r))}")
        r.setdefault("answer_id", digest(str(path), q.id, said_in(r)))
        r["metadata"] = dict(r.get("metadata") or {}, grade=q.grade(said_in(r)[-1]))
    return [answers[q.id] for q in questions]


def said_in(record: dict) -> list[str]:
    """A player's turns: MT-bench's form, or Vicuna's."""
    choices = record.get("choices")
    return choices[0]["turns"] if choices else [record.get("text")]


# -- prompts for the judge -----------------------------------------------------------------------------------

# The published structure, and what each prompt asks for in our own words; --prompts takes the published file.
SYSTEM = "You check the quality of answers. You are helpful and precise."
TEMPLATE = ("[Question]\n{question}\n\n"
            "[The Start of Assistant 1's Answer]\n{answer_1}\n\n[The End of Assistant 1's Answer]\n\n"
            "[The Start of Assistant 2's Answer]\n{answer_2}\n\n[The End of Assistant 2's Answer]\n\n"
            "[System]\n{prompt}\n\n")
FIELDS = re.compile(r"\{(question|answer_1|answer_2|prompt)\}")
PROMPTS = {
    "general": "Two AI assistants have answered the question above. Rate how helpful, relevant, accurate "
               "and detailed each answer is: one overall score for each assistant, from 1 to 10, more is "
               "better.\n"
               "Begin with one line that holds the two scores and nothing else: that of Assistant 1, a "
               "space, that of Assistant 2. After that line, explain your rating. Be fair: who comes first "
               "must not matter.",
    "coding": "Two AI assistants were to write a program. Review their code: how each went about the "
              "problem, how the code is built, how well it reads, what its comments explain. Does it do what "
              "was asked, is it right and efficient, is it commented clearly, does it keep to good "
              "practice?\n"
              "Begin with one line that holds two scores from 1 (no code, or no sense) to 10 (perfect) and "
              "nothing else: that of Assistant 1, a space, that of Assistant 2. After that line, say what is "
              "strong, what is weak, and what could be better.",
    "math": "Two AI assistants have answered the mathematical question above. Solve it yourself first, "
            "without looking at their answers. Then go through the steps of each and find what is wrong; "
            "steps count, not only results.\n"
            "At the end, write a Python tuple with the two scores from 1 to 10, that of Assistant 1 first, "
            "and explain why they differ if they do.",
}


def load_prompts(path: str) -> dict[str, tuple[str, str, str]]:
    """By category: (system, template, instruction); "general" is for every category without its own."""
    if not path:
        return {category: (SYSTEM, TEMPLATE, text) for category, text in PROMPTS.items()}
    prompts = {}
    for r in read_lines(path, "prompt_id", "prompts"):
        parts = (r.get("system_prompt"), r.get("prompt_template"), (r.get("defaults") or {}).get("prompt"))
        if not all(isinstance(p, str) for p in parts) or len(set(FIELDS.findall(parts[1]))) < 4:
            raise Problem(f"{path}: prompt {r['prompt_id']} needs system_prompt, defaults.prompt, and a "
                          "prompt_template with {question}, {answer_1}, {answer_2} and {prompt}")
        prompts[r.get("category")] = parts
    if "general" not in prompts:
        raise Problem(f"{path}: there is no prompt of category general")
    return prompts


def ask_judge(q: Question, first: dict, second: dict, prompts: dict) -> data.Conversation:
    system, template, prompt = prompts.get(q.category, prompts["general"])
    question = in_turns(q.turns)
    if len(q.turns) > 1:
        prompt += "\nThe user spoke in several turns. Rate the last answer, in the light of those before."
    if q.category in REFERENCED and any(q.reference):
        question += f"\n\n[Reference Answer]\n{in_turns(q.reference)}\n\n[The End of Reference Answer]"
        prompt += "\nThe reference answer is right: compare both answers with it."
    answers = said_in(first), said_in(second)
    parts = dict(question=question, prompt=prompt,
                 answer_1=in_turns(answers[0]), answer_2=in_turns(answers[1]))
    body = FIELDS.sub(lambda m: parts[m[1]], template)  # once: braces in what people and models say stay
    return data.Conversation([data.Turn("user", body)], system=system, extra=dict(
        question=q.truths[-1] if q.truths else None, answers=[said[-1] for said in answers]))


def in_turns(texts: list[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"Turn {i}: {text}" for i, text in enumerate(texts, 1) if text)


# -- scores are read, never guessed --------------------------------------------------------------------------

WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)(?![0-9%]|\.[0-9])(?! ?/(?! ?10\b)| out of (?!10\b))"
OF_TEN = r"(?: ?/ ?10\b| out of 10\b)"
ONE = rf"(?:{NUMBER}{OF_TEN}?|({'|'.join(WORDS)}))"
NAMED = r"(?:(?:the |my |final |overall |python |output )*(?:scores?|ratings?|tuple|output)\b(?: tuple)?)"
# a line that is nothing but two scores
PAIR = re.compile(rf"(?:{NAMED}(?: is| are)? ?[:=]? ?)?{ONE} ?(?:, ?|; ?| and | ){ONE} ?\.?")
TUPLE = re.compile(rf"[(\[] ?{NUMBER} ?, ?{NUMBER} ?[)\]]")
NAMED_TUPLE = re.compile(r"(?:\b(?:scores?|ratings?|tuple)|^output ?:)"
                         r"(?: (?:containing|of|for|the|two|scores?|assistants?|1|2|and))*"
                         rf"(?: is| are| would be)? ?[:=]? ?{TUPLE.pattern}")
# "Assistant 1: 9", but not a step of a calculation that happens to follow the name
LABEL = re.compile(r"assistant ([12])(?:'s)?(?: (?:final|overall|score|rating|answer|solution|code))* ?[:=] ?"
                   rf"{NUMBER}(?:{OF_TEN}|"
                   r"(?=\.? ?$| ?\([a-z]|[,;]? (?:and )?assistant| ?[,;–—-] [a-z]{2}))")
PROSE = re.compile(r"assistant ([12])\b[^.!?:0-9]*?"
                   rf"(?:\bscore (?:of|is) {NUMBER}|\b(?:an?|as|at|is) {NUMBER}{OF_TEN})")


def read_scores(text: str) -> Optional[tuple[float, float]]:
    """The two scores of a review, 0 to 10 each; None when it gives none, or more than one pair, or others.

    The first line decides when it holds two scores and nothing else, as the general prompt asks for.
    Otherwise they may stand behind the assistants' names, in a named tuple, or in a line of their own (a
    tuple, or the last line) that does not repeat a tuple of other lines: a point (10, 4) in an explanation is
    not a score. All that is found must agree.
    """
    lines = [" ".join(re.sub(r"[*_`#>\"]", " ", line).lower().split()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    last, alone = len(lines) - 1, {}
    for n, line in enumerate(lines):
        match = PAIR.fullmatch(" ".join(re.sub(r"[()\[\]{}]", " ", line).split()))
        if match and (n in (0, last) or TUPLE.search(line)):
            alone[n] = pair(match)
    if 0 in alone:
        found = {alone[0], alone.get(last, alone[0])}
    else:
        tuples = [(n, pair(m)) for n, line in enumerate(lines) for m in TUPLE.finditer(line)]
        found = {p for n, p in alone.items() if all(k == n or other != p for k, other in tuples)}
        found |= {pair(m) for line in lines for m in NAMED_TUPLE.finditer(line)}
        given: dict[str, set] = {"1": set(), "2": set()}
        for line in lines:
            for m in (*LABEL.finditer(line), *PROSE.finditer(line)):
                given[m[1]] |= {float(g) for g in m.groups()[1:] if g}
        if all(given.values()):
            found |= {(a, b) for a in given["1"] for b in given["2"]}
    if len(found) != 1 or not all(0 <= score <= 10 for score in min(found)):
        return None
    return found.pop()


def pair(match: re.Match) -> tuple[float, float]:
    """The two numbers of a match, in digits or words."""
    a, b = (float(WORDS.index(g) if g in WORDS else g) for g in match.groups() if g)
    return a, b


def read_winner(text: str) -> Optional[int]:
    """MT-bench's verdict: [[A]] -1, [[B]] 1, [[C]] (a tie) 0; None when there is none, or several kinds."""
    marks = set(re.findall(r"\[\[([ABC])\]\]", text))
    return {"A": -1, "B": 1, "C": 0}[marks.pop()] if len(marks) == 1 else None


# -- reviews -------------------------------------------------------------------------------------------------

def review(judge, games: list[tuple], questions: list[Question], cfg: JudgeConfig) -> None:
    """Fills the review files `games`: (path, answers of who stands first, answers of who stands second)."""
    prompts, jobs = load_prompts(cfg.prompts), []
    for path, first, second in games:
        asked = [ask_judge(q, a, b, prompts) for q, a, b in zip(questions, first, second)]
        ids = [digest(judge.name, q.id, c.system, c.turns[0].text) for q, c in zip(questions, asked)]
        kept = Kept(path, "review_id", ids)
        jobs += [(kept, i, q, a, b, c) for i, q, a, b, c in zip(ids, questions, first, second, asked)
                 if i not in kept.records]
    paid = isinstance(judge, Server) and jobs
    if paid:
        read, written = sum(len(c.system + c.turns[0].text) for *_, c in jobs) // 4, 400 * len(jobs)
        print(f"{len(jobs)} reviews to come from {judge.name}: about {read} tokens to read, {written} to "
              "write" + cost(read, written, cfg))

    def keep(n: int, reply: Reply) -> None:
        kept, i, q, a, b, _ = jobs[n]
        kept.add(dict(review_id=i, question_id=q.id, answer1_id=a["answer_id"], answer2_id=b["answer_id"],
                      text=reply.text, score=list(read_scores(reply.text) or (-1, -1)),
                      reviewer_id=judge.name,
                      metadata=dict(ended=reply.ended, tokens=[reply.read, reply.written])))
        bar.update()

    with tqdm(total=len(jobs), desc=f"reviews by {judge.name}", leave=False) as bar:
        try:
            missing = sum(reply is None for reply in judge([c for *_, c in jobs], keep))
        finally:
            for kept in {id(job[0]): job[0] for job in jobs}.values():
                kept.write()
            if paid:
                print(f"{judge.name}: {judge.read} tokens read, {judge.written} written, {judge.retries} "
                      "requests repeated" + cost(judge.read, judge.written, cfg))
    if missing:
        print(f"{missing} reviews are missing ({judge.why}); the same command asks for them again")


def cost(read: int, written: int, cfg: JudgeConfig) -> str:
    if not cfg.price_read and not cfg.price_written:
        return " (--price_read and --price_written would tell what that costs)"
    return f", ${(read * cfg.price_read + written * cfg.price_written) / 1e6:.2f}"


class Game(NamedTuple):
    """One review of two answers. Signs are -1 for who stands first, 1 for the second, 0 for a tie."""
    review_id: str
    scores: Optional[tuple[float, float]]
    winner: Optional[int]  # None: nobody could read it
    text: str
    doubt: str  # stored scores that are not what the text says
    answers: tuple  # ids of the two answers


def read_games(path: Path, by_hand: dict[str, tuple]) -> dict[int, Game]:
    """A review file by question. What a person read counts most, then the stored score, then the text."""
    games = {}
    for r in read_lines(path, "question_id", "reviews") if path.stat().st_size else []:
        text, name = str(r.get("text", "")), str(r.get("review_id", f"{path.stem} {r['question_id']}"))
        read, stored, doubt = read_scores(text), two_scores(r.get("score")), ""
        if stored and read and stored != read:
            doubt = f"stored {stored[0]:g} {stored[1]:g}, the text says {read[0]:g} {read[1]:g}"
        scores = by_hand.get(name) or stored or read
        winner = (scores[1] > scores[0]) - (scores[1] < scores[0]) if scores else read_winner(text)
        answers = r.get("answer1_id"), r.get("answer2_id")
        games[r["question_id"]] = Game(name, scores, winner, text, doubt, answers)
    return games


def two_scores(value) -> Optional[tuple[float, float]]:
    """What a file holds as a score; the published -1, -1 stands for "not readable"."""
    good = isinstance(value, list) and len(value) == 2 and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= 10 for v in value)
    return (float(value[0]), float(value[1])) if good else None


# -- people --------------------------------------------------------------------------------------------------

@dataclass
class RateConfig:
    a: str  # a player of the run in --out
    b: str  # another one
    out: str = "out/judge"  # folder of the run: question.jsonl, answer/; ratings go to rating/
    rater: str = ""  # your name, for the agreement between raters; the login name when not given


def rate(cfg: RateConfig) -> dict:
    """Asks a person: which answer is better? Questions and sides are shuffled, names are not shown."""
    out = Path(cfg.out)
    questions = load_questions(str(out / "question.jsonl"))
    names = [cfg.a, cfg.b]
    if cfg.a == cfg.b:
        raise Problem(f"{cfg.a} cannot be compared with itself")
    answers = [read_answers(out / "answer" / f"answer_{name}.jsonl", questions) for name in names]
    rater = re.sub(r"\W+", "-", cfg.rater or getpass.getuser())
    path = out / "rating" / f"{rater}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {key for key, raters in read_ratings(path.parent).items() if rater in raters}
    rng, rated = random.Random(f"{rater} {sorted(names)}"), 0
    order = [(n, rng.random() < 0.5) for n in rng.sample(range(len(questions)), len(questions))]
    order = [(n, swapped) for n, swapped in order if (questions[n].id, frozenset(names)) not in done]
    print(f"{len(order)} questions to rate, {rater}. 1 or 2: that answer is better; t: a tie; s: skip; "
          "q: quit (all is kept)")
    for left, (n, swapped) in zip(range(len(order), 0, -1), order):
        shown = [1, 0] if swapped else [0, 1]
        print(f"\n{'-' * 80}\n[{left} left] " + in_turns(questions[n].turns))
        for side in (0, 1):
            print(f"\n--- answer {side + 1}\n" + in_turns(said_in(answers[shown[side]][n])))
        verdicts = {"1": names[shown[0]], "2": names[shown[1]], "t": "tie", "tie": "tie", "s": "", "q": ""}
        said = ""
        while said not in verdicts:
            try:
                said = input("\n1, 2, t, s or q? ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                said = "q"
        if said == "q":
            break
        if verdicts[said]:
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(dict(question_id=questions[n].id, models=[names[i] for i in shown],
                                        winner=verdicts[said], rater=rater)) + "\n")
            rated += 1
    print(f"\n{rated} ratings added to {path}. Files of several raters in {path.parent} are merged: "
          f"python judge.py report {out}")
    return dict(rated=rated)


def read_ratings(folder: Path) -> dict[tuple, dict[str, str]]:
    """(question, the two players) -> rater -> the name of the better one, or "tie"; from all files."""
    votes: dict[tuple, dict[str, str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for r in data.read_records(path) or []:
            try:
                key, rater = (r["question_id"], frozenset(r["models"])), str(r.get("rater", path.stem))
                votes.setdefault(key, {})[rater] = r["winner"]
            except (LookupError, TypeError, AttributeError):
                raise Problem(f"{path} holds no ratings: question_id, models and winner are needed") from None
    return votes


# -- figures -------------------------------------------------------------------------------------------------

def ratio(rows: list[dict], top: Callable, bottom: Callable) -> Optional[dict]:
    """sum(top) / sum(bottom) with a 95 % interval: questions (all rows of one together) are drawn again, 2000
    times. None when there is nothing to divide by."""
    sums: dict = {}
    for row in rows:
        t, b = sums.get(row["id"], (0, 0))
        sums[row["id"]] = t + top(row), b + bottom(row)
    if not sum(b for _, b in sums.values()):
        return None
    tops, bottoms = np.array(list(sums.values()), float).T
    drawn = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
    t, b = tops[drawn].sum(1), bottoms[drawn].sum(1)
    low, high = np.percentile(t[b > 0] / b[b > 0], (2.5, 97.5))
    return dict(value=tops.sum() / bottoms.sum(), low=low, high=high, n=int(bottoms.sum()))


def compare(a: str, b: str, forward: dict, back: Optional[dict], categories: dict, answers: dict,
            votes: dict) -> dict:
    """All about one pair. `forward`: a stands first; `back`: b stands first, if that was asked, too.

    In both orders, b wins when it wins twice, and what the orders disagree on is a tie (2306.05685); scores
    are the mean of both. A question without a readable review in every order is left out of all figures.
    """
    rows, left_out, sign = [], [i for i in categories if i not in forward], lambda x, y: (y > x) - (y < x)
    for i, game in forward.items():
        games = [game] if back is None else [game, back[i]] if i in back else []
        if not games or any(g.winner is None for g in games):
            left_out.append(i)
            continue
        verdicts = {g.winner if g is game else -g.winner for g in games}
        scores = [g.scores if g is game else g.scores[::-1] for g in games if g.scores]
        said = [answers.get(answer_id) for answer_id in game.answers]  # None: the answer's file is not here
        grades = [(r.get("metadata") or {}).get("grade") if r else None for r in said]
        rows.append(dict(
            id=i, category=categories.get(i, "unknown"), agree=len(verdicts) == 1, swapped=bool(back),
            verdict=min(verdicts) if len(verdicts) == 1 else 0, position=-sum(g.winner for g in games),
            scores=np.mean(scores, 0).tolist() if len(scores) == len(games) else None,
            longer=sign(*(len(said_in(r)[-1].split()) if r else 0 for r in said)), grades=grades,
            truth=None if None in grades else sign(*grades),
            people={rater: 0 if winner == "tie" else 1 if winner == b else -1
                    for rater, winner in votes.get((i, frozenset((a, b))), {}).items()},
            doubt="; ".join(g.doubt for g in games if g.doubt), reviews=[g.text for g in games],
            said=[in_turns(said_in(r)) if r else "" for r in said]))

    def totals(some: list[dict]) -> dict:
        return dict(n=len(some), totals=[sum(r["scores"][k] for r in some) for k in (0, 1)],
                    percent=ratio(some, lambda r: r["scores"][1], lambda r: r["scores"][0]))

    scored, verdicts = [r for r in rows if r["scores"]], Counter(r["verdict"] for r in rows)
    return dict(totals(scored), a=a, b=b, n=len(rows), left_out=left_out, rows=rows,
                wins=verdicts[1], ties=verdicts[0], losses=verdicts[-1],
                preferred=ratio(rows, lambda r: r["verdict"] == 1, lambda r: r["verdict"] != 0),
                categories={c: totals([r for r in scored if r["category"] == c])
                            for c in dict.fromkeys(r["category"] for r in scored)})


def agreement(votes: Sequence[tuple[int, int]]) -> Optional[dict]:
    """Of two judges' signs: the share of equal ones, and that where neither says tie (2306.05685: S1, S2)."""
    decided = [(x, y) for x, y in votes if x and y]
    same = lambda some: sum(x == y for x, y in some) / len(some) if some else None
    figures = dict(n=len(votes), all=same(votes), n_decided=len(decided), decided=same(decided))
    return figures if votes else None


def biases(rows: list[dict]) -> dict:
    """Of the judge, over all pairs. Position: both orders taken together, who stands first wins more often
    than who stands second. Length: of two equally right answers, the longer wins more often."""
    both, unequal = [r for r in rows if r["swapped"]], [r for r in rows if r["longer"]]
    equally_right = [r for r in unequal if r["swapped"] and r["truth"] == 0]
    judged = [(r["verdict"], r["truth"]) for r in rows if r["truth"] is not None]
    votes = [(r, v) for r in rows for v in r["people"].values()]
    one = lambda r: 1
    return dict(
        consistent=ratio(both, lambda r: r["agree"], one),
        first=ratio(both, lambda r: r["position"] > 0, one),
        second=ratio(both, lambda r: r["position"] < 0, one),
        position=ratio(both, lambda r: np.sign(r["position"]), one),
        longer_wins=ratio(unequal, lambda r: r["verdict"] == r["longer"], lambda r: r["verdict"] != 0),
        length=ratio(equally_right, lambda r: r["verdict"] * r["longer"], one),
        truth=agreement(judged), people=agreement([(r["verdict"], v) for r, v in votes]),
        people_people=agreement([p for r in rows for p in itertools.combinations(r["people"].values(), 2)]),
        people_truth=agreement([(r["truth"], v) for r, v in votes if r["truth"] is not None]))


# -- MiniGPT-4's measures, over captions ---------------------------------------------------------------------

def failure(caption: str, ended: bool) -> str:
    """Why a caption is no caption, or "": the failures MiniGPT-4's second stage was made to cure."""
    words = caption.lower().split()
    runs = Counter(tuple(words[i:i + 4]) for i in range(len(words) - 3))
    sentences = Counter(s.strip().lower() for s in re.split(r"[.!?\n]", caption) if len(s.split()) > 2)
    if not words:
        return "empty"
    if max(runs.values(), default=0) > 2 or max(sentences.values(), default=0) > 1:
        return "repeats"
    if not ended:
        return "does not stop"
    return "" if len(words) > 2 and caption.rstrip()[-1] in ".!?\"'" else "fragment"


def mentions(caption: str) -> set[tuple[str, str]]:
    """The toy world's objects a caption speaks of, as (colour, shape)."""
    return set(re.findall(rf"\b({'|'.join(toy.COLORS)}) ({'|'.join(toy.SHAPES)})s?\b", caption.lower()))


def chair(captions: Sequence[str], present: Sequence[set], mentioned: Callable = mentions) -> dict:
    """CHAIR. Instances: mentioned objects that are not there, of all. Sentences: captions with such a one."""
    found = [mentioned(c) for c in captions]
    wrong = [f - p for f, p in zip(found, present)]
    count = max(1, len(captions))
    return dict(instances=sum(map(len, wrong)) / max(1, sum(map(len, found))), mentioned=sum(map(len, found)),
                sentences=sum(map(bool, wrong)) / count, words=sum(len(c.split()) for c in captions) / count)


def pope_questions(scene: toy.Scene, rng: random.Random) -> list[toy.Question]:
    """POPE: "is there ...?", one true and one untrue; the untrue mostly mix what is there (adversarial)."""
    found: dict = {}
    for _ in range(100):  # a scene of equal objects has no question with the answer yes
        if q := toy.ask_scene("exists", scene, rng):
            found.setdefault(next(iter(q.truth["yesno"])), q)
    return list(found.values())


def pope(questions: Sequence[toy.Question], replies: Sequence[str]) -> dict:
    """POPE's figures; a reply that says neither yes nor no, or both, is wrong and counted as unread."""
    truth = [next(iter(q.truth["yesno"])) for q in questions]
    said = [toy.found("yesno", r) for r in replies]
    yes, count = sum(s == {"yes"} for s in said), max(1, len(truth))
    hits = sum(s == {"yes"} and t == "yes" for s, t in zip(said, truth))
    precision, recall = hits / max(1, yes), hits / max(1, truth.count("yes"))
    return dict(accuracy=sum(s == {t} for s, t in zip(said, truth)) / count,
                precision=precision, recall=recall,
                f1=2 * precision * recall / max(1e-9, precision + recall), yes=yes / count,
                unread=sum(len(s) != 1 for s in said), n=len(truth))


def coverage(ask, captions: Sequence[str], references: Sequence[str]) -> dict:
    """Share of captions that say all that the reference says, by a yes/no judge (a teacher)."""
    asked = [data.Conversation(
        [data.Turn("user", f"Caption 1: {reference}\nCaption 2: {caption}\n\nDoes caption 2 cover all "
                           "objects and relations of caption 1? Answer with yes or no.")],
        extra={"covers": (reference, caption)}) for caption, reference in zip(captions, references)]
    replies = [reply and re.match(r"\W*(yes|no)\b", reply.text.lower()) for reply in ask(asked)]
    read = [m[1] == "yes" for m in replies if m]
    return dict(covered=sum(read) / len(read) if read else None, n=len(read), unread=len(replies) - len(read))


# -- the report ----------------------------------------------------------------------------------------------

def report(files: list[Path], out: Path, questions: list[Question], answers: Iterable[dict],
           judge: str = "") -> dict:
    """Figures of the review files as a table, out/report.json and out/report.html; what nobody could read
    goes to out/unread.jsonl. review_B_A beside review_A_B, or in swapped/, is the pair in the other order."""
    unread = out / "unread.jsonl"
    noted = read_lines(unread, "review_id", "reviews") if unread.exists() and unread.stat().st_size else []
    by_hand = {r["review_id"]: two_scores(r["score"]) for r in noted if r.get("score") is not None}
    if bad := [i for i, score in by_hand.items() if score is None]:
        raise Problem(f"{unread}: the score of review {listing(bad)} must be two numbers, 0 to 10, or null")
    games = {f: read_games(f, by_hand) for f in files}
    listed = [dict(review_id=g.review_id, file=f.name, question_id=i, text=g.text,
                   score=by_hand.get(g.review_id))
              for f in files for i, g in games[f].items() if g.winner is None or g.review_id in by_hand]
    for_others = by_hand.keys() - {r["review_id"] for r in listed}  # read by hand, for another judge
    if listed or noted:
        write_lines(unread, listed + [r for r in noted if r["review_id"] in for_others])
    pairs: dict[tuple, list] = {}
    for f in files:
        place, (a, b) = f.parent.parent if f.parent.name == "swapped" else f.parent, names_of(f)
        if len(pairs.get((place, b, a), [])) == 1:
            pairs[place, b, a].append(games[f])
        else:
            pairs[place, a, b] = [games[f]]
    by_id = {r["answer_id"]: r for r in answers if r.get("answer_id")}
    votes, categories = read_ratings(out / "rating"), {q.id: q.category for q in questions}
    found, often = [], Counter(key[1:] for key in pairs)  # published folders have pairs of equal names
    for (place, a, b), (forward, *back) in pairs.items():
        found.append(compare(a, b, forward, back[0] if back else None, categories, by_id, votes))
        found[-1]["title"] = f"{a} : {b}" + (f" ({place.name})" if often[a, b] > 1 else "")
    figures = dict(
        judge=judge, questions=len(questions), pairs=found,
        biases=biases([r for p in found for r in p["rows"]]),
        unread=sum(g.winner is None for some in games.values() for g in some.values()),
        doubts=[f"{p['title']}, question {r['id']}: {r['doubt']}"
                for p in found for r in p["rows"] if r["doubt"]])
    print_report(figures, unread)
    asked = {q.id: dict(turns=q.turns, reference=in_turns(q.reference) if any(q.reference) else "")
             for q in questions}
    text = json.dumps(dict(figures, asked=asked), default=float)
    page = (Path(__file__).parent / "assets" / "report.html").read_text(encoding="utf-8")
    page = page.replace("{{DATA}}", text.replace("<", "\\u003c"))  # no answer can close the script
    (out / "report.html").write_text(page, encoding="utf-8")
    bare = dict(figures, pairs=[{k: v for k, v in p.items() if k != "rows"} for p in found])
    (out / "report.json").write_text(json.dumps(bare, indent=1, default=float), encoding="utf-8")
    print(f"\nlook at it: {out / 'report.html'}; figures: {out / 'report.json'}")
    return figures


def names_of(path: Path) -> tuple[str, str]:
    match = re.search(r"review_([^_]+)_(.+)\.jsonl$", path.name)
    if not match:
        raise Problem(f"{path}: a file of reviews is called review_A_B.jsonl, after the two players")
    return match[1], match[2]


def percent(figure: Optional[dict]) -> str:
    if figure is None:
        return "-"
    return f"{100 * figure['value']:.0f} [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"


def print_report(figures: dict, unread: Path) -> None:
    pairs, b = figures["pairs"], figures["biases"]
    width = max(20, *(len(p["title"]) + 2 for p in pairs))
    print(f"\n{'first : second':<{width}}{'totals':>15}{'second in % of first':>22}{'second wins':>13}"
          f"{'ties':>6}{'loses':>7}{'preferred, % of decided':>25}")
    for p in pairs:
        if p["n"]:
            print(f"{p['title']:<{width}}{p['totals'][0]:>7.1f} {p['totals'][1]:>7.1f}"
                  f"{percent(p['percent']):>22}{p['wins']:>13}{p['ties']:>6}{p['losses']:>7}"
                  f"{percent(p['preferred']):>25}")
        else:
            print(f"{p['title']:<{width}} no review could be read: nothing is claimed about these two")
    print("[ ]: 95 % interval, questions drawn again 2000 times\n")
    for side, what in (("a", "first : second"), ("b", "totals by category")):
        print(f"{what:<20}" + "".join(f"{p[side]:>14.13}" for p in pairs))
    for category in dict.fromkeys(c for p in pairs for c in p["categories"]):
        cells = [p["categories"].get(category, {}).get("totals", []) for p in pairs]
        print(f"{category:<20}" + "".join(f"{':'.join(f'{t:g}' for t in c) or '-':>14}" for c in cells))
    print()
    for p in pairs:
        if p["left_out"]:
            print(f"left out of {p['title']}: question {listing(p['left_out'])} (no readable review)")
    if figures["unread"]:
        print(f"{figures['unread']} reviews could not be read: write their scores into {unread}, run again")
    for doubt in figures["doubts"]:
        print(f"stored score against text: {doubt}")

    def bias(figure: dict, up: str, down: str) -> str:
        found = up if figure["low"] > 0 else down if figure["high"] < 0 else ""
        return found and f". BIAS: it prefers {found}"

    if b["consistent"]:
        print(f"position: the judge agrees with itself on {percent(b['consistent'])} % when the order is "
              f"swapped; {percent(b['first'])} % go to who stands first, {percent(b['second'])} % to who "
              "stands second" + bias(b["position"], "first", "second"))
    else:
        print("position: not measured, each pair was judged in one order only")
    if b["longer_wins"]:
        print(f"length: the longer answer wins {percent(b['longer_wins'])} % of what is decided")
    if b["length"]:
        print(f"length: of two equally right answers, the longer wins {percent(b['length'])} % more often "
              "than the shorter" + bias(b["length"], "the longer", "the shorter"))
    for name, what in (("truth", "judge and truth"), ("people", "judge and people"),
                       ("people_people", "people among themselves"), ("people_truth", "people and truth")):
        said = "not measured"
        if a := b[name]:
            said = f"{100 * a['all']:.0f} % of {a['n']} (chance 33)" + (
                f", {100 * a['decided']:.0f} % of the {a['n_decided']} that neither ties (chance 50)"
                if a["n_decided"] else "")
        print(f"agreement of {what}: {said}")


@dataclass
class ReportConfig:
    folder: str  # or file: review_A_B.jsonl in it or below, question.jsonl and answer/ in it or above
    out: str = ""  # where the report goes; the same folder when not given


def report_files(cfg: ReportConfig) -> dict:
    folder, files = Path(cfg.folder), [Path(cfg.folder)]
    if not folder.is_file():
        files = [f for f in folder.rglob("*review_*.jsonl")
                 if f.is_file() and not f.name.endswith(".old.jsonl")]
        files.sort(key=lambda f: (len(f.parts), f))  # swapped/ after what it swaps
    if not files:
        raise Problem(f"no review_A_B.jsonl in {folder}")
    near = [folder, *folder.absolute().parents[:3]]
    own = next((str(d / "question.jsonl") for d in near if (d / "question.jsonl").exists()), "")
    questions = load_questions(own) if own else []
    if not questions:
        print(f"no question.jsonl in {folder} or above: categories are unknown")
    answers = [r for d in near for f in sorted((d / "answer").glob("*.jsonl"))
               if not f.name.endswith(".old.jsonl") for r in read_lines(f, "question_id", "answers")]
    out = Path(cfg.out or (folder if folder.is_dir() else folder.parent))
    out.mkdir(parents=True, exist_ok=True)
    return report(files, out, questions, answers)


# -- python judge.py -----------------------------------------------------------------------------------------

def main(cfg: JudgeConfig) -> dict:
    print(describe(cfg))
    out, questions = Path(cfg.out), load_questions(cfg.questions, cfg.seed)
    players = name_players(cfg)
    model = cfg.model or ("vicuna" if "vicuna" in players else list(players)[0])
    baseline = cfg.baseline or ("oracle" if "oracle" in players else list(players)[-1])
    for option, name in (("model", model), ("baseline", baseline)):
        if name not in players:
            raise Problem(f"--{option}={name} is none of the players: {', '.join(players)}")
    if model == baseline:
        raise Problem(f"--model and --baseline are the same, {model}")
    settings = [cfg.temperature, cfg.max_new_tokens or (64 if cfg.questions == "toy" else 1024)]
    server = dict(quantize=cfg.quantize, per_minute=cfg.per_minute)
    judge = teacher(cfg.judge, **server)  # now: a missing key is found at once
    write_lines(out / "question.jsonl", [
        dict(question_id=q.id, category=q.category, turns=q.turns, text=q.turns[-1], reference=q.reference,
             image=q.image) for q in questions])
    answers = {}
    for name, spec in players.items():
        path = out / "answer" / f"answer_{name}.jsonl"
        if spec.endswith(".jsonl"):
            answers[name] = read_answers(spec, questions)
            write_lines(path, answers[name])  # for `rate` and `report`
        else:
            player = teacher(spec, *settings, **server)
            answers[name] = answer(player, questions, path, settings)
            if isinstance(player, Server):
                print(f"{name}: {player.read} tokens read, {player.written} written")
        empty = [r["question_id"] for r in answers[name] if not said_in(r)[-1].strip()]
        print(f"{name}: {len(questions)} answers"
              + (f"; empty ones, judged as they are: {listing(empty)}" if empty else ""))
    print(f"{model} against each other player, and each against {baseline}; reviews by {judge.name}, in "
          + ("both orders" if cfg.swap else "one order"))
    pairs = [(name, model) for name in players if name != model]
    pairs += [(baseline, name) for name in players if name not in (baseline, model)]
    games = [(out / "review" / f"review_{a}_{b}.jsonl", answers[a], answers[b]) for a, b in pairs]
    if cfg.swap:
        games += [(out / "review" / "swapped" / f"review_{b}_{a}.jsonl", answers[b], answers[a])
                  for a, b in pairs]
    review(judge, games, questions, cfg)
    everything = [r for some in answers.values() for r in some]
    return report([path for path, _, _ in games], out, questions, everything, judge.name)


def name_players(cfg: JudgeConfig) -> dict[str, str]:
    """Short names for tables and files: the end of a path, the model of a server; all where two are equal."""
    specs = [spec.strip() for spec in cfg.players.split(",") if spec.strip()]
    short = [s.split("@http")[0] if "@http" in s else Path(s).stem.removeprefix("answer_") for s in specs]
    long = [n if short.count(n) == 1 else s for n, s in zip(short, specs)]
    players = {re.sub(r"[^\w.-]+|_", "-", name).strip("-"): spec for name, spec in zip(long, specs)}
    if len(players) < max(2, len(specs)):
        raise Problem(f"--players={cfg.players}: two or more different players are needed")
    if crooked := [spec for spec in specs if spec in ("first", "longer")]:
        raise Problem(f"--players: {crooked[0]} is a judge ({TOYS[crooked[0]]})")
    for spec in (*specs, cfg.judge):
        if spec in TOYS and cfg.questions != "toy":
            raise Problem(f"{spec} knows the toy world only: give --players and --judge to your questions")
    return players


if __name__ == "__main__":
    run(None, {"": (main, JudgeConfig), "rate": (rate, RateConfig), "report": (report_files, ReportConfig)})
