"""The loop of train_sft.py: exact resume, honest loss, clear words for what goes wrong; and the whole chain in small."""

import json
import os
import random
import re
import signal
from pathlib import Path

import pytest
import torch

import config
import data
import model
import toy
import train_sft

SMALL = dict(vocab_size=400, seq_len=320, batch_size=2, device="cpu", dtype="float32")
MACHINE = train_sft.Machine("cpu", torch.float32, "test", 1e11)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small toy files in the public formats, and a plain text."""
    folder = tmp_path_factory.mktemp("files")
    paths = train_sft.write_toy_data(folder, dict(documents=120, instructions=60, conversations=30), seed=0)
    rng = random.Random(0)
    (folder / "text.txt").write_text("\n".join(toy.document(rng) for _ in range(120)))
    return dict(paths, text=folder / "text.txt")


@pytest.fixture(scope="module")
def base(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    train_sft.main(train_sft.SFTConfig(stage="pretrain", data=str(files["text"]), out=str(out), steps=2, **SMALL))
    return out / "text"


def sft(files, base, out, **changes):
    # "plain": with a system text in front no reply would begin within 96 tokens, and nothing would be learned
    cfg = dict(stage="sft", data=str(files["vicuna"]), init=str(base), out=str(out), steps=12, template="plain", **SMALL)
    return train_sft.main(train_sft.SFTConfig(**{**cfg, **changes}))


def losses(folder):
    return [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Sends the signal while batch `step` is being made."""
    def batch(self, at, size, original=data.Rows.batch):
        if at == step:
            os.kill(os.getpid(), number)
        return original(self, at, size)
    monkeypatch.setattr(data.Rows, "batch", batch)


