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
