"""LLaMA, all of it in this file: the network, its cache, generation, and saving to a folder.

    python model.py               # the published sizes and their parameter counts
    python model.py --preset=7B   # one of them, part by part
    python model.py --preset=7B --gpus=8 --seq=2048 --batch=4   # what training it takes: memory, hours, dollars

References: [1] Touvron et al. 2023, LLaMA: Open and Efficient Foundation Language Models (arXiv 2302.13971);
[2] Su et al. 2021, RoFormer (2104.09864); [3] Zhang and Sennrich 2019, RMSNorm (1910.07467);
[4] Shazeer 2020, GLU Variants Improve Transformer (2002.05202); [5] Ainslie et al. 2023, GQA (2305.13245);
[6] Hu et al. 2021, LoRA (2106.09685).

Letters in the shape comments: B batch, T tokens now, S tokens in sight (cache included), C model width,
H heads, K key/value heads, D head width, V vocabulary, N supervised positions.
Names and state_dict keys are Meta's, so a published consolidated.00.pth loads with strict=True.
"""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator, Literal, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from config import Problem, run

IMAGE_SLOT = -1  # a token that is not a word: the model puts an image vector here


@dataclass
class LLaMAConfig:
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: Optional[int] = None  # fewer than n_heads: grouped-query attention [5]
    vocab_size: int = 32000
    hidden_dim: Optional[int] = None  # of the feed-forward; LLaMA's rule when not given
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: float = 1.0  # positions are divided by this (Vicuna v1.5's 16k models: 4 or 8)
    max_seq_len: int = 2048
    tied: bool = False  # output matrix = embedding matrix

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        # [4] keeps the parameter count of a 4x ReLU layer with 2/3 of its width; LLaMA rounds up to 256
        self.hidden_dim = self.hidden_dim or 256 * math.ceil(8 * self.dim / 3 / 256)
        if self.dim % self.n_heads or self.head_dim % 2:
            raise Problem(f"dim={self.dim} must be an even multiple of n_heads={self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise Problem(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


# Table 2 of [1]; the small ones are ours.
PRESETS = {
    "toy": dict(dim=128, n_layers=4, n_heads=2, hidden_dim=352, rope_theta=500.0, max_seq_len=1024),
    "small": dict(dim=512, n_layers=8, n_heads=8, hidden_dim=1408),  # 58 M with 32,000 pieces: for one GPU
    "7B": dict(dim=4096, n_layers=32, n_heads=32),
    "13B": dict(dim=5120, n_layers=40, n_heads=40),
    "30B": dict(dim=6656, n_layers=60, n_heads=52),
    "65B": dict(dim=8192, n_layers=80, n_heads=64, norm_eps=1e-5),
}


class RMSNorm(nn.Module):
    """[3]: divide by the root mean square, no mean subtracted, no bias. In fp32, whatever comes in."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight.type_as(x)


def rope_table(seq_len: int, head_dim: int, theta: float = 10000.0, scaling: float = 1.0) -> tuple:
    """[2] eq. 15: angle of position t in pair i is t / theta^(2i/D). Returns cos, sin, each (seq_len, D/2)."""
    here = torch.device("cpu")  # real numbers even while a model of shapes alone is built on the meta device
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=here).float() / head_dim)
    angles = torch.outer(torch.arange(seq_len, device=here).float() / scaling, frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[2] eq. 34: turns each pair of neighbours (x[2i], x[2i+1]) by its angle.

    x (B, T, H, D); cos, sin (T, D/2), or (B, T, D/2) when each row has positions of its own.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, H, D/2): x[2i] + i x[2i+1]
    turned = pairs * torch.complex(cos, sin).unsqueeze(-2)  # (.., T, 1, D/2): the same for all heads
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor] = None,
              fused: bool = True) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v. q (B, H, T, D); k, v (B, K, S, D) with K dividing H.

    mask (B or 1, 1, T, S) is True where a query may look. Without one it is causal, and the T queries are the
    *last* T of the S positions, which is what a filled cache needs.
    """
    T, S, groups = q.shape[-2], k.shape[-2], q.shape[1] // k.shape[1]
    if groups > 1:  # each key/value head serves `groups` query heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if mask is None and 1 < T < S:  # the kernels' is_causal starts at the top left: wrong here, so spell it out
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (B, H, T, S)
    return (scores + bias).softmax(dim=-1) @ v


class KVCache:
    """Keys and values of everything read so far, allocated once. A prefix is reusable: truncate and go on.

    `start` (B,) is how many places at the left of each row are padding (prompts of unequal length).
    """

    def __init__(self, config: LLaMAConfig, batch: int = 1, max_len: Optional[int] = None, dtype=torch.float32,
                 device="cpu"):
        max_len = max_len or config.max_seq_len
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
        self.length, self.max_len, self.start = 0, max_len, None

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple:
        end = self.length + k.shape[-2]  # .length itself moves once, after the last layer
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def truncate(self, n: int) -> None:
        self.length = min(self.length, n)


class Attention(nn.Module):
    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.fused = True
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
        B, T, _ = x.shape
        q = apply_rope(self.wq(x).view(B, T, self.n_heads, self.head_dim), cos, sin)  # (B, T, H, D)
        k = apply_rope(self.wk(x).view(B, T, self.n_kv_heads, self.head_dim), cos, sin)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, K, S, D)
        y = attention(q, k, v, mask, self.fused)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class FeedForward(nn.Module):
    """[4] eq. 6, SwiGLU: one half opens the gate for the other."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x))


class LLaMA(nn.Module):
    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass: less memory, a third more work
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie()
        table = rope_table(config.max_seq_len, config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("cos", table[0], persistent=False)
        self.register_buffer("sin", table[1], persistent=False)
        self.init_weights()

    def tie(self) -> None:
        if self.config.tied:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal with std 0.6 / sqrt(inputs); the two matrices that write into the residual stream scaled down by depth.

        And with three habits that every look-up in the context is made of, which a small model would need thousands
        of steps to find (compare mimetic initialization, 2305.09828). First layer: every head looks at the last few
        tokens, which rotary attention can do only through something that all tokens share, so the embeddings share a
        mean; and hands on what it sees there (wo = wv^T). Later layers: keys equal queries, so that a token looks at
        its equals, most of all in the slowly turning pairs, which still know them over a distance.
        """
        c = self.config
        for name, p in self.named_parameters():
            if p.dim() > 1:
                std = 0.6 / math.sqrt(p.shape[-1])
                into_residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(p, mean=std if name.startswith("tok_") else 0.0,
                                std=std / math.sqrt(2 * c.n_layers) if into_residual else std)
        if self.tok_embeddings.weight.is_meta:
            return
        groups = c.n_heads // c.n_kv_heads
        turns = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)  # of each pair, in radians a token
        for i, block in enumerate(self.layers):
            a = block.attention
            q, k, v = (m.weight.view(-1, c.head_dim, c.dim) for m in (a.wq, a.wk, a.wv))  # (H or K, D, C)
            if i == 0:
                near = (turns > 0.1).float()
                # The mean is 0.7 of a normalised embedding; the score of a token with itself rises by 5.
                share = math.sqrt(5 * math.sqrt(c.head_dim) / near.sum()) / (0.7 * c.dim)
                q[:, 0::2] += share * near[:, None]
                k[:, 0::2] += share * near[:, None]
                nn.init.orthogonal_(a.wv.weight, 0.33)
                a.wo.weight.copy_(v.repeat_interleave(groups, 0).flatten(0, 1).T)
            else:
                q *= 1 + (turns < 0.05).repeat_interleave(2)[:, None]
                k.copy_(q[::groups])

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # .to(bfloat16) converts buffers too and .to_empty() leaves them blank, but the angles must be right, in fp32
        c = self.config
        table = rope_table(c.max_seq_len, c.head_dim, c.rope_theta, c.rope_scaling)
        self.cos, self.sin = (t.to(self.cos.device) for t in table)
        return self

    def set_fused(self, fused: bool) -> None:
        for block in self.layers:
            block.attention.fused = fused

    # -- reading ---------------------------------------------------------------------------------------------

    def hidden(self, tokens: torch.Tensor, images: Optional[torch.Tensor] = None,
               segments: Optional[torch.Tensor] = None, cache: Optional[KVCache] = None) -> torch.Tensor:
        """Everything but the final norm and the output matrix: tokens (B, T) -> (B, T, C)."""
        B, T = tokens.shape
        past = cache.length if cache is not None else 0
        limit = min(self.config.max_seq_len, cache.max_len if cache is not None else self.config.max_seq_len)
        if past + T > limit:
            raise Problem(f"{past + T} tokens do not fit into the context of {limit}")
        slots = tokens == IMAGE_SLOT
        x = self.tok_embeddings(tokens.masked_fill(slots, 0))  # (B, T, C)
        if images is not None or bool(slots.any()):  # none of none, too: FSDP waits for every rank's gradient
            n_images = 0 if images is None else len(images)
            if int(slots.sum()) != n_images:
                raise Problem(f"{int(slots.sum())} image slots in the text, but {n_images} image vectors")
            if images.shape[1:] != x.shape[2:]:
                raise Problem(f"image vectors of shape {tuple(images.shape[1:])} in a model of width {x.shape[-1]}")
            x = x.masked_scatter(slots.unsqueeze(-1), images.to(x.dtype))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the residual stream, as under FSDP's bf16 policy

        positions, mask = positions_and_mask(T, past, segments, cache.start if cache is not None else None, x.device)
        cos, sin = self.cos[positions], self.sin[positions]  # (T, D/2) or (B, T, D/2)
        for i, block in enumerate(self.layers):
            if self.checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, i)
        if cache is not None:
            cache.length += T
        return x

    def forward(self, tokens: torch.Tensor, images: Optional[torch.Tensor] = None,
                segments: Optional[torch.Tensor] = None, cache: Optional[KVCache] = None,
                last_only: bool = False) -> torch.Tensor:
        """tokens (B, T) -> logits (B, T, V), or (B, 1, V) with last_only.

        images (N, C) fill the slots (token -1) in order. segments (B, T) numbers the conversations that share a
        row: no token sees another segment, and positions restart in each.
        """
        x = self.hidden(tokens, images, segments, cache)
        return self.output(self.norm(x[:, -1:] if last_only else x))

    def nll(self, tokens: torch.Tensor, labels: torch.Tensor, images: Optional[torch.Tensor] = None,
            segments: Optional[torch.Tensor] = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of -log p over supervised tokens, and their count. A mean is the caller's: sum over everything / count.

        labels (B, T) stand under the tokens they name, -100 where nothing is to be learned; the shift happens here.
        A segment's first token is never a target: it would have to be guessed from another conversation.
        """
        target = labels[:, 1:]
        wanted = target != -100
        if segments is not None:
            wanted = wanted & (segments[:, 1:] == segments[:, :-1])
        x = self.hidden(tokens, images, segments)[:, :-1][wanted]  # (N, C): no logits for what is not supervised
        target, count = target[wanted], wanted.sum()
        # Every new row count costs a compilation in bf16, and no rows at all must still touch `output` (else FSDP hangs).
        spare = -len(x) % 128 or (0 if len(x) else 128)
        x, target = F.pad(x, (0, 0, 0, spare)), F.pad(target, (0, spare), value=-100)
        # In pieces when the logits would be large; each piece's logits are recomputed in the backward pass.
        rows = max(128, 2 ** 25 // self.config.vocab_size // 128 * 128)
        if len(x) <= rows:
            return self._piece_nll(x, target), count
        pieces = zip(x.split(rows), target.split(rows))
        return sum(checkpoint(self._piece_nll, a, b, use_reentrant=False) for a, b in pieces), count

    def _piece_nll(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.output(self.norm(x)).float(), target, ignore_index=-100, reduction="sum")

    # -- writing ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 0.0, top_k: int = 0,
                 top_p: float = 1.0, repetition_penalty: float = 1.0, stop: Sequence[int] = (2,), seed: int = 0,
                 images: Optional[torch.Tensor] = None, cache: Optional[KVCache] = None) -> Iterator[list[int]]:
        """Yields one id per prompt and step until every row has produced a stop id (which is yielded too).

        temperature 0 is greedy; top_k 0 and top_p 1 are off. A finished row goes on yielding its stop id.
        With `cache` (one prompt only), what it holds already must be a prefix of the prompt and is not read again.
        """
        device = self.tok_embeddings.weight.device
        prompts = [list(p) for p in prompts]
        longest = max(map(len, prompts))
        limit = min(self.config.max_seq_len, cache.max_len if cache is not None else self.config.max_seq_len)
        room = limit - longest
        if not min(map(len, prompts)):
            raise Problem("an empty prompt: begin with the tokenizer's bos")
        if room <= 0:
            raise Problem(f"the prompt has {longest} tokens; with its answer it must fit into {limit}")
        if cache is None:
            dtype = next(self.layers.parameters()).dtype
            if torch.is_autocast_enabled(device.type):
                dtype = torch.get_autocast_dtype(device.type)
            cache = KVCache(self.config, len(prompts), longest + min(max_new_tokens, room), dtype, device)
            if any(len(p) < longest for p in prompts):
                cache.start = torch.tensor([longest - len(p) for p in prompts], device=device)
        cache.truncate(longest - 1)  # the last token is always read: its logits are needed
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)[:, cache.length:]
        seen = torch.zeros(len(prompts), self.config.vocab_size, dtype=torch.bool, device=device)
        for row, p in enumerate(prompts):
            seen[row, [t for t in p if t != IMAGE_SLOT]] = True
        random = torch.Generator(device).manual_seed(seed)
        stop_ids = torch.tensor(list(stop), device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        ids = tokens[:, -1]
        for _ in range(min(max_new_tokens, room)):
            logits = self(tokens, images, cache=cache, last_only=True)[:, -1].float()  # (B, V)
            chosen = sample(logits, seen, temperature, top_k, top_p, repetition_penalty, random)
            ids = torch.where(done, ids, chosen)
            done = done | torch.isin(ids, stop_ids)
            yield ids.tolist()
            if bool(done.all()):
                return
            seen.scatter_(1, ids[:, None], True)
            tokens, images = ids[:, None], None


def count(config: LLaMAConfig) -> int:
    """Parameters of a network of this shape, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in LLaMA(config).parameters())


