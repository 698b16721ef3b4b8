"""The training loop, and the toy chain: a base model is pre-trained on plain documents, as LLaMA
was, then fine-tuned twice: into Alpaca (single-turn instructions, terse answers) and into Vicuna
(conversations, full answers).

    python train_sft.py                    # the toy chain: data, tokenizer, three models, a table
    python train_sft.py --fast             # less data, fewer steps: shows the trend only
    python train_sft.py --data=mine.json   # your conversations (ShareGPT or Alpaca) or plain text
    python train_sft.py --stage=sft --data=alpaca.json --init=out/base --out=out/mine
    torchrun --nproc_per_node=8 train_sft.py vicuna-7b --data=sharegpt.json --init=llama-7b

Ctrl-C and SIGTERM save a checkpoint and stop; one is also saved every --save_minutes. Run the same
command again to resume.

References: LLaMA (2302.13971) section 2.3 for the optimizer; Alpaca and Vicuna for the loss on
replies and </s> only; Jordan et al. 2024, Muon (kellerjordan.github.io/posts/muon).
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import init_device_mesh

import data
import model
from tools import checkpoint, config
from tools.config import UserError, refuse_unused
from tools.machine import Machine, choose_machine, train_flops, use_threads
from tools.run import (
    FULL_STATE,
    SETTINGS,
    Plan,
    Run,
    announce,
    announce_resume,
    explain_errors,
    find_resume,
    language_model,
    lock,
)


@dataclass
class SFTConfig:
    stage: Literal["all", "pretrain", "sft"] = "all"  # all: whatever --data needs
    data: str = ""  # plain text, ShareGPT or Alpaca file; the toy chain when not given
    out: str = ""  # folder of the run; default: out, or out/fast with --fast
    init: str = ""  # checkpoint folder to fine-tune
    tokenizer: str = ""  # tokenizer.model or checkpoint folder; trained on the data when not given
    template: str = ""  # for your own data: alpaca for Alpaca files, else vicuna_v1.1
    preset: Literal["toy", "small", "7B", "13B", "30B", "65B"] = "toy"  # size of a new model
    vocab_size: int = 1024  # of a new tokenizer
    seq_len: int = 256  # context length: tokens in a packed row
    batch_size: int = 8  # rows in an optimizer step, over all processes
    micro_batch: int = 0  # rows in one forward pass of one process; 0: no gradient accumulation
    steps: int = 0  # optimizer steps; 0: from --epochs (fine-tuning a toy model: at least 200)
    epochs: float = 3.0  # passes over your own data; --steps overrides it
    learning_rate: float = 0.0  # peak; 0: 1e-3, or 2e-5 above 1 B parameters, times 10 with LoRA
    warmup: float = 0.1  # fraction of the steps
    min_lr: float = 0.1  # the cosine ends at this fraction of the peak
    weight_decay: float = 0.1  # on matrices only
    optimizer: Literal["auto", "adamw", "muon"] = "auto"  # auto: muon for the toy chain, else adamw
    beta2: float = 0.99  # of AdamW's second moment; LLaMA's is 0.95
    clip: float = 1.0  # clip the global gradient norm to this
    lora_rank: int = 0  # rank of LoRA adapters; 0: full fine-tuning
    checkpointing: bool = False  # activation checkpointing: less memory, 1/3 more compute
    compile: bool = False  # torch.compile each block: a slow first step, faster ones after it
    fused: bool = True  # false: attention written out in PyTorch
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is fast
    device: str = "auto"  # cuda, mps or cpu
    threads: int = 0  # CPU threads of a process; 0: OMP_NUM_THREADS, else one per core
    seed: int = 0  # of the data, the initialization, and the order of rows
    save_minutes: float = 5.0  # between checkpoints
    fast: bool = False  # toy chain: less data, fewer steps
    full: bool = False  # toy chain: also train two controls, and test every held-out split
    resume: Literal["auto", "never"] = "auto"  # never: start again from the first step
    patience: float = 30.0  # torchrun: minutes after which a silent process counts as lost

    def __post_init__(self):
        self.out = self.out or ("out/fast" if self.fast else "out")
        config.check_above(self, 0, "seq_len", "batch_size", "epochs", "clip", "save_minutes",
                           "patience")
        config.check_at_least(self, 0, "steps", "learning_rate", "weight_decay", "micro_batch",
                              "seed", "min_lr", "lora_rank", "threads")
        config.check_at_least(self, 300, "vocab_size")  # 259 are bytes and control tokens
        if not 0 <= self.warmup < 1 or not 0 <= self.beta2 < 1:
            raise UserError("--warmup and --beta2 must be in [0, 1)")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise UserError(f"--batch_size={self.batch_size} must be a multiple of "
                            f"--micro_batch={self.micro_batch}")


# As published in Alpaca's and FastChat's READMEs and scripts, with torch's default beta2. Their
# batch is 128 padded conversations; here it is 128 packed rows.
PUBLISHED = dict(stage="sft", batch_size=128, micro_batch=4, learning_rate=2e-5, epochs=3.0,
                 warmup=0.03, min_lr=0.0, weight_decay=0.0, beta2=0.999)
ALPACA = dict(PUBLISHED, template="alpaca", seq_len=512)
VICUNA = dict(PUBLISHED, template="vicuna_v1.1", seq_len=2048, checkpointing=True)
PRESETS = {
    "alpaca-7b": dict(ALPACA, init="llama-7b"),
    "alpaca-13b": dict(ALPACA, init="llama-13b", learning_rate=1e-5, epochs=5.0),
    "vicuna-7b": dict(VICUNA, init="llama-7b"),
    "vicuna-13b": dict(VICUNA, init="llama-13b"),
    # Koala published two epochs, but no learning rate, batch size or length: those are Vicuna's.
    "koala-13b": dict(VICUNA, init="llama-13b", template="koala", epochs=2.0),
    # ours, for one GPU: `train_sft.py small --data=shakespeare.txt`
    "small": dict(preset="small", seq_len=512, batch_size=64, vocab_size=4096, epochs=10.0),
}


# -- FSDP -----------------------------------------------------------------------------------------

def shard(net: torch.nn.Module, machine: Machine) -> None:
    """FSDP2: each of N ranks keeps 1/N of the weights, gradients and optimizer state, and a block
    is gathered only while it runs. Master weights and gradient reduction are in fp32."""
    mesh = init_device_mesh(machine.device, (machine.world,))
    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=machine.dtype, reduce_dtype=torch.float32,
        cast_forward_inputs=False)  # the rotary angles must stay in fp32
    llama = language_model(net)
    for block in llama.layers:
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
    if not llama.config.tied:  # a tied matrix belongs to the root, where the embedding is
        fsdp.fully_shard([llama.norm, llama.output], mesh=mesh, mp_policy=policy,
                         reshard_after_forward=False)
    # A frozen vision encoder stays whole on every rank. A rank whose batch has no images does not
    # call it; if it were sharded, the others would wait for that rank forever.
    language = set(llama.parameters())
    encoder = {p for p in net.parameters() if not p.requires_grad and p not in language}
    ignored = dict(ignored_params=encoder) if encoder else {}
    fsdp.fully_shard(net, mesh=mesh, mp_policy=policy, **ignored)
    fsdp.register_fsdp_forward_method(net, "nll")


# -- the optimizer --------------------------------------------------------------------------------

def learning_rate(step: int, cfg: SFTConfig) -> float:
    """Linear warmup, then a cosine from the peak down to min_lr times the peak."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step < warm:
        return cfg.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, cfg.steps - warm)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.learning_rate * (cfg.min_lr + (1 - cfg.min_lr) * cosine)


