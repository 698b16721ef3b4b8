"""Tests of toy/claims.py and toy/lab.py: variants differ in what they say, the verdict follows from
the metrics, and the same command resumes."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import data
import model
import train_sft
import train_vlm
import vision
from conftest import ROOT
from tools import bench, checkpoint, machine
from tools.config import Stopped, UserError
from toy import claims, instruct, lab, pictures, world

MICRO = ROOT / "tests" / "micro"
# 500 steps of a claim become one
SIZES = dict(documents=120, instructions=20, conversations=72, vicuna=3, questions=1)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with a base and a Vicuna, as train_sft.py leaves them."""
    for name in ("base", "vicuna"):
        step = tmp_path / "run" / name / "step-000500"
        shutil.copytree(MICRO, step)
        (step.parent / "latest").write_text(step.name, encoding="utf-8")
    monkeypatch.setattr(train_sft, "FAST", SIZES)
    monkeypatch.setattr(machine, "measure_peak", lambda *_: 1e9)
    monkeypatch.setattr(checkpoint, "flush_to_disk", lambda path: None)
    return tmp_path / "run"


@pytest.fixture
def small_lab(run, tmp_path):
    here = machine.Machine("cpu", torch.float32, 1e9, 0, 1, False)
    return lab.Lab(tmp_path / "out", run, 0, True, here)


# -- the claims -----------------------------------------------------------------------------------

def test_the_list_and_the_docs_have_every_claim(capsys):
    claims.main(claims.ClaimsConfig())
    printed = capsys.readouterr().out
    text = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    for name, about in claims.CLAIMS.items():
        assert about.says in printed and about.source.split(",")[0] in printed
        assert f"## {name}\n" in text and f"python -m toy.claims {name}" in text
        expected = about.expected[0].upper() + about.expected[1:]
        assert f"**Expected.** {expected}." in " ".join(text.split())


@pytest.mark.parametrize("options, message", [
    (dict(name="lorra"), "did you mean lora?"), (dict(seeds=3), "--seeds=3 has no effect"),
    (dict(name="lora", run="nowhere"), "--run=nowhere has no base model")])
def test_refused(options, message):
    """A misspelled --run would have trained everything again, from a base of its own."""
    with pytest.raises(UserError, match=message):
        claims.ClaimsConfig(**options)


class NotingLab:
    """Stands in for a Lab: notes what it is asked. A model is the path that tells how it was made;
    each evaluation has metrics of its own."""
    EVALUATIONS = dict(examine=("right", "scenes", "pairs", "later", "facts"),
                       retrieve=("retrieved",), rank_facts=("unasked", "asked"),
                       judge_by_oracle=("agrees", "leans"), judge_by_likelihood=("agrees",),
                       examine_architecture=("described", "answered", "fails"),
                       examine_after_stage=("described", "answered", "fails"))
    sizes, seed, out, files = train_sft.TOY, 0, Path("out"), dict(alpaca="alpaca.json")

    def __init__(self):
        self.asked = []

    def scaled(self, n: int) -> int:
        return n

    def __getattr__(self, name: str):
        def call(*args, **options):
            self.asked.append((name, args, options))
            if name in self.EVALUATIONS:
                return dict.fromkeys(self.EVALUATIONS[name], 0.5) | dict(questions=100)
            if name in ("held_out_loss", "steps_of_equal_flops"):
                return 7
            return Path(f"{name} {args} {options}")
        return call


@pytest.fixture
def noting_lab(monkeypatch):
    kinds = dict.fromkeys(("world", "seeds", "simple", "evolved"), 0.5)
    four = dict(bytes=1, right=0.5, perplexity=2, kl=0, same_top=1)
    monkeypatch.setattr(claims, "load_trainable", lambda folder, **changed: None)
    monkeypatch.setattr(claims, "trained_fraction", lambda net: 0.1)
    monkeypatch.setattr(bench, "quality", lambda cfg: {p: dict(four) for p in bench.PRECISIONS})
    monkeypatch.setattr(instruct, "main", lambda cfg: dict(harder=dict(a=kinds),
                                                           simple=dict(a=kinds)))
    return NotingLab()


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_variants_differ_in_what_they_say(name, noting_lab, tmp_path, monkeypatch):
    """A variant whose option was forgotten would be the plain one under another name. And each
    comparison must find its metrics: training takes long, a KeyError after it is expensive."""
    about, made = claims.CLAIMS[name], []
    results = claims.Results(tmp_path / "results.json", 0, {})

    def add(variant: str, add=results.add, **metrics):
        made.append(repr(noting_lab.asked))
        noting_lab.asked = []
        add(variant, **metrics)

    monkeypatch.setattr(results, "add", add)
    about.measure(noting_lab, results)
    made = [how for how in made if how != "[]"]  # some claims measure all variants at once
    assert len(set(made)) == len(made)
    for column in about.columns:
        assert any(column in metrics for metrics in results.metrics.values())
    again = claims.Results(results.file, 0, {})
    noting_lab.asked = []
    about.measure(noting_lab, again)
    assert again.metrics == results.metrics and "seconds" in str(again.metrics)
    assert not [call for call in noting_lab.asked if call[0] in NotingLab.EVALUATIONS]
    assert claims.report(name, [results.metrics], tmp_path)["verdict"] != "holds"