def positions_and_mask(T: int, past: int, segments: Optional[torch.Tensor], start: Optional[torch.Tensor], device):
    """Position of each token, (T,) or (B, T), and who may look at whom, (B, 1, T, S) or None for plain causal."""
    here = torch.arange(past, past + T, device=device)
    if segments is not None and bool((segments != segments[:, :1]).any()):  # packed: block-diagonal and causal
        B = segments.shape[0]
        new = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)  # first token of each segment
        first = torch.where(new, here, 0).cummax(dim=1).values
        same = segments[:, :, None] == segments[:, None, :]
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        return here.expand(B, T) - first, (same & causal)[:, None]
    if start is not None:  # left-padded prompts; a padding row may look at itself, or its softmax would be 0/0
        S = torch.arange(past + T, device=device)
        mask = (S <= here[:, None]) & ((S >= start[:, None, None]) | (S == here[:, None]))  # (B, T, S)
        return (here - start[:, None]).clamp(min=0), mask[:, None]
    return here, None


def sample(logits, seen, temperature, top_k, top_p, repetition_penalty, random) -> torch.Tensor:
    """One id per row of logits (B, V). Order: penalty, temperature, top-k, top-p."""
    if repetition_penalty != 1.0:  # CTRL's rule (1909.05858): push down what the text already holds
        pushed = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, pushed, logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:  # the smallest set of likeliest ids whose probabilities reach top_p
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= max(top_p, 1e-9), float("-inf"))
        logits = torch.empty_like(logits).scatter_(1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]


