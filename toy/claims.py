"""Tests claims from the papers on a laptop.

    python -m toy.claims                      # the list of claims
    python -m toy.claims lora                 # test one: prints a table and a verdict
    python -m toy.claims lora --seeds=3       # three seeds; error from the spread across seeds
    python -m toy.claims lora --fast          # a tenth of the steps; shows only the trend

Each claim is a function below. It trains or evaluates variants that differ in one thing (see
toy/lab.py). Its decorator says what the variants share, which control could falsify the claim, and
which comparisons must hold. Each result is saved in --out as soon as it is ready; rerun the command
to resume. docs/claims.md has the results.
"""

import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import data
import vision
from tools import bench, evaluate
from tools.config import Stopped, UserError, check_at_least, refuse_unused, run, suggest
from tools.machine import choose_machine
from tools.run import lock
from toy import exam, instruct
from toy.lab import (
    TOY,
    Lab,
    RandomEncoder,
    ThreeLayers,
    TunedQFormer,
    WithoutQFormer,
    chain_folder,
    load_trainable,
    trained_fraction,
)


class Comparison(NamedTuple):
    """What a claim expects: the metric of variant a minus that of variant b is more than `margin`
    percentage points. With a negative margin, a may be a little worse."""
    a: str
    b: str
    margin: float = 0.0
    column: str = ""  # the metric; the claim's first column when not given


class Claim(NamedTuple):
    """A claim, and how it is tested."""
    measure: Callable  # (lab, results): adds the metrics of every variant
    says: str
    source: str
    fixed: str  # what the variants have in common
    control: str  # what could falsify the claim
    expected: str
    minutes: int  # one seed on one thread, with train_sft.py and train_vlm.py already run
    columns: dict  # metric: title. A % in the title marks a share, stored as 0 to 1
    comparisons: list[Comparison]


CLAIMS: dict[str, Claim] = {}


def claim(**fields) -> Callable:
    """Registers the function below in CLAIMS; `four_bits` becomes "four-bits"."""
    def add(measure: Callable) -> Callable:
        CLAIMS[measure.__name__.replace("_", "-")] = Claim(measure, **fields)
        return measure
    return add


class Results:
    """One seed's metrics for a claim, {variant: {metric: value}}. The file holds all seeds. Each
    variant also has "seconds", and "questions": the denominator of its compared shares (the
    smallest, if they differ)."""

    def __init__(self, file: Path, seed: int, made_with: dict):
        self.file, self.content = file, dict(made_with=made_with, seeds={})
        if file.exists():
            self.content = json.loads(file.read_text(encoding="utf-8"))
            before = self.content.get("made_with")
            if before != made_with:
                raise UserError(f"{file} was made with {before}, not {made_with}; delete it or "
                                "choose another --out")
        self.metrics = self.content["seeds"].setdefault(str(seed), {})
        self.started = time.time()

    def missing(self, variants: Iterable[str]) -> list[str]:
        """The variants that are not measured yet."""
        return [name for name in variants if name not in self.metrics]

    def add(self, variant: str, **metrics) -> None:
        seconds = round(time.time() - self.started)
        self.metrics[variant] = dict(metrics, seconds=seconds)
        self.started = time.time()
        with data.atomic_write(self.file) as file:
            json.dump(self.content, file, indent=1)


# -- the claims -----------------------------------------------------------------------------------

EXAM = dict(right="right, %", scenes="held-out scenes, %", pairs="held-out pairs, %",
            later="needs earlier turns, %")
ANSWERED, DESCRIBED, FAILS = "right answers, %", "exact descriptions, %", "failed descriptions, %"
STEPS = 500  # fine-tuning steps, unless a claim sets its own


@claim(says="Fine-tuning beats the base at every size, and matters more than size",
       source="InstructGPT (2203.02155), figure 1; the thesis of Alpaca and Vicuna",
       fixed="steps and tokens in pre-training and fine-tuning",
       control="the same fine-tuning from random weights",
       expected="even the smallest fine-tuned model beats the largest base",
       minutes=12, columns=EXAM,
       comparisons=[
           Comparison("1.1M fine-tuned", "1.1M few-shot"),
           Comparison("0.3M fine-tuned", "0.3M few-shot"),
           Comparison("0.1M fine-tuned", "0.1M few-shot"),
           Comparison("0.1M fine-tuned", "1.1M few-shot"),
           Comparison("1.1M fine-tuned", "1.1M from random weights"),
           Comparison("0.3M fine-tuned", "0.3M from random weights"),
           Comparison("0.1M fine-tuned", "0.1M from random weights")])