def test_a_claim_resumes_and_trains_nothing_twice(run, tmp_path, monkeypatch, capsys):
    """Stopped between a training and its exam, the same command must load that model."""
    trained, asked = [], []

    def train(*args, train=train_sft.train):
        trained.append(args[5])
        return train(*args)

    def examine(*args, examine=lab.Lab.examine, **options):
        asked.append(args)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return examine(*args, **options)

    monkeypatch.setattr(train_sft, "train", train)
    monkeypatch.setattr(lab.Lab, "examine", examine)
    cfg = claims.ClaimsConfig(name="sft", fast=True, run=str(run), out=str(tmp_path / "out"))
    with pytest.raises(Stopped, match="results so far: .*sft.json"):
        claims.main(cfg)
    results = json.loads((tmp_path / "out" / "sft.json").read_text(encoding="utf-8"))
    assert list(results["seeds"]["0"]) == ["1.1M few-shot", "1.1M fine-tuned"]
    printed = capsys.readouterr().out
    result = claims.main(cfg)
    assert len(asked) == 10 and len(result["by_seed"][0]) == 9
    assert len(trained) == len(set(trained)) == 9, "three bases, six fine-tunings"
    printed = capsys.readouterr().out
    assert "| 0.1M from random weights | " in printed and "too close to tell" in printed


def test_results_of_other_models_are_not_reported(run, tmp_path):
    """With --out given, those of --fast were printed as those of the whole number of steps."""
    results = claims.Results(tmp_path / "lora.json", 0, dict(run="out", fast=True))
    results.add("full", right=1)
    assert claims.Results(results.file, 0, dict(run="out", fast=True)).metrics
    with pytest.raises(UserError, match="lora.json was made with .*'fast': True.*delete it"):
        claims.Results(results.file, 0, dict(run="out", fast=False))


def test_fast_bases_are_compared_with_fast_bases(small_lab):
    """The run's base has all of its steps: beside it, a smaller one with a tenth had no chance."""
    assert small_lab.base("1.1M") == str(small_lab.out / "base-1.1M-1200")
    assert small_lab.chain("base") == str(small_lab.run / "base"), "any base is good for a trend"
    small_lab.fast = False
    assert small_lab.base("1.1M") == str(small_lab.run / "base")


# -- the verdict ----------------------------------------------------------------------------------

def metrics(a: float, b: float, questions: int = 100) -> dict:
    return dict(a=dict(right=a, questions=questions), b=dict(right=b, questions=questions))


@pytest.mark.parametrize("by_seed, margin, verdict", [
    ([metrics(0.9, 0.5)], 0, "holds"),
    ([metrics(0.5, 0.9)], 0, "does not hold"),
    ([metrics(0.55, 0.5)], 0, "too close to tell"),
    ([metrics(0.55, 0.5, 10000)], 0, "holds"),  # more questions, less error
    ([metrics(0.9, 0.5)], 40, "too close to tell"),
    ([metrics(0.5, 0.5)], -20, "holds"),  # at most 20 points worse
    ([metrics(0.5, 0.9)], -20, "does not hold"),
    # the spread of the differences counts, not that of the shares
    ([metrics(0.9, 0.8), metrics(0.5, 0.4), metrics(0.2, 0.11)], 0, "holds"),
    ([metrics(0.9, 0.5), metrics(0.5, 0.5), metrics(0.5, 0.45)], 0, "too close to tell"),
    ([metrics(0.9, 0.6), metrics(0.5, 0.4)], 0, "too close to tell")])  # two seeds say little