# -- LoRA: two thin matrices are trained beside each frozen one ----------------------------------------------

LORA_SCALE = 2.0  # alpha / r in [6]


class LoRALinear(nn.Linear):
    """[6] eq. 3: W x + (alpha / r) B A x. A (r, in) is random and B (out, r) zero: it begins at the base model."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        where = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features, **where) / math.sqrt(self.in_features))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **where))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + LORA_SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(model: LLaMA, rank: int) -> None:
    """Freezes the network and puts adapters of this rank on every projection of every block."""
    model.requires_grad_(False)
    for block in model.layers:
        for part in (block.attention, block.feed_forward):
            for name, linear in list(part.named_children()):
                setattr(part, name, LoRALinear(linear, rank))


def merge_lora(weights: dict) -> tuple[dict, dict]:
    """Splits the state_dict of a network with adapters: a plain one, adapters added in; and the adapters alone."""
    adapters = {name: w for name, w in weights.items() if ".lora_" in name}
    merged = {name: w for name, w in weights.items() if name not in adapters}
    for name in adapters:
        if name.endswith(".lora_a"):
            layer = name.removesuffix("lora_a")
            change = LORA_SCALE * adapters[layer + "lora_b"] @ adapters[name]
            merged[layer + "weight"] = merged[layer + "weight"] + change
    return merged, adapters


# -- a checkpoint is a folder: step-000400/{model.pt, optim.pt, meta.json, tokenizer.model}, and a file `latest`

def save(folder, model: nn.Module, meta: dict, tokenizer_path=None, optimizer: Optional[dict] = None,
         keep: int = 2, weights: Optional[dict] = None, adapters: Optional[dict] = None) -> Path:
    """Writes folder/step-NNNNNN and points folder/latest at it; a crash at any moment leaves the previous one valid.

    meta must hold "step". `weights` take the place of model.state_dict() where that is in pieces (FSDP) or holds
    adapters (LoRA), which go into a file of their own. The last `keep` steps stay. Raises OSError (disk full, ...).
    """
    folder = Path(folder)
    target = folder / f"step-{meta['step']:06d}"
    partial = folder / f".{target.name}.partial"
    for rest in folder.glob(".step-*.partial"):  # of saves that were killed
        shutil.rmtree(rest)
    partial.mkdir(parents=True)
    try:
        torch.save(model.state_dict() if weights is None else weights, partial / "model.pt")
        if optimizer is not None:
            torch.save(optimizer, partial / "optim.pt")
        if adapters is not None:
            torch.save(adapters, partial / "lora.pt")
        if tokenizer_path is not None:
            shutil.copy(tokenizer_path, partial / "tokenizer.model")
            meta = {**meta, "tokenizer_sha256": hashlib.sha256(Path(tokenizer_path).read_bytes()).hexdigest()}
        meta = {**meta, "config": asdict(model.config), "torch": torch.__version__,
                "threads": torch.get_num_threads(), "isa": torch.backends.cpu.get_cpu_capability()}
        meta["crc32"] = _crc32(meta)
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        for file in [*partial.iterdir(), partial]:
            _to_disk(file)
        replaced = folder / f".{target.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():  # the same step again: renaming onto a folder that is not empty fails
            os.rename(target, replaced)
        os.rename(partial, target)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"could not write {target} ({error}); the checkpoints before it are intact") from error
    (folder / ".latest.partial").write_text(target.name)
    _to_disk(folder / ".latest.partial")
    os.replace(folder / ".latest.partial", folder / "latest")
    _to_disk(folder)  # a name is safe when its folder is
    others = [step for step in _steps(folder) if step != target]  # a new run in an old folder has the lowest number
    for old in others[:max(0, len(others) + 1 - keep)]:
        shutil.rmtree(old)
    return target


def _to_disk(path: Path) -> None:
    """Until this, what was written may exist in memory alone, and be lost with the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(meta: dict) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in meta.items() if k != "crc32"}, sort_keys=True).encode())


