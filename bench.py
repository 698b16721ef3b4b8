"""What each trick costs and saves, measured on your machine.

    python bench.py           # the ladder: attention by hand, fused, bfloat16, packing, learned logits, ...
    python bench.py --peer    # and transformers' Llama of the same shape, in the same run
    python bench.py --data=alpaca.json --tokenizer=tokenizer.model --vocab_size=32000   # your file
    python bench.py --only=step --preset=7B --vocab_size=32000 --seq_len=2048 --rows=1 --checkpointing
    python bench.py quality --ckpt=out/vicuna         # what fewer bits cost: perplexity, KL, right answers
    LLAMA_CPP=/tmp/llama python bench.py speed        # and what they give: tokens a second, beside others'

Every row of the ladder is a process of its own, so that its peak of memory is its own: the libraries' share,
measured after a tiny step, is subtracted. Times are of whole training steps: forward, backward, clipping, AdamW.
"""

import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import queue
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Literal, NamedTuple, Optional

import torch
import torch.nn.functional as F

import convert
import data
import model
import toy
import train_sft
from config import Problem, run


@dataclass
class BenchConfig:
    only: Literal["ladder", "peer", "step"] = "ladder"  # step: one shape, memory beside the estimator's
    peer: bool = False  # compare with transformers, too
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
        logits, flat = logits.flatten(0, 1), labels.flatten()
        loss = F.cross_entropy(logits, flat, ignore_index=data.IGNORE, reduction="sum")
        return loss, (labels != data.IGNORE).sum()


# -- what is trained on --------------------------------------------------------------------------------------

class Batch(NamedTuple):
    parts: tuple  # tokens, labels, segments or None: (B, T) each
    real: int  # tokens that are not padding
    learned: int


def conversations(cfg: BenchConfig) -> list[data.Example]:
    """Shuffled, and cut to a row."""
    if cfg.data:
        found, template = data.load_conversations(cfg.data), data.default_template(cfg.data)
    else:
        rng, template = random.Random(0), "alpaca"
        records = [toy.instruction(rng) for _ in range(4000)]
        found = [data.Conversation([data.Turn("user", r["instruction"], r["input"]),
                                    data.Turn("assistant", r["output"])]) for r in records]
    if cfg.tokenizer:
        tokenizer = data.find_tokenizer(cfg.tokenizer)
    else:
        with tempfile.TemporaryDirectory() as folder:
            texts = [t.text for c in found for t in c.turns]
            size = min(cfg.vocab_size, 1024)
            tokenizer = data.train_tokenizer(texts, size, Path(folder) / "tokenizer.model")
    if tokenizer.vocab_size > cfg.vocab_size:
        raise Problem(f"the tokenizer has more pieces than that: give --vocab_size={tokenizer.vocab_size}")
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
    real = sum(len(e.tokens) for e in examples)
    return Batch((tokens, labels, None), real, int((labels != data.IGNORE).sum()))


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


def step(net, optimizer, parts: tuple, machine: train_sft.Machine) -> None:
    train_sft.loss_backward(net, [tuple(t if t is None else t.to(machine.device) for t in parts)], machine)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if machine.device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def mean_loss(net, work: list[Batch], machine: train_sft.Machine) -> float:
    total, count = 0.0, 0
    for batch in work:
        with machine.autocast():
            tokens, labels, segments = (t if t is None else t.to(machine.device) for t in batch.parts)
            nll, n = net.nll(tokens, labels, segments=segments)
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
        mine = tuple(t if t is None else t[machine.rank::machine.world] for t in batch.parts)
        step(net, optimizer, mine, machine)
        times.append(time.perf_counter() - began)
        if i:  # the first step compiles, and makes the optimizer's state
            done.append(batch)
            B, T = batch.parts[0].shape
            work_done += train_sft.flops(net, B * T, batch.learned if row.learned_only else B * T, T)
    seconds, places = sum(times[1:]), sum(b.parts[0].numel() for b in done)
    real, learned = sum(b.real for b in done), sum(b.learned for b in done)
    return dict(name=row.name, dtype=str(machine.dtype)[6:], loss=loss, seconds=statistics.median(times[1:]),
                tokens=real / seconds, learned=learned / seconds, filled=real / places,
                memory=peak_memory(machine.device) - baseline,
                utilisation=work_done / seconds / (machine.peak * machine.world))


