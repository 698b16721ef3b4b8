"""What the papers say, measured again on a laptop.

    python -m toy.claims                      # the list of claims
    python -m toy.claims lora                 # one of them: a table and a verdict
    python -m toy.claims lora --seeds=3       # against the spread between three seeds
    python -m toy.claims lora --fast          # a tenth of the steps: shows the trend only

Each claim is a function below. It trains or measures variants that differ in one ingredient (see
toy/lab.py). Above it stand what is equal in all variants, the control that could have falsified the
claim, and the comparisons that must hold. Every figure is saved in --out as soon as it is measured:
the same command resumes. docs/claims.md has the results.
"""

import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import data
import vision
from tools import bench, checkpoint, evaluate
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
    trainable,
    trained_share,
)


class More(NamedTuple):
    """One of a claim's comparisons: a figure of `high` exceeds that of `low` by more than `by`
    percentage points. With a negative `by`, `high` may be a little worse."""
    high: str
    low: str
    by: float = 0.0
    column: str = ""  # the claim's first column when not given


class Claim(NamedTuple):
    measure: Callable  # (lab, results): adds the figures of every variant
    says: str
    source: str
    equal: str  # what all variants share
    control: str  # what would falsify the claim
    expect: str
    minutes: int  # one seed, two cores, with the models of train_sft.py and train_vlm.py
    columns: dict  # key of a figure: title; shares have a % in their title
    holds: list[More]


CLAIMS: dict[str, Claim] = {}


def claim(**about) -> Callable:
    """Lists the function below as a claim, under its name."""
    def add(measure: Callable) -> Callable:
        CLAIMS[measure.__name__.replace("_", "-")] = Claim(measure, **about)
        return measure
    return add


class Results:
    """The figures of a claim with one seed, {variant: figures}, in a file for all seeds. Besides
    its columns, a variant has "questions", the number behind each share, and "seconds"."""

    def __init__(self, file: Path, seed: int):
        self.file, self.seed, self.seeds = file, str(seed), {}
        if file.exists():
            self.seeds = json.loads(file.read_text(encoding="utf-8"))
        self.figures = self.seeds.setdefault(self.seed, {})
        self.began = time.time()

    def missing(self, variants: dict) -> list[tuple]:
        """(name, what differs) of the variants that are not measured yet."""
        return [(name, what) for name, what in variants.items() if name not in self.figures]

    def add(self, variant: str, **figures) -> None:
        seconds = round(time.time() - self.began)
        self.figures[variant] = dict(figures, seconds=seconds)
        self.began = time.time()
        with data.atomic_write(self.file) as file:
            json.dump(self.seeds, file, indent=1)


# -- the claims -----------------------------------------------------------------------------------

EXAM = dict(right="right, %", scenes="held-out scenes, %", pairs="held-out pairs, %",
            later="needs earlier turns, %")
SEEING = dict(described="exact descriptions, %", answered="right answers, %",
              fails="failed descriptions, %")
STEPS = 500  # of a fine-tuning


@claim(says="Fine-tuning beats the base at every size, and size matters less",
       source="InstructGPT (2203.02155), figure 1; the thesis of Alpaca and Vicuna",
       equal="steps and tokens, both of pre-training and of fine-tuning",
       control="the same fine-tuning from random weights",
       expect="even the smallest fine-tuned model beats the largest base",
       minutes=16, columns=EXAM,
       holds=[More("1.1M fine-tuned", "1.1M few-shot"), More("0.3M fine-tuned", "0.3M few-shot"),
              More("0.1M fine-tuned", "0.1M few-shot"), More("0.1M fine-tuned", "1.1M few-shot"),
              More("1.1M fine-tuned", "1.1M from random weights")])