def sft(lab: Lab, results: Results) -> None:
    variants = {}
    for size in ("1.1M", "0.3M", "0.1M"):
        for how in ("few-shot", "fine-tuned", "from random weights"):
            variants[f"{size} {how}"] = size, how
    for name in results.missing(variants):
        size, how = variants[name]
        if how == "few-shot":
            base = lab.load(lab.base(size))
            results.add(name, **lab.examine(base, "lines", shots=lab.shots()))
        elif how == "fine-tuned":
            results.add(name, **lab.examine(lab.train_vicuna(STEPS, base=lab.base(size))))
        else:
            results.add(name, **lab.examine(lab.train_vicuna(STEPS, from_scratch=size)))


@claim(says="Quality before quantity: adding noisy data does not help",
       source="Koala's blog post: Koala-Distill is slightly better than Koala-All",
       fixed="the steps, or the epochs; the clean conversations, except in the control",
       control="the same number of conversations (3N), all noisy: up to half of the replies "
               "are corrupted",
       expected="clean is at most 5 points below mixed, and more than 10 above noisy",
       minutes=14, columns=EXAM,
       comparisons=[
           Comparison("N clean", "N clean, 2N noisy, equal steps", margin=-5),
           Comparison("N clean", "N clean, 2N noisy, equal epochs", margin=-5),
           Comparison("N clean", "3N noisy, equal steps", margin=10),
           Comparison("N clean", "3N noisy, equal epochs", margin=10)])
def quality(lab: Lab, results: Results) -> None:
    n = lab.sizes["conversations"] // 12  # 1,000, which 300 steps see four times
    variants = {  # clean and noisy conversations, and steps
        "N clean": (n, 0, 300),
        "N clean, 2N noisy, equal steps": (n, 2 * n, 300),
        "N clean, 2N noisy, equal epochs": (n, 2 * n, 900),
        "3N noisy, equal steps": (0, 3 * n, 300),
        "3N noisy, equal epochs": (0, 3 * n, 900)}
    for name in results.missing(variants):
        clean, noisy, steps = variants[name]
        file = lab.noisy_conversations(clean, noisy)
        results.add(name, **lab.examine(lab.fine_tune(f"{file.stem}-{steps}", file, steps)))


@claim(says="Vicuna is Alpaca with turns, full answers, a long context, and a loss on replies only",
       source="Vicuna's blog post of March 2023",
       fixed="the base, steps and tokens (but not the number of supervised tokens)",
       control="the same data with every token in the loss",
       expected="removing any ingredient hurts",
       minutes=14, columns=EXAM,
       comparisons=[
           Comparison("all four", "without turns"),
           Comparison("all four", "without full answers"),
           Comparison("all four", "without long context"),
           Comparison("all four", "loss on everything"),
           Comparison("all four", "Alpaca's data")])
def vicuna(lab: Lab, results: Results) -> None:
    variants = {
        "all four": dict(),
        "without turns": dict(single_turn=True),
        "without full answers": dict(short=True),
        "without long context": dict(seq_len=128),  # instead of 512; longer ones are truncated
        "loss on everything": dict(loss_on="everything")}
    for name in results.missing(variants):
        results.add(name, **lab.examine(lab.train_vicuna(STEPS, **variants[name])))
    if results.missing(["Alpaca's data"]):
        net = lab.fine_tune(f"alpaca-{STEPS}", lab.files["alpaca"], STEPS, template="alpaca")
        results.add("Alpaca's data", **lab.examine(net, "alpaca"))


@claim(says="At equal compute, a smaller model trained longer beats a larger one",
       source="Chinchilla (2203.15556); LLaMA (2302.13971), section 1, trains longer still",
       fixed="FLOPs of pre-training, the documents, and the fine-tuning before the exam",
       control="the smaller model without the extra steps",
       expected="0.3M wins: at this budget, 20 tokens per parameter means 0.4M parameters",
       minutes=14, columns=dict(EXAM, loss="loss of the base, nats", steps="steps"),
       comparisons=[
           Comparison("0.3M, equal FLOPs", "1.1M"),
           Comparison("0.3M, equal FLOPs", "0.3M, equal steps")])