@pytest.mark.parametrize("number, optimizer", [(signal.SIGINT, "adamw"), (signal.SIGTERM, "muon")])
def test_an_interrupted_run_goes_on_bit_for_bit(files, base, tmp_path, monkeypatch, number, optimizer):
    """Ctrl-C, then the same command again, must give exactly the losses and weights of a run nobody interrupted."""
    sft(files, base, tmp_path / "straight", optimizer=optimizer)
    with monkeypatch.context() as m:
        interrupt_at(m, 5, number)
        with pytest.raises(KeyboardInterrupt):
            sft(files, base, tmp_path / "broken", optimizer=optimizer)
    _, _, meta = model.load(tmp_path / "broken" / "sharegpt")
    assert meta["step"] == 6 and not meta["finished"], "the step in progress is finished and saved"
    sft(files, base, tmp_path / "broken", optimizer=optimizer)
    assert losses(tmp_path / "broken/sharegpt") == losses(tmp_path / "straight/sharegpt")
    one, two = (model.load(tmp_path / name / "sharegpt")[0].state_dict() for name in ("straight", "broken"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_muon_moves_a_matrix_equally_in_all_directions(base):
    """Whatever the gradient's singular values are, the step's lie around lr * sqrt(size); AdamW has the rest."""
    assert torch.linalg.svdvals(train_sft.orthogonal(torch.randn(3, 40, 16)))[:, :12].sub(1).abs().max() < 0.4
    net, _, _ = model.load(base)
    cfg = train_sft.SFTConfig(steps=1, learning_rate=1e-3, optimizer="muon", weight_decay=0.0)
    optimizer, before = train_sft.make_optimizer(net, cfg), {n: p.clone() for n, p in net.state_dict().items()}
    skew = torch.logspace(0, -2, 128)[:, None]  # the first row pulls a hundred times as strongly as the last
    for p in net.parameters():
        p.grad = torch.randn_like(p) * (skew if p.shape == (128, 128) else 1)
    optimizer.step()
    step = {n: p - before[n] for n, p in net.state_dict().items()}
    rows = step["layers.0.attention.wq.weight"].norm(dim=1)
    assert rows.max() < 3 * rows.min() and 0.3e-3 < rows.pow(2).mean().div(128).sqrt() < 0.7e-3
    for name in ("tok_embeddings.weight", "output.weight", "norm.weight"):  # AdamW's first step is lr everywhere
        assert torch.allclose(step[name].abs(), torch.tensor(1e-3), rtol=1e-2), name


def test_a_second_run_neither_retrains_nor_overwrites(files, base, tmp_path, capsys):
    sft(files, base, tmp_path, steps=2)
    before = (model.find(tmp_path / "sharegpt") / "model.pt").stat().st_mtime_ns
    sft(files, base, tmp_path, steps=2)
    assert "trained already" in capsys.readouterr().out
    with pytest.raises(config.Problem, match="another steps.*2, now 3.*--resume=never"):
        sft(files, base, tmp_path, steps=3)
    assert (model.find(tmp_path / "sharegpt") / "model.pt").stat().st_mtime_ns == before
    sft(files, base, tmp_path, steps=3, resume="never")
    assert model.load(tmp_path / "sharegpt")[2]["step"] == 3


def test_a_loss_that_is_not_finite_stops_before_the_update(files, base, tmp_path, monkeypatch):
    """NaN must not reach the weights: what is saved is the state before the bad step."""
    calls = []

    def nll(self, *a, original=model.LLaMA.nll, **k):
        calls.append({n: p.detach().clone() for n, p in self.named_parameters()})
        total, count = original(self, *a, **k)
        return (total * float("nan") if len(calls) == 4 else total), count
    monkeypatch.setattr(model.LLaMA, "nll", nll)
    with pytest.raises(config.Problem, match="loss nan.*step 3.*smaller --learning_rate"):
        sft(files, base, tmp_path)
    saved, _, meta = model.load(tmp_path / "sharegpt")
    assert meta["step"] == 3
    assert all(torch.equal(p, calls[3][n]) for n, p in saved.named_parameters())


def test_micro_batches_do_not_change_the_gradient():
    """Sum over tokens / global count. A mean of means would give a token in a short reply more say, and NaN where
    a micro-batch has nothing to learn."""
    torch.manual_seed(0)
    net = model.LLaMA(model.LLaMAConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=50, max_seq_len=32))
    tokens = torch.randint(3, 50, (4, 16))
    labels = tokens.clone()
    labels[0, 2:], labels[1], labels[2, :-3] = data.IGNORE, data.IGNORE, data.IGNORE  # uneven, and one row with none

    def gradient(parts):
        net.zero_grad()
        loss = train_sft.loss_backward(net, parts, MACHINE)
        return loss, torch.cat([p.grad.flatten() for p in net.parameters()])
    whole = gradient([(tokens, labels, None)])
    split = gradient([(tokens[i:i + 1], labels[i:i + 1], None) for i in range(4)])
    assert abs(whole[0] - split[0]) < 1e-6
    assert (whole[1] - split[1]).norm() < 1e-5 * whole[1].norm()
    assert torch.isfinite(gradient([(tokens[1:2], labels[1:2], None)])[1]).all()


def test_learning_rate_warms_up_and_ends_at_a_tenth():
    cfg = train_sft.SFTConfig(steps=100, warmup=0.1, learning_rate=1.0, min_lr=0.1)
    rates = [train_sft.learning_rate(s, cfg) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=0.01) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("parameters, lora_rank, rate", [(1e6, 0, 1e-3), (1e6, 2, 1e-2), (2e9, 0, 2e-5), (2e9, 2, 2e-4)])
def test_large_models_learn_slowly(files, base, tmp_path, monkeypatch, parameters, lora_rank, rate):
    """Whatever --preset says: --init=llama-7b alone must not be fine-tuned at a small model's rate."""
    monkeypatch.setattr(model, "count", lambda config: parameters)
    sft(files, base, tmp_path, steps=1, lora_rank=lora_rank)
    assert model.load(tmp_path / "sharegpt")[2]["settings"]["learning_rate"] == pytest.approx(rate)


def test_toy_data_are_those_of_these_sizes_and_this_seed(tmp_path):
    sizes = dict(documents=3, instructions=3, conversations=3)
    paths = train_sft.write_toy_data(tmp_path, sizes, seed=0)
    first = {name: path.read_bytes() for name, path in paths.items()}
    before = paths["base"].stat().st_mtime_ns
    train_sft.write_toy_data(tmp_path, sizes, seed=0)
    assert paths["base"].stat().st_mtime_ns == before
    train_sft.write_toy_data(tmp_path, sizes, seed=1)
    assert all(path.read_bytes() != first[name] for name, path in paths.items())
    train_sft.write_toy_data(tmp_path, dict(sizes, documents=4), seed=0)
    assert len(paths["base"].read_text().splitlines()) == 4


@pytest.mark.parametrize("changes, words", [
    (dict(data="missing.json"), "no such file"),
    (dict(stage="pretrain"), "needs plain text"),
    (dict(batch_size=5000), "less than one batch"),
    (dict(init="nowhere"), "no checkpoint in nowhere"),
    (dict(seq_len=5000), "more than the"),
    (dict(template="vicunia"), "unknown template"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_one_line_says_what_is_wrong(files, base, tmp_path, changes, words):
    with pytest.raises(config.Problem, match=words) as caught:
        sft(files, base, tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [dict(seq_len=0), dict(steps=-1), dict(warmup=1.5), dict(vocab_size=10),
                                     dict(batch_size=8, micro_batch=3)], ids=str)
def test_impossible_values(changes):
    with pytest.raises(config.Problem):
        train_sft.SFTConfig(**changes)


@pytest.mark.parametrize("stage", ["all", "pretrain"])
def test_json_lines_of_documents_are_plain_text(files, tmp_path, stage):
    train_sft.main(train_sft.SFTConfig(stage=stage, data=str(files["base"]), out=str(tmp_path), steps=1, **SMALL))
    assert model.load(tmp_path / "pretrain")[2]["step"] == 1


def test_an_unwritable_folder_is_one_line_and_not_a_traceback(files, base, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        sft(files, base, tmp_path / "file")


@pytest.mark.parametrize("kind", ["text", "alpaca", "vicuna"])
def test_your_own_file_alone_is_enough(files, tmp_path, capsys, kind):
    """--data=FILE: tokenizer and base are chosen, and the choice is printed."""
    result = train_sft.main(train_sft.SFTConfig(data=str(files[kind]), out=str(tmp_path), steps=2, **{**SMALL, "seq_len": 512}))
    net, tokenizer, meta = model.load(result["folder"])
    assert meta["finished"] and meta["template"] == {"text": "plain", "alpaca": "alpaca", "vicuna": "vicuna_v1.1"}[kind]
    assert "tokenizer" in capsys.readouterr().out


def test_the_whole_chain_in_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_sft, "FAST", dict(documents=150, instructions=120, conversations=40, base=3, alpaca=2,
                                                vicuna=2, equal=3, questions=6))
    figures = train_sft.main(train_sft.SFTConfig(fast=True, full=True, out=str(tmp_path), **{**SMALL, "seq_len": 192, "vocab_size": 1000}))
    assert set(figures["table"]) == {*train_sft.ROWS, *train_sft.MORE_ROWS}
    players = {"base", "few-shot", "Alpaca", "Alpaca =", "Vicuna", "no LLaMA", "no scene", "copier", "frequent"}
    assert all(set(row) == players for row in figures["table"].values())
    printed = capsys.readouterr().out
    assert "python sample.py" in printed and "dialogue 3" in printed
    for name in ("base", "alpaca", "vicuna", "control"):
        assert model.load(tmp_path / name)[2]["finished"]


def test_what_runs_on_is_no_answer():
    def player(items):
        return [i.question.full for i in items], [number % 2 == 0 for number, _ in enumerate(items)]
    table, _ = train_sft.examine({"babbler": player}, {"scenes": "a row"}, 10)
    assert table == {"scenes": {"babbler": 0.5}}


# -- the toy world ----------------------------------------------------------------------------------------------------

SPLITS = ("scenes", "pairs", "later", "facts", "closed", "phrasings", "names", "more", "minimal")


@pytest.fixture(scope="module")
def training_text():
    rng = random.Random(0)
    return ([toy.document(rng) for _ in range(4000)] + [json.dumps(toy.instruction(rng)) for _ in range(3000)]
            + [json.dumps(toy.conversation(rng)) for _ in range(1500)])


@pytest.mark.parametrize("split", SPLITS)
def test_the_oracle_accepts_the_truth_and_nothing_else(split):
    items = toy.test_set(split, 150)
    assert all(toy.grade(i.question, i.question.full) == 1 for i in items)
    assert all(toy.grade(i.question, "Perhaps so.") < 1 for i in items)
    others = items[1:] + items[:1]
    wrong = [toy.grade(a.question, b.question.full) for a, b in zip(items, others) if a.question.truth != b.question.truth]
    assert sum(g == 1 for g in wrong) < 0.1 * len(wrong), "another question's answer is hardly ever right"


def test_what_is_held_out_was_never_in_training(training_text):
    everything = "\n".join(training_text).lower()
    for color, shape in toy.HELD_PAIRS:
        assert f"{color} {shape}" not in everything
    words = set(re.findall(r"\w+", everything))
    assert not words & {name.lower() for name in toy.NEW_USERS + list(toy.NEW_NONSENSE)}
    questions = "\n".join(training_text[4000:]).lower()
    kept = {name.lower() for name in toy.UNASKED}
    assert not set(re.findall(r"\w+", questions)) & kept, "a question about someone kept for the test"
    assert kept <= words, "but the plain text tells about all of them"
    unseen = [form for forms in toy.ASK.values() for form in forms[-2:]]
    starts = {form.split("{")[0].lower() for form in unseen if len(form.split("{")[0]) > 14}
    assert starts and not any(s in questions for s in starts)


def test_training_scenes_and_test_scenes_do_not_meet():
    rng = random.Random(1)
    seen = {toy.pick_scene(rng) for _ in range(5000)}
    for split in ("scenes", "pairs", "more"):
        assert not seen & {toy.pick_scene(rng, split) for _ in range(500)}
        assert all(toy.where_belongs(toy.pick_scene(rng, split)) == split for _ in range(50))


def test_the_same_seed_makes_the_same_world():
    one, two = ([make(random.Random(3)) for make in (toy.document, toy.instruction, toy.conversation)] for _ in "ab")
    assert one == two
    assert [i.turns for i in toy.test_set("pairs", 20)] == [i.turns for i in toy.test_set("pairs", 20)]


def test_a_minimal_pair_differs_in_one_word_and_in_its_answer():
    items = toy.test_set("minimal", 40)
    for a, b in zip(items[::2], items[1::2]):
        changed = [(x, y) for x, y in zip(a.turns[0][1].split(), b.turns[0][1].split()) if x != y]
        assert 1 <= len(changed) <= 2 and a.question.truth != b.question.truth  # "a red" -> "an orange": two


def test_every_kind_has_twenty_ways_to_be_asked():
    for kind, forms in toy.ASK.items():
        assert len(set(forms)) == len(forms) >= 10
        rng = random.Random(0)
        words = dict(ref="ring", color="red", Color="Red", shape="ring", at="at center", At="At center", new="blue",
                     name="Mira", a="an ant", A="An ant", b="a cat", part="legs", n=3, things="cats", word="tea")
        assert len({toy.phrase(kind, rng, **words) for _ in range(400)}) >= 20, kind
