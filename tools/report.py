"""Statistics of the judge's reviews, in figures and in words: totals, preferences, intervals,
biases, agreement."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parent.parent / "assets" / "report.html"


def listing(ids: Iterable) -> str:
    return ", ".join(map(str, ids))


def said_in(record: dict) -> list[str]:
    """The replies in an answer record, in MT-bench's or Vicuna's format."""
    choices = record.get("choices")
    return choices[0]["turns"] if choices else [record.get("text")]


def in_turns(texts: list[str]) -> str:
    """The texts as one; each says which turn it is from, unless there is only one turn."""
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"Turn {i}: {text}" for i, text in enumerate(texts, 1) if text)


def winner(first: float, second: float) -> int:
    """-1 if the first is higher, 1 if the second is, 0 for a tie."""
    return (second > first) - (second < first)


# -- figures --------------------------------------------------------------------------------------

def ratio(rows: list[dict], top: Callable, bottom: Callable = lambda row: 1) -> dict | None:
    """The sum of top(row) over the sum of bottom(row), with a 95% bootstrap interval; None if the
    denominator is zero.

    Questions are resampled with replacement, 2000 times. All rows of a question stay together.
    """
    sums: dict = {}  # question id -> (top, bottom)
    for row in rows:
        t, b = sums.get(row["id"], (0, 0))
        sums[row["id"]] = t + top(row), b + bottom(row)
    if not sum(b for _, b in sums.values()):
        return None
    tops, bottoms = np.array(list(sums.values()), float).T
    drawn = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
    t, b = tops[drawn].sum(1), bottoms[drawn].sum(1)
    low, high = np.percentile(t[b > 0] / b[b > 0], (2.5, 97.5))
    return dict(value=tops.sum() / bottoms.sum(), low=low, high=high)


def compare(a: str, b: str, orders: list[dict], categories: dict, answers: dict,
            ratings: dict) -> dict:
    """The figures of one pair. `orders` holds one dict of reviews by question id, or two: with a's
    answer shown first, and with b's.

    With both orders, a win must hold in both, and anything else is a tie (2306.05685); scores are
    averaged. A question is left out without a readable review in each order, since one order alone
    would bring back position bias. It is also left out if it is not in `categories`.
    """
    rows, left_out = [], []
    for i in dict.fromkeys([*categories, *orders[0], *orders[-1]]):
        reviews = [order[i] for order in orders if i in order]
        if len(reviews) < len(orders) or i not in categories:
            left_out.append(i)
            continue
        people = ratings.get(frozenset(reviews[0].answers), {})
        votes = {reviews[0].answers[0]: -1, reviews[0].answers[1]: 1, None: 0}  # None: a tie
        people = {rater: votes[better] for rater, better in people.items()}
        rows.append(dict(id=i, category=categories[i], people=people,
                         **outcome(reviews), **about_answers(reviews[0], answers)))
    by_category = {c: totals([r for r in rows if r["category"] == c])
                   for c in dict.fromkeys(r["category"] for r in rows)}
    verdicts = Counter(r["verdict"] for r in rows)
    preferred = ratio(rows, lambda r: r["verdict"] == 1, lambda r: r["verdict"] != 0)
    pair = dict(totals(rows), a=a, b=b, title=f"{a} : {b}", left_out=left_out, rows=rows,
                wins=verdicts[1], ties=verdicts[0], losses=verdicts[-1], preferred=preferred,
                categories=by_category)
    return dict(pair, **in_words(pair))


def outcome(reviews: list) -> dict:
    """The verdict on one question, from one review or from one in each order."""
    scores = [r.scores for r in reviews]
    if len(reviews) == 2:  # the second review saw the answers in the other order
        scores[1] = scores[1][::-1]
    winners = [winner(*pair) for pair in scores]
    agree = len(set(winners)) == 1
    return dict(
        verdict=winners[0] if agree else 0, agree=agree, swapped=len(reviews) == 2,
        position=winners[-1] - winners[0],  # above 0: leans to the answer shown first
        scores=np.mean(scores, 0).tolist(), reviews=[r.text for r in reviews])


def about_answers(review, answers: dict) -> dict:
    """Texts, grades and lengths of the two answers, as far as `answers` has them."""
    records = [answers.get(answer_id, {}) for answer_id in review.answers]
    said = [said_in(r) if r else [""] for r in records]
    grades = [(r.get("metadata") or {}).get("grade") for r in records]
    lengths = [len(turns[-1].split()) for turns in said]
    return dict(grades=grades, truth=None if None in grades else winner(*grades),
                longer=winner(*lengths), said=[in_turns(turns) for turns in said])


def totals(rows: list[dict]) -> dict:
    """The sums of both players' scores, and b's sum over a's."""
    return dict(n=len(rows), totals=[sum(r["scores"][k] for r in rows) for k in (0, 1)],
                percent=ratio(rows, lambda r: r["scores"][1], lambda r: r["scores"][0]))


