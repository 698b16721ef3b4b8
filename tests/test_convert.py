"""Tests of convert.py: folders laid out as the publishers lay them out, blocks byte for byte, llama.cpp itself.

    pytest tests/test_convert.py
    npm install node-llama-cpp --ignore-scripts --prefix=/tmp/llama     # then, against the real llama.cpp:
    LLAMA_CPP=/tmp/llama pytest tests/test_convert.py -k llama_cpp
"""

import json
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import convert
import data
import model
import sample
from test_model import close

ROOT = Path(__file__).resolve().parent.parent
MICRO = ROOT / "tests" / "micro"  # the committed model that can talk


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = [t.system for t in data.TEMPLATES.values()] * 9
    return data.train_tokenizer(lines, 320, tmp_path_factory.mktemp("convert") / "tokenizer.model")


SHAPE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, norm_eps=1e-5, max_seq_len=64)


def randomise(net: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.dim() == 1))
    return net.eval()


def ours(vocab_size: int, **changes) -> model.LLaMA:
    return randomise(model.LLaMA(model.LLaMAConfig(**{**SHAPE, "vocab_size": vocab_size, **changes})))


def some_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (2, 24))


# -- Hugging Face's folders ----------------------------------------------------------------------------------

LAYOUTS = {
    "llama1": dict(num_key_value_heads=4),
    "tinyllama": dict(num_key_value_heads=2),
    "one key head": dict(num_key_value_heads=1),
    "tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "vicuna-v0": dict(num_key_value_heads=4, rows=1),
    "vicuna-v1.5-16k": dict(num_key_value_heads=4, rope_scaling=dict(type="linear", factor=4.0)),
    "theta": dict(num_key_value_heads=4, rope_theta=500000.0),
}


