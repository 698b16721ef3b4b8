"""Other people's weights in, ours out to llama.cpp, four bits between.

    python convert.py check FOLDER                      # is it read right? names the classic failures
    python convert.py gguf --ckpt=out/vicuna --type=q4  # a file for llama.cpp

A FOLDER is one of ours, Meta's (params.json), Hugging Face's (config.json), or the four files of MiniGPT-4.
The names that others gave to tensors are in this file and nowhere else. Files are mapped, not read: one
tensor at a time is converted, so that loading needs the memory of the finished model once.

References: the layouts are the publishers' own; GGUF and its blocks are llama.cpp's (ggml/docs/gguf.md).
Letters in the shape comments: N rows (outputs), K columns (inputs) of a matrix, H heads, D head width.
"""

import json
import math
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Literal, NamedTuple, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
import vision
from config import Problem, run

# -- files: tensors by name, mapped from the disk ------------------------------------------------------------

def open_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of a safetensors or PyTorch file. Nothing is read before its use, and no code is run."""
    with open(path, "rb") as f:
        head = f.read(200)
    if head.startswith(b"version https://git-lfs"):
        raise Problem(f"{path} is a Git-LFS pointer, not the weights; run `git lfs pull` in its folder")
    if head.lstrip()[:1] == b"<":
        raise Problem(f"{path} is a web page (a login or a quota notice?), not the weights; fetch it again")
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch
            return safetensors.torch.load_file(path)  # mapped, too
        found = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)  # a zip file, as since 2020
    except ImportError:
        raise Problem(f"{path} takes the library of its format: pip install safetensors") from None
    except Exception as error:  # each library has kinds of its own
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise Problem(f"{path} wants to run {wanted[1]} when it is opened: refused. Weights need no code; "
                          "fetch a safetensors version") from None
        why = " ".join(str(error).split())[:200]
        raise Problem(f"{path} is cut off or damaged ({why}); fetch it again") from None
    for wrapper in ("model", "state_dict", "module"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    found = found if isinstance(found, dict) else {}
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise Problem(f"{path} holds no named tensors; give the file with the weights")
    return tensors


PREFIX = re.compile(r"^(module\.|llama_model\.|base_model\.|model\.)+")  # wrappers leave these in front
# what files hold beside the weights: rotary tables, which we compute
LEFTOVERS = re.compile(r"^rope\.freqs$|rotary_emb\.inv_freq$|attention\.inner_attention\.rope\.freqs$")


class Weights:
    """The tensors of one or several files under their common names. Every name has to be accounted for."""

    def __init__(self, files: list[Path]):
        self.open, self.read = {file: open_tensors(file) for file in files}, 0
        self.home = {PREFIX.sub("", key): (file, key) for file, tensors in self.open.items() for key in tensors}

    def shape(self, name: str) -> tuple:
        file, key = self.home[name]
        return tuple(self.open[file][key].shape)

    def take(self, name: str) -> torch.Tensor:
        """What was read of a mapping counts as our memory until the mapping goes: made anew after every 16 MB."""
        file, key = self.home[name]
        if self.read > 2 ** 24:
            self.open, self.read = {}, 0  # the old mappings go first
        if file not in self.open:
            self.open[file] = open_tensors(file)
        tensor = self.open[file][key]
        self.read += tensor.nbytes
        return tensor

    def account(self, wanted: list[str], leftovers: re.Pattern, where) -> None:
        """Raises Problem unless exactly the wanted names are there, and nothing unknown besides."""
        lora = [name for name in self.home if "lora_" in name]
        if lora:
            raise Problem(f"{where} is a LoRA adapter ({lora[0]}), not a model; merge it into its base first")
        missing = [name for name in wanted if name not in self.home]
        if missing:
            raise Problem(f"{where}: {len(missing)} of {len(wanted)} tensors are missing, such as "
                          f"{missing[0]}; fetch all files of the model")
        unknown = sorted(name for name in self.home.keys() - set(wanted) if not leftovers.search(name))
        if unknown:
            raise Problem(f"{where} holds {len(unknown)} tensors that have no place in this model, such as "
                          f"{unknown[0]}: another architecture, or files of different models")


# -- LLaMA: three layouts of a folder ------------------------------------------------------------------------

NAMES = {  # ours and Meta's: (Hugging Face's, GGUF's)
    "tok_embeddings": ("embed_tokens", "token_embd"),
    "layers.N.attention_norm": ("layers.N.input_layernorm", "blk.N.attn_norm"),
    "layers.N.attention.wq": ("layers.N.self_attn.q_proj", "blk.N.attn_q"),
    "layers.N.attention.wk": ("layers.N.self_attn.k_proj", "blk.N.attn_k"),
    "layers.N.attention.wv": ("layers.N.self_attn.v_proj", "blk.N.attn_v"),
    "layers.N.attention.wo": ("layers.N.self_attn.o_proj", "blk.N.attn_output"),
    "layers.N.ffn_norm": ("layers.N.post_attention_layernorm", "blk.N.ffn_norm"),
    "layers.N.feed_forward.w1": ("layers.N.mlp.gate_proj", "blk.N.ffn_gate"),
    "layers.N.feed_forward.w2": ("layers.N.mlp.down_proj", "blk.N.ffn_down"),
    "layers.N.feed_forward.w3": ("layers.N.mlp.up_proj", "blk.N.ffn_up"),
    "norm": ("norm", "output_norm"),
    "output": ("lm_head", "output"),
}


def their_name(ours: str, column: int) -> str:
    """"layers.3.attention.wq.weight" in Hugging Face's (column 0) or GGUF's (1) words."""
    number = re.search(r"\.(\d+)\.", ours)
    stem = re.sub(r"\.\d+\.", ".N.", ours.removesuffix(".weight"))
    return NAMES[stem][column].replace("N", number[1] if number else "") + ".weight"


def interleave(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of a Hugging Face q or k projection, halves (H, 2, D/2), in the order of pairs (H, D/2, 2)."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def deinterleave(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Back again."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


class Source(NamedTuple):
    """A folder that was understood. fetch(our name) reads one tensor, in our layout."""
    layout: str
    config: model.LLaMAConfig
    fetch: Callable[[str], torch.Tensor]
    tokenizer: Path
    meta: dict


def open_folder(folder) -> Source:
    """Recognises our folder, Meta's and Hugging Face's, accounts for every tensor, reads no weights."""
    folder = model.find(folder)
    layouts = {"meta.json": _ours, "params.json": _meta, "config.json": _hugging_face}
    mark = next((name for name in layouts if (folder / name).exists()), None)
    if mark is None and (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path", "its base")
        raise Problem(f"{folder} is a LoRA adapter, not a model; merge it into {base} first")
    if mark is None:
        raise Problem(f"{folder} has neither meta.json (ours), params.json (Meta's) nor config.json")
    try:
        source = layouts[mark](folder)
    except KeyError as error:
        raise Problem(f"{folder / mark} does not say {error}; fetch it again") from None
    pieces, rows = data.Tokenizer(source.tokenizer).vocab_size, source.config.vocab_size
    extra = rows - pieces  # Vicuna v0 has one row more than pieces, others a few
    if extra < 0 or (source.layout != "ours" and extra >= 1024):
        raise Problem(f"{source.tokenizer} has {pieces} pieces but the model {rows} rows: the tokenizer of "
                      "another model")
    return source


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Problem(f"{path} is damaged ({error}); fetch it again") from None


def wanted_names(config: model.LLaMAConfig) -> list[str]:
    with torch.device("meta"):
        return list(model.LLaMA(config).state_dict())


def _ours(folder: Path) -> Source:
    meta = model.read_meta(folder)
    config = model.LLaMAConfig(**meta["config"])
    model.read(folder / "model.pt", mmap=True)  # for its checksums
    weights = Weights([folder / "model.pt"])
    weights.account(wanted_names(config), LEFTOVERS, folder)
    return Source("ours", config, weights.take, folder / "tokenizer.model", meta)


def _meta(folder: Path) -> Source:
    """Each shard holds a slice of every matrix, as tensor parallelism cut them; norms are in all of them."""
    params = read_json(folder / "params.json")
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise Problem(f"{folder} has params.json, but no consolidated.00.pth; fetch the weights")
    expected = [folder / f"consolidated.{i:02d}.pth" for i in range(len(files))]
    absent = next((e.name for e in expected if e not in files), None)
    shards = [Weights([file]) for file in files]
    shards[0].account(["tok_embeddings.weight"], re.compile(""), files[0])
    heads = params["n_heads"]
    norm, wq, wk, w1 = (shards[0].shape(f"layers.0.{part}.weight") for part in
                        ("attention_norm", "attention.wq", "attention.wk", "feed_forward.w1"))
    needed = max(1, norm[0] // wq[0])
    if absent or norm[0] != params["dim"] or needed != len(files):
        raise Problem(f"{folder}: {files[0].name} is one of {needed} shards of a model of width {norm[0]}, "
                      f"there are {len(files)} and params.json says dim {params['dim']}; fetch "
                      + (absent or f"consolidated.00.pth to consolidated.{needed - 1:02d}.pth of one model"))
    config = model.LLaMAConfig(
        dim=norm[0], n_layers=params["n_layers"], n_heads=heads, hidden_dim=w1[0] * needed,
        n_kv_heads=wk[0] * needed * heads // norm[0], vocab_size=shards[0].shape("output.weight")[0] * needed,
        norm_eps=params["norm_eps"], rope_theta=params.get("rope_theta", 10000.0),
        max_seq_len=params.get("max_seq_len", 2048))
    if params.get("use_scaled_rope"):
        raise Problem(f"{folder}: LLaMA 3.1's rope scaling is not supported; LLaMA 1 and 2 are")
    for shard, file in zip(shards, files):
        shard.account(wanted_names(config), LEFTOVERS, file)

    def fetch(name: str) -> torch.Tensor:
        if "norm" in name:
            return shards[0].take(name)
        by_columns = name.split(".")[-2] in ("wo", "w2", "tok_embeddings")
        return torch.cat([shard.take(name) for shard in shards], dim=1 if by_columns else 0)

    # Meta's download puts the tokenizer beside the sizes' folders
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.exists():
        tokenizer = folder.parent / "tokenizer.model"
    return Source("Meta's", config, fetch, tokenizer, dict(template=guess_template(folder, "", config)))


def _hugging_face(folder: Path) -> Source:
    c = read_json(folder / "config.json")

    def refuse(what: str) -> None:
        raise Problem(f"{folder / 'config.json'}: {what} is not supported here; LLaMA 1 and 2 and what was "
                      "made of them (Vicuna, TinyLlama) are")

    if c.get("model_type") != "llama":
        refuse(f"the architecture {c.get('model_type')}")
    if "quantization_config" in c:
        raise Problem(f"{folder} is quantised already; fetch the float16 version and give --quantize=q4 here")
    rope = {**(c.get("rope_parameters") or {}), **(c.get("rope_scaling") or {})}  # newer and older spelling
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        refuse(f"rope scaling {kind!r}")
    if c.get("attention_bias") or c.get("mlp_bias"):
        refuse("a projection with bias")
    if c.get("hidden_act", "silu") != "silu":
        refuse(f"the activation {c['hidden_act']}")
    dim, heads = c["hidden_size"], c["num_attention_heads"]
    if (c.get("head_dim") or dim // heads) * heads != dim:
        refuse(f"head_dim {c['head_dim']} with {heads} heads in width {dim}")
    weights = Weights(hugging_face_files(folder))
    scaling = float(rope["factor"]) if kind == "linear" else 1.0
    tied = c.get("tie_word_embeddings", False)
    weights.account(["embed_tokens.weight"], re.compile(""), folder)
    config = model.LLaMAConfig(
        dim=dim, n_layers=c["num_hidden_layers"], n_heads=heads, n_kv_heads=c.get("num_key_value_heads"),
        vocab_size=weights.shape("embed_tokens.weight")[0],  # config.json's may be another, as Vicuna v0's
        hidden_dim=c["intermediate_size"], norm_eps=c["rms_norm_eps"], tied=tied, rope_scaling=scaling,
        rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
        max_seq_len=c.get("max_sequence_length") or int(c.get("max_position_embeddings", 2048) * scaling))
    theirs = {name: their_name(name, 0) for name in wanted_names(config)}
    if tied:
        theirs["output.weight"] = theirs["tok_embeddings.weight"]
    duplicate = "|^lm_head" if tied else ""
    weights.account(list(dict.fromkeys(theirs.values())), re.compile(LEFTOVERS.pattern + duplicate), folder)

    def fetch(name: str) -> torch.Tensor:
        weight = weights.take(theirs[name])
        if name.endswith(("wq.weight", "wk.weight")):
            return interleave(weight, config.n_heads if "wq" in name else config.n_kv_heads)
        return weight

    meta = dict(template=guess_template(folder, c.get("_name_or_path", ""), config))
    return Source("Hugging Face's", config, fetch, folder / "tokenizer.model", meta)


def hugging_face_files(folder: Path) -> list[Path]:
    """The files of the weights: one, or those that the index names; safetensors before pickles."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            files = [folder / f for f in sorted(set(read_json(index)["weight_map"].values()))]
            absent = [f.name for f in files if not f.exists()]
            if absent:
                raise Problem(f"{folder}: {len(absent)} of {len(files)} shards are missing, such as "
                              f"{absent[0]}; fetch them")
            return files
        if (folder / name).exists():
            return [folder / name]
    raise Problem(f"{folder} has config.json, but neither model.safetensors nor pytorch_model.bin; fetch the "
                  "weights")


