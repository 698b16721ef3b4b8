"""Starts a function in several processes that can reach each other, as torchrun would."""

import multiprocessing
import os
import socket
import sys
import time

import torch

from tools import config, machine

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    # One server imports these once, and forks. torch._dynamo alone takes longer than most tests:
    # FSDP and the optimizers would import it in each process.
    CONTEXT.set_forkserver_preload(["torch._dynamo", "pytest", "train_vlm"])
KILLED = "killed"


class Ranks:
    """Starts `function(*arguments)` in `world` processes; `answers` waits for what they return or
    raise."""

    def __init__(self, world: int, function, *arguments):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        self.processes, self.pipes = [], []
        for rank in range(world):
            here, there = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=member, daemon=True,
                                      args=(rank, world, port, function, arguments, there))
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            self.processes.append(process)
            self.pipes.append(here)

    def answers(self) -> list:
        """By rank; KILLED for one that died without an answer."""
        end, answers = time.time() + 120, []
        for pipe in self.pipes:
            assert pipe.poll(max(0.0, end - time.time())), "the processes hang"
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append(KILLED)
        for process in self.processes:
            process.join(10)
        return answers


def member(rank, world, port, function, arguments, pipe) -> None:
    torch.set_num_threads(1)
    machine.measure_peak = lambda *_: 1e11
    if world > 1:  # what torchrun sets
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                          MASTER_ADDR="localhost", MASTER_PORT=str(port),
                          TORCHELASTIC_RUN_ID="test")
    try:
        pipe.send(function(*arguments))
    except (config.UserError, KeyboardInterrupt, OSError) as error:
        pipe.send(error)
