"""What each trick costs and saves, measured on your machine.

    python bench.py                  # the ladder: attention by hand, fused, bfloat16, packing, only learned logits, ...
    python bench.py --peer           # and transformers' Llama of the same shape in the same run (pip install transformers)
    python bench.py --data=alpaca.json --tokenizer=tokenizer.model --vocab_size=32000   # the ladder on your file
    python bench.py --only=step --preset=7B --seq_len=2048 --rows=1 --checkpointing     # one step of one shape

Every row is a process of its own, so that its peak of memory is its own: the libraries' share, measured after a tiny
step, is subtracted. Times are medians of whole training steps: forward, backward, clipping, AdamW.
"""

import contextlib
import io
import multiprocessing
import os
import queue
import random
import resource
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import torch
import torch.nn.functional as F

import data
import model
import toy
import train_sft
from config import Problem, run


@dataclass
class BenchConfig:
    only: Literal["all", "ladder", "peer", "step"] = "all"  # which part; all is the ladder, and with --peer both
    peer: bool = False  # compare with transformers
    preset: str = ""  # shape from model.PRESETS instead of the next three
    dim: int = 256  # width
    n_layers: int = 6  # blocks; heads are 64 wide
    vocab_size: int = 4096  # rows of the embedding
    seq_len: int = 256  # tokens in a row
    rows: int = 16  # rows in a step
    steps: int = 8  # timed, after one that is not
    data: str = ""  # Alpaca or ShareGPT file; the toy world's instructions when not given
    tokenizer: str = ""  # tokenizer.model; trained on the data when not given
    checkpointing: bool = False  # for --only=step
    compile: bool = False  # for --only=step
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # for --only=step and --peer
    device: str = "auto"  # cuda or cpu

    def __post_init__(self):
        for name in ("dim", "n_layers", "seq_len", "rows", "steps"):
            if getattr(self, name) < 1:
                raise Problem(f"--{name}={getattr(self, name)} must be at least 1")
        if self.preset and self.preset not in model.PRESETS:
            raise Problem(f"--preset={self.preset}: there are {', '.join(model.PRESETS)}")
        if self.dim % 64:
            raise Problem(f"--dim={self.dim} must be a multiple of 64")

    @property
    def shape(self) -> model.LLaMAConfig:
        own = dict(dim=self.dim, n_layers=self.n_layers, n_heads=self.dim // 64)
        return model.LLaMAConfig(**{**(model.PRESETS[self.preset] if self.preset else own),
                                    "vocab_size": self.vocab_size, "max_seq_len": max(self.seq_len, 2048)})


@dataclass
class Row:
    """One step of the ladder: what is different from plain code."""
    name: str
    fused: bool = True
    dtype: str = "auto"
    packed: bool = True
    learned_only: bool = True
    checkpointing: bool = False
    compile: bool = False
    world: int = 1


LADDER = [
    Row("attention by hand, float32", fused=False, dtype="float32", packed=False, learned_only=False),
    Row("fused attention", dtype="float32", packed=False, learned_only=False),
    Row("bfloat16", dtype="bfloat16", packed=False, learned_only=False),
    Row("packing, best precision here", learned_only=False),
    Row("logits of learned tokens only"),
    Row("  + checkpointing", checkpointing=True),
    Row("  + torch.compile", compile=True),
    Row("  + two processes, FSDP", world=2),
]


class AllLogits(model.LLaMA):
    """The loss as it is usually written: logits for every token, learned or not."""

    def nll(self, tokens, labels, images=None, segments=None):
        logits = self(tokens, segments=segments)[:, :-1].float()  # (B, T-1, V)
        labels = labels[:, 1:]
        if segments is not None:
            labels = labels.masked_fill(segments[:, 1:] != segments[:, :-1], data.IGNORE)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=data.IGNORE, reduction="sum")
        return loss, (labels != data.IGNORE).sum()


# -- what is trained on --------------------------------------------------------------------------------------

class Batch(NamedTuple):
    parts: tuple  # tokens, labels, segments or None: (B, T) each
    real: int  # tokens that are not padding
    learned: int