def mean_scores(pairs: list[dict]) -> list[dict]:
    """Each player's mean score, over all its reviews and by category. The best player is first."""
    scores: dict = {}  # name -> category -> scores
    for p in pairs:
        for row in p["rows"]:
            for name, score in zip((p["a"], p["b"]), row["scores"]):
                scores.setdefault(name, {}).setdefault(row["category"], []).append(score)
    players = []
    for name, by_category in scores.items():
        means = {category: np.mean(given) for category, given in by_category.items()}
        every = np.concatenate(list(by_category.values()))
        players.append(dict(name=called(name), mean=every.mean(), categories=means))
    return sorted(players, key=lambda player: -player["mean"])


def baseline_of(pairs: list[dict]) -> str:
    """The player that comes first in more than half of the pairs, and in at least two; or ""."""
    name, count = Counter(p["a"] for p in pairs).most_common(1)[0]
    return name if count > 1 and count > len(pairs) / 2 else ""


def main_pair(pairs: list[dict]) -> dict:
    """The pair of the headline: the player that is second in most pairs, against another one than
    the baseline if possible."""
    tested = Counter(p["b"] for p in pairs).most_common(1)[0][0]
    others = [p for p in pairs if p["b"] == tested and p["a"] != baseline_of(pairs)]
    return (others or pairs)[0]


def agreement(votes: Sequence[tuple[int, int]]) -> dict | None:
    """The share of votes on which two judges agree: of all votes, and of those where neither says
    tie (setups S1 and S2 of 2306.05685). None without votes."""
    if not votes:
        return None
    decided = [x == y for x, y in votes if x and y]
    return dict(n=len(votes), all=sum(x == y for x, y in votes) / len(votes),
                n_decided=len(decided), decided=sum(decided) / len(decided) if decided else None)


def biases(rows: list[dict]) -> dict:
    """The judge's biases and agreement over all pairs. Position: the share of questions whose two
    verdicts lean to the answer shown first, minus the share that lean to the second. Length: the
    win rate of the longer of two equally right answers, minus that of the shorter."""
    both, unequal = [r for r in rows if r["swapped"]], [r for r in rows if r["longer"]]
    equally_right = [r for r in unequal if r["swapped"] and r["truth"] == 0]
    known = [r for r in rows if r["truth"] is not None]
    votes, between_people = [], []
    for r in rows:
        votes += [(r["verdict"], vote) for vote in r["people"].values()]
        between_people += itertools.combinations(r["people"].values(), 2)
    return dict(
        consistent=ratio(both, lambda r: r["agree"]),
        first=ratio(both, lambda r: r["position"] > 0),
        second=ratio(both, lambda r: r["position"] < 0),
        position=ratio(both, lambda r: np.sign(r["position"])),
        longer_wins=ratio(unequal, lambda r: r["verdict"] == r["longer"],
                          lambda r: r["verdict"] != 0),
        length=ratio(equally_right, lambda r: r["verdict"] * r["longer"]),
        truth=agreement([(r["verdict"], r["truth"]) for r in known]),
        people=agreement(votes), people_people=agreement(between_people))


# -- figures in words -----------------------------------------------------------------------------

# With fewer decided questions nobody wins: by chance, one player wins all of 5 one time in 16.
ENOUGH_DECIDED = 6


def called(name: str) -> str:
    """The name as sentences have it: "vicuna" becomes "Vicuna", and "gpt-3.5-turbo" stays."""
    return name.capitalize() if name.isalpha() and name.islower() else name


def in_words(p: dict) -> dict:
    """The result of a pair in words: the verdict, the evidence for it, and b's record."""
    a, b = called(p["a"]), called(p["b"])
    decided, likely = p["wins"] + p["losses"], interval(p)
    better, won = (b, p["wins"]) if p["wins"] >= p["losses"] else (a, p["losses"])
    evidence = [f"{p['ties']} of {p['n']} questions tied"]
    if decided:
        evidence.insert(0, f"{better} won {won} of the {decided} decided questions{likely}")
    if p["left_out"]:
        evidence.append(f"{len(p['left_out'])} left out, without readable scores")
    return dict(
        names=[a, b], verdict=verdict(a, b, p), interval=likely, evidence="; ".join(evidence),
        record=f"{b} against {a}: {p['wins']} won, {p['ties']} tied, {p['losses']} lost",
        share=percent(p["percent"]))


def verdict(a: str, b: str, p: dict) -> str:
    """Who wins, if the 95% interval excludes a tie; else why nobody does."""
    wins, losses, preferred = p["wins"], p["losses"], p["preferred"]
    if not p["n"]:
        return f"{b} against {a}: no readable review"
    if wins + losses < ENOUGH_DECIDED:
        return f"{b} against {a}: too few decided questions to tell"
    if preferred["low"] <= 0.5 <= preferred["high"]:
        return f"{b} against {a}: too close to tell"
    better, worse = (b, a) if wins > losses else (a, b)
    share = f"{100 * max(wins, losses) / (wins + losses):.0f}% of"
    if not wins or not losses:
        share = f"all {wins + losses}"
    return f"{better} beats {worse} on {share} decided questions"


