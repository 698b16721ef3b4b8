"""LLaMA: the network, its loss, KV cache and sampling, and LoRA.

References: [1] Touvron et al. 2023, LLaMA: Open and Efficient Foundation Language Models
(arXiv 2302.13971); [2] Su et al. 2021, RoFormer (2104.09864); [3] Zhang and Sennrich 2019, RMSNorm
(1910.07467); [4] Shazeer 2020, GLU Variants Improve Transformer (2002.05202); [5] Ainslie et al.
2023, GQA (2305.13245); [6] Hu et al. 2021, LoRA (2106.09685).

Letters in the shape comments: B batch, T query positions, S key positions (cached and new), C model
dimension, H heads, K key/value heads, D head dimension, V vocabulary, N supervised positions,
M image vectors.
The state_dict has Meta's keys: the published 7B file fits as it is, except for its rope.freqs.
X_textbook is the plain form of X; the tests check that they agree.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tools.config import UserError

IMAGE_SLOT = -1  # placeholder token, replaced by an image vector
IGNORE = -100  # label of a token excluded from the loss (cross_entropy's ignore_index)


@dataclass
class LLaMAConfig:
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention [5]
    vocab_size: int = 32000
    hidden_dim: int | None = None  # width of the feed-forward layer; None: LLaMA's rule
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: float = 1.0  # position interpolation (2306.15595): positions are divided by this
    max_seq_len: int = 2048
    tied: bool = False  # weight tying: the output layer shares the embedding matrix

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if self.hidden_dim is None:
            # SwiGLU has three matrices instead of two, so 2/3 of the usual 4 * dim keeps the
            # parameter count [4]; LLaMA rounds up to a multiple of 256.
            self.hidden_dim = 256 * math.ceil(8 * self.dim / 3 / 256)
        if self.dim % self.n_heads or self.head_dim % 2:
            raise UserError(f"dim={self.dim} / n_heads={self.n_heads} must be an even integer")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads={self.n_heads} must be a multiple of "
                            f"n_kv_heads={self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


# Table 2 of [1] and Meta's params.json. "toy" and "small" are ours: hidden_dim is 8/3 dim, rounded
# up to a multiple of 32 or 128, and the small theta of "toy" suits its short context.
PRESETS = {
    "toy": dict(dim=128, n_layers=4, n_heads=2, hidden_dim=352, rope_theta=2000., max_seq_len=1024),
    "small": dict(dim=512, n_layers=8, n_heads=8, hidden_dim=1408),
    "7B": dict(dim=4096, n_layers=32, n_heads=32),
    "13B": dict(dim=5120, n_layers=40, n_heads=40),
    "30B": dict(dim=6656, n_layers=60, n_heads=52),
    "65B": dict(dim=8192, n_layers=80, n_heads=64, norm_eps=1e-5),
}


# -- building blocks ------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """RMSNorm [3]: x / rms(x) * weight. No mean is subtracted, and there is no bias."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()  # the squares would overflow in fp16 and lose precision in bf16
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight.type_as(x)


