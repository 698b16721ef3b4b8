"""From nothing to a talking model, and the one training loop behind it.

    python train_sft.py                    # toy world: data, tokenizer, LLaMA -> Alpaca -> Vicuna, table; 5 minutes
    python train_sft.py --fast             # the same in 80 seconds: shows that all runs, too short to learn much
    python train_sft.py --data=mine.json   # your conversations (ShareGPT or Alpaca format) or plain text
    python train_sft.py --stage=pretrain --data=some.txt --out=out/text
    python train_sft.py --stage=sft --data=alpaca.json --init=out/base --out=out/mine

Ctrl-C saves; the same command line goes on where it stopped, and does nothing twice.
References: LLaMA (2302.13971) section 2.3 for the optimizer; Alpaca and Vicuna for what is learned: replies and </s> only.
"""

import contextlib
import itertools
import json
import math
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
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
    batch_size: int = 8  # rows in an optimizer step
    micro_batch: int = 0  # rows in one forward pass; 0: all of them
    steps: int = 0  # optimizer steps; 0: chosen from the data and --epochs
    epochs: float = 3.0  # passes over your own data when --steps is not given
    learning_rate: float = 0.0  # peak; 0: 5e-4 for the small presets, 2e-5 for 7B and up
    warmup: float = 0.1  # share of the steps
    min_lr: float = 0.1  # the cosine ends at this share of the peak
    weight_decay: float = 0.1  # on matrices only
    beta2: float = 0.99  # AdamW's second moment; the first is 0.9
    clip: float = 1.0  # largest gradient norm
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more work
    fused: bool = True  # false: the attention written by hand
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 where the chip is good at it
    device: str = "auto"  # cuda, mps or cpu
    seed: int = 0  # of everything
    save_minutes: float = 5.0  # between checkpoints
    fast: bool = False  # the toy chain with fewer steps
    full: bool = False  # the toy table with all splits and kinds of questions
    fresh: bool = False  # throw away what an earlier run left in the same folders

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "epochs", "clip", "save_minutes"):
            if getattr(self, name) <= 0:
                raise Problem(f"--{name}={getattr(self, name)} must be more than 0")
        for name in ("steps", "learning_rate", "weight_decay", "micro_batch", "seed", "min_lr"):
            if getattr(self, name) < 0:
                raise Problem(f"--{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.warmup < 1 or not 0 <= self.beta2 < 1:
            raise Problem("--warmup and --beta2 must lie between 0 and 1")
        if self.vocab_size < 300:
            raise Problem(f"--vocab_size={self.vocab_size} is too small: 259 are bytes and control pieces; try 1024")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise Problem(f"--batch_size={self.batch_size} must be a multiple of --micro_batch={self.micro_batch}")


# -- the machine ---------------------------------------------------------------------------------------------

@dataclass
class Machine:
    device: str
    dtype: torch.dtype
    reason: str
    peak: float  # FLOP/s of a large matrix product, measured

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)