def guess_template(folder: Path, name: str, config: model.LLaMAConfig) -> str:
    """Weights do not say how they were trained to talk; their names do, and Vicuna v0 by its extra row."""
    name = (folder.resolve().name + name).lower()
    if "vicuna" in name:
        return "vicuna_v0" if config.vocab_size == 32001 else "vicuna_v1.1"
    return next((known for known in ("alpaca", "koala") if known in name), "plain")


def load(folder, dtype: Optional[torch.dtype] = torch.float32, device: str = "cpu",
         quantize: Optional[str] = None) -> tuple[nn.Module, Path, dict]:
    """Model, path of its tokenizer.model, and meta, as model.load returns them; from any of the layouts.

    dtype None: bfloat16 from 1 B parameters up. quantize "q8" or "q4": matrices in llama.cpp's blocks."""
    if any(Path(folder).glob(EVA)):
        return load_minigpt4(folder, dtype, device, quantize)
    source = open_folder(folder)
    c, count = source.config, model.count(source.config)
    dtype = dtype or (torch.bfloat16 if count > 1e9 else torch.float32)
    with torch.device("meta"):
        net = model.LLaMA(c)
    fast, reason = choose_kernel(device) if quantize else (False, "")
    fill(net, source.fetch, folder, dtype, device, quantize, fast)
    if not quantize:
        net.tie()
    net.cos, net.sin = net.cos.to(device), net.sin.to(device)
    if source.layout != "ours" or quantize:
        kept = f"{quantize}; {reason}" if quantize else str(dtype)[6:]
        print(f"{folder}: {source.layout} layout, {count / 1e6:,.1f} M parameters in "
              f"{size(net) / 1e9:.2f} GB ({kept}), context {c.max_seq_len}, template {source.meta['template']}")
    return net.eval(), source.tokenizer, {**source.meta, "config": asdict(c)}