def rope_table(seq_len: int, head_dim: int, theta: float = 10000.0,
               scaling: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE [2] eq. 15: at position t, pair i = 0, 1, ... is rotated by the angle
    (t / scaling) theta^(-2i/D).

    Returns cos and sin of the angles, each (seq_len, D/2).
    """
    cpu = torch.device("cpu")  # under torch.device("meta") the table would have no data
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=cpu).float() / head_dim)
    positions = torch.arange(seq_len, device=cpu).float() / scaling
    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE [2] eq. 34: rotates each pair of neighbors (x[2i], x[2i+1]) by its angle.

    Only queries and keys are rotated. Their dot product then depends on position only through the
    distance between the two tokens. (Hugging Face pairs x[i] with x[i + D/2], so tools/convert.py
    permutes the rows of its wq and wk.)

    x (B, T, H, D); cos, sin (T, D/2), or (B, T, D/2) if every row has its own positions.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, T, H, D/2, 2)
    a, b = pairs.unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (.., T, 1, D/2): the same for all heads
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)


def causal_mask(T: int, S: int, device) -> torch.Tensor:
    """(T, S), True where a query may attend. The T queries are the *last* T of the S positions, as
    they are with a KV cache."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention_textbook(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                       mask: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, over the positions where the mask (T, S) is True. q (B, H, T, D);
    k, v (B, H, S, D)."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (B, H, T, S)
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(dim=-1).type_as(v) @ v


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              mask: torch.Tensor | None = None, fused: bool = True) -> torch.Tensor:
    """Attention of q (B, H, T, D) to k, v (B, K, S, D) -> (B, H, T, D), with PyTorch's fused
    kernel or by attention_textbook.

    The mask is broadcast to (B, H, T, S) and True where a query may attend; None is causal.
    """
    T, S = q.shape[-2], k.shape[-2]
    n_rep = q.shape[1] // k.shape[1]  # query heads per key/value head
    if n_rep > 1:
        k, v = k.repeat_interleave(n_rep, dim=1), v.repeat_interleave(n_rep, dim=1)
    if not fused:
        return attention_textbook(q, k, v, causal_mask(T, S, q.device) if mask is None else mask)
    if mask is None and 1 < T < S:  # the kernel's own mask takes the *first* T positions
        mask = causal_mask(T, S, q.device)
    is_causal = mask is None and T > 1  # a single query sees every key
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