def worker(rank: int, port: int, row: Row, cfg: BenchConfig, examples: Optional[list], answer) -> None:
    if row.world > 1:  # as torchrun would
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(row.world),
                          MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="bench")
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
        print(f"{r['name']:<32}{r['dtype']:>9}{r['tokens']:>9.0f}{r['learned']:>9.0f}"
              f"{100 * r['utilisation']:>7.0f}{r['memory'] / 1e9:>8.2f}"
              f"{abs(r['loss'] - rows[0]['loss']):>10.1e}{100 * r['filled']:>8.1f}%", flush=True)
    return rows


def one_step(cfg: BenchConfig) -> dict:
    """A step of this shape on random rows: speed, and memory beside the estimator's."""
    c = cfg.shape
    # glibc keeps freed tensors below 32 MB for later; given back at once, the peak is what is in use
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2 ** 20))
    r = alone(Row("step", dtype=cfg.dtype, checkpointing=cfg.checkpointing, compile=cfg.compile), cfg)
    said = model.memory(c, 1, cfg.rows, cfg.seq_len, getattr(torch, r["dtype"]), cfg.checkpointing)["peak"]
    again = model.step_flops(c, cfg.seq_len, cfg.checkpointing) / model.step_flops(c, cfg.seq_len)
    mfu, hfu = r["utilisation"], r["utilisation"] * again  # the model's; the chip's
    print(f"{cfg.rows} x {cfg.seq_len} tokens, {r['dtype']}: {r['tokens']:.0f} tok/s, {r['seconds']:.2f} s a "
          f"step; MFU {100 * mfu:.1f}%, HFU {100 * hfu:.1f}% of the measured matrix product; peak memory "
          f"{r['memory'] / 1e9:.2f} GB, estimated {said / 1e9:.2f} ({100 * (said / r['memory'] - 1):+.1f}%)")
    return dict(r, estimated=said, hfu=hfu)


# -- transformers, side by side ------------------------------------------------------------------------------

def twin(shape: model.LLaMAConfig):
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise Problem("--peer needs transformers: pip install transformers") from None
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.dim, intermediate_size=shape.hidden_dim,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        rms_norm_eps=shape.norm_eps, max_position_embeddings=shape.max_seq_len, use_cache=False))


class Peer(torch.nn.Module):
    """transformers' Llama as its Trainer would call it: padding masked, logits for every token."""

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
    for name, work in (("packed", packed), ("padded", alpaca)):
        places = sum(b.parts[0].numel() for b in work)
        print(f"{100 * sum(b.real for b in work) / places:.1f}% of the tokens in {name} rows are real")
    races = [("tokens/s", False, full, full, "real"), ("tokens/s, compiled", True, full, full, "real"),
             ("learned tokens/s, Alpaca's recipe", False, alpaca, packed, "learned")]
    speed = {}
    for name, compiled, theirs, ours, unit in races:
        for precision, machine in machines.items():
            runners = [runner(Peer(cfg.shape), theirs, machine, compiled),
                       runner(model.LLaMA(cfg.shape), ours, machine, compiled)]
            taken = [[], []]
            for i in range(cfg.steps + 2):
                for seconds, run_one in zip(taken, runners):
                    seconds.append(run_one(i, unit))
            a, b = (statistics.median(t[2:]) for t in taken)
            speed[name, precision] = a, b
            print(f"{name:<36}{precision:>9}   transformers {a:>7.0f}   here {b:>7.0f}   ({b / a:.2f}x)",
                  flush=True)
    for name in dict.fromkeys(n for n, _ in speed):
        a, b = (max(v[i] for k, v in speed.items() if k[0] == name) for i in (0, 1))
        print(f"{name}, each in its best precision: {b / a:.2f}x")
    one = runner(model.LLaMA(cfg.shape), full, best, False)
    one(0, "real")
    with torch.profiler.profile() as profile:
        one(1, "real")
    cost = {e.key.removeprefix("aten::"): e.self_cpu_time_total for e in profile.key_averages()}
    print("where a step goes: " + ", ".join(f"{name} {100 * cost[name] / sum(cost.values()):.0f}%"
                                           for name in sorted(cost, key=cost.get)[:-6:-1]))
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