def sft(lab: Lab, results: Results) -> None:
    variants = {}
    for size in ("1.1M", "0.3M", "0.1M"):
        for how in ("few-shot", "fine-tuned", "from random weights"):
            variants[f"{size} {how}"] = size, how
    for name, (size, how) in results.missing(variants):
        if how == "few-shot":
            base, _, _ = checkpoint.load(lab.base(size))
            results.add(name, **lab.examine(base, "lines", shots=lab.shots()))
        elif how == "fine-tuned":
            results.add(name, **lab.examine(lab.chat(STEPS, base=lab.base(size))))
        else:
            results.add(name, **lab.examine(lab.chat(STEPS, random_size=size)))


@claim(says="Quality counts more than quantity: more, but noisy data does not help",
       source="Koala's blog post: Koala-Distill is slightly better than Koala-All",
       equal="the clean conversations; steps, or epochs",
       control="as many conversations, all of them noisy (half of their replies are wrong)",
       expect="clean is at least as good as mixed, and far better than noisy",
       minutes=16, columns=EXAM,
       holds=[More("N clean", "N clean, 2N noisy, equal steps"),
              More("N clean", "N clean, 2N noisy, equal epochs"),
              More("N clean", "3N noisy, equal steps"),
              More("N clean", "3N noisy, equal epochs")])
def quality(lab: Lab, results: Results) -> None:
    n = lab.sizes["conversations"] // 12
    variants = {
        "N clean": dict(clean=n, noisy=0, steps=300),
        "N clean, 2N noisy, equal steps": dict(clean=n, noisy=2 * n, steps=300),
        "N clean, 2N noisy, equal epochs": dict(clean=n, noisy=2 * n, steps=900),
        "3N noisy, equal steps": dict(clean=0, noisy=3 * n, steps=300),
        "3N noisy, equal epochs": dict(clean=0, noisy=3 * n, steps=900)}
    for name, variant in results.missing(variants):
        file, steps = lab.noisy_conversations(variant["clean"], variant["noisy"]), variant["steps"]
        results.add(name, **lab.examine(lab.fine_tune(f"{file.stem}-{steps}", file, steps)))


@claim(says="Vicuna is Alpaca with turns, full answers, a long context, and a loss on replies only",
       source="Vicuna's blog post of March 2023",
       equal="the base, steps and tokens, so FLOPs (but not the number of supervised tokens)",
       control="the same data with every token in the loss",
       expect="each ingredient that is removed costs something; Alpaca has the fewest right",
       minutes=18, columns=EXAM,
       holds=[More("all four", "without turns"), More("all four", "without full answers"),
              More("all four", "without long context"), More("all four", "loss on everything"),
              More("all four", "Alpaca's data")])
def vicuna(lab: Lab, results: Results) -> None:
    variants = {
        "all four": dict(),
        "without turns": dict(one_round=True),
        "without full answers": dict(short=True),
        "without long context": dict(seq_len=128),  # a quarter; longer conversations are cut
        "loss on everything": dict(loss_on="everything")}
    for name, changed in results.missing(variants):
        results.add(name, **lab.examine(lab.chat(STEPS, **changed)))
    for name, _ in results.missing({"Alpaca's data": dict()}):
        net = lab.fine_tune(f"alpaca-{STEPS}", lab.files["alpaca"], STEPS, template="alpaca")
        results.add(name, **lab.examine(net, "alpaca"))


@claim(says="At equal compute, a smaller model that is trained longer beats a larger one",
       source="LLaMA (2302.13971), section 1; Chinchilla (2203.15556)",
       equal="FLOPs of pre-training, the documents, and the fine-tuning before the exam",
       control="the smaller model without the additional steps",
       expect="0.3M wins: at these FLOPs, 20 tokens per parameter mean 0.4M parameters",
       minutes=14, columns=dict(EXAM, loss="loss of the base, nats", steps="steps"),
       holds=[More("0.3M, equal FLOPs", "1.1M"),
              More("0.3M, equal FLOPs", "0.3M, equal steps")])