def choose_machine(cfg: SFTConfig) -> Machine:
    """Device and precision, with the reason; and what the machine can do at best."""
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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
    a = torch.randn(2048, 1024, device=device, dtype=dtype)
    b = torch.randn(1024, 1024, device=device, dtype=dtype)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    machine = Machine(device, dtype, reason, 2 * 2048 * 1024 * 1024 / sorted(times)[len(times) // 4])
    print(f"{str(dtype)[6:]} on {device}: {reason}; {torch.get_num_threads()} threads; "
          f"matrix products reach {machine.peak / 1e9:.0f} GFLOP/s")
    return machine


def flops(net: model.LLaMA, tokens: int, supervised: int, seq_len: int) -> float:
    """Of one training step: 6 per parameter and token in the blocks, 6 per supervised token in the output matrix,
    and the two attention products, halved because causal."""
    c = net.config
    blocks = sum(p.numel() for p in net.layers.parameters())
    return 6 * (blocks * tokens + c.vocab_size * c.dim * supervised + c.n_layers * seq_len * c.dim * tokens)


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
        if self.caught:  # the second Ctrl-C does not wait
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


def make_optimizer(net: torch.nn.Module, cfg: SFTConfig) -> torch.optim.AdamW:
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.dim() > 1], weight_decay=cfg.weight_decay),
              dict(params=[p for p in trained if p.dim() <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)


def loss_backward(net, parts: list[tuple], machine: Machine) -> float:
    """Backward over the micro-batches of one step; returns the mean loss.

    The sum over supervised tokens is divided by their count over *all* micro-batches: a mean of means would weigh
    a token by the company it keeps, and be NaN when a micro-batch has nothing to learn.
    """
    def learned(labels, segments):
        keep = labels[:, 1:] != data.IGNORE
        return int((keep if segments is None else keep & (segments[:, 1:] == segments[:, :-1])).sum())
    total = max(1, sum(learned(labels, segments) for _, labels, segments in parts))
    loss = 0.0
    for tokens, labels, segments in parts:
        with machine.autocast():
            nll, _ = net.nll(tokens, labels, segments=segments)
        (nll / total).backward()
        loss += nll.item() / total
    return loss


def train(net, rows: data.Rows, cfg: SFTConfig, machine: Machine, folder: Path, name: str, meta: dict,
          tokenizer: data.Tokenizer, start: int = 0, optimizer_state: Optional[dict] = None) -> float:
    """The loop. Runs steps start .. cfg.steps - 1, saves into `folder`, returns the mean loss of the last tenth."""
    if len(rows) < cfg.batch_size:
        raise Problem(f"{name}: the data fills {len(rows)} rows of {cfg.seq_len} tokens, less than one batch of "
                      f"{cfg.batch_size}; give more data, or a smaller --batch_size or --seq_len")
    net.train()
    net.checkpointing = cfg.checkpointing
    net.set_fused(cfg.fused)
    optimizer = make_optimizer(net, cfg)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines()[:start] if log.exists() else []  # one a step; what follows is done again
    log.write_text("".join(line + "\n" for line in lines))
    micro = cfg.micro_batch or cfg.batch_size
    losses, used, seen, saved_at = [], 0.0, 0, time.time()

    def save(step: int, finished: bool) -> None:
        metrics.flush()
        model.save(folder, net, {**meta, "step": step, "finished": finished, "loss": losses[-1] if losses else None},
                   tokenizer.path, optimizer.state_dict() if not finished else None)

    with StopSignal() as stop, open(log, "a") as metrics, \
            tqdm(total=cfg.steps, initial=start, desc=name, dynamic_ncols=True, mininterval=0.5) as bar:
        for step in range(start, cfg.steps):
            began = time.perf_counter()
            batch = rows.batch(step, cfg.batch_size)
            parts = [tuple(None if t is None else t[i:i + micro].to(machine.device) for t in batch)
                     for i in range(0, cfg.batch_size, micro)]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            loss = loss_backward(net, parts, machine)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip).item()
            if not math.isfinite(loss + norm):  # before the update: the weights are still good
                save(step, False)
                raise Problem(f"{name}: loss {loss}, gradient norm {norm} at step {step}; the weights before it are in "
                              f"{folder}. Try a smaller --learning_rate")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            elapsed = time.perf_counter() - began
            used, seen = used + elapsed, seen + batch[0].numel()
            losses.append(loss)
            work = flops(net, batch[0].numel(), int((batch[1] != data.IGNORE).sum()), cfg.seq_len)
            metrics.write(json.dumps(dict(step=step, loss=round(loss, 5), lr=group["lr"], norm=round(norm, 4),
                                          tokens_per_s=round(batch[0].numel() / elapsed))) + "\n")
            bar.update()
            bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}, {seen / used / 1e3:.1f}k tok/s, "
                                f"{100 * work / elapsed / machine.peak:.0f}% of peak", refresh=False)
            if stop.caught:
                save(step + 1, step + 1 == cfg.steps)
                raise Stopped(f"stopped after step {step + 1} of {cfg.steps}; saved in {folder}")
            if time.time() - saved_at > 60 * cfg.save_minutes:
                save(step + 1, False)
                saved_at = time.time()
        save(cfg.steps, True)
    net.eval()
    return float(np.mean(losses[-max(1, cfg.steps // 10):])) if losses else meta.get("loss", float("nan"))


# -- one stage: a folder that is trained once, resumed when it was interrupted -------------------------------

# What must be the same for a run to be "the same run". Speed and memory options may change between two runs.
SETTINGS = ("steps", "seq_len", "batch_size", "learning_rate", "warmup", "min_lr", "weight_decay", "beta2", "clip", "seed")


def run_stage(cfg: SFTConfig, name: str, machine: Machine, rows: data.Rows, tokenizer: data.Tokenizer, template: str,
              source: str, parent: str = "", shape: Optional[dict] = None) -> model.LLaMA:
    """Trains cfg.out/name, from the checkpoint `parent` or from random weights of `shape`. Returns the model."""
    folder = Path(cfg.out) / name
    if not cfg.learning_rate:
        large = cfg.preset not in ("toy", "small")
        cfg = replace(cfg, learning_rate=2e-5 if large else 5e-4)
    settings = {key: getattr(cfg, key) for key in SETTINGS}
    settings.update(template=template, data=source, parent=parent and str(model.find(parent)))
    meta = dict(stage=name, template=template, parent=settings["parent"], settings=settings)
    start, state = 0, None
    if cfg.fresh or not (folder / "latest").exists():
        if parent:
            net = adopt(parent, tokenizer)
        else:
            torch.manual_seed(cfg.seed)
            net = model.LLaMA(model.LLaMAConfig(**{**shape, "vocab_size": tokenizer.vocab_size,
                                                   "max_seq_len": max(cfg.seq_len, shape.get("max_seq_len", 2048))}))
        for old in folder.glob("step-*"):
            shutil.rmtree(old)
    else:
        net, _, old = model.load(folder)
        for key, value in settings.items():
            if old["settings"].get(key) != value:
                raise Problem(f"{folder} was trained with another {key} ({old['settings'].get(key)}, now {value}); "
                              "choose another --out, or --fresh to train it again")
        if old["finished"]:
            print(f"{name}: {folder} is trained already ({old['step']} steps); --fresh trains it again")
            return net.to(machine.device).eval()
        start, state = old["step"], model.read(model.find(folder) / "optim.pt")
        print(f"{name}: going on at step {start} of {cfg.steps}")
        for key, now in (("threads", torch.get_num_threads()), ("isa", torch.backends.cpu.get_cpu_capability()),
                         ("torch", torch.__version__)):
            if old[key] != now:
                print(f"  {key} was {old[key]}, is {now}: the result may differ in the last digits")
    if start == 0:
        what = f"from {settings['parent']}" if parent else "from random weights"
        print(f"\n{name}: {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters {what}; {cfg.steps} steps of "
              f"{cfg.batch_size} x {cfg.seq_len} tokens, {len(rows)} rows, learning rate {cfg.learning_rate:g}")
    net = net.to(machine.device)
    train(net, rows, cfg, machine, folder, name, meta, tokenizer, start, state)
    return net


def adopt(parent: str, tokenizer: data.Tokenizer) -> model.LLaMA:
    """The model to fine-tune; its tokenizer must be the one the data were encoded with."""
    net, path, _ = model.load(parent)
    if path.read_bytes() != tokenizer.path.read_bytes():
        raise Problem(f"{parent} has another tokenizer than {tokenizer.path}; leave --tokenizer out to use its own")
    if tokenizer.vocab_size > net.config.vocab_size:
        raise Problem(f"the tokenizer has {tokenizer.vocab_size} pieces, the model of {parent} only "
                      f"{net.config.vocab_size} rows")
    return net


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


@torch.inference_mode()
def validate(net: model.LLaMA, rows: data.Rows, machine: Machine) -> float:
    """Sum of nats over every supervised token of the rows."""
    total = 0.0
    for at in range(0, len(rows), 32):
        tokens, labels, segments = (p if p is None else torch.from_numpy(p[at:at + 32].astype(np.int64)).to(machine.device)
                                    for p in (rows.tokens, rows.labels, rows.segments))
        with machine.autocast():
            total += net.nll(tokens, labels, segments=segments)[0].item()
    return total


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
        tokenizer = data.train_tokenizer(learn[:10000], cfg.vocab_size, Path(cfg.out) / "data" / f"{name}.model")
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
    tokenizer = tokenizer or data.Tokenizer(model.find(parent) / "tokenizer.model")
    template = cfg.template or data.default_template(path)
    if parent:
        room = json.loads((model.find(parent) / "meta.json").read_text())["config"]["max_seq_len"]
        if cfg.seq_len > room:
            raise Problem(f"--seq_len={cfg.seq_len} is more than the {room} positions of {parent}")
    rows = conversation_rows(path, template, tokenizer, cfg)
    if not cfg.steps:  # small files need more than a few passes to move a toy model at all
        cfg = replace(cfg, steps=max(200 if cfg.preset == "toy" else 1, round(cfg.epochs * len(rows) / cfg.batch_size)))
    return run_stage(cfg, name, machine, rows, tokenizer, template, data.digest(path), parent, shape)


# -- your own file -------------------------------------------------------------------------------------------

def own_data(cfg: SFTConfig, machine: Machine) -> dict:
    """--data alone: what the file is decides what happens, and the choice is printed."""
    name, base = Path(cfg.data).stem.split(".")[0], Path(cfg.out) / "base"
    kind = data.kind_of(cfg.data)
    if kind == "text":
        if cfg.stage == "sft":
            raise Problem(f"{cfg.data} is plain text; --stage=sft needs conversations (ShareGPT or Alpaca format)")
        tokenizer = data.find_tokenizer(cfg.tokenizer) if cfg.tokenizer else None
        print(f"{cfg.data} is plain text: pre-training a {cfg.preset} model on it"
              + ("" if tokenizer else f", with a tokenizer of {cfg.vocab_size} pieces trained on it"))
        pretrain(cfg, name, machine, cfg.data, tokenizer)
        return dict(folder=str(Path(cfg.out) / name))
    if cfg.stage == "pretrain":
        raise Problem(f"{cfg.data} holds conversations ({kind}); --stage=pretrain needs plain text")
    template = cfg.template or data.default_template(cfg.data)
    if cfg.init:
        print(f"{cfg.data} is {kind}: fine-tuning {cfg.init}, template {template}")
        fine_tune(cfg, name, machine, cfg.data, cfg.init)
        return dict(folder=str(Path(cfg.out) / name))
    texts = lambda: (t.text for c in data.stream_conversations(cfg.data, data.Report()) for t in c.turns)
    if (base / "latest").exists():
        tokenizer, sample = data.find_tokenizer(str(base)), "\n".join(itertools.islice(texts(), 200))
        density = len(sample) / len(tokenizer.encode(sample))
        if density > 1.5:
            print(f"{cfg.data} is {kind}: fine-tuning {base} (its tokenizer gives {density:.1f} characters per token), "
                  f"template {template}")
            fine_tune(cfg, name, machine, cfg.data, str(base))
            return dict(folder=str(Path(cfg.out) / name))
        why = f"the tokenizer of {base} does not know this language ({density:.1f} characters per token)"
    else:
        why = f"there is no base model in {base}"
    print(f"{cfg.data} is {kind}; {why}: training a tokenizer of at most {cfg.vocab_size} pieces and a small base on its "
          f"own text first, template {template}")
    text = Path(cfg.out) / "data" / f"{name}.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("\n\n".join(texts()))
    pretrain(replace(cfg, learning_rate=0.0, steps=cfg.steps or 400), name + "-base", machine, text)
    fine_tune(cfg, name, machine, cfg.data, str(Path(cfg.out) / (name + "-base")))
    return dict(folder=str(Path(cfg.out) / name))


# -- the toy chain -------------------------------------------------------------------------------------------

TOY = dict(documents=40000, instructions=14000, conversations=8000, base=800, alpaca=250, vicuna=750, questions=100)
FAST = dict(documents=20000, instructions=6000, conversations=3000, base=200, alpaca=80, vicuna=120, questions=30)


def write_toy_data(folder: Path, sizes: dict, seed: int) -> dict[str, Path]:
    """The toy world in the public formats: JSON lines with "text", Alpaca JSON, ShareGPT JSON. Written once."""
    paths = {name: folder / file for name, file in
             dict(base="pretrain.jsonl", alpaca="alpaca.json", vicuna="sharegpt.json").items()}
    if not all(p.exists() for p in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(seed)
        documents = (json.dumps(dict(text=toy.document(rng))) for _ in range(sizes["documents"]))
        paths["base"].write_text("\n".join(documents) + "\n")
        paths["alpaca"].write_text(json.dumps([toy.instruction(rng) for _ in range(sizes["instructions"])], indent=0))
        conversations = [dict(id=f"toy_{i}", **toy.conversation(rng)) for i in range(sizes["conversations"])]
        paths["vicuna"].write_text(json.dumps(conversations, indent=0))
    return paths


def model_player(net: model.LLaMA, tokenizer: data.Tokenizer, template: str, shots: str = ""):
    """A player answers test items: items -> (replies, ended by itself). A base model sees plain text and is cut at
    its first newline; `shots` are solved examples put before the question."""
    def play(items: list) -> tuple[list[str], list[bool]]:
        conversations = []
        for item in items:
            turns = [data.Turn("user" if role == "user" else "assistant", text) for role, text in item.turns]
            if template == "plain":
                turns = [data.Turn("user", shots + "\n".join(t.text for t in turns) + "\n")]
            conversations.append(data.Conversation(turns))
        replies, ended = data.chat(net, tokenizer, template, conversations, max_new_tokens=64, batch=150)
        return [r.strip().split("\n")[0] for r in replies] if template == "plain" else replies, ended
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
    def words(text: str) -> set:
        return set(text.lower().replace(",", " ").replace(".", " ").replace("?", " ").replace(":", " ").split())
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
    """Share of right answers, table[row][player]; and for each player its replies, by row."""
    table, said = {}, {}
    for split in rows:
        items = toy.test_set(split, n)
        for name, play in tqdm(players.items(), desc=f"examining: {rows[split]}", leave=False):
            replies, ended = play(items)
            right = [toy.grade(i.question, r) == 1 for i, r in zip(items, replies)]
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
    stage = lambda name: replace(cfg, steps=cfg.steps or sizes[name])
    base = pretrain(stage("base"), "base", machine, paths["base"])
    tokenizer = data.Tokenizer(model.find(out / "base") / "tokenizer.model")
    alpaca = fine_tune(stage("alpaca"), "alpaca", machine, paths["alpaca"], str(out / "base"))
    vicuna = fine_tune(stage("vicuna"), "vicuna", machine, paths["vicuna"], str(out / "base"))
    unread = fine_tune(stage("vicuna"), "control", machine, paths["vicuna"], shape=shape, tokenizer=tokenizer)

    records = json.loads(paths["alpaca"].read_text())
    shots = "".join(f"{(r['input'] + ' ' + r['instruction']).strip()}\n{r['output']}\n\n" for r in records[:4])
    vicuna_player = model_player(vicuna, tokenizer, "vicuna_v1.1")
    players = {"base": model_player(base, tokenizer, "plain"),
               "few-shot": model_player(base, tokenizer, "plain", shots),
               "Alpaca": model_player(alpaca, tokenizer, "alpaca"),
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
    print(f"{100 * stops:.1f}% of Vicuna's replies end by themselves; {100 * copied:.0f}% of its stories and roles stand "
          f"word for word in the training data; {sizes['questions']} questions a row")
    if cfg.full:
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
        pyplot.plot(np.arange(len(loss))[width - 1:], np.convolve(loss, np.ones(width) / width, "valid"), label=log.parent.name)
    pyplot.xlabel("step"), pyplot.ylabel("loss, nats per token"), pyplot.legend(), pyplot.grid(alpha=0.3)
    pyplot.savefig(out / "loss.png", dpi=120)
    pyplot.close()
    print(f"loss curves: {out / 'loss.png'}")


STARTED = time.time()


def main(cfg: SFTConfig) -> dict:
    print(describe(cfg))
    machine = choose_machine(cfg)
    try:
        if cfg.data:
            return own_data(cfg, machine)
        if cfg.stage != "all":
            raise Problem(f"--stage={cfg.stage} needs --data=FILE")
        return toy_chain(cfg, machine)
    except Stopped as stopped:
        print(f"\n{stopped}. To go on: python {' '.join(sys.argv) if sys.argv[0].endswith('.py') else 'train_sft.py'}")
        raise KeyboardInterrupt from None


if __name__ == "__main__":
    run(main, SFTConfig)