@torch.no_grad()
def muon_textbook(p: torch.Tensor, momentum: torch.Tensor, lr: float, weight_decay: float) -> None:
    """One Muon step for one weight matrix: replaces its Nesterov momentum U S V^T with U V^T. All
    directions then move about equally far, including those with small singular values, which come
    from rare examples. Class Muon does the same in batches.

    The factor 0.4 sqrt(max(shape)) gives an exact U V^T of full rank an RMS of 0.4 lr for any
    shape; 2502.16982, section 2.2, has 0.2.
    """
    momentum.mul_(0.95).add_(p.grad)
    update = orthogonalize((p.grad + 0.95 * momentum)[None])[0]
    p.mul_(1 - lr * weight_decay)
    p.add_(update, alpha=-0.4 * lr * max(p.shape) ** 0.5)


class Muon(torch.optim.AdamW):
    """Muon for the matrices inside the blocks, AdamW for everything else. Matrices of one shape are
    stacked, so that Newton-Schulz runs as batched matrix products."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["in_blocks"]:
                continue
            by_shape: dict = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for matrices in by_shape.values():
                self.muon_step(matrices, group["lr"], group["weight_decay"])
        super().step(closure)

    def muon_step(self, matrices: list[torch.Tensor], lr: float, weight_decay: float) -> None:
        """muon_textbook for several matrices of one shape."""
        updates = []
        for p in matrices:
            state = self.state[p]
            if not state:  # AdamW looks for "step" when its state is loaded
                state.update(momentum=torch.zeros_like(p), step=torch.zeros(()))
            state["momentum"].mul_(0.95).add_(p.grad)
            updates.append(p.grad + 0.95 * state["momentum"])
        for p, update in zip(matrices, orthogonalize(torch.stack(updates))):
            p.mul_(1 - lr * weight_decay)
            p.add_(update, alpha=-0.4 * lr * max(p.shape) ** 0.5)
            p.grad = None  # so that AdamW skips it


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Approximates U V^T for each x = U S V^T of a stack (matrices, rows, columns), by five
    Newton-Schulz iterations. With these coefficients, singular values end between about 0.7 and
    1.2; those below 1/700 of the Frobenius norm end lower."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)  # now no singular value exceeds 1
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x


def make_optimizer(net: torch.nn.Module, cfg: SFTConfig) -> torch.optim.AdamW:
    """AdamW or Muon, with weight decay on matrices only."""
    groups: dict = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            # "layers" of LLaMA and the Q-Former, "blocks" of the ViT
            in_blocks = p.dim() == 2 and bool(re.search(r"(layers|blocks)\.\d", name))
            groups.setdefault((p.dim() > 1, in_blocks), []).append(p)
    param_groups = []
    for (is_matrix, in_blocks), params in groups.items():
        decay = cfg.weight_decay if is_matrix else 0.0
        param_groups.append(dict(params=params, in_blocks=in_blocks, weight_decay=decay))
    optimizer = Muon if cfg.optimizer == "muon" else torch.optim.AdamW
    return optimizer(param_groups, lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)


# -- the loop -------------------------------------------------------------------------------------

def loss_backward(net, parts: list[tuple], machine: Machine) -> float:
    """Accumulates gradients over the micro-batches of one step; returns this process's share of the
    mean loss.

    The sum over supervised tokens is divided by their count over *all* micro-batches and processes.
    A mean of means would give more weight to the tokens of a micro-batch that has few of them, and
    would be NaN if one had none. A micro-batch is (tokens, labels, segments),
    and for MiniGPT-4 also images.
    """
    own_count = 0
    for _, labels, segments, *_ in parts:
        own_count += model.count_targets(labels, segments)
    count = max(1, machine.total(own_count)[0])  # needed before the first backward pass
    loss = 0.0
    for tokens, labels, segments, *images in parts:
        with machine.autocast():
            nll, _ = net.nll(tokens, labels, *images, segments=segments)
        (nll * machine.world / count).backward()  # FSDP averages gradients over the processes
        loss += nll.item() / count
    return loss


def micro_batches(batch: tuple, size: int, device: str) -> list[tuple]:
    """Splits a batch into micro-batches of `size` rows and moves them to the device."""
    parts = []
    for i in range(0, len(batch[0]), size):
        parts.append(tuple(None if t is None else t[i:i + size].to(device) for t in batch))
    return parts


def clip_gradients(net, clip: float) -> float:
    """Clips the global gradient norm to `clip`; returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    if hasattr(norm, "full_tensor"):  # FSDP
        norm = norm.full_tensor()
    return norm.item()