def test_the_verdict_is_the_difference_against_its_error(by_seed, margin, verdict):
    comparison = claims.Comparison("a", "b", margin)
    assert claims.compare(comparison, "right", by_seed).verdict == verdict


def test_errors_by_hand():
    """Of three differences 10, 20, 30: t = 4.30, and a standard deviation of 10 over sqrt(3). Of
    100 answers, half of them right: 9.6 points (Wilson), and sqrt(2) times that for a difference.
    """
    comparison = claims.Comparison("a", "b")
    by_seed = [metrics(0.6, 0.5), metrics(0.7, 0.5), metrics(0.8, 0.5)]
    outcome = claims.compare(comparison, "right", by_seed)
    assert outcome.difference == pytest.approx(20) and outcome.error == pytest.approx(24.8, 0.01)
    outcome = claims.compare(comparison, "right", [metrics(0.5, 0.5)])
    assert outcome.error == pytest.approx(2 ** 0.5 * 9.6, 0.01)


def test_a_claim_holds_only_if_all_comparisons_do():
    def overall(*verdicts):
        return claims.overall([claims.Outcome(None, 0, 0, verdict) for verdict in verdicts])

    assert overall("holds", "holds") == "holds"
    assert overall("holds", "too close to tell") == "too close to tell"
    assert overall("too close to tell", "does not hold", "holds") == "does not hold"


# -- what the lab changes   ------------------------------------------------------------------------

def test_everything_is_supervised_but_the_padding(small_lab):
    examples = [data.Example([1, 5, 6, 2], [data.IGNORE, data.IGNORE, 6, 2]),
                data.Example([1, 7, 2], [data.IGNORE, data.IGNORE, 2])]
    rows = data.pack(examples, 10, 0, pad=2)
    lab.supervise_everything(rows)
    tokens, labels, segments = rows.batch(0, 1)
    assert (labels == tokens)[segments >= 0].all() and (labels[segments < 0] == data.IGNORE).all()
    assert model.count_targets(labels, segments) == 3 + 2, "nothing predicts the first tokens"


def test_every_change_reaches_the_training(small_lab, monkeypatch):
    seen = {}

    def train(net, rows, cfg, *rest):
        seen.update(net=net, rows=rows, cfg=cfg)

    monkeypatch.setattr(train_sft, "train", train)
    small_lab.train_vicuna(1000)
    batch, cfg = seen["rows"].batch(0, 2), seen["cfg"]
    assert cfg.steps == 2 and cfg.optimizer == "muon" and cfg.batch_size * cfg.seq_len == 2048
    assert (batch[1] == data.IGNORE).float().mean() > 0.5
    small_lab.train_vicuna(500, loss_on="everything", seq_len=256, optimizer="adamw",
                           learning_rate=0.5)
    batch, cfg = seen["rows"].batch(0, 2), seen["cfg"]
    assert (batch[1] == batch[0])[batch[2] >= 0].all() and batch[0].shape == (2, 256)
    assert (cfg.batch_size, cfg.optimizer, cfg.learning_rate) == (8, "adamw", 0.5)
    small_lab.train_vicuna(500, lora_rank=2)
    assert seen["net"].layers[0].attention.wq.lora_a.shape == (2, 64)
    small_lab.train_vicuna(500, from_scratch="0.1M")
    assert seen["net"].config.dim == 32
    bases, rows = [], []
    for changed in (dict(), dict(retrieval_init=False), dict(times_told=1)):
        small_lab.pretrain("base", 600, **changed)
        bases.append(seen["net"].layers[1].attention)
        rows.append(len(seen["rows"]))
    assert torch.equal(bases[0].wk.weight, bases[0].wq.weight), "attends to identical tokens"
    assert not torch.equal(bases[1].wk.weight, bases[1].wq.weight)
    assert rows[0] == rows[1] > rows[2]


def test_head_only_changes_the_head_only(small_lab):
    """And the model that is loaded again is the whole one, though its folder holds the head."""
    base = checkpoint.load(small_lab.chain("base"))[0].state_dict()
    trained = small_lab.train_vicuna(500, head_only=True).state_dict()
    changed = {name for name, w in trained.items() if not torch.equal(w, base[name])}
    assert changed == {"output.weight"}
    loaded = small_lab.train_vicuna(500, head_only=True).state_dict()
    assert all(torch.equal(w, trained[name]) for name, w in loaded.items())


