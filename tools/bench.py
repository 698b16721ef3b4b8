"""What each optimization costs and saves, measured on your machine.

    python -m tools.bench           # the ladder: from attention by hand to FSDP, step by step
    python -m tools.bench peer      # training steps of ours and of transformers' Llama, in turns
    python -m tools.bench step --seq_len=2048 --rows=2 --checkpointing    # a step of one shape
    python -m tools.bench quality --ckpt=out/vicuna     # what fewer bits cost: perplexity, KL
    LLAMA_CPP=/tmp/llama python -m tools.bench speed    # and what they save: tokens per second

Times are of whole training steps: forward, backward, clipping, AdamW.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.nn.utils.rnn import pad_sequence

import data
import model
import train_sft
from tools import checkpoint, config, convert, estimate, quantize
from tools.config import UserError, run
from tools.machine import Machine, choose_device, choose_machine, train_flops
from toy import exam, world


@dataclass
class BenchConfig:
    dim: int = 256  # width; heads are 64 wide
    n_layers: int = 6  # blocks
    vocab_size: int = 4096  # rows of the embedding
    seq_len: int = 256  # tokens in a row
    rows: int = 16  # rows in a step
    steps: int = 8  # steps that are timed, after one that is not
    data: str = ""  # ladder, peer: Alpaca or ShareGPT file; toy instructions when not given
    checkpointing: bool = False  # step: recompute blocks in the backward pass
    compile: bool = False  # step: torch.compile each block
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # step, peer: precision
    device: str = "auto"  # cuda or cpu

    def __post_init__(self):
        config.check_at_least(self, 64, "dim")
        config.check_at_least(self, 1, "n_layers", "seq_len", "rows", "steps")

    @property
    def shape(self) -> model.LLaMAConfig:
        return model.LLaMAConfig(
            dim=self.dim, n_layers=self.n_layers, n_heads=self.dim // 64,
            vocab_size=self.vocab_size, max_seq_len=self.seq_len)


@dataclass
class Row:
    """A row of the ladder."""
    name: str
    fused: bool = True
    dtype: str = "auto"
    packed: bool = True
    all_logits: bool = False  # the textbook loss: logits at every position
    checkpointing: bool = False
    compile: bool = False
    world: int = 1  # processes
    peer: bool = False  # transformers' network instead of ours


PLAIN = dict(packed=False, all_logits=True)
LADDER = [
    Row("attention by hand, float32", fused=False, dtype="float32", **PLAIN),
    Row("fused attention", dtype="float32", **PLAIN),
    Row("bfloat16", dtype="bfloat16", **PLAIN),
    Row("packing, best precision here", all_logits=True),
    Row("logits of supervised tokens"),
    Row("the same, checkpointing", checkpointing=True),
    Row("the same, torch.compile", compile=True),
    Row("the same, two processes, FSDP", world=2),
]
PAIRS = {  # ours and transformers'
    "full rows": (Row("ours"), Row("transformers", peer=True)),
    "full rows, compiled": (Row("ours", compile=True),
                            Row("transformers", peer=True, compile=True)),
    # ours packs them into full rows; Alpaca's script pads batches of 8
    "conversations": (Row("ours"), Row("transformers", peer=True, packed=False)),
}


# -- what is trained on: batches (tokens, labels, segments or None), padded with 0 ----------------

def real(batch: tuple) -> int:
    """Tokens that are not padding."""
    return int((batch[0] != 0).sum())


def random_batch(cfg: BenchConfig) -> tuple:
    """Full rows, every token supervised."""
    tokens = torch.randint(3, cfg.vocab_size, (cfg.rows, cfg.seq_len))
    return tokens, tokens, None


def load_examples(cfg: BenchConfig) -> list[data.Example]:
    """At most 4000 conversations in random order, each cut to a row. The tokenizer is trained on
    them."""
    with tempfile.TemporaryDirectory() as scratch:
        file = cfg.data or write_toy_instructions(Path(scratch) / "alpaca.json")
        template = data.default_template(data.kind_of(file))
        conversations = data.load_conversations(file)
        random.Random(1).shuffle(conversations)
        conversations = conversations[:4000]
        texts = [turn.text for c in conversations for turn in c.turns]
        size = min(cfg.vocab_size, 1024)
        tokenizer = data.train_tokenizer(texts, size, Path(scratch) / "tokenizer.model")
    examples = []
    for c in conversations:
        tokens, labels = data.render(c, template, tokenizer)
        examples.append(data.Example(tokens[:cfg.seq_len], labels[:cfg.seq_len]))
    return examples


def write_toy_instructions(path: Path) -> Path:
    rng = random.Random(0)
    records = [world.instruction(rng, i) for i in range(4000)]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def padded_batch(examples: list[data.Example]) -> tuple:
    """One conversation per row, as long as the longest of them."""
    tokens = [torch.tensor(e.tokens) for e in examples]
    labels = [torch.tensor(e.labels) for e in examples]
    return pad_sequence(tokens, True), pad_sequence(labels, True, data.IGNORE), None


def make_batches(examples: list[data.Example], packed: bool, size: int, seq_len: int) -> list:
    """Batches of `size` packed rows, or of 8 padded conversations."""
    if not packed:
        return [padded_batch(examples[i:i + 8]) for i in range(0, len(examples) - 7, 8)]
    rows = data.pack(examples, seq_len)
    size = min(size, len(rows))
    return [rows.batch(i, size) for i in range(len(rows) // size)]


# -- one row of the ladder ------------------------------------------------------------------------

def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory(device: str) -> float:
    """Bytes, since reset_peak."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def make_network(shape: model.LLaMAConfig, row: Row, machine: Machine) -> tuple:
    """The network and its optimizer."""
    net = Peer(shape) if row.peer else model.LLaMA(shape)
    net.to(machine.device).train()
    if not row.peer:
        net.set_fused(row.fused)
        net.checkpointing = row.checkpointing
        if row.all_logits:
            net.nll = net.nll_textbook
    if row.compile:
        for block in net.layers:
            block.compile()
    if machine.sharded:
        train_sft.shard(net, machine)
    cfg = train_sft.SFTConfig(steps=1, learning_rate=1e-4)
    return net, train_sft.make_optimizer(net, cfg)


