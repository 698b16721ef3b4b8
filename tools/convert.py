"""Published weights in: Meta's, Hugging Face's, and the four files of MiniGPT-4.

    python -m tools.convert check FOLDER     # were the weights read correctly?

A folder with params.json (Meta's) or config.json (Hugging Face's) is used like a checkpoint of
ours: --ckpt=FOLDER, --init=FOLDER. Files are memory-mapped and converted one tensor at a time, so
loading allocates the finished model and no more. It never executes code from a pickle.
"""

import json
import math
import re
import zipfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from tqdm import tqdm

import data
import model
import vision
from tools import checkpoint
from tools.config import UserError, check_regular, run
from tools.quantize import QuantLinear, block_type, check_range, choose_kernel, jinja, quantize_rows

# -- files: tensors by name -----------------------------------------------------------------------

def open_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of a safetensors or PyTorch file, memory-mapped. Raises UserError for a file
    that is damaged or is something else."""
    check_regular(path)
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch
            return safetensors.torch.load_file(path)
        mmap = zipfile.is_zipfile(path)  # not before torch 1.6
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise  # it names the file
    except ImportError:
        raise UserError(f"{path} needs a library: pip install safetensors") from None
    except Exception as error:  # a damaged file raises almost anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(f"{path} wants to run {code[1]} when it is loaded: refused. Weights "
                            "need no code; use a safetensors version") from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or cut off ({reason}); download it again") from None
    content = content.get("model", content)  # of BLIP-2's and MiniGPT-4's files
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


PREFIX = re.compile(r"^(module\.|llama_model\.|model\.)+")  # added by wrappers
LEFTOVERS = r"rope\.freqs$|rotary_emb\.inv_freq$"  # rotary tables, which we compute


class Tensors(dict):
    """Name -> tensor of one or more files, without the prefixes that wrappers add to names."""

    def __init__(self, *files: Path):
        super().__init__()
        self.where = files[0] if len(files) == 1 else files[0].parent
        for file in files:
            for name, tensor in open_tensors(file).items():
                self[PREFIX.sub("", name)] = tensor

    def __missing__(self, name: str):
        raise UserError(f"{self.where}: tensor {name} is missing; download all files of the model")

    def check_names(self, expected: Collection[str], ignored: str) -> None:
        """Raises UserError unless all expected names are there, and no others except those that
        the regular expression `ignored` finds."""
        for name in expected:
            self[name]
        for name in sorted(self.keys() - set(expected)):
            if not re.search(ignored, name):
                raise UserError(f"{self.where}: tensor {name} has no place in this model: it is "
                                "another architecture, or files of different models are mixed")


def read_json(path: Path) -> dict:
    check_regular(path)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None


def read_optional(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


# -- LLaMA: three layouts of a folder -------------------------------------------------------------

NAMES = {  # Meta's, which is ours: Hugging Face's, llama.cpp's
    "tok_embeddings": ("embed_tokens", "token_embd"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
    "norm": ("norm", "output_norm"),
    "output": ("lm_head", "output"),
}


def split_name(ours: str) -> tuple[str, str]:
    """"layers.3.attention.wq.weight" -> "layers.3.", "attention.wq"."""
    return re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", ours).groups(default="")


def hugging_face_name(ours: str) -> str:
    layer, part = split_name(ours)
    return f"{layer}{NAMES[part][0]}.weight"


def gguf_name(ours: str) -> str:
    layer, part = split_name(ours)
    return layer.replace("layers", "blk") + NAMES[part][1] + ".weight"


def interleave(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """A q or k projection from Hugging Face's row order to Meta's: (H, 2, D/2) -> (H, D/2, 2).

    Theirs rotates channel i of a head together with channel i + D/2, Meta's 2i with 2i + 1.
    """
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def deinterleave(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The inverse of `interleave`."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


class Source(NamedTuple):
    """An opened folder. read(name) returns one tensor in our layout."""
    layout: str
    config: model.LLaMAConfig
    read: Callable[[str], torch.Tensor]
    tokenizer: Path
    meta: dict


def open_folder(folder) -> Source:
    """Recognizes a folder of ours, Meta's or Hugging Face's and checks that all tensors are there,
    without reading them. Raises UserError for anything missing, damaged or not supported."""
    folder = checkpoint.find(folder)
    if (folder / "meta.json").exists():
        source = open_ours(folder)
    elif (folder / "params.json").exists():
        source = open_meta(folder)
    elif (folder / "config.json").exists():
        source = open_hugging_face(folder)
    else:
        raise UserError(f"{folder} is no language model; a LoRA adapter must be merged into its "
                        "base model first")
    if not source.tokenizer.exists():
        raise UserError(f"{folder} has no tokenizer.model (a tokenizer.json is not read); download "
                        "the one of its base model")
    tokenizer = data.Tokenizer(source.tokenizer)
    unsupported = why_other_chat(folder, tokenizer)
    if unsupported:
        raise UserError(f"{folder}: {unsupported} is not supported")
    source.meta["template"] = same_template(folder) or source.meta["template"]
    pieces, rows = tokenizer.vocab_size, source.config.vocab_size
    # Vicuna v0 has one row more than its tokenizer has pieces, other models have a few more.
    if rows < pieces or (source.layout != "ours" and rows >= pieces + 1024):
        raise UserError(f"{source.tokenizer} has {pieces} pieces, but the model has {rows} rows: "
                        "it is the tokenizer of another model")
    return source


def check_sizes(file: Path, sizes: dict, weights: Tensors) -> None:
    """Raises UserError for sizes that are not these weights', before anything is built with them.
    `sizes` are arguments of LLaMAConfig."""
    for name, size in sizes.items():
        if not (isinstance(size, int) and 0 < size <= 1 << 20):
            raise UserError(f"{file}: {name} is {size}, and not between 1 and {1 << 20}")
    dim, n_layers = sizes["dim"], sizes["n_layers"]
    last = [name for name in weights if name.startswith(f"layers.{n_layers - 1}.")]
    if len(weights["norm.weight"]) != dim or not last:
        raise UserError(f"{file}: the weights are not those of {n_layers} layers of {dim}")


def why_other_chat(folder: Path, tokenizer: data.Tokenizer) -> str | None:
    """What a folder says about chats that tokenizer.model and our templates cannot do, or None."""
    settings = read_optional(folder / "tokenizer_config.json")
    added = {i: text for text, i in read_optional(folder / "added_tokens.json").items()}
    added |= {int(i): t["content"] for i, t in settings.get("added_tokens_decoder", {}).items()}
    listed = read_optional(folder / "tokenizer.json").get("added_tokens", [])
    added |= {token["id"]: token["content"] for token in listed}
    for i, text in added.items():
        known = i < tokenizer.vocab_size and tokenizer.sp.id_to_piece(i) == text
        if text and not known and "pad" not in text.lower():  # padding is never read
            return f"the added token {text}"
    for name in ("config.json", "generation_config.json"):
        ends = read_optional(folder / name).get("eos_token_id")
        for end in ends if isinstance(ends, list) else [ends]:
            # The first conversions of LLaMA say 1, or 0, and mean 2.
            if end not in (None, -1, tokenizer.unk, tokenizer.bos, tokenizer.eos):
                return f"token {end} as the end of a reply"
    return None


def same_template(folder: Path) -> str | None:
    """The name of our template that writes conversations like the folder's own chat template, or
    None if it brings none. Raises UserError for one that is not like any of ours."""
    own = read_optional(folder / "tokenizer_config.json").get("chat_template")
    if (folder / "chat_template.jinja").exists():
        own = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not own:
        return None
    try:
        theirs = spell_chats(own)
    except Exception:  # any code may be in it; jinja2's sandbox runs it
        theirs = None
    for name in data.TEMPLATES:
        if spell_chats(jinja(name)) == theirs:
            return name
    raise UserError(f"{folder}: its chat template is not like any of ours; remove it, to use one "
                    "of ours")


def spell_chats(template: str) -> list[str]:
    """What a Jinja template makes of a short chat, with and without a system prompt."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # torch requires jinja2
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    chat = [dict(role="system", content="Be brief."), dict(role="user", content="Hi!"),
            dict(role="assistant", content="Hello."), dict(role="user", content="Who are you?")]
    special = dict(bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    texts = []
    for messages in (chat, chat[1:]):
        text = environment.from_string(template).render(messages=messages, **special)
        texts.append(text.removeprefix("<s>"))
    return texts


def open_ours(folder: Path) -> Source:
    meta = checkpoint.read_meta(folder)
    weights = checkpoint.read(folder / "model.pt", mmap=True)
    config = model.LLaMAConfig(**meta["config"])
    return Source("ours", config, weights.__getitem__, folder / "tokenizer.model", meta)


def open_meta(folder: Path) -> Source:
    """Each shard has a slice of every matrix, cut for tensor parallelism, and all norms."""
    params = {"max_seq_len": 2048, **read_json(folder / "params.json")}
    sizes = {key: params.get(key) for key in ("dim", "n_layers", "n_heads", "max_seq_len")}
    sizes["n_kv_heads"] = params.get("n_kv_heads", sizes["n_heads"])

    def open_shard(i: int) -> Tensors:
        return Tensors(folder / f"consolidated.{i:02d}.pth")

    first = open_shard(0)
    check_sizes(folder / "params.json", sizes, first)
    n_shards = len(first["norm.weight"]) // len(first["layers.0.attention.wq.weight"])
    shards = [first] + [open_shard(i) for i in range(1, n_shards)]
    config = model.LLaMAConfig(
        **sizes, norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=params.get("rope_theta", 10000.0),
        vocab_size=len(first["output.weight"]) * n_shards,  # params.json may say -1
        hidden_dim=len(first["layers.0.feed_forward.w1.weight"]) * n_shards)
    for shard in shards:
        shard.check_names(llama_shapes(config), LEFTOVERS)

    def read(name: str) -> torch.Tensor:
        if "norm" in name:
            return first[name]
        by_columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
        return torch.cat([shard[name] for shard in shards], dim=1 if by_columns else 0)

    tokenizer = folder / "tokenizer.model"
    if not tokenizer.exists():  # Meta's download has one for all sizes
        tokenizer = folder.parent / "tokenizer.model"
    meta = dict(template=guess_template(folder.resolve().name, config))
    return Source("Meta's", config, read, tokenizer, meta)


def open_hugging_face(folder: Path) -> Source:
    c = read_json(folder / "config.json")
    # rope_parameters is transformers 5's name of rope_scaling
    rope = {"factor": 0, **(c.get("rope_parameters") or {}), **(c.get("rope_scaling") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = float(rope["factor"]) if rope_type == "linear" else 1.0
    unsupported = why_unsupported(c, rope_type, scaling)
    if unsupported:
        raise UserError(f"{folder / 'config.json'}: {unsupported} is not supported; LLaMA 1 and 2 "
                        "and their fine-tunes (Vicuna, TinyLlama) are")
    weights = Tensors(*hugging_face_files(folder))
    n_heads, length = c.get("num_attention_heads"), c.get("max_position_embeddings", 2048)
    sizes = dict(
        dim=c.get("hidden_size"), n_layers=c.get("num_hidden_layers"), n_heads=n_heads,
        n_kv_heads=c.get("num_key_value_heads") or n_heads, hidden_dim=c.get("intermediate_size"),
        max_seq_len=rope.get("original_max_position_embeddings", length))
    check_sizes(folder / "config.json", sizes, weights)
    if sizes["max_seq_len"] <= 4096:  # LLaMA 2's; a longer one was multiplied already
        sizes["max_seq_len"] = int(sizes["max_seq_len"] * scaling)
    config = model.LLaMAConfig(
        **sizes, vocab_size=len(weights["embed_tokens.weight"]),  # Vicuna v0's says one less
        norm_eps=c.get("rms_norm_eps", 1e-6), tied=c.get("tie_word_embeddings", False),
        rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)), rope_scaling=scaling)
    shapes = llama_shapes(config)
    theirs = {name: hugging_face_name(name) for name in shapes}
    ignored = LEFTOVERS
    if config.tied:
        theirs["output.weight"] = theirs["tok_embeddings.weight"]
        ignored += "|^lm_head"  # some files hold the matrix twice
    weights.check_names(theirs.values(), ignored)

    def read(name: str) -> torch.Tensor:
        weight = weights[theirs[name]]
        check_shape(folder, name, weight, shapes[name])
        if name.endswith("wq.weight"):
            return interleave(weight, config.n_heads)
        if name.endswith("wk.weight"):
            return interleave(weight, config.n_kv_heads)
        return weight

    name = folder.resolve().name + c.get("_name_or_path", "")
    meta = dict(template=guess_template(name, config))
    return Source("Hugging Face's", config, read, folder / "tokenizer.model", meta)


def why_unsupported(c: dict, rope_type: str, scaling: float) -> str | None:
    """What in a config.json would give wrong results here, or None."""
    if c.get("model_type") != "llama":
        return f"architecture {c.get('model_type')}"
    if rope_type not in ("default", "linear"):
        return f"RoPE scaling {rope_type}"
    if not 1 <= scaling <= 256:
        return f"RoPE scaling by {scaling}"
    if "quantization_config" in c:
        return "a quantized checkpoint (use the float16 version with --quantize=q4)"
    return None


def hugging_face_files(folder: Path) -> list[Path]:
    """One file, or all shards; safetensors are preferred to pickles. The index of shards is not
    read: it may be missing or of another download, and Tensors notices a missing shard."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if (folder / f"{stem}{suffix}").exists():
            return [folder / f"{stem}{suffix}"]
        shards = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
        if shards:
            return shards
    raise UserError(f"{folder} has config.json, but neither model.safetensors nor "
                    "pytorch_model.bin; download the weights")


def llama_shapes(config: model.LLaMAConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: w.shape for name, w in model.LLaMA(config).state_dict().items()}


def check_shape(where, name: str, weight: torch.Tensor, needed: torch.Size) -> None:
    if weight.shape != needed:
        raise UserError(f"{where}: {name} is {tuple(weight.shape)}, but this model needs "
                        f"{tuple(needed)}: files of different models are mixed")


def guess_template(name: str, config: model.LLaMAConfig) -> str:
    """The chat template, guessed from the model's name: the files do not say it."""
    if "vicuna" in name.lower():
        return "vicuna_v0" if config.vocab_size == 32001 else "vicuna_v1.1"
    for known in ("alpaca", "koala"):
        if known in name.lower():
            return known
    return "plain"


def load(folder, dtype: torch.dtype | None = torch.float32, device: str = "cpu",
         quantize: str = "") -> tuple[nn.Module, Path, dict]:
    """Returns what checkpoint.load does, for any of the layouts and for MiniGPT-4's files.

    dtype None is bfloat16 from a billion parameters up. With quantize "q8" or "q4", matrices stay
    in llama.cpp's blocks.
    """
    if any(Path(folder).glob(EVA)):
        return load_minigpt4(folder, dtype, device, quantize)
    source = open_folder(folder)
    config, meta = source.config, source.meta
    if dtype is None:
        dtype = torch.bfloat16 if model.count_parameters(config) > 1e9 else torch.float32
    fast = False
    if quantize:
        fast, kernel = choose_kernel(device)
        if device == "cpu" and not (fast and "AVX512" in torch.backends.cpu.get_cpu_capability()):
            kernel += ("; llama.cpp is faster on this CPU: python -m tools.quantize "
                       f"--ckpt={folder} --type={quantize}")
        print(f"{quantize}: {kernel}")
    with torch.device("meta"):  # allocates nothing
        net = model.LLaMA(config)
    load_weights(net, source.read, folder, dtype, device, quantize, fast)
    if not quantize:
        net.tie()
    net.cos, net.sin = net.cos.to(device), net.sin.to(device)
    if source.layout != "ours" or quantize:
        print(f"{folder}: layout {source.layout}, {size(net) / 1e9:.2f} GB, "
              f"context {config.max_seq_len}, template {meta['template']}")
    return net.eval(), source.tokenizer, {**meta, "config": asdict(config)}


def load_weights(net: nn.Module, read: Callable, where, dtype: torch.dtype, device: str = "cpu",
                 quantize: str = "", fast: bool = False) -> None:
    """Gives a network on the meta device its weights, one tensor at a time. With `quantize`, all
    linear layers become QuantLinear."""
    shapes = {name: p.shape for name, p in net.state_dict().items()}
    state = {}
    for name in tqdm(shapes, desc=f"reading {where}", leave=False, delay=1):
        weight = read(name)
        check_shape(where, name, weight, shapes[name])
        kind = block_type(name, weight.shape, quantize)
        if kind.startswith("Q") and name != "tok_embeddings.weight":
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            check_range(f"{where}: {name}", weight, kind)
            layer = QuantLinear(quantize_rows(weight, kind), kind, fast)
            setattr(net.get_submodule(parent), child, layer.to(device))
        else:
            state[name] = weight.to(device, dtype, copy=True)
    net.load_state_dict(state, assign=True)


def size(net: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once."""
    tensors = [*net.parameters(), *net.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


# -- MiniGPT-4: EVA's file, BLIP-2's, and its own -------------------------------------------------

EVA = "eva_vit_g*.pth"
BLIP2 = "blip2_pretrained*.pth"
MINIGPT4 = "*rained_minigpt4*.pth"  # the file for 7B is called "prerained"
BLIP2_NAMES = {  # patterns in our names: BLIP-2's, replaced in this order
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
# the projection into T5 or OPT; the text branch and the heads of BLIP-2's first stage
BLIP2_LEFTOVERS = (
    r"^(t5|opt|llm)_proj\.|position_ids$|^(vision_proj|text_proj|itm_head)\.|^temp$"
    r"|^Qformer\.(cls\.|bert\.embeddings\.(word|position)_embeddings\.)"
    r"|^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.")
MINIGPT4_LEFTOVERS = r"position_ids$|inv_freq$"  # buffers


def blip2_name(ours: str) -> str:
    for pattern, theirs in BLIP2_NAMES.items():
        ours = re.sub(pattern, theirs, ours)
    return ours


def only_file(folder, pattern: str) -> Path:
    found = sorted(Path(folder).glob(pattern))
    if len(found) != 1:
        raise UserError(f"{folder} must hold exactly one {pattern}, but has {len(found)}")
    return found[0]


def load_part(net: nn.Module, file: Path, theirs: Callable[[str], str], ignored: str,
              dtype: torch.dtype, device: str) -> None:
    """Gives a network the weights of a file, which calls them theirs(our name)."""
    weights = Tensors(file)
    weights.check_names([theirs(name) for name in net.state_dict()], ignored)
    load_weights(net, lambda name: weights[theirs(name)], file, dtype, device)


def load_encoder(folder, dtype: torch.dtype = torch.float32,
                 device: str = "cpu") -> tuple[vision.ViT, vision.QFormer]:
    """EVA's ViT-g without its last block, whose output BLIP-2 does not use; and BLIP-2's Q-Former
    with its queries and the norm before it, in float32 as published."""
    eva, blip2 = only_file(folder, EVA), only_file(folder, BLIP2)
    vit_shape, qformer_shape = vision.PRESETS["minigpt4"]
    with torch.device("meta"):
        vit = vision.ViT(vision.ViTConfig(**vit_shape))
        qformer = vision.QFormer(vision.QFormerConfig(**qformer_shape))
    eva_leftovers = rf"^blocks\.{vit.config.n_layers - 1}\.|^(norm|fc_norm|head)\."
    load_part(vit, eva, lambda name: name, eva_leftovers, dtype, device)
    load_part(qformer, blip2, blip2_name, BLIP2_LEFTOVERS, torch.float32, device)
    return vit.eval(), qformer.eval()


def load_minigpt4(folder, dtype: torch.dtype | None = torch.float32, device: str = "cpu",
                  quantize: str = "") -> tuple[vision.MiniGPT4, Path, dict]:
    """Returns what checkpoint.load does, from a folder with four downloads: eva_vit_g.pth,
    blip2_pretrained_flant5xxl.pth, pretrained_minigpt4.pth, and the language model's folder."""
    own = only_file(folder, MINIGPT4)
    llama_folder = only_file(folder, "*/config.json").parent
    llama, tokenizer, meta = load(llama_folder, dtype, device, quantize)
    vit, qformer = load_encoder(folder, llama.tok_embeddings.weight.dtype, device)
    net = vision.MiniGPT4(llama, vit, qformer)
    load_part(net.llama_proj, own, lambda name: f"llama_proj.{name}", MINIGPT4_LEFTOVERS,
              torch.float32, device)
    return net.eval(), tokenizer, {**meta, "template": "minigpt4"}


# -- python -m tools.convert check ----------------------------------------------------------------

def rows_of(path, template: str, tokenizer: data.Tokenizer, length: int) -> data.Rows:
    """A file as rows of `length` tokens. All of a text is scored; of conversations, the replies."""
    if data.kind_of(path) in ("text", "documents"):
        text = "\n".join(data.load_documents(path))
        return data.windows(data.encode_text(text, tokenizer), length, tokenizer.bos)
    conversations = data.load_conversations(path)
    return data.pack([data.render(c, template, tokenizer) for c in conversations], length)


@dataclass
class CheckConfig:
    ckpt: str  # a folder of ours, Meta's or Hugging Face's
    data: str = ""  # text or conversations like its training data; a passage of Alice by default


ALICE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do: once or twice she had peeped into the book her sister was reading, but it had "
    "no pictures or conversations in it.")


@torch.inference_mode()
def check(cfg: CheckConfig) -> dict:
    """Are the weights read right? Compares the loss on a few rows with three that must be worse: of
    guessing, with q and k permuted once more, and with the permutation undone. Raises UserError if
    one of them is not."""
    net, path, meta = load(cfg.ckpt, None)
    tokenizer = data.Tokenizer(path)
    if cfg.data:
        length = min(512, net.config.max_seq_len)
        rows = rows_of(cfg.data, meta["template"], tokenizer, length)
    else:
        rows = data.windows(data.encode_text(ALICE, tokenizer), 256, tokenizer.bos)
    tokens, labels, segments = rows.batch(0, min(4, len(rows)))

    def loss() -> float:
        total, count = net.nll(tokens, labels, segments=segments)
        return float(total / count)

    def permute(order: Callable) -> None:
        for block in net.layers:
            q, k = block.attention.wq.weight, block.attention.wk.weight
            q.data = order(q.data, net.config.n_heads)
            k.data = order(k.data, net.config.n_kv_heads)

    for name, p in net.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{cfg.ckpt}: {name} holds NaN or infinity")
    as_read, permuted = loss(), []
    for order, inverse in ((interleave, deinterleave), (deinterleave, interleave)):
        permute(order)
        permuted.append(loss())
        permute(inverse)
    guessing = math.log(net.config.vocab_size)
    print(f"{as_read:.2f} nats per token; guessing: {guessing:.2f}; with q and k permuted: "
          f"{min(permuted):.2f}")
    if min(permuted) < min(as_read - 0.2, 0.7 * guessing):
        raise UserError(f"{cfg.ckpt}: q and k were permuted once too often, or never")
    if not as_read <= 0.7 * guessing:  # NaN is not
        raise UserError(f"{cfg.ckpt}: this is little better than guessing; the weights are wrong, "
                        "the tokenizer is another model's, or it never saw such text (--data)")
    return dict(loss=as_read, guessing=guessing, permuted=min(permuted))


if __name__ == "__main__":
    run(None, {"check": (check, CheckConfig)})
