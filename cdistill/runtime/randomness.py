"""Stateless randomness: every draw comes from a generator that is a pure function of what it is for.

Nothing has to be saved to resume, and no draw depends on the number of processes: each process draws for the
whole batch and takes its own part.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *index: int) -> int:
    """Returns 63 bits that depend on all arguments (SHA-256), the same on every machine.

    Torch's generator on a CPU keeps 32 of them: of 100,000 generators, one or two share their draws with another.
    """
    text = ":".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """Returns a fresh CPU generator for `purpose` at `index`, such as a step or the number of a chunk."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *index))


@lru_cache(maxsize=4)  # data and trajectories, at the turn of an epoch
def _epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Permutes an epoch; a million items take tens of milliseconds, and most calls stay within an epoch."""
    return torch.randperm(size, generator=generator(seed, "order", epoch))


def shuffled_indices(size: int, seed: int, start: int, count: int) -> Tensor:
    """Positions ``start .. start+count-1`` of an endless walk that visits each of `size` items once an epoch.

    Int64 (count,), in [0, size); the permutation of an epoch is a pure function of (seed, epoch).
    """
    parts = []
    while count > 0:
        epoch, offset = divmod(start, size)
        order = _epoch_order(size, seed, epoch)
        parts.append(order[offset : offset + count])
        start, count = start + len(parts[-1]), count - len(parts[-1])
    return torch.cat(parts)