def llama(lab: Lab, results: Results) -> None:
    variants = {
        "1.1M": dict(size="1.1M", steps=TOY["base"]),
        "0.3M, equal FLOPs": dict(size="0.3M", steps=lab.steps_of_equal_flops("0.3M")),
        "0.3M, equal steps": dict(size="0.3M", steps=TOY["base"])}
    for name, variant in results.missing(variants):
        folder = lab.base(**variant)
        base, _, _ = checkpoint.load(folder)
        results.add(name, **lab.examine(lab.chat(STEPS, base=folder)),
                    loss=lab.held_out_loss(base), steps=lab.scaled(variant["steps"]))


@claim(says="LoRA reaches the gain of full fine-tuning with a few per cent of the parameters",
       source="LoRA (2106.09685); Alpaca-LoRA",
       equal="data, steps and optimizer (AdamW); few parameters get ten times the learning rate",
       control="only the output matrix is trained: three times the parameters of rank 4",
       expect="rank 4 is within 10 points of full fine-tuning, the output matrix far below",
       minutes=13, columns=dict(EXAM, trained="trained parameters, %"),
       holds=[More("rank 4", "full", by=-10), More("rank 16", "full", by=-10),
              More("rank 4", "output matrix", by=10)])
def lora(lab: Lab, results: Results) -> None:
    variants = {
        "output matrix": dict(head_only=True),
        "rank 1": dict(lora_rank=1),
        "rank 4": dict(lora_rank=4),
        "rank 16": dict(lora_rank=16),
        "full": dict()}
    for name, changed in results.missing(variants):
        trained = trained_share(trainable(lab.chain("base"), **changed))
        rate = 1e-2 if changed else 1e-3
        net = lab.chat(STEPS, optimizer="adamw", learning_rate=rate, **changed)
        results.add(name, **lab.examine(net), trained=trained)


@claim(says="Four bits cost little",
       source="llama.cpp; LLaMA's users since March 2023",
       equal="the model and the questions",
       control="the same model in float32",
       expect="q8 and bfloat16 cost nothing, q4 at most 5 points",
       minutes=1, columns=dict(right="right, %", perplexity="perplexity", kl="KL, nats",
                               same_top="same top token, %", megabytes="MB"),
       holds=[More("q4", "fp32", by=-5), More("q8", "fp32", by=-5), More("bf16", "fp32", by=-5)])
def four_bits(lab: Lab, results: Results) -> None:
    if results.missing(bench.PRECISIONS):
        n = 2 * lab.sizes["questions"]
        measured = bench.quality(bench.QualityConfig(ckpt=lab.chain("vicuna"), questions=n))
        for name, figures in measured.items():
            megabytes = figures.pop("bytes") / 1e6
            results.add(name, **figures, megabytes=megabytes, questions=n)


@claim(says="One linear layer between Q-Former and language model is enough",
       source="MiniGPT-4 (2304.10592), ablations: AOK-VQA and GQA 58.2/32.2; three layers "
              "49.7/31.0, without Q-Former 56.9/33.4, Q-Former tuned 52.1/28.0",
       equal="pictures, descriptions and steps of both stages",
       control="the same training with a random encoder",
       expect="the others are at most 5 points better, the control is far below",
       minutes=22, columns=SEEING,
       holds=[More("linear", "three layers", by=-5, column="answered"),
              More("linear", "without Q-Former", by=-5, column="answered"),
              More("linear", "Q-Former tuned", by=-5, column="answered"),
              More("linear", "random encoder", by=10, column="answered")])
def projection(lab: Lab, results: Results) -> None:
    variants = {
        "linear": vision.MiniGPT4,
        "three layers": ThreeLayers,
        "without Q-Former": WithoutQFormer,
        "Q-Former tuned": TunedQFormer,
        "random encoder": RandomEncoder}
    for name, architecture in results.missing(variants):
        results.add(name, **lab.train_minigpt4(name.replace(" ", "-"), architecture))