def fill(net: nn.Module, fetch: Callable, where, dtype: torch.dtype, device: str = "cpu",
         quantize: Optional[str] = None, fast: bool = False) -> None:
    """Gives a network on the meta device its weights, one after the other."""
    shapes, state = {name: p.shape for name, p in net.state_dict().items()}, {}
    large = sum(s.numel() for s in shapes.values()) > 1e8
    # the largest first, while there is room for what is needed on the way
    order = sorted(shapes, key=lambda name: -shapes[name].numel())
    for name in tqdm(order, desc=f"reading {where}", leave=False, disable=not large):
        weight = fetch(name)
        if weight.shape != shapes[name]:
            raise Problem(f"{where}: {name} is {tuple(weight.shape)}, but this model needs "
                          f"{tuple(shapes[name])}; the files do not belong together")
        kind = block_type(name, weight.shape, quantize)
        if kind.startswith("Q") and name != "tok_embeddings.weight":
            path, _, child = name.removesuffix(".weight").rpartition(".")
            layer = QuantLinear(quantize_rows(weight, kind), kind, fast)
            setattr(net.get_submodule(path), child, layer.to(device))
        else:
            state[name] = weight.to(device, dtype, copy=True)
    net.load_state_dict(state, assign=True)


def size(net: nn.Module) -> int:
    """Bytes of everything that a forward pass reads."""
    return sum({t.data_ptr(): t.nbytes for t in [*net.parameters(), *net.buffers()]}.values())