def hugging_face(layout: str, folder: Path, tokenizer, pickled: bool = False, shards: int = 1, old: bool = True):
    """A random model of transformers', and its folder as it was published. transformers 5 spells config.json in
    a new way and rotary tables are no longer stored; what is on the hub is mostly older."""
    transformers = pytest.importorskip("transformers")
    options = dict(LAYOUTS[layout])
    rows = tokenizer.vocab_size + options.pop("rows", 0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=rows,
                 max_position_embeddings=64, rms_norm_eps=1e-5, **options)
    theirs = randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer.path, folder / "tokenizer.model")
    state = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    if shape.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    if not old:
        theirs.save_pretrained(folder, max_shard_size="60KB" if shards > 1 else "1GB")
        return theirs
    written = dict(shape, architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", torch_dtype="float32")
    written["vocab_size"] = tokenizer.vocab_size  # Vicuna v0's config.json did not know of the row it had
    if options.get("num_key_value_heads") == 4:
        del written["num_key_value_heads"]  # LLaMA 1's files are older than grouped queries
    (folder / "config.json").write_text(json.dumps(written))
    if pickled:
        for i in range(2):
            state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    write = torch.save if pickled else pytest.importorskip("safetensors.torch").save_file
    if shards == 1:
        write(state, folder / f"{stem}.{ending}")
        return theirs
    names, index = list(state), {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{ending}"
        part = {name: state[name] for name in names[i::shards]}
        write(part, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    return theirs


@pytest.mark.parametrize("layout, pickled, shards, old", [
    *((layout, False, 1, True) for layout in LAYOUTS), ("tinyllama", True, 1, True), ("tinyllama", False, 3, True),
    ("tied", True, 2, True), ("vicuna-v1.5-16k", False, 3, False), ("theta", False, 1, False), ("tied", False, 1, False)])
def test_hugging_face(layout, pickled, shards, old, tmp_path, tokenizer):
    """Without the permutation of q and k, or with the wrong number of heads for k, the logits are unrelated."""
    theirs = hugging_face(layout, tmp_path / layout, tokenizer, pickled, shards, old)
    net, words = convert.load_llama(tmp_path / layout)
    ids = some_ids(tokenizer.vocab_size)
    with torch.no_grad():
        close(net(ids), theirs(ids).logits, f"{layout} from Hugging Face's files")
    assert words.vocab_size == tokenizer.vocab_size
    if layout == "tied":
        assert net.output.weight is net.tok_embeddings.weight
    assert net.config.max_seq_len == (256 if "16k" in layout else 64)


def test_every_loader_takes_published_folders(tmp_path, tokenizer):
    """model.load is what the scripts call; sample.py talks to the folder as it came."""
    theirs = hugging_face("vicuna-v1.5-16k", tmp_path / "vicuna", tokenizer)
    net, path, meta = model.load(tmp_path / "vicuna", torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16} and net.cos.dtype == torch.float32
    assert meta["template"] == "vicuna_v1.1" and meta["config"]["rope_scaling"] == 4
    assert path == tmp_path / "vicuna" / "tokenizer.model" and theirs.config.vocab_size == net.config.vocab_size
    for quantize in (None, "q8", "q4"):
        cfg = sample.SampleConfig(ckpt=str(tmp_path / "vicuna"), prompt="Hi", max_new_tokens=4, quantize=quantize)
        assert sample.main(cfg)["rounds"] == 1


# -- Meta's folders ------------------------------------------------------------------------------------------

def meta_folder(folder: Path, net: model.LLaMA, tokenizer, shards: int) -> None:
    """As tensor parallelism cuts a model: wq, wk, wv, w1, w3 and output by rows, wo, w2 and the embedding by
    columns, norms in every shard, and the rotary table beside them. LLaMA 1: float16, vocab_size -1."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer.path, folder.parent / "tokenizer.model")
    c = net.config
    params = dict(dim=c.dim, multiple_of=32, n_heads=c.n_heads, n_layers=c.n_layers, norm_eps=c.norm_eps, vocab_size=-1)
    if c.n_kv_heads != c.n_heads:
        params["n_kv_heads"] = c.n_kv_heads
    (folder / "params.json").write_text(json.dumps(params))
    for i in range(shards):
        part = {"rope.freqs": torch.ones(8)}
        for name, p in net.state_dict().items():
            axis = 1 if any(s in name for s in ("wo", "w2", "tok_embeddings")) else 0
            part[name] = p.clone() if p.dim() == 1 else p.chunk(shards, axis)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02d}.pth")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_meta(shards, kv_heads, tmp_path, tokenizer):
    net = ours(tokenizer.vocab_size, n_kv_heads=kv_heads)
    meta_folder(tmp_path / "7B", net, tokenizer, shards)
    loaded, words = convert.load_llama(tmp_path / "7B")
    ids = some_ids(tokenizer.vocab_size)
    assert torch.equal(loaded(ids), net(ids)) and words.path == tmp_path / "tokenizer.model"
    assert loaded.config == model.LLaMAConfig(**{**SHAPE, "n_kv_heads": kv_heads, "max_seq_len": 2048,
                                                 "vocab_size": tokenizer.vocab_size})


# -- bad files: one line that names the file and says what to do ---------------------------------------------

class Bomb:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


def rewrite(file: Path, change) -> None:
    state = torch.load(file)
    change(state)
    torch.save(state, file)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path, share: float = 0.6) -> None:
    file.write_bytes(file.read_bytes()[:int(file.stat().st_size * share)])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976576152\n"
Q = "layers.1.self_attn.q_proj.weight"
BAD = {  # what happened: (layout, what is done to the folder, words of the message)
    "cut off": ("bin", lambda d: cut(d / "pytorch_model.bin"), "pytorch_model.bin cut off fetch"),
    "cut off safetensors": ("safe", lambda d: cut(d / "model.safetensors"), "model.safetensors cut off bytes fetch"),
    "cut off in the header": ("safe", lambda d: cut(d / "model.safetensors", 0.001), "model.safetensors cut off fetch"),
    "empty": ("safe", lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors cut off fetch"),
    "LFS pointer": ("safe", lambda d: (d / "model.safetensors").write_text(LFS), "model.safetensors Git-LFS git lfs pull"),
    "LFS tokenizer": ("safe", lambda d: (d / "tokenizer.model").write_text(LFS), "tokenizer.model SentencePiece"),
    "web page": ("bin", lambda d: (d / "pytorch_model.bin").write_text("<!DOCTYPE html><p>Quota exceeded"),
                 "pytorch_model.bin web page fetch"),
    "code": ("bin", lambda d: torch.save({"a": Bomb()}, d / "pytorch_model.bin"), "pytorch_model.bin run system refused"),
    "not weights": ("bin", lambda d: torch.save([1, 2], d / "pytorch_model.bin"), "pytorch_model.bin no named tensors"),
    "missing shard": ("shards", lambda d: next(d.glob("*-00002-of-*")).unlink(), "1 of 3 00002-of-00003 fetch"),
    "no weights": ("safe", lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors fetch"),
    "no tokenizer": ("safe", lambda d: (d / "tokenizer.model").unlink(), "no tokenizer tokenizer.model"),
    "broken config": ("safe", lambda d: cut(d / "config.json"), "config.json damaged fetch"),
    "missing tensor": ("bin", lambda d: rewrite(d / "pytorch_model.bin", lambda s: s.pop("model." + Q)), f"missing {Q}"),
    "unknown tensor": ("bin", lambda d: rewrite(d / "pytorch_model.bin", lambda s: s.update({"model.extra": torch.ones(1)})),
                       "extra no place"),
    "wrong shape": ("bin", lambda d: rewrite(d / "pytorch_model.bin", lambda s: s.update({"model." + Q: torch.ones(8, 64)})),
                    "layers.1.attention.wq (8, 64) (64, 64)"),
    "adapter": ("safe", lambda d: ((d / "config.json").unlink(), (d / "model.safetensors").unlink(),
                                   (d / "adapter_config.json").write_text('{"base_model_name_or_path": "lmsys/vicuna"}')),
                "LoRA adapter merge lmsys/vicuna"),
    "adapter's tensors": ("bin", lambda d: torch.save({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight":
                                                       torch.ones(2)}, d / "pytorch_model.bin"), "LoRA adapter merge"),
    "half a config": ("safe", lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "config.json hidden_size"),
    "architecture": ("safe", lambda d: edit(d / "config.json", model_type="mistral"), "config.json architecture mistral LLaMA"),
    "rope": ("safe", lambda d: edit(d / "config.json", rope_scaling=dict(rope_type="yarn", factor=2.0)),
             "config.json rope scaling yarn"),
    "bias": ("safe", lambda d: edit(d / "config.json", attention_bias=True), "config.json bias"),
    "quantised": ("safe", lambda d: edit(d / "config.json", quantization_config=dict(bits=4)), "quantised --quantize=q4"),
    "tokenizer of another model": ("safe", lambda d: shutil.copy(MICRO / "tokenizer.model", d), "512 pieces another model"),
    "half of Meta's shards": ("meta", lambda d: (d / "consolidated.01.pth").unlink(), "consolidated.00.pth 2 shards fetch"),
    "first of Meta's shards": ("meta", lambda d: (d / "consolidated.00.pth").unlink(), "consolidated.00.pth fetch"),
    "shards of another size": ("meta", lambda d: edit(d / "params.json", dim=128), "params.json dim 128 width 64"),
    "no checkpoint": ("meta", lambda d: (d / "params.json").unlink(), "no checkpoint"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files(what, tmp_path, tokenizer, capfd):
    layout, damage, words = BAD[what]
    if layout == "meta":
        meta_folder(tmp_path / "m", ours(tokenizer.vocab_size), tokenizer, 2)
    else:
        hugging_face("llama1", tmp_path / "m", tokenizer, layout == "bin", 3 if layout == "shards" else 1)
    damage(tmp_path / "m")
    with pytest.raises(config.Problem) as problem:
        model.load(tmp_path / "m")
    message = str(problem.value)
    assert "\n" not in message and str(tmp_path / "m") in message
    for part in words.split():
        assert part in message, f"{part!r} is not in: {message}"
    assert "never run" not in capfd.readouterr().out


# -- the self-check ------------------------------------------------------------------------------------------

def test_check_names_the_classic_failures(tmp_path):
    """Weights that were never loaded; q and k permuted once too often."""
    said = tmp_path / "said.json"
    said.write_text(json.dumps([dict(conversations=[
        {"from": "human", "value": "Who are you?"},
        {"from": "gpt", "value": "I am Vicuna, a small language model that was trained from scratch."}])]))
    net, tokenizer, meta = model.load(MICRO)

    def saved(name: str) -> str:
        return str(model.save(tmp_path / name, net, meta, tokenizer).parent)

    def checked(folder: str) -> dict:
        return convert.check(convert.CheckConfig(folder, str(said)))

    figures = checked(saved("good"))
    assert figures["loss"] < figures["permuted"]
    for block in net.layers:
        for w in (block.attention.wq.weight, block.attention.wk.weight):
            w.data = convert.interleave(w.data, net.config.n_heads)
    with pytest.raises(config.Problem, match="q and k in another order"):
        checked(saved("permuted"))
    randomise(net)
    with pytest.raises(config.Problem, match="guessing"):
        checked(saved("random"))


# -- memory --------------------------------------------------------------------------------------------------

LOADS = """
import sys, resource
sys.path.insert(0, sys.argv[1])
import torch, model, convert
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
net = model.load(sys.argv[2], torch.bfloat16, quantize=sys.argv[3] or None)[0]
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, convert.size(net))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in another way")
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_loading_needs_the_memory_of_the_model_once(ending, tmp_path, tokenizer):
    """A float16 file read in bfloat16. Reading it whole, then converting, would peak at twice the model."""
    shape = dict(dim=1024, n_heads=8, n_layers=6, hidden_dim=2048)
    with torch.device("meta"):
        shapes = model.LLaMA(model.LLaMAConfig(vocab_size=tokenizer.vocab_size, **shape)).state_dict()
    state = {convert.their_name(name, 0): torch.full(p.shape, 0.5, dtype=torch.half) for name, p in shapes.items()}
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="llama", hidden_size=1024, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
        rms_norm_eps=1e-6)))
    shutil.copy(tokenizer.path, tmp_path / "tokenizer.model")
    if ending == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", LOADS, str(ROOT), str(tmp_path), ""], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    peak, size = map(int, done.stdout.splitlines()[-1].split())
    assert 1.2e8 < size < 1.4e8 and peak < 1.5 * size, f"{peak / size:.2f} times the model"
