"""Eight and four bits in llama.cpp's blocks, and GGUF files for llama.cpp.

    python -m tools.quantize --ckpt=out/vicuna --type=q4     # writes vicuna-q4.gguf

`--quantize=q8|q4` of the other scripts keeps the matrices of a model in these blocks, or
in the form that torch's kernels for CPUs take (QuantLinear). Format: ggml's docs/gguf.md and
ggml-quants.c.

Letters in the shape comments: N rows (outputs) and K columns (inputs) of a matrix.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
from tools.config import UserError, run

# -- blocks: 32 weights of a row with one scale ---------------------------------------------------

class BlockType(NamedTuple):
    weights: int  # in a block
    bytes: int  # of a block: the scale d in float16, then the codes
    id: int  # GGUF's number of this type
    file_type: int  # GGUF's number of a file whose matrices have this type
    largest: float  # magnitude: float16, which the scales have, too, ends at 65,504


BLOCKS = {
    "F32": BlockType(1, 4, 0, 0, torch.finfo(torch.float32).max),
    "F16": BlockType(1, 2, 1, 1, 65504),
    "Q8_0": BlockType(32, 34, 8, 7, 65504 * 127),
    "Q4_0": BlockType(32, 18, 2, 2, 65504 * 8),
}


def block_type(name: str, shape: tuple, quantize: str) -> str:
    """How a tensor is stored, in memory and in GGUF. The embedding and the output matrix always
    get 8 bits: errors there cost most, and in a large model they are a small part."""
    if len(shape) == 1:
        return "F32"
    if not quantize or shape[-1] % 32:
        return "F16"
    if quantize == "q8" or name in ("tok_embeddings.weight", "output.weight"):
        return "Q8_0"
    return "Q4_0"


def check_range(name: str, weight: torch.Tensor, kind: str) -> None:
    """Raises UserError for a weight that would be stored as infinity, and for NaN."""
    low, high = weight.aminmax()
    largest, limit = max(-low.item(), high.item()), BLOCKS[kind].largest
    if not largest <= limit:
        raise UserError(f"{name} has a weight of {largest:g}; {kind} holds at most {limit:g}")


CHUNK = 1024  # rows converted at a time, so that intermediate results stay small


def quantize_rows(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """(N, K) -> uint8 (N, K/32, bytes of a block), equal to llama.cpp's bit for bit."""
    encode = encode_q8 if kind == "Q8_0" else encode_q4
    N, K = weight.shape
    blocks = torch.empty(N, K // 32, BLOCKS[kind].bytes, dtype=torch.uint8)
    for at in range(0, N, CHUNK):
        blocks[at:at + CHUNK] = encode(weight[at:at + CHUNK].float().unflatten(1, (-1, 32)))
    return blocks


def encode_q8(x: torch.Tensor) -> torch.Tensor:
    """x (N, K/32, 32). The largest magnitude of a block becomes code 127 or -127."""
    d = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * torch.where(d == 0, 0, 1 / d)
    # C rounds halves away from zero, torch.round to even
    floor = scaled.abs().floor()
    codes = (floor + (2 * (scaled.abs() - floor)).floor()) * scaled.sign()
    return torch.cat((d.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)), -1)


def encode_q4(x: torch.Tensor) -> torch.Tensor:
    """x (N, K/32, 32). The weight of largest magnitude becomes code 0, which stands for -8, so d
    has the opposite sign. Byte j holds weight j in its low half and weight j + 16 in its high half.
    """
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    d = extreme / -8
    codes = (x * torch.where(d == 0, 0, 1 / d) + 8.5).to(torch.uint8).clamp(max=15)
    return torch.cat((d.half().view(torch.uint8), codes[..., :16] | codes[..., 16:] << 4), -1)


