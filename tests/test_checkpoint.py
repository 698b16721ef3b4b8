"""Tests of tools/checkpoint.py: a crash, a full disk or a damaged file never costs more than the
newest step, and never gives wrong weights."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import data
import model
from conftest import ROOT
from tools import checkpoint
from tools.config import UserError


def tiny(**changes):
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, hidden_dim=48,
                 max_seq_len=64)
    return model.LLaMA(model.LLaMAConfig(**{**sizes, **changes})).eval()


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    return tmp_path / "out" / "base"


def save(folder, m, step: int, **options) -> Path:
    tokenizer = folder.parent.parent / "tokenizer.model"
    return checkpoint.save(folder, m, {"step": step}, tokenizer, **options)


# -- writing and finding --------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(folder, tied):
    m = tiny(tied=tied, norm_eps=1e-5, rope_scaling=2.0)
    step = save(folder, m, 400, optimizer={"lr": torch.tensor(0.5)})
    assert checkpoint.read(step / "optim.pt") == {"lr": torch.tensor(0.5)}
    for path in (folder, step):  # the run, or one step of it
        loaded, tokenizer, meta = checkpoint.load(path)
        assert same_weights(m, loaded), "a round trip must be bit-equal"
        assert loaded.config == m.config
        assert not loaded.training, "a loaded model is ready to be used"
        assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
        assert tokenizer.read_bytes() == b"pieces" and meta["step"] == 400
        assert meta["torch"] == torch.__version__ and meta["threads"] == torch.get_num_threads()
    tokens = torch.randint(3, 50, (1, 5))
    assert torch.equal(m(tokens), loaded(tokens))
    assert checkpoint.peek(folder) == (m.config, tokenizer, meta)


def test_a_file_of_what_was_trained_fills_a_network(folder):
    """One layer between frozen parts. What is not frozen has to be in the file; without the frozen
    parts, it is no model. (test_vlm.py compares the weights.)"""
    network = tiny().requires_grad_(False)
    save(folder, network, 1, weights={"norm.weight": torch.full((32,), 2.0)})
    loaded, _, _ = checkpoint.load(folder, network=network)
    assert loaded is network and (loaded.norm.weight == 2).all()
    with pytest.raises(UserError, match="does not fit the config"):
        checkpoint.load(folder)
    network.output.requires_grad_(True)
    with pytest.raises(UserError, match="output.weight"):
        checkpoint.load(folder, network=network)


@pytest.mark.parametrize("order, before", [
    ((100, 200, 300), 200), ((999_999, 1_000_000, 1_000_001), 1_000_000),
    ((300, 400, 100), 400), ((100, 200, 200), 100)],
    ids=["usual", "a million steps", "a new run in an old folder", "the same step again"])
def test_two_are_kept_and_the_newest_is_one(folder, order, before):
    """By name, step-1000000 comes before step-999999; and a new run in an old folder begins below
    the last step of the old one. The newest must never be the one that is deleted."""
    for step in order:
        newest = tiny()
        save(folder, newest, step)
    assert same_weights(checkpoint.load(folder)[0], newest)
    names = [step.name for step in checkpoint.history(folder)]
    assert names == [f"step-{order[-1]:06d}", f"step-{before:06d}"]


def test_only_step_and_digits_is_ours(folder, tmp_path):
    """A copy beside the steps, made while the run went on, ended the next save, and --resume=never
    deleted it. The user's copies, links and files are neither read nor deleted."""
    step = save(folder, tiny(), 1)
    copies = ["step-000001 (copy)", "step-000001.bak", "step-", "step-best", "step--3", "step-1e3",
              "step-٣", "old step-000001", ".step-best.partial"]
    for name in copies:
        shutil.copytree(step, folder / name)
    (folder / "step-000098").symlink_to(step)
    (folder / "step-000099").write_text("notes")
    (folder / ".step-000099.partial").write_text("notes")
    before = {path.name for path in folder.iterdir()} - {step.name}
    for number in (2, 3, 4):
        save(folder, tiny(), number)
    assert [path.name for path in checkpoint.history(folder)] == ["step-000004", "step-000003"]
    after = {path.name for path in folder.iterdir()} - {"step-000004", "step-000003"}
    assert after == before
    assert all((folder / name / "model.pt").exists() for name in copies)