@claim(says="The second stage needs minutes: a few hundred steps on good descriptions",
       source="MiniGPT-4, section 3.2 and table 4: 400 steps, 7 minutes; failures 35 to 2%",
       equal="the model after stage 1, and the steps beyond it",
       control="as many more steps of stage 1",
       expect="most failures are gone after 100 steps; more of stage 1 does not cure them",
       minutes=5, columns=SEEING,
       holds=[More("stage 1", "100 steps of stage 2", by=10, column="fails"),
              More("stage 1", "400 steps of stage 2", by=20, column="fails"),
              More("400 more of stage 1", "400 steps of stage 2", column="fails")])
def stage_two(lab: Lab, results: Results) -> None:
    variants = {"stage 1": ("2", 0)}
    for steps in (25, 50, 100, 200, 400):
        variants[f"{steps} steps of stage 2"] = "2", steps
        variants[f"{steps} more of stage 1"] = "1", steps
    for name, (stage, steps) in results.missing(variants):
        results.add(name, **lab.continue_stage(stage, steps))


@claim(says="A judge that sees one order is biased, both orders cure it; it is poor at mathematics",
       source="Judging LLM-as-a-Judge (2306.05685), sections 3.3 and 3.4; Vicuna's blog post",
       equal="questions, answers and scores",
       control="a judge without bias; one that prefers the longer answer, in any order",
       expect="a lean of 100 points to the first answer becomes 0; the longer answer still wins",
       minutes=1, columns=dict(agrees="agrees with the truth, %", leans="leans to the first, %"),
       holds=[More("prefers the first, both orders", "prefers the first, one order"),
              More("fair, both orders", "prefers the longer, both orders"),
              More("small model, about scenes", "small model, sums")])
def judge(lab: Lab, results: Results) -> None:
    variants = {}
    for name, oracle in (("fair", "oracle"), ("prefers the first", "first"),
                         ("prefers the longer", "longer")):
        variants[f"{name}, one order"] = dict(name=oracle, both_orders=False)
        variants[f"{name}, both orders"] = dict(name=oracle, both_orders=True)
    for name, how in results.missing(variants):
        results.add(name, **lab.judged(**how))
    subjects = {
        "small model, about scenes": dict(split="scenes", kinds=("color", "size", "where")),
        "small model, sums": dict(split="closed", kinds=("sum",))}
    for name, subject in results.missing(subjects):
        net, _, _ = checkpoint.load(lab.chain("vicuna"))
        results.add(name, **lab.judged_by_model(net, **subject))


@claim(says="Harder instructions teach more",
       source="WizardLM (2304.12244)",
       equal="records, steps, and the teacher",
       control="the same instructions before they evolve (simple)",
       expect="evolved wins on harder questions, and loses nothing on simple ones",
       minutes=5, columns=dict(harder="harder questions, %", simple="simple questions, %"),
       holds=[More("evolved", "simple"), More("evolved", "simple", by=-5, column="simple")])
def evolved(lab: Lab, results: Results) -> None:
    variants = dict(world="the world's own", seeds="175 tasks", simple="Self-Instruct",
                    evolved="Evol-Instruct")
    if results.missing(variants):
        n = lab.sizes["questions"]
        tables = instruct.main(instruct.InstructConfig(
            base=lab.chain("base"), out=str(lab.out / "instruct"), seed=lab.seed, questions=n,
            count=lab.scaled(600), records=lab.scaled(3000), steps=lab.scaled(200)))
        for name in variants:
            harder = [cells[name] for cells in tables["harder"].values()]
            simple = [cells[name] for cells in tables["simple"].values()]
            results.add(name, harder=statistics.mean(harder), simple=statistics.mean(simple),
                        questions=n * len(simple))


@claim(says="In-context retrieval depends on the optimizer, the initialization and the documents",
       source="ours: docs/toy.md, what it depends on",
       equal="steps and tokens of pre-training",
       control="one of the three is as usual: AdamW, normal weights, scenes told once",
       expect="each helps; 10% is chance, 50% if only the two colors of the scene are known",
       minutes=10, columns=dict(retrieved="color retrieved, %"),
       holds=[More("all three", "AdamW"), More("all three", "normal initialization"),
              More("all three", "told once")])
