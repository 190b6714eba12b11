"""Images in memory; those that do not fit are decoded once into a file that is mapped into memory.

The file lies in the asset folder under the digest of the data, is written beside its place and put there whole, and is
used by every process and every later run. It may be removed whenever no run uses it.
"""

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from cdistill.errors import CdistillError, DiskFullError
from cdistill.formats.images import Pixels
from cdistill.runtime import signals
from cdistill.runtime.console import progress, say
from cdistill.runtime.processes import is_main_process, local_processes
from cdistill.storage.download import alone
from cdistill.storage.files import asset_folder, replacing

FEW = 4096  # images that are read too soon for a progress line
_VERSION = 1  # of the decoded files; another one where the same data decode to other pixels
_HEAD_START = 0.5  # seconds for the main process, which shows the progress
_CGROUPS = Path("/sys/fs/cgroup")
_COUNTERS = (  # of version 2 and 1: folder, limit, use, and of that the cached files that are given up when needed
    (".", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def hold_images(
    origin: Path, shape: tuple[int, ...], blocks: Callable[[], Iterator[Pixels]], digest: Callable[[], str]
) -> Tensor:
    """Returns images as a uint8 tensor, to be read only: in memory, or mapped from a file if they do not fit there.

    `origin` is where they come from, for messages; `blocks` yields them in order, (n, C, H, W) at a time; `digest`,
    a SHA-256 that stands for them, is computed only if they do not fit.

    Raises:
        DiskFullError: They fit neither in memory nor on the disk.
        StoppedError: A signal came.
        CdistillError: What `blocks` raises; nothing that is incomplete is left to be read.
    """
    if prod(shape) > memory_limit():
        return _map_images(origin, shape, blocks, asset_folder() / "decoded" / f"{digest()}-{_VERSION}.npy")
    whole, start = np.empty(shape, np.uint8), 0
    for block in _with_progress(origin, shape[0], blocks()):
        whole[start : start + len(block)] = block
        start += len(block)
    return torch.from_numpy(whole)


def memory_limit() -> float:
    """Returns how many bytes of images may be held in memory: half of what is free, divided among the processes."""
    return free_memory() / 2 / local_processes()


def free_memory() -> int:
    """Returns the bytes that a new program could use without swapping: the kernel's estimate, or all there is.

    What a container has left counts too.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_in_container()])


def check_memory(needed: int, what: str) -> None:
    """Raises CdistillError, which begins with `what`, unless `needed` bytes are free."""
    if needed > (free := free_memory()):
        raise CdistillError(f"{what}: needs {needed / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} GiB are free")


def _left_in_container() -> Iterator[int]:
    """Yields the limit less what is in use, where there is a limit."""
    for folder, limit, used, cached in _COUNTERS:
        place = _CGROUPS / folder
        with suppress(OSError, ValueError, KeyError):  # no container, or "max"
            counts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            in_use = int((place / used).read_text()) - int(counts[cached])
            yield max(0, int((place / limit).read_text()) - in_use)


def _with_progress(origin: Path, count: int, blocks: Iterator[Pixels]) -> Iterator[Pixels]:
    """Yields the blocks, shows how far they are, and stops on a signal."""
    if count <= FEW:
        yield from blocks
        return
    with progress(count, f"reading {origin.name}", "img") as advance:
        for block in blocks:
            signals.check("reading the data")
            yield block
            advance(len(block), "")


def _map_images(origin: Path, shape: tuple[int, ...], blocks: Callable[[], Iterator[Pixels]], path: Path) -> Tensor:
    pixels = _mapped(path, shape)
    if pixels is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        time.sleep(0 if is_main_process() else _HEAD_START)
        with alone(path):
            if (pixels := _mapped(path, shape)) is None:
                say(f"{origin}: {shape[0]:,} images do not fit in memory: decoded once into {path}")
                _write(path, shape, _with_progress(origin, shape[0], blocks()))
                pixels = np.load(path, mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors, and says so
        return torch.from_numpy(pixels)


def _mapped(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """Maps a file that was put there whole, under the digest of its data; None unless it has images of `shape`."""
    try:
        pixels = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    alike = pixels.shape == shape and pixels.dtype == np.uint8
    return pixels if alike and path.stat().st_size == pixels.offset + pixels.nbytes else None


def _write(path: Path, shape: tuple[int, ...], blocks: Iterator[Pixels]) -> None:
    """Writes a file in NumPy's format; plain writing, because a full disk kills a process that writes to a mapping."""
    for rest in path.parent.glob(f".tmp-*-{path.name}"):  # of a process that was killed
        rest.unlink(missing_ok=True)
    needed, free = prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise DiskFullError(
            f"{path}: {needed / 2**30:.1f} GiB to write, {free / 2**30:.1f} GiB free; free some room, or set "
            "$CDISTILL_ASSETS to a folder on a larger disk"
        )
    with replacing(path) as temporary, temporary.open("wb") as file:
        npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
