"""Many processes, long runs and bad days: FSDP equals one process, nothing is lost, one line says
what happened.

    KILLS=10 pytest tests/test_scale.py -k killed_and      # the long version, by hand
"""

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict

import data
import model
import train_sft
from conftest import ROOT
from ranks import KILLED, Ranks
from tools import checkpoint, config, machine
from toy.world import conversation

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
MICRO = ROOT / "tests" / "micro"
KILLS = int(os.environ.get("KILLS", 2))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "measure_peak", lambda *_: 1e11)


# -- FSDP equals one process ----------------------------------------------------------------------

FULL_STATE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
SHAPE = dict(dim=36, n_layers=2, n_heads=2, hidden_dim=50, vocab_size=67, max_seq_len=32)  # uneven


def uneven_batches():
    """Three steps of four rows, which have few or many supervised tokens; in the second batch, the
    last two have none."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 67, (3, 4, 24))
    labels = tokens.clone()
    for r in range(4):
        labels[:, r, :4 + 5 * r] = data.IGNORE
    labels[1, 2:] = data.IGNORE
    return tokens, labels


def three_steps(dtype="float32", tied=False, checkpointing=False, lora=0, micro=None):
    """Trains three steps, alone or with others. Returns losses, gradient norms, the gradients of
    the first step, the weights, and the bytes of this rank's parameters and optimizer state."""
    here = machine.choose_machine("cpu", dtype, 2)
    torch.manual_seed(0)
    net = model.LLaMA(model.LLaMAConfig(**SHAPE, tied=tied))
    net.checkpointing = checkpointing
    if lora:
        model.add_lora(net, lora)
    if here.sharded:
        train_sft.shard(net.train(), here)
    optimizer = train_sft.make_optimizer(net, train_sft.SFTConfig(learning_rate=1e-5))
    share = 4 // here.world
    mine = slice(here.rank * share, (here.rank + 1) * share)
    norms, losses, gradients = [], [], {}
    for tokens, labels in zip(*uneven_batches()):
        parts = train_sft.micro_batches((tokens[mine], labels[mine], None), micro or share, "cpu")
        loss = train_sft.loss_backward(net, parts, here)
        losses.append(here.total(loss)[0])
        norms.append(train_sft.clip_gradients(net, clip=1e9))
        for name, p in net.named_parameters():
            if p.requires_grad and len(losses) == 1:
                gradients[name] = whole(p.grad).numpy().copy()
        optimizer.step()
        optimizer.zero_grad()
    weights = state_dict.get_model_state_dict(net, options=FULL_STATE)
    weights = {name: w.detach().numpy().copy() for name, w in weights.items()}
    return dict(norms=norms, losses=losses, gradients=gradients, weights=weights,
                bytes=bytes_here(net, optimizer))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def bytes_here(net, optimizer) -> int:
    tensors = list(net.parameters())
    for state in optimizer.state.values():
        tensors += [t for t in state.values() if t.numel() > 1]
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def largest_difference(one, two):
    return max(abs(one[name] - two[name]).max() for name in one)


@pytest.mark.parametrize("options", [
    dict(), dict(micro=1, checkpointing=True), dict(lora=3), dict(tied=True)], ids=str)
