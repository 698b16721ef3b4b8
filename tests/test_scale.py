"""Many processes, long runs and bad days: FSDP equals one process, nothing is lost, one line says
what happened.

    KILLS=10 pytest tests/test_scale.py -k killed_and      # the long version, by hand
"""

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

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
MICRO = ROOT / "tests" / "micro"
KILLS = int(os.environ.get("KILLS", 2))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "measure_peak", lambda *_: 1e11)


# -- FSDP equals one process ----------------------------------------------------------------------

FULL_STATE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
SHAPE = dict(dim=36, n_layers=2, n_heads=2, hidden_dim=50, vocab_size=67, max_seq_len=32)  # uneven


def uneven_batches(steps, rows=4):
    """Rows have few or many supervised tokens; in the second batch, the last two have none."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 67, (steps, rows, 24))
    labels = tokens.clone()
    for r in range(rows):
        labels[:, r, :4 + 5 * r] = data.IGNORE
    labels[1, 2:] = data.IGNORE
    return tokens, labels


def three_steps(options):
    """Trains three steps, alone or with others. Returns losses, gradient norms, the gradients of
    the first step, the weights, and the bytes of this rank's parameters and optimizer state."""
    get = options.get
    cfg = train_sft.SFTConfig(steps=3, learning_rate=1e-5)
    here = machine.choose_machine("cpu", get("dtype", "float32"), 2)
    torch.manual_seed(0)
    net = model.LLaMA(model.LLaMAConfig(**SHAPE, tied=get("tied", False)))
    net.checkpointing = get("checkpointing", False)
    if get("lora"):
        model.add_lora(net, options["lora"])
    if here.sharded:
        train_sft.shard(net.train(), here)
    optimizer = train_sft.make_optimizer(net, cfg)
    tokens, labels = uneven_batches(3)
    share = len(tokens[0]) // here.world
    norms, losses, gradients = [], [], {}
    for step in range(3):
        mine = slice(here.rank * share, (here.rank + 1) * share)
        batch = tokens[step, mine], labels[step, mine], None
        parts = train_sft.micro_batches(batch, get("micro", share), "cpu")
        loss = train_sft.loss_backward(net, parts, here)
        losses.append(here.total(loss)[0])
        whole = {}
        for name, p in net.named_parameters():
            if p.requires_grad:
                whole[name] = p.grad.full_tensor() if here.sharded else p.grad
        norms.append(sum(g.double().pow(2).sum() for g in whole.values()).sqrt().item())
        if step == 0:
            gradients = {name: g.numpy().copy() for name, g in whole.items()}
        optimizer.step()
        optimizer.zero_grad()
    weights = state_dict.get_model_state_dict(net, options=FULL_STATE)
    weights = {name: w.detach().numpy().copy() for name, w in weights.items()}
    return dict(norms=norms, losses=losses, gradients=gradients, weights=weights,
                bytes=bytes_here(net, optimizer))


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
    ranks = Ranks(2, three_steps, options)
    alone = three_steps(options)
    first, second = ranks.answers()
    assert largest_difference(alone["gradients"], first["gradients"]) < 1e-5
    assert largest_difference(alone["weights"], first["weights"]) < 1e-5
    assert first["norms"] == second["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert second["weights"] == {}, "rank 0 alone gathers the weights"
    assert first["bytes"] + second["bytes"] < 1.02 * alone["bytes"]
    assert first["bytes"] < 0.6 * alone["bytes"]


def test_bfloat16_under_fsdp_is_the_same_model_as_autocast():
    ranks = Ranks(2, three_steps, dict(dtype="bfloat16"))
    alone, exact = three_steps(dict(dtype="bfloat16")), three_steps({})
    first, _ = ranks.answers()
    assert first["norms"] == pytest.approx(alone["norms"], rel=0.01)
    assert first["losses"] == pytest.approx(alone["losses"], rel=0.003)
    assert first["losses"] != pytest.approx(exact["losses"], rel=1e-6), "this was float32"
    usual = largest_difference(exact["gradients"], alone["gradients"])
    assert largest_difference(exact["gradients"], first["gradients"]) < 2 * usual + 1e-3


def some_rows(n: int) -> data.Rows:
    """Row r has 24 tokens, of which 24 - 4r are supervised."""
    torch.manual_seed(2)
    tokens = torch.randint(3, 67, (n, 24)).numpy()
    labels = tokens.copy()
    for r in range(n):
        labels[r, :4 * r] = data.IGNORE
    return data.Rows(tokens, labels)


def validation_loss(n: int):
    here = machine.choose_machine("cpu", "float32", 2)
    torch.manual_seed(0)
    net = model.LLaMA(model.LLaMAConfig(**SHAPE))
    return train_sft.validate(net, some_rows(n), here, batch=2)


@pytest.mark.parametrize("n, count", [(4, 23 + 20 + 16 + 12), (5, 23 + 20 + 16 + 12 + 8)])
def test_validation_scores_every_row_once(n, count):
    """Two ranks take batches in turns. With five rows the last batch is short, and the second rank
    repeats rows to keep step: none may be counted twice."""
    ranks = Ranks(2, validation_loss, n)
    nats, alone = validation_loss(n)
    assert alone == count
    assert ranks.answers() == [(pytest.approx(nats), count)] * 2


# -- runs that are interrupted --------------------------------------------------------------------

@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A file of short conversations."""
    rng, records = random.Random(0), []
    words = "red blue green small large circle square star left right one two three".split()
    for _ in range(60):
        question, reply = (" ".join(rng.choices(words, k=k)) for k in (4, rng.randint(2, 30)))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
        records.append(dict(conversations=turns))
    file = tmp_path_factory.mktemp("files") / "chats.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def settings(chats, out, **changes):
    """Ten steps on out/chats. Rows are short, and the template has no system text."""
    given = dict(stage="sft", data=str(chats), init=str(MICRO), out=str(out), steps=10, seq_len=96,
                 batch_size=4, template="plain", learning_rate=1e-3, device="cpu", dtype="float32")
    if changes.pop("save_every_step", False):
        given["save_minutes"] = 1e-6
    return {**given, **changes}


def run(given):
    train_sft.main(train_sft.SFTConfig(**given))


def go(given, kill_at=None, term_at=None, in_save=None):
    """One run in a process of its own. It may kill itself before batch `kill_at` or in the save of
    step `in_save`, or send itself SIGTERM. Of two ranks, the second one does."""
    batch, save = data.Rows.batch, torch.save

    def deadly_batch(self, step, size):
        at = step // int(os.environ.get("WORLD_SIZE", 1))
        if os.environ.get("RANK", "1") == "1":
            if at == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if at == term_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, size)

    def deadly_save(value, path):
        save(value, path)
        if in_save and f"step-{in_save:06d}" in str(path):
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

    data.Rows.batch, torch.save = deadly_batch, deadly_save
    if "WORLD_SIZE" in os.environ:
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
    results = {}

    def get(lora_rank=0):
        if lora_rank not in results:
            out = tmp_path_factory.mktemp("straight")
            assert Ranks(1, go, settings(chats, out, lora_rank=lora_rank)).answers() == [None]
            results[lora_rank] = result(out)
        return results[lora_rank]
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
    rng, given = random.Random(KILLS), settings(chats, tmp_path, save_every_step=True)
    for _ in range(KILLS):
        interrupted = Ranks(1, go, given)
        end = time.time() + 60
        while not list(tmp_path.glob("chats/*step-*")) and time.time() < end:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        interrupted.processes[0].kill()
        interrupted.processes[0].join()
    assert Ranks(1, go, given).answers() == [None]
    assert_same(tmp_path, straight())


@pytest.mark.parametrize("how", [dict(kill_at=5), dict(in_save=6)], ids=str)
def test_killed_at_the_worst_moment(chats, straight, tmp_path, how):
    """Between two saves, and with half of a file written."""
    given = settings(chats, tmp_path, save_every_step=True)
    killed = Ranks(1, go, given, how.get("kill_at"), None, how.get("in_save"))
    assert killed.answers() == [KILLED]
    assert step_of(tmp_path / "chats") == 5
    assert Ranks(1, go, given).answers() == [None]
    assert_same(tmp_path, straight())


@pytest.mark.parametrize("lora", [0, 4])
def test_resume_with_another_number_of_processes(chats, straight, tmp_path, lora):
    """One, then two, then one. SIGTERM reaches one rank only; all of them stop after the same step,
    save, and end with an error."""
    given = settings(chats, tmp_path, lora_rank=lora)
    for world, at in ((1, 3), (2, 6)):
        stopped = Ranks(world, go, given, None, at).answers()
        assert [type(answer) for answer in stopped] == [config.Stopped] * world
        assert step_of(tmp_path / "chats") == at + 1
    assert Ranks(1, go, given).answers() == [None]
    assert_same(tmp_path, straight(lora), 1e-5)


def test_a_rank_that_dies_is_missed(chats, tmp_path):
    """The other one does not wait forever; it says so, and what was saved is intact."""
    given = settings(chats, tmp_path, save_every_step=True)
    first, second = Ranks(2, go, given, 4).answers()
    assert second == KILLED and isinstance(first, config.UserError)
    for words in ("rank 0 lost another process", "intact: run the same command again"):
        assert words in str(first)
    assert "\n" not in str(first)
    assert step_of(tmp_path / "chats") == 4


@pytest.fixture(scope="module")
def stopped(chats, tmp_path_factory):
    """The folder of a run that saved each step and was stopped after step 7."""
    out = tmp_path_factory.mktemp("stopped")
    (answer,) = Ranks(1, go, settings(chats, out, save_every_step=True), None, 6).answers()
    assert isinstance(answer, config.Stopped)
    return out


@pytest.mark.parametrize("file", ["model.pt", "optim.pt", "meta.json", "tokenizer.model"])
def test_damage_means_the_checkpoint_before(chats, stopped, straight, tmp_path, capsys, file):
    """Overwritten bytes in the newest checkpoint are noticed and reported; the one before is
    used."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    newest, before = checkpoint.history(tmp_path / "chats")
    assert (newest.name, before.name) == ("step-000007", "step-000006")
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 0xff
    (newest / file).write_bytes(content)
    run(settings(chats, tmp_path))
    said = capsys.readouterr().out
    named = newest / ("meta.json" if file == "tokenizer.model" else file)
    assert str(named) in said and "skipping" in said
    assert "resuming at step 6" in said
    assert_same(tmp_path, straight())


def test_no_undamaged_checkpoint(chats, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for step in checkpoint.history(tmp_path / "chats"):
        (step / "model.pt").write_bytes(b"")
    with pytest.raises(config.UserError, match="every checkpoint in .* is damaged.*--resume=never"):
        run(settings(chats, tmp_path))


# -- bad days -------------------------------------------------------------------------------------

def test_out_of_memory_names_the_options_that_help(chats, tmp_path, monkeypatch):
    def greedy(*_, **__):
        torch.empty(1 << 55)

    monkeypatch.setattr(model.LLaMA, "nll", greedy)
    words = "out of memory. Try --micro_batch=2, --checkpointing, --lora_rank=8"
    with pytest.raises(config.UserError, match=words) as caught:
        run(settings(chats, tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(config.UserError) as caught:  # options that are in use are not named
        run(settings(chats, tmp_path, micro_batch=1, checkpointing=True, lora_rank=2))
    assert "Try a smaller --seq_len;" in str(caught.value)


@pytest.mark.parametrize("changes, words", [
    (dict(batch_size=5), "--batch_size=5 must be a multiple of 2 processes"),
    (dict(optimizer="muon"), "--optimizer=muon needs whole matrices")], ids=str)
def test_what_cannot_be_shared(chats, tmp_path, changes, words):
    answers = Ranks(2, go, settings(chats, tmp_path, **changes)).answers()
    for answer in answers:
        assert isinstance(answer, config.UserError) and words in str(answer)


def test_a_run_of_another_kind_is_not_resumed(chats, tmp_path):
    """Template, data, LoRA: whatever differs is named."""
    run(settings(chats, tmp_path, steps=2))
    other = tmp_path / "chats.json"
    other.write_text(chats.read_text() + "\n", encoding="utf-8")
    for changes, words in ((dict(template="koala"), "template was plain, is now koala"),
                           (dict(lora_rank=2), "lora_rank was"),
                           (dict(data=str(other)), "data was")):
        with pytest.raises(config.UserError, match=words):
            run(settings(chats, tmp_path, steps=2, **changes))


def test_lora_trains_adapters_only_and_saves_them_alone_and_merged(chats, tmp_path):
    run(settings(chats, tmp_path, lora_rank=4, weight_decay=0.5))
    step = checkpoint.find(tmp_path / "chats")
    adapters, base = checkpoint.read(step / "lora.pt"), checkpoint.load(MICRO)[0]
    assert all(".lora_" in name for name in adapters) and len(adapters) == 3 * 7 * 2
    merged = checkpoint.load(step)[0].state_dict()
    for name, w in base.state_dict().items():
        adapted = any(part in name for part in ("attention.w", "feed_forward.w"))
        assert torch.equal(merged[name], w) != adapted, name
    model.add_lora(base, 4)
    base.load_state_dict({**base.state_dict(), **adapters})
    tokens = torch.randint(3, 67, (2, 20))
    assert torch.allclose(base(tokens), checkpoint.load(step)[0](tokens), atol=1e-5)