# -- fewer bits: what they cost ------------------------------------------------------------------------------

@dataclass
class QualityConfig:
    ckpt: str = "out/vicuna"  # a folder of ours, Meta's or Hugging Face's
    data: str = ""  # text or conversations held out; questions about unseen toy scenes when not given
    questions: int = 200  # about the toy world, for the share of right answers
    rows: int = 100  # rows of 512 tokens that are scored


PRECISIONS = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None),
              "q8": (torch.float32, "q8"), "q4": (torch.float32, "q4")}


def answered(item: toy.Item) -> data.Conversation:
    """With the right answer."""
    turns = [data.Turn(role, text) for role, text in (*item.turns, ("assistant", item.question.full))]
    return data.Conversation(turns)


@torch.inference_mode()
def quality(cfg: QualityConfig) -> dict:
    """Perplexity, mean KL divergence from fp32, share of tokens with the same likeliest successor (what llama.cpp
    reports for its formats), and right answers about the toy world."""
    exact, path, meta = convert.load(cfg.ckpt)
    tokenizer, template, length = data.Tokenizer(path), meta["template"], min(512, exact.config.max_seq_len)
    items = [] if cfg.data else toy.test_set("scenes", cfg.questions)
    if cfg.data:
        rows = convert.rows_of(cfg.data, template, tokenizer, length)
    else:
        rows = data.pack([data.render(answered(item), template, tokenizer) for item in items], length)
    batches = [rows.batch(i, 1) for i in range(min(cfg.rows, len(rows)))]
    figures = {}
    print(f"{'':6}{'MB':>9}{'perplexity':>12}{'KL':>10}{'same top':>10}" + "   right" * bool(items))
    for name, (dtype, quantize) in PRECISIONS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            net = convert.load(cfg.ckpt, dtype, quantize=quantize)[0]
        nats, kl, same, count = 0.0, 0.0, 0, 0
        for tokens, labels, segments in batches:
            wanted = labels[:, 1:] != data.IGNORE
            if segments is not None:
                wanted &= segments[:, 1:] == segments[:, :-1]
            p, q = (n(tokens, segments=segments)[:, :-1][wanted].double().log_softmax(-1)  # (supervised, V)
                    for n in (exact, net))
            nats -= float(q.gather(1, tokens[:, 1:][wanted][:, None]).sum())
            kl += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(p)
        row = dict(bytes=convert.size(net), perplexity=math.exp(nats / count), kl=kl / count,
                   same_top=same / count)
        line = f"{name:6}{row['bytes'] / 1e6:>9.2f}{row['perplexity']:>12.4f}{row['kl']:>10.5f}"
        line += f"{100 * row['same_top']:>9.2f}%"
        if items:
            replies = train_sft.model_player(net, tokenizer, template)(items)[0]
            row["right"] = sum(toy.grade(i.question, r) == 1 for i, r in zip(items, replies)) / len(items)
            line += f"{100 * row['right']:>7.1f}%"
        print(line, flush=True)
        figures[name] = row
    return figures


# -- fewer bits: what they give ------------------------------------------------------------------------------

@dataclass
class SpeedConfig:
    ckpt: str = ""  # a folder; random weights in TinyLlama's shape (1.1 B: 11 GB of memory) when not given
    tokens: int = 8  # written by each, in each round
    rounds: int = 5  # in turn, so that a noisy machine is noisy for all


TINYLLAMA = dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632, norm_eps=1e-5)