def train_step(net, optimizer, batch: tuple, machine: Machine) -> float:
    """One step of training; returns how many seconds it took."""
    start = time.perf_counter()
    parts = train_sft.micro_batches(batch, len(batch[0]), machine.device)
    train_sft.loss_backward(net, parts, machine)
    train_sft.clip_gradients(net, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if machine.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def mean_loss(net, batch: tuple, machine: Machine) -> float:
    (tokens, labels, segments), = train_sft.micro_batches(batch, len(batch[0]), machine.device)
    with machine.autocast():
        nll, count = net.nll(tokens, labels, segments=segments)
    return float(nll / count)


def measure(row: Row, cfg: BenchConfig, examples: list | None = None) -> dict:
    """Trains cfg.steps steps on examples, or on random tokens when there are none."""
    machine = choose_machine(cfg.device, row.dtype)
    tiny = model.LLaMAConfig(dim=64, n_layers=1, n_heads=1, vocab_size=64)
    ones = torch.ones(1, 16, dtype=torch.long)
    train_step(*make_network(tiny, Row("tiny"), machine), (ones, ones, None), machine)
    reset_peak(machine.device)
    baseline = peak_memory(machine.device)  # the libraries', which the tiny step has loaded
    torch.manual_seed(0)
    net, optimizer = make_network(cfg.shape, row, machine)
    loss, batches = None, [random_batch(cfg)]
    if examples is not None:
        batches = make_batches(examples, row.packed, cfg.rows, cfg.seq_len)
        first = make_batches(examples[:8], row.packed, 8, cfg.seq_len)[0]
        loss = mean_loss(net, first, machine)
    steps = []
    for i in range(cfg.steps + 1):
        batch = batches[i % len(batches)]
        mine = tuple(None if t is None else t[machine.rank::machine.world] for t in batch)
        seconds = train_step(net, optimizer, mine, machine)
        flops = step_flops(cfg.shape, batch, row.all_logits)
        steps.append((seconds, real(batch) / seconds, flops / seconds))
    # without the first one, which compiles and allocates the optimizer's state
    seconds, tokens, flops = (statistics.median(column) for column in zip(*steps[1:]))
    return dict(name=row.name, dtype=str(machine.dtype)[6:], loss=loss, seconds=seconds,
                tokens=tokens, utilization=flops / (machine.peak_flops * machine.world),
                memory=peak_memory(machine.device) - baseline,
                filled=sum(map(real, batches)) / sum(batch[0].numel() for batch in batches))


def step_flops(shape: model.LLaMAConfig, batch: tuple, all_logits: bool) -> float:
    tokens, labels, _ = batch
    n = tokens.numel()
    n_logits = n if all_logits else int((labels != data.IGNORE).sum())
    return train_flops(shape, n, n_logits, tokens.shape[1])


def worker(rank: int, port: int, row: Row, cfg: BenchConfig, examples: list | None, answer) -> None:
    if row.world > 1:  # as torchrun does
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(row.world),
                          MASTER_ADDR="localhost", MASTER_PORT=str(port),
                          TORCHELASTIC_RUN_ID="bench")
        torch.set_num_threads(max(1, torch.get_num_threads() // row.world))
    with contextlib.redirect_stdout(io.StringIO()):  # the table says which precision it is
        result = measure(row, cfg, examples)
    if rank == 0:
        answer.put(result)
    if row.world > 1:
        dist.destroy_process_group()


def measure_alone(row: Row, cfg: BenchConfig, examples: list | None = None) -> dict:
    """`measure` in fresh processes, since a process has only one peak of memory."""
    answer = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        arguments = get_free_port(), row, cfg, examples, answer
        multiprocessing.spawn(worker, arguments, row.world)
    except multiprocessing.ProcessExitedException as error:
        raise UserError(f"{row.name}: {error}; out of memory? Try fewer --rows") from None
    return answer.get()


def ladder(cfg: BenchConfig) -> dict:
    own_rows = ("checkpointing", "compile", "dtype")
    config.refuse_unused(cfg, own_rows, "the ladder has rows for it")
    examples, rows = load_examples(cfg), []
    print(" " * 41 + "     real   % of    peak      loss     real")
    print(" " * 36 + "dtype    tok/s   peak      GB   differs   tokens")
    on_cpu = choose_device(cfg.device) == "cpu"
    for row in LADDER:
        if row.world > 1 and not on_cpu and torch.cuda.device_count() < row.world:
            print(f"{row.name:<32}  not measured: needs {row.world} GPUs")
            continue
        r = measure_alone(row, cfg, examples)
        rows.append(r)
        differs = abs(r["loss"] - rows[0]["loss"])
        print(f"{r['name']:<32}{r['dtype']:>9}{r['tokens']:>9.0f}{100 * r['utilization']:>7.0f}"
              f"{r['memory'] / 1e9:>8.2f}{differs:>10.1e}{100 * r['filled']:>8.1f}%", flush=True)
    return dict(ladder=rows)


def step(cfg: BenchConfig) -> dict:
    """A step of this shape on random rows: its speed, and its memory beside the estimate."""
    config.refuse_unused(cfg, ("data",), "step trains on random tokens")
    # glibc keeps freed memory for reuse. With this, large tensors are returned to the system at
    # once, so that the peak is what is in use.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2 ** 20))
    row = Row("step", dtype=cfg.dtype, checkpointing=cfg.checkpointing, compile=cfg.compile)
    r = measure_alone(row, cfg)
    dtype = getattr(torch, r["dtype"])
    estimated = estimate.memory(cfg.shape, 1, cfg.rows, cfg.seq_len, dtype, cfg.checkpointing)
    print(f"{cfg.rows} x {cfg.seq_len} tokens in {r['dtype']}: {r['seconds']:.2f} s, "
          f"{r['tokens']:.0f} tok/s, MFU {100 * r['utilization']:.1f}%; "
          f"{r['memory'] / 1e9:.2f} GB at the peak, estimated {estimated['peak'] / 1e9:.2f}")
    return dict(r, estimated=estimated["peak"])


# -- transformers, side by side -------------------------------------------------------------------

def transformers_llama(c: model.LLaMAConfig):
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UserError("this needs transformers: pip install transformers") from None
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len, use_cache=False))


