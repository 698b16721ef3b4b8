"""Tests of tools/convert.py on random weights in the layouts that the publishers use."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import model
import train_sft
import vision
from tools import checkpoint, convert
from tools.config import UserError

ROOT = Path(__file__).resolve().parent.parent
MICRO = ROOT / "tests" / "micro"  # the committed model that can talk
SHAPE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, norm_eps=1e-5,
             max_seq_len=64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("convert"))


def make_tokenizer(folder: Path) -> data.Tokenizer:
    lines = [t.system for t in data.TEMPLATES.values()] * 9
    return data.train_tokenizer(lines, 320, folder / "tokenizer.model")


@torch.no_grad()
def randomize(net: torch.nn.Module) -> torch.nn.Module:
    for p in net.parameters():
        p.copy_(torch.randn_like(p) * 0.2 + (p.dim() == 1))  # norms, which begin at one, too
    return net.eval()


def random_llama(vocab_size: int, **changes) -> model.LLaMA:
    shape = {**SHAPE, "vocab_size": vocab_size, **changes}
    return randomize(model.LLaMA(model.LLaMAConfig(**shape)))


def random_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (2, 24))


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference, relative to the largest value."""
    assert got.shape == want.shape
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= tolerance, f"off by {error:.1e}"


# -- Hugging Face's folders -----------------------------------------------------------------------

LAYOUTS = {
    "llama1": dict(num_key_value_heads=4),
    "tinyllama": dict(num_key_value_heads=2),
    "one key head": dict(num_key_value_heads=1),
    "tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "vicuna-v0": dict(num_key_value_heads=4, extra_rows=1),
    "vicuna-v1.5-16k": dict(num_key_value_heads=4, rope_scaling=dict(type="linear", factor=4.0)),
    "theta": dict(num_key_value_heads=4, rope_theta=500000.0),
}


def hugging_face(layout: str, folder: Path, tokenizer, pickled=False, shard_size="1GB", old=True,
                 **changes):
    """A random model of transformers', and its folder as it was published. transformers 5 writes
    another config.json and no rotary tables; most folders on the hub are older."""
    transformers = pytest.importorskip("transformers")
    options = dict(LAYOUTS[layout])
    rows = tokenizer.vocab_size + options.pop("extra_rows", 0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                 vocab_size=rows, max_position_embeddings=64, rms_norm_eps=1e-5, **options)
    shape |= changes
    theirs = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)))
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    shutil.copy(tokenizer.path, folder / "tokenizer.model")
    if old:
        shape["vocab_size"] = tokenizer.vocab_size  # Vicuna v0's config.json omits the extra row
        if options["num_key_value_heads"] == 4:
            del shape["num_key_value_heads"]  # LLaMA 1's files are older than grouped queries
        (folder / "config.json").write_text(json.dumps(dict(shape, model_type="llama")))
    if pickled:
        state = convert.open_tensors(folder / "model.safetensors")
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return theirs


@pytest.mark.parametrize("layout, pickled, shard_size, old", [
    *((layout, False, "1GB", True) for layout in LAYOUTS), ("tied", True, "1GB", True),
    ("vicuna-v1.5-16k", False, "60KB", False), ("theta", False, "1GB", False)])
def test_hugging_face(layout, pickled, shard_size, old, tmp_path, tokenizer):
    """Without the permutation of q and k, or with the wrong number of heads for k, the logits are
    unrelated to transformers'."""
    folder = tmp_path / layout
    theirs = hugging_face(layout, folder, tokenizer, pickled, shard_size, old)
    net, path, _ = convert.load(folder)
    ids = random_ids(tokenizer.vocab_size)
    with torch.no_grad():
        assert_close(net(ids), theirs(ids).logits)
    assert data.Tokenizer(path).vocab_size == tokenizer.vocab_size
    if layout == "tied":
        assert net.output.weight is net.tok_embeddings.weight
    assert net.config.max_seq_len == (256 if "16k" in layout else 64)