def train(net, rows: data.Rows, cfg: SFTConfig, machine: Machine, folder: Path, name: str,
          meta: dict, tokenizer: data.Tokenizer, start: int = 0,
          optimizer_state: dict | None = None, callback: Callable | None = None) -> None:
    """Runs steps start .. cfg.steps - 1 and saves into `folder`. `callback(net, step)` is called
    every 100 steps; what it returns is logged."""
    share, micro = split_batch(rows, cfg, machine, name)
    net.train()
    language_model(net).checkpointing = cfg.checkpointing
    language_model(net).set_fused(cfg.fused)
    if cfg.compile:
        for block in language_model(net).layers:
            block.compile()
    if machine.sharded:
        shard(net, machine)
    optimizer = make_optimizer(net, cfg)  # after shard(): it must hold the shards
    if optimizer_state:
        state_dict.set_optimizer_state_dict(net, optimizer, optimizer_state, options=FULL_STATE)
    with Run(net, optimizer, cfg, machine, folder, name, meta, tokenizer, start) as run:
        for step in range(start, cfg.steps):
            batch = rows.batch(step * machine.world + machine.rank, share)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            loss = loss_backward(net, micro_batches(batch, micro, machine.device), machine)
            norm = clip_gradients(net, cfg.clip)
            loss = run.sync(loss)  # over all processes, which also agree here to stop or save
            run.check_finite(step, loss, norm)  # before the update: the weights are still good
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            noted = {}
            if callback and (step + 1) % 100 == 0:
                noted = callback(net, step + 1)
            run.log(step, loss, norm, batch, noted)
            run.save_if_due(step)
    net.eval()