class Peer(torch.nn.Module):
    """transformers' Llama as its Trainer calls it: padding masked, logits at every position."""

    def __init__(self, shape: model.LLaMAConfig):
        super().__init__()
        self.net = transformers_llama(shape)
        self.layers = self.net.model.layers

    def nll(self, tokens, labels, segments=None):
        mask = (tokens != 0).long() if (tokens == 0).any() else None
        n = (labels[:, 1:] != data.IGNORE).sum()
        return self.net(input_ids=tokens, labels=labels, attention_mask=mask).loss * n, n


def peer(cfg: BenchConfig) -> dict:
    """Speed of training, ours and transformers', in turns because machines are noisy. Prints
    medians over the steps."""
    config.refuse_unused(cfg, ("checkpointing", "compile"), "what is compared is fixed")
    machine, examples, ratios = choose_machine(cfg.device, cfg.dtype), load_examples(cfg), {}
    for name, pair in PAIRS.items():
        runners, speeds = [], []
        for row in pair:
            batches = [random_batch(cfg)]
            if name == "conversations":
                batches = make_batches(examples, row.packed, cfg.rows, cfg.seq_len)
            runners.append((*make_network(cfg.shape, row, machine), batches))
        for i in range(cfg.steps + 1):
            turn = []
            for net, optimizer, batches in runners:
                batch = batches[i % len(batches)]
                turn.append(real(batch) / train_step(net, optimizer, batch, machine))
            speeds.append((*turn, turn[0] / turn[1]))
        # without the first step, which compiles and allocates the optimizer's state
        ours, theirs, ratio = (statistics.median(column) for column in zip(*speeds[1:]))
        print(f"{name:<20} ours {ours:.0f} tok/s, transformers {theirs:.0f}: "
              f"{ratio:.2f} times transformers", flush=True)
        ratios[name] = ratio
    return ratios


