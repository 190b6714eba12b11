"""Processes and threads: who speaks, how several processes are started, how many threads each has.

Nothing here imports torch before it is needed: the rank is read from the environment.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

_GRACE = 30.0  # seconds that the others get to save when one process has failed


def is_main_process() -> bool:
    """Whether this process speaks: rank 0 of several, or the only one."""
    return rank() == 0


def rank() -> int:
    """Number of this process among all."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def thread_count() -> int:
    """Returns the threads of this process: ``$CDISTILL_THREADS``, or its share of the cores that it may use."""
    if chosen := os.environ.get("CDISTILL_THREADS"):
        return max(1, int(chosen))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def calm_threads() -> None:
    """Makes waiting OpenMP threads sleep soon; must run before torch is imported.

    By default they spin for milliseconds: another busy process on the same cores then slows a small network's training
    several times over, not by its share. An idle machine loses nothing. The user's own settings come first.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def set_threads() -> None:
    """Sets torch's threads; accelerate's launcher would leave 1, and a change alters the last bits of gradients."""
    import torch

    torch.set_num_threads(thread_count())


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs this program again in `processes` processes on this machine, with torchrun's environment.

    Signals are passed on, so that every process saves before it ends; when one fails, the others are told to stop.

    Args:
        processes: How many, at least 2.
        arguments: Command line without the program.

    Returns:
        The first failing process's exit code, or 0.
    """
    command = [sys.executable, str(Path(__file__).parent), *arguments]
    common = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _free_port(),
    }
    children = []
    for rank in range(processes):
        variables = {**common, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        children.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def forward(number: int, frame: FrameType | None) -> None:
        _send(children, number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, forward)
    return _wait(children)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; after a failure tells the others to stop, and kills them if they do not."""
    failed, deadline = 0, float("inf")
    while any(child.poll() is None for child in children):
        codes = [child.returncode for child in children if child.returncode]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + _GRACE
            _send(children, signal.SIGTERM)
        if time.monotonic() > deadline:
            _send(children, signal.SIGKILL)
        time.sleep(0.05)
    failed = failed or next((child.returncode for child in children if child.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def _send(children: list[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
