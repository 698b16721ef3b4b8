"""From nothing to a talking model, and the one training loop behind it.

    python train_sft.py                    # toy world: data, tokenizer, LLaMA -> Alpaca -> Vicuna, table; minutes
    python train_sft.py --fast             # a quarter of the steps, 90 seconds: enough to see where it goes
    python train_sft.py --data=mine.json   # your conversations (ShareGPT or Alpaca format) or plain text
    python train_sft.py --stage=pretrain --data=some.txt --out=out/text
    python train_sft.py --stage=sft --data=alpaca.json --init=out/base --out=out/mine
    torchrun --nproc_per_node=8 train_sft.py vicuna-7b --data=sharegpt.json --init=llama-7b   # the published run

Ctrl-C, SIGTERM and a timer save; the same command line goes on where it stopped, and does nothing twice.
References: LLaMA (2302.13971) section 2.3 for the optimizer; Alpaca and Vicuna for what is learned: replies and </s> only;
FSDP2: docs.pytorch.org, torch.distributed.fsdp.fully_shard.
"""

import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

import data
import model
import toy
from config import Problem, describe, run


@dataclass
class SFTConfig:
    stage: Literal["all", "pretrain", "sft"] = "all"  # all: the whole toy chain, or what --data needs
    data: str = ""  # plain text, ShareGPT or Alpaca file; the toy world's own when not given
    out: str = "out"  # folder of the run
    init: str = ""  # checkpoint folder to start from (sft)
    tokenizer: str = ""  # tokenizer.model or checkpoint folder (pretrain); trained on the data when not given
    template: str = ""  # alpaca for Alpaca files, else vicuna_v1.1
    preset: Literal["toy", "small", "7B", "13B", "30B", "65B"] = "toy"  # shape of a new model
    vocab_size: int = 1024  # of a tokenizer trained here
    seq_len: int = 256  # tokens in a row
    batch_size: int = 8  # rows in an optimizer step, all processes together
    micro_batch: int = 0  # rows in one forward pass of one process; 0: all of them
    steps: int = 0  # optimizer steps; 0: chosen from the data and --epochs
    epochs: float = 3.0  # passes over your own data when --steps is not given
    learning_rate: float = 0.0  # peak; 0: 1e-3, above a billion parameters 2e-5; ten times that with LoRA
    warmup: float = 0.1  # share of the steps
    min_lr: float = 0.1  # the cosine ends at this share of the peak
    weight_decay: float = 0.1  # on matrices only
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon, in one process: finds look-ups sooner (the toy chain)
    beta2: float = 0.99  # AdamW's second moment; the first is 0.9
    clip: float = 1.0  # largest gradient norm
    lora_rank: int = 0  # train adapters of this rank and leave the rest as it is; 0: train everything
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more work
    compile: bool = False  # torch.compile each block: faster steps after a slow first one
    fused: bool = True  # false: the attention written by hand
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 where the chip is good at it
    device: str = "auto"  # cuda, mps or cpu
    seed: int = 0  # of everything
    save_minutes: float = 5.0  # between checkpoints
    fast: bool = False  # the toy chain with fewer steps
    full: bool = False  # the toy table with all splits and kinds of questions
    resume: Literal["auto", "never"] = "auto"  # auto: the same command goes on where it stopped; never: train it again
    patience: float = 30.0  # minutes that processes wait for one that is silent

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "epochs", "clip", "save_minutes", "patience"):
            if getattr(self, name) <= 0:
                raise Problem(f"--{name}={getattr(self, name)} must be more than 0")
        for name in ("steps", "learning_rate", "weight_decay", "micro_batch", "seed", "min_lr", "lora_rank"):
            if getattr(self, name) < 0:
                raise Problem(f"--{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.warmup < 1 or not 0 <= self.beta2 < 1:
            raise Problem("--warmup and --beta2 must lie between 0 and 1")
        if self.vocab_size < 300:
            raise Problem(f"--vocab_size={self.vocab_size} is too small: 259 are bytes and control pieces; try 1024")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise Problem(f"--batch_size={self.batch_size} must be a multiple of --micro_batch={self.micro_batch}")


# What was published (Alpaca's and FastChat's READMEs and scripts); AdamW's second moment is torch's default there.
PUBLISHED = dict(stage="sft", preset="7B", batch_size=128, micro_batch=4, learning_rate=2e-5, epochs=3.0, warmup=0.03,
                 min_lr=0.0, weight_decay=0.0, beta2=0.999)
PRESETS = {
    "alpaca-7b": dict(PUBLISHED, template="alpaca", seq_len=512),
    "alpaca-13b": dict(PUBLISHED, preset="13B", template="alpaca", seq_len=512, learning_rate=1e-5, epochs=5.0),
    "vicuna-7b": dict(PUBLISHED, template="vicuna_v1.1", seq_len=2048, checkpointing=True),
    "vicuna-13b": dict(PUBLISHED, preset="13B", template="vicuna_v1.1", seq_len=2048, checkpointing=True),
    # Koala published two epochs on 8 GPUs, but no rate, batch or length: those are Vicuna's
    "koala-13b": dict(PUBLISHED, preset="13B", epochs=2.0, seq_len=2048, checkpointing=True),
    # ours, for one GPU: `train_sft.py small --data=shakespeare.txt`
    "small": dict(preset="small", seq_len=512, batch_size=64, vocab_size=4096, epochs=10.0),
}


# -- the machine ---------------------------------------------------------------------------------------------

@dataclass
class Machine:
    device: str
    dtype: torch.dtype
    reason: str
    peak: float  # FLOP/s of a large matrix product, measured
    rank: int = 0  # of this process among
    world: int = 1  # so many,
    sharded: bool = False  # which torchrun has started: FSDP

    def autocast(self):
        if self.dtype == torch.float32 or self.sharded:  # under FSDP the policy in shard() casts
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.sharded:
            dist.barrier()

    def total(self, *values: float) -> list[float]:
        """The sum of each value over all processes, the same on each of them."""
        if not self.sharded:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()


def choose_machine(cfg: SFTConfig) -> Machine:
    """Device and precision, with the reason; and what the machine can do at best. Joins torchrun's other processes."""
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    sharded = "TORCHELASTIC_RUN_ID" in os.environ
    rank, world = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE")) if sharded else (0, 1)
    if sharded:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(minutes=cfg.patience))
    if rank:
        sys.stdout = open(os.devnull, "w")  # all of them would say the same
    if device == "cuda":
        good, reason = torch.cuda.is_bf16_supported(), f"{torch.cuda.get_device_name()}"
    elif device == "cpu":
        # AVX2-only chips have the type but no instruction for it: far slower than float32
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        good = amx or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        good = good and "AVX512" in torch.backends.cpu.get_cpu_capability()
        reason = "this CPU has AMX" if amx else "this CPU has AVX512-BF16" if good else "this CPU has no bfloat16 units"
    else:
        good, reason = False, "not tested in bfloat16 here"
    dtype = {"auto": torch.bfloat16 if good else torch.float32}.get(cfg.dtype) or getattr(torch, cfg.dtype)
    if cfg.dtype != "auto":
        reason = "as asked"
    machine = Machine(device, dtype, reason, matrix_peak(device, dtype), rank, world, sharded)
    print(f"{str(dtype)[6:]} on {device}: {reason}; {torch.get_num_threads()} threads; "
          f"matrix products reach {machine.peak / 1e9:.0f} GFLOP/s" + (f"; {world} processes (FSDP)" if sharded else ""))
    return machine


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product that is large enough to keep the chip busy."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(2 * n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return 2 * 2 * n ** 3 / sorted(times)[len(times) // 4]