def test_checkpoint_load_takes_published_folders(tmp_path, tokenizer):
    folder = tmp_path / "vicuna"
    hugging_face("vicuna-v1.5-16k", folder, tokenizer)
    net, path, meta = checkpoint.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert net.cos.dtype == torch.float32, "bfloat16 cannot tell angles apart"
    assert meta["template"] == "vicuna_v1.1" and meta["config"]["rope_scaling"] == 4
    assert path == folder / "tokenizer.model"
    assert checkpoint.peek(folder)[0] == net.config


def test_training_starts_from_a_published_folder(tmp_path, tokenizer):
    """One step of fine-tuning gives a folder of ours, with the tokenizer in it."""
    folder = tmp_path / "llama" / "7B"
    meta_folder(folder, random_llama(tokenizer.vocab_size), tokenizer, 2)
    said = tmp_path / "said.json"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    said.write_text(json.dumps([dict(conversations=turns)] * 4))
    train_sft.main(train_sft.SFTConfig(
        data=str(said), init=str(folder), out=str(tmp_path / "out"), steps=1, seq_len=512,
        batch_size=2, device="cpu", dtype="float32"))
    net, path, meta = checkpoint.load(tmp_path / "out" / "said")
    assert meta["template"] == "vicuna_v1.1"
    assert path.read_bytes() == tokenizer.path.read_bytes()
    assert net.config.n_kv_heads == 2 and net.config.max_seq_len == 2048


def test_padding_rows_are_not_decoded(tokenizer):
    """Vicuna v0 can generate row 32,000, which has no piece: SentencePiece raised IndexError."""
    ids = tokenizer.encode("A chat")
    assert tokenizer.decode([*ids, tokenizer.vocab_size]) == tokenizer.decode(ids) == "A chat"


# -- Meta's folders -------------------------------------------------------------------------------