def speed(cfg: SpeedConfig) -> dict:
    """Tokens a second for one reader: ours in each precision, and transformers and llama.cpp where installed
    (LLAMA_CPP names the folder of npm's node-llama-cpp). Beside it, the bytes that this moves.

    The prompt has 16 tokens; reading it does not count. Medians of rounds.
    """
    threads, prompt = torch.get_num_threads(), list(range(3, 19))
    print(f"{threads} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    racers = {}  # name: (bytes read for a token: of the embedding, one row; a function: seconds per token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(cfg.ckpt or scratch)
        if not cfg.ckpt:
            net = model.LLaMA(model.LLaMAConfig(**TINYLLAMA)).bfloat16()
            words = data.train_tokenizer(["Once upon a time."] * 9, 300, folder / "words.model")
            model.save(folder, net, dict(step=0, template="plain"), words.path)
        for name, (dtype, quantize) in PRECISIONS.items():
            net = convert.load(folder, dtype, quantize=quantize)[0]
            stream = net.generate([prompt], 1 + cfg.tokens * cfg.rounds, stop=())
            moved = convert.size(net) - net.tok_embeddings.weight.nbytes
            racers[f"ours, {name}"] = moved, pace(stream, cfg)
            if importlib.util.find_spec("transformers") and not quantize:
                racers[f"transformers, {name}"] = moved, pace(transformers_stream(net, prompt), cfg)
        c = net.config
        if "LLAMA_CPP" in os.environ:
            file = Path(scratch) / "speed.gguf"
            embedding = c.vocab_size * c.dim // 32 * convert.BLOCKS["Q8_0"].bytes
            matrices = convert.write_gguf(folder, file, "q4") - embedding
            job = dict(model=str(file), prompts=[prompt], max_tokens=1 + cfg.tokens, threads=threads)
            racers["llama.cpp, q4"] = matrices, lambda: llama_cpp(job)["seconds"][0]
        taken = {name: [] for name in racers}
        for _ in range(cfg.rounds):
            for name, (_, seconds) in racers.items():
                taken[name].append(seconds())
    figures = {}
    for name, (moved, _) in racers.items():
        rate = 1 / statistics.median(taken[name])
        figures[name] = dict(bytes=moved, tokens_per_second=rate, bytes_per_second=moved * rate)
        print(f"{name:<20}{moved / 1e9:>7.2f} GB{rate:>8.2f} tokens/s{moved * rate / 1e9:>8.1f} GB/s")
    return figures


def pace(stream: Iterator, cfg: SpeedConfig) -> Callable[[], float]:
    """A function that takes the next tokens out of a stream, and returns the seconds that one took."""
    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(cfg.tokens):
            next(stream)
        return (time.perf_counter() - start) / cfg.tokens
    next(stream)  # reads the prompt
    return seconds


@torch.inference_mode()
def transformers_stream(ours: model.LLaMA, prompt: list[int]) -> Iterator[torch.Tensor]:
    """Their code on our weights, greedy: what its generate does, without that function's own overhead."""
    with torch.device("meta"):
        net = twin(ours.config)
    # their order of q's and k's rows is another: what it says is nonsense, and takes as long
    weights = {convert.their_name(name, 0): w for name, w in ours.state_dict().items()}
    net.load_state_dict({name if name == "lm_head.weight" else f"model.{name}": w for name, w in weights.items()},
                        assign=True)
    net.model.rotary_emb = type(net.model.rotary_emb)(net.config)
    tokens, cache = torch.tensor([prompt]), None
    while True:
        out = net(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        yield tokens


def llama_cpp(job: dict) -> dict:
    """What the real llama.cpp makes of a file; tests/llama_cpp.mjs describes the job."""
    script = Path(__file__).parent / "tests" / "llama_cpp.mjs"
    done = subprocess.run(["node", script], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise Problem(f"llama.cpp failed: {done.stderr.strip()[-200:] or done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(cfg: BenchConfig) -> dict:
    figures = {}
    if cfg.only == "step":
        return one_step(cfg)
    if cfg.only == "ladder":
        figures["ladder"] = ladder(cfg)
    if cfg.only == "peer" or cfg.peer:
        figures["peer"] = peer(cfg)
    return figures


if __name__ == "__main__":
    run(None, {"": (main, BenchConfig), "quality": (quality, QualityConfig), "speed": (speed, SpeedConfig)})