def test_two_ranks_equal_one_process(options):
    """The same uneven batches, one rank with nothing to learn: same gradients, norms, losses and
    weights, and each rank holds half of everything."""
    ranks = Ranks(2, functools.partial(three_steps, **options))
    alone = three_steps(**options)
    first, second = ranks.answers()
    assert largest_difference(alone["gradients"], first["gradients"]) < 1e-5
    assert largest_difference(alone["weights"], first["weights"]) < 1e-5
    assert first["norms"] == second["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert second["weights"] == {}, "rank 0 alone gathers the weights"
    assert first["bytes"] + second["bytes"] < 1.02 * alone["bytes"]
    assert first["bytes"] < 0.6 * alone["bytes"]


def test_bfloat16_under_fsdp_is_the_same_model_as_autocast():
    ranks = Ranks(2, three_steps, "bfloat16")
    alone, exact = three_steps("bfloat16"), three_steps()
    first, _ = ranks.answers()
    assert first["losses"] == pytest.approx(alone["losses"], rel=0.003)
    assert first["losses"] != pytest.approx(exact["losses"], rel=1e-6), "this was float32"
    usual = largest_difference(exact["gradients"], alone["gradients"])
    assert largest_difference(exact["gradients"], first["gradients"]) < 2 * usual + 1e-3


def validation_loss():
    """Of five rows; row r has 24 tokens, of which 24 - 4r are supervised."""
    here = machine.choose_machine("cpu", "float32", 2)
    torch.manual_seed(0)
    net = model.LLaMA(model.LLaMAConfig(**SHAPE))
    tokens = torch.randint(3, 67, (5, 24)).numpy()
    labels = tokens.copy()
    for r in range(5):
        labels[r, :4 * r] = data.IGNORE
    return train_sft.validate(net, data.Rows(tokens, labels), here, batch=2)


def test_validation_scores_every_row_once():
    """Two ranks take batches in turns. The last batch is short, and the second rank repeats rows to
    keep step: none may be counted twice."""
    ranks = Ranks(2, validation_loss)
    nats, count = validation_loss()
    assert count == 23 + 20 + 16 + 12 + 8
    assert ranks.answers() == [(pytest.approx(nats), count)] * 2


# -- runs that are interrupted --------------------------------------------------------------------

@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A file of conversations."""
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("files") / "chats.json"
    file.write_text(json.dumps([conversation(rng) for _ in range(60)]), encoding="utf-8")
    return file


EVERY_STEP = 1e-6  # minutes between checkpoints


def settings(chats, out, **changes):
    """Ten steps on out/chats. Rows are short, and the template has no system text."""
    given = dict(stage="sft", data=str(chats), init=str(MICRO), out=str(out), steps=10, seq_len=96,
                 batch_size=4, template="plain", learning_rate=1e-3, device="cpu", dtype="float32")
    return {**given, **changes}


def run(given):
    train_sft.main(train_sft.SFTConfig(**given))


def go(given, event=None, at=None):
    """One run in a process of its own. It may send itself a signal before batch `at`. Of two ranks,
    the second one does."""
    batch, world = data.Rows.batch, int(os.environ.get("WORLD_SIZE", 1))

    def interrupted_batch(self, step, size):
        is_last = os.environ.get("RANK", "0") == str(world - 1)
        if is_last and step // world == at:
            os.kill(os.getpid(), event)
        return batch(self, step, size)

    data.Rows.batch = interrupted_batch
    if world > 1:
        given = dict(given, patience=2.0)
    run(given)


def result(out):
    folder = Path(out) / "chats"
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    log = [(line["step"], line["loss"], line["norm"]) for line in lines]
    return log, checkpoint.load(folder)[0].state_dict()


def step_of(folder):
    return checkpoint.read_meta(checkpoint.find(folder))["step"]


@pytest.fixture(scope="module")
def straight(chats, tmp_path_factory):
    """straight(lora_rank): the result of a run that nothing happened to."""
    @functools.cache
    def get(lora_rank):
        out = tmp_path_factory.mktemp("straight")
        assert Ranks(1, go, settings(chats, out, lora_rank=lora_rank)).answers() == [None]
        return result(out)
    return get


def assert_same(out, straight, tolerance=0.0):
    (log, weights), (want, good) = result(out), straight
    assert [step for step, *_ in log] == list(range(10)), "each step stands once in the log"
    if not tolerance:
        assert log == want
    assert log[-1][1] == pytest.approx(want[-1][1], abs=2e-5)
    assert all(torch.allclose(weights[n], good[n], rtol=0, atol=tolerance) for n in good)


def test_killed_and_run_again(chats, straight, tmp_path):
    """kill -9 from outside at a random moment; every step is saved, so many moments are inside a
    save."""
    rng, given = random.Random(KILLS), settings(chats, tmp_path, save_minutes=EVERY_STEP)
    for _ in range(KILLS):
        interrupted = Ranks(1, go, given)
        end = time.time() + 60
        while not list(tmp_path.glob("chats/*step-*")) and time.time() < end:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        interrupted.processes[0].kill()
        interrupted.processes[0].join()
    assert Ranks(1, go, given).answers() == [None]
    assert_same(tmp_path, straight(0))


@pytest.mark.parametrize("lora", [0, 4])
def test_resume_with_another_number_of_processes(chats, straight, tmp_path, lora):
    """One, then two, then one. SIGTERM reaches one rank only; all of them stop after the same step,
    save, and end with an error."""
    given = settings(chats, tmp_path, lora_rank=lora)
    for world, at in ((1, 3), (2, 6)):
        stopped = Ranks(world, go, given, signal.SIGTERM, at).answers()
        assert [type(answer) for answer in stopped] == [config.Stopped] * world
        assert step_of(tmp_path / "chats") == at + 1
    assert Ranks(1, go, given).answers() == [None]
    assert_same(tmp_path, straight(lora), 1e-5)


def test_a_rank_that_dies_is_missed(chats, tmp_path):
    """The other one does not wait forever; it says so, and what was saved is intact."""
    given = settings(chats, tmp_path, save_minutes=EVERY_STEP)
    first, second = Ranks(2, go, given, signal.SIGKILL, 4).answers()
    assert second == KILLED and isinstance(first, config.UserError)
    assert "rank 0 lost another process" in str(first)
    assert step_of(tmp_path / "chats") == 4


@pytest.fixture(scope="module")
def stopped(chats, tmp_path_factory):
    """The folder of a run that saved each step and was stopped after step 7."""
    out = tmp_path_factory.mktemp("stopped")
    given = settings(chats, out, save_minutes=EVERY_STEP)
    (answer,) = Ranks(1, go, given, signal.SIGTERM, 6).answers()
    assert isinstance(answer, config.Stopped)
    return out


@pytest.mark.parametrize("file", ["model.pt", "optim.pt", "meta.json"])
def test_damage_means_the_checkpoint_before(chats, stopped, straight, tmp_path, capsys, file):
    """Overwritten bytes in the newest checkpoint are noticed and reported; the one before is
    used."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    damaged = checkpoint.find(tmp_path / "chats") / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xff
    damaged.write_bytes(content)
    run(settings(chats, tmp_path))
    said = capsys.readouterr().out
    assert f"{damaged} " in said and "resuming at step 6" in said
    assert_same(tmp_path, straight(0))


def test_damaged_metrics_cost_only_themselves(chats, stopped, straight, tmp_path):
    """A torn last line, NULs or garbage in metrics.jsonl, and the run could not be resumed, or the
    lines after them stood for other steps."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "chats" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1:4] = [b"\0" * 40 + lines[1], b"\xff\xfe \x80\n", b"[" * 99999 + b"\n7\n{}\n"]
    path.write_bytes(b"".join(lines) + b'{"step": null, "loss": 1.0}\n\n{"step": 7, "lo')
    run(settings(chats, tmp_path))
    (log, weights), (want, good) = result(tmp_path), straight(0)
    assert log == [line for line in want if line[0] not in (2, 3)]
    assert all(torch.equal(weights[name], good[name]) for name in good)


def test_a_second_command_in_the_same_folder_is_refused(chats, straight, tmp_path):
    """It replaced files that a running training was still using. The lock of a killed command does
    not count."""
    given = settings(chats, tmp_path)
    first = Ranks(1, go, given, signal.SIGSTOP, 3)
    end = time.time() + 60
    while not (tmp_path / "chats" / "latest").exists() and time.time() < end:
        time.sleep(0.01)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again, elsewhere = dict(given, resume="never"), dict(given, out=f"{tmp_path}/chats/..")
    answers = Ranks(1, go, again).answers() + Ranks(2, go, elsewhere).answers()
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    first.processes[0].kill()
    first.processes[0].join()
    for answer in answers:
        assert f"in use by process {first.processes[0].pid};" in str(answer)
    assert after == before
    run(given)
    assert_same(tmp_path, straight(0))


def test_timed_saves_survive_a_clock_that_jumps(chats, tmp_path, monkeypatch):
    """A clock that is set back by a year must not put off the next save by a year."""
    years, saved = iter(range(2100, 0, -1)), []
    monkeypatch.setattr(time, "time", lambda: next(years) * 3e7)
    monkeypatch.setattr(checkpoint, "save", lambda _, net, meta, *rest: saved.append(meta["step"]))
    run(settings(chats, tmp_path, save_minutes=EVERY_STEP))
    assert saved == list(range(1, 11))


def test_no_undamaged_checkpoint(chats, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for step in checkpoint.history(tmp_path / "chats"):
        (step / "model.pt").write_bytes(b"")
    with pytest.raises(config.UserError, match="every checkpoint in .* is damaged"):
        run(settings(chats, tmp_path))


# -- bad days -------------------------------------------------------------------------------------

def test_out_of_memory_names_the_options_that_help(chats, tmp_path, monkeypatch):
    def greedy(*_, **__):
        torch.empty(1 << 55)

    monkeypatch.setattr(model.LLaMA, "nll", greedy)
    words = "out of memory. Try --micro_batch=2, --checkpointing, --lora_rank=8"
    with pytest.raises(config.UserError, match=words):
        run(settings(chats, tmp_path))


@pytest.mark.parametrize("changes, words", [
    (dict(batch_size=5), "--batch_size=5 must be a multiple of 2 processes"),
    (dict(optimizer="muon"), "--optimizer=muon needs whole matrices")], ids=str)
def test_what_cannot_be_shared(chats, tmp_path, changes, words):
    answers = Ranks(2, go, settings(chats, tmp_path, **changes)).answers()
    for answer in answers:
        assert isinstance(answer, config.UserError) and words in str(answer)


def test_lora_trains_adapters_only_and_saves_them_alone_and_merged(chats, tmp_path):
    run(settings(chats, tmp_path, lora_rank=4, weight_decay=0.5))
    step = checkpoint.find(tmp_path / "chats")
    adapters, base = checkpoint.read(step / "lora.pt"), checkpoint.load(MICRO)[0]
    assert all(".lora_" in name for name in adapters)
    model.add_lora(base, 4)
    base.load_state_dict({**base.state_dict(), **adapters})
    tokens = torch.randint(3, 67, (2, 20))
    merged, untrained = checkpoint.load(step)[0](tokens), checkpoint.load(MICRO)[0](tokens)
    assert torch.allclose(base(tokens), merged, atol=1e-5)
    assert not torch.allclose(untrained, merged, atol=1e-3)