def meta_folder(folder: Path, net: model.LLaMA, tokenizer, shards: int) -> None:
    """As tensor parallelism cuts a model: wo, w2 and the embedding by columns, other matrices by
    rows, norms in every shard, and the rotary table. LLaMA 1's vocab_size is -1."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer.path, folder.parent / "tokenizer.model")
    c = net.config
    params = dict(dim=c.dim, multiple_of=32, n_heads=c.n_heads, n_layers=c.n_layers,
                  norm_eps=c.norm_eps, vocab_size=-1)
    if c.n_kv_heads != c.n_heads:
        params["n_kv_heads"] = c.n_kv_heads
    (folder / "params.json").write_text(json.dumps(params))
    for i in range(shards):
        part = {"rope.freqs": torch.ones(8)}
        for name, p in net.state_dict().items():
            by_columns = any(s in name for s in ("wo", "w2", "tok_embeddings"))
            pieces = [p] * shards if p.dim() == 1 else p.chunk(shards, 1 if by_columns else 0)
            part[name] = pieces[i].clone()
        torch.save(part, folder / f"consolidated.{i:02d}.pth")


@pytest.mark.parametrize("shards, kv_heads", [(1, 4), (2, 4), (2, 2)])
def test_meta(shards, kv_heads, tmp_path, tokenizer):
    net = random_llama(tokenizer.vocab_size, n_kv_heads=kv_heads)
    meta_folder(tmp_path / "7B", net, tokenizer, shards)
    loaded, path, _ = convert.load(tmp_path / "7B")
    ids = random_ids(tokenizer.vocab_size)
    assert torch.equal(loaded(ids), net(ids))
    assert path == tmp_path / "tokenizer.model"
    expected = {**SHAPE, "n_kv_heads": kv_heads, "max_seq_len": 2048}
    assert loaded.config == model.LLaMAConfig(**expected, vocab_size=tokenizer.vocab_size)


# -- bad files: one line that names the file and says what to do ----------------------------------

class Bomb:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


def edit_bin(folder: Path, remove: str = "", **added) -> None:
    state = torch.load(folder / "pytorch_model.bin")
    state.pop(remove, None)
    torch.save({**state, **added}, folder / "pytorch_model.bin")


def edit_config(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:file.stat().st_size * 6 // 10])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976576152\n"
Q = "layers.1.self_attn.q_proj.weight"
BAD = {  # what is wrong: (layout, what is done to the folder, words of the message)
    "cut off": ("safe", lambda d: cut(d / "model.safetensors"),
                "model.safetensors cut off again"),
    "LFS pointer": ("safe", lambda d: (d / "model.safetensors").write_text(LFS),
                    "model.safetensors Git-LFS git lfs pull"),
    "web page": ("bin", lambda d: (d / "pytorch_model.bin").write_text("<!DOCTYPE html><p>Quota"),
                 "pytorch_model.bin web page again"),
    "code": ("bin", lambda d: torch.save({"a": Bomb()}, d / "pytorch_model.bin"),
             "pytorch_model.bin run system refused"),
    "missing shard": ("shards", lambda d: next(d.glob("*-00002-of-*")).unlink(), "-00002-of-"),
    "no weights": ("safe", lambda d: (d / "model.safetensors").unlink(), "neither download"),
    "no tokenizer": ("safe", lambda d: (d / "tokenizer.model").unlink(), "tokenizer.model"),
    "broken config": ("safe", lambda d: cut(d / "config.json"), "config.json damaged again"),
    "missing tensor": ("bin", lambda d: edit_bin(d, remove="model." + Q), f"{Q} missing"),
    "unknown tensor": ("bin", lambda d: edit_bin(d, **{"model.norm.bias": torch.ones(1)}),
                       "norm.bias no place another architecture"),
    "wrong shape": ("bin", lambda d: edit_bin(d, **{"model." + Q: torch.ones(8, 64)}),
                    "layers.1.attention.wq (8, 64) (64, 64)"),
    "adapter": ("safe", lambda d: (d / "config.json").rename(d / "adapter_config.json"),
                "LoRA adapter merged"),
    "architecture": ("safe", lambda d: edit_config(d, model_type="mistral"), "mistral LLaMA"),
    "rope": ("safe", lambda d: edit_config(d, rope_scaling=dict(rope_type="yarn")), "RoPE yarn"),
    "quantized": ("safe", lambda d: edit_config(d, quantization_config={}), "--quantize=q4"),
    "another model's tokenizer": ("safe", lambda d: shutil.copy(MICRO / "tokenizer.model", d),
                                  "512 pieces another model"),
    "half of Meta's shards": ("meta", lambda d: (d / "consolidated.01.pth").unlink(),
                              "consolidated.01.pth"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files(what, tmp_path, tokenizer, capfd):
    layout, damage, words = BAD[what]
    folder = tmp_path / "m"
    if layout == "meta":
        meta_folder(folder, random_llama(tokenizer.vocab_size), tokenizer, 2)
    else:
        shard_size = "60KB" if layout == "shards" else "1GB"
        hugging_face("llama1", folder, tokenizer, layout == "bin", shard_size)
    damage(folder)
    with pytest.raises((UserError, OSError)) as error:  # both are printed as one line
        checkpoint.load(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    for part in words.split():
        assert part in message, f"{part!r} is not in: {message}"
    assert "never run" not in capfd.readouterr().out


# -- python -m tools.convert check ----------------------------------------------------------------

def test_check_finds_wrong_weights(tmp_path):
    """Weights that were never loaded; q and k permuted once too often."""
    said = tmp_path / "said.json"
    reply = "I am Vicuna, a small language model that was trained from scratch."
    turns = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": reply}]
    said.write_text(json.dumps([dict(conversations=turns)]))
    net, tokenizer, meta = checkpoint.load(MICRO)

    def check() -> dict:
        checkpoint.save(tmp_path / "m", net, meta, tokenizer)
        return convert.check(convert.CheckConfig(str(tmp_path / "m"), str(said)))

    figures = check()
    assert figures["loss"] < figures["permuted"]
    for block in net.layers:
        for w in (block.attention.wq.weight, block.attention.wk.weight):
            w.data = convert.interleave(w.data, net.config.n_heads)
    with pytest.raises(UserError, match="permuted once too often"):
        check()
    randomize(net)
    with pytest.raises(UserError, match="guessing"):
        check()


# -- memory ---------------------------------------------------------------------------------------

LOADS = """
import sys, threading, time
import torch
import model
from tools import checkpoint, convert