class KVCache:
    """Preallocated keys and values of all layers, of which the first `length` positions are filled.

    Attention is causal, so a token's keys and values never change and are computed once.
    truncate(n) drops all but the first n positions, to reuse a prefix that the next prompt shares.

    n_pad (B,): the number of padding positions at the left of each row, or None.
    """

    def __init__(self, config: LLaMAConfig, batch: int = 1, max_len: int | None = None,
                 dtype=torch.float32, device="cpu", n_pad: torch.Tensor | None = None):
        self.max_len = max_len or config.max_seq_len
        shape = (config.n_layers, batch, config.n_kv_heads, self.max_len, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0  # advanced by LLaMA.hidden, after the last layer
        self.n_pad = n_pad

    def update(self, layer: int, k: torch.Tensor,
               v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values (B, K, T, D); returns all of this layer, (B, K, S, D)."""
        end = self.length + k.shape[-2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def truncate(self, n: int) -> None:
        self.length = min(self.length, n)


class Attention(nn.Module):
    """Attention with RoPE: x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        self.fused = True
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_heads, self.head_dim)
        k = self.wk(x).view(B, T, self.n_kv_heads, self.head_dim)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, K, S, D)
        y = attention(q, k, v, mask, self.fused)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU [4] eq. 6: w2(SiLU(w1 x) * w3 x), where SiLU(w1 x) gates w3 x."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block: x + f(norm(x)), twice. The residual stream x (B, T, C) itself is
    not normalized within a block."""

    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache, layer)
        return x + self.feed_forward(self.ffn_norm(x))


# -- the network ----------------------------------------------------------------------------------

class LLaMA(nn.Module):
    """The decoder: token embeddings, blocks, final norm, output matrix. retrieval_init: see
    init_for_retrieval."""

    def __init__(self, config: LLaMAConfig, retrieval_init: bool = False):
        super().__init__()
        self.config = config
        self.checkpointing = False  # activation checkpointing: recompute blocks in backward
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie()
        cos, sin = self.rope_table()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if not self.tok_embeddings.weight.is_meta:  # on "meta", weights are loaded later
            self.init_weights(shared_mean=retrieval_init)
            if retrieval_init:
                init_for_retrieval(self)

    def rope_table(self) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.config
        return rope_table(c.max_seq_len, c.head_dim, c.rope_theta, c.rope_scaling)

    def tie(self) -> None:
        """To be called again after weights are loaded with assign=True, which unties them."""
        if self.config.tied:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self, shared_mean: bool = False) -> None:
        """Normal with std 0.6 / sqrt(number of columns), divided by sqrt(2 * n_layers) for the two
        matrices of each block that write into the residual stream, as in GPT-2. (0.6 was tuned on
        the toy model; at 7B's width the std is about 0.01.) shared_mean: see init_for_retrieval.
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:  # norms stay at one
                continue
            std = 0.6 / math.sqrt(p.shape[-1])
            mean = std if shared_mean and name == "tok_embeddings.weight" else 0.0
            if name.endswith(("wo.weight", "w2.weight")):
                std = std / math.sqrt(2 * self.config.n_layers)
            nn.init.normal_(p, mean, std)

    def _apply(self, fn, recurse=True):
        """Called by .to(), .bfloat16() and the like. They cast buffers, too, but the RoPE table
        must stay in fp32, so it is rebuilt."""
        super()._apply(fn, recurse)
        cos, sin = self.rope_table()
        self.cos, self.sin = cos.to(self.cos.device), sin.to(self.cos.device)
        return self

    def set_fused(self, fused: bool) -> None:
        for block in self.layers:
            block.attention.fused = fused

    def embed(self, tokens: torch.Tensor, images: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings (B, T, C), in which image vectors (M, C) replace the slots in order."""
        slots = tokens == IMAGE_SLOT
        x = self.tok_embeddings(tokens.masked_fill(slots, 0))
        n_slots = int(slots.sum())
        n_vectors = 0 if images is None else len(images)
        if n_slots != n_vectors:
            raise UserError(f"{n_slots} image slots in the text, but {n_vectors} image vectors")
        if images is not None:  # even if M is 0: under FSDP, all ranks must use the projection
            if images.shape[1:] != x.shape[2:]:
                shape = tuple(images.shape)
                raise UserError(f"image vectors {shape} do not fit a model of dim {x.shape[-1]}")
            x = x.masked_scatter(slots.unsqueeze(-1), images.to(x.dtype))
        return x

    def hidden(self, tokens: torch.Tensor, images: torch.Tensor | None = None,
               segments: torch.Tensor | None = None,
               cache: KVCache | None = None) -> torch.Tensor:
        """Hidden states before the final norm: tokens (B, T) -> (B, T, C). Appends to the cache."""
        past = 0 if cache is None else cache.length
        limit = self.context_limit(cache)
        T = tokens.shape[1]
        if past + T > limit:
            raise UserError(f"{past + T} tokens exceed the context of {limit}")
        x = self.embed(tokens, images)
        if torch.is_autocast_enabled(x.device.type):
            # Autocast does not cast embeddings, but FSDP does. Cast here, so that both agree.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        n_pad = None if cache is None else cache.n_pad
        positions, mask = positions_and_mask(T, past, segments, n_pad, x.device)
        cos, sin = self.cos[positions], self.sin[positions]  # (T, D/2) or (B, T, D/2)
        for i, block in enumerate(self.layers):
            if self.checkpointing and self.training and cache is None:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, i)
        if cache is not None:
            cache.length += T
        return x

    def context_limit(self, cache: KVCache | None = None) -> int:
        if cache is None:
            return self.config.max_seq_len
        return min(self.config.max_seq_len, cache.max_len)

    def forward(self, tokens: torch.Tensor, images: torch.Tensor | None = None,
                segments: torch.Tensor | None = None, cache: KVCache | None = None,
                last_only: bool = False) -> torch.Tensor:
        """tokens (B, T) -> logits (B, T, V), or (B, 1, V) with last_only.

        images (M, C) fill the image slots in order. segments (B, T) is the index of the packed
        document or conversation that each token belongs to: attention and positions stay within it.
        """
        x = self.hidden(tokens, images, segments, cache)
        if last_only:
            x = x[:, -1:]
        return self.output(self.norm(x))

    # -- the loss ---------------------------------------------------------------------------------

    def nll_textbook(self, tokens: torch.Tensor, labels: torch.Tensor, images=None,
                     segments: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The same loss as `nll`, written plainly. `nll` needs less memory and compute."""
        logits = self(tokens, images, segments)[:, :-1]  # position t predicts token t + 1
        targets = shift_labels(labels, segments)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                               ignore_index=IGNORE, reduction="sum")
        return loss, (targets != IGNORE).sum()

    def nll(self, tokens: torch.Tensor, labels: torch.Tensor, images: torch.Tensor | None = None,
            segments: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of -log p over the supervised tokens, and their count. The caller divides by the
        count over all micro-batches and processes.

        labels (B, T) align with tokens and are IGNORE where nothing is supervised; the shift by
        one happens here. Logits are computed at supervised positions only, and in chunks.
        """
        targets = shift_labels(labels, segments)
        supervised = targets != IGNORE
        count = supervised.sum()
        x = self.hidden(tokens, images, segments)[:, :-1]
        x, targets = x[supervised], targets[supervised]  # (N, C), (N,)
        # Pad N to a multiple of 128: on CPUs, oneDNN compiles a bf16 kernel for every new N. And to
        # at least 128: under FSDP, a rank without targets must still use the output matrix.
        n_padded = 128 * max(1, math.ceil(len(x) / 128))
        x = F.pad(x, (0, 0, 0, n_padded - len(x)))
        targets = F.pad(targets, (0, n_padded - len(targets)), value=IGNORE)
        # With a large vocabulary the logits dominate memory. Compute about 2^25 of them (128 MiB)
        # at a time; if that takes several chunks, recompute each in the backward pass.
        chunk_rows = max(128, 2 ** 25 // self.config.vocab_size // 128 * 128)
        if len(x) <= chunk_rows:
            return self._chunk_nll(x, targets), count
        loss = 0.0
        for x_part, targets_part in zip(x.split(chunk_rows), targets.split(chunk_rows)):
            loss = loss + checkpoint(self._chunk_nll, x_part, targets_part, use_reentrant=False)
        return loss, count

    def _chunk_nll(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.output(self.norm(x)).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    # -- generation -------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate_textbook(self, prompt: Sequence[int], max_new_tokens: int,
                          stop: int = 2) -> Iterator[int]:
        """Greedy decoding of one prompt: prefill, then one token at a time."""
        limit = self.config.max_seq_len
        cache = self.new_cache([prompt], limit)
        tokens = torch.tensor([list(prompt)], device=self.tok_embeddings.weight.device)
        for _ in range(min(max_new_tokens, limit - len(prompt))):
            logits = self(tokens, cache=cache, last_only=True)  # (1, 1, V)
            token = logits[0, -1].argmax()
            yield int(token)
            if token == stop:
                return
            tokens = token.view(1, 1)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 repetition_penalty: float = 1.0, stop: int = 2, seed: int = 0,
                 images: torch.Tensor | None = None,
                 cache: KVCache | None = None) -> Iterator[list[int]]:
        """Batched decoding: yields one token per prompt in each step, until every row has produced
        `stop`, or after max_new_tokens, or when the context is full.

        `stop` is yielded, too; a finished row keeps yielding it. Temperature 0 is greedy; top_k 0
        and top_p 1 are off. With `cache` (one prompt only), the tokens it holds must be a prefix of
        the prompt. Only the rest, at least the last token, is processed; `images` are those of the
        rest.
        """
        device = self.tok_embeddings.weight.device
        longest = max(map(len, prompts))
        limit = self.context_limit(cache)
        if min(map(len, prompts)) == 0:
            raise UserError("empty prompt: at least a bos token is required")
        if longest >= limit:
            raise UserError(f"a prompt of {longest} tokens leaves no room in a context of {limit}")
        max_new_tokens = min(max_new_tokens, limit - longest)
        if cache is None:
            cache = self.new_cache(prompts, longest + max_new_tokens)
        cache.truncate(longest - 1)  # always read the last prompt token: its logits are needed
        rows = [[0] * (longest - len(p)) + list(p) for p in prompts]  # padded on the left
        tokens = torch.tensor(rows, device=device)[:, cache.length:]
        # for the repetition penalty: the tokens of the prompt and of the output so far
        seen = torch.zeros(len(prompts), self.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, [t for t in prompt if t != IMAGE_SLOT]] = True
        generator = torch.Generator(device).manual_seed(seed)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            logits = self(tokens, images, cache=cache, last_only=True)[:, -1].float()  # (B, V)
            sampled = sample(logits, seen, temperature, top_k, top_p, repetition_penalty, generator)
            new = torch.where(done, stop, sampled)
            done = done | (new == stop)
            yield new.tolist()
            if done.all():
                return
            seen.scatter_(1, new[:, None], True)
            tokens, images = new[:, None], None  # images belong to the prompts

    def new_cache(self, prompts: Sequence[Sequence[int]], max_len: int) -> KVCache:
        """An empty cache for these prompts; those of unequal length are padded on the left."""
        device = self.tok_embeddings.weight.device
        dtype = next(self.layers.parameters()).dtype
        longest = max(map(len, prompts))
        n_pad = [longest - len(p) for p in prompts]
        n_pad = torch.tensor(n_pad, device=device) if any(n_pad) else None
        return KVCache(self.config, len(prompts), max_len, dtype, device, n_pad)


# -- targets, positions, masks --------------------------------------------------------------------

def shift_labels(labels: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """Labels (B, T) -> the target of each position but the last, (B, T-1).

    The first token of a packed segment is not a target: it would have to be predicted from the
    segment before it. (That matters for documents. A conversation's first token is bos, which is
    never supervised.)
    """
    targets = labels[:, 1:]
    if segments is not None:
        targets = targets.masked_fill(segments[:, 1:] != segments[:, :-1], IGNORE)
    return targets


def count_targets(labels: torch.Tensor, segments: torch.Tensor | None) -> int:
    return int((shift_labels(labels, segments) != IGNORE).sum())


def positions_and_mask(T: int, past: int, segments: torch.Tensor | None,
                       n_pad: torch.Tensor | None, device) -> tuple:
    """The position of each token, (T,) or (B, T), and the attention mask (B, 1, T, S), or None for
    plain causal attention."""
    if segments is not None and (segments != segments[:, :1]).any():  # a row holds several
        assert past == 0 and n_pad is None, "packed rows are for training, without a cache"
        return packed_positions_and_mask(segments)
    if n_pad is not None:
        return padded_positions_and_mask(T, past, n_pad)
    return torch.arange(past, past + T, device=device), None


def packed_positions_and_mask(segments: torch.Tensor) -> tuple:
    """For packed rows (B, T): positions restart in each segment, and attention stays within it."""
    index = torch.arange(segments.shape[1], device=segments.device)
    is_first = segments[:, 1:] != segments[:, :-1]
    is_first = F.pad(is_first, (1, 0), value=True)  # True at the first token of each segment
    segment_start = torch.where(is_first, index, 0).cummax(dim=1).values
    same_segment = segments[:, :, None] == segments[:, None, :]
    mask = same_segment & causal_mask(len(index), len(index), index.device)
    return index - segment_start, mask[:, None]


def padded_positions_and_mask(T: int, past: int, n_pad: torch.Tensor) -> tuple:
    """For left-padded prompts; n_pad (B,) counts each row's padding. Positions start at the first
    real token, and no real token attends to padding."""
    q_pos = torch.arange(past, past + T, device=n_pad.device)
    k_pos = torch.arange(past + T, device=n_pad.device)
    causal = causal_mask(T, past + T, n_pad.device)
    not_padding = k_pos >= n_pad[:, None, None]  # (B, 1, S)
    itself = k_pos == q_pos[:, None]  # padding attends to itself: a fully masked row would be NaN
    mask = causal & (not_padding | itself)  # (B, T, S)
    return (q_pos - n_pad[:, None]).clamp(min=0), mask[:, None]


# -- sampling -------------------------------------------------------------------------------------

def sample(logits: torch.Tensor, seen: torch.Tensor, temperature: float, top_k: int, top_p: float,
           repetition_penalty: float, generator: torch.Generator) -> torch.Tensor:
    """One token per row of logits (B, V). seen (B, V) marks the tokens of prompt and output."""
    if repetition_penalty != 1.0:  # CTRL's (1909.05858); dividing would raise a negative logit
        lower = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, lower.clamp(-1e9, 1e9), logits)
    if temperature < 1e-6:  # below, logits / temperature may overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:  # nucleus sampling (1904.09751): the smallest set that has this probability
        sorted_logits, sorted_ids = logits.sort(descending=True)
        probs = sorted_logits.softmax(-1)
        before = probs.cumsum(-1) - probs  # probability of all tokens that are more likely
        outside = before >= max(top_p, 1e-9)  # the most likely token is always inside
        sorted_logits = sorted_logits.masked_fill(outside, float("-inf"))
        logits = torch.empty_like(logits).scatter_(1, sorted_ids, sorted_logits)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# -- initialization -------------------------------------------------------------------------------

@torch.no_grad()
def init_for_retrieval(model: LLaMA) -> None:
    """Initializes attention close to an induction head (2209.11895), which retrieves from context.

    After "the star is red", a model completes a later "the star is" in two steps: an early layer
    lets each token see its predecessors, and a later layer attends to earlier tokens that have the
    same predecessors. From a plain initialization, the toy model needs many more steps to learn
    that (compare mimetic initialization, 2305.09828):

    - Layer 0 attends to the current token and the few before it. Unrelated random embeddings have
      scores near zero at every distance; a component that all tokens share gives every pair the
      same score, which RoPE makes decay with distance. So the embeddings get a common mean
      (init_weights), and wq and wk map it onto the pairs that rotate fast.
    - Layer 0 adds what it attends to, times 0.33^2, to the residual stream: wo = wv^T, with an
      orthogonal wv. (With grouped queries, a projection of it, once per query head of a group.)
    - Later layers attend to identical tokens: wk = wq (in each group, that of its first query
      head). Both are doubled in the pairs that rotate slowly, whose scores hardly change with
      distance.
    """
    c = model.config
    n_rep = c.n_heads // c.n_kv_heads
    radians_per_token = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)  # (D/2,)
    fast = (radians_per_token > 0.1).float()
    slow = (radians_per_token < 0.05).float()

    def heads(linear: nn.Linear) -> torch.Tensor:  # (H or K, D, C), a view
        return linear.weight.view(-1, c.head_dim, c.dim)

    first = model.layers[0].attention
    # After the norm, the common mean is 0.7 in every channel. This raises the score of a token with
    # itself by 5: each fast pair adds (0.7 * C * shift)^2 / sqrt(D).
    shift = math.sqrt(5 * math.sqrt(c.head_dim) / fast.sum()) / (0.7 * c.dim)
    wq, wk = heads(first.wq), heads(first.wk)
    wq[:, 0::2] += shift * fast[:, None]  # the first of each pair
    wk[:, 0::2] += shift * fast[:, None]
    nn.init.orthogonal_(first.wv.weight, 0.33)
    wv = heads(first.wv).repeat_interleave(n_rep, 0)  # (H, D, C)
    first.wo.weight.copy_(wv.flatten(0, 1).T)
    for block in model.layers[1:]:
        wq, wk = heads(block.attention.wq), heads(block.attention.wk)
        wq *= 1 + slow.repeat_interleave(2)[:, None]
        wk.copy_(wq[::n_rep])


def count_parameters(config: LLaMAConfig) -> int:
    """The number of parameters of a network of this shape, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in LLaMA(config).parameters())


# -- LoRA: a trainable low-rank update for each frozen weight -------------------------------------

LORA_SCALE = 2.0  # alpha / r of [6], fixed here


class LoRALinear(nn.Linear):
    """[6] eq. 3, scaled: W x + (alpha / r) B A x. A (r, in) is random and B (out, r) is zero, so
    training starts from the base model."""

    def __init__(self, linear: nn.Linear, rank: int):
        # The base's weight is reused: "meta" allocates no other.
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        like = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        a = torch.randn(rank, self.in_features, **like) / math.sqrt(self.in_features)
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + LORA_SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(model: LLaMA, rank: int) -> None:
    """Freezes the model and adds adapters of this rank to every linear layer of every block."""
    model.requires_grad_(False)
    for block in model.layers:
        for part in (block.attention, block.feed_forward):
            for name, linear in list(part.named_children()):
                setattr(part, name, LoRALinear(linear, rank))


def merge_lora(weights: dict) -> tuple[dict, dict]:
    """Splits the state_dict of a model with adapters into merged weights and the adapters alone."""
    adapters = {name: w for name, w in weights.items() if ".lora_" in name}
    merged = {name: w for name, w in weights.items() if name not in adapters}
    for name in adapters:
        if name.endswith(".lora_a"):
            prefix = name.removesuffix("lora_a")
            update = LORA_SCALE * adapters[prefix + "lora_b"] @ adapters[name]
            merged[prefix + "weight"] = merged[prefix + "weight"] + update
    return merged, adapters
