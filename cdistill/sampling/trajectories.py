"""Trajectories of the teacher on disk: followed once from T to eps, read at random in every step of a training.

A store is a folder in the asset folder, named after what its numbers depend on: teacher, noise levels, solver,
classes, precision. It consists of shards of `SHARD` trajectories, safetensors files with a checksum, each written whole
or not at all; a store grows by shards and no shard ever changes. So any number of processes, machines and commands may
write one at the same time, each shard by whoever claims it first, and readers map the files into memory.

Images and vectors are stored as x_t / sqrt(t^2 + sigma_data^2), of unit variance at every level.
"""

import hashlib
import json
import mmap
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import CdistillError, CorruptFileError, DiskFullError, MismatchError, RecipeError
from cdistill.networks.denoiser import broadcast
from cdistill.runtime import signals
from cdistill.runtime.console import progress, say
from cdistill.runtime.devices import send
from cdistill.runtime.randomness import generator
from cdistill.sampling.drawing import Noise, stream
from cdistill.sampling.settings import TrajectoriesSection
from cdistill.sampling.solvers import heun_step, solve
from cdistill.schedule import RHO
from cdistill.storage.bounded import read_json
from cdistill.storage.checkpoints import load_tensors, save_tensors
from cdistill.storage.files import asset_folder, write_text
from cdistill.teachers import Teacher

SHARD = 256  # trajectories; a kill -9 loses at most those that a process is following
_KIND = "trajectories"
_FIRST_SEED = 3 * 2**30  # apart from those of samples; a generator keeps 32 bits
_OTHER_FILES = 1024  # that a process may have open besides
_POLL = 0.2  # seconds between looks at what other processes have finished