def allocated():  # bytes; pages of mapped files do not count: the system can drop them
    status = open("/proc/self/status", encoding="utf-8").read()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def watch():
    while True:
        samples.append(allocated())
        time.sleep(0.001)

model.count_parameters(model.LLaMAConfig())  # torch loads 70 MB when it first uses the meta device
before, samples = allocated(), []
threading.Thread(target=watch, daemon=True).start()
net, _, _ = checkpoint.load(sys.argv[1], dtype=torch.bfloat16)
print((max(samples) - before) / convert.size(net))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("pickled", [False, True])
def test_loading_allocates_the_model_once(pickled, tmp_path, tokenizer):
    """Reading a float32 file first, and converting it to bfloat16 then, would take three times the
    memory of the model."""
    hugging_face("llama1", tmp_path, tokenizer, pickled, hidden_size=1024, intermediate_size=4096)
    command = [sys.executable, "-c", LOADS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout.splitlines()[-1]) < 1.4


# -- MiniGPT-4: the four published files ----------------------------------------------------------

# at the published widths, but shallow, and for images of 28 x 28 pixels
SHALLOW = (
    dict(image_size=28, patch_size=14, dim=1408, n_layers=3, n_heads=16, hidden_dim=6144,
         penultimate=True),
    dict(vision_dim=1408, dim=768, n_layers=3, n_heads=12, hidden_dim=3072, n_queries=32))
TEXT = dict(hidden_size=4096, num_hidden_layers=2, num_attention_heads=32, intermediate_size=256,
            rms_norm_eps=1e-6, max_position_embeddings=512)
OWN, EVA, BLIP2 = "prerained_minigpt4_7b.pth", "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"


def random_blip2(tokenizer):
    """transformers' BLIP-2 with a LLaMA, and the id that marks its image slots."""
    transformers = pytest.importorskip("transformers")
    slot = tokenizer.vocab_size - 1
    config = transformers.Blip2Config(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=tokenizer.vocab_size),
        num_query_tokens=32, image_token_index=slot,
        vision_config=dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=2,
                           num_attention_heads=16, image_size=28, patch_size=14,
                           layer_norm_eps=1e-6),
        qformer_config=dict(hidden_size=768, num_hidden_layers=3, num_attention_heads=12,
                            intermediate_size=3072, encoder_hidden_size=1408,
                            cross_attention_frequency=2, vocab_size=60))
    twin = transformers.Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            is_table = p.dim() < 2 or "embed" in name or "tokens" in name
            scale = 0.5 if is_table else 1.7 / math.sqrt(p.shape[-1])
            p.uniform_(-scale, scale)
            if name.endswith("qkv.bias"):
                p[1408:2816] = 0  # EVA has no bias for k
    twin.vision_model.post_layernorm.eps = 1e-5  # as in BLIP-2; transformers uses the ViT's
    return twin, slot


PUBLISHED_NAMES = {  # transformers' names: EVA's, BLIP-2's and MiniGPT-4's
    "vision_model.post_layernorm": "ln_vision", "vision_model.": "", "encoder.layers": "blocks",
    "layer_norm": "norm", "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj",
    "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "qformer.layernorm": "Qformer.bert.embeddings.LayerNorm",
    "qformer.encoder": "Qformer.bert.encoder", ".attention.attention.": ".attention.self.",
    ".crossattention.attention.": ".crossattention.self.", "language_projection": "llama_proj"}