def interval(p: dict) -> str:
    """The interval of the better player's share of decided questions; "" if that player won all
    of them, since resampling equal verdicts always gives 100%."""
    if not p["wins"] or not p["losses"]:
        return ""
    low, high = p["preferred"]["low"], p["preferred"]["high"]
    if p["losses"] > p["wins"]:
        low, high = 1 - high, 1 - low
    return f" (95% interval {100 * low:.0f}% to {100 * high:.0f}%)"


def findings(b: dict) -> list[dict]:
    """What is known about the judge, in words. `biased` is None if the finding is about no bias, or
    if the bias was not measured."""
    found = [position_bias(b), length_bias(b)]
    for key, who in (("truth", "The judge agrees with the truth"),
                     ("people", "The judge agrees with people"),
                     ("people_people", "People agree with each other")):
        figure = b[key]
        if figure and figure["n_decided"]:
            share, decided = f"{100 * figure['all']:.0f}%", f"{100 * figure['decided']:.0f}%"
            why = (f"33% would be chance; without ties {decided} of {figure['n_decided']}, "
                   "where 50% would be chance")
            found.append(dict(verdict=f"{who} on {share} of {figure['n']} verdicts", why=why,
                              biased=None))
    return [finding for finding in found if finding]


def position_bias(b: dict) -> dict:
    if not b["consistent"]:
        return dict(verdict="Position bias was not measured", biased=None,
                    why="no question has a review in both orders")
    why = (f"both orders agree on {percent(b['consistent'])} of the questions; "
           f"{percent(b['first'])} lean to the answer shown first, "
           f"{percent(b['second'])} to the one shown second")
    return bias("position", b["position"], "the first answer", "the second answer", why)


def length_bias(b: dict) -> dict | None:
    if not b["longer_wins"]:
        return None
    longer = f"the longer wins {percent(b['longer_wins'])} of decided questions"
    if not b["length"]:
        return dict(verdict="Length bias was not measured", biased=None,
                    why=f"no two answers are known to be equally right; of any two, {longer}")
    why = ("of two equally right answers, the win rate of the longer minus that of the shorter is "
           f"{percent(b['length'])}; of any two, {longer}")
    return bias("length", b["length"], "longer answers", "shorter answers", why)


def bias(kind: str, figure: dict, more: str, less: str, why: str) -> dict:
    """A finding. The judge is biased only if the interval of the figure excludes 0."""
    biased = not figure["low"] <= 0 <= figure["high"]
    verdict = f"No {kind} bias found"
    if biased:
        verdict = f"The judge prefers {more if figure['low'] > 0 else less}"
    return dict(verdict=verdict, why=why, biased=biased)


def percent(figure: dict | None) -> str:
    if figure is None:
        return "-"
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:.0f}% [{low:.0f}, {high:.0f}]"


# -- the report -----------------------------------------------------------------------------------

def print_report(figures: dict) -> None:
    pairs = figures["pairs"]
    width = max(20, *(len(p["title"]) + 2 for p in pairs))
    print(f"\n{'A : B':<{width}}{'totals':>15}{'B in % of A':>18}{'B wins':>8}{'ties':>6}"
          f"{'losses':>8}{'wins without ties':>20}")
    for p in pairs:
        totals = "{:.1f} {:.1f}".format(*p["totals"])
        print(f"{p['title']:<{width}}{totals:>15}{percent(p['percent']):>18}{p['wins']:>8}"
              f"{p['ties']:>6}{p['losses']:>8}{percent(p['preferred']):>20}")
    print("[low, high]: 95% bootstrap interval over questions\n")
    for p in pairs:
        if p["left_out"]:
            print(f"{p['title']}: left out question {listing(p['left_out'])}: no readable scores "
                  '(add them to the review file, as in "score": [9, 8]), or no such question')
    for finding in figures["findings"]:
        print(f"{finding['verdict']}: {finding['why']}")


def write_report(pairs: list[dict], questions: list, out: Path, judge: str) -> dict:
    """Prints the figures of all pairs and returns them. Writes them to `out`: report.json, and
    report.html, which also has the questions, answers and reviews."""
    measured = biases([row for p in pairs for row in p["rows"]])
    shown = main_pair(pairs)
    figures = dict(judge=judge, questions=len(questions), verdict=shown["verdict"],
                   evidence=shown["evidence"], baseline=baseline_of(pairs), pairs=pairs,
                   players=mean_scores(pairs), biases=measured, findings=findings(measured))
    print(f"\n{shown['verdict']}. {shown['evidence']}.")
    print_report(figures)
    bare = [{k: v for k, v in p.items() if k != "rows"} for p in pairs]
    text = json.dumps(dict(figures, pairs=bare), indent=1, default=float)
    (out / "report.json").write_text(text, encoding="utf-8")
    asked = {q.id: dict(turns=q.turns, reference=in_turns(q.reference) if any(q.reference) else "")
             for q in questions}
    text = json.dumps(dict(figures, asked=asked), default=float)
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("{{DATA}}", text.replace("<", "\\u003c"))  # no answer can close the script
    (out / "report.html").write_text(page, encoding="utf-8")
    print(f"\nwrote {out / 'report.html'} and {out / 'report.json'}")
    return figures