@pytest.mark.parametrize("content", [
    b"", b"\n", b"\0\0\0\0", b"\xff\xfe", b".", b"..", b"step-000003", b"step-000001 (copy)",
    b"step-000001/model.pt"])
def test_a_bad_latest_means_the_newest_step(folder, content):
    """After a power failure the file may be empty; then the run itself was taken for published
    weights."""
    save(folder, tiny(), 1)
    step = save(folder, tiny(), 2)
    shutil.copytree(step, folder / "step-000001 (copy)")
    tokenizer = ROOT / "tests" / "micro" / "tokenizer.model"
    shutil.copy(tokenizer, step / "tokenizer.model")
    (folder / "latest").write_bytes(content)
    assert checkpoint.find(folder) == step
    assert data.find_tokenizer(folder).path == step / "tokenizer.model"


@pytest.mark.parametrize("module, name, call, step", [
    (torch, "save", 1, 3), (os, "fsync", 1, 3), (os, "rename", 1, 3), (os, "replace", 1, 3),
    # step 2 again: the old one makes room, and the new one takes its name
    (os, "rename", 1, 2), (os, "rename", 2, 2)])
@pytest.mark.parametrize("error", [RuntimeError("writing failed"), KeyboardInterrupt()],
                         ids=["torch's disk full", "killed"])
def test_an_interrupted_save(folder, monkeypatch, module, name, call, step, error):
    """Whatever happens while writing, a complete checkpoint stays loadable, and the next save
    works."""
    original, calls = getattr(module, name), []

    def fail(*given, **named):
        calls.append(given)
        if len(calls) < call:
            return original(*given, **named)
        if name == "save":
            Path(given[1]).write_bytes(b"half a fi")
        raise error

    first, before, new = tiny(), tiny(), tiny()
    save(folder, first, 1)
    save(folder, before, 2)
    monkeypatch.setattr(module, name, fail)
    with pytest.raises((OSError, RuntimeError, KeyboardInterrupt)) as caught:
        save(folder, new, step)
    if name == "save" and isinstance(error, RuntimeError):
        assert isinstance(caught.value, OSError), "a full disk is a RuntimeError in torch"
        assert not list(folder.glob(".step-*")), "the half-written folder takes the room"
    monkeypatch.undo()
    loaded = checkpoint.load(folder)[0]
    good = [first] if call == 2 else [before, new]
    assert any(same_weights(loaded, one) for one in good)
    save(folder, new, step)
    assert same_weights(checkpoint.load(folder)[0], new)
    assert not list(folder.glob(".step-*")), "leftovers of the killed save"


def test_everything_is_on_the_disk_before_it_gets_its_name(folder, monkeypatch):
    """A rename may reach the disk before the content of the file. After a power failure there would
    be a checkpoint with empty files."""
    safe, rename, replace = set(), os.rename, os.replace

    def to_disk(descriptor: int) -> None:
        safe.add(os.fstat(descriptor).st_ino)

    def rename_safely(source, target) -> None:
        assert {file.stat().st_ino for file in (source, *source.iterdir())} <= safe
        rename(source, target)

    def replace_safely(source, target) -> None:
        assert source.stat().st_ino in safe
        safe.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", to_disk)
    monkeypatch.setattr(os, "rename", rename_safely)
    monkeypatch.setattr(os, "replace", replace_safely)
    save(folder, tiny(), 1, optimizer={})
    assert folder.stat().st_ino in safe, "the new names themselves"