def retrieval(lab: Lab, results: Results) -> None:
    variants = {
        "all three": dict(),
        "AdamW": dict(optimizer="adamw"),
        "normal initialization": dict(retrieval_init=False),
        "told once": dict(times_told=1)}
    for name, changed in results.missing(variants):
        net = lab.pretrain(f"retrieval-{name.replace(' ', '-')}", 600, **changed)
        results.add(name, **lab.retrieved(net))


@claim(says="Facts fade from speech, not from likelihood",
       source="ours",
       equal="the base and the conversations, which do not mention these people",
       control="people whom the conversations do mention",
       expect="fewer facts are said after more steps, but the true town stays the likeliest of 8",
       minutes=7, columns=dict(said="said, %", ranked="true town ranked first, %",
                               asked="the same, people of the conversations, %"),
       holds=[More("after 100 steps", "after 600 steps"),
              More("after 600 steps", "base", by=-10, column="ranked")])
def fades(lab: Lab, results: Results) -> None:
    rows = dict(facts=exam.ALL_ROWS["facts"])
    for name, _ in results.missing({"base": 0}):
        base, _, _ = checkpoint.load(lab.chain("base"))
        said = lab.examine(base, "lines", rows, lab.shots())["facts"]
        results.add(name, said=said, **lab.ranked_facts(base))
    for name, steps in results.missing({f"after {n} steps": n for n in (100, 300, 600)}):
        net = lab.chat(steps)
        said = lab.examine(net, rows=rows)["facts"]
        results.add(name, said=said, **lab.ranked_facts(net))


# -- the verdict ----------------------------------------------------------------------------------

# Student's t: 95% of a normal sample's means are within t standard errors; 2, 3, ... seeds
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


class Compared(NamedTuple):
    """A comparison and its outcome, in percentage points."""
    more: More
    difference: float
    error: float
    verdict: str


def compare(more: More, column: str, seeds: list[dict]) -> Compared:
    """`column` of high minus that of low, the mean over seeds. The error is half of its 95%
    interval: with several seeds from the spread of their differences, with one from the number of
    questions."""
    pairs = [(figures[more.high], figures[more.low]) for figures in seeds]
    differences = [100 * (high[column] - low[column]) for high, low in pairs]
    mean = statistics.mean(differences)
    if len(seeds) > 1:
        n = len(seeds)
        error = T[n - 2] * statistics.stdev(differences) / math.sqrt(n)
    else:
        high, low = pairs[0]
        error = math.hypot(half_interval(high, column), half_interval(low, column))
    verdict = "too close to tell"
    if mean - more.by > error:
        verdict = "holds"
    elif mean - more.by < -error:
        verdict = "does not hold"
    return Compared(more, mean, error, verdict)


def half_interval(figures: dict, column: str) -> float:
    n = figures["questions"]
    low, high = evaluate.interval(round(n * figures[column]), n)
    return 100 * (high - low) / 2


def overall(compared: list[Compared]) -> str:
    """A claim holds if all of its comparisons do, and does not if one of them does not."""
    verdicts = {c.verdict for c in compared}
    for verdict in ("does not hold", "too close to tell"):
        if verdict in verdicts:
            return verdict
    return "holds"


# -- what is printed and drawn --------------------------------------------------------------------