# -- MiniGPT-4: EVA's file, BLIP-2's, and its own ------------------------------------------------------------

EVA, BLIP2, MINIGPT4 = "eva_vit_g*.pth", "blip2_pretrained*.pth", "*rained_minigpt4*.pth"  # 7B's: "prerained"
BLIP2_NAMES = {  # ours, as a pattern: theirs; applied in this order
    r"^norm\.": "Qformer.bert.embeddings.LayerNorm.",
    r"^layers\.": "Qformer.bert.encoder.layer.",
    r"self_attention\.": "attention.",
    r"cross_attention\.": "crossattention.",
    r"attention\.(query|key|value)\.": r"attention.self.\1.",
    r"attention\.dense\.": "attention.output.dense.",
    r"attention\.norm\.": "attention.output.LayerNorm.",
    r"mlp\.fc1\.": "intermediate_query.dense.",
    r"mlp\.fc2\.": "output_query.dense.",
    r"(layer\.\d+)\.norm\.": r"\1.output_query.LayerNorm.",
}
# what else these files hold: the projection to T5 or OPT; in BLIP-2's stage-1 file the text branch and heads
BLIP2_LEFTOVERS = re.compile(
    r"^(t5|opt|llm)_proj\.|position_ids$|^Qformer\.(cls\.|bert\.embeddings\.(word|position)_embeddings\.)"
    r"|^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."
    r"|^(vision_proj|text_proj|itm_head)\.|^temp$")
MINIGPT4_LEFTOVERS = re.compile(r"position_ids$|inv_freq$")  # buffers that nobody filtered out


def blip2_name(ours: str) -> str:
    for pattern, theirs in BLIP2_NAMES.items():
        ours = re.sub(pattern, theirs, ours)
    return ours


