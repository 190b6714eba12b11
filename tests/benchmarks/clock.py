"""How long something takes, on a CPU or a GPU."""

import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def both_seconds(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Returns the seconds on the wall, and those that all threads of this process worked: who shares the cores makes
    the first longer, but hardly the second.
    """
    start = time.process_time()
    wall = seconds(work, device)
    return wall, time.process_time() - start
