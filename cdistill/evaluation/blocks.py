"""Going through large sets of vectors in blocks, so that memory stays bounded and a signal is heard."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cdistill.runtime import signals as stopping
from cdistill.runtime.console import progress

AT_ONCE = 1024  # vectors; a block of pairs takes 8 MB in float64
_LONG = 16 * AT_ONCE  # vectors that are worth a progress bar


def blocks(vectors: Tensor, device: torch.device, title: str = "") -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of `vectors` (n, d), which may be on the CPU, as float64 on `device`, and where they stand.

    Args:
        vectors: (n, d).
        device: Where they are needed.
        title: What is being done, for the bar of an outer loop.

    Raises:
        StoppedError: A signal came, and the loop is an outer one.
    """
    if not title or len(vectors) < _LONG:
        yield from _blocks(vectors, device)
        return
    with progress(len(vectors), title, "img") as advance:
        for place, part in _blocks(vectors, device):
            stopping.check("evaluation")
            yield place, part
            advance(len(part), "")


def _blocks(vectors: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(vectors), AT_ONCE):
        place = slice(start, min(start + AT_ONCE, len(vectors)))
        yield place, vectors[place].to(device).double()