def test_no_checkpoint_there(folder):
    """Say what there is instead."""
    with pytest.raises(UserError, match="python train_sft.py"):
        checkpoint.load(folder)
    save(folder, tiny(), 1)
    with pytest.raises(UserError, match="bose.*has base"):
        checkpoint.load(folder.parent / "bose")


# -- damage ---------------------------------------------------------------------------------------

def test_flipped_bits_are_noticed(folder):
    """torch.load does not look at the checksums in its own files: a bad disk would go unnoticed.
    Wherever a byte is wrong: either it did not matter, or one line says so."""
    m = tiny()
    file = save(folder, m, 1) / "model.pt"
    good = file.read_bytes()
    weights = good.index(m.layers[0].feed_forward.w1.weight.detach().numpy().tobytes())
    directory = good.index(b"PK\x01\x02")  # where the list of the parts begins
    for at in [weights, *range(0, directory, 1499), *range(directory, len(good), 11)]:
        file.write_bytes(good[:at] + bytes([good[at] ^ 0xff]) + good[at + 1:])
        try:
            loaded = checkpoint.load(folder)[0]
        except UserError as error:
            assert "\n" not in str(error) and "model.pt is damaged" in str(error)
        else:
            assert same_weights(loaded, m), f"byte {at} is wrong and nobody noticed"
            assert at != weights
    file.write_bytes(good[:len(good) // 2])
    with pytest.raises(UserError, match="model.pt is damaged"):
        checkpoint.load(folder)


def test_damage_to_meta_or_tokenizer_is_noticed(folder):
    """Another tokenizer gives other words for the same ids, and one wrong digit in meta.json
    another model: both would load."""
    step = save(folder, tiny(), 1)
    meta, tokenizer = step / "meta.json", step / "tokenizer.model"
    good = meta.read_text()
    for damaged in (good.replace('"rope_theta": 10000', '"rope_theta": 20000'), good[:20]):
        meta.write_text(damaged)
        with pytest.raises(UserError, match="meta.json.*damaged"):
            checkpoint.load(folder)
    meta.write_text(good)
    tokenizer.write_bytes(b"pieceS")
    with pytest.raises(UserError, match="tokenizer.model.*damaged"):
        checkpoint.load(folder)


def test_a_missing_file_is_not_called_damaged(folder):
    step = save(folder, tiny(), 1)  # without an optimizer
    with pytest.raises(FileNotFoundError):
        checkpoint.read(step / "optim.pt")


class Malicious:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_file(tmp_path):
    """Reading it waited forever, and reading /dev/zero filled the memory."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        for read in (checkpoint.read, data.read_file):
            with pytest.raises(UserError, match="is not a regular file"):
                read(path)


def test_no_code_from_a_pickle(folder, tmp_path):
    """A pickle may call any function while it is read. Weights from the internet must not."""
    step = save(folder, tiny(), 1)
    torch.save({"norm.weight": Malicious(tmp_path / "was here")}, step / "model.pt")
    with pytest.raises(UserError, match="model.pt"):
        checkpoint.load(folder)
    assert not (tmp_path / "was here").exists()


def test_fingerprint(folder, tmp_path):
    """The same weights have the same one wherever they are saved; of published files, the size
    counts. (test_teacher.py trains further: another one.)"""
    m = tiny()
    save(folder, m, 1)
    copy = save(tmp_path / "out" / "copy", m, 7)
    assert checkpoint.fingerprint(folder) == checkpoint.fingerprint(copy)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    first = checkpoint.fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"123456")
    assert checkpoint.fingerprint(tmp_path) != first


def test_the_committed_model_loads():
    """It was written by an older version: a checkpoint must stay readable. It does not say how long
    a context it was trained on: then on all of its max_seq_len."""
    net, tokenizer, meta = checkpoint.load(ROOT / "tests" / "micro")
    assert tokenizer.is_file() and meta["template"] == "vicuna_v1.1"
    assert checkpoint.window(meta, net.config) == net.config.max_seq_len
    assert checkpoint.window({"window": 320}, net.config) == 320
