"""A look inside: LLaMA's forward pass written out a second time, step by step. It keeps what the
fused one never shows: how much each head attends to each token.

    tokens = data.render(conversation, template, tokenizer).tokens
    logits, weights = forward_textbook(net, tokens, layer=2)
    weights[1, -1]                          # where head 1 of layer 2 looked, from the last token
    likeliest(logits[-1], k=5)              # the five likeliest next tokens

The page of `python sample.py --web` shows both for a token that is clicked.

Letters in the shape comments: T positions, C model dimension, H heads, K key/value heads, D head
dimension, V vocabulary, M image vectors.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

import model


@torch.inference_mode()
def forward_textbook(net: model.LLaMA, tokens: Sequence[int], layer: int = 0,
                     images: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits (T, V) of one sequence, and the attention weights (H, T, T) of one layer. Row t,
    which sums to 1, says how position t divides its attention among positions 0 to t.

    Reads all tokens at once, without a cache. images (M, C) fill the image slots in order.
    """
    device = net.tok_embeddings.weight.device
    x = net.embed(torch.tensor([list(tokens)], device=device), images)[0]  # (T, C)
    kept = None
    for i, block in enumerate(net.layers):
        attended, weights = attend(block.attention, block.attention_norm(x), net.config)
        x = x + attended
        x = x + feed_forward(block.feed_forward, block.ffn_norm(x))
        if i == layer:
            kept = weights
    return net.output(net.norm(x)), kept


def attend(part: model.Attention, x: torch.Tensor,
           c: model.LLaMAConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal self-attention: x (T, C) -> what it adds to the residual stream (T, C), and its
    weights (H, T, T)."""
    T = len(x)
    q = part.wq(x).view(T, c.n_heads, c.head_dim)
    k = part.wk(x).view(T, c.n_kv_heads, c.head_dim)
    v = part.wv(x).view(T, c.n_kv_heads, c.head_dim)
    q, k = rotate(q, c), rotate(k, c)
    heads, maps = [], []
    for head in range(c.n_heads):
        group = head * c.n_kv_heads // c.n_heads  # the key/value head that this head shares
        scores = q[:, head] @ k[:, group].T / math.sqrt(c.head_dim)  # (T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.float().masked_fill(future, float("-inf"))
        weights = scores.softmax(dim=-1)  # each row sums to 1
        maps.append(weights)
        heads.append(weights.type_as(v) @ v[:, group])  # (T, D)
    return part.wo(torch.cat(heads, dim=-1)), torch.stack(maps)


def rotate(x: torch.Tensor, c: model.LLaMAConfig) -> torch.Tensor:
    """RoPE: pair i of each head, seen as a complex number, is turned by t theta^(-2i/D) radians at
    position t. x (T, H, D)."""
    T, device = len(x), x.device
    frequencies = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=device) / c.head_dim)
    positions = torch.arange(T, device=device) / c.rope_scaling
    angles = positions[:, None] * frequencies  # (T, D/2)
    turns = torch.polar(torch.ones_like(angles), angles)  # cos + i sin
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())  # (T, H, D/2)
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).type_as(x)


def feed_forward(part: model.FeedForward, x: torch.Tensor) -> torch.Tensor:
    gate = part.w1(x)
    return part.w2(gate * torch.sigmoid(gate) * part.w3(x))  # SiLU(z) = z sigmoid(z)


def likeliest(logits: torch.Tensor, k: int = 5) -> list[tuple[int, float]]:
    """The k likeliest tokens by logits (V,), each with its probability, the likeliest first."""
    top = F.softmax(logits.float(), dim=-1).topk(min(k, len(logits)))
    return list(zip(top.indices.tolist(), top.values.tolist()))