# -- what fewer bits cost -------------------------------------------------------------------------

@dataclass
class QualityConfig:
    ckpt: str = "out/vicuna"  # a folder of ours, Meta's or Hugging Face's
    data: str = ""  # held-out text or conversations; the toy world's exam when not given
    questions: int = 200  # toy world: how many, for the share of right answers

    def __post_init__(self):
        if self.data:
            config.refuse_unused(self, ("questions",), "--data has no right answers")


PRECISIONS = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None),
              "q8": (torch.float32, "q8"), "q4": (torch.float32, "q4")}


def answered(item: world.Item) -> data.Conversation:
    """A question of the toy world with its right answer."""
    turns = [data.Turn(role, text) for role, text in item.turns]
    return data.Conversation([*turns, data.Turn("assistant", item.question.full)])


@torch.inference_mode()
def quality(cfg: QualityConfig) -> dict:
    """Perplexity; KL divergence from fp32 and share of equal top tokens, as llama.cpp reports them
    for its formats; and right answers about the toy world. At most 100 rows of 512 tokens are
    scored."""
    exact, path, meta = convert.load(cfg.ckpt)
    tokenizer, template = data.Tokenizer(path), meta["template"]
    length = min(512, exact.config.max_seq_len)
    items = []
    if cfg.data:
        rows = convert.rows_of(cfg.data, template, tokenizer, length)
    else:
        items = world.test_set("scenes", cfg.questions)
        rows = data.pack([data.render(answered(i), template, tokenizer) for i in items], length)
    batches = [rows.batch(i, 1) for i in range(min(100, len(rows)))]
    figures = {}
    print(f"{'':6}{'MB':>9}{'perplexity':>12}{'KL':>10}{'same top':>10}")
    for name, (dtype, bits) in PRECISIONS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            net = convert.load(cfg.ckpt, dtype, quantize=bits)[0]
        row = figures[name] = compare(exact, net, batches)
        line = f"{name:6}{row['bytes'] / 1e6:>9.2f}{row['perplexity']:>12.4f}{row['kl']:>10.5f}"
        line += f"{100 * row['same_top']:>9.2f}%"
        if items:
            replies, _ = exam.model_player(net, tokenizer, template)(items)
            correct = [world.grade(i.question, reply) == 1 for i, reply in zip(items, replies)]
            row["right"] = sum(correct) / len(items)
            line += f"   {100 * row['right']:.1f}% right"
        print(line, flush=True)
    return figures


def compare(exact, net, batches: list[tuple]) -> dict:
    """A network's predictions at supervised positions, against those of the exact network."""
    nats, kl, same, count = 0.0, 0.0, 0, 0
    for tokens, labels, segments in batches:
        targets = model.shift_labels(labels, segments)
        supervised = targets != data.IGNORE
        p = exact(tokens, segments=segments)[:, :-1][supervised].double().log_softmax(-1)  # (N, V)
        q = net(tokens, segments=segments)[:, :-1][supervised].double().log_softmax(-1)
        nats -= float(q.gather(1, targets[supervised][:, None]).sum())
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    return dict(bytes=convert.size(net), perplexity=math.exp(nats / count), kl=kl / count,
                same_top=same / count)


# -- what fewer bits save -------------------------------------------------------------------------

@dataclass
class SpeedConfig:
    ckpt: str = ""  # a folder; random weights of TinyLlama's width when not given
    n_layers: int = 8  # of the random weights; TinyLlama's 22 take 11 GB of memory

    def __post_init__(self):
        if self.ckpt:
            config.refuse_unused(self, ("n_layers",), f"{self.ckpt} has its own")
        config.check_at_least(self, 1, "n_layers")