# what stands in published folders: Meta's, Hugging Face's, and MiniGPT-4's downloads
PUBLISHED = ("params.json", "config.json", "adapter_config.json", "eva_vit_g.pth")


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda p: int(p.name[len("step-"):]))


def find(folder) -> Path:
    """The step folder that `folder` means: itself, or what its `latest` names. Raises Problem when there is none."""
    folder = Path(folder)
    if any((folder / mark).exists() for mark in ("model.pt", *PUBLISHED)):
        return folder
    if (folder / "latest").exists():
        named = folder / (folder / "latest").read_text().strip()
        if named.exists():
            return named
    if _steps(folder):  # a crash between two renames
        return _steps(folder)[-1]
    here = [p.parent.name for p in folder.parent.glob("*/latest")] if folder.parent.exists() else []
    raise Problem(f"no checkpoint in {folder}" + (f"; there are {', '.join(sorted(here))} beside it" if here else
                  "; `python train_sft.py` trains one in minutes"))


def history(folder) -> list[Path]:
    """The step folders of a run, the newest first."""
    newest = find(folder)
    return [newest] + [step for step in reversed(_steps(Path(folder))) if step != newest]


def read(path: Path, mmap: bool = False) -> dict:
    """torch.load without code execution, after checking the CRC32 of every part (torch.load ignores them).

    With mmap, processes on one machine share the file's pages, and memory is taken for what they touch only.
    """
    try:
        with zipfile.ZipFile(path) as z:
            damaged = z.testzip() or next((part.filename for part in z.infolist() if part.external_attr & 16), None)
        if damaged:
            raise Problem(f"{path} is damaged (checksum of {damaged} is wrong)")
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, zlib.error, zipfile.BadZipFile,
            pickle.UnpicklingError) as error:
        raise Problem(f"{path} is not a complete checkpoint file ({str(error).splitlines()[0]})") from None


