"""Unfinished statistics: what an interrupted estimation leaves behind and goes on from."""

import glob
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.storage.checkpoints import load_tensors, save_tensors

_KIND = "unfinished statistics"
_LAYOUT = 1  # to be raised whenever the same identity comes to mean other samples or sums
_SAVE_EVERY = 20.0  # seconds of work that a kill -9 can lose


@dataclass
class Position:
    """How far the collection has come in one process.

    Attributes:
        sums: Of all processes, of each finished round (R, G, n, k), float64.
        ends: Samples after each finished round.
        stops: The last round of each noise level (n,), int64; -1 while it goes on.
        current: Of this process, of the round in progress (G, n, k), float64.
        chunk: The chunk of this process in progress.
        level: How many noise levels of that chunk are finished.
        pairs: How many (sample, timestep) pairs of the round in progress this process has finished.
    """

    sums: Tensor
    ends: list[int]
    stops: Tensor
    current: Tensor
    chunk: int = 0
    level: int = 0
    pairs: int = 0

    @classmethod
    def fresh(cls, groups: int, levels: int, scalars: int) -> "Position":
        """Returns the start."""
        empty = torch.zeros(0, groups, levels, scalars, dtype=torch.float64)
        stops = torch.full((levels,), -1, dtype=torch.int64)
        return cls(empty, [], stops, torch.zeros(groups, levels, scalars, dtype=torch.float64))

    def active(self) -> list[int]:
        """Returns the noise levels that go on."""
        return (self.stops < 0).nonzero()[:, 0].tolist()

    def close_round(self, total: Tensor, end: int) -> None:
        """Ends a round in which all processes together summed `total` (G, n, k), up to sample `end`."""
        self.sums = torch.cat([self.sums, total[None]])
        self.ends.append(end)
        self._start_round()

    def back_to(self, rounds: int) -> None:
        """Forgets what came after the first `rounds` rounds."""
        if len(self.ends) > rounds:
            self.stops = torch.where(self.stops >= rounds, -1, self.stops)
            self.sums, self.ends = self.sums[:rounds], self.ends[:rounds]
            self._start_round()

    def _start_round(self) -> None:
        self.current = torch.zeros_like(self.current)
        self.chunk = self.level = self.pairs = 0


class Part:
    """The file of a process's unfinished statistics, beside the file that it will become part of.

    Args:
        path: Of the file to be; None keeps nothing.
        identity: What the statistics depend on; a file of anything else is not gone on from.
        rank: Number of this process.
        world: Number of processes; other numbers divide the samples in another way.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], rank: int = 0, world: int = 1) -> None:
        self.path = None if path is None else path.with_name(f".{path.name}.part-{rank}-of-{world}")
        self.identity = identity
        self.world = world
        self._saved = time.monotonic()

    def load(self) -> Position | None:
        """Returns where to go on, None for the start: no file, a damaged one, or one of something else."""
        if self.path is None:
            return None
        try:
            tensors, header = load_tensors(self.path, _KIND)
        except (MissingAssetError, CorruptFileError):
            return None
        if header.get("identity") != self.identity or header.get("layout") != _LAYOUT:
            return None
        ends, place = tensors["ends"].tolist(), tensors["place"].tolist()
        return Position(tensors["sums"], ends, tensors["stops"], tensors["current"], *place)

    def finished_pairs(self, samples: int) -> int:
        """Returns how many of all (sample, timestep) pairs, `samples` at each noise level, need no more work."""
        position = self.load()
        if position is None:
            return 0
        stopped = int((position.stops >= 0).sum())
        before = position.ends[-1] if position.ends else 0
        return stopped * samples + (len(position.stops) - stopped) * before + position.pairs * self.world

    def save(self, position: Position) -> None:
        """Writes the file."""
        if self.path is not None:
            tensors = {
                "sums": position.sums,
                "ends": torch.tensor(position.ends, dtype=torch.int64),
                "stops": position.stops,
                "current": position.current,
                "place": torch.tensor([position.chunk, position.level, position.pairs]),
            }
            save_tensors(self.path, tensors, _KIND, {"identity": self.identity, "layout": _LAYOUT})
        self._saved = time.monotonic()

    def save_sometimes(self, position: Position) -> None:
        """Writes the file if the last time is long ago."""
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save(position)

    def remove(self) -> None:
        """Removes the file, and what other numbers of processes left, once the statistics are in their place."""
        if self.path is not None:
            name = self.path.name.rpartition("-of-")[0].rpartition("-")[0]
            for path in self.path.parent.glob(f"{glob.escape(name)}-*-of-*"):
                path.unlink(missing_ok=True)