def split_batch(rows: data.Rows, cfg: SFTConfig, machine: Machine, name: str) -> tuple[int, int]:
    """Rows of a step for this process, and rows of one forward pass."""
    if len(rows) < cfg.batch_size:
        raise UserError(f"{name}: the data fills only {len(rows)} rows of {cfg.seq_len} tokens, "
                        f"less than one batch of {cfg.batch_size}; give more data, or a smaller "
                        "--batch_size or --seq_len")
    share, rest = divmod(cfg.batch_size, machine.world)
    if rest:
        raise UserError(f"--batch_size={cfg.batch_size} must be a multiple of {machine.world} "
                        "processes")
    micro = cfg.micro_batch or share
    if share % micro:
        raise UserError(f"--batch_size={cfg.batch_size} gives each of {machine.world} processes "
                        f"{share} rows, which must be a multiple of --micro_batch={micro}")
    return share, micro


# -- one stage: trains one model into one folder, or resumes --------------------------------------

def run_stage(cfg: SFTConfig, name: str, machine: Machine, rows: data.Rows,
              tokenizer: data.Tokenizer, template: str, source: str, parent: str = "",
              shape: dict | None = None, network: torch.nn.Module | None = None,
              extra_settings: dict | None = None, window: int = 0,
              callback: Callable | None = None) -> torch.nn.Module:
    """Trains one model into cfg.out/name and returns it; loads it if it is already trained.

    Exactly one of these says where the weights come from: `parent`, a checkpoint; `shape`, for
    random weights; `network`, which may have frozen parts, and whose language model was trained on
    a context of `window` tokens. `source` and `extra_settings` identify the data and whatever else
    the run depends on: if they change, it is not resumed.
    """
    folder = Path(cfg.out) / name
    if parent:
        step = checkpoint.find(parent).resolve()
        if folder.resolve() in (step, step.parent):
            raise UserError(f"{folder} is the model to start from; choose another --out")
    cfg = resolve(cfg, parent, shape)
    if cfg.optimizer == "muon" and machine.sharded:
        raise UserError("--optimizer=muon needs whole matrices, but under torchrun every process "
                        "has a shard: use adamw")
    settings = {key: getattr(cfg, key) for key in SETTINGS}
    settings.update(template=template, data=source, shape=shape, **(extra_settings or {}),
                    parent=str(checkpoint.find(parent)) if parent else "",
                    parent_crc=checkpoint.fingerprint(parent) if parent else "",
                    tokenizer=checkpoint.digest(tokenizer.path))
    resume = find_resume(folder, settings, machine, network) if cfg.resume == "auto" else None
    if resume and resume.optimizer is None:
        print(f"{name}: {folder} is already trained ({resume.step} steps); --resume=never trains "
              "it again")
        return resume.net.to(machine.device).eval()
    net = build_network(cfg, resume, network, parent, shape, tokenizer, machine)
    if network is None:
        window = cfg.seq_len
        if parent:
            parent_config, _, parent_meta = checkpoint.peek(parent)
            window = max(window, checkpoint.window(parent_meta, parent_config))
    meta = dict(stage=name, template=template, parent=settings["parent"], settings=settings,
                window=window, processes=machine.world)
    if resume:
        announce_resume(name, cfg, resume, machine)
    else:
        announce(name, cfg, net, settings["parent"], rows)
        machine.barrier()  # every process must be past find_resume
        if machine.rank == 0:
            for old in checkpoint.steps(folder):
                shutil.rmtree(old)
    start, optimizer_state = (resume.step, resume.optimizer) if resume else (0, None)
    with explain_errors(cfg, machine, folder):
        train(net.to(machine.device), rows, cfg, machine, folder, name, meta, tokenizer, start,
              optimizer_state, callback)
    return net