def conversations(cfg: BenchConfig) -> list[data.Example]:
    """Shuffled, cut to a row, enough for the padded rows of the ladder; the packed ones need more and start over."""
    if cfg.data:
        found, template = data.load_conversations(cfg.data), data.default_template(cfg.data)
    else:
        rng, template = random.Random(0), "alpaca"
        records = [toy.instruction(rng) for _ in range(4000)]
        found = [data.Conversation([data.Turn("user", r["instruction"], r["input"]), data.Turn("assistant", r["output"])])
                 for r in records]
    if cfg.tokenizer:
        tokenizer = data.find_tokenizer(cfg.tokenizer)
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = data.train_tokenizer([t.text for c in found for t in c.turns], min(cfg.vocab_size, 1024),
                                             Path(folder) / "tokenizer.model")
    if tokenizer.vocab_size > cfg.vocab_size:
        raise Problem(f"the tokenizer has {tokenizer.vocab_size} pieces: give --vocab_size={tokenizer.vocab_size}")
    random.Random(1).shuffle(found)
    examples = [data.render(c, template, tokenizer) for c in found[:4000]]
    return [data.Example(e.tokens[:cfg.seq_len], e.labels[:cfg.seq_len]) for e in examples]


def padded(examples: list[data.Example]) -> Batch:
    """The usual batch: one conversation a row, as long as the longest of them."""
    longest = max(len(e.tokens) for e in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full((len(examples), longest), data.IGNORE)
    for i, e in enumerate(examples):
        tokens[i, :len(e.tokens)], labels[i, :len(e.tokens)] = torch.tensor(e.tokens), torch.tensor(e.labels)
    return Batch((tokens, labels, None), sum(len(e.tokens) for e in examples), int((labels != data.IGNORE).sum()))


def batches(examples: list[data.Example], packed: bool, size: int, seq_len: int) -> list[Batch]:
    """Padded batches are of 8, as in Alpaca's script."""
    if not packed:
        return [padded(examples[i:i + 8]) for i in range(0, len(examples) - 7, 8)]
    rows = data.pack(examples, seq_len)
    parts = [rows.batch(i, min(size, len(rows))) for i in range(max(1, len(rows) // size))]
    return [Batch(p, int((p[2] >= 0).sum()), int((p[1] != data.IGNORE).sum())) for p in parts]


# -- one row -------------------------------------------------------------------------------------------------

def peak_memory(device: str) -> float:
    """Bytes, since reset_peak."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def step(net, optimizer, parts: tuple, machine: train_sft.Machine) -> float:
    loss = train_sft.loss_backward(net, [tuple(t if t is None else t.to(machine.device) for t in parts)], machine)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if machine.device == "cuda":
        torch.cuda.synchronize()
    return loss


@torch.no_grad()
def mean_loss(net, work: list[Batch], machine: train_sft.Machine) -> float:
    total, count = 0.0, 0
    for batch in work:
        with machine.autocast():
            nll, n = net.nll(*(t.to(machine.device) for t in batch.parts[:2]),
                             segments=None if batch.parts[2] is None else batch.parts[2].to(machine.device))
        total, count = total + nll.item(), count + int(n)
    return total / count


def measure(row: Row, cfg: BenchConfig, examples: Optional[list] = None) -> dict:
    """Trains cfg.steps steps; on random rows, where every token is learned, when there are no examples."""
    machine = train_sft.choose_machine(train_sft.SFTConfig(dtype=row.dtype, device=cfg.device))
    kind = model.LLaMA if row.learned_only else AllLogits
    settings = train_sft.SFTConfig(steps=1, learning_rate=1e-4)
    tiny = kind(model.LLaMAConfig(dim=64, n_layers=1, n_heads=1, vocab_size=64)).to(machine.device)
    word = torch.ones(1, 16, dtype=torch.long)
    step(tiny, train_sft.make_optimizer(tiny, settings), (word, word, None), machine)  # loads the libraries
    reset_peak(machine.device)
    baseline = peak_memory(machine.device)

    torch.manual_seed(0)
    net = kind(cfg.shape).to(machine.device).train()
    net.set_fused(row.fused)
    net.checkpointing = row.checkpointing
    if row.compile:
        for block in net.layers:
            block.compile()
    if machine.sharded:
        train_sft.shard(net, machine)
    optimizer = train_sft.make_optimizer(net, settings)
    loss = None
    if examples is None:
        tokens = torch.randint(3, cfg.vocab_size, (cfg.rows, cfg.seq_len))
        work = [Batch((tokens, tokens, None), tokens.numel(), tokens.numel())]
    else:
        work = batches(examples, row.packed, cfg.rows, cfg.seq_len)
        loss = mean_loss(net, batches(examples[:32], row.packed, 32, cfg.seq_len), machine)
    times, done, work_done = [], [], 0.0
    for i in range(cfg.steps + 1):
        batch = work[i % len(work)]
        began = time.perf_counter()
        step(net, optimizer, tuple(t if t is None else t[machine.rank::machine.world] for t in batch.parts), machine)
        times.append(time.perf_counter() - began)
        if i:  # the first step compiles, and makes the optimizer's state
            done.append(batch)
            B, T = batch.parts[0].shape
            work_done += train_sft.flops(net, B * T, batch.learned if row.learned_only else B * T, T)
    seconds, places = sum(times[1:]), sum(b.parts[0].numel() for b in done)
    return dict(name=row.name, dtype=str(machine.dtype)[6:], loss=loss, seconds=statistics.median(times[1:]),
                tokens=sum(b.real for b in done) / seconds, learned=sum(b.learned for b in done) / seconds,
                filled=sum(b.real for b in done) / places, memory=peak_memory(machine.device) - baseline,
                utilisation=work_done / seconds / (machine.peak * machine.world))


def worker(rank: int, port: int, row: Row, cfg: BenchConfig, examples: Optional[list], answer) -> None:
    if row.world > 1:  # as torchrun would
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(row.world), MASTER_ADDR="localhost",
                          MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="bench")
        torch.set_num_threads(max(1, torch.get_num_threads() // row.world))
    try:
        result = measure(row, cfg, examples)
    except Problem as problem:
        result = problem
    if rank == 0:
        answer.put(result)
    if row.world > 1:
        train_sft.dist.destroy_process_group()


def alone(row: Row, cfg: BenchConfig, examples: Optional[list] = None) -> dict:
    """`measure` in fresh processes."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    processes = [context.Process(target=worker, args=(rank, port, row, cfg, examples, answer))
                 for rank in range(row.world)]
    for p in processes:
        p.start()
    result = None
    while result is None and all(p.exitcode in (None, 0) for p in processes):
        try:
            result = answer.get(timeout=1)
        except queue.Empty:
            pass
    for p in processes:
        p.join() if result is not None else p.kill()
    if result is None:
        raise Problem(f"{row.name}: the process died, perhaps for lack of memory; try fewer --rows")
    if isinstance(result, Problem):
        raise result
    return result


# -- the ladder ----------------------------------------------------------------------------------------------

def ladder(cfg: BenchConfig) -> list[dict]:
    examples = conversations(cfg)
    rows = []
    print(f"\n{'':<32}{'':>9}{'real':>9}{'learned':>9}{'% of':>7}{'peak':>8}{'loss':>10}{'real':>9}\n"
          f"{'':<32}{'dtype':>9}{'tok/s':>9}{'tok/s':>9}{'peak':>7}{'GB':>8}{'differs':>10}{'tokens':>9}")
    for row in LADDER:
        if row.world > 1 and cfg.device == "cuda" and torch.cuda.device_count() < row.world:
            print(f"{row.name:<32}  not measured: needs {row.world} GPUs")
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            r = alone(row, cfg, examples)
        rows.append(r)
        print(f"{r['name']:<32}{r['dtype']:>9}{r['tokens']:>9.0f}{r['learned']:>9.0f}{100 * r['utilisation']:>7.0f}"
              f"{r['memory'] / 1e9:>8.2f}{abs(r['loss'] - rows[0]['loss']):>10.1e}{100 * r['filled']:>8.1f}%", flush=True)
    return rows


def one_step(cfg: BenchConfig) -> dict:
    """A step of this shape on random rows: speed, and memory beside the estimator's."""
    r = alone(Row("step", dtype=cfg.dtype, checkpointing=cfg.checkpointing, compile=cfg.compile), cfg)
    said = model.memory(cfg.shape, 1, cfg.rows, cfg.seq_len, getattr(torch, r["dtype"]), cfg.checkpointing)["peak"]
    again = model.step_flops(cfg.shape, cfg.seq_len, cfg.checkpointing) / model.step_flops(cfg.shape, cfg.seq_len)
    print(f"{cfg.rows} x {cfg.seq_len} tokens, {r['dtype']}: {r['tokens']:.0f} tok/s, {r['seconds']:.2f} s a step; MFU "
          f"{100 * r['utilisation']:.1f}%, HFU {100 * r['utilisation'] * again:.1f}% of the measured matrix product; peak "
          f"memory {r['memory'] / 1e9:.2f} GB, estimated {said / 1e9:.2f} ({100 * (said / r['memory'] - 1):+.1f}%)")
    return dict(r, estimated=said, hfu=r["utilisation"] * again)


# -- transformers, side by side ------------------------------------------------------------------------------

def twin(shape: model.LLaMAConfig):
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise Problem("--peer needs transformers: pip install transformers") from None
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.dim, intermediate_size=shape.hidden_dim,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_kv_heads,
        rms_norm_eps=shape.norm_eps, max_position_embeddings=shape.max_seq_len, use_cache=False))


class Peer(torch.nn.Module):
    """transformers' Llama behind our loop: as its Trainer would call it, padding masked, logits for every token."""

    def __init__(self, shape: model.LLaMAConfig):
        super().__init__()
        self.net = twin(shape)

    def nll(self, tokens, labels, segments=None):
        mask = (tokens != 0).long() if (tokens == 0).any() else None
        n = (labels[:, 1:] != data.IGNORE).sum()
        return self.net(input_ids=tokens, labels=labels, attention_mask=mask).loss * n, n


def peer(cfg: BenchConfig) -> dict:
    """The same steps in turn, so that a noisy machine is noisy for both."""
    machines = {"float32": train_sft.choose_machine(train_sft.SFTConfig(dtype="float32", device=cfg.device))}
    best = train_sft.choose_machine(train_sft.SFTConfig(dtype=cfg.dtype, device=cfg.device))
    machines[str(best.dtype)[6:]] = best
    tokens = torch.randint(3, cfg.vocab_size, (cfg.rows, cfg.seq_len))
    full = [Batch((tokens, tokens, None), tokens.numel(), tokens.numel())]
    examples = conversations(cfg)
    alpaca, packed = (batches(examples, p, cfg.rows, cfg.seq_len) for p in (False, True))
    print(f"packed rows hold {100 * sum(b.real for b in packed) / sum(b.parts[0].numel() for b in packed):.1f}% real tokens, "
          f"padded ones {100 * sum(b.real for b in alpaca) / sum(b.parts[0].numel() for b in alpaca):.1f}%")
    speed = {}
    for name, compiled, theirs, ours, unit in (("tokens/s", False, full, full, "real"),
                                               ("tokens/s, compiled", True, full, full, "real"),
                                               ("learned tokens/s, Alpaca's recipe", False, alpaca, packed, "learned")):
        for precision, machine in machines.items():
            runners = [runner(Peer(cfg.shape), theirs, machine, compiled), runner(model.LLaMA(cfg.shape), ours, machine,
                                                                                  compiled)]
            taken = [[], []]
            for i in range(cfg.steps + 2):
                for seconds, run_one in zip(taken, runners):
                    seconds.append(run_one(i, unit))
            a, b = (statistics.median(t[2:]) for t in taken)
            speed[name, precision] = a, b
            print(f"{name:<36}{precision:>9}   transformers {a:>7.0f}   here {b:>7.0f}   ({b / a:.2f}x)", flush=True)
    for name in dict.fromkeys(n for n, _ in speed):
        a, b = (max(v[i] for k, v in speed.items() if k[0] == name) for i in (0, 1))
        print(f"{name}, each in its best precision: {b / a:.2f}x")
    net = model.LLaMA(cfg.shape).to(best.device)
    one = runner(net, full, best, False)
    one(0, "real")
    with torch.profiler.profile() as profile:
        one(1, "real")
    parts = sorted((e for e in profile.key_averages()), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in parts)
    print("where a step goes: " + ", ".join(f"{e.key.removeprefix('aten::')} {100 * e.self_cpu_time_total / total:.0f}%"
                                           for e in parts[:5]))
    return {f"{name} {precision}": b / a for (name, precision), (a, b) in speed.items()}


def runner(net, work: list[Batch], machine: train_sft.Machine, compiled: bool):
    """A function that takes step i and returns its speed in tokens of that kind."""
    net = net.to(machine.device).train()
    if compiled:
        for block in (net.layers if isinstance(net, model.LLaMA) else net.net.model.layers):
            block.compile()
    optimizer = train_sft.make_optimizer(net, train_sft.SFTConfig(steps=1, learning_rate=1e-4))

    def run_one(i: int, unit: str) -> float:
        batch = work[i % len(work)]
        began = time.perf_counter()
        step(net, optimizer, batch.parts, machine)
        return getattr(batch, unit) / (time.perf_counter() - began)
    return run_one


def main(cfg: BenchConfig) -> dict:
    figures = {}
    if cfg.only == "step":
        return one_step(cfg)
    if cfg.only in ("all", "ladder"):
        figures["ladder"] = ladder(cfg)
    if cfg.only == "peer" or cfg.peer:
        figures["peer"] = peer(cfg)
    return figures


if __name__ == "__main__":
    run(main, BenchConfig)
