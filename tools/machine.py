"""The machine: threads, device, precision, and the processes of torchrun."""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tools.config import UserError


@dataclass
class Machine:
    device: str
    dtype: torch.dtype
    peak_flops: float  # FLOP/s of a large matrix product, measured
    rank: int = 0  # rank of this process
    world: int = 1  # number of processes
    sharded: bool = False  # started by torchrun: FSDP

    def autocast(self):
        if self.dtype == torch.float32 or self.sharded:  # FSDP casts by its own policy
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)

    def barrier(self) -> None:
        """Waits until all processes are here."""
        if self.sharded:
            dist.barrier()

    def total(self, *values: float) -> list[float]:
        """The sum of each value over all processes, the same on each of them."""
        if not self.sharded:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()


def choose_device(device: str) -> str:
    """The best device for "auto". Raises UserError for one that is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={device} cannot be used: {reason}") from None
    return device


def use_threads(threads: int, device: str) -> None:
    """Computes with this many CPU threads. 0 leaves the number to torch, and prints advice if other
    programs use the cores: a thread that waits for its turn keeps all others waiting."""
    if threads > os.cpu_count():  # torch crashes with very many
        raise UserError(f"--threads={threads}: this machine has {os.cpu_count()} cores")
    if threads:
        torch.set_num_threads(threads)
        return
    threads = torch.get_num_threads()  # one under torchrun
    if threads == 1 or choose_device(device) != "cpu":
        return
    cores = free_cores()
    if cores < 0.9 * threads:
        advice = f"this machine is busy: --threads={max(1, int(cores))} would be faster"
        print(advice, file=sys.stderr)


def free_cores(seconds: float = 0.2) -> float:
    """The number of cores that this process gets when all of its threads compute."""
    x = torch.rand(1 << 22)
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        x.cos_()
    return (time.process_time() - used) / (time.perf_counter() - began)


def choose_machine(device: str, dtype: str, patience: float = 30.0) -> Machine:
    """Chooses device and precision (either may be "auto") and prints why. Joins the processes of
    torchrun, which wait `patience` minutes for each other."""
    sharded = "TORCHELASTIC_RUN_ID" in os.environ
    if ":" in device:
        raise UserError(f"--device={device}: choose a GPU with CUDA_VISIBLE_DEVICES, not here")
    if sharded and device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = choose_device(device)
    rank, world = 0, 1
    if sharded:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=patience))
        if rank > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # only rank 0 prints
    dtype, reason = choose_dtype(dtype, device)
    machine = Machine(device, dtype, measure_peak(device, dtype), rank, world, sharded)
    processes = f"; {world} processes (FSDP)" if sharded else ""
    print(f"{str(dtype)[6:]} on {device}: {reason}; {torch.get_num_threads()} threads; matrix "
          f"products reach {machine.peak_flops / 1e9:.0f} GFLOP/s{processes}")
    return machine


def choose_dtype(requested: str, device: str) -> tuple[torch.dtype, str]:
    """The precision to compute in, and the reason."""
    if requested != "auto":
        return getattr(torch, requested), "as requested"
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, f"{torch.cuda.get_device_name()} has fast bfloat16"
    if device == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability():
        for unit, check in (("AMX", "_is_amx_tile_supported"),
                            ("AVX512-BF16", "_is_avx512_bf16_supported")):
            if getattr(torch.cpu, check, lambda: False)():
                return torch.bfloat16, f"this CPU has {unit}"
    return torch.float32, f"this {device} device has no fast bfloat16"


def measure_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product that is large enough to saturate the device."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(2 * n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return 2 * (2 * n) * n * n / sorted(times)[3]


def train_flops(c, tokens: int, supervised: int, seq_len: int, passes: int = 3) -> float:
    """FLOPs of a training step of a LLaMA with config c on `tokens` tokens, of which `supervised`
    have logits.

    A pass through the blocks takes 2 FLOPs per weight and token. passes: 3 for forward and
    backward, 2 if the weights are frozen. The products QK^T and AV are halved, because attention is
    causal.
    """
    projections = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)
    per_token = projections + 3 * c.dim * c.hidden_dim + seq_len * c.dim
    return 2 * passes * c.n_layers * per_token * tokens + 6 * c.vocab_size * c.dim * supervised