def llama(lab: Lab, results: Results) -> None:
    variants = {
        "1.1M": dict(size="1.1M", steps=TOY["base"]),
        "0.3M, equal FLOPs": dict(size="0.3M", steps=lab.steps_of_equal_flops("0.3M")),
        "0.3M, equal steps": dict(size="0.3M", steps=TOY["base"])}
    for name in results.missing(variants):
        base = lab.base(**variants[name])
        results.add(name, **lab.examine(lab.train_vicuna(STEPS, base=base)),
                    loss=lab.held_out_loss(lab.load(base)),
                    steps=lab.scaled(variants[name]["steps"]))


@claim(says="LoRA matches full fine-tuning while training a few percent of the parameters",
       source="LoRA (2106.09685); Alpaca-LoRA",
       fixed="data, steps and optimizer (AdamW); the learning rate is 1e-3 for full fine-tuning, "
             "1e-2 otherwise",
       control="train only the output matrix, with three times the parameters of rank 4",
       expected="rank 4 is within 10 points of full fine-tuning; the output matrix is far worse",
       minutes=9, columns=dict(EXAM, trained="trained parameters, %"),
       comparisons=[
           Comparison("rank 4", "full", margin=-10),
           Comparison("rank 16", "full", margin=-10),
           Comparison("rank 4", "output matrix", margin=10)])
def lora(lab: Lab, results: Results) -> None:
    variants = {  # learning rate, and what is trained
        "output matrix": (1e-2, dict(head_only=True)),
        "rank 1": (1e-2, dict(lora_rank=1)),
        "rank 4": (1e-2, dict(lora_rank=4)),
        "rank 16": (1e-2, dict(lora_rank=16)),
        "full": (1e-3, dict())}
    for name in results.missing(variants):
        rate, what = variants[name]
        net = lab.train_vicuna(STEPS, optimizer="adamw", learning_rate=rate, **what)
        trained = trained_fraction(load_trainable(lab.chain("base"), **what))
        results.add(name, **lab.examine(net), trained=trained)


@claim(says="Four-bit quantization costs little",
       source="llama.cpp (2023)",
       fixed="the model and the questions",
       control="the same model in float32",
       expected="no precision costs more than 5 points",
       minutes=1, columns=dict(right="right, %", perplexity="perplexity", kl="KL, nats",
                               same_top="same top token, %", megabytes="MB"),
       comparisons=[
           Comparison("q4", "fp32", margin=-5),
           Comparison("q8", "fp32", margin=-5),
           Comparison("bf16", "fp32", margin=-5)])
def four_bits(lab: Lab, results: Results) -> None:
    if results.missing(bench.PRECISIONS):
        n = 2 * lab.sizes["questions"]
        measured = bench.quality(bench.QualityConfig(ckpt=lab.chain("vicuna"), questions=n))
        for name, metrics in measured.items():
            megabytes = metrics.pop("bytes") / 1e6
            results.add(name, **metrics, megabytes=megabytes, questions=n)


@claim(says="One linear layer between the Q-Former and the language model is enough",
       source="MiniGPT-4 (2304.10592), ablations, accuracy on AOK-VQA and GQA: linear 58.2 and "
              "32.2; three layers 49.7 and 31.0; no Q-Former 56.9 and 33.4; tuned 52.1 and 28.0",
       fixed="pictures, descriptions and steps of both stages",
       control="the same training with a random encoder",
       expected="the others are at most 5 points better; the control is far worse",
       minutes=29, columns=dict(answered=ANSWERED, described=DESCRIBED, fails=FAILS),
       comparisons=[
           Comparison("linear", "three layers", margin=-5),
           Comparison("linear", "without Q-Former", margin=-5),
           Comparison("linear", "Q-Former tuned", margin=-5),
           Comparison("linear", "random encoder", margin=10)])
def projection(lab: Lab, results: Results) -> None:
    variants = {
        "linear": vision.MiniGPT4,
        "three layers": ThreeLayers,
        "without Q-Former": WithoutQFormer,
        "Q-Former tuned": TunedQFormer,
        "random encoder": RandomEncoder}
    for name in results.missing(variants):
        results.add(name, **lab.examine_architecture(name.replace(" ", "-"), variants[name]))


@claim(says="The second stage takes only minutes: a few hundred steps on good descriptions",
       source="MiniGPT-4, section 3.2 and table 4: 400 steps, 7 minutes; failures fall from 35% "
              "to 2%",
       fixed="the model after stage 1; against the control, also the number of steps after it",
       control="the same number of extra steps of stage 1",
       expected="10 points fewer failures after 100 steps, 20 after 400; extra steps of stage 1 "
                "leave more of them",
       minutes=5, columns=dict(fails=FAILS, described=DESCRIBED, answered=ANSWERED),
       comparisons=[
           Comparison("stage 1", "100 steps of stage 2", margin=10),
           Comparison("stage 1", "400 steps of stage 2", margin=20),
           Comparison("400 more of stage 1", "400 steps of stage 2")])
