"""Bookkeeping for the training loop: signals, log, progress bar, checkpoints, and resuming."""

import contextlib
import fcntl
import json
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict
from tqdm import tqdm

import data
import model
from tools import checkpoint
from tools.config import Stopped, UserError, describe
from tools.machine import Machine, train_flops

# Settings that must not change when a run is resumed. Options that affect speed, memory, precision
# or the number of processes may.
SETTINGS = ("steps", "seq_len", "batch_size", "learning_rate", "warmup", "min_lr", "weight_decay",
            "optimizer", "beta2", "clip", "seed", "lora_rank")


# full (unsharded) state_dicts, gathered on rank 0's CPU
FULL_STATE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def language_model(net: torch.nn.Module) -> torch.nn.Module:
    """The LLaMA of a MiniGPT-4; any other network itself."""
    return getattr(net, "llama", net)


class Run:
    """One run of the loop: signals, log, progress bar, and checkpoints."""

    def __init__(self, net, optimizer, cfg, machine: Machine, folder: Path, name: str,
                 meta: dict, tokenizer: data.Tokenizer, start: int):
        self.net, self.optimizer, self.cfg, self.machine = net, optimizer, cfg, machine
        self.folder, self.name, self.meta, self.tokenizer = folder, name, meta, tokenizer
        self.start = start
        self.signal = None  # SIGINT or SIGTERM, once received
        self.stopping = self.saving = False  # what all processes have agreed on
        self.saved_at = self.step_began = time.perf_counter()
        self.seconds = 0.0  # of all steps, without saving

    def __enter__(self):
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.on_signal)
        writes = self.machine.rank == 0
        path = self.folder / "metrics.jsonl"
        # steps after the checkpoint will be redone
        lines = [line for line in read_metrics(path) if line["step"] < self.start]
        self.losses = [line["loss"] for line in lines]
        if writes:
            with data.atomic_write(path) as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self.metrics = open(path if writes else os.devnull, "a", encoding="utf-8")
        self.bar = tqdm(total=self.cfg.steps, initial=self.start, desc=self.name, mininterval=0.5,
                        dynamic_ncols=True, disable=not writes)
        self.step_began = time.perf_counter()
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.metrics.close()
        self.bar.close()
        if self.signal and kind is None:  # it came after the last step
            raise Stopped(f"{self.name} is trained and saved in {self.folder}")

    def on_signal(self, number, frame) -> None:
        # A second Ctrl-C exits at once; not under torchrun, where one Ctrl-C arrives twice.
        if self.signal and not dist.is_initialized():
            raise KeyboardInterrupt
        self.signal = number

    def sync(self, loss: float) -> float:
        """Sums the loss over all processes. They also agree here whether to stop (any of them got a
        signal) or to save (rank 0's timer), since they must do it together."""
        elapsed = time.perf_counter() - self.saved_at
        due = self.machine.rank == 0 and elapsed > 60 * self.cfg.save_minutes
        loss, signals, saving = self.machine.total(loss, bool(self.signal), due)
        self.stopping, self.saving = bool(signals), bool(saving)
        return loss

    def check_finite(self, step: int, loss: float, norm: float) -> None:
        """Saves the weights and raises UserError if the loss or the gradient is not finite."""
        if not math.isfinite(loss + norm):
            self.save(step)
            raise UserError(f"{self.name}: loss {loss}, gradient norm {norm} at step {step}; the "
                            f"weights before this step are in {self.folder}. Try a smaller "
                            "--learning_rate in another --out")

    def log(self, step: int, loss: float, norm: float, batch: tuple, noted: dict) -> None:
        now = time.perf_counter()
        seconds, self.step_began = now - self.step_began, now
        self.seconds += seconds
        self.losses.append(loss)
        tokens = self.cfg.batch_size * self.cfg.seq_len
        line = dict(step=step, loss=round(loss, 5), lr=self.optimizer.param_groups[0]["lr"],
                    norm=round(norm, 4), tokens_per_s=round(tokens / seconds), **noted)
        self.metrics.write(json.dumps(line) + "\n")
        self.bar.update()
        mean = np.mean(self.losses[-20:])
        speed = tokens * (step + 1 - self.start) / self.seconds / 1e3
        status = f"loss {mean:.3f}, {speed:.1f}k tok/s{self.utilization(batch, seconds)}"
        self.bar.set_postfix_str(status, refresh=False)

    def utilization(self, batch: tuple, seconds: float) -> str:
        """For the progress bar: the last step's FLOP/s in % of the measured peak. Empty for a
        network without a LLaMA."""
        llama = language_model(self.net)
        if not isinstance(llama, model.LLaMA):
            return ""
        tokens, labels, segments, *_ = batch
        supervised = model.count_targets(labels, segments)
        # frozen weights need no gradients of their own, but pass them on
        frozen = not llama.layers[0].attention.wq.weight.requires_grad
        flops = train_flops(llama.config, tokens.numel(), supervised, self.cfg.seq_len,
                            passes=2 if frozen else 3)
        return f", {100 * flops / seconds / self.machine.peak_flops:.0f}% of peak"

    def save_if_due(self, step: int) -> None:
        """Saves after the first step (so that a full disk fails early), by the timer, on a signal,
        and at the end."""
        last = step + 1 == self.cfg.steps
        if step == self.start or self.saving or self.stopping or last:
            self.save(step + 1, finished=last)
        if self.stopping:
            raise Stopped(f"stopped after step {step + 1} of {self.cfg.steps}; saved in "
                          f"{self.folder}")

    def save(self, step: int, finished: bool = False) -> None:
        """All processes gather weights and optimizer state; rank 0 writes them."""
        weights = state_dict.get_model_state_dict(self.net, options=FULL_STATE)
        optimizer = None
        if not finished:
            optimizer = state_dict.get_optimizer_state_dict(self.net, self.optimizer,
                                                            options=FULL_STATE)
        if self.machine.rank == 0:
            self.metrics.flush()
            adapters = None
            if self.cfg.lora_rank:
                weights, adapters = model.merge_lora(weights)
            else:  # frozen weights are stored in the checkpoint that they came from
                frozen = {n for n, p in self.net.named_parameters() if not p.requires_grad}
                weights = {n: w for n, w in weights.items() if n not in frozen}
            loss = self.losses[-1] if self.losses else None
            meta = {**self.meta, "step": step, "finished": finished, "loss": loss}
            checkpoint.save(self.folder, language_model(self.net), meta, self.tokenizer.path,
                            optimizer, weights, adapters)
        self.machine.barrier()
        self.saved_at = self.step_began = time.perf_counter()  # saving is not part of a step


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, one for each step, without those that a crash has damaged."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):  # not JSON
            match json.loads(line.strip("\0")):
                case {"step": int(), "loss": float()} as numbers:
                    lines.append(numbers)
    return lines