def load_vit(path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> vision.ViT:
    """EVA's ViT-g without its last block: BLIP-2 takes what stands before it."""
    weights = Weights([Path(path)])
    weights.account(["pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"], re.compile(""), path)
    dim, _, patch, _ = weights.shape("patch_embed.proj.weight")
    last = max(int(name.split(".")[1]) for name in weights.home if name.startswith("blocks."))
    grid = math.isqrt(weights.shape("pos_embed")[1] - 1)
    config = vision.ViTConfig(
        image_size=patch * grid, patch_size=patch, dim=dim, n_layers=last + 1, n_heads=dim // 88,
        hidden_dim=weights.shape("blocks.0.mlp.fc1.weight")[0], penultimate=True)
    with torch.device("meta"):
        vit = vision.ViT(config)
    weights.account(list(vit.state_dict()), re.compile(rf"^blocks\.{last}\.|^(norm|fc_norm|head)\."), path)
    fill(vit, weights.take, path, dtype, device)
    return vit.eval()


def load_qformer(path, device: str = "cpu") -> vision.QFormer:
    """BLIP-2's Q-Former, its queries and the norm before it; float32, as published."""
    weights = Weights([Path(path)])
    cross, fc1 = "layers.0.cross_attention.key.weight", "layers.0.mlp.fc1.weight"
    weights.account(["query_tokens", blip2_name(cross), blip2_name(fc1)], re.compile(""), path)
    _, n_queries, dim = weights.shape("query_tokens")
    layers = [int(n) for n in re.findall(r"bert\.encoder\.layer\.(\d+)", " ".join(weights.home))]
    config = vision.QFormerConfig(
        vision_dim=weights.shape(blip2_name(cross))[1], dim=dim, n_layers=max(layers) + 1, n_heads=dim // 64,
        hidden_dim=weights.shape(blip2_name(fc1))[0], n_queries=n_queries)
    with torch.device("meta"):
        qformer = vision.QFormer(config)
    weights.account([blip2_name(name) for name in qformer.state_dict()], BLIP2_LEFTOVERS, path)
    fill(qformer, lambda name: weights.take(blip2_name(name)), path, torch.float32, device)
    return qformer.eval()


def only(folder: Path, *names: str) -> Path:
    found = sorted(path for name in names for path in folder.glob(name))
    if len(found) != 1:
        raise Problem(f"{folder} holds {len(found) or 'no'} {' or '.join(names)}; exactly one is needed")
    return found[0]


def load_encoder(folder, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[vision.ViT, vision.QFormer]:
    """EVA's file and BLIP-2's, of a folder that holds both under their published names."""
    eva, blip2 = only(Path(folder), EVA), only(Path(folder), BLIP2)
    return load_vit(eva, dtype, device), load_qformer(blip2, device)


def load_minigpt4(folder, dtype: Optional[torch.dtype] = torch.float32, device: str = "cpu",
                  quantize: Optional[str] = None) -> tuple[vision.MiniGPT4, Path, dict]:
    """A folder with the four downloads under their published names: eva_vit_g.pth, pretrained_minigpt4.pth,
    blip2_pretrained_flant5xxl.pth, and the folder of the language model. Returns what model.load does."""
    folder = Path(folder)
    # first: what is missing or does not fit should be known before 13 GB are read
    own, llama_folder = only(folder, MINIGPT4), only(folder, "*/config.json", "*/params.json").parent
    only(folder, EVA), only(folder, BLIP2)
    weights = Weights([own])
    weights.account(["llama_proj.weight", "llama_proj.bias"], MINIGPT4_LEFTOVERS, own)
    width, needed = weights.shape("llama_proj.weight")[0], open_folder(llama_folder).config.dim
    if width != needed:
        raise Problem(f"{own} projects to width {width}, but the language model {llama_folder} has width "
                      f"{needed}: the projections for 7B (4096) and 13B (5120) are different files; fetch "
                      "the other one")
    llama, tokenizer, meta = load(llama_folder, dtype, device, quantize)
    net = vision.MiniGPT4(llama, *load_encoder(folder, llama.tok_embeddings.weight.dtype, device))
    fill(net.llama_proj, lambda name: weights.take(f"llama_proj.{name}"), own, torch.float32, device)
    return net.eval(), tokenizer, {**meta, "template": "minigpt4"}


# -- eight and four bits: llama.cpp's blocks -----------------------------------------------------------------

class BlockType(NamedTuple):
    """32 weights of a row share a scale d, a float16 in front of their codes; or a weight stands alone."""
    weights: int
    bytes: int
    id: int  # in GGUF
    file_type: int  # GGUF's number for a file made mostly of it


BLOCKS = {"F32": BlockType(1, 4, 0, 0), "F16": BlockType(1, 2, 1, 1),
          "Q8_0": BlockType(32, 34, 8, 7), "Q4_0": BlockType(32, 18, 2, 2)}
SLAB = 1024  # rows converted at a time: what is needed on the way stays small


def block_type(name: str, shape: tuple, quantize: Optional[str]) -> str:
    """The one rule of what is stored how, here and in GGUF. Both vocabulary matrices stay at eight bits: they
    are a small part of a large model and matter most."""
    if len(shape) == 1:
        return "F32"
    if quantize not in ("q8", "q4") or shape[-1] % 32:
        return "F16"
    return "Q8_0" if quantize == "q8" or name in ("tok_embeddings.weight", "output.weight") else "Q4_0"


def quantize_rows(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """(N, K) -> uint8 (N, K/32, bytes), bit for bit llama.cpp's. A slab of rows at a time."""
    encode = encode_q8 if kind == "Q8_0" else encode_q4
    blocks = torch.empty(weight.shape[0], weight.shape[1] // 32, BLOCKS[kind].bytes, dtype=torch.uint8)
    for at in range(0, len(weight), SLAB):
        blocks[at:at + SLAB] = encode(weight[at:at + SLAB].float().unflatten(1, (-1, 32)))
    return blocks


def encode_q8(x: torch.Tensor) -> torch.Tensor:
    """x (N, K/32, 32). The largest magnitude becomes 127; halves are rounded away from zero, as C rounds."""
    d = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * torch.where(d == 0, 0, 1 / d)
    whole = scaled.abs().floor()
    codes = (whole + (2 * (scaled.abs() - whole)).floor()) * scaled.sign()
    return torch.cat((d.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)), -1)


def encode_q4(x: torch.Tensor) -> torch.Tensor:
    """The weight of largest magnitude becomes code 0, which means -8 (so d has the opposite sign of it). Byte
    j holds weight j in its low half and weight j + 16 in its high half."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    d = extreme / -8
    codes = (x * torch.where(d == 0, 0, 1 / d) + 8.5).to(torch.uint8).clamp(max=15)
    return torch.cat((d.half().view(torch.uint8), codes[..., :16] | codes[..., 16:] << 4), -1)


def decode(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (N, K/32, bytes) -> codes around zero, int8 (N, K/32, 32), and scales, float16 (N, K/32, 1)."""
    d, codes = blocks[..., :2].contiguous().view(torch.float16), blocks[..., 2:]
    if codes.shape[-1] == 16:
        return torch.cat((codes & 15, codes >> 4), -1).to(torch.int8) - 8, d
    return codes.contiguous().view(torch.int8), d


def dequantize(blocks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    codes, d = decode(blocks)
    return (codes * d.float()).to(dtype).flatten(1)  # (N, K)


class QuantLinear(nn.Module):
    """y = x W^T with W in blocks. Two bodies, as attention has: the readable one makes W anew for every call;
    the fast one is torch's int4 kernel for CPUs: x ((code - 8) * scale + zero)^T in groups of 32.

    Q4_0 is scale = d, zero = 0. Q8_0 fits exactly into two such products: code = 16 * high + low.
    """

    def __init__(self, blocks: torch.Tensor, kind: str, fast: bool = False):
        super().__init__()
        self.kind, self.rows, self.columns, self.fast = kind, blocks.shape[0], blocks.shape[1] * 32, fast
        if not fast:
            self.register_buffer("blocks", blocks, persistent=False)
            return
        for part, slabs in enumerate(zip(*map(pack, blocks.split(SLAB)))):
            codes, scales = zip(*slabs)
            self.register_buffer(f"codes{part}", torch.cat(codes), persistent=False)
            self.register_buffer(f"scales{part}", torch.cat(scales, dim=1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.fast:
            return F.linear(x, dequantize(self.blocks, x.dtype))
        flat = x.reshape(-1, self.columns).bfloat16()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        y = multiply(flat, self.codes0, 32, self.scales0)
        if self.kind == "Q8_0":
            y += multiply(flat, self.codes1, 32, self.scales1)
        return y[:, :self.rows].reshape(*x.shape[:-1], self.rows).to(x.dtype)


def pack(blocks: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What torch's kernel wants of (N, K/32, bytes): codes in its own order, scale and zero in bfloat16
    (K/32, N, 2); once for Q4_0, twice for Q8_0."""
    codes, d = decode(F.pad(blocks, (0, 0, 0, 0, 0, -len(blocks) % 16)))  # it takes rows by the sixteen
    halves = [(codes + 8, d, 0 * d)]
    if blocks.shape[-1] == BLOCKS["Q8_0"].bytes:
        low = codes & 15
        halves = [(((codes - low) >> 4) + 8, 16 * d, 0 * d), (low, d, 8 * d)]
    order = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    return [(order(code.flatten(1).int(), 2),
             torch.cat((scale, zero), -1).transpose(0, 1).bfloat16().contiguous())
            for code, scale, zero in halves]


def choose_kernel(device: str = "cpu") -> tuple[bool, str]:
    """Whether torch's int4 kernel is there and right on this machine, by trying, and a line that says so."""
    random, why = torch.Generator().manual_seed(0), "is for CPUs"
    blocks = quantize_rows(torch.randn(64, 64, generator=random), "Q4_0")
    x = torch.randn(1, 64, generator=random)
    if str(device).startswith("cpu"):
        try:
            fast, readable = (QuantLinear(blocks, "Q4_0", fast)(x) for fast in (True, False))
            if (fast - readable).norm() < 0.02 * readable.norm():
                return True, "multiplied by torch's int4 kernel"
            why = "is wrong on this machine"
        except (AttributeError, RuntimeError) as error:  # torch is older than 2.6, or was built without it
            why = f"fails ({str(error).splitlines()[0]})"
    return False, f"blocks unpacked for every use: torch's int4 kernel {why}"


# -- GGUF: for llama.cpp -------------------------------------------------------------------------------------

def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value) -> bytes:
    """A typed value of GGUF's header. A list has the type of its first element."""
    if isinstance(value, list):
        return struct.pack("<I", 9) + _value(value[0])[:4] + struct.pack("<Q", len(value)) + b"".join(
            _value(v)[4:] for v in value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    number, form = {bool: (7, "<?"), np.int32: (5, "<i"), int: (4, "<I"), float: (6, "<f")}[type(value)]
    return struct.pack("<I", number) + struct.pack(form, value)


def jinja(name: str) -> str:
    """A template of data.py in the language that llama.cpp, transformers and others read. The <s> is left to
    llama.cpp, which adds it."""
    t = data.get_template(name)
    before, after = t.ask.split("{text}")
    system, between, start, before, after, end, space = map(json.dumps, (
        t.system, t.between, t.start, before, after, t.end or "</s>", "" if t.glued else " "))
    later = f"{{% else %}}{{{{ {between} }}}}" if t.glued else ""  # between rounds
    return ("{% if messages[0]['role'] == 'system' %}"
            "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
            "{% else %}{% set system = " + system + " %}{% set turns = messages %}{% endif %}"
            "{% for m in turns %}{% if m['role'] == 'assistant' %}"
            "{{ " + space + " + m['content'] + " + end + " }}"
            "{% else %}{% if loop.first %}{% if system %}{{ system + " + between + " }}{% endif %}"
            "{{ " + start + " }}" + later + "{% endif %}"
            "{{ " + before + " + m['content'] + " + after + " }}{% endif %}{% endfor %}")


def header(source: Source, name: str, quantize: Optional[str]) -> dict:
    """Everything but the tensors: the shape of the network, the tokenizer, the chat template."""
    c, sp = source.config, data.Tokenizer(source.tokenizer).sp
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
             for i in range(len(pieces))]
    padding = range(c.vocab_size - len(pieces))  # rows without a piece, such as Vicuna v0's
    keys = {
        "general.architecture": "llama", "general.name": name,
        "general.file_type": BLOCKS[block_type("", (1, 32), quantize)].file_type,
        "llama.vocab_size": c.vocab_size, "llama.context_length": c.max_seq_len,
        "llama.embedding_length": c.dim,
        "llama.block_count": c.n_layers, "llama.feed_forward_length": c.hidden_dim,
        "llama.attention.head_count": c.n_heads, "llama.attention.head_count_kv": c.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "llama.rope.dimension_count": c.head_dim, "llama.rope.freq_base": float(c.rope_theta),
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces + [f"[PAD{i}]" for i in padding],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in range(len(pieces))] + [-10000.0 for _ in padding],
        "tokenizer.ggml.token_type": [np.int32(k) for k in kinds + [5 for _ in padding]],
        "tokenizer.ggml.bos_token_id": sp.bos_id(), "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": jinja(source.meta["template"]),
    }
    if quantize:
        keys["general.quantization_version"] = 2
    if c.rope_scaling != 1:
        keys.update({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(c.rope_scaling)})
    return keys


def write_gguf(folder, path, quantize: Optional[str] = None) -> int:
    """Version 3, little endian: counts, keys, a table of tensors, then their bytes, each aligned to 32.
    Returns the size of the file.

    GGUF keeps q and k in Meta's order, which is ours, so nothing is permuted. One tensor in memory at a time.
    """
    source, path = open_folder(folder), Path(path)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in model.LLaMA(source.config).state_dict().items()}
    if source.config.tied:
        del shapes["output.weight"]  # its absence says so
    keys = header(source, Path(folder).resolve().name, quantize)
    kinds = {name: block_type(name, shape, quantize) for name, shape in shapes.items()}
    table, offset = b"", 0
    for name, shape in shapes.items():
        one = BLOCKS[kinds[name]]
        table += _string(their_name(name, 1)) + struct.pack("<I", len(shape))
        table += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", one.id, offset)
        offset += math.prod(shape) // one.weights * one.bytes
        offset += -offset % 32
    with data.writing(path, "wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(keys)))
        f.write(b"".join(_string(key) + _value(value) for key, value in keys.items()) + table)
        f.write(b"\0" * (-f.tell() % 32))
        for name, kind in tqdm(kinds.items(), desc=f"writing {path}", leave=False, disable=offset < 1e8):
            weight = source.fetch(name)
            plain = dict(F32=torch.float32, F16=torch.float16)
            raw = weight.to(plain[kind]) if kind in plain else quantize_rows(weight, kind)
            f.write(raw.contiguous().numpy().tobytes())
            f.write(b"\0" * (-f.tell() % 32))
    return path.stat().st_size


# -- python convert.py ... -----------------------------------------------------------------------------------

def rows_of(path, template: str, tokenizer: data.Tokenizer, length: int) -> data.Rows:
    """A file in rows of `length` tokens: all of a text is scored, or the replies of conversations."""
    if data.kind_of(path) == "text":
        return data.windows(data.encode_text(data.read_text(path), tokenizer), length, tokenizer.bos)
    return data.pack([data.render(c, template, tokenizer) for c in data.load_conversations(path)], length)


@dataclass
class CheckConfig:
    ckpt: str  # a folder of ours, Meta's or Hugging Face's
    data: str = ""  # text or conversations like what it has read; a bit of Alice in Wonderland when not given


ALICE = ("Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing "
         "to do: once or twice she had peeped into the book her sister was reading, but it had no pictures "
         "or conversations in it.")


@torch.inference_mode()
def check(cfg: CheckConfig) -> dict:
    """Loss on a few rows, against guessing, and against the same weights with q and k in other orders."""
    net, path, meta = load(cfg.ckpt, None)
    tokenizer, c = data.Tokenizer(path), net.config
    if cfg.data:
        rows = rows_of(cfg.data, meta["template"], tokenizer, min(512, c.max_seq_len))
    else:
        rows = data.windows(data.encode_text(ALICE, tokenizer), 256, tokenizer.bos)
    tokens, labels, segments = rows.batch(0, min(4, len(rows)))

    def loss() -> float:
        total, count = net.nll(tokens, labels, segments=segments)
        return float(total / count)

    def turn(reorder: Callable) -> None:
        for attention in (block.attention for block in net.layers):
            attention.wq.weight.data = reorder(attention.wq.weight.data, c.n_heads)
            attention.wk.weight.data = reorder(attention.wk.weight.data, c.n_kv_heads)

    read, guess = loss(), math.log(c.vocab_size)
    turn(interleave)
    other = loss()
    turn(deinterleave)  # as it was
    turn(deinterleave)
    other = min(other, loss())
    print(f"{read:.2f} nats per token; guessing would be {guess:.2f}, q and k in another order {other:.2f}")
    if other < min(read - 0.2, 0.7 * guess):
        raise Problem(f"{cfg.ckpt}: with the rows of q and k in another order the loss is {other:.2f}, "
                      f"not {read:.2f}: whoever converted the weights permuted them once too often, or never")
    if read > 0.7 * guess:
        raise Problem(f"{cfg.ckpt}: a loss of {read:.2f} is little better than guessing ({guess:.2f}): the "
                      "weights are not what they claim, the tokenizer is another model's, or it never read "
                      "such text (--data)")
    print("these weights know the language")
    return dict(loss=read, guessing=guess, permuted=other)


@dataclass
class GGUFConfig:
    ckpt: str = "out/vicuna"  # a folder of ours, Meta's or Hugging Face's
    out: str = ""  # the file; named after the folder when not given
    type: Literal["f16", "q8", "q4"] = "f16"  # of the matrices


def gguf(cfg: GGUFConfig) -> dict:
    path = cfg.out or f"{Path(cfg.ckpt).resolve().name}-{cfg.type}.gguf"
    size_ = write_gguf(cfg.ckpt, path, None if cfg.type == "f16" else cfg.type)
    print(f"{path}: {size_ / 1e6:,.1f} MB. The chat template is in it: llama-cli -m {path} --jinja")
    return dict(path=path, bytes=size_)


if __name__ == "__main__":
    run(None, {"check": (check, CheckConfig), "gguf": (gguf, GGUFConfig)})