class TrajectoryStore:
    """M trajectories of a teacher at L noise levels, mapped from files.

    Args:
        folder: Of the store.
        identity: What its numbers depend on, JSON values.
        count: M.
        shape: Of one sample.
        sigma_data: Standard deviation of the data.
        flips: Whether half of the images that a step reads are mirrored.

    Attributes:
        levels: The noise levels (L,), float64, descending.
        digest: SHA-256 that stands for all numbers read from it, once it is :meth:`open`.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        count: int,
        shape: tuple[int, ...],
        sigma_data: float,
        flips: bool = False,
    ) -> None:
        self.folder, self.count, self.shape, self.flips = folder, count, shape, flips and len(shape) == 3
        self.identity = json.loads(json.dumps(identity))  # as it comes back from a file
        self.levels = torch.tensor(identity["levels"], dtype=torch.float64)
        self.scales = (self.levels**2 + sigma_data**2).sqrt()
        self.digest = ""
        self.dtype = torch.float16 if identity["precision"] == "fp16" else torch.float32
        self._files: list[tuple[mmap.mmap, int]] = []  # and the byte where its points begin
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def shards(self) -> list[Path]:
        """The files of all M trajectories, whether they are there or not."""
        return [self.folder / f"{first:09d}.safetensors" for first in range(0, self.count, SHARD)]

    def missing(self) -> list[Path]:
        """Returns the shards that are still to be followed."""
        return [path for path in self.shards if not path.is_file()]

    def write(self, teacher: Teacher, accelerator: Accelerator, classes: Sequence[float] | None) -> None:
        """Follows the trajectories that are missing; every process takes shards until none is left.

        Args:
            teacher: On the accelerator's device.
            accelerator: Devices and processes.
            classes: How often each class occurs, None without classes.

        Raises:
            DiskFullError: The shards do not fit; reported before the work.
            StoppedError: A signal came; finished shards stay, and the same call resumes.
        """
        missing = self.missing()
        if not missing:
            return
        self._check_disk(len(missing))
        kept = len(self.shards) - len(missing)
        if kept:
            say(f"{self.folder}: resumes after {kept * SHARD:,} of {len(self.shards) * SHARD:,} trajectories")
        about = {"teacher": teacher.name, "seconds": 0, **self.identity, **read_json(self.folder / "about.json")}
        write_text(self.folder / "about.json", json.dumps(about, indent=1, sort_keys=True))
        total = len(self.shards) * SHARD
        with progress(total, f"trajectories of {teacher.name}", "trajectory", kept * SHARD) as advance:
            shown = kept * SHARD

            def follow_shown(finished: int) -> None:
                nonlocal shown
                there = min(total, (len(self.shards) - len(self.missing())) * SHARD + finished)
                if there > shown:
                    advance(there - shown, "")
                    shown = there

            while missing := self.missing():
                start = accelerator.process_index * len(missing) // accelerator.num_processes
                turns = missing[start:] + missing[:start]
                worked = [self._claim(path, teacher, accelerator, classes, follow_shown) for path in turns]
                follow_shown(0)
                signals.check("following trajectories")
                if not any(worked):
                    time.sleep(_POLL)  # others follow the rest; what they leave unfinished is taken over

    def open(self, accelerator: Accelerator) -> None:
        """Verifies all shards, shared among the processes, and maps them into memory.

        Raises:
            CorruptFileError: A shard is damaged; the message names it.
            MismatchError: A shard belongs to another store.
        """
        paths = self.shards
        own = paths[accelerator.process_index :: accelerator.num_processes]
        error: CdistillError | None = None
        with progress(len(paths), "checking trajectories", "shard") as advance:
            for path in own:
                signals.check("checking trajectories")
                try:
                    self._verify(path)
                except CdistillError as caught:
                    error = caught
                    break
                advance(min(accelerator.num_processes, len(paths)), "")
        bad = accelerator.reduce(torch.tensor(int(error is not None), device=accelerator.device), "sum")
        if error is not None:
            raise error
        if int(bad):
            raise CorruptFileError(f"{self.folder}: another process found a damaged shard; see its message")
        _allow_open_files(len(paths))
        mapped = [self._map(path) for path in paths]
        self._files = [file for file, _, _ in mapped]
        if self.identity["classes"] is not None:
            self._labels = torch.cat([labels for _, labels, _ in mapped])
        self.digest = hashlib.sha256("".join(text for _, _, text in mapped).encode()).hexdigest()

    def points(self, trajectories: Tensor, levels: Tensor) -> Tensor:
        """Reads points of trajectories.

        Args:
            trajectories: Which, (B,), int64 in [0, M).
            levels: At which of the store's noise levels each, (B,), float64.

        Returns:
            x at these levels, (B, ...), float32.

        Raises:
            CdistillError: A noise level is not kept.
        """
        places = len(self.levels) - 1 - torch.searchsorted(self.levels.flip(0), levels.contiguous())
        places = places.clamp(min=0)
        if not torch.equal(self.levels[places], levels):
            wrong = float(levels[self.levels[places] != levels][0])
            raise CdistillError(f"trajectories.levels: noise level {wrong:.6g} is not kept; name its index too")
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        wanted = [
            (file, begin + (trajectory % SHARD * len(self.levels) + place) * size)
            for trajectory, place in zip(trajectories.tolist(), places.tolist(), strict=True)
            for file, begin in [self._files[trajectory // SHARD]]
        ]
        for file, offset in wanted:  # all at once: a disk answers many questions in the time of one
            begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
            file.madvise(mmap.MADV_WILLNEED, begin, offset + size - begin)
        data = b"".join(file[offset : offset + size] for file, offset in wanted)
        x = torch.frombuffer(bytearray(data), dtype=self.dtype).float().reshape(-1, *self.shape)
        return x * broadcast(self.scales[places], x)

    def labels(self, trajectories: Tensor) -> Tensor | None:
        """Returns the classes of trajectories, (B,), int64, or None."""
        return None if self._labels is None else self._labels[trajectories]

    def _claim(
        self,
        path: Path,
        teacher: Teacher,
        accelerator: Accelerator,
        classes: Sequence[float] | None,
        finished: Callable[[int], None],
    ) -> bool:
        """Follows a shard unless another process does, or has; the lock of one that was killed is free."""
        lock = FileLock(path.with_suffix(".lock"))
        try:
            with lock.acquire(timeout=0):
                if path.is_file():
                    return False
                begun = time.monotonic()
                self._follow(path, teacher, accelerator.device, classes, finished)
                self._remember(time.monotonic() - begun, accelerator.device)
        except Timeout:
            return False
        path.with_suffix(".lock").unlink(missing_ok=True)
        return True

    def _remember(self, seconds: float, device: torch.device) -> None:
        """Adds the time of a shard to ``about.json``: seconds of a core, or of a GPU."""
        about = self.folder / "about.json"
        with FileLock(about.with_suffix(".lock")):
            record = read_json(about)
            before = record.get("seconds")
            cores = torch.get_num_threads() if device.type == "cpu" else 1
            record["seconds"] = round((before if isinstance(before, int | float) else 0) + seconds * cores, 3)
            write_text(about, json.dumps(record, indent=1, sort_keys=True))

    @property
    def seconds(self) -> float | None:
        """Seconds of a core, or of a GPU, that all M trajectories took; None if it is not known."""
        whole = read_json(self.folder / "about.json").get("seconds")
        there = len(list(self.folder.glob("[0-9]*.safetensors"))) * SHARD
        return whole * self.count / there if isinstance(whole, int | float) and there else None

    def _follow(
        self,
        path: Path,
        teacher: Teacher,
        device: torch.device,
        classes: Sequence[float] | None,
        finished: Callable[[int], None],
    ) -> None:
        """Follows the trajectories of a shard by Heun's method and writes it."""
        first = int(path.stem)
        seeds = range(self.identity["first_seed"] + first, self.identity["first_seed"] + first + SHARD)
        chosen = None if classes is None else _draw_classes(classes, first)
        substeps, places = self.identity["substeps"], self.identity["places"]
        fine = refined(torch.tensor(self.identity["grid"], dtype=torch.float64), substeps).to(device)

        def follow(x: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
            stops: list[Tensor] = []
            scales = send(self.scales, device)
            for place, here in enumerate(range(0, len(fine), substeps)):
                if place in places:
                    stops.append((x / scales[len(stops)]).to(torch.float32))
                if place == places[-1]:
                    break
                stretch = fine[here : here + substeps + 1]
                x = solve(heun_step, lambda point, t: teacher.denoiser(point, t, None, labels), x, stretch)
            return torch.stack(stops, 1)

        points = torch.empty(SHARD, len(self.levels), *self.shape, dtype=self.dtype)
        labels = torch.zeros(SHARD, dtype=torch.int64)
        done = 0
        for drawn in stream(follow, self.shape, seeds, teacher.denoiser.known_classes.shares, chosen, device):
            points[drawn.rows] = drawn.samples.to(points.dtype)
            if drawn.labels is not None:
                labels[drawn.rows] = drawn.labels
            done += len(drawn.rows)
            finished(done)
        if not bool(points.isfinite().all()):
            raise CdistillError(f"{teacher.name}: a trajectory is not finite; its weights do not fit its schedule")
        columns = {"points": points, "labels": labels}
        save_tensors(path, columns, _KIND, {"identity": self.identity, "first": first})

    def _verify(self, path: Path) -> None:
        tensors, header = load_tensors(path, _KIND)
        shapes = {"points": (self.dtype, (SHARD, len(self.levels), *self.shape)), "labels": (torch.int64, (SHARD,))}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if header.get("identity") != self.identity or found != shapes:
            raise MismatchError(
                f"{path}: trajectories of another teacher or other settings; remove it, and it is followed again"
            )

    def _map(self, path: Path) -> tuple[tuple[mmap.mmap, int], Tensor, str]:
        """Maps a verified shard; returns it and where its points begin, its labels and its checksum."""
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        begin = 8 + size + header["points"]["data_offsets"][0]
        labels = np.fromfile(path, np.int64, SHARD, offset=8 + size + header["labels"]["data_offsets"][0])
        return (mapped, begin), torch.from_numpy(labels), json.loads(header["__metadata__"]["cdistill"])["sha256"]

    def _check_disk(self, shards: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = shards * SHARD * len(self.levels) * int(np.prod(self.shape)) * self.dtype.itemsize
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DiskFullError(
                f"{self.folder}: {needed / 2**30:.2f} GiB of trajectories to write, {free / 2**30:.2f} GiB free; free "
                "some room, set $CDISTILL_ASSETS to a folder on a larger disk, or lower trajectories.count"
            )


def _allow_open_files(more: int) -> None:
    """Raises this process's limit of open files by as many as are mapped: Python keeps a mapped file open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = more + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _draw_classes(shares: Sequence[float], first: int) -> list[int]:
    """Draws the classes of the shard that begins with trajectory `first`."""
    law, draw = torch.tensor(shares, dtype=torch.float64), generator(first, "classes of trajectories")
    classes: list[int] = torch.multinomial(law, SHARD, replacement=True, generator=draw).tolist()
    return classes


def trajectory_store(
    section: TrajectoriesSection, grid: Tensor, teacher: Teacher, source: Source | None
) -> TrajectoryStore:
    """Returns the store of a teacher's trajectories; nothing is written or read yet.

    Args:
        section: How many trajectories, and how they are followed and kept.
        grid: Noise levels of the objective's grid, (N,), float64, from T down to eps.
        teacher: The teacher.
        source: The data, whose classes are drawn as they occur; all alike without labels.

    Raises:
        RecipeError: A level is not one of the grid.
    """
    places = sorted(set(section.levels)) or list(range(len(grid)))
    if places[-1] >= len(grid):
        raise RecipeError(f"trajectories.levels: got {places[-1]}; the grid has the levels 0 to {len(grid) - 1}")
    classes = class_shares(teacher, source)
    identity = {
        "teacher_sha256": teacher.digest,
        "solver": "heun",
        "grid": grid.tolist(),
        "places": places,
        "levels": grid[places].tolist(),
        "substeps": section.substeps,
        "precision": section.precision,
        "first_seed": _FIRST_SEED,
        "classes": None if classes is None else hashlib.sha256(repr(classes).encode()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = asset_folder() / "trajectories" / key
    return TrajectoryStore(folder, identity, section.count, teacher.shape, teacher.denoiser.sigma_data, section.flips)


def refined(grid: Tensor, substeps: int) -> Tensor:
    """Returns a grid with `substeps` - 1 levels between neighbours, evenly in t^(1/rho); the old ones exact."""
    ramp = grid ** (1 / RHO)
    shares = torch.arange(substeps, dtype=torch.float64) / substeps
    fine = (ramp[:-1, None] + (ramp[1:] - ramp[:-1])[:, None] * shares) ** RHO
    fine[:, 0] = grid[:-1]
    return torch.cat([fine.flatten(), grid[-1:]])


def class_shares(teacher: Teacher, source: Source | None) -> list[float] | None:
    """Returns how often each class occurs in the data; None for an unconditional teacher."""
    classes = teacher.denoiser.num_classes
    if not classes:
        return None
    if source is None or source.labels is None:
        return [1 / classes] * classes
    return (source.labels.cpu().bincount(minlength=classes).double() / len(source)).tolist()


def open_trajectories(
    section: TrajectoriesSection,
    grid: Tensor,
    teacher: Teacher,
    source: Source | None,
    accelerator: Accelerator,
) -> TrajectoryStore:
    """Returns the store, written if need be, verified and mapped.

    Args:
        section: See `trajectory_store`, as for what follows.
        grid: Noise levels.
        teacher: On the accelerator's device.
        source: The data.
        accelerator: Devices and processes.

    Raises:
        RecipeError: A level is not one of the grid.
        DiskFullError: It does not fit on the disk.
        StoppedError: A signal came; finished shards stay, and the same call resumes.
        CorruptFileError: A shard is damaged.
        MismatchError: A shard belongs to another store.
    """
    store = trajectory_store(section, grid, teacher, source)
    store.write(teacher, accelerator, class_shares(teacher, source))
    accelerator.wait_for_everyone()
    store.open(accelerator)
    return store


def stored_trajectories() -> list[dict[str, Any]]:
    """Lists the stores in the asset folder: "folder", "teacher", "count", "bytes" and what identifies each."""
    found = []
    for about in sorted((asset_folder() / "trajectories").glob("*/about.json")):
        shards = list(about.parent.glob("[0-9]*.safetensors"))
        size = sum(path.stat().st_size for path in shards)
        facts = read_json(about)
        for key, unknown in {"teacher": "?", "precision": "?", "levels": []}.items():
            facts[key] = facts[key] if isinstance(facts.get(key), type(unknown)) else unknown
        found.append({**facts, "folder": about.parent, "count": len(shards) * SHARD, "bytes": size})
    return found