def stage_two(lab: Lab, results: Results) -> None:
    variants = {"stage 1": ("1", 0)}
    for steps in (25, 50, 100, 200, 400):
        variants[f"{steps} steps of stage 2"] = ("2", steps)
        variants[f"{steps} more of stage 1"] = ("1", steps)
    for name in results.missing(variants):
        stage, steps = variants[name]
        results.add(name, **lab.examine_after_stage(stage, steps))


@claim(says="A judge that sees the answers in one order is biased; judging both orders fixes it. "
            "Judges are bad at math",
       source="Judging LLM-as-a-Judge (2306.05685), sections 3.3 and 3.4; Vicuna's blog post",
       fixed="questions, answers and scores; the small model judges a separate set of pairs",
       control="a judge without bias; one that prefers the longer answer, in any order",
       expected="the lean toward the first answer drops from 100 points to 0; the length bias "
                "remains; the small model judges sums worse than scenes",
       minutes=1,
       columns=dict(agrees="agrees with the truth, %", leans="lean toward the first, %"),
       comparisons=[
           Comparison("prefers the first, one order", "prefers the first, both orders", margin=90,
                      column="leans"),
           Comparison("prefers the first, both orders", "prefers the first, one order"),
           Comparison("fair, both orders", "prefers the longer, both orders"),
           Comparison("small model, about scenes", "small model, sums")])
def judge(lab: Lab, results: Results) -> None:
    variants = {}
    for name, oracle in (("fair", "oracle"), ("prefers the first", "first"),
                         ("prefers the longer", "longer")):
        variants[f"{name}, one order"] = dict(oracle=oracle, both_orders=False)
        variants[f"{name}, both orders"] = dict(oracle=oracle, both_orders=True)
    for name in results.missing(variants):
        results.add(name, **lab.judge_by_oracle(**variants[name]))
    subjects = {
        "small model, about scenes": dict(split="scenes", kinds=("color", "size", "where")),
        "small model, sums": dict(split="closed", kinds=("sum",))}
    for name in results.missing(subjects):
        net = lab.load(lab.chain("vicuna"))
        results.add(name, **lab.judge_by_likelihood(net, **subjects[name]))


@claim(says="Harder instructions teach more",
       source="WizardLM (2304.12244)",
       fixed="records, steps, and the teacher",
       control="the same instructions before they are evolved (simple)",
       expected="evolved wins on harder questions, and loses at most 5 points on simple ones",
       minutes=5, columns=dict(on_harder="harder questions, %", on_simple="simple questions, %"),
       comparisons=[
           Comparison("evolved", "simple"),
           Comparison("evolved", "simple", margin=-5, column="on_simple")])
def evolved(lab: Lab, results: Results) -> None:
    variants = ("world", "seeds", "simple", "evolved")  # training files of toy/instruct.py
    if results.missing(variants):
        n = lab.sizes["questions"]
        tables = instruct.main(instruct.InstructConfig(
            base=lab.chain("base"), out=str(lab.out / "instruct"), seed=lab.seed, questions=n,
            count=lab.scaled(600), records=lab.scaled(3000), steps=lab.scaled(200)))
        for name in variants:
            harder = [row[name] for row in tables["harder"].values()]
            simple = [row[name] for row in tables["simple"].values()]
            results.add(name, on_harder=statistics.mean(harder), on_simple=statistics.mean(simple),
                        questions=n * min(len(harder), len(simple)))


@claim(says="In-context retrieval depends on the optimizer, the initialization and the documents",
       source='this repository: docs/toy.md, "What it depends on"',
       fixed="steps and tokens of pre-training",
       control="one of the three replaced by the usual choice: AdamW, normal initialization, "
               "scenes told once",
       expected="each helps; 10% is chance, 50% is a guess between the scene's two colors",
       minutes=10, columns=dict(retrieved="color retrieved, %"),
       comparisons=[
           Comparison("all three", "AdamW"),
           Comparison("all three", "normal initialization"),
           Comparison("all three", "told once")])
def retrieval(lab: Lab, results: Results) -> None:
    variants = {
        "all three": dict(),
        "AdamW": dict(optimizer="adamw"),
        "normal initialization": dict(retrieval_init=False),
        "told once": dict(times_told=1)}
    for name in results.missing(variants):
        net = lab.pretrain(f"retrieval-{name.replace(' ', '-')}", 600, **variants[name])
        results.add(name, **lab.retrieve(net))