def markdown(about: Claim, seeds: list[dict]) -> list[str]:
    """The lines of a table: the mean of each figure, with several seeds also the range."""
    lines = [f"| | {' | '.join(about.columns.values())} |", "|---" * (1 + len(about.columns)) + "|"]
    for variant in seeds[0]:
        cells = []
        for column, title in about.columns.items():
            values = [figures[variant].get(column) for figures in seeds]
            cells.append("" if None in values else cell(values, title))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def cell(values: list[float], title: str) -> str:
    def show(value: float) -> str:
        return f"{100 * value:.1f}" if "%" in title else f"{value:.4g}"

    text = show(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ({show(min(values))} to {show(max(values))})"


def report(name: str, seeds: list[dict], out: Path) -> dict:
    """Prints the table and the verdict, and draws the picture."""
    about = CLAIMS[name]
    first = next(iter(about.columns))
    compared = [compare(more, more.column or first, seeds) for more in about.holds]
    print()
    for line in markdown(about, seeds):
        print(line)
    print(f"\nexpected: {about.expect}")
    for c in compared:
        column = about.columns[c.more.column or first]
        print(f"{c.verdict}: {column}, {c.more.high} minus {c.more.low}: {c.difference:+.1f}, "
              f"expected above {c.more.by:+.0f}; error {c.error:.1f}")
    seconds = sum(variant["seconds"] for figures in seeds for variant in figures.values())
    verdict, numbers = overall(compared), ", ".join(str(seed) for seed in range(len(seeds)))
    print(f"\n{about.says}: {verdict}. Seeds {numbers}; {seconds / 60:.0f} minutes in all")
    draw(about, seeds, out / f"{name}.png")
    return dict(verdict=verdict, seeds=seeds)


def draw(about: Claim, seeds: list[dict], path: Path) -> None:
    """The first column as bars, with a point per seed, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    column, title = next(iter(about.columns.items()))
    variants = list(seeds[0])[::-1]  # from top to bottom
    figure = Figure(figsize=(8, 1 + 0.35 * len(variants)), layout="constrained")
    axes = figure.add_subplot(xlabel=title, xlim=(0, 100))
    figure.suptitle("\n".join(textwrap.wrap(about.says, 70)))
    for variant in variants:
        shares = [100 * figures[variant][column] for figures in seeds]
        axes.barh(variant, statistics.mean(shares), color="lightsteelblue")
        axes.plot(shares, [variant] * len(shares), "k.")
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


# -- python -m toy.claims -------------------------------------------------------------------------

@dataclass
class ClaimsConfig:
    name: str = field(default="", metadata=dict(positional=True))  # the claim; without it, a list
    seeds: int = 1  # measure with the seeds 0, 1, ...; the verdict is against their spread
    fast: bool = False  # a tenth of the steps, fewer questions: shows the trend only
    run: str = "out"  # take the models of train_sft.py and train_vlm.py in it; seed 1: in out/seed1
    out: str = ""  # figures and new models; default: out/claims, or out/claims/fast with --fast

    def __post_init__(self):
        check_at_least(self, 1, "seeds")
        if self.seeds > len(T) + 1:
            raise UserError(f"--seeds={self.seeds} must be at most {len(T) + 1}")
        if not self.name:
            refuse_unused(self, ("seeds", "fast", "run", "out"), "name a claim to measure it")
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
        for line in textwrap.wrap(f"{about.source}; {about.minutes} minutes", 84):
            print(f"{'':<11}   {line}")
    print("\nMinutes for one seed on two cores, when out/ has the models of train_sft.py and "
          "train_vlm.py.")


def main(cfg: ClaimsConfig) -> dict:
    if not cfg.name:
        print_list()
        return {}
    about, out, seeds = CLAIMS[cfg.name], Path(cfg.out), []
    print(f"{about.says}\n  source: {about.source}\n  equal: {about.equal}\n"
          f"  control: {about.control}")
    machine = choose_machine("auto", "float32")
    with lock(out, machine):
        for seed in range(cfg.seeds):
            results = Results(out / f"{cfg.name}.json", seed)
            lab = Lab(out, Path(cfg.run), seed, cfg.fast, machine)
            try:
                about.measure(lab, results)
            except KeyboardInterrupt:
                raise Stopped(f"the figures so far are in {results.file}") from None
            seeds.append(results.figures)
    return report(cfg.name, seeds, out)


if __name__ == "__main__":
    run(main, ClaimsConfig)