# -- many processes: each keeps its share of every matrix ----------------------------------------------------

def shard(net: torch.nn.Module, machine: Machine) -> None:
    """FSDP2. Each rank keeps 1/N of weights, gradients and optimizer state; a block is whole only while it computes.

    Master weights stay fp32; what is gathered is machine.dtype; gradients are summed in fp32.
    """
    mesh = init_device_mesh(machine.device, (machine.world,))
    # no cast_forward_inputs: the rotary angles must stay fp32
    policy = MixedPrecisionPolicy(param_dtype=machine.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    llama = language(net)
    # Frozen parts beside the language model (a vision encoder) are small and stay whole on every rank: a rank
    # without pictures does not call them, and the others would wait for it for ever.
    inside = set(llama.parameters())
    whole = {p for p in net.parameters() if not p.requires_grad and p not in inside}
    for block in llama.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if not llama.config.tied:  # a tied matrix belongs to the root, where the embedding is
        fully_shard([llama.norm, llama.output], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(net, mesh=mesh, mp_policy=policy, **({"ignored_params": whole} if whole else {}))
    register_fsdp_forward_method(net, "nll")


def language(net: torch.nn.Module) -> model.LLaMA:
    """The language model in a network that may also see."""
    return getattr(net, "llama", net)


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # nothing in pieces; on rank 0's CPU, {} elsewhere


def flops(net: model.LLaMA, tokens: int, supervised: int, seq_len: int) -> float:
    """Of one training step: 6 per parameter and token in the blocks, 6 per supervised token in the output matrix,
    and the two attention products, halved because causal."""
    c = net.config
    blocks = sum(p.numel() * (6 if p.requires_grad else 4) for p in net.layers.parameters())  # 4: frozen, under LoRA
    return blocks * tokens + 6 * (c.vocab_size * c.dim * supervised + c.n_layers * seq_len * c.dim * tokens)


# -- the loop ------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """Ctrl-C or SIGTERM: everything is saved."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between two steps."""

    def __enter__(self):
        self.caught, self.before = None, {}
        for s in (signal.SIGINT, signal.SIGTERM):
            self.before[s] = signal.signal(s, self._catch)
        return self

    def _catch(self, number, frame):
        if self.caught and not dist.is_initialized():  # the second Ctrl-C does not wait; torchrun passes on every signal
            raise KeyboardInterrupt
        self.caught = number

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def learning_rate(step: int, cfg: SFTConfig) -> float:
    """Linear warm-up, then a cosine from the peak down to min_lr times the peak."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    if step < warm:
        return cfg.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, cfg.steps - warm)
    return cfg.learning_rate * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class Muon(torch.optim.AdamW):
    """AdamW, but for the matrices inside the blocks: there the averaged gradient is replaced by the nearest matrix
    whose singular values are all equal (Jordan et al. 2024). A direction in which few examples pull then moves as
    fast as one in which all do: look-ups, which few tokens teach, are found sooner. Entries move by
    0.4 `lr` on average, AdamW's first ones by all of it; much faster, and noise drowns those few.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in (g for g in self.param_groups if g["blocks"]):
            alike: dict = {}  # matrices of one shape go through the products together
            for p in group["params"]:
                alike.setdefault(p.shape, []).append(p)
            for shape, matrices in alike.items():
                for p in (p for p in matrices if not self.state[p]):
                    self.state[p].update(momentum=torch.zeros_like(p), step=torch.zeros(()))  # AdamW looks for "step"
                momenta = [self.state[p]["momentum"] for p in matrices]
                for p, m in zip(matrices, momenta):
                    m.mul_(0.95).add_(p.grad)
                even = orthogonal(torch.stack([p.grad + 0.95 * m for p, m in zip(matrices, momenta)]))
                for p, e in zip(matrices, even):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(e, alpha=-0.4 * group["lr"] * max(shape) ** 0.5)
                    p.grad = None  # AdamW passes over it
        return super().step(closure)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Nearly U V^T of x = U S V^T, x (N, rows, columns), by Newton-Schulz iteration: five steps of an odd polynomial
    that draws singular values to about 1. Its coefficients are Jordan's."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x


def make_optimizer(net: torch.nn.Module, cfg: SFTConfig) -> torch.optim.AdamW:
    """Weight decay is for matrices only; those inside the blocks are apart, for Muon."""
    groups: dict = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            inside = p.dim() == 2 and bool(re.search(r"(layers|blocks)\.\d", name))
            groups.setdefault((p.dim() > 1, inside), []).append(p)
    groups = [dict(params=params, blocks=inside, weight_decay=cfg.weight_decay if matrix else 0.0)
              for (matrix, inside), params in groups.items()]
    kind = Muon if cfg.optimizer == "muon" else torch.optim.AdamW
    return kind(groups, lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)


def loss_backward(net, parts: list[tuple], machine: Machine) -> float:
    """Backward over the micro-batches of one step; returns this process' share of the mean loss.

    The sum over supervised tokens is divided by their count over *all* micro-batches and processes: a mean of means
    would weigh a token by the company it keeps, and be NaN when a micro-batch has nothing to learn.
    A part is (tokens, labels, segments), and for a network that sees (tokens, labels, segments, images).
    """
    def learned(labels, segments):
        keep = labels[:, 1:] != data.IGNORE
        return int((keep if segments is None else keep & (segments[:, 1:] == segments[:, :-1])).sum())
    total = max(1, machine.total(sum(learned(labels, segments) for _, labels, segments, *_ in parts))[0])
    loss = 0.0
    for tokens, labels, segments, *images in parts:
        with machine.autocast():
            nll, _ = net.nll(tokens, labels, *images, segments=segments)
        (nll * machine.world / total).backward()  # FSDP averages gradients over the processes
        loss += nll.item() / total
    return loss


def train(net, rows: data.Rows, cfg: SFTConfig, machine: Machine, folder: Path, name: str, meta: dict,
          tokenizer: data.Tokenizer, start: int = 0, optimizer_state: Optional[dict] = None) -> float:
    """The loop. Runs steps start .. cfg.steps - 1, saves into `folder`, returns the mean loss of the last tenth."""
    if len(rows) < cfg.batch_size:
        raise Problem(f"{name}: the data fills {len(rows)} rows of {cfg.seq_len} tokens, less than one batch of "
                      f"{cfg.batch_size}; give more data, or a smaller --batch_size or --seq_len")
    share = cfg.batch_size // machine.world  # rows of a step that this process works on
    micro = cfg.micro_batch or share
    if cfg.batch_size % machine.world or share % micro:
        raise Problem(f"--batch_size={cfg.batch_size} must be a multiple of {machine.world} processes x "
                      f"--micro_batch={micro}")
    net.train()
    llama = language(net)
    llama.checkpointing = cfg.checkpointing
    llama.set_fused(cfg.fused)
    if cfg.compile:
        for block in llama.layers:
            block.compile()
    if machine.sharded:
        shard(net, machine)
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    optimizer = make_optimizer(net, cfg)  # after shard(): it must see the shards
    if optimizer_state:
        set_optimizer_state_dict(net, optimizer, optimizer_state, options=WHOLE)
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines()[:start] if log.exists() else []  # one a step; what follows is done again
    losses, used, seen, saved_at = [json.loads(line)["loss"] for line in lines], 0.0, 0, time.time()

    def save(step: int, finished: bool = False) -> None:
        """All processes gather, the first one writes; and at first it also reads back, since a day of training that
        cannot be saved is a day lost."""
        weights = get_model_state_dict(net, options=WHOLE)
        optim = {} if finished else get_optimizer_state_dict(net, optimizer, options=WHOLE)
        if machine.rank == 0:
            metrics.flush()
            if cfg.lora_rank:
                weights, adapters = model.merge_lora(weights)
            else:  # what is frozen is on disk already
                weights, adapters = {name: w for name, w in weights.items() if name not in frozen}, None
            target = model.save(folder, llama, {**meta, "step": step, "finished": finished,
                                                "loss": losses[-1] if losses else None},
                                tokenizer.path, optim or None, weights=weights, adapters=adapters)
            if step == start + 1:
                again = model.read(target / "model.pt", mmap=True)
                if any(not torch.equal(w, again[key]) for key, w in weights.items()):
                    raise Problem(f"{target}: what was saved is not what is read back; is the disk in order?")
        machine.wait()

    if machine.rank == 0:
        with data.writing(log) as file:
            file.writelines(line + "\n" for line in lines)
    with StopSignal() as stop, open(log if machine.rank == 0 else os.devnull, "a") as metrics, \
            tqdm(total=cfg.steps, initial=start, desc=name, dynamic_ncols=True, mininterval=0.5,
                 disable=machine.rank > 0) as bar:
        for step in range(start, cfg.steps):
            began = time.perf_counter()
            batch = rows.batch(step * machine.world + machine.rank, share)
            parts = [tuple(None if t is None else t[i:i + micro].to(machine.device) for t in batch)
                     for i in range(0, share, micro)]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            loss = loss_backward(net, parts, machine)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
            norm = (norm.full_tensor() if machine.sharded else norm).item()
            due = machine.rank == 0 and time.time() - saved_at > 60 * cfg.save_minutes
            loss, stopping, due = machine.total(loss, bool(stop.caught), due)  # all decide alike, or some wait for ever
            if not math.isfinite(loss + norm):  # before the update: the weights are still good
                save(step)
                raise Problem(f"{name}: loss {loss}, gradient norm {norm} at step {step}; the weights before it are in "
                              f"{folder}. Try a smaller --learning_rate")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            elapsed = time.perf_counter() - began
            used, seen = used + elapsed, seen + cfg.batch_size * cfg.seq_len
            losses.append(loss)
            work = net.flops(*batch) if hasattr(net, "flops") else flops(
                llama, batch[0].numel(), int((batch[1] != data.IGNORE).sum()), cfg.seq_len)
            metrics.write(json.dumps(dict(step=step, loss=round(loss, 5), lr=group["lr"], norm=round(norm, 4),
                                          tokens_per_s=round(cfg.batch_size * cfg.seq_len / elapsed))) + "\n")
            bar.update()
            bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}, {seen / used / 1e3:.1f}k tok/s, "
                                f"{100 * work / elapsed / machine.peak:.0f}% of peak", refresh=False)
            if step + 1 == cfg.steps or stopping or due or step == start:
                save(step + 1, finished=step + 1 == cfg.steps)
                saved_at = time.time()
            if stopping:
                raise Stopped(f"stopped after step {step + 1} of {cfg.steps}; saved in {folder}")
    net.eval()
    return float(np.mean(losses[-max(1, cfg.steps // 10):])) if losses else meta.get("loss", float("nan"))


# -- one stage: a folder that is trained once, resumed when it was interrupted -------------------------------

# What must be the same for a run to be "the same run". Speed and memory options may change between two runs, and so
# may the number of processes.
SETTINGS = ("steps", "seq_len", "batch_size", "learning_rate", "warmup", "min_lr", "weight_decay", "beta2", "clip", "seed",
            "optimizer", "lora_rank")


def run_stage(cfg: SFTConfig, name: str, machine: Machine, rows: data.Rows, tokenizer: data.Tokenizer, template: str,
              source: str, parent: str = "", shape: Optional[dict] = None, network: Optional[torch.nn.Module] = None,
              beside: Optional[dict] = None) -> torch.nn.Module:
    """Trains cfg.out/name, from the checkpoint `parent` or from random weights of `shape`. Returns the model.

    Or trains what is not frozen in `network`; `beside` names what the run also depends on.
    """
    folder = Path(cfg.out) / name
    if not cfg.learning_rate:
        large = model.count(model.peek(parent)[0] if parent else model.LLaMAConfig(**shape)) > 1e9
        cfg = replace(cfg, learning_rate=(2e-5 if large else 1e-3) * (10 if cfg.lora_rank else 1))
    if cfg.optimizer == "muon" and machine.sharded:
        raise Problem("--optimizer=muon needs whole matrices, and under torchrun every process has a piece: use adamw")
    if cfg.lora_rank and not parent:
        raise Problem(f"--lora_rank={cfg.lora_rank} adapts a trained model: give --init=FOLDER")
    settings = {key: getattr(cfg, key) for key in SETTINGS}
    settings.update(template=template, data=source, parent=parent and str(model.find(parent)), shape=shape,
                    tokenizer=data.digest(tokenizer.path), **(beside or {}))
    meta = dict(stage=name, template=template, parent=settings["parent"], settings=settings, processes=machine.world)
    found = newest_whole(folder, settings, machine, network) if cfg.resume == "auto" else None
    if found and found.optimizer is None:
        print(f"{name}: {folder} is trained already ({found.step} steps); --resume=never trains it again")
        return found.net.to(machine.device).eval()
    if found and not cfg.lora_rank:
        net = found.net
    elif network is not None:
        net = network
    elif parent:
        net = model.load(parent, mmap=machine.sharded)[0]
    else:
        torch.manual_seed(cfg.seed)
        net = model.LLaMA(model.LLaMAConfig(**{**shape, "vocab_size": tokenizer.vocab_size,
                                               "max_seq_len": max(cfg.seq_len, shape.get("max_seq_len", 2048))}))
    if cfg.lora_rank:
        torch.manual_seed(cfg.seed)
        model.add_lora(net, cfg.lora_rank)
        net.load_state_dict({**net.state_dict(), **(found.adapters if found else {})})
    if found:
        print(f"{name}: going on at step {found.step} of {cfg.steps}")
        for key, now in (("threads", torch.get_num_threads()), ("isa", torch.backends.cpu.get_cpu_capability()),
                         ("torch", torch.__version__), ("processes", machine.world)):
            if found.meta[key] != now:
                print(f"  {key} was {found.meta[key]}, is {now}: the result may differ in the last digits")
    else:
        what = f"from {settings['parent']}" if parent else "from random weights"
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print(f"\n{name}: {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters {what}"
              + (f", {trained / 1e6:.2f} M of them trained" if cfg.lora_rank or network else "")
              + f"; {cfg.steps} steps of "
              f"{cfg.batch_size} x {cfg.seq_len} tokens, {len(rows)} rows, learning rate {cfg.learning_rate:g}")
        machine.wait()  # nobody may still be looking for checkpoints in there
        for old in folder.glob("step-*") if machine.rank == 0 else ():
            shutil.rmtree(old)
    with explained(cfg, machine, folder):
        train(net.to(machine.device), rows, cfg, machine, folder, name, meta, tokenizer,
              *((found.step, found.optimizer) if found else ()))
    return net


class Found(NamedTuple):
    """A checkpoint of an interrupted run. Without optimizer state it is the last one of a finished run."""
    net: model.LLaMA  # adapters are merged into it, and
    adapters: dict  # stand here by themselves
    step: int
    optimizer: Optional[dict]
    meta: dict


def newest_whole(folder: Path, settings: dict, machine: Machine, network: Optional[torch.nn.Module]) -> Optional[Found]:
    """The newest checkpoint of the run whose files are undamaged; None when there is none at all."""
    steps = model.history(folder) if any(folder.glob("step-*")) else []
    for step in steps:
        try:
            net, _, meta = model.load(step, machine.sharded, network)
            state = None if meta["finished"] else model.read(step / "optim.pt", mmap=machine.sharded)
            adapters = model.read(step / "lora.pt") if meta["settings"].get("lora_rank") else {}
        except (Problem, OSError) as damage:
            print(f"{damage}: going back to the checkpoint before it")
            continue
        for key, value in settings.items():
            if meta["settings"].get(key) != value:
                raise Problem(f"{folder} was trained with another {key} ({meta['settings'].get(key)}, now {value}); "
                              "choose another --out, or --resume=never to train it again")
        return Found(net, adapters, meta["step"], state, meta)
    if steps:
        raise Problem(f"no checkpoint in {folder} is whole; --resume=never starts again from the beginning")
    return None


@contextlib.contextmanager
def explained(cfg: SFTConfig, machine: Machine, folder: Path):
    """Two accidents that torch reports in its own words, in ours."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            micro = cfg.micro_batch or cfg.batch_size // machine.world
            knobs = ([f"--micro_batch={max(1, micro // 2)}"] if micro > 1 else []) + (
                [] if cfg.checkpointing else ["--checkpointing"]) + ([] if cfg.lora_rank else ["--lora_rank=8"])
            raise Problem(f"out of memory. Try {', '.join(knobs + ['a smaller --seq_len', 'more processes'])}; "
                          "`python model.py --preset=7B --gpus=8` says what a shape needs") from None
        if machine.sharded and (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
            raise Problem(f"rank {machine.rank} waited in vain for another process ({text.split('. ')[0]}); what is saved "
                          f"in {folder} is intact: run the same command again") from None
        raise


def conversation_rows(path, template: str, tokenizer: data.Tokenizer, cfg: SFTConfig) -> data.Rows:
    report = data.Report()
    examples = data.tokenise(path, template, tokenizer, report)
    rows = data.pack(examples, cfg.seq_len, cfg.seed, pad=tokenizer.eos)
    lengths = np.diff(examples.ends, prepend=0)
    long = int((lengths > cfg.seq_len).sum())
    total, learned = len(examples.tokens), int(examples.learned.sum())
    print(f"{path}: {len(examples)} conversations, {total} tokens, {learned} learned ({100 * learned / total:.0f}%), "
          f"{100 * np.minimum(lengths, cfg.seq_len).sum() / rows.tokens.size:.0f}% of the rows filled"
          + (f"; {long} longer than {cfg.seq_len} tokens were cut (--seq_len, or python data.py split)" if long else "")
          + str(report))
    if not (rows.labels != data.IGNORE).any():
        raise Problem(f"{path}: nothing to learn in it: no reply fits into --seq_len={cfg.seq_len} tokens")
    return rows


@torch.no_grad()
def validate(net: model.LLaMA, rows: data.Rows, machine: Machine, batch: int = 32) -> float:
    """Sum of nats over every supervised token of the rows. All processes take the same number of turns: the last
    turn repeats rows, unscored."""
    total = 0.0
    for at in range(batch * machine.rank, batch * machine.rank + len(rows), batch * machine.world):
        here = np.arange(at, at + batch)
        tokens, labels, segments = (p if p is None else torch.from_numpy(p[here % len(rows)].astype(np.int64))
                                    for p in (rows.tokens, rows.labels, rows.segments))
        labels[torch.from_numpy(here >= len(rows))] = data.IGNORE
        with machine.autocast():
            nll, _ = net.nll(*(t.to(machine.device) for t in (tokens, labels)),
                             segments=segments if segments is None else segments.to(machine.device))
        total += nll.item()
    return machine.total(total)[0]


def pretrain(cfg: SFTConfig, name: str, machine: Machine, path, tokenizer: Optional[data.Tokenizer] = None) -> model.LLaMA:
    """LLaMA: every token is learned. The last tenth is kept for validation.

    Plain text is one stream. JSON lines with a "text" each are documents: several share a row without seeing each
    other, each between <s> and </s>.
    """
    plain = data.kind_of(path) == "text"
    if plain:
        text = data.read_text(path)
        cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
        learn, held = [text[:cut]], [text[cut:]]
    else:
        found = [r.get("text") if isinstance(r, dict) else None for r in data.read_records(path)]
        texts = [t for t in found if isinstance(t, str) and t.strip()]
        if len(texts) < len(found):
            print(f"{path}: {len(found) - len(texts)} records without text are left out")
        cut = len(texts) * 9 // 10
        learn, held = texts[:cut], texts[cut:]
    if tokenizer is None:
        trained = Path(cfg.out) / "data" / f"{name}.model"
        if machine.rank == 0:
            data.train_tokenizer(learn[:10000], cfg.vocab_size, trained)
        machine.wait()
        tokenizer = data.Tokenizer(trained)
    if plain:
        ids = data.encode_text(learn[0], tokenizer)
        rows = data.TextRows(ids, cfg.seq_len, tokenizer.bos, cfg.seed)
        held_rows = data.windows(data.encode_text(held[0], tokenizer), cfg.seq_len, tokenizer.bos)
        tokens = len(ids)
    else:
        def packed(texts: list[str]) -> data.Rows:
            ids = [[tokenizer.bos, *d, tokenizer.eos] for d in tokenizer.sp.encode(texts)]
            return data.pack([data.Example(d, d) for d in ids], cfg.seq_len, cfg.seed, tokenizer.eos)
        rows, held_rows = packed(learn), packed(held)
        tokens = int((rows.segments >= 0).sum())
    characters, held_characters = sum(map(len, learn)), sum(map(len, held))
    if not cfg.steps:
        cfg = replace(cfg, steps=max(1, round(cfg.epochs * len(rows) / cfg.batch_size)))
    print(f"{path}: {characters} characters, {tokens} tokens to learn from, {tokenizer.vocab_size} pieces "
          f"({characters / max(1, tokens):.2f} characters per token)")
    net = run_stage(cfg, name, machine, rows, tokenizer, "plain", data.digest(path), shape=model.PRESETS[cfg.preset])
    loss = validate(net, held_rows, machine)
    count = int((held_rows.labels[:, 1:] != data.IGNORE).sum())
    print(f"{name}: validation loss {loss / count:.3f} nats per token, {loss / held_characters:.3f} per character, over "
          f"all of the last tenth ({held_characters} characters)")
    return net


def fine_tune(cfg: SFTConfig, name: str, machine: Machine, path, parent: str = "", shape: Optional[dict] = None,
              tokenizer: Optional[data.Tokenizer] = None) -> model.LLaMA:
    """Alpaca and Vicuna: replies and their end mark are learned, nothing else. The template travels in meta.json."""
    template = cfg.template or data.default_template(path)
    if parent:
        known, words, _ = model.peek(parent)
        tokenizer, room = data.Tokenizer(words), known.max_seq_len
        if cfg.seq_len > room:
            raise Problem(f"--seq_len={cfg.seq_len} is more than the {room} positions of {parent}")
    rows = conversation_rows(path, template, tokenizer, cfg)
    if not cfg.steps:  # small files need more than a few passes to move a toy model at all
        cfg = replace(cfg, steps=max(200 if cfg.preset == "toy" else 1, round(cfg.epochs * len(rows) / cfg.batch_size)))
    return run_stage(cfg, name, machine, rows, tokenizer, template, data.digest(path), parent, shape)


# -- your own file -------------------------------------------------------------------------------------------

def own_data(cfg: SFTConfig, machine: Machine) -> dict:
    """--data alone: what the file is decides what happens, and the choice is printed."""
    name, out, kind = Path(cfg.data).stem.split(".")[0], Path(cfg.out), data.kind_of(cfg.data)
    trained = dict(folder=str(out / name))
    if kind in ("text", "documents"):
        if cfg.stage == "sft":
            raise Problem(f"{cfg.data} is plain text; --stage=sft needs conversations (ShareGPT or Alpaca format)")
        tokenizer = data.find_tokenizer(cfg.tokenizer) if cfg.tokenizer else None
        print(f"{cfg.data} is plain text: pre-training a {cfg.preset} model on it"
              + ("" if tokenizer else f", with a tokenizer of {cfg.vocab_size} pieces trained on it"))
        pretrain(cfg, name, machine, cfg.data, tokenizer)
        return trained
    if cfg.stage == "pretrain":
        raise Problem(f"{cfg.data} holds conversations ({kind}); --stage=pretrain needs plain text")
    texts = lambda: (t.text for c in data.stream_conversations(cfg.data, data.Report()) for t in c.turns)
    parent, why = cfg.init, f"there is no base model in {out / 'base'}"
    if not parent and (out / "base" / "latest").exists():
        tokenizer, sample = data.find_tokenizer(str(out / "base")), "\n".join(itertools.islice(texts(), 200))
        density = len(sample) / len(tokenizer.encode(sample))
        why = f"the tokenizer of {out / 'base'} gives {density:.1f} characters per token"
        parent = str(out / "base") if density > 1.5 else ""
    print(f"{cfg.data} is {kind}, template {cfg.template or data.default_template(cfg.data)}: "
          + (f"fine-tuning {parent}" + f" ({why})" * (not cfg.init) if parent else
             f"{why}, so a tokenizer of at most {cfg.vocab_size} pieces and a small base are trained on its own text first"))
    if not parent:
        text, parent = out / "data" / f"{name}.txt", str(out / f"{name}-base")
        if machine.rank == 0:
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("\n\n".join(texts()))
        machine.wait()
        pretrain(replace(cfg, learning_rate=0.0, steps=cfg.steps or 400), f"{name}-base", machine, text)
    fine_tune(cfg, name, machine, cfg.data, parent)
    return trained


# -- the toy chain -------------------------------------------------------------------------------------------

# Steps and sizes. "equal": with so many steps Alpaca, too, learns from as many supervised tokens as Vicuna; a tenth
# of what it reads is an answer, of what Vicuna reads three tenths.
TOY = dict(documents=16000, instructions=6000, conversations=12000, base=760, alpaca=100, vicuna=600, equal=1860,
           questions=100)
FAST = dict(documents=6000, instructions=3000, conversations=5000, base=170, alpaca=40, vicuna=150, equal=460,
            questions=50)


def write_toy_data(folder: Path, sizes: dict, seed: int) -> dict[str, Path]:
    """The toy world in the public formats: JSON lines with "text", Alpaca JSON, ShareGPT JSON. Written once for these
    sizes and this seed."""
    paths = {name: folder / file for name, file in
             dict(base="pretrain.jsonl", alpaca="alpaca.json", vicuna="sharegpt.json").items()}
    made = json.dumps(dict({k: sizes[k] for k in ("documents", "instructions", "conversations")}, seed=seed))
    note = folder / "made.json"  # the last to be written
    if not note.exists() or note.read_text() != made:
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(seed)
        documents = (json.dumps(dict(text=toy.document(rng))) for _ in range(sizes["documents"]))
        paths["base"].write_text("\n".join(documents) + "\n")
        paths["alpaca"].write_text(json.dumps([toy.instruction(rng) for _ in range(sizes["instructions"])], indent=0))
        conversations = [dict(id=f"toy_{i}", **toy.conversation(rng)) for i in range(sizes["conversations"])]
        paths["vicuna"].write_text(json.dumps(conversations, indent=0))
        note.write_text(made)
    return paths


def toy_tokenizer(paths: dict[str, Path], cfg: SFTConfig, machine: Machine) -> data.Tokenizer:
    """One tokenizer for the whole chain, trained on a sample of all that will be read: one that has met no question
    spells questions in bits, and a conversation costs it almost twice the tokens."""
    path = Path(cfg.out) / "data" / "toy.model"
    if machine.rank == 0:
        lines = [record["text"] for record in itertools.islice(data.read_records(paths["base"]), 6000)]
        for name in ("alpaca", "vicuna"):
            sample = itertools.islice(data.stream_conversations(paths[name], data.Report()), 3000)
            lines += [f"{t.input}\n{t.text}" for c in sample for t in c.turns]
        data.train_tokenizer(lines, cfg.vocab_size, path)
    machine.wait()
    return data.Tokenizer(path)


def model_player(net: model.LLaMA, tokenizer: data.Tokenizer, template: str, shots: str = ""):
    """A player answers test items: items -> (replies, ended by itself). A base model's template is "lines"; `shots`
    are solved examples put before the question."""
    def play(items: list) -> tuple[list[str], list[bool]]:
        turns = [[data.Turn(role, shots * (i == 0) + text) for i, (role, text) in enumerate(x.turns)] for x in items]
        return data.chat(net, tokenizer, template, list(map(data.Conversation, turns)), max_new_tokens=64, batch=150)
    return play


def hidden_scene(play):
    """Control: the same questions about a scene that was exchanged for another one."""
    def play_blind(items: list) -> tuple[list[str], list[bool]]:
        rng = random.Random(0)
        return play([replace(i, turns=[[role, text.replace(i.told, toy.tell(toy.pick_scene(rng, "scenes"), rng))
                                        if i.told else text] for role, text in i.turns]) for i in items])
    return play_blind


def copier(records: list[dict]):
    """Control: the answer of the training question that shares most words (weighted by rarity) with this one."""
    words = lambda text: set(re.findall(r"[^\s,.?:]+", text.lower()))
    bags = [words(r["input"] + " " + r["instruction"]) for r in records]
    number = {w: i for i, w in enumerate(sorted(set().union(*bags)))}
    matrix = np.zeros((len(bags), len(number)), np.float32)
    for row, bag in enumerate(bags):
        matrix[row, [number[w] for w in bag]] = 1
    rarity = np.log(len(bags) / matrix.sum(0))
    matrix *= rarity
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)

    def play(items: list) -> tuple[list[str], list[bool]]:
        query = np.zeros((len(items), len(number)), np.float32)
        for row, item in enumerate(items):
            at = [number[w] for w in words(item.told + " " + item.question.text) if w in number]
            query[row, at] = rarity[at]
        return [records[i]["output"] for i in (query @ matrix.T).argmax(1)], [True] * len(items)
    return play


def most_frequent(records: list[dict]):
    """Control: the answer that is most frequent for this kind of question."""
    best = {kind: Counter(r["output"] for r in records if r["kind"] == kind).most_common(1)[0][0]
            for kind in {r["kind"] for r in records}}
    return lambda items: ([best.get(i.question.kind, "Yes.") for i in items], [True] * len(items))


ROWS = dict(scenes="(a) unseen scenes", pairs="(b) unseen color x shape pairs", later="earlier turns matter",
            facts="facts known from pre-training alone", closed="sums, sizes, legs, loops never trained")
MORE_ROWS = dict(phrasings="(c) unseen phrasings", names="(d) unseen names and new words", more="(e) more objects, more turns",
                 minimal="minimal pairs, both right")


def examine(players: dict, rows: dict, n: int) -> tuple[dict, dict]:
    """Share of right answers, table[row][player]; and for each player its replies, by row. What runs on until it is
    cut off is no answer, whatever it says on its way."""
    table, said = {}, {}
    for split in rows:
        items = toy.test_set(split, n)
        for name, play in tqdm(players.items(), desc=f"examining: {rows[split]}", leave=False):
            replies, ended = play(items)
            right = [end and toy.grade(i.question, r) == 1 for i, r, end in zip(items, replies, ended)]
            if split == "minimal":  # items come in twos
                right = [a and b for a, b in zip(right[::2], right[1::2])]
            table.setdefault(split, {})[name] = sum(right) / len(right)
            said.setdefault(name, {})[split] = list(zip(items, replies, ended))
    return table, said


def print_table(table: dict, rows: dict) -> None:
    names = list(next(iter(table.values())))
    print(f"\n{'right answers, %':<40}" + "".join(f"{n:>11}" for n in names))
    for split in table:
        print(f"{rows[split]:<40}" + "".join(f"{100 * table[split][n]:>11.0f}" for n in names))


def dialogues(play, seed: int = 5) -> None:
    """Three conversations in which the model hears its own earlier answers; what is wrong is marked."""
    rng = random.Random(seed)
    for number in range(3):
        print(f"\n--- dialogue {number + 1}")
        item = toy.converse(rng, "scenes", 4)
        turns = []
        for role, text in item.turns:
            if role != "user":
                continue
            turns.append(["user", text])
            reply = play([replace(item, turns=turns)])[0][0]
            true = item.question.full if len(turns) == len(item.turns) else item.turns[len(turns)][1]
            turns.append(["assistant", reply])
            print(f"USER: {text}\nASSISTANT: {reply}" + ("" if reply == true else f"   [true: {true}]"))


def toy_chain(cfg: SFTConfig, machine: Machine) -> dict:
    """LLaMA -> Alpaca -> Vicuna on the toy world, with the controls that could show the result to be empty."""
    sizes, out = FAST if cfg.fast else TOY, Path(cfg.out)
    paths = write_toy_data(out / "data", sizes, cfg.seed)
    shape = model.PRESETS[cfg.preset]
    stage = lambda name: replace(cfg, steps=cfg.steps or sizes[name], optimizer="muon")
    tokenizer = toy_tokenizer(paths, cfg, machine)
    base = pretrain(stage("base"), "base", machine, paths["base"], tokenizer)
    alpaca = fine_tune(stage("alpaca"), "alpaca", machine, paths["alpaca"], str(out / "base"))
    vicuna = fine_tune(stage("vicuna"), "vicuna", machine, paths["vicuna"], str(out / "base"))
    unread = fine_tune(stage("vicuna"), "control", machine, paths["vicuna"], shape=shape, tokenizer=tokenizer)

    longer = {}
    if cfg.full:
        patient = fine_tune(stage("equal"), "alpaca-equal", machine, paths["alpaca"], str(out / "base"))
        longer["Alpaca ="] = model_player(patient, tokenizer, "alpaca")

    records = json.loads(paths["alpaca"].read_text())
    shots = "".join(f"{(r['input'] + ' ' + r['instruction']).strip()}\n{r['output']}\n\n" for r in records[:4])
    vicuna_player = model_player(vicuna, tokenizer, "vicuna_v1.1")
    players = {"base": model_player(base, tokenizer, "lines"),
               "few-shot": model_player(base, tokenizer, "lines", shots),
               "Alpaca": model_player(alpaca, tokenizer, "alpaca"), **longer,
               "Vicuna": vicuna_player,
               "no LLaMA": model_player(unread, tokenizer, "vicuna_v1.1"),
               "no scene": hidden_scene(vicuna_player),
               "copier": copier(records), "frequent": most_frequent(records)}
    rows = {**ROWS, **MORE_ROWS} if cfg.full else ROWS
    table, said = examine(players, rows, sizes["questions"])
    dialogues(vicuna_player)
    print_table(table, rows)
    everything = [x for split in said["Vicuna"].values() for x in split]
    stops = sum(ended for _, _, ended in everything) / len(everything)
    trained = {r["output"] for r in records} | {m["value"] for c in json.loads(paths["vicuna"].read_text())
                                                for m in c["conversations"] if m["from"] == "gpt"}
    opened = [reply for item, reply, _ in everything if item.question.open]
    copied = sum(reply in trained for reply in opened) / max(1, len(opened))
    print(f"{100 * stops:.1f}% of Vicuna's replies end by themselves; {100 * copied:.0f}% of its stories and played roles "
          f"stand word for word in the training data; {sizes['questions']} questions a row")
    if cfg.full:
        print("Alpaca =: as many supervised tokens as Vicuna")
        print_kinds(said["Vicuna"])
    figures = dict(table=table, ends=stops, copied=copied, seed=cfg.seed, minutes=round((time.time() - STARTED) / 60, 2))
    (out / "table.json").write_text(json.dumps(figures, indent=1))
    plot(out)
    print(f"\n{figures['minutes']:.1f} minutes in all. Now type:\n  python sample.py                     talk to it"
          f"\n  python data.py show {paths['vicuna']}   what was learned of a conversation, token by token"
          f"\n  python train_sft.py --full           the same table with every held-out split"
          f"\n  python train_sft.py --data=FILE      your own conversations or text")
    return figures


def print_kinds(said: dict) -> None:
    """Vicuna by kind of question."""
    kinds: dict = {}
    for split in said.values():
        for item, reply, _ in split:
            kinds.setdefault((item.question.category, item.question.kind), []).append(toy.grade(item.question, reply) == 1)
    print("\nVicuna by category and kind, % right: " +
          ", ".join(f"{c}/{k} {100 * sum(v) / len(v):.0f}" for (c, k), v in sorted(kinds.items())))


def plot(out: Path) -> None:
    """Loss curves of all stages as out/loss.png, when matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    for log in sorted(out.glob("*/metrics.jsonl")):
        loss = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
        width = max(1, len(loss) // 50)
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        pyplot.plot(np.arange(len(loss))[width - 1:], smooth, label=log.parent.name)
    pyplot.xlabel("step"), pyplot.ylabel("loss, nats per token"), pyplot.legend(), pyplot.grid(alpha=0.3)
    pyplot.savefig(out / "loss.png", dpi=120)
    pyplot.close()
    print(f"loss curves: {out / 'loss.png'}")


STARTED = time.time()


def main(cfg: SFTConfig) -> dict:
    if not cfg.data and cfg.dtype == "auto":
        print("the toy world trains in float32: bfloat16 would save a seventh of the time, but finds look-ups later")
        cfg = replace(cfg, dtype="float32")
    machine = choose_machine(cfg)
    print(describe(cfg))
    try:
        if cfg.data:
            return own_data(cfg, machine)
        if cfg.stage != "all":
            raise Problem(f"--stage={cfg.stage} needs --data=FILE")
        if machine.sharded:
            raise Problem("the toy world is for one process; torchrun needs --data=FILE")
        return toy_chain(cfg, machine)
    except Stopped as stopped:
        print(f"\n{stopped}. To go on: python {' '.join(sys.argv) if sys.argv[0].endswith('.py') else 'train_sft.py'}")
        raise KeyboardInterrupt from None
    finally:
        if machine.sharded:
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main, SFTConfig, PRESETS)