SHAPE = dict(dim=2048, n_heads=32, n_kv_heads=4, hidden_dim=5632, norm_eps=1e-5)  # TinyLlama's
PROMPT = list(range(3, 19))
TOKENS, ROUNDS = 4, 12  # each generates TOKENS in each round


def speed(cfg: SpeedConfig) -> dict:
    """Tokens per second for one user, after a prompt of 16 tokens: ours in each precision, beside
    transformers or llama.cpp where they are installed (LLAMA_CPP names the folder of npm's
    node-llama-cpp). Every token needs all weights, so memory bandwidth is the limit."""
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
          f"torch {torch.__version__}")
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(cfg.ckpt or save_random_weights(scratch, cfg.n_layers))
        for name, (dtype, bits) in PRECISIONS.items():
            net = convert.load(folder, dtype, quantize=bits)[0]
            stream = net.generate([PROMPT], 1 + TOKENS * ROUNDS, stop=-1)
            racers = {f"ours, {name}": stopwatch(stream)}
            if bits and "LLAMA_CPP" in os.environ:
                racers[f"llama.cpp, {name}"] = llama_cpp_racer(folder, scratch, bits)
            elif not bits and importlib.util.find_spec("transformers"):
                theirs = transformers_stream(net.config, dtype)
                racers[f"transformers, {name}"] = stopwatch(theirs)
            figures |= race(racers)
            n_bytes = convert.size(net) - net.tok_embeddings.weight.nbytes
            gigabytes = n_bytes * figures[f"ours, {name}"] / 1e9
            print(f"{'':<20}{gigabytes:>8.1f} GB/s of weights are read by ours", flush=True)
    return figures


def race(racers: dict[str, Callable]) -> dict:
    """Tokens per second of each. They take short turns, so that the noise of the machine hits all
    alike, and in changing order, since it can matter who comes first. Prints medians, also of the
    ratios of two neighboring turns."""
    taken = {name: [] for name in racers}
    for i in range(ROUNDS):
        for name in sorted(racers, reverse=i % 2 == 1):
            taken[name].append(racers[name]())
    figures = {name: 1 / statistics.median(seconds) for name, seconds in taken.items()}
    for name, rate in figures.items():
        print(f"{name:<20}{rate:>8.2f} tokens/s")
    if len(racers) == 2:
        ratios = [theirs / ours for ours, theirs in zip(*taken.values())]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{'':<20}{middle:>8.2f} times as fast (half of the turns: {low:.2f} to {high:.2f})")
    return figures


def save_random_weights(scratch: str, n_layers: int) -> str:
    net = model.LLaMA(model.LLaMAConfig(**SHAPE, n_layers=n_layers)).bfloat16()
    lines = ["Once upon a time."] * 9
    tokenizer = data.train_tokenizer(lines, 300, Path(scratch) / "tokenizer.model")
    checkpoint.save(scratch, net, dict(step=0, template="plain"), tokenizer.path)
    return scratch


def stopwatch(stream: Iterator) -> Callable[[], float]:
    """A function that generates the next TOKENS tokens and returns the seconds per token."""
    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(TOKENS):
            next(stream)
        return (time.perf_counter() - start) / TOKENS
    next(stream)  # reads the prompt
    return seconds


@torch.inference_mode()
def transformers_stream(c: model.LLaMAConfig, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Greedy decoding of random weights, without the overhead of their generate."""
    net = transformers_llama(c).to(dtype)
    tokens, cache = torch.tensor([PROMPT]), None
    while True:
        out = net(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        yield tokens


def llama_cpp_racer(folder: Path, scratch: str, bits: str) -> Callable[[], float]:
    file = Path(scratch) / f"{bits}.gguf"
    quantize.write_gguf(folder, file, bits)
    job = dict(model=str(file), prompts=[PROMPT], max_tokens=1 + TOKENS,
               threads=torch.get_num_threads())
    return lambda: llama_cpp(job)["seconds"][0]


def llama_cpp(job: dict) -> dict:
    """Runs a job in llama.cpp itself; tests/llama_cpp.mjs describes it."""
    script = Path(__file__).resolve().parent.parent / "tests" / "llama_cpp.mjs"
    done = subprocess.run(["node", script], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"llama.cpp failed: {done.stderr.strip()[-200:] or done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    run(None, {
        "": (ladder, BenchConfig), "peer": (peer, BenchConfig), "step": (step, BenchConfig),
        "quality": (quality, QualityConfig), "speed": (speed, SpeedConfig)})