def resolve(cfg: SFTConfig, parent: str, shape: dict | None) -> SFTConfig:
    """Fills in the optimizer and the learning rate if they are set to auto."""
    if cfg.optimizer == "auto":
        cfg = replace(cfg, optimizer="adamw")
    if cfg.learning_rate:
        return cfg
    c = checkpoint.peek(parent)[0] if parent else model.LLaMAConfig(**(shape or {}))
    rate = 2e-5 if model.count_parameters(c) > 1e9 else 1e-3
    return replace(cfg, learning_rate=rate * 10 if cfg.lora_rank else rate)


def build_network(cfg: SFTConfig, resume, network, parent: str, shape: dict | None,
                  tokenizer: data.Tokenizer, machine: Machine) -> torch.nn.Module:
    """The network to train: resumed, passed in, loaded from `parent`, or randomly initialized; with
    adapters for LoRA."""
    if resume and not cfg.lora_rank:
        return resume.net
    if network is not None:
        return network
    torch.manual_seed(cfg.seed)
    if not parent:
        length = max(cfg.seq_len, shape.get("max_seq_len", 2048))
        shape = {**shape, "vocab_size": tokenizer.vocab_size, "max_seq_len": length}
        # Not LLaMA's initialization: see model.init_for_retrieval.
        return model.LLaMA(model.LLaMAConfig(**shape), retrieval_init=True)
    net = checkpoint.load(parent, mmap=machine.sharded)[0]
    if cfg.lora_rank:
        model.add_lora(net, cfg.lora_rank)
        if resume:
            net.load_state_dict({**net.state_dict(), **resume.adapters})
    return net


# -- pre-training and fine-tuning -----------------------------------------------------------------

def pretrain(cfg: SFTConfig, name: str, machine: Machine, path,
             tokenizer: data.Tokenizer | None = None,
             callback: Callable | None = None) -> model.LLaMA:
    """LLaMA: every token is supervised. The last tenth of the data is held out for validation.

    Plain text is one stream, and so is a single document. In JSON lines, each "text" is a document
    between <s> and </s>; those that share a row do not attend to each other.
    """
    texts = data.load_documents(path)
    is_stream = len(texts) == 1
    train_texts, held_texts = hold_out_a_tenth(texts)
    if tokenizer is None:
        tokenizer = own_tokenizer(train_texts, name, cfg, machine)
    if is_stream:
        ids = data.encode_text(train_texts[0], tokenizer)
        held_ids = data.encode_text(held_texts[0], tokenizer)
        rows = data.TextRows(ids, cfg.seq_len, tokenizer.bos, cfg.seed)
        held_rows = data.windows(held_ids, cfg.seq_len, tokenizer.bos)
        n_tokens = len(ids)
    else:
        rows = pack_documents(train_texts, tokenizer, cfg)
        held_rows = pack_documents(held_texts, tokenizer, cfg)
        n_tokens = int((rows.segments >= 0).sum())
    if not cfg.steps:
        cfg = replace(cfg, steps=max(1, round(cfg.epochs * len(rows) / cfg.batch_size)))
    characters = sum(map(len, train_texts))
    print(f"{path}: training on {characters} characters, {n_tokens} tokens, vocabulary "
          f"{tokenizer.vocab_size} ({characters / max(1, n_tokens):.2f} characters per token)")
    net = run_stage(cfg, name, machine, rows, tokenizer, "plain", checkpoint.digest(path),
                    shape=model.PRESETS[cfg.preset], callback=callback)
    loss, count = validate(net, held_rows, machine)
    # Documents may be cut, so the characters that were scored are known for a stream only.
    per_character = f", {loss / len(held_texts[0]):.3f} per character" if is_stream else ""
    print(f"{name}: validation loss {loss / max(1, count):.3f} nats per token{per_character}, on "
          "the held-out last tenth")
    return net


