"""Tests of convert.py: folders laid out as the publishers lay them out, blocks byte for byte, llama.cpp itself.

    pytest tests/test_convert.py
    npm install node-llama-cpp --ignore-scripts --prefix=/tmp/llama     # then, against the real llama.cpp:
    LLAMA_CPP=/tmp/llama pytest tests/test_convert.py -k llama_cpp
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import config
import convert
import data
import model
import sample
import toy
import train_sft
import train_vlm
import vision
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
    """A random model of transformers', and its folder as it was published. transformers 5 spells config.json in a
    new way and stores no rotary tables; what is on the hub is mostly older."""
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
    written = dict(shape, architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu")
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
    ("tied", True, 2, True), ("vicuna-v1.5-16k", False, 3, False), ("theta", False, 1, False),
    ("tied", False, 1, False)])
def test_hugging_face(layout, pickled, shards, old, tmp_path, tokenizer):
    """Without the permutation of q and k, or with the wrong number of heads for k, the logits are unrelated."""
    theirs = hugging_face(layout, tmp_path / layout, tokenizer, pickled, shards, old)
    net, words, _ = convert.load(tmp_path / layout)
    ids = some_ids(tokenizer.vocab_size)
    with torch.no_grad():
        close(net(ids), theirs(ids).logits, f"{layout} from Hugging Face's files")
    assert data.Tokenizer(words).vocab_size == tokenizer.vocab_size
    if layout == "tied":
        assert net.output.weight is net.tok_embeddings.weight
    assert net.config.max_seq_len == (256 if "16k" in layout else 64)


def test_every_loader_takes_published_folders(tmp_path, tokenizer):
    """model.load is what the scripts call; sample.py talks to the folder as it came."""
    theirs = hugging_face("vicuna-v1.5-16k", tmp_path / "vicuna", tokenizer)
    net, path, meta = model.load(tmp_path / "vicuna", dtype=torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16} and net.cos.dtype == torch.float32
    assert meta["template"] == "vicuna_v1.1" and meta["config"]["rope_scaling"] == 4
    assert path == tmp_path / "vicuna" / "tokenizer.model" and theirs.config.vocab_size == net.config.vocab_size
    for quantize in (None, "q8", "q4"):
        cfg = sample.SampleConfig(ckpt=str(tmp_path / "vicuna"), prompt="Hi", max_new_tokens=4, quantize=quantize)
        assert sample.main(cfg)["rounds"] == 1


def test_training_starts_from_a_published_folder(tmp_path, tokenizer):
    """One step of fine-tuning; what comes out is a folder of ours, with the tokenizer in it."""
    meta_folder(tmp_path / "llama" / "7B", ours(tokenizer.vocab_size), tokenizer, 2)
    said = tmp_path / "said.json"
    record = dict(conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}])
    said.write_text(json.dumps([record] * 4))
    train_sft.main(train_sft.SFTConfig(
        data=str(said), init=str(tmp_path / "llama" / "7B"), out=str(tmp_path / "out"), steps=1, seq_len=512,
        batch_size=2, device="cpu", dtype="float32"))
    net, path, meta = model.load(tmp_path / "out" / "said")
    assert meta["template"] == "vicuna_v1.1" and path.read_bytes() == tokenizer.path.read_bytes()
    assert net.config.n_kv_heads == 2 and net.config.max_seq_len == 2048


def test_padding_rows_are_silent(tokenizer):
    """Vicuna v0 can choose its row 32,000, which is no piece: SentencePiece would raise IndexError."""
    ids = tokenizer.encode("A chat")
    assert tokenizer.decode([*ids, tokenizer.vocab_size]) == tokenizer.decode(ids) == "A chat"


# -- Meta's folders ------------------------------------------------------------------------------------------

def meta_folder(folder: Path, net: model.LLaMA, tokenizer, shards: int) -> None:
    """As tensor parallelism cuts a model: wq, wk, wv, w1, w3 and output by rows, wo, w2 and the embedding by
    columns, norms in every shard, and the rotary table beside them. LLaMA 1: float16, vocab_size -1."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer.path, folder.parent / "tokenizer.model")
    c = net.config
    params = dict(dim=c.dim, multiple_of=32, n_heads=c.n_heads, n_layers=c.n_layers, norm_eps=c.norm_eps)
    params["vocab_size"] = -1
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
    loaded, words, _ = convert.load(tmp_path / "7B")
    ids = some_ids(tokenizer.vocab_size)
    assert torch.equal(loaded(ids), net(ids)) and words == tmp_path / "tokenizer.model"
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


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    rewrite(folder / "pytorch_model.bin", lambda state: state.update({name: tensor}))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path, share: float = 0.6) -> None:
    file.write_bytes(file.read_bytes()[:int(file.stat().st_size * share)])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976576152\n"
