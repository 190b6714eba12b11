"""End points of the teacher's trajectories: what `teacher-mse` compares with; drawn once, kept in the asset folder."""

import hashlib
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill import __version__
from cdistill.errors import CdistillError, CorruptFileError
from cdistill.networks.denoiser import chunk_size
from cdistill.runtime.console import progress, say
from cdistill.sampling.drawing import generate
from cdistill.sampling.samplers import TEACHER_POINTS, make_sampler
from cdistill.storage.checkpoints import load_tensors, save_tensors
from cdistill.storage.files import asset_folder
from cdistill.teachers import Teacher

PIECE = 256  # seeds in a file; whole chunks


class TeacherEnds:
    """Samples of the teacher by Heun's solver, one for each seed.

    They are the same whoever asks, so they are kept under ``teacher-ends`` in the asset folder, in a folder of its own
    for each teacher, device and version; where that cannot be written they are kept in memory.

    Args:
        teacher: On the accelerator's device.
        accelerator: Device and processes.
    """

    def __init__(self, teacher: Teacher, accelerator: Accelerator) -> None:
        self.teacher, self.accelerator = teacher, accelerator
        self.sampler = make_sampler(teacher.denoiser, None)
        self.folder = asset_folder() / "teacher-ends" / self._key()
        self._kept: dict[int, Tensor] = {}
        self._open: tuple[int, Tensor] | None = None

    def prepare(self, first: int, count: int) -> None:
        """Draws what is missing of the seeds `first` ... `first` + `count` - 1; all processes call it together.

        Raises:
            StoppedError: A signal came; finished pieces are kept.
        """
        size = chunk_size(self.teacher.shape)
        last = -(-(first + count) // size) * size
        wanted = {start: min(start + PIECE, last) for start in range(first // PIECE * PIECE, first + count, PIECE)}
        lacking = torch.tensor([not self._has(*piece) for piece in wanted.items()], device=self.accelerator.device)
        # Another command may write meanwhile: what any process lacks is drawn by all, or they would part ways.
        total = self.accelerator.reduce(lacking.int(), "sum").tolist()
        missing = {start: end for (start, end), count in zip(wanted.items(), total, strict=True) if count}
        if not missing:
            return
        with progress(sum(end - start for start, end in missing.items()), "teacher's samples", "img") as advance:
            for start, end in missing.items():
                samples, _ = generate(
                    self.sampler, self.teacher.shape, range(start, end), self.teacher.denoiser.num_classes,
                    device=self.accelerator.device, advance=advance, accelerator=self.accelerator,
                )  # fmt: skip
                self._keep(start, samples)
        self._open = None
        self.accelerator.wait_for_everyone()

    def rows(self, seeds: Tensor) -> Tensor:
        """Returns the samples (r, ...) of prepared `seeds` (r,); images in float32, vectors in float64."""
        return torch.stack([self._piece(seed // PIECE * PIECE)[seed % PIECE] for seed in seeds.tolist()])

    def _key(self) -> str:
        """Names what the samples depend on."""
        facts = [
            self.teacher.digest,
            "heun",
            TEACHER_POINTS,
            self.accelerator.device.type,
            torch.__version__,
            __version__,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _files(self, start: int) -> dict[int, Path]:
        """Returns what there is of a piece: how many seeds -> file."""
        found = {}
        for path in self.folder.glob(f"{start:010d}-*.safetensors"):
            end = path.stem.partition("-")[2]
            if end.isdecimal():
                found[int(end) - start] = path
        return found

    def _has(self, start: int, end: int) -> bool:
        kept = self._kept.get(start)
        return max([*self._files(start), 0 if kept is None else len(kept)]) >= end - start

    def _keep(self, start: int, samples: Tensor) -> None:
        kept = samples.float() if len(self.teacher.shape) == 3 else samples
        path = self.folder / f"{start:010d}-{start + len(kept):010d}.safetensors"
        failed = torch.tensor(0, device=self.accelerator.device)
        if self.accelerator.is_main_process:
            try:
                save_tensors(path, {"samples": kept}, "teacher's samples", {"teacher": self.teacher.name})
            except (OSError, CdistillError) as error:
                if not self._kept:
                    say(f"the teacher's samples are not kept for the next evaluation: {error}")
                failed += 1
        if self.accelerator.reduce(failed, "sum"):
            self._kept[start] = kept

    def _piece(self, start: int) -> Tensor:
        """Returns what there is of a piece; the last one asked for stays in memory."""
        if start in self._kept:
            return self._kept[start]
        if self._open is None or self._open[0] != start:
            self._open = start, self._load(start)
        return self._open[1]

    def _load(self, start: int) -> Tensor:
        path = max(self._files(start).items())[1]
        try:
            return load_tensors(path, "teacher's samples")[0]["samples"]
        except CorruptFileError as error:
            raise CorruptFileError(f"{error}; or remove it, and it is drawn again") from error