def hold_out_a_tenth(texts: list[str]) -> tuple[list[str], list[str]]:
    """Splits documents, or a single text where a line ends nearby, into 90% and 10%."""
    if len(texts) != 1:
        cut = len(texts) * 9 // 10
        return texts[:cut], texts[cut:]
    (text,) = texts
    cut = len(text) * 9 // 10
    newline = text.rfind("\n", len(text) * 89 // 100, cut)
    if newline >= 0:
        cut = newline + 1
    return [text[:cut]], [text[cut:]]


def own_tokenizer(texts: list[str], name: str, cfg: SFTConfig, machine: Machine) -> data.Tokenizer:
    path = Path(cfg.out) / "data" / f"{name}.model"
    if machine.rank == 0:
        data.train_tokenizer(texts[:10000], cfg.vocab_size, path)
    machine.barrier()
    return data.Tokenizer(path)


def pack_documents(texts: list[str], tokenizer: data.Tokenizer, cfg: SFTConfig) -> data.Rows:
    examples = []
    for ids in tokenizer.sp.encode(texts):
        ids = [tokenizer.bos, *ids, tokenizer.eos]
        examples.append(data.Example(ids, ids))
    warn_if_cut(examples, cfg, "documents")
    return data.pack(examples, cfg.seq_len, cfg.seed, tokenizer.eos)


def warn_if_cut(examples: list[data.Example], cfg: SFTConfig, what: str, hint: str = "") -> None:
    too_long = sum(len(e.tokens) > cfg.seq_len for e in examples)
    if too_long:
        print(f"  {too_long} of {len(examples)} {what} are longer than --seq_len={cfg.seq_len} "
              f"tokens and are cut{hint}")


@torch.no_grad()
def validate(net, rows: data.Rows, machine: Machine, batch: int = 32) -> tuple[float, int]:
    """The total loss in nats over the supervised tokens of the rows, and their count. Rank r takes
    batches r, r + world, ... All ranks compute equally many, or FSDP would wait forever: the last
    ones are padded with repeated rows, which are not scored."""
    total, count = 0.0, 0
    for begin in range(batch * machine.rank, batch * machine.rank + len(rows),
                       batch * machine.world):
        index = np.arange(begin, begin + batch)
        tokens, labels, segments = rows.at(index % len(rows))
        labels[torch.from_numpy(index >= len(rows))] = data.IGNORE
        [(tokens, labels, segments)] = micro_batches((tokens, labels, segments), batch,
                                                     machine.device)
        with machine.autocast():
            nll, n = net.nll(tokens, labels, segments=segments)
        total, count = total + nll.item(), count + int(n)
    total, count = machine.total(total, count)
    return total, int(count)


def fine_tune(cfg: SFTConfig, name: str, machine: Machine, path, parent: str = "",
              shape: dict | None = None, tokenizer: data.Tokenizer | None = None,
              callback: Callable | None = None) -> model.LLaMA:
    """Supervised fine-tuning: only the replies and their ends are in the loss. Alpaca and Vicuna
    differ only in the file, and in the template that goes with it.

    Starts from `parent`, or from scratch with `shape` and `tokenizer`.
    """
    template = cfg.template or data.default_template(data.kind_of(path))
    if not parent:
        c = model.LLaMAConfig(**shape)
    else:
        c, tokenizer_path, _ = checkpoint.peek(parent)
        tokenizer = data.Tokenizer(tokenizer_path)
        if cfg.seq_len > c.max_seq_len:
            raise UserError(f"--seq_len={cfg.seq_len} is more than the {c.max_seq_len} "
                            f"positions of {parent}")
    rows = conversation_rows(path, template, tokenizer, cfg)
    if not cfg.steps:
        steps = round(cfg.epochs * len(rows) / cfg.batch_size)
        # A toy model learns nothing from the few steps that a small file gives.
        least = 200 if model.count_parameters(c) < 1e7 else 1
        cfg = replace(cfg, steps=max(least, steps))
    return run_stage(cfg, name, machine, rows, tokenizer, template, checkpoint.digest(path), parent,
                     shape, callback=callback)


def conversation_rows(path, template: str, tokenizer: data.Tokenizer, cfg: SFTConfig) -> data.Rows:
    """The packed conversations of a file. Prints how many tokens are in the loss, and what is cut
    or dropped."""
    report = data.Report()
    examples = data.render_file(path, template, tokenizer, report)
    rows = data.pack(examples, cfg.seq_len, cfg.seed, pad=tokenizer.eos)
    total = (rows.segments >= 0).sum()
    supervised = (rows.labels != data.IGNORE).sum()
    print(f"{path}: {len(examples)} conversations, {total} tokens, {supervised} supervised "
          f"({100 * supervised / total:.0f}%), packing efficiency "
          f"{100 * total / rows.tokens.size:.0f}%{report}")
    warn_if_cut(examples, cfg, "conversations",
                "; `python -m recipes.sharegpt split` keeps all of them")
    if not supervised:
        raise UserError(f"{path}: nothing is supervised; no reply fits into "
                        f"--seq_len={cfg.seq_len}, or all have weight 0")
    return rows


# -- your own file --------------------------------------------------------------------------------

def own_data(cfg: SFTConfig, machine: Machine) -> dict:
    """--data: the file's content decides what is trained, and the decision is printed."""
    refuse_unused(cfg, ("fast", "full"), "it is for the toy chain, without --data")
    name, out, kind = Path(cfg.data).stem.split(".")[0], Path(cfg.out), data.kind_of(cfg.data)
    if kind in ("text", "documents"):
        if cfg.stage == "sft":
            raise UserError(f"{cfg.data} holds {kind}; --stage=sft needs conversations")
        refuse_unused(cfg, ("init", "template", "lora_rank"),
                      f"{kind} pre-trains a new model from scratch")
        own_text(cfg, name, machine, kind)
        return dict(folder=str(out / name))
    if cfg.stage == "pretrain":
        raise UserError(f"{cfg.data} holds conversations ({kind}); --stage=pretrain needs text")
    parent, reason = choose_base(cfg)
    if cfg.stage == "sft" and not parent:
        raise UserError(f"--stage=sft needs --init: {reason}")
    template = cfg.template or data.default_template(kind)
    if parent:
        refuse_unused(cfg, ("preset", "vocab_size", "tokenizer"), f"{parent} has its own")
        print(f"{cfg.data} is {kind}, template {template}: fine-tuning {parent} ({reason})")
    else:
        steps = cfg.steps or 400
        print(f"{cfg.data} is {kind}, template {template}: {reason}, so a {cfg.preset} base model "
              f"is first pre-trained on the text of these conversations, for {steps} steps")
        parent = str(out / f"{name}-base")
        text = out / "data" / f"{name}-base.json"  # a document, whatever it looks like
        if machine.rank == 0:
            with data.atomic_write(text) as file:
                json.dump(dict(text="\n\n".join(conversation_texts(cfg.data))), file)
        machine.barrier()
        # learning_rate 0 is auto; --learning_rate is for fine-tuning
        base = replace(cfg, data=str(text), learning_rate=0.0, lora_rank=0, steps=steps)
        own_text(base, f"{name}-base", machine, "text")
    fine_tune(replace(cfg, template=template), name, machine, cfg.data, parent)
    return dict(folder=str(out / name))


def own_text(cfg: SFTConfig, name: str, machine: Machine, kind: str) -> None:
    """Pre-trains on plain text or documents."""
    tokenizer, source = None, f"a new tokenizer of at most {cfg.vocab_size} pieces"
    if cfg.tokenizer:
        refuse_unused(cfg, ("vocab_size",), "--tokenizer is given")
        tokenizer = data.find_tokenizer(cfg.tokenizer)
        source = f"the tokenizer of {cfg.tokenizer}"
    print(f"{cfg.data} is {kind}: pre-training a {cfg.preset} model on it, with {source}")
    pretrain(cfg, name, machine, cfg.data, tokenizer)


def conversation_texts(path) -> list[str]:
    return [turn.whole() for c in data.load_conversations(path) for turn in c.turns]


def choose_base(cfg: SFTConfig) -> tuple[str, str]:
    """The checkpoint to fine-tune ("" if there is none that fits) and the reason."""
    if cfg.init:
        return cfg.init, "as requested"
    base = Path(cfg.out) / "base"
    if not (base / "latest").exists():
        return "", f"there is no base model in {base}"
    sample = "\n".join(conversation_texts(cfg.data)[:200])
    characters_per_token = len(sample) / len(data.find_tokenizer(base).encode(sample))
    reason = f"its tokenizer gives {characters_per_token:.1f} characters per token on this text"
    if characters_per_token > 1.5:  # near 1, the text falls apart into characters and bytes
        return str(base), reason
    return "", f"{base} does not fit: {reason}"


# -- the toy chain --------------------------------------------------------------------------------

# Sizes of the data, steps of each stage, and questions in each row of the exam. "equal": the steps
# after which Alpaca has seen about as many supervised tokens as Vicuna.
TOY = dict(documents=16000, instructions=6000, conversations=12000, base=1200, alpaca=100,
           vicuna=1500, equal=5200, questions=100)
FAST = dict(documents=6000, instructions=3000, conversations=5000, base=170, alpaca=40,
            vicuna=150, equal=520, questions=50)


def toy_chain(cfg: SFTConfig, machine: Machine) -> dict:
    """Trains a base model, fine-tunes it into Alpaca and Vicuna, and runs the exam; --full adds two
    controls."""
    from toy import exam, world
    refuse_unused(cfg, ("init", "tokenizer", "template", "epochs", "lora_rank"),
                  "it is only for --data=FILE")
    if cfg.stage != "all" or machine.sharded:
        raise UserError("--stage and torchrun need --data=FILE; the toy chain is for one process")
    shape = model.PRESETS[cfg.preset]
    if 2 * cfg.seq_len > shape.get("max_seq_len", 2048):
        raise UserError(f"--seq_len={cfg.seq_len}: Vicuna's rows are twice as long, which is more "
                        f"than the positions of {cfg.preset}")
    began, sizes, out = time.time(), FAST if cfg.fast else TOY, Path(cfg.out)
    if cfg.optimizer == "auto":
        cfg = replace(cfg, optimizer="muon")
    files = world.write_files(out / "data", sizes, cfg.seed)
    tokenizer = exam.toy_tokenizer(files, cfg.vocab_size, out / "data" / "toy.model")
    base = str(out / "base")
    steps = {name: cfg.steps or sizes[name] for name in ("base", "alpaca", "vicuna")}
    if cfg.full:
        steps["random-init"] = steps["vicuna"]
        steps["alpaca-equal"] = cfg.steps or sizes["equal"]

    # First guess of the time: a model this small reaches about a third of the peak FLOP/s.
    tokens = cfg.batch_size * cfg.seq_len
    flops = train_flops(model.LLaMAConfig(**shape), tokens, supervised=0, seq_len=cfg.seq_len)
    seconds_per_step = 3 * flops / machine.peak_flops
    plan = Plan({**steps, "exam": sum(steps.values()) // 5}, seconds_per_step)

    def begin_stage(name: str, what: str) -> SFTConfig:
        plan.begin(name, what)
        stage = replace(cfg, steps=steps[name])
        if name in ("vicuna", "random-init"):
            # Longer rows, as in the original (512, then 2048 tokens), but as many tokens in a step.
            stage = replace(stage, seq_len=2 * cfg.seq_len, batch_size=max(1, cfg.batch_size // 2))
        return stage

    models = {}
    exam.print_watched_question()
    stage = begin_stage("base", "LLaMA, pre-trained on documents")
    models["base"] = pretrain(stage, "base", machine, files["base"], tokenizer,
                              exam.watcher(tokenizer, "lines"))
    stage = begin_stage("alpaca", "Alpaca, the base fine-tuned on instructions")
    models["Alpaca"] = fine_tune(stage, "alpaca", machine, files["alpaca"], base,
                                 callback=exam.watcher(tokenizer, "alpaca"))
    stage = begin_stage("vicuna", "Vicuna, the base fine-tuned on conversations")
    models["Vicuna"] = fine_tune(stage, "vicuna", machine, files["vicuna"], base,
                                 callback=exam.watcher(tokenizer, "vicuna_v1.1"))
    if cfg.full:
        stage = begin_stage("random-init", "control: Vicuna's data from random initialization")
        models["random init"] = fine_tune(stage, "random-init", machine, files["vicuna"],
                                          shape=shape, tokenizer=tokenizer)
        stage = begin_stage("alpaca-equal", "control: Alpaca, as many supervised tokens as Vicuna")
        models["Alpaca ="] = fine_tune(stage, "alpaca-equal", machine, files["alpaca"], base)
    plan.begin("exam", "the exam")
    figures = exam.run_toy_exam(models, tokenizer, files, sizes["questions"], cfg.full)
    figures.update(seed=cfg.seed, minutes=round((time.time() - began) / 60, 2))
    with data.atomic_write(out / "table.json") as file:
        json.dump(figures, file, indent=1)
    exam.plot_losses(out)
    exam.print_next_steps(cfg, figures["minutes"])
    return figures


def main(cfg: SFTConfig) -> dict:
    if not cfg.data and cfg.dtype == "auto":
        print("the toy chain trains in float32: in bfloat16, retrieval takes more steps to learn")
        cfg = replace(cfg, dtype="float32")
    use_threads(cfg.threads, cfg.device)
    machine = choose_machine(cfg.device, cfg.dtype, cfg.patience)
    if not machine.sharded:
        refuse_unused(cfg, ("patience",), "it is for torchrun")
    try:
        with lock(cfg.out, machine):
            return own_data(cfg, machine) if cfg.data else toy_chain(cfg, machine)
    finally:
        if machine.sharded:
            dist.destroy_process_group()


if __name__ == "__main__":
    config.run(main, SFTConfig, PRESETS)
