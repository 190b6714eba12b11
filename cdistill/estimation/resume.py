"""The unfinished sums of an interrupted estimation, which the same command resumes from."""

import glob
import time
from pathlib import Path
from typing import Any

import torch

from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.storage.checkpoints import load_tensors, save_tensors

_KIND = "unfinished statistics"
_LAYOUT = 1  # to be raised whenever the same identity comes to mean other samples or sums
_SAVE_EVERY = 20.0  # seconds of work that a kill -9 can lose


class Progress:
    """How far the collection has come in one process, loaded from its file if there is one.

    The file lies beside the coefficient file to be, `path`; one that is damaged, of another `identity` or of another
    number of processes, which divide the samples in another way, is ignored. `shape` is (G, n, k): groups of samples,
    noise levels and scalars.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        path: Path | None = None,
        identity: dict[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.file = None if path is None else path.with_name(f".{path.name}.part-{rank}-of-{world}")
        self._header = {"identity": identity or {}, "layout": _LAYOUT}
        self._world, self._saved = world, time.monotonic()
        self.sums = torch.zeros(0, *shape, dtype=torch.float64)  # of all processes, of each finished round (R, G, n, k)
        self.ends: list[int] = []  # samples after each finished round
        self.stops = torch.full(shape[1:2], -1, dtype=torch.int64)  # last round of each level; -1 while it needs more
        self.current = torch.zeros(shape, dtype=torch.float64)  # of this process, of the round in progress
        # This process is in this chunk, has finished so many of its levels and so many (sample, timestep) pairs.
        self.chunk = self.level = self.pairs = 0
        self._load()

    def _load(self) -> None:
        if self.file is None:
            return
        try:
            tensors, header = load_tensors(self.file, _KIND)
        except (MissingAssetError, CorruptFileError):
            return
        if all(header.get(key) == value for key, value in self._header.items()):
            self.sums, self.stops, self.current = (tensors[name] for name in ("sums", "stops", "current"))
            self.ends = tensors["ends"].tolist()
            self.chunk, self.level, self.pairs = tensors["place"].tolist()

    def save(self) -> None:
        """Writes the file."""
        if self.file is not None:
            tensors = {
                "sums": self.sums,
                "ends": torch.tensor(self.ends, dtype=torch.int64),
                "stops": self.stops,
                "current": self.current,
                "place": torch.tensor([self.chunk, self.level, self.pairs]),
            }
            save_tensors(self.file, tensors, _KIND, self._header)
        self._saved = time.monotonic()

    def save_sometimes(self) -> None:
        """Writes the file if it was last written long ago."""
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def remove(self) -> None:
        """Removes the file, and those of other numbers of processes, once the estimate itself is written."""
        if self.file is not None:
            name = self.file.name.rpartition("-of-")[0].rpartition("-")[0]
            for path in self.file.parent.glob(f"{glob.escape(name)}-*-of-*"):
                path.unlink(missing_ok=True)

    def active(self) -> list[int]:
        """Returns the noise levels that need more samples."""
        return (self.stops < 0).nonzero()[:, 0].tolist()

    def finished_pairs(self, samples: int) -> int:
        """Returns how many of all (sample, timestep) pairs, `samples` at each noise level, need no more work."""
        stopped = int((self.stops >= 0).sum())
        before = self.ends[-1] if self.ends else 0
        return stopped * samples + (len(self.stops) - stopped) * before + self.pairs * self._world

    def close_round(self, total: torch.Tensor, end: int) -> None:
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