def fingerprint(folder) -> str:
    """Tells two trainings apart by the checksums inside model.pt, published ones by names and sizes of the files: the
    weights are not read."""
    step = find(folder)
    if not (step / "model.pt").exists():
        files = sorted((file.name, file.stat().st_size) for file in step.iterdir() if file.is_file())
        return f"{zlib.crc32(repr(files).encode()):08x}"
    with zipfile.ZipFile(step / "model.pt") as z:
        return f"{zlib.crc32(repr([part.CRC for part in z.infolist()]).encode()):08x}"


def read_meta(step: Path) -> dict:
    """meta.json of a step folder. Raises Problem when it, or the tokenizer beside it, is damaged."""
    tokenizer = step / "tokenizer.model"
    try:
        meta = json.loads((step / "meta.json").read_text())
        if meta.get("crc32", (right := _crc32(meta))) != right:
            raise ValueError("its checksum is wrong")
    except ValueError as error:
        raise Problem(f"{step / 'meta.json'} is damaged ({error})") from None
    if "tokenizer_sha256" in meta and hashlib.sha256(tokenizer.read_bytes()).hexdigest() != meta["tokenizer_sha256"]:
        raise Problem(f"{tokenizer} is damaged (checksum is wrong)")
    return meta


def peek(folder) -> tuple[LLaMAConfig, Path, dict]:
    """As load, but the shape of the model instead of the model: no weights are read."""
    step = find(folder)
    if not (step / "meta.json").exists():
        import convert  # only here: the names and formats of others are its business
        source = convert.open_folder(step)
        return source.config, source.tokenizer, source.meta
    meta = read_meta(step)
    return LLaMAConfig(**meta["config"]), step / "tokenizer.model", meta