def test_each_seed_takes_its_own_chain(small_lab, tmp_path):
    """With the base of seed 0, three seeds would be three times the same experiment."""
    assert small_lab.chain("base") == str(small_lab.run / "base")
    assert small_lab.in_run("vicuna") and not small_lab.in_run("minigpt4")
    other = lab.Lab(tmp_path / "out", small_lab.run, 1, True, small_lab.machine)
    assert not other.in_run()
    shutil.copytree(small_lab.run / "base", small_lab.run / "seed1" / "base")
    assert other.chain("base") == str(small_lab.run / "seed1" / "base")
    assert other.out != small_lab.out


def test_an_error_is_an_error():
    """A noisy reply that is still right would make noise harmless. Held-out pairs stay out."""
    rng = random.Random(0)
    assert lab.held_out_pairs("a red square and a blue ring") == {("red", "square")}
    for item in world.test_set("scenes", 60):
        q = item.question
        wrong = [lab.corrupt(q.full, rng) for _ in range(5)]
        assert all(lab.held_out_pairs(text) <= lab.held_out_pairs(q.full) for text in wrong)
        if q.kind in ("color", "size", "where", "describe") and "yesno" not in q.truth:
            assert not any(world.grade(q, text) == 1 for text in wrong)
    assert lab.corrupt("3 + 4 = 7.", rng) in ("3 + 4 = 8.", "3 + 4 = 9.", "3 + 4 = 10.")
    assert lab.corrupt("Yes.", rng) == "Yes."


# -- seeing ---------------------------------------------------------------------------------------