Q = "layers.1.self_attn.q_proj.weight"
ADAPTER = '{"base_model_name_or_path": "lmsys/vicuna"}'
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD = {  # what happened: (layout, what is done to the folder, words of the message)
    "cut off": ("bin", lambda d: cut(d / "pytorch_model.bin"), "pytorch_model.bin cut off fetch"),
    "cut off safetensors": ("safe", lambda d: cut(d / "model.safetensors"),
        "model.safetensors cut off fetch"),
    "cut off in the header": ("safe", lambda d: cut(d / "model.safetensors", 0.001),
        "model.safetensors cut off fetch"),
    "empty": ("safe", lambda d: (d / "model.safetensors").write_bytes(b""),
        "model.safetensors cut off fetch"),
    "LFS pointer": ("safe", lambda d: (d / "model.safetensors").write_text(LFS),
        "model.safetensors Git-LFS git lfs pull"),
    "LFS tokenizer": ("safe", lambda d: (d / "tokenizer.model").write_text(LFS),
        "tokenizer.model SentencePiece"),
    "web page": ("bin", lambda d: (d / "pytorch_model.bin").write_text("<!DOCTYPE html><p>Quota exceeded"),
                 "pytorch_model.bin web page fetch"),
    "code": ("bin", lambda d: torch.save({"a": Bomb()}, d / "pytorch_model.bin"),
        "pytorch_model.bin run system refused"),
    "not weights": ("bin", lambda d: torch.save([1, 2], d / "pytorch_model.bin"),
        "pytorch_model.bin no named tensors"),
    "missing shard": ("shards", lambda d: next(d.glob("*-00002-of-*")).unlink(),
        "1 of 3 00002-of-00003 fetch"),
    "no weights": ("safe", lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors fetch"),
    "no tokenizer": ("safe", lambda d: (d / "tokenizer.model").unlink(), "no tokenizer tokenizer.model"),
    "broken config": ("safe", lambda d: cut(d / "config.json"), "config.json damaged fetch"),
    "missing tensor": ("bin", lambda d: rewrite(d / "pytorch_model.bin", lambda s: s.pop("model." + Q)),
        f"missing {Q}"),
    "unknown tensor": ("bin", lambda d: add(d, "model.extra", torch.ones(1)),
                       "extra no place"),
    "wrong shape": ("bin", lambda d: add(d, "model." + Q, torch.ones(8, 64)),
                    "layers.1.attention.wq (8, 64) (64, 64)"),
    "adapter": ("safe", lambda d: ((d / "config.json").unlink(), (d / "model.safetensors").unlink(),
                                   (d / "adapter_config.json").write_text(ADAPTER)),
                "LoRA adapter merge lmsys/vicuna"),
    "adapter's tensors": ("bin", lambda d: torch.save({LORA: torch.ones(2)}, d / "pytorch_model.bin"),
        "LoRA adapter merge"),
    "half a config": ("safe", lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
        "config.json hidden_size"),
    "architecture": ("safe", lambda d: edit(d / "config.json", model_type="mistral"),
        "config.json architecture mistral LLaMA"),
    "rope": ("safe", lambda d: edit(d / "config.json", rope_scaling=dict(rope_type="yarn", factor=2.0)),
             "config.json rope scaling yarn"),
    "bias": ("safe", lambda d: edit(d / "config.json", attention_bias=True), "config.json bias"),
    "quantised": ("safe", lambda d: edit(d / "config.json", quantization_config=dict(bits=4)),
        "quantised --quantize=q4"),
    "tokenizer of another model": ("safe", lambda d: shutil.copy(MICRO / "tokenizer.model", d),
        "512 pieces another model"),
    "half of Meta's shards": ("meta", lambda d: (d / "consolidated.01.pth").unlink(),
        "consolidated.00.pth 2 shards fetch"),
    "first of Meta's shards": ("meta", lambda d: (d / "consolidated.00.pth").unlink(),
        "consolidated.00.pth fetch"),
    "shards of another size": ("meta", lambda d: edit(d / "params.json", dim=128),
        "params.json dim 128 width 64"),
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
import sys
sys.path.insert(0, sys.argv[1])
import torch, model, convert

def megabytes(what):  # not getrusage: that begins with what the parent process had used
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) / 1024

torch.set_num_threads(1)
model.count(model.LLaMAConfig())  # the first use of the meta device loads 70 MB of torch's own
before = megabytes("VmRSS")
net = model.load(sys.argv[2], dtype=torch.bfloat16, quantize=sys.argv[3] or None)[0]
print(megabytes("VmHWM") - before, convert.size(net) / 2 ** 20)
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
    command = [sys.executable, "-c", LOADS, str(ROOT), str(tmp_path), ""]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    peak, size = map(float, done.stdout.splitlines()[-1].split())
    assert 120 < size < 130 and size < peak < 1.4 * size, f"{peak:.0f} MB for a model of {size:.0f} MB"


# -- eight and four bits -------------------------------------------------------------------------------------

def awkward_rows() -> torch.Tensor:
    """Weights that tell rounding rules apart: ties for the extreme, zeros, halves, tiny and huge blocks."""
    x = torch.randn(64, 256)
    x[0] = 0
    x[1, :32] = torch.tensor([3.0, -3.0] * 16)  # which of the two extremes is taken decides the sign of d
    x[2, :32] = torch.tensor([-3.0, 3.0] * 16)
    x[3, :32] = torch.linspace(-127, 127, 32).round() + 0.5  # halves
    x[3, 0] = 127
    x[4] *= 1e-6
    x[5] *= 1e4
    x[6, 1:] = 0
    return x


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_are_llama_cpps(kind):
    """Byte for byte, against the gguf package; another rule for halves or for the sign of d changes thousands."""
    gguf = pytest.importorskip("gguf")
    weight = torch.cat([awkward_rows(), torch.randn(1500, 256) * torch.rand(1500, 1)])  # more than one slab
    blocks = convert.quantize_rows(weight, kind)
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    assert (blocks.flatten(1).numpy() == theirs).all()
    values = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType[kind])
    assert (convert.dequantize(blocks).numpy() == values).all()