def published_minigpt4(folder: Path, tokenizer):
    """A random model as the files of EVA, BLIP-2, MiniGPT-4 and Hugging Face, with everything else
    that those files hold. Returns what random_blip2 does."""
    twin, slot = random_blip2(tokenizer)
    eva, blip2, own, llama = {}, {}, {}, {}
    for name, w in twin.state_dict().items():
        name = name.removeprefix("model.")
        for theirs, published in PUBLISHED_NAMES.items():
            name = name.replace(theirs, published)
        if name.startswith("language_model."):
            llama["model." + name.removeprefix("language_model.").removeprefix("model.")] = w
        elif name.startswith("lm_head"):
            llama[name] = w
        elif name.startswith("llama_proj"):
            own[name] = w
        elif name.startswith(("Qformer.", "query_tokens", "ln_vision")):
            blip2[name] = w
        elif name.endswith("qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            eva[stem + "q_bias"], eva[stem + "v_bias"] = w[:1408].clone(), w[2816:].clone()
        else:
            eva[name] = w
    # what else those files hold: EVA's last block and head, BLIP-2's projection to T5, ...
    eva |= {n.replace("blocks.1", "blocks.2"): w for n, w in eva.items() if "blocks.1" in n}
    eva |= {"norm.weight": torch.ones(1408), "head.weight": torch.ones(2, 1408)}
    positions = {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    blip2 |= {"t5_proj.weight": torch.ones(8, 768), "t5_proj.bias": torch.ones(8), **positions}
    (folder / "vicuna").mkdir(parents=True)
    shutil.copy(tokenizer.path, folder / "vicuna" / "tokenizer.model")
    config = dict(TEXT, model_type="llama", vocab_size=tokenizer.vocab_size)
    (folder / "vicuna" / "config.json").write_text(json.dumps(config))
    torch.save(llama, folder / "vicuna" / "pytorch_model.bin")
    torch.save(eva, folder / EVA)
    torch.save({"model": blip2}, folder / BLIP2)
    torch.save({"model": {**own, **positions}, "optimizer": {"state": {}}, "scaler": None,
                "config": {"run": {"lr": 3e-5}}, "epoch": 4}, folder / OWN)
    return twin, slot


@pytest.fixture(scope="module")
def minigpt4(tmp_path_factory, tokenizer):
    """The folder, transformers' twin, its image slot."""
    folder = tmp_path_factory.mktemp("minigpt4") / "m"
    return folder, *published_minigpt4(folder, tokenizer)


@pytest.fixture
def shallow(monkeypatch):
    monkeypatch.setitem(vision.PRESETS, "minigpt4", SHALLOW)


def test_minigpt4(minigpt4, shallow):
    """All keys of all four files are accounted for, and the logits of a text with an image equal
    transformers'."""
    folder, twin, slot = minigpt4
    net, path, meta = convert.load_minigpt4(folder)
    pixels = torch.randn(1, 3, 28, 28)
    ids = torch.tensor([[1, 5, *[slot] * 32, 8, 9, 10]])
    ours = ids.masked_fill(ids == slot, model.IMAGE_SLOT)
    with torch.no_grad():
        want = twin(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        got, without = net(ours, pixels), net(ours, torch.zeros_like(pixels))
    assert_close(got, want)
    assert not torch.allclose(got, without, rtol=1e-2), "the image makes no difference"
    assert path.parent.name == "vicuna" and not net.training and meta["template"] == "minigpt4"


def test_describe_an_image_with_published_files(minigpt4, shallow, tmp_path):
    import sample
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    said = sample.main(sample.SampleConfig(
        ckpt=str(minigpt4[0]), image=str(tmp_path / "red.png"), quantize="q4",
        prompt="What is this?", max_new_tokens=4))
    assert said["rounds"] == 1


def test_stage_1_starts_from_published_files(minigpt4, shallow, tmp_path):
    """One step; the result is loaded with the files that it depends on."""
    import train_vlm
    folder = minigpt4[0]
    album = tmp_path / "album"
    album.mkdir()
    Image.new("RGB", (40, 30), "blue").save(album / "a.png")
    captions = [dict(image="a.png", caption="a blue field")] * 2
    (album / "captions.json").write_text(json.dumps(captions))
    done = train_vlm.main(train_vlm.VLMConfig(
        recipe="published", init=str(folder / "vicuna"), vision=str(folder), stage="1", steps=1,
        images=str(album), out=str(tmp_path / "out"), batch_size=2, device="cpu", dtype="float32"))
    net, _, _ = convert.load_minigpt4(folder)
    again, _, _ = vision.load(done["folder"])
    for part in ("vit", "qformer", "llama"):
        expected = getattr(net, part).state_dict()
        for name, w in getattr(again, part).state_dict().items():
            assert torch.equal(w, expected[name]), f"{part} {name}"


@pytest.mark.parametrize("file, remove, added, words", [
    (OWN, "", {"llama_proj.weight": (5120, 768)}, "5120 4096"),  # 13B's
    (EVA, "", {"blocks.0.rope": (1,)}, "blocks.0.rope no place"),
    (BLIP2, "query_tokens", {}, "query_tokens missing")])
def test_minigpt4_with_wrong_files(file, remove, added, words, minigpt4, shallow, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(minigpt4[0], folder, copy_function=os.link)
    content = torch.load(folder / file)
    state = content.get("model", content)
    state.pop(remove, None)
    state.update({name: torch.ones(shape) for name, shape in added.items()})
    (folder / file).unlink()  # the link only
    torch.save(content, folder / file)
    with pytest.raises(UserError) as error:
        convert.load_minigpt4(folder)
    for word in (file, *words.split()):
        assert word in str(error.value)


def test_published_sizes():
    """Names and sizes of the real files, from their listings: EVA's 985,894,528 weights in 511
    tensors, BLIP-2's download of 413.19 MiB."""
    vit_shape, qformer_shape = vision.PRESETS["minigpt4"]
    with torch.device("meta"):
        vit = vision.ViT(vision.ViTConfig(**vit_shape))
        qformer = vision.QFormer(vision.QFormerConfig(**qformer_shape))
    eva = {name: tuple(p.shape) for name, p in vit.state_dict().items()}
    assert len(eva) == 511 and sum(map(math.prod, eva.values())) == 985_894_528
    assert eva["pos_embed"] == (1, 257, 1408) and eva["blocks.0.mlp.fc1.weight"] == (6144, 1408)
    assert eva["blocks.38.attn.qkv.weight"] == (4224, 1408)
    assert "blocks.39.norm1.weight" not in eva
    blip2 = {convert.blip2_name(name): p.shape for name, p in qformer.state_dict().items()}
    others = 512 * 8 + (4096 * 768 + 4096) * 4  # position_ids (int64), the projection to T5
    mebibytes = (4 * sum(map(math.prod, blip2.values())) + others) / 2 ** 20
    assert round(mebibytes, 2) == 413.19
    layer = "Qformer.bert.encoder.layer."
    assert blip2[layer + "10.crossattention.self.key.weight"] == (768, 1408)
    assert layer + "11.crossattention.self.key.bias" not in blip2
    parts = ["intermediate_query.dense", "output_query.dense", "output_query.LayerNorm"]
    for kind in ("attention", "crossattention"):
        parts += [f"{kind}.self.{x}" for x in ("query", "key", "value")]
        parts += [f"{kind}.output.{x}" for x in ("dense", "LayerNorm")]
    stems = ["ln_vision", "Qformer.bert.embeddings.LayerNorm", *(layer + "L." + x for x in parts)]
    expected = {f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias")}
    assert {re.sub(r"\d+", "L", name) for name in blip2} == {"query_tokens", *expected}
