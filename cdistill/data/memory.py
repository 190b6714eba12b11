"""Whether images fit in memory."""

import os
from pathlib import Path

from cdistill.errors import CdistillError
from cdistill.launch import local_processes

_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def memory_limit() -> float:
    """Returns how many bytes of images may be held in memory.

    ``$CDISTILL_DATA_MEMORY`` in GiB, or half of what is free, divided among the processes on this machine.

    Raises:
        CdistillError: The variable is no number.
    """
    text = os.environ.get("CDISTILL_DATA_MEMORY")
    if not text:
        return free_memory() / 2 / local_processes()
    try:
        limit = float(text)
    except ValueError:
        limit = -1
    if not limit >= 0:
        raise CdistillError(f"$CDISTILL_DATA_MEMORY: got {text!r}; needs a number of GiB, 0 or more")
    return limit * 2**30


def free_memory() -> int:
    """Returns the bytes that a new program could use without swapping: the kernel's estimate, or all there is.

    A container's own limit counts too.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(free, int(_CONTAINER.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return free
