"""Tests of tools/convert.py on random weights in the layouts that the publishers use."""

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import model
import train_sft
import train_vlm
import vision
from conftest import ROOT
from ranks import Ranks
from test_checkpoint import Malicious
from test_model import close
from test_vision import QFORMER, VIT, hf_weights
from tools import checkpoint, convert, quantize
from tools.config import UserError
from tools.quantize import QuantLinear

MICRO = ROOT / "tests" / "micro"  # the committed model that can talk
TOKENIZER = data.Tokenizer(MICRO / "tokenizer.model")
SHAPE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, norm_eps=1e-5,
             max_seq_len=64)


@torch.no_grad()
def randomize(net: torch.nn.Module) -> torch.nn.Module:
    for p in net.parameters():
        p.copy_(torch.randn_like(p) * 0.2 + (p.dim() == 1))  # norms, which begin at one, too
    return net.eval()


def random_llama(**changes) -> model.LLaMA:
    shape = {**SHAPE, "vocab_size": TOKENIZER.vocab_size, **changes}
    return randomize(model.LLaMA(model.LLaMAConfig(**shape)))


def random_ids() -> torch.Tensor:
    return torch.randint(3, TOKENIZER.vocab_size, (2, 24))


# -- Hugging Face's folders -----------------------------------------------------------------------

LAYOUTS = {
    "llama1": dict(num_key_value_heads=4),
    "tinyllama": dict(num_key_value_heads=2),
    "tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "vicuna-v0": dict(num_key_value_heads=4, extra_rows=1),
    "vicuna-v1.5-16k": dict(num_key_value_heads=4, rope_scaling=dict(type="linear", factor=4.0)),
    "theta": dict(num_key_value_heads=4, rope_theta=500000.0),
}


def hugging_face(layout: str, folder: Path, pickled=False, shard_size="1GB", old=True,
                 **changes):
    """A random model of transformers', and its folder as it was published. transformers 5 writes
    another config.json and no rotary tables; most folders on the hub are older."""
    transformers = pytest.importorskip("transformers")
    options = dict(LAYOUTS[layout])
    rows = TOKENIZER.vocab_size + options.pop("extra_rows", 0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                 vocab_size=rows, max_position_embeddings=64, rms_norm_eps=1e-5, **options)
    shape |= changes
    theirs = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)))
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    shutil.copy(TOKENIZER.path, folder / "tokenizer.model")
    if old:
        shape["vocab_size"] = TOKENIZER.vocab_size  # Vicuna v0's config.json omits the extra row
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
def test_hugging_face(layout, pickled, shard_size, old, tmp_path):
    """Without the permutation of q and k, or with the wrong number of heads for k, the logits are
    unrelated to transformers'."""
    folder = tmp_path / layout
    theirs = hugging_face(layout, folder, pickled, shard_size, old)
    net, path, meta = checkpoint.load(folder)
    ids = random_ids()
    with torch.no_grad():
        close(net(ids), theirs(ids).logits, "logits differ from transformers'")
    assert path == folder / "tokenizer.model"
    assert meta["template"] == ("vicuna_v1.1" if "vicuna" in layout else "plain")
    assert net.config.max_seq_len == (256 if "16k" in layout else 64)
    half = checkpoint.load(folder, dtype=torch.bfloat16)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.cos.dtype == torch.float32, "bfloat16 cannot tell angles apart"
    for loaded in (net, half):
        tied = loaded.output.weight is loaded.tok_embeddings.weight
        assert tied == (layout == "tied")


def test_training_starts_from_a_published_folder(tmp_path):
    """One step of fine-tuning gives a folder of ours, with the tokenizer in it."""
    folder, chats = tmp_path / "llama" / "7B", tmp_path / "chats.json"
    meta_folder(folder, random_llama(), 2)
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    chats.write_text(json.dumps([dict(conversations=turns)] * 4))
    train_sft.main(train_sft.SFTConfig(
        data=str(chats), init=str(folder), out=str(tmp_path / "out"), steps=1, seq_len=256,
        batch_size=2, device="cpu", dtype="float32"))
    net, path, meta = checkpoint.load(tmp_path / "out" / "chats")
    assert meta["template"] == "vicuna_v1.1"
    assert path.read_bytes() == TOKENIZER.path.read_bytes()
    assert net.config == checkpoint.peek(folder)[0]


