"""How long a part of the step takes on the device, without waiting for it."""

import time

import torch


class Stopwatch:
    """Adds up the time between entering and leaving; on a GPU by events, which the host reads later.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.total = self.begun = 0.0

    def __enter__(self) -> None:
        if self.cuda:
            self.spans.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.spans[-1][0].record()
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.spans[-1][1].record()
        else:
            self.total += time.perf_counter() - self.begun

    def seconds(self) -> float:
        """Returns the seconds since it was last asked; the device must have finished, as after reading a loss."""
        found: float = self.total + sum(first.elapsed_time(last) for first, last in self.spans) / 1000
        self.total = 0.0
        self.spans.clear()
        return found