def load(folder, mmap: bool = False, network: Optional[nn.Module] = None,
         **options) -> tuple[nn.Module, Path, dict]:
    """Returns model, the path of its tokenizer.model, and meta.json as a dict. Raises Problem for anything damaged.

    The file may hold only what was learned in a `network` that exists already, such as one layer between frozen
    parts. Published weights (a folder of Meta's or Hugging Face's), and the options dtype, device and quantize, are
    for convert.load, which reads one tensor at a time.
    """
    step = find(folder)
    if options or not (step / "meta.json").exists():
        import convert
        return convert.load(step, **options)
    meta = read_meta(step)
    weights = {name: w.float() for name, w in read(step / "model.pt", mmap).items()}
    if network is None:
        with torch.device("meta"):  # shapes only: the weights are about to come
            model = LLaMA(LLaMAConfig(**meta["config"]))
    else:
        model, weights = network, {**network.state_dict(), **weights}
    try:
        model.load_state_dict(weights, assign=network is None)
    except RuntimeError as error:
        raise Problem(f"{step / 'model.pt'} does not fit the shape in meta.json: "
                      + " ".join(str(error).split("\n\t")[1:3])) from None
    if network is None:
        model.tie()
    return model.eval(), step / "tokenizer.model", meta


# -- the estimator: python model.py --preset=7B --gpus=8 --seq=2048 --batch=4 --------------------------------