@contextlib.contextmanager
def lock(folder, machine: Machine):
    """Keeps a second command out of a folder, where it would replace what the first one reads. The
    system frees the lock when its process (rank 0) ends, however it ends."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "a+", encoding="utf-8") as file:
        refused = machine.rank == 0 and not try_lock(file)
        if machine.total(refused)[0]:
            file.seek(0)
            raise UserError(f"{folder} is in use by process {file.read()}; wait until it ends, or "
                            "choose another --out")
        if machine.rank == 0:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def try_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


# -- resuming -------------------------------------------------------------------------------------

class Resume(NamedTuple):
    """What a checkpoint of this run holds."""
    net: torch.nn.Module  # with LoRA adapters merged into it
    adapters: dict  # the same adapters by themselves, to train them further
    step: int
    optimizer: dict | None  # None: the run is finished
    meta: dict


def find_resume(folder: Path, settings: dict, machine: Machine, network) -> Resume | None:
    """The newest undamaged checkpoint of the run; None if the folder has no checkpoint. Raises
    UserError if it belongs to a run with other settings, or if all are damaged."""
    if not checkpoint.steps(folder):
        return None
    for path in checkpoint.history(folder):  # newest first
        try:
            meta = checkpoint.read_meta(path)
            check_settings(folder, meta.get("settings", {}), settings)
            return load_resume(path, meta, machine, network)
        except OtherSettings:
            raise
        except (UserError, OSError) as error:
            print(f"skipping {path}: {error}")
    raise UserError(f"every checkpoint in {folder} is damaged; use --resume=never to start over")


class OtherSettings(UserError):
    """The folder holds a run with other settings."""


def check_settings(folder: Path, before: dict, now: dict) -> None:
    for key, value in now.items():
        if f"{key}_crc" in now:  # a path: what it holds is compared, not how it is written
            continue
        if before.get(key) != value:
            raise OtherSettings(
                f"{folder} was trained with other settings: {key} was {before.get(key)}, is now "
                f"{value}. Choose another --out, or --resume=never to train it again")


def load_resume(path: Path, meta: dict, machine: Machine, network) -> Resume:
    net = checkpoint.load(path, machine.sharded, network)[0]
    optimizer, adapters = None, {}
    if not meta["finished"]:
        optimizer = checkpoint.read(path / "optim.pt", mmap=machine.sharded)
    if meta["settings"].get("lora_rank"):
        adapters = checkpoint.read(path / "lora.pt")
    return Resume(net, adapters, meta["step"], optimizer, meta)


# -- what the user is told ------------------------------------------------------------------------

def announce(name: str, cfg, net, parent: str, rows) -> None:
    """Prints the model, its data and the settings."""
    total = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    words = f"{total / 1e6:.1f} M parameters"
    if trained < total:
        words += f", {trained / 1e6:.2f} M of them trainable"
    if parent:
        words += f", from {parent}"
    n_rows = f"{len(rows)} rows" if len(rows) < 2 ** 31 else "new rows in every step"
    print(f"{name}: {words}; {n_rows}")
    print(f"  {describe(cfg, SETTINGS)}")


def announce_resume(name: str, cfg, resume: Resume, machine: Machine) -> None:
    print(f"{name}: resuming at step {resume.step} of {cfg.steps}")
    now = {**checkpoint.environment(), "processes": machine.world}
    for key, value in now.items():
        if resume.meta.get(key) != value:
            print(f"  {key} was {resume.meta.get(key)}, is now {value}: results may not be "
                  "bit-identical")


@contextlib.contextmanager
def explain_errors(cfg, machine: Machine, folder: Path):
    """Turns out-of-memory and lost-process errors into one-line messages."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if out_of_memory or re.search("can't allocate memory|out of memory", text):
            micro = cfg.micro_batch or cfg.batch_size // machine.world
            advice = []
            if micro > 1:
                advice.append(f"--micro_batch={micro // 2}")
            if not cfg.checkpointing:
                advice.append("--checkpointing")
            if cfg.init and not cfg.lora_rank:
                advice.append("--lora_rank=8")
            options = ", ".join([*advice, "a smaller --seq_len"])
            raise UserError(f"out of memory. Try {options}; `python -m tools.estimate --preset=7B "
                            "--gpus=8` estimates what a model needs") from None
        if machine.sharded and (isinstance(error, dist.DistError) or re.search("gloo|NCCL", text)):
            reason = text.split(". ")[0]
            raise UserError(f"rank {machine.rank} lost another process ({reason}); the checkpoints "
                            f"in {folder} are intact: run the same command again") from error
        raise


class Plan:
    """Prints each stage of a command as it begins, with an estimate of the time left.

    work: the relative cost of each stage. seconds: a first guess of the time per unit of work,
    which every stage corrects.
    """

    def __init__(self, work: dict[str, float], seconds: float):
        self.work, self.seconds = work, seconds
        self.current, self.began = None, 0.0

    def begin(self, name: str, what: str) -> None:
        if self.current:
            took = time.time() - self.began
            if took > 1:  # else it was skipped, which says nothing about speed
                self.seconds = took / self.work[self.current]
        names = list(self.work)
        i = names.index(name)
        rest = sum(self.work[n] for n in names[i:])
        minutes = max(0.1, rest * self.seconds / 60)
        number = f"stage {i + 1} of {len(names)}"
        print(f"\n{number}: {what}; about {minutes:.1f} minutes left")
        self.current, self.began = name, time.time()
