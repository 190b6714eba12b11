"""Whether images fit in memory."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cdistill.errors import CdistillError
from cdistill.runtime.processes import local_processes

_CGROUPS = Path("/sys/fs/cgroup")
_COUNTERS = (  # of version 2 and 1: folder, limit, use, and of that the cached files that are given up when needed
    (".", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


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

    What a container has left counts too.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_in_container()])


def _left_in_container() -> Iterator[int]:
    """Yields the limit less what is in use, where there is a limit."""
    for folder, limit, used, cached in _COUNTERS:
        place = _CGROUPS / folder
        with suppress(OSError, ValueError, KeyError):  # no container, or "max"
            counts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            in_use = int((place / used).read_text()) - int(counts[cached])
            yield max(0, int((place / limit).read_text()) - in_use)