GPUS = {"A100-40GB": (40, 312), "A100-80GB": (80, 312), "H100": (80, 989), "H200": (141, 989), "RTX4090": (24, 165)}
# GB of memory, dense bfloat16 TFLOP/s; from the makers' data sheets


def step_flops(config: LLaMAConfig, seq: int, checkpointing: bool = False) -> float:
    """Of a training step, per token: 2 forward and 4 backward for each weight of a matrix product, 2 more where
    the forward pass is done again; attention's two products likewise, halved because they are causal."""
    c, passes = config, 4 if checkpointing else 3
    block = c.dim * c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.dim * c.hidden_dim
    return 2 * passes * c.n_layers * (block + seq * c.dim) + 6 * c.vocab_size * c.dim


def memory(config: LLaMAConfig, gpus: int = 1, batch: int = 1, seq: int = 2048, dtype=torch.bfloat16,
           checkpointing: bool = False) -> dict[str, float]:
    """Bytes on each GPU in training with AdamW, fp32 master weights, every token learned; "peak" is what must fit.

    What autograd keeps of a block is counted tensor by tensor, as Block.forward makes them.
    """
    c, n, e = config, batch * seq, 2 if dtype == torch.bfloat16 else 4  # n tokens, e bytes of an activation
    vocab = c.vocab_size * c.dim
    block = c.dim * c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.dim * c.hidden_dim + 2 * c.dim
    total = c.n_layers * block + (1 if c.tied else 2) * vocab + c.dim
    kept = n * (2 * ((4 + 2 * e) * c.dim + 4)  # each norm: input in fp32, input / rms, times weight; 1 / rms
                + 4 * e * c.dim + 4 * c.n_heads  # q, k and v (repeated to all heads), what wo reads; softmax' sum
                + 4 * e * c.hidden_dim)  # w1's and w3's output, silu, their product
    kept += 8 * seq * c.head_dim  # the angles by which q and k are turned
    activations = c.n_layers * n * e * c.dim if checkpointing else c.n_layers * kept
    rows = min(n, max(128, 2 ** 25 // c.vocab_size // 128 * 128))  # LLaMA.nll computes so many logits at once
    loss = 3 * 4 * rows * c.vocab_size + n * e * c.dim  # log p, its gradient, the logits'; the rows themselves
    if gpus > 1:  # whole at a time: two blocks, the matrices at both ends, two blocks' gradients before their sum
        copies = e * (2 * block + 2 * vocab) + (e + 4) * 2 * block
    else:
        copies = 2 * total if e == 2 else 0  # autocast's copies of the weights
    parts = dict(weights=4 * total / gpus, gradients=4 * total / gpus, optimizer=8 * total / gpus, copies=copies,
                 activations=activations, loss=loss)
    # Gradients come as activations go. The top is at the loss, or where the backward pass enters the last block
    # or leaves the first; inside a block, gradients of activations and (checkpointing) its own come on top.
    inside = n * e * 3 * c.hidden_dim + (kept if checkpointing else 0)
    top = max(activations + loss, activations + 4 * vocab / gpus + inside, parts["gradients"] + inside)
    return dict(parts, peak=parts["weights"] + parts["optimizer"] + copies + top)


# -- python model.py -----------------------------------------------------------------------------------------

@dataclass
class ModelConfig:
    preset: str = ""  # one of the presets; all when not given
    vocab_size: int = 32000  # rows of the embedding
    gpus: int = 0  # what training takes on so many (FSDP)
    gpu: Literal["A100-40GB", "A100-80GB", "H100", "H200", "RTX4090"] = "A100-80GB"  # of this kind
    seq: int = 2048  # tokens in a row
    batch: int = 1  # rows in one forward pass on one GPU
    tokens: float = 1.1e9  # to train on: ShareGPT's 370 M three times, as Vicuna did
    mfu: float = 0.4  # share of the GPU's peak that is reached
    price: float = 1.5  # dollars per GPU and hour; what Vicuna's published $300 for a day on 8 come to

    def __post_init__(self):
        for name in ("vocab_size", "seq", "batch", "tokens", "mfu", "price"):
            if getattr(self, name) <= 0:
                raise Problem(f"--{name}={getattr(self, name)} must be more than 0")
        if self.gpus < 0 or self.mfu > 1:
            raise Problem("--gpus must not be negative, and --mfu at most 1")
        if self.preset and self.preset not in PRESETS:
            raise Problem(f"--preset={self.preset}: there are {', '.join(PRESETS)}")
        if self.gpus and not self.preset:
            raise Problem(f"--gpus={self.gpus} needs --preset, one of {', '.join(PRESETS)}")


def main(cfg: ModelConfig) -> dict:
    figures = {}
    for name in [cfg.preset] if cfg.preset else PRESETS:
        with torch.device("meta"):  # shapes only: no memory
            model = LLaMA(LLaMAConfig(vocab_size=cfg.vocab_size, **PRESETS[name]))
        figures[name] = sum(p.numel() for p in model.parameters())
        c = model.config
        print(f"{name:>6}: {figures[name]:>14,} parameters   dim {c.dim}, {c.n_layers} layers, {c.n_heads} heads, "
              f"feed-forward {c.hidden_dim}")
        if cfg.preset and not cfg.gpus:
            for part, p in model.named_parameters():
                if not re.match(r"layers\.[1-9]", part):
                    print(f"        {part:<34} {tuple(p.shape)}")
    return figures | estimate(cfg, c) if cfg.gpus else figures


def estimate(cfg: ModelConfig, config: LLaMAConfig) -> dict:
    """Prints what full fine-tuning takes: memory on each GPU, time, money."""
    room, peak = GPUS[cfg.gpu]
    plain, saving = (memory(config, cfg.gpus, cfg.batch, cfg.seq, checkpointing=c) for c in (False, True))
    print(f"full fine-tuning in bfloat16 on {cfg.gpus} x {cfg.gpu}, {cfg.batch} x {cfg.seq} tokens on each; GB per "
          f"GPU:\n"
          f"{'':<26}{'':>12}{'checkpointing':>16}")
    for part in plain:
        print(f"{part:>26}{plain[part] / 1e9:>12.1f}{saving[part] / 1e9:>16.1f}")
    # CUDA takes about 1 GB for itself, and fragments cost something
    fits = [m["peak"] < 0.95 * room * 1e9 - 1e9 for m in (plain, saving)]
    print(f"{f'of {room} GB: does it fit?':>26}{'yes' if fits[0] else 'no':>12}{'yes' if fits[1] else 'no':>16}")
    flops = step_flops(config, cfg.seq)
    hours = flops * cfg.tokens / (cfg.gpus * peak * 1e12 * cfg.mfu) / 3600
    print(f"{flops / 1e9:.1f} GFLOP per token; {cfg.tokens:.3g} tokens at {100 * cfg.mfu:.0f}% of {peak} TFLOP/s: "
          f"{hours:.1f} hours, ${hours * cfg.gpus * cfg.price:.0f} at ${cfg.price} per GPU and hour")
    return dict(peak=plain["peak"], peak_checkpointing=saving["peak"], fits=fits, flops=flops, hours=hours,
                dollars=hours * cfg.gpus * cfg.price)


if __name__ == "__main__":
    run(main, ModelConfig)