def decode(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed codes, int8 (N, K/32, 32), and scales, float16 (N, K/32, 1)."""
    d, codes = blocks[..., :2].contiguous().view(torch.float16), blocks[..., 2:]
    if codes.shape[-1] == 16:  # Q4_0
        return torch.cat((codes & 15, codes >> 4), -1).to(torch.int8) - 8, d
    return codes.contiguous().view(torch.int8), d


def dequantize(blocks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Blocks -> (N, K)."""
    codes, d = decode(blocks)
    return (codes * d.float()).to(dtype).flatten(1)


# -- a linear layer on blocks ---------------------------------------------------------------------

class QuantLinear(nn.Module):
    """y = x W^T with W (N, K) in blocks.

    The readable body unpacks W in every call. The fast one calls torch's kernels for CPUs. The one
    for four bits computes x ((code - 8) * scale + zero)^T with a scale and a zero for 32 weights,
    as Q4_0 has. The one for eight bits has one scale per row, so Q8_0 is rounded once more.
    """

    def __init__(self, blocks: torch.Tensor, kind: str, fast: bool = False):
        super().__init__()
        self.kind, self.fast = kind, fast
        self.rows, self.columns = blocks.shape[0], blocks.shape[1] * 32
        if not fast:
            self.register_buffer("blocks", blocks, persistent=False)
            return
        operands = int8_operands if kind == "Q8_0" else int4_operands
        codes, scales = zip(*[operands(chunk) for chunk in blocks.split(CHUNK)])
        scales = torch.cat(scales, dim=0 if kind == "Q8_0" else 1)
        self.register_buffer("codes", torch.cat(codes), persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.fast:
            return F.linear(x, dequantize(self.blocks, x.dtype))
        flat = x.reshape(-1, self.columns).bfloat16()
        if self.kind == "Q8_0":
            y = torch.ops.aten._weight_int8pack_mm(flat, self.codes, self.scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.codes, 32, self.scales)
        return y[:, :self.rows].reshape(*x.shape[:-1], self.rows).to(x.dtype)


def int4_operands(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int4 kernel's operands for Q4_0 blocks (N, K/32, bytes): codes in the kernel's own order,
    and (scale, zero) in bfloat16 (K/32, N, 2)."""
    blocks = F.pad(blocks, (0, 0, 0, 0, 0, -len(blocks) % 16))  # the kernel needs N % 16 == 0
    codes, d = decode(blocks)
    codes = (codes + 8).flatten(1).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scale_zero = torch.cat((d, 0 * d), -1).transpose(0, 1).bfloat16().contiguous()
    return packed, scale_zero


def int8_operands(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 kernel's operands for Q8_0 blocks (N, K/32, bytes): codes (N, K), and scales in
    bfloat16 (N,). The largest weight of a row becomes code 127 or -127."""
    weight = dequantize(blocks)
    scales = (weight.abs().amax(1) / 127).bfloat16()
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    codes = (weight * inverse[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def choose_kernel(device: str = "cpu") -> tuple[bool, str]:
    """Tries torch's kernels on this machine. Returns whether to use them, and the reason."""
    if not str(device).startswith("cpu"):
        return False, "blocks are unpacked in every call: torch's kernels are for CPUs"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    x = torch.randn(1, 64, generator=generator)
    for kind in ("Q4_0", "Q8_0"):
        blocks = quantize_rows(weight, kind)
        try:
            fast = QuantLinear(blocks, kind, fast=True)(x)
        except (AttributeError, RuntimeError) as error:  # an old torch, or built without them
            return False, f"blocks are unpacked in every call: torch's kernels fail ({error})"
        readable = QuantLinear(blocks, kind, fast=False)(x)
        if not (fast - readable).norm() < 0.02 * readable.norm():
            return False, "blocks are unpacked in every call: torch's kernels are wrong here"
    return True, "multiplied by torch's kernels"


# -- GGUF -----------------------------------------------------------------------------------------

def pack_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def pack_value(value) -> bytes:
    """The number of a value's type, then the value. A list has the type of its first element."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + pack_string(value)
    if isinstance(value, list):
        elements = [pack_value(element) for element in value]
        kind = elements[0][:4]
        packed = b"".join(element[4:] for element in elements)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + packed
    numbers = {bool: (7, "<?"), int: (4, "<I"), np.int32: (5, "<i"), float: (6, "<f")}
    number, form = numbers[type(value)]
    return struct.pack("<I", number) + struct.pack(form, value)


def jinja(template: str) -> str:
    """A template of data.py in Jinja, as llama.cpp and transformers read it. They add <s>. Like
    other published templates, it raises unless user and assistant take turns."""
    t = data.get_template(template)
    before, after = t.ask.split("{text}")
    space = "" if t.reply_continues else " "  # SentencePiece's, which must be text here

    def put(*parts: str) -> str:
        return "{{ " + " + ".join(parts) + " }}"

    quote = json.dumps
    later = "{% else %}" + put(quote(t.later)) if t.later else ""
    return (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = " + quote(t.system) + " %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}"
        "{% if m['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
        "{{ raise_exception('user and assistant must take turns, the user first') }}{% endif %}"
        "{% if m['role'] == 'assistant' %}"
        + put(quote(space), "m['content']", quote(t.end or "</s>")) +
        "{% else %}{% if loop.first %}{% if system %}" + put("system", quote(t.between))
        + "{% endif %}" + put(quote(t.start)) + later + "{% endif %}"
        + put(quote(before), "m['content']", quote(after)) + "{% endif %}{% endfor %}")


def vocabulary(tokenizer: data.Tokenizer, rows: int) -> dict:
    """Pieces, scores and types. Rows without a piece, as in Vicuna v0, get distinct names."""
    sp = tokenizer.sp
    pieces, scores, types = [], [], []
    for i in range(tokenizer.vocab_size):
        pieces.append(sp.id_to_piece(i))
        scores.append(sp.get_score(i))
        kind = 1
        if sp.is_unknown(i):
            kind = 2
        elif sp.is_control(i):
            kind = 3
        elif sp.is_byte(i):
            kind = 6
        types.append(np.int32(kind))
    for i in range(rows - tokenizer.vocab_size):
        pieces.append(f"[PAD{i}]")
        scores.append(-10000.0)
        types.append(np.int32(5))
    return {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
    }


def header(source, name: str, quantize: str) -> dict:
    """All but the tensors: the network's shape, the tokenizer, the chat template."""
    c, tokenizer = source.config, data.Tokenizer(source.tokenizer)
    keys = {
        "general.architecture": "llama",
        "general.name": name,
        "general.file_type": BLOCKS[block_type("", (1, 32), quantize)].file_type,
        "llama.vocab_size": c.vocab_size,
        "llama.context_length": c.max_seq_len,
        "llama.embedding_length": c.dim,
        "llama.block_count": c.n_layers,
        "llama.feed_forward_length": c.hidden_dim,
        "llama.attention.head_count": c.n_heads,
        "llama.attention.head_count_kv": c.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "llama.rope.dimension_count": c.head_dim,
        "llama.rope.freq_base": float(c.rope_theta),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **vocabulary(tokenizer, c.vocab_size),
        "tokenizer.ggml.bos_token_id": tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.eos,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": jinja(source.meta["template"]),
    }
    if quantize:
        keys["general.quantization_version"] = 2
    if c.rope_scaling != 1:
        keys["llama.rope.scaling.type"] = "linear"
        keys["llama.rope.scaling.factor"] = float(c.rope_scaling)
    return keys


def write_gguf(folder, path, quantize: str = "") -> int:
    """Writes a GGUF file (version 3, little endian) and returns its size in bytes: counts, header,
    table of tensors, then their data, each aligned to 32 bytes.

    GGUF keeps q and k in Meta's row order, which is ours. One tensor is in memory at a time.
    """
    from tools import convert
    source, path = convert.open_folder(folder), Path(path)
    with torch.device("meta"):
        net = model.LLaMA(source.config)
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    if source.config.tied:
        del shapes["output.weight"]  # llama.cpp uses the embedding then
    kinds = {name: block_type(name, shape, quantize) for name, shape in shapes.items()}
    keys = header(source, Path(folder).resolve().name, quantize)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(keys))
    for key, value in keys.items():
        head += pack_string(key) + pack_value(value)
    offset = 0
    for name, shape in shapes.items():
        block = BLOCKS[kinds[name]]
        head += pack_string(convert.gguf_name(name)) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))  # the contiguous one first
        head += struct.pack("<IQ", block.id, offset)
        offset += math.prod(shape) // block.weights * block.bytes
        offset += -offset % 32
    with data.atomic_write(path, "wb") as file:
        file.write(head + b"\0" * (-len(head) % 32))
        for name, kind in tqdm(kinds.items(), f"writing {path}", leave=False, delay=1):
            weight = source.read(name)
            check_range(f"{folder}: {name}", weight, kind)
            if kind == "F32":
                stored = weight.float()
            elif kind == "F16":
                stored = weight.half()
            else:
                stored = quantize_rows(weight, kind)
            file.write(stored.contiguous().numpy().tobytes())
            file.write(b"\0" * (-file.tell() % 32))
    return path.stat().st_size


@dataclass
class GGUFConfig:
    ckpt: str = "out/vicuna"  # a folder of ours, Meta's or Hugging Face's
    out: str = ""  # the file; named after the folder by default
    type: Literal["f16", "q8", "q4"] = "f16"  # of the matrices


def main(cfg: GGUFConfig) -> dict:
    path = cfg.out or f"{Path(cfg.ckpt).resolve().name}-{cfg.type}.gguf"
    n_bytes = write_gguf(cfg.ckpt, path, "" if cfg.type == "f16" else cfg.type)
    print(f"{path}: {n_bytes / 1e6:,.1f} MB. It holds the chat template: "
          f"llama-cli -m {path} --jinja")
    return dict(path=path, bytes=n_bytes)


if __name__ == "__main__":
    run(main, GGUFConfig)