def test_padding_rows_are_not_decoded():
    """Vicuna v0 can generate row 32,000, which has no piece: SentencePiece raised IndexError."""
    ids = TOKENIZER.encode("A chat")
    assert TOKENIZER.decode([*ids, TOKENIZER.vocab_size]) == TOKENIZER.decode(ids) == "A chat"


# -- Meta's folders -------------------------------------------------------------------------------

def meta_folder(folder: Path, net: model.LLaMA, shards: int) -> None:
    """As tensor parallelism cuts a model: wo, w2 and the embedding by columns, other matrices by
    rows, norms in every shard, and the rotary table. LLaMA 1's vocab_size is -1."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOKENIZER.path, folder.parent / "tokenizer.model")
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


@pytest.mark.parametrize("shards, kv_heads", [(1, 4), (2, 2)])
def test_meta(shards, kv_heads, tmp_path):
    """Without its last shard, a model of half the size must not come out."""
    net = random_llama(n_kv_heads=kv_heads, max_seq_len=2048)
    meta_folder(tmp_path / "7B", net, shards)
    loaded, path, _ = convert.load(tmp_path / "7B")
    ids = random_ids()
    assert torch.equal(loaded(ids), net(ids))
    assert loaded.config == net.config
    assert path == tmp_path / "tokenizer.model"
    last = f"consolidated.{shards - 1:02d}.pth"
    (tmp_path / "7B" / last).unlink()
    with pytest.raises(FileNotFoundError, match=last):
        convert.load(tmp_path / "7B")


# -- bad files: one line that names the file ------------------------------------------------------

def edit_weights(folder: Path, remove: str = "", **added) -> None:
    state = torch.load(folder / "pytorch_model.bin")
    state.pop(remove, None)
    torch.save({**state, **added}, folder / "pytorch_model.bin")


def edit_config(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:file.stat().st_size * 6 // 10])


def write(folder: Path, **files) -> None:
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}{% endfor %}"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976576152\n"
Q = "model.layers.1.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"
BAD = {  # what is wrong: (what is done to the folder, words of the message)
    "cut off": (lambda d: cut(d / "pytorch_model.bin"), "cut off"),
    "LFS pointer": (lambda d: (d / "pytorch_model.bin").write_text(LFS), "git lfs pull"),
    "code": (lambda d: edit_weights(d, evil=Malicious(d / "was here")), "refused"),
    "missing tensor": (lambda d: edit_weights(d, remove=Q), "q_proj.weight is missing"),
    "unknown tensor": (lambda d: edit_weights(d, bias=torch.ones(1)), "bias has no place"),
    "wrong shape": (lambda d: edit_weights(d, **{Q: torch.ones(8, 64)}), "wq.weight is (8, 64)"),
    "architecture": (lambda d: edit_config(d, model_type="mistral"), "mistral"),
    "rope": (lambda d: edit_config(d, rope_scaling=dict(rope_type="yarn")), "yarn"),
    "tokenizer": (lambda d: edit_weights(d, **{EMBED: torch.ones(500, 64)}), "of another model"),
    "only tokenizer.json": (lambda d: (d / "tokenizer.model").unlink(), "no tokenizer.model"),
    "a missing shard": (lambda d: lose_shard(d), "is missing; download all files"),
    # fine-tunes that would be read, and would chat, wrongly
    "added token": (lambda d: write(d, added_tokens__json={"<|im_end|>": 1024}), "<|im_end|>"),
    "token of a new tokenizer": (lambda d: write(d, tokenizer_config__json=dict(
        added_tokens_decoder={"1024": dict(content="<|im_start|>")})), "<|im_start|>"),
    "token in place of a piece": (lambda d: write(d, tokenizer__json=dict(
        added_tokens=[dict(id=1, content="<s>"), dict(id=500, content="<sep>")])), "<sep>"),
    "end": (lambda d: write(d, generation_config__json=dict(eos_token_id=[2, 13])), "token 13"),
    "chat template": (lambda d: write(d, tokenizer_config__json=dict(chat_template=TEMPLATE)),
                      "its chat template"),
    "a template that raises": (lambda d: (d / "chat_template.jinja").write_text(
        "{{ messages[0].nothing.at.all }}"), "its chat template"),
    # sizes that would build a network forever, or fill the memory with a table
    "layers": (lambda d: edit_config(d, num_hidden_layers=10 ** 6), "1000000 layers"),
    "width": (lambda d: edit_config(d, hidden_size=2 ** 19), "524288"),
    "feed-forward": (lambda d: edit_config(d, intermediate_size=10 ** 15), "hidden_dim"),
    "no heads": (lambda d: edit_config(d, num_attention_heads=0), "n_heads is 0"),
    "heads of k": (lambda d: edit_config(d, num_key_value_heads=-2), "n_kv_heads is -2"),
    "context": (lambda d: edit_config(d, max_position_embeddings=10 ** 12), "max_seq_len"),
    "factor": (lambda d: edit_config(d, rope_scaling=dict(type="linear", factor=1e9)),
               "RoPE scaling by"),
    "text for a number": (lambda d: edit_config(d, hidden_size="64"), "dim is 64"),
    "a list": (lambda d: write(d, config__json=[1]), "damaged"),
    "a pipe": (lambda d: replace_by_pipe(d / "pytorch_model.bin"), "not a regular file"),
}


def save_in_old_format(file: Path) -> None:
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)


def leave_index(folder: Path) -> None:
    index = dict(metadata={}, weight_map={EMBED: "pytorch_model-00001-of-00007.bin"})
    write(folder, pytorch_model__bin__index__json=index, model__safetensors__index__json=index)


def split_without_index(folder: Path) -> None:
    state = torch.load(folder / "pytorch_model.bin")
    for i, names in enumerate((list(state)[:9], list(state)[9:]), 1):
        shard = {name: state[name] for name in names}
        torch.save(shard, folder / f"pytorch_model-0000{i}-of-00002.bin")
    (folder / "pytorch_model.bin").unlink()


def lose_shard(folder: Path) -> None:
    split_without_index(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


GOOD = {  # what may be in a folder: what is done to it
    "a file from before torch 1.6": lambda d: save_in_old_format(d / "pytorch_model.bin"),
    "an index of another download": leave_index,
    "shards without an index": split_without_index,
    "padding": lambda d: write(d, added_tokens__json={"[PAD]": 1024}),
    "known tokens": lambda d: write(d, tokenizer_config__json=dict(
        added_tokens_decoder={"2": dict(content="</s>")}, chat_template=None)),
    "LLaMA 1's wrong end": lambda d: write(d, generation_config__json=dict(eos_token_id=1)),
}


@pytest.mark.parametrize("what", GOOD)
def test_folders_that_people_have(what, tmp_path):
    """All but the padding were refused, the file as damaged."""
    hugging_face("llama1", tmp_path, pickled=True)
    ids, before = random_ids(), checkpoint.load(tmp_path)[0]
    want = before(ids).clone()
    del before
    GOOD[what](tmp_path)
    assert torch.equal(checkpoint.load(tmp_path)[0](ids), want)


VICUNA = """{{ bos_token }}
{%- set given = messages[0].role == 'system' %}
{%- set rounds = messages[1:] if given else messages %}
{{- messages[0].content if given else SYSTEM }} {% for m in rounds %}
    {%- if m.role == 'user' %}USER: {{ m.content }} ASSISTANT:
    {%- else %} {{ m.content }}{{ eos_token }}{% endif %}
{%- endfor %}""".replace("SYSTEM", json.dumps(data.TEMPLATES["vicuna_v1.1"].system))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_like_one_of_ours(file, tmp_path):
    """It was refused, whatever it said. Another space would be another token."""
    hugging_face("llama1", tmp_path, pickled=True)

    def write_template(text: str) -> None:
        text = json.dumps(dict(chat_template=text)) if file.endswith(".json") else text
        (tmp_path / file).write_text(text, encoding="utf-8")

    write_template(VICUNA)
    assert checkpoint.peek(tmp_path)[2]["template"] == "vicuna_v1.1"
    write_template(quantize.jinja("koala"))
    assert checkpoint.peek(tmp_path)[2]["template"] == "koala"
    for old, new in ((" ASSISTANT", "\nASSISTANT"), ("A chat", "The chat")):
        write_template(VICUNA.replace(old, new))
        with pytest.raises(UserError, match="not like any of ours"):
            checkpoint.peek(tmp_path)


@pytest.mark.parametrize("told, factor, context", [
    (4096, 4.0, 16384), (2048, 8.0, 16384), (16384, 4.0, 16384), (8192, 2.0, 8192),
    (8192, None, 8192)])
def test_context_of_scaled_positions(told, factor, context, tmp_path):
    """Vicuna's 16k says 4,096 and a factor of 4, Chinese-Alpaca-2's 16,384 and the same factor,
    which became 65,536 positions."""
    hugging_face("llama1", tmp_path, max_position_embeddings=told)
    if factor:
        edit_config(tmp_path, rope_scaling=dict(type="linear", factor=factor))
    config = checkpoint.peek(tmp_path)[0]
    assert config.max_seq_len == context and config.rope_scaling == (factor or 1)


@pytest.mark.parametrize("change", [dict(n_layers=10 ** 6), dict(dim=2 ** 19), dict(n_heads=None),
                                    dict(max_seq_len=10 ** 12), dict(n_kv_heads=0)])
def test_absurd_sizes_of_metas(change, tmp_path):
    meta_folder(tmp_path / "7B", random_llama(), 1)
    file = tmp_path / "7B" / "params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match="params.json"):
        checkpoint.load(tmp_path / "7B")


@pytest.mark.parametrize("what", BAD)
def test_bad_files(what, tmp_path):
    damage, words = BAD[what]
    hugging_face("llama1", tmp_path, pickled=True)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path)
    message = str(error.value)
    assert words in message and str(tmp_path) in message and "\n" not in message
    with pytest.raises(UserError):  # a file with matrices of other sizes than it says
        quantize.write_gguf(tmp_path, tmp_path / "m.gguf")
    assert not (tmp_path / "was here").exists()


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
    net.norm.weight.data.fill_(1e38)  # the weights are finite, the loss is not
    with pytest.raises(UserError, match="guessing"):
        check()
    # No comparison with NaN is true, so no check failed; and only this row holds it.
    net.tok_embeddings.weight.data[-1, -1] = float("nan")
    with pytest.raises(UserError, match="tok_embeddings.weight holds NaN"):
        check()


# -- memory ---------------------------------------------------------------------------------------

def peak_of_loading(folder: Path) -> float:
    """Bytes that loading allocates at most / bytes of the model. Pages of mapped files do not
    count: the system can drop them."""
    def allocated() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    def watch():
        while True:
            samples.append(allocated())
            time.sleep(0.001)

    model.count_parameters(model.LLaMAConfig())  # torch allocates 70 MB for the meta device
    before, samples = allocated(), []
    threading.Thread(target=watch, daemon=True).start()
    net, _, _ = checkpoint.load(folder, dtype=torch.bfloat16)
    return (max(samples) - before) / convert.size(net)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("pickled", [False, True])
def test_loading_allocates_the_model_once(pickled, tmp_path):
    """Reading a float32 file first, and converting it to bfloat16 then, would take three times the
    memory of the model."""
    hugging_face("llama1", tmp_path, pickled, hidden_size=1024, intermediate_size=4096)
    (peak,) = Ranks(1, peak_of_loading, tmp_path).answers()
    assert 0.9 < peak < 1.4


# -- MiniGPT-4: the four published files ----------------------------------------------------------

OWN, EVA, BLIP2 = "prerained_minigpt4_7b.pth", "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"


@pytest.fixture
def minigpt4(tmp_path, monkeypatch):
    """The folder of a small random MiniGPT-4 in the files of EVA, BLIP-2, MiniGPT-4 and Hugging
    Face, with everything else that those files hold; and the network."""
    monkeypatch.setitem(vision.PRESETS, "minigpt4", (VIT, QFORMER))
    llama = random_llama(dim=32, n_kv_heads=4, max_seq_len=512)
    vit = randomize(vision.ViT(vision.ViTConfig(**VIT)))
    qformer = randomize(vision.QFormer(vision.QFormerConfig(**QFORMER)))
    net = vision.MiniGPT4(llama, vit, qformer).eval()
    eva, blip2, own, language = vit.state_dict(), {}, {}, {}
    for name, w in hf_weights(net).items():  # by transformers' names
        name = name.replace("vision_model.post_layernorm", "ln_vision")
        name = name.replace("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm")
        name = name.replace("qformer.encoder", "Qformer.bert.encoder")
        name = name.replace("attention.attention", "attention.self")
        if name.startswith("language_model."):
            language[name.removeprefix("language_model.")] = w
        elif name.startswith("language_projection."):
            own[name.replace("language_projection", "llama_proj")] = w
        elif not name.startswith("vision_model."):
            blip2[name] = w
    # EVA's last block and head, BLIP-2's projection to T5, a buffer
    eva |= {name.replace("blocks.2", "blocks.3"): w for name, w in eva.items()}
    eva |= {"norm.weight": torch.ones(32), "head.weight": torch.ones(2, 32)}
    positions = {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    blip2 |= {"t5_proj.weight": torch.ones(8, 24), "t5_proj.bias": torch.ones(8), **positions}
    folder = tmp_path / "minigpt4"
    (folder / "vicuna").mkdir(parents=True)
    shutil.copy(TOKENIZER.path, folder / "vicuna")
    config = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                  rms_norm_eps=1e-5, max_position_embeddings=512, model_type="llama")
    (folder / "vicuna" / "config.json").write_text(json.dumps(config))
    torch.save(language, folder / "vicuna" / "pytorch_model.bin")
    torch.save(eva, folder / EVA)
    torch.save({"model": blip2}, folder / BLIP2)
    torch.save({"model": {**own, **positions}, "optimizer": {"state": {}}, "scaler": None,
                "config": {"run": {"lr": 3e-5}}, "epoch": 4}, folder / OWN)
    return folder, net


@torch.no_grad()
def test_minigpt4(minigpt4):
    """All keys of all four files are accounted for. (test_vision.py compares the network with
    transformers' BLIP-2.)"""
    folder, want = minigpt4
    net, path, meta = vision.load(folder)
    assert_same(net, want)
    assert net.llama.config == want.llama.config
    assert path.parent.name == "vicuna" and not net.training and meta["template"] == "minigpt4"
    small = vision.load(folder, quantize="q4")[0]
    assert isinstance(small.llama.output, QuantLinear)
    image, ids = torch.randn(1, 3, 16, 16), torch.tensor([[1, 5, *[model.IMAGE_SLOT] * 5, 8, 9]])
    assert (small(ids, image) - net(ids, image)).norm() < 0.5 * net(ids, image).norm()


def assert_same(net, want) -> None:
    weights = net.state_dict()
    for name, w in want.state_dict().items():
        assert torch.equal(weights[name], w), name


def test_stage_1_starts_from_published_files(minigpt4, tmp_path):
    """One step; the result is loaded with the files that it depends on."""
    folder, net = minigpt4
    album = tmp_path / "album"
    album.mkdir()
    Image.new("RGB", (40, 30), "blue").save(album / "a.png")
    captions = [dict(image="a.png", caption="a blue field")] * 2
    (album / "captions.json").write_text(json.dumps(captions))
    done = train_vlm.main(train_vlm.VLMConfig(
        recipe="published", init=str(folder / "vicuna"), vision=str(folder), stage="1", steps=1,
        images=str(album), out=str(tmp_path / "out"), batch_size=2, device="cpu", dtype="float32"))
    again, _, _ = vision.load(done["folder"])
    for part in ("vit", "qformer", "llama"):
        assert_same(getattr(again, part), getattr(net, part))


def test_another_vit_is_refused(minigpt4):
    folder, _ = minigpt4
    eva = torch.load(folder / EVA)
    torch.save({**eva, "blocks.0.rope": torch.ones(1)}, folder / EVA)
    with pytest.raises(UserError, match=f"{EVA}.*blocks.0.rope has no place"):
        vision.load(folder)


def test_published_sizes():
    """Of the real files, from their listings: EVA's 511 tensors, BLIP-2's download of 413.19 MiB.
    (test_estimate.py counts EVA's weights.)"""
    vit_shape, qformer_shape = vision.PRESETS["minigpt4"]
    with torch.device("meta"):
        vit = vision.ViT(vision.ViTConfig(**vit_shape))
        qformer = vision.QFormer(vision.QFormerConfig(**qformer_shape))
    assert len(vit.state_dict()) == 511
    weights = sum(p.numel() for p in qformer.parameters())
    others = 512 * 8 + (4096 * 768 + 4096) * 4  # position_ids (int64), the projection to T5
    assert round((4 * weights + others) / 2 ** 20, 2) == 413.19
