"""Will it fit? The sizes of the models, and the memory, time and money of full fine-tuning.

    python -m tools.estimate                                    # sizes
    python -m tools.estimate --preset=7B --gpus=8 --batch=4     # Vicuna-7B, trained with FSDP
"""

from dataclasses import dataclass
from typing import Literal

import torch

import model
import vision
from tools import config
from tools.config import run
from tools.machine import train_flops

GPUS = {  # GiB of memory, dense bfloat16 TFLOP/s, from the data sheets
    "A100-40GB": (40, 312),
    "A100-80GB": (80, 312),
    "H100": (80, 989),
    "H200": (140, 989),
    "RTX4090": (24, 165),
}


@dataclass
class EstimateConfig:
    preset: Literal["", "toy", "small", "7B", "13B", "30B", "65B"] = ""  # what to train; "": sizes
    vocab_size: int = 32000  # rows of the embedding
    gpus: int = 8  # number of GPUs
    gpu: Literal["A100-40GB", "A100-80GB", "H100", "H200", "RTX4090"] = "A100-80GB"  # kind of GPU
    seq: int = 2048  # tokens in a row
    batch: int = 1  # rows in one forward pass on one GPU
    tokens: float = 1.1e9  # to train on; ShareGPT's 370 M three times, as Vicuna
    mfu: float = 0.4  # model FLOPs utilization: share of the GPU's peak that is reached
    price: float = 1.5  # dollars per GPU-hour; gives Vicuna-13B's published $300

    def __post_init__(self):
        positive = ("vocab_size", "gpus", "seq", "batch", "tokens", "mfu", "price")
        config.check_above(self, 0, *positive)
        if not self.preset:
            training = ("gpus", "gpu", "seq", "batch", "tokens", "mfu", "price")
            config.refuse_unused(self, training, "it is for training, which needs --preset")


def activations_of_block(c: model.LLaMAConfig, tokens: int, e: int) -> int:
    """Bytes that autograd keeps of one block, tensor by tensor, with e bytes per activation."""
    norm = (4 + 2 * e) * c.dim + 4  # input in fp32, input / rms, times weight; 1 / rms
    attention = 4 * e * c.dim + 4 * c.n_heads  # q, k, v for all heads, wo's input; logsumexp
    feed_forward = 4 * e * c.hidden_dim  # w1 x, w3 x, SiLU(w1 x), their product
    return tokens * (2 * norm + attention + feed_forward)


def memory(c: model.LLaMAConfig, gpus: int = 1, batch: int = 1, seq: int = 2048,
           dtype: torch.dtype = torch.bfloat16, checkpointing: bool = False) -> dict[str, float]:
    """Bytes on each GPU when training with AdamW and fp32 master weights, every token supervised.
    "peak" is what must fit."""
    tokens, e = batch * seq, dtype.itemsize
    vocab = c.vocab_size * c.dim
    total = model.count_parameters(c)
    block = (total - c.dim - (1 if c.tied else 2) * vocab) // c.n_layers
    kept = activations_of_block(c, tokens, e)
    activations = c.n_layers * (tokens * e * c.dim if checkpointing else kept)
    # LLaMA.nll: log p, its gradient and the logits' for one chunk; the hidden states of all
    chunk = min(tokens, max(128, 2 ** 25 // c.vocab_size // 128 * 128))
    loss = 3 * 4 * chunk * c.vocab_size + tokens * e * c.dim
    copies = 0
    if gpus > 1:  # FSDP gathers two blocks and both vocabulary matrices, and sums two blocks' grads
        copies = e * (2 * block + 2 * vocab) + (e + 4) * 2 * block
    elif dtype == torch.bfloat16:  # autocast's copies of the weights
        copies = 2 * total
    parts = dict(weights=4 * total / gpus, gradients=4 * total / gpus, optimizer=8 * total / gpus,
                 copies=copies, activations=activations, loss=loss)
    # In the backward pass gradients grow while activations shrink. The peak is at the loss, at the
    # last block, or at the first one. Inside a block, gradients of its activations are added, and
    # with checkpointing the activations themselves.
    inside = 3 * tokens * e * c.hidden_dim
    if checkpointing:
        inside += kept
    highest = max(activations + loss,
                  activations + 4 * vocab / gpus + inside,
                  parts["gradients"] + inside)
    return dict(parts, peak=parts["weights"] + parts["optimizer"] + copies + highest)


def sizes(vocab_size: int) -> dict:
    """Prints and returns how many parameters each preset has."""
    figures = {}
    for name, shape in model.PRESETS.items():
        c = model.LLaMAConfig(vocab_size=vocab_size, **shape)
        figures[name] = model.count_parameters(c)
        print(f"{name:>6}: {figures[name]:>14,} parameters   dim {c.dim}, {c.n_layers} layers, "
              f"{c.n_heads} heads, feed-forward {c.hidden_dim}")
    for name, (vit, qformer) in vision.PRESETS.items():
        with torch.device("meta"):  # allocates nothing
            parts = {"ViT": vision.ViT(vision.ViTConfig(**vit)),
                     "Q-Former": vision.QFormer(vision.QFormerConfig(**qformer))}
            if name == "minigpt4":
                parts["projection to 7B"] = torch.nn.Linear(768, 4096)
        for part, module in parts.items():
            count = sum(p.numel() for p in module.parameters())
            figures[f"{name} {part}"] = count
            print(f"{name + ' ' + part:>25}: {count:>13,} parameters")
    return figures


def training(cfg: EstimateConfig) -> dict:
    """Prints memory on each GPU with and without checkpointing, time, and money."""
    c = model.LLaMAConfig(vocab_size=cfg.vocab_size, **model.PRESETS[cfg.preset])
    gibibytes, tflops = GPUS[cfg.gpu]
    plain = memory(c, cfg.gpus, cfg.batch, cfg.seq)
    saving = memory(c, cfg.gpus, cfg.batch, cfg.seq, checkpointing=True)
    print(f"full fine-tuning of {cfg.preset} in bfloat16 on {cfg.gpus} x {cfg.gpu}, "
          f"{cfg.batch} x {cfg.seq} tokens on each; GiB per GPU:\n{'checkpointing':>54}")
    for part in plain:
        print(f"{part:>26}{plain[part] / 2**30:>12.1f}{saving[part] / 2**30:>16.1f}")
    # CUDA itself takes about 1 GiB, and fragmentation some 5 %
    fits = [m["peak"] < (0.95 * gibibytes - 1) * 2**30 for m in (plain, saving)]
    print(f"fits into {gibibytes} GiB: {fits[0]}; with checkpointing: {fits[1]}")
    flops = train_flops(c, 1, 1, cfg.seq)
    hours = flops * cfg.tokens / (cfg.gpus * tflops * 1e12 * cfg.mfu) / 3600
    dollars = hours * cfg.gpus * cfg.price
    print(f"{flops / 1e9:.1f} GFLOP per token; {cfg.tokens:.3g} tokens at {100 * cfg.mfu:.0f}% of "
          f"{tflops} TFLOP/s: {hours:.1f} hours, ${dollars:.0f} at ${cfg.price} per GPU and hour")
    return dict(peak=plain["peak"], peak_checkpointing=saving["peak"], fits=fits, flops=flops,
                hours=hours, dollars=dollars)


def main(cfg: EstimateConfig) -> dict:
    return training(cfg) if cfg.preset else sizes(cfg.vocab_size)


if __name__ == "__main__":
    run(main, EstimateConfig)