def test_blocks_by_hand():
    """The same without the package: where each weight of a block is, and what its codes mean."""
    x = torch.zeros(1, 32)
    x[0, [0, 1, 16, 31]] = torch.tensor([-8.0, 7.0, 1.0, -2.0])
    block = convert.quantize_rows(x, "Q4_0")[0, 0]
    assert block[:2].view(torch.float16) == 1  # -8 is the extreme: d = 1
    assert block[2] == 0 | 9 << 4 and block[3] == 15 | 8 << 4 and block[17] == 8 | 6 << 4
    assert torch.equal(convert.dequantize(block[None, None]), x)
    assert torch.equal(convert.dequantize(convert.quantize_rows(-x, "Q4_0")), -x)  # +8 is the extreme: d = -1
    x[0, :4] = torch.tensor([127.0, -126.5, 0.5, -0.5])
    codes = convert.quantize_rows(x, "Q8_0")[0, 0, 2:].view(torch.int8)
    assert codes[:4].tolist() == [127, -127, 1, -1]  # halves go away from zero


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("rows", [64, 97, 2080])
def test_fast_kernel_equals_readable_blocks(kind, rows):
    """97 rows are no multiple of sixteen; 2080 are packed in slabs. bfloat16 is all that separates the two."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        pytest.skip("this torch has no int4 kernel")
    blocks = convert.quantize_rows(torch.randn(rows, 128), kind)
    slow, fast = (convert.QuantLinear(blocks, kind, fast) for fast in (False, True))
    for shape in ((1, 1, 128), (2, 5, 128)):
        x = torch.randn(shape)
        got, want = fast(x), slow(x)
        assert got.shape == want.shape == (*shape[:2], rows)
        assert (got - want).norm() < 0.006 * want.norm()
        assert (fast(x.bfloat16()).float() - want).norm() < 0.006 * want.norm()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize, bits", [("q8", 8.5), ("q4", 4.5)])
def test_quantised_model(quantize, bits, tied, tmp_path, tokenizer, monkeypatch):
    """Every matrix but the embedding is in blocks, and computes what its unpacked weights would."""
    net = ours(tokenizer.vocab_size, tied=tied)
    folder = model.save(tmp_path, net, dict(step=1, template="plain"), tokenizer.path)
    fast, _, _ = model.load(folder, quantize=quantize)
    # where `load` looks it up, which is another module under --impl
    monkeypatch.setitem(convert.load.__globals__, "choose_kernel", lambda device: (False, "as the test wants"))
    small, _, _ = model.load(folder, quantize=quantize)
    kinds = {name: m.kind for name, m in small.named_modules() if isinstance(m, convert.QuantLinear)}
    assert len(kinds) == 7 * 2 + 1 and not any(isinstance(m, torch.nn.Linear) for m in small.modules())
    assert kinds.pop("output") == "Q8_0" and set(kinds.values()) == {dict(q8="Q8_0", q4="Q4_0")[quantize]}
    w1 = net.layers[0].feed_forward.w1.weight
    assert convert.size(small.layers[0].feed_forward.w1) * 8 == bits * w1.numel()
    ids = some_ids(tokenizer.vocab_size)
    expected = ours(tokenizer.vocab_size)
    state = {name: p.clone() for name, p in net.state_dict().items()}
    for name in [*kinds, "output"]:
        state[name + ".weight"] = convert.dequantize(small.get_submodule(name).blocks)
    expected.load_state_dict(state)
    with torch.no_grad():
        close(small(ids), expected(ids), "blocks, unpacked for every use")
        assert not torch.allclose(small(ids), net(ids), rtol=1e-3)
        error = (fast(ids) - expected(ids)).norm() / expected(ids).norm()
    assert error < 0.05  # random weights magnify what bfloat16 rounds away
    assert len(list(fast.generate([[1, 5, 7]], 5, stop=()))) == 5


def test_kernel_is_chosen_and_the_choice_is_said(monkeypatch):
    """Where torch has no kernel, or one that computes something else, the readable blocks take over."""
    fast, why = convert.choose_kernel()
    assert why == "multiplied by torch's int4 kernel" if fast else "unpacked" in why
    assert convert.choose_kernel("cuda")[0] is False
    if fast:
        monkeypatch.setattr(convert, "dequantize", lambda blocks, dtype: torch.ones(64, 64))
        fast, why = convert.choose_kernel()
        assert not fast and "wrong on this machine" in why


def test_what_fewer_bits_cost_and_give(tmp_path, capsys):
    """On any text; fp32 is compared with itself, and its perplexity is the loss of model.py."""
    held = tmp_path / "held.txt"
    held.write_text("I am a small language model. There is a red square on the left.\n" * 20)
    figures = bench.quality(bench.QualityConfig(str(MICRO), str(held), rows=1))
    net, path, _ = model.load(MICRO)
    tokens, labels, _ = convert.rows_of(held, "plain", data.Tokenizer(path), 512).batch(0, 1)
    with torch.no_grad():
        total, count = net.nll(tokens, labels)
    assert math.isclose(figures["fp32"]["perplexity"], math.exp(total / count), rel_tol=1e-4)
    assert figures["fp32"]["kl"] == 0 and figures["fp32"]["same_top"] == 1
    assert 0 < figures["q8"]["kl"] < figures["q4"]["kl"] and figures["q8"]["bytes"] > figures["q4"]["bytes"]
    raced = bench.speed(bench.SpeedConfig(str(MICRO), tokens=2, rounds=1))
    assert {"ours, fp32", "ours, bf16", "ours, q8", "ours, q4"} <= set(raced)
    assert "tokens/s" in capsys.readouterr().out


# -- GGUF ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", [None, "q8", "q4"])
def test_gguf_reads_back(quantize, tied, tmp_path, tokenizer):
    """Every tensor, name, shape, type and key, by the gguf package's reader."""
    gguf = pytest.importorskip("gguf")
    net = ours(tokenizer.vocab_size + 2, tied=tied, rope_scaling=4.0)  # two rows without a piece
    folder = model.save(tmp_path, net, dict(step=1, template="vicuna_v1.1"), tokenizer.path)
    assert convert.write_gguf(folder, tmp_path / "m.gguf", quantize) == (tmp_path / "m.gguf").stat().st_size
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    state = dict(net.state_dict())
    if tied:
        del state["output.weight"]
    assert {t.name for t in reader.tensors} == {convert.their_name(name, 1) for name in state}
    names = {convert.their_name(name, 1): name for name in state}
    for t in reader.tensors:
        want = state[names[t.name]]
        assert tuple(reversed(t.shape.tolist())) == tuple(want.shape) and t.data_offset % 32 == 0
        vocabulary = names[t.name] in ("tok_embeddings.weight", "output.weight")
        matrices = {None: "F16", "q8": "Q8_0", "q4": "Q8_0" if vocabulary else "Q4_0"}
        kind = "F32" if want.dim() == 1 else matrices[quantize]
        assert t.tensor_type.name == kind, t.name
        assert (t.data.tobytes() == gguf.quants.quantize(want.numpy(), t.tensor_type).tobytes()), t.name
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "llama" and keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.rope.scaling.factor"] == 4 and keys["llama.rope.dimension_count"] == 16
    assert keys["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert len(set(keys["tokenizer.ggml.tokens"])) == tokenizer.vocab_size + 2
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and keys["tokenizer.ggml.token_type"][-2:] == [5, 5]


CHATS = [[("user", "Hi")], [("user", "Hi"), ("assistant", "Hello there."), ("user", "Who's \"x\"?\n{{ 7 }} </b>")]]


@pytest.mark.parametrize("name", ["vicuna_v1.1", "vicuna_v0", "alpaca", "koala", "oasst", "plain"])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("chat", CHATS)
def test_chat_template_spells_what_render_does(name, system, chat, tokenizer):
    """As text: the tokens are compared with llama.cpp's below."""
    jinja2 = pytest.importorskip("jinja2")
    messages = [dict(role=role, content=text) for role, text in chat]
    turns = [data.Turn(role, text) for role, text in chat]
    ids = data.render(data.Conversation(turns, system=system), name, tokenizer).tokens
    if system:
        messages.insert(0, dict(role="system", content=system))
    text = jinja2.Template(convert.jinja(name)).render(messages=messages)
    assert "<s>" + text.replace(" ", "") == data.spell(tokenizer, ids).replace(" ", "")  # spaces: SentencePiece's


# -- MiniGPT-4: the four published files ---------------------------------------------------------------------

def published_minigpt4(folder: Path, tokenizer):
    """A random model of transformers', at the published widths but shallow, written out as EVA, BLIP-2, MiniGPT-4
    and Hugging Face lay theirs out, with everything those files hold beside."""
    transformers = pytest.importorskip("transformers")
    slot = tokenizer.vocab_size - 1  # transformers marks image slots with a piece
    text = dict(hidden_size=4096, num_hidden_layers=2, num_attention_heads=32, intermediate_size=256,
                rms_norm_eps=1e-6, vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    twin = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(
        text_config=transformers.LlamaConfig(**text), num_query_tokens=32, image_token_index=slot,
        vision_config=dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=2, num_attention_heads=16,
                           image_size=28, patch_size=14, layer_norm_eps=1e-6),
        qformer_config=dict(hidden_size=768, num_hidden_layers=3, num_attention_heads=12, intermediate_size=3072,
                            encoder_hidden_size=1408, cross_attention_frequency=2, vocab_size=60))).eval()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            scale = 0.5 if p.dim() < 2 or "embed" in name or "tokens" in name else 1.7 / math.sqrt(p.shape[-1])
            p.uniform_(-scale, scale)
            if name.endswith("qkv.bias"):
                p[1408:2816] = 0  # there is no bias for k
    twin.vision_model.post_layernorm.eps = 1e-5  # BLIP-2's own; transformers gives it the ViT's
    theirs = {re.sub(r"^model\.(vision_model|qformer|query_tokens|language)", r"\1", name): w
              for name, w in twin.state_dict().items()}
    eva, blip2, own, llama = {}, {}, {}, {}
    for name, w in theirs.items():
        if name.startswith("vision_model.post_layernorm."):
            blip2[name.replace("vision_model.post_layernorm", "ln_vision")] = w
        elif name.endswith("qkv.bias"):
            stem = name.replace("vision_model.encoder.layers", "blocks").replace("self_attn.qkv.bias", "attn.")
            eva[stem + "q_bias"], eva[stem + "v_bias"] = w[:1408].clone(), w[2816:].clone()
        elif name.startswith("vision_model."):
            for a, b in [("vision_model.", ""), ("encoder.layers", "blocks"), ("layer_norm", "norm"),
                         ("self_attn.qkv", "attn.qkv"), ("self_attn.projection", "attn.proj"),
                         ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
                         ("embeddings.patch_embedding", "patch_embed.proj")]:
                name = name.replace(a, b)
            eva[name] = w
        elif name.startswith(("qformer.", "query_tokens")):
            for a, b in [("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
                         ("qformer.encoder", "Qformer.bert.encoder"), (".attention.attention.", ".attention.self."),
                         (".crossattention.attention.", ".crossattention.self.")]:
                name = name.replace(a, b)
            blip2[name] = w
        elif "language_projection" in name:
            own["llama_proj." + name.rpartition(".")[2]] = w
        else:
            llama[name.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")] = w
    llama = {re.sub(r"^(model\.)?language_model\.", "model.", k): v for k, v in llama.items()}
    eva.update({name.replace("blocks.1", "blocks.2"): w for name, w in list(eva.items()) if "blocks.1" in name})
    eva.update({"norm.weight": torch.ones(1408), "norm.bias": torch.ones(1408), "head.weight": torch.ones(2, 1408)})
    positions = {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    blip2.update({"t5_proj.weight": torch.ones(8, 768), "t5_proj.bias": torch.ones(8), **positions})
    (folder / "vicuna").mkdir(parents=True)
    shutil.copy(tokenizer.path, folder / "vicuna" / "tokenizer.model")
    (folder / "vicuna" / "config.json").write_text(json.dumps(dict(text, model_type="llama")))
    torch.save(llama, folder / "vicuna" / "pytorch_model.bin")
    torch.save(eva, folder / "eva_vit_g.pth")
    torch.save({"model": blip2}, folder / "blip2_pretrained_flant5xxl.pth")
    torch.save({"model": {**own, **positions}, "optimizer": {"state": {}}, "config": {"run": {"lr": 3e-5}},
                "scaler": None, "epoch": 4}, folder / "prerained_minigpt4_7b.pth")
    return twin, slot


def training_starts_from_published_files(tmp_path, net):
    """One step of stage 1; the result names the files that it stands on, and is opened with them."""
    (tmp_path / "album").mkdir()
    for name in "ab":
        Image.new("RGB", (40, 30), "blue").save(tmp_path / "album" / f"{name}.png")
    captions = {f"{name}.png": "a blue field" for name in "ab"}
    (tmp_path / "album" / "captions.json").write_text(json.dumps(captions))
    done = train_vlm.main(train_vlm.VLMConfig(
        recipe="published", init=str(tmp_path / "m" / "vicuna"), vision=str(tmp_path / "m"), stage="1", steps=1,
        images=str(tmp_path / "album"), out=str(tmp_path / "out"), batch_size=2, device="cpu", dtype="float32"))
    again, _, _ = vision.load(done["folder"])
    for part in ("vit", "qformer", "llama"):
        theirs = getattr(net, part).state_dict()
        assert all(torch.equal(w, theirs[name]) for name, w in getattr(again, part).state_dict().items()), part
    (tmp_path / "m" / "blip2_pretrained_flant5xxl.pth").rename(tmp_path / "kept")
    with pytest.raises(config.Problem, match="trained again"):
        vision.load(done["folder"])
    (tmp_path / "kept").rename(tmp_path / "m" / "blip2_pretrained_flant5xxl.pth")


def test_minigpt4(tmp_path, tokenizer):
    """All keys of all four files accounted for; logits for text with a picture equal transformers'. Then the files
    are spoilt one by one."""
    twin, slot = published_minigpt4(tmp_path / "m", tokenizer)
    net, path, meta = convert.load_minigpt4(tmp_path / "m")
    pixels = torch.randn(1, 3, 28, 28)
    ids = torch.tensor([[1, 5, *[slot] * 32, 8, 9, 10]])
    with torch.no_grad():
        want = twin(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        got = net(ids.masked_fill(ids == slot, model.IMAGE_SLOT), pixels)
        blind = net(ids.masked_fill(ids == slot, model.IMAGE_SLOT), torch.zeros_like(pixels))
    close(got, want, "the four files together differ from Blip2 + LLaMA")
    assert not torch.allclose(got, blind, rtol=1e-2)  # the picture is seen
    assert path.parent.name == "vicuna" and not net.training
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    said = sample.main(sample.SampleConfig(ckpt=str(tmp_path / "m"), image=str(tmp_path / "red.png"), quantize="q4",
                                           prompt="What is this?", max_new_tokens=4))
    assert said["rounds"] == 1 and meta["template"] == "minigpt4"
    training_starts_from_published_files(tmp_path, net)
    del twin, net

    def spoilt(file: str, change, *words: str) -> None:
        kept = (tmp_path / "m" / file).read_bytes()
        rewrite(tmp_path / "m" / file, lambda state: change(state.get("model", state)))
        with pytest.raises(config.Problem) as problem:
            convert.load_minigpt4(tmp_path / "m")
        (tmp_path / "m" / file).write_bytes(kept)
        assert all(word in str(problem.value) for word in (file, *words)), problem.value

    own, larger = "prerained_minigpt4_7b.pth", {"llama_proj.weight": torch.ones(5120, 768)}
    spoilt(own, lambda s: s.update(larger), "5120", "4096", "13B")
    spoilt(own, lambda s: s.pop("llama_proj.bias"), "llama_proj.bias")
    spoilt("eva_vit_g.pth", lambda s: s.pop("blocks.1.attn.q_bias"), "blocks.1.attn.q_bias", "missing")
    spoilt("eva_vit_g.pth", lambda s: s.update({"blocks.0.rope": torch.ones(1)}), "blocks.0.rope", "no place")
    spoilt("blip2_pretrained_flant5xxl.pth", lambda s: s.pop("query_tokens"), "query_tokens", "missing")
    (tmp_path / "m" / "eva_vit_g.pth").unlink()
    with pytest.raises(config.Problem, match="eva_vit_g"):
        convert.load_minigpt4(tmp_path / "m")


def test_published_sizes():
    """Names and sizes of the real files, from their listings: 985,894,528 weights of EVA's in 511 tensors; BLIP-2's
    download of 413.19 MiB; projections of 768 x 4096 and 768 x 5120."""
    vit_shape, qformer_shape = vision.PRESETS["minigpt4"]
    with torch.device("meta"):
        vit = vision.ViT(vision.ViTConfig(**vit_shape))
        qformer = vision.QFormer(vision.QFormerConfig(**qformer_shape))
    eva = {name: tuple(p.shape) for name, p in vit.state_dict().items()}
    assert len(eva) == 511 and sum(map(math.prod, eva.values())) == 985_894_528
    assert eva["blocks.38.attn.qkv.weight"] == (4224, 1408) and "blocks.39.norm1.weight" not in eva
    assert eva["pos_embed"] == (1, 257, 1408) and eva["blocks.0.mlp.fc1.weight"] == (6144, 1408)
    blip2 = {convert.blip2_name(name): tuple(p.shape) for name, p in qformer.state_dict().items()}
    beside = 512 * 8 + (4096 * 768 + 4096) * 4  # position_ids (int64) and the projection to T5
    assert round((sum(map(math.prod, blip2.values())) * 4 + beside) / 2 ** 20, 2) == 413.19
    start = "Qformer.bert.encoder.layer."
    assert blip2[start + "10.crossattention.self.key.weight"] == (768, 1408)
    assert blip2[start + "11.output_query.LayerNorm.bias"] == (768,)
    assert start + "11.crossattention.self.key.bias" not in blip2
    assert {re.sub(r"\d+", "L", name) for name in blip2} == {"query_tokens", *(
        f"{stem}.{leaf}" for leaf in ("weight", "bias") for stem in (
            "ln_vision", "Qformer.bert.embeddings.LayerNorm", *("Qformer.bert.encoder.layer.L." + part for part in (
                *(f"{kind}.self.{x}" for kind in ("attention", "crossattention") for x in ("query", "key", "value")),
                *(f"{kind}.output.{x}" for kind in ("attention", "crossattention") for x in ("dense", "LayerNorm")),
                "intermediate_query.dense", "output_query.dense", "output_query.LayerNorm"))))}
    assert model.count(model.LLaMAConfig(**model.PRESETS["7B"])) == 6_738_415_616


# -- the real llama.cpp --------------------------------------------------------------------------------------

needs_llama_cpp = pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no node-llama-cpp")
ODD = ["", " ", "  two", "tab\tand\nlines\r\n\n\n",
       "naïve café", "日本語のテキスト", "🙂👩‍👩‍👧", "a\u00a0b", "1234567890", "x" * 300,
       "</s> <s> <unk> <0x0A>", "USER: hi ASSISTANT:", "\u200bzero", "İstanbul ﬁ", "end ", "…“quotes”…",
       "\x00\x01", "مرحبا"]


def varied_texts(n: int = 200) -> list[str]:
    """Odd ones, and pieces of this file joined in random order."""
    words = Path(__file__).read_text(encoding="utf-8").split(" ")
    random = np.random.default_rng(0)
    return ODD + [" ".join(random.choice(words, random.integers(1, 30))) for _ in range(n - len(ODD))]


@pytest.fixture(scope="module")
def talker():
    """The model that is exported: the committed one, or CKPT (a larger tokenizer is a harder test)."""
    return os.environ.get("CKPT", str(MICRO))


@needs_llama_cpp
@torch.no_grad()
def test_llama_cpp_reads_and_says_the_same(talker, tmp_path):
    """F16: 200 strings give the same ids, and five prompts the same 50 greedy tokens."""
    net, path, meta = model.load(talker)
    tokenizer, texts = data.Tokenizer(path), varied_texts()
    questions = ["Who are you?", "Tell me a story.", "There is a small red square on the left. What is on the left?",
                 "What is three plus four?", "Hello! My name is Ada."]
    prompts = [data.render(data.Conversation([data.Turn("user", q)]), meta["template"], tokenizer).tokens
               for q in questions]
    convert.write_gguf(talker, tmp_path / "m.gguf")
    said = bench.llama_cpp(dict(model=str(tmp_path / "m.gguf"), texts=texts, prompts=prompts, max_tokens=50))
    assert said["template"] == convert.jinja(meta["template"])
    for text, ids in zip(texts, said["tokens"]):
        assert ids == tokenizer.encode(text), text
    same = 0
    for prompt, theirs in zip(prompts, said["replies"]):
        own = [i for (i,) in net.generate([prompt], len(theirs), stop=())]
        apart = next((i for i in range(len(own)) if own[i] != theirs[i]), None)
        same += apart is None
        if apart is not None:  # only a tie may be broken in another way: llama.cpp computes in half precision
            logits = net(torch.tensor([prompt + own[:apart]]), last_only=True)[0, -1]
            assert float(logits[own[apart]] - logits[theirs[apart]]) < 0.005, (own, theirs)
    assert len(own) == 50 and same >= 4


@needs_llama_cpp
def test_llama_cpp_renders_the_same_prompt(talker, tmp_path):
    """The chat template's text, tokenised by llama.cpp with </s> as one piece, is what the model was trained on."""
    jinja2 = pytest.importorskip("jinja2")
    tokenizer = data.Tokenizer(model.load(talker)[1])
    convert.write_gguf(talker, tmp_path / "m.gguf")
    spell = jinja2.Template(convert.jinja("vicuna_v1.1")).render
    texts = [spell(messages=[dict(role=role, content=text) for role, text in chat]) for chat in CHATS]
    said = bench.llama_cpp(dict(model=str(tmp_path / "m.gguf"), texts=texts, special=True))
    for chat, ids in zip(CHATS, said["tokens"]):
        ours = data.render(data.Conversation([data.Turn(r, t) for r, t in chat]), "vicuna_v1.1", tokenizer).tokens
        assert [tokenizer.bos, *ids] == ours


@needs_llama_cpp
@pytest.mark.parametrize("quantize", ["q8", "q4"])
def test_llama_cpp_agrees_on_fewer_bits(quantize, talker, tmp_path):
    """The same blocks, other kernels (llama.cpp rounds activations to 8 bits): perplexity within 1 %."""
    net, path, meta = model.load(talker, quantize=quantize)
    tokenizer = data.Tokenizer(path)
    rows = [data.render(bench.answered(item), meta["template"], tokenizer).tokens[:net.config.max_seq_len]
            for item in toy.test_set("scenes", 12)]
    convert.write_gguf(talker, tmp_path / "m.gguf", quantize)
    theirs = sum(sum(nll) for nll in bench.llama_cpp(dict(model=str(tmp_path / "m.gguf"), score=rows))["nll"])
    with torch.no_grad():
        own = sum(float(net.nll(torch.tensor([row]), torch.tensor([row]))[0]) for row in rows)
    count = sum(len(row) - 1 for row in rows)
    assert abs(math.exp((theirs - own) / count) - 1) < 0.01, (theirs / count, own / count)
