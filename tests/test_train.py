"""Tests of train_sft.py: exact resume, an honest loss, clear errors, the whole chain in small."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import model
import train_sft
from conftest import ROOT
from tools import checkpoint, config, machine
from tools.run import read_metrics
from toy import exam, world

SMALL = dict(seq_len=320, batch_size=2, device="cpu", dtype="float32")
TINY = dict(dim=48, n_layers=1, n_heads=2, hidden_dim=96, rope_theta=500.0, max_seq_len=1024)
MACHINE = machine.Machine("cpu", torch.float32, 1e11)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The preset "toy" in small, on a machine whose speed need not be measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "toy", TINY)
        patch.setattr(machine, "measure_peak", lambda *_: 1e11)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small toy files in the public formats, and a plain text."""
    folder = tmp_path_factory.mktemp("files")
    sizes = dict(documents=120, instructions=60, conversations=30)
    paths = world.write_files(folder, sizes, seed=0)
    rng = random.Random(0)
    text = "\n".join(world.document(rng) for _ in range(120))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return dict(paths, text=folder / "text.txt")


@pytest.fixture(scope="module")
def base(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    train(stage="pretrain", data=files["text"], out=out, steps=2, vocab_size=400)
    return out / "text"


def train(**options):
    options = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
    return train_sft.main(train_sft.SFTConfig(**{**SMALL, **options}))


def sft(files, base, out, **changes):
    """Twelve steps of fine-tuning into out/sharegpt. Without a system text ("plain"), most replies
    begin early enough to be learned."""
    given = dict(stage="sft", data=files["vicuna"], init=base, out=out, steps=12, template="plain")
    return train(**{**given, **changes})


def losses(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def meta(folder):
    return checkpoint.read_meta(checkpoint.find(folder))


# -- resuming -------------------------------------------------------------------------------------

@pytest.mark.parametrize("number, optimizer", [(signal.SIGINT, "adamw"), (signal.SIGTERM, "muon")])
def test_an_interrupted_run_resumes_bit_for_bit(files, base, tmp_path, monkeypatch, number,
                                                optimizer):
    """Ctrl-C, then the same command again, must give exactly the losses and weights of a run that
    nobody interrupted. Afterwards the signals do what they did before."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    sft(files, base, tmp_path / "straight", optimizer=optimizer)

    def batch(self, step, size, original=data.Rows.batch):
        if step == 5:
            os.kill(os.getpid(), number)
        return original(self, step, size)

    with monkeypatch.context() as patch:
        patch.setattr(data.Rows, "batch", batch)
        with pytest.raises(config.Stopped, match="stopped after step 6 of 12"):
            sft(files, base, tmp_path / "broken", optimizer=optimizer)
    stopped = meta(tmp_path / "broken/sharegpt")
    assert stopped["step"] == 6 and not stopped["finished"], "the step in progress must be saved"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    sft(files, base, tmp_path / "broken", optimizer=optimizer)
    straight, broken = tmp_path / "straight/sharegpt", tmp_path / "broken/sharegpt"
    assert losses(broken) == losses(straight)
    one, two = (checkpoint.load(folder)[0].state_dict() for folder in (straight, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_second_run_neither_trains_again_nor_overwrites(files, base, tmp_path, capsys):
    """Whatever differs from the first run is named."""
    def written():
        return (checkpoint.find(tmp_path / "sharegpt") / "model.pt").stat().st_mtime_ns

    sft(files, base, tmp_path, steps=2)
    before = written()
    sft(files, base, tmp_path, steps=2)
    assert "already trained" in capsys.readouterr().out
    other = tmp_path / "sharegpt.json"
    other.write_text(files["vicuna"].read_text(encoding="utf-8") + "\n", encoding="utf-8")
    for changes in (dict(steps=3), dict(template="koala"), dict(data=other),
                    dict(lora_rank=2, learning_rate=1e-3)):
        name = next(iter(changes))
        with pytest.raises(config.UserError, match=f"{name} was .*--resume=never"):
            sft(files, base, tmp_path, **{"steps": 2, **changes})
    assert written() == before
    sft(files, base, tmp_path, steps=3, resume="never")
    assert meta(tmp_path / "sharegpt")["step"] == 3


def test_init_is_what_it_holds_not_how_its_path_is_written(files, base, tmp_path, capsys,
                                                           monkeypatch):
    """A relative path, a link or a copy of the same weights is no reason to refuse to resume; other
    weights in the same place are."""
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "link"
    shutil.copytree(base, elsewhere)
    link.symlink_to(elsewhere)
    sft(files, base, tmp_path, steps=2)
    monkeypatch.chdir(tmp_path)
    for init in ("elsewhere", f"./elsewhere/../{elsewhere.name}", link, checkpoint.find(link)):
        sft(files, init, tmp_path, steps=2)
        assert "already trained" in capsys.readouterr().out
    net, tokenizer, saved = checkpoint.load(elsewhere)
    checkpoint.save(elsewhere, model.LLaMA(net.config), saved, tokenizer)
    with pytest.raises(config.UserError, match="parent_crc was"):
        sft(files, elsewhere, tmp_path, steps=2)
    for init in (tmp_path / "sharegpt", checkpoint.find("sharegpt"), "link/../sharegpt"):
        with pytest.raises(config.UserError, match="is the model to start from"):
            sft(files, init, tmp_path, steps=2, resume="never")


def test_training_again_deletes_only_what_is_ours(files, base, tmp_path):
    """--resume=never deleted the user's copies of good steps."""
    sft(files, base, tmp_path, steps=2)
    run = tmp_path / "sharegpt"
    shutil.copytree(run / "step-000002", run / "step-000002 (copy)")
    (run / "step-000007").symlink_to(base)
    (run / "step-notes.txt").write_text("the good one is 2")
    sft(files, base, tmp_path, steps=3, resume="never")
    kept = {path.name for path in run.glob("step-*")}
    assert kept == {"step-000001", "step-000002 (copy)", "step-000003", "step-000007",
                    "step-notes.txt"}
    assert (run / "step-000002 (copy)" / "model.pt").exists() and (base / "latest").exists()


def test_the_plot_of_the_losses_skips_damaged_lines(tmp_path):
    pytest.importorskip("matplotlib")
    for name, content in (("base", b'{"step": 0, "loss": 2.5}\n\0\xff\n{"st'), ("killed", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_bytes(content)
    exam.plot_losses(tmp_path)
    assert (tmp_path / "loss.png").exists()


# -- a busy machine -------------------------------------------------------------------------------

def test_a_busy_machine_gets_one_line_of_advice(monkeypatch, capsys):
    """Threads that wait for each other made stage 0 of the toy 24 times slower. It is advice only,
    since the digits depend on the number of threads: --threads chooses, and is not argued with."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for threads, free, advice in ((4, 2.7, "--threads=2 would be faster"), (4, 3.9, ""),
                                  (2, 0.6, "--threads=1 would be faster"), (1, 0.5, "")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(machine, "free_cores", lambda free=free: free)
        machine.use_threads(0, "cpu")
        said = capsys.readouterr().err
        assert advice in said and said.count("\n") == bool(advice)
    assert chosen == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(machine, "free_cores", lambda: 0.5)
    machine.use_threads(1, "cpu")
    assert chosen == [1] and not capsys.readouterr().err
    with pytest.raises(config.UserError, match="--threads=100000: this machine has"):
        machine.use_threads(100_000, "cpu")


def test_free_cores_are_measured():
    """Two threads that may use one core get one core. (The load average would also count what ended
    a minute ago.)"""
    code = ("import os, torch; from tools import machine; torch.set_num_threads(2); "
            "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); "
            "print(machine.free_cores())")
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("Linux only")
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 0 < float(printed.stdout) < 1.1


# -- the loss and the optimizer -------------------------------------------------------------------

def test_a_loss_that_is_not_finite_stops_before_the_update(files, base, tmp_path, monkeypatch):
    """NaN must not reach the weights: what is saved is the state before the bad step."""
    before = []

    def nll(self, *args, original=model.LLaMA.nll, **options):
        before.append({name: p.detach().clone() for name, p in self.named_parameters()})
        total, count = original(self, *args, **options)
        return (total * float("nan") if len(before) == 4 else total), count

    monkeypatch.setattr(model.LLaMA, "nll", nll)
    with pytest.raises(config.UserError, match="loss nan.*step 3.*smaller --learning_rate"):
        sft(files, base, tmp_path)
    saved, _, saved_meta = checkpoint.load(tmp_path / "sharegpt")
    assert saved_meta["step"] == 3
    assert all(torch.equal(p, before[3][name]) for name, p in saved.named_parameters())


def small_network():
    shape = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=50, max_seq_len=32)
    return model.LLaMA(model.LLaMAConfig(**shape))


def gradient(net, parts):
    net.zero_grad()
    loss = train_sft.loss_backward(net, parts, MACHINE)
    return loss, torch.cat([p.grad.flatten() for p in net.parameters()])


def test_micro_batches_do_not_change_the_gradient():
    """The loss is the sum over tokens / their global count. A mean of means would give a token in
    a short reply more weight, and NaN where a micro-batch has no supervised token."""
    net = small_network()
    tokens = torch.randint(3, 50, (4, 16))
    labels = tokens.clone()
    labels[0, 2:] = data.IGNORE  # uneven rows, and one without any target
    labels[1] = data.IGNORE
    labels[2, :-3] = data.IGNORE

    whole_loss, whole = gradient(net, [(tokens, labels, None)])
    parts = [(tokens[i:i + 1], labels[i:i + 1], None) for i in range(4)]
    split_loss, split = gradient(net, parts)
    assert abs(whole_loss - split_loss) < 1e-6
    assert (whole - split).norm() < 1e-5 * whole.norm()
    assert torch.isfinite(gradient(net, parts[1:2])[1]).all()


def test_packed_conversations_are_trained_on_as_if_they_were_alone():
    """The loop has to hand the segments on: without them the second conversation of a row would
    see the first, and be asked for a first token that nothing predicts."""
    net = small_network()
    one, two = torch.randint(3, 50, (1, 9)), torch.randint(3, 50, (1, 7))
    packed = torch.cat((one, two), dim=1)
    segments = torch.tensor([[0] * 9 + [1] * 7])
    packed_loss, together = gradient(net, [(packed, packed, segments)])
    alone_loss, alone = gradient(net, [(one, one, None), (two, two, None)])
    assert packed_loss == pytest.approx(alone_loss, rel=1e-5)
    assert (together - alone).norm() < 1e-5 * alone.norm()


def test_learning_rate_warms_up_and_ends_at_a_tenth():
    cfg = train_sft.SFTConfig(steps=100, warmup=0.1, learning_rate=1.0, min_lr=0.1)
    rates = [train_sft.learning_rate(step, cfg) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("parameters, lora_rank, rate", [(1e6, 2, 1e-2), (2e9, 0, 2e-5)])
def test_large_models_learn_slowly(base, monkeypatch, parameters, lora_rank, rate):
    """The size of the model counts, not --preset: with --init=llama-7b alone, a large model was
    fine-tuned at a small one's rate."""
    monkeypatch.setattr(model, "count_parameters", lambda sizes: parameters)
    cfg = train_sft.resolve(train_sft.SFTConfig(lora_rank=lora_rank), str(base), None)
    assert cfg.learning_rate == pytest.approx(rate)


def test_muon_moves_a_matrix_equally_in_all_directions():
    """Whatever the singular values of the gradient are, those of the step are near 1."""
    singular = torch.linalg.svdvals(train_sft.orthogonalize(torch.randn(3, 40, 16)))
    assert singular[:, :12].sub(1).abs().max() < 0.4


def test_weight_decay_is_for_matrices_only():
    """The gains of the norms belong near 1, and decay pulls to 0."""
    net = small_network()
    groups = train_sft.make_optimizer(net, train_sft.SFTConfig(weight_decay=0.5)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in net.named_parameters():
        assert decay[id(p)] == (0.5 if p.dim() > 1 else 0.0), name


def test_muon_equals_the_textbook_matrix_by_matrix():
    """Muon stacks matrices of one shape to share the iteration; over three steps each of them must
    move as muon_textbook moves it alone. AdamW has the rest."""
    net = model.LLaMA(model.LLaMAConfig(**{**TINY, "n_layers": 2}, vocab_size=67))
    cfg = train_sft.SFTConfig(steps=1, learning_rate=0.02, optimizer="muon", weight_decay=0.1)
    optimizer = train_sft.make_optimizer(net, cfg)
    matrices = {n: p for n, p in net.named_parameters() if "layers" in n and p.dim() == 2}
    alone = {name: p.detach().clone() for name, p in matrices.items()}
    momenta = {name: torch.zeros_like(p) for name, p in alone.items()}
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        for name, p in alone.items():
            p.grad = matrices[name].grad.clone()
            train_sft.muon_textbook(p, momenta[name], lr=0.02, weight_decay=0.1)
        optimizer.step()
    for name, p in net.named_parameters():
        assert ("momentum" in optimizer.state[p]) == (name in matrices), name
    for name, p in matrices.items():
        assert torch.allclose(p, alone[name], atol=1e-6), name


def test_a_callback_does_not_change_the_run(files, base, tmp_path, capsys):
    """The toy chain asks the growing model questions every hundred steps, and logs the share of
    right answers. The losses must be those of a run that nobody watches."""
    changes = dict(steps=103, template="plain", seq_len=128, batch_size=1)
    watcher = exam.watcher(data.find_tokenizer(base), "plain")
    for name, watch in (("alone", None), ("watched", watcher)):
        cfg = train_sft.SFTConfig(**{**SMALL, **changes}, out=str(tmp_path / name))
        train_sft.fine_tune(cfg, "run", MACHINE, files["vicuna"], str(base), callback=watch)
    assert capsys.readouterr().out.count("step 100, ") == 1
    noted = {line["step"] for line in read_metrics(tmp_path / "watched/run/metrics.jsonl")
             if "accuracy" in line}
    assert noted == {99}
    assert losses(tmp_path / "alone/run") == losses(tmp_path / "watched/run")


# -- what a run leaves behind ---------------------------------------------------------------------

def test_the_window_is_the_longest_row_so_far(files, base, tmp_path):
    """A model that was trained on 320 tokens and fine-tuned on 128 can still use 320; one that was
    then fine-tuned on 512, 512. sample.py lets the context end there."""
    assert meta(base)["window"] == 320
    sft(files, base, tmp_path / "short", seq_len=128, steps=1)
    assert meta(tmp_path / "short/sharegpt")["window"] == 320
    sft(files, tmp_path / "short/sharegpt", tmp_path / "long", seq_len=512, steps=1)
    assert meta(tmp_path / "long/sharegpt")["window"] == 512


@pytest.mark.parametrize("kind, template", [
    ("text", "plain"), ("base", "plain"), ("alpaca", "alpaca"), ("vicuna", "vicuna_v1.1")])
def test_your_own_file_alone_is_enough(files, tmp_path, kind, template):
    """--data=FILE: tokenizer and base are chosen. "base" is a file of documents, one a line."""
    result = train(data=files[kind], out=tmp_path, steps=2, seq_len=512, vocab_size=400)
    saved = meta(result["folder"])
    assert saved["finished"] and saved["template"] == template


def test_a_tenth_is_held_out():
    """Of documents, or of a text: it was a fifth where the last line break stands early."""
    for text in ("abc\n" * 100, "a" * 81 + "\n" + "b" * 919, "a" * 810 + "\n" + "b" * 189):
        kept, held = train_sft.hold_out_a_tenth([text])
        assert kept[0] + held[0] == text and 0.1 <= len(held[0]) / len(text) <= 0.11
    kept, held = train_sft.hold_out_a_tenth(list("abcdefghij"))
    assert (kept, held) == (list("abcdefghi"), ["j"])


def test_a_base_for_conversations_about_json(tmp_path):
    """A base is pre-trained on their text, whatever it looks like: it was refused as broken JSON.
    An input is text, too."""
    record = dict(instruction='{"a": 1} is what?', input="Say it in \0 words. " * 9, output="JSON.")
    file = tmp_path / "j.json"
    file.write_text(json.dumps([record] * 40))
    result = train(data=file, out=tmp_path, steps=2, seq_len=512, batch_size=2, vocab_size=400)
    assert meta(result["folder"])["finished"]
    (text,) = data.load_documents(tmp_path / "data" / "j-base.json")
    assert text.startswith('{"a": 1} is what?\nSay it in \0 words.')


def test_a_plan_estimates_the_rest(capsys, monkeypatch):
    """The first guess is corrected by each stage that is done; one that was done before (it takes
    no time) must not make the rest look free."""
    plan = train_sft.Plan(dict(base=10, alpaca=20, vicuna=30), seconds=6.0)
    # Of base, nothing was left to do. Alpaca's 20 steps take 60 seconds, half as long as guessed.
    clock = iter([1000.0, 1000.0, 1000.0, 1060.0, 1060.0])
    monkeypatch.setattr(train_sft.time, "time", lambda: next(clock))
    for stage in ("base", "alpaca", "vicuna"):
        plan.begin(stage, "training")
    assert re.findall(r"about (\S+) minutes", capsys.readouterr().out) == ["6.0", "5.0", "1.5"]


# -- errors ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    (dict(batch_size=5000), "less than one batch"), (dict(seq_len=5000), "more than the")], ids=str)
def test_too_much_for_the_data_or_the_model(files, base, tmp_path, changes, words):
    with pytest.raises(config.UserError, match=words):
        sft(files, base, tmp_path, **changes)


def test_a_preset_is_the_first_word():
    for name in train_sft.PRESETS:
        cfg = config.from_cli(train_sft.SFTConfig, [name, "--data=x.json"], train_sft.PRESETS)
        assert cfg == train_sft.SFTConfig(**train_sft.PRESETS[name], data="x.json")


# -- the toy chain --------------------------------------------------------------------------------

FAST = dict(documents=150, instructions=120, conversations=40, base=3, alpaca=2, vicuna=2, equal=3,
            questions=4)


def test_the_whole_chain_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "FAST", FAST)
    figures = train(fast=True, full=True, out=tmp_path, seq_len=192, vocab_size=1000)
    assert set(figures["table"]) == set(exam.ALL_ROWS)
    players = {"base", "Alpaca", "Vicuna", "no scene", "neighbor", "majority", "few-shot",
               "random init", "Alpaca ="}
    assert all(set(row) == players for row in figures["table"].values())
    parents = []
    for name in ("base", "alpaca", "vicuna", "random-init", "alpaca-equal"):
        saved = meta(tmp_path / name)
        assert saved["finished"] and saved["settings"]["optimizer"] == "muon"
        parents.append(saved["parent"] and Path(saved["parent"]).parent.name)
    assert parents == ["", "base", "base", "", "base"]
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert table["table"] == figures["table"]


def test_the_commands_that_are_printed_at_the_end_suit_the_run(capsys):
    """Without its --seed, --full would train all models again."""
    exam.print_next_steps(train_sft.SFTConfig(out="my/runs", seed=3), 1.0)
    printed = capsys.readouterr().out
    assert "train_sft.py --out=my/runs --seed=3 --full" in printed
    assert "--ckpt=my/runs/vicuna" in printed