@pytest.fixture
def encoder() -> tuple:
    small = dict(dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    return (vision.ViTConfig(image_size=16, patch_size=8, **small),
            vision.QFormerConfig(vision_dim=16, **small))


@pytest.mark.parametrize("architecture, slots, trained", [
    (vision.MiniGPT4, 10, "llama_proj"), (lab.ThreeLayers, 10, "llama_proj"),
    (lab.WithoutQFormer, 5, "llama_proj"), (lab.TunedQFormer, 10, "llama_proj qformer"),
    (lab.RandomEncoder, 10, "llama_proj")])
def test_architectures(architecture, slots, trained, encoder):
    """What they train, how many vectors an image becomes, and that cached features are as good as
    pixels."""
    vit, qformer = vision.ViT(encoder[0]), vision.QFormer(encoder[1])
    llama = checkpoint.load(MICRO)[0]
    net = architecture(llama, vit, qformer)
    pixels = torch.randn(2, 3, 16, 16)
    vectors = net.encode(pixels)
    assert vectors.shape == (2 * slots, 64) and net.n_queries == slots
    assert torch.allclose(vectors, net.encode(net.features(pixels)))
    names = {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert names == set(trained.split())
    if architecture is lab.RandomEncoder:
        assert not torch.equal(net.vit.patch_embed.proj.weight, vit.patch_embed.proj.weight)
    vectors.sum().backward()
    weights = [p for p in net.llama_proj.parameters() if p.dim() == 2]
    assert all(w.grad.any() for w in weights)


def test_stages_with_another_architecture(small_lab, encoder, monkeypatch):
    """The Q-Former is trained in both stages. More of stage 1 begins where stage 1 ended: it began
    from a projection of zeros again."""
    small_lab.fast, small_lab.vision_folder = False, small_lab.out / "sight"
    for stage in ("1", "2"):
        monkeypatch.setitem(train_vlm.RECIPES["toy"], stage,
                            dict(train_vlm.RECIPES["toy"][stage], steps=2, batch_size=2, warmup=0))
    eyes = train_vlm.VisionPretrainer(train_vlm.PretrainerConfig(*encoder, ["nothing"]))
    meta = dict(step=1, template="plain", settings={}, finished=True)
    checkpoint.save(small_lab.vision_folder / "vision", eyes, meta, MICRO / "tokenizer.model")
    for name in ("data/alt", "curated"):
        pictures.write_toy_album(small_lab.vision_folder / name, 4, name,
                                 lambda scene, rng: world.caption(scene))
    nets = []

    def seen(vlm, net):
        nets.append({name: w.clone() for name, w in net.state_dict().items()})
        return dict(fails=1)

    monkeypatch.setattr(small_lab, "examine_vlm", seen)
    assert small_lab.examine_architecture("tuned", lab.TunedQFormer) == dict(fails=1)
    assert not torch.equal(nets[-1]["qformer.query_tokens"], eyes.qformer.query_tokens)
    assert torch.equal(nets[-1]["vit.cls_token"], eyes.vit.cls_token)
    small_lab.examine_architecture("three", lab.ThreeLayers)
    assert nets[-1]["llama_proj.0.weight"].any(), "between layers of zeros nothing is learned"
    small_lab.examine_architecture("linear", vision.MiniGPT4)
    shutil.copytree(small_lab.out / "linear-1", small_lab.vision_folder / "align")
    for stage, steps in (("2", 0), ("2", 500), ("1", 500)):
        small_lab.examine_after_stage(stage, steps)
    aligned, second, first = (net["llama_proj.weight"] for net in nets[-3:])
    assert aligned.any() and not torch.equal(aligned, second) and not torch.equal(aligned, first)
    assert (first - aligned).abs().max() < 0.5 * aligned.abs().max()


def test_evaluation_of_seeing(small_lab, encoder):
    """Each share is of as many pictures as are reported."""
    vlm = small_lab.open_vlm()
    net = vision.MiniGPT4(vlm.llama, vision.ViT(encoder[0]), vision.QFormer(encoder[1]))
    found = small_lab.examine_vlm(vlm, net.eval())
    assert found == dict(described=0, answered=0, fails=1, questions=2)


# -- evaluation of text ---------------------------------------------------------------------------

class Knowing:
    """Instead of evaluate.log_likelihoods: finds one of the choices the likeliest."""

    def __init__(self, choose):
        self.choose = choose

    def __call__(self, net, rows):
        scores = torch.zeros(len(rows))
        scores[self.choose(rows)] = 1.0
        return scores - 2


@pytest.mark.parametrize("other, low, high", [(False, 0.6, 1.0), (True, 0.0, 0.2)])
def test_retrieval_is_of_the_color_of_that_thing(other, low, high, small_lab, monkeypatch):
    """A model that only knows which two colors were told must not pass. (Some ways to tell a scene
    cannot be read here; then the answer is red.)"""
    def choose(rows):
        told, asked = small_lab.tokenizer.decode(rows[0][0]).rsplit(" The ", 1)
        colors = [small_lab.tokenizer.decode(choice).strip() for _, choice in rows]
        for o in world.found("objects", told):
            if (o.shape == asked.split()[0]) != other:
                return colors.index(o.color)
        return 0

    monkeypatch.setattr(lab.evaluate, "log_likelihoods", Knowing(choose))
    small_lab.sizes = dict(SIZES, questions=20)
    found = small_lab.retrieve(None)
    assert low <= found["retrieved"] <= high and found["questions"] == 40


def test_facts_are_ranked_by_group(small_lab, monkeypatch):
    """The two groups were mixed up."""
    def scores(net, item, rows):
        best = torch.zeros(len(item.choices))
        best[item.right if item.group == "unasked" else item.right - 1] = 1
        return best

    monkeypatch.setattr(lab.evaluate, "scores", scores)
    assert small_lab.rank_facts(None) == dict(unasked=1, asked=0, questions=50)


def test_oracles_as_judges(small_lab, monkeypatch):
    """Which answers a judge leans to is known: to the first in one order, to none in both. Two
    oracles play, so that no model has to answer."""
    def config(players, config=lab.judge.JudgeConfig, **options):
        return config(players="noisy,oracle", **options)

    monkeypatch.setattr(lab.judge, "JudgeConfig", config)
    monkeypatch.setattr(small_lab, "chain", lambda name: name)
    found = {}
    for name in ("oracle", "first"):
        for both in (False, True):
            found[name, both] = small_lab.judge_by_oracle(name, both)
    assert found["oracle", False]["leans"] == found["first", True]["leans"] == 0
    assert found["first", False]["leans"] == 1
    assert found["oracle", True]["agrees"] == 1 > found["first", False]["agrees"]


@pytest.mark.parametrize("costs, agrees", [((0.5, 0.6), 1), ((0.6, 0.5), 0)])
def test_a_small_model_judges_by_likelihood_per_token(costs, agrees, small_lab, monkeypatch):
    """By the likelihood of the whole answer, the shorter one would nearly always win."""
    def log_likelihoods(net, rows):
        return torch.tensor([-cost * len(answer) for cost, (_, answer) in zip(costs, rows)])

    monkeypatch.setattr(lab.evaluate, "log_likelihoods", log_likelihoods)
    monkeypatch.setattr(lab, "corrupt", lambda text, rng: "No.")
    small_lab.sizes = dict(SIZES, questions=5)
    judged = small_lab.judge_by_likelihood(None, "scenes", ("color", "size", "where"))
    assert judged == dict(agrees=agrees, questions=5)