@claim(says="Fine-tuning makes a model stop stating facts that it still finds likely",
       source="this repository",
       fixed="the base and the conversations",
       control="people the conversations do mention",
       expected="more steps, fewer facts stated; but the true town is ranked first at most 10 "
                "points less often than by the base",
       minutes=7, columns=dict(said="said, %", unasked="true town ranked first, %",
                               asked="the same, people in the conversations, %"),
       comparisons=[
           Comparison("after 100 steps", "after 600 steps"),
           Comparison("after 600 steps", "base", margin=-10, column="unasked")])
def fades(lab: Lab, results: Results) -> None:
    rows = dict(facts=exam.ALL_ROWS["facts"])
    if results.missing(["base"]):
        base = lab.load(lab.chain("base"))
        said = lab.examine(base, "lines", rows=rows, shots=lab.shots())["facts"]
        results.add("base", said=said, **lab.rank_facts(base))
    variants = {f"after {steps} steps": steps for steps in (100, 300, 600)}
    for name in results.missing(variants):
        net = lab.train_vicuna(variants[name])
        said = lab.examine(net, rows=rows)["facts"]
        results.add(name, said=said, **lab.rank_facts(net))


# -- the verdict ----------------------------------------------------------------------------------

# Student's t, two-sided, 95%: for 2, 3, ... 10 seeds
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


class Outcome(NamedTuple):
    """How a comparison came out, in percentage points."""
    comparison: Comparison
    difference: float
    error: float  # half-width of the 95% interval of the difference
    verdict: str


def compare(comparison: Comparison, column: str, by_seed: list[dict]) -> Outcome:
    """Compares a - b in `column`, averaged over seeds. by_seed has one {variant: metrics} per seed.
    """
    pairs = [(variants[comparison.a], variants[comparison.b]) for variants in by_seed]
    differences = [100 * (a[column] - b[column]) for a, b in pairs]
    mean = statistics.mean(differences)
    if len(by_seed) > 1:
        error = seed_error(differences)
    else:
        a, b = pairs[0]
        error = question_error(a, b, column)
    excess = mean - comparison.margin
    if excess > error:
        verdict = "holds"
    elif excess < -error:
        verdict = "does not hold"
    else:
        verdict = "too close to tell"
    return Outcome(comparison, mean, error, verdict)


def seed_error(differences: list[float]) -> float:
    """The error from the spread across seeds."""
    n = len(differences)
    return T_95[n - 2] * statistics.stdev(differences) / math.sqrt(n)


def question_error(a: dict, b: dict, column: str) -> float:
    """The error from the number of questions. Treats the variants as independent; they answer the
    same questions, so this is usually too large."""
    halves = []
    for metrics in (a, b):
        n = metrics["questions"]
        share = max(0, metrics[column])  # only a lean can be negative
        low, high = evaluate.interval(round(n * share), n)
        halves.append(100 * (high - low) / 2)
    return math.hypot(*halves)


def overall(outcomes: list[Outcome]) -> str:
    """A claim holds if every comparison holds, and does not hold if any comparison does not."""
    verdicts = {outcome.verdict for outcome in outcomes}
    for verdict in ("does not hold", "too close to tell"):
        if verdict in verdicts:
            return verdict
    return "holds"


# -- what is printed and drawn --------------------------------------------------------------------

def markdown(about: Claim, by_seed: list[dict]) -> list[str]:
    """The lines of a table: the mean of each metric, and its range if there are several seeds."""
    lines = [f"| | {' | '.join(about.columns.values())} |", "|---" * (1 + len(about.columns)) + "|"]
    for name in by_seed[0]:
        cells = []
        for column, title in about.columns.items():
            values = [variants[name].get(column) for variants in by_seed]
            cells.append("" if None in values else cell(values, title))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def cell(values: list[float], title: str) -> str:
    def show(value: float) -> str:
        return f"{100 * value:.1f}" if "%" in title else f"{value:.4g}"

    text = show(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ({show(min(values))} to {show(max(values))})"


def report(name: str, by_seed: list[dict], out: Path, fast: bool = False) -> dict:
    """Prints the table and the verdict, and draws the chart."""
    about = CLAIMS[name]
    outcomes = []
    print()
    for line in markdown(about, by_seed):
        print(line)
    print()
    for comparison in about.comparisons:
        column = comparison.column or next(iter(about.columns))
        outcome = compare(comparison, column, by_seed)
        outcomes.append(outcome)
        print(f"{outcome.verdict}: {comparison.a} - {comparison.b} = {outcome.difference:+.1f} "
              f"± {outcome.error:.1f} ({about.columns[column]}), expected above "
              f"{comparison.margin:+.0f}")
    if len(by_seed) == 1:
        print("With one seed, the error does not include the variation between training runs.")
    verdict = overall(outcomes)
    seconds = sum(metrics["seconds"] for variants in by_seed for metrics in variants.values())
    print(f"\nclaim: {about.says}\nverdict: {verdict} (seeds: {len(by_seed)}; "
          f"{seconds / 60:.0f} min in all)")
    if fast:
        print("--fast runs a tenth of the steps, so this shows only the trend.")
    draw(about, by_seed, out / f"{name}.png")
    return dict(verdict=verdict, by_seed=by_seed)


def draw(about: Claim, by_seed: list[dict], path: Path) -> None:
    """Saves a chart of the first column, with a point for each seed, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: matplotlib is not installed (pip install matplotlib)")
        return
    column, title = next(iter(about.columns.items()))
    names = list(by_seed[0])[::-1]  # the first one on top
    figure = Figure(figsize=(8, 1 + 0.35 * len(names)), layout="constrained")
    axes = figure.add_subplot(xlabel=title, xlim=(0, 100))
    figure.suptitle("\n".join(textwrap.wrap(about.says, 70)))
    for name in names:
        shares = [100 * variants[name][column] for variants in by_seed]
        axes.barh(name, statistics.mean(shares), color="lightsteelblue")
        axes.plot(shares, [name] * len(shares), "k.")
    figure.savefig(path, dpi=120)
    print(f"chart: {path}")


# -- python -m toy.claims -------------------------------------------------------------------------

@dataclass
class ClaimsConfig:
    name: str = field(default="", metadata=dict(positional=True))  # claim to test; omit to list all
    seeds: int = 1  # number of seeds (0, 1, ...); with several, the error is from their spread
    fast: bool = False  # a tenth of the steps, fewer questions; shows only the trend
    run: str = "out"  # output of train_sft.py and train_vlm.py; what it lacks is trained in --out
    out: str = ""  # results and new models; default: out/claims, or out/claims/fast with --fast

    def __post_init__(self):
        check_at_least(self, 1, "seeds")
        if self.seeds > len(T_95) + 1:
            raise UserError(f"--seeds={self.seeds} must be at most {len(T_95) + 1}")
        if not self.name:
            refuse_unused(self, ("seeds", "fast", "run", "out"), "name a claim to test it")
        elif self.name not in CLAIMS:
            hint = suggest(self.name, CLAIMS, f"; choose from {', '.join(CLAIMS)}")
            raise UserError(f"unknown claim {self.name}{hint}")
        if self.run != "out" and not (chain_folder(Path(self.run), 0) / "base").exists():
            raise UserError(f"--run={self.run} has no base model; `python train_sft.py "
                            f"--out={self.run}` trains one")
        self.out = self.out or ("out/claims/fast" if self.fast else "out/claims")


def print_list() -> None:
    for name, about in CLAIMS.items():
        print(f"{name:<11} {about.says}")
        for line in textwrap.wrap(f"{about.source}; about {about.minutes} min", 84):
            print(f"{'':<11}   {line}")
    print("\nTimes are for one seed on one thread, after train_sft.py and train_vlm.py have run.")


def main(cfg: ClaimsConfig) -> dict:
    if not cfg.name:
        print_list()
        return {}
    about, out = CLAIMS[cfg.name], Path(cfg.out)
    print(f"{about.says}\n  source: {about.source}\n  fixed: {about.fixed}\n"
          f"  control: {about.control}\n  expected: {about.expected}")
    machine = choose_machine("auto", "float32")
    made_with = dict(run=cfg.run, fast=cfg.fast)
    by_seed = []
    with lock(out, machine):
        for seed in range(cfg.seeds):
            results = Results(out / f"{cfg.name}.json", seed, made_with)
            lab = Lab(out, Path(cfg.run), seed, cfg.fast, machine)
            try:
                about.measure(lab, results)
            except KeyboardInterrupt:
                raise Stopped(f"results so far: {results.file}") from None
            by_seed.append(results.metrics)
    return report(cfg.name, by_seed, out, cfg.fast)


if __name__ == "__main__":
    run(main, ClaimsConfig)
