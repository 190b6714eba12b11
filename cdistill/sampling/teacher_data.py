"""The data for a teacher: a source that fits it, or samples of its own for people who have only its weights.

Such samples are kept in the asset folder.
"""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source, load_source
from cdistill.data.source import to_uint8
from cdistill.errors import CorruptFileError, MismatchError, RecipeError
from cdistill.registry import is_teacher_data, teacher_data_count
from cdistill.runtime.console import progress
from cdistill.sampling.drawing import generate
from cdistill.sampling.samplers import make_sampler
from cdistill.storage.checkpoints import load_tensors, save_tensors
from cdistill.storage.files import asset_folder
from cdistill.teachers import Teacher

PIECE = 2048  # samples that a broken-off run can lose
# Far from those that people sample and evaluate with; torch's generator on a CPU keeps 32 bits of a seed.
_FIRST_SEED = {"train": 2**30, "heldout": 2**31}


def open_data(name: str | None, split: str, teacher: Teacher, accelerator: Accelerator) -> Source:
    """Returns the data for a teacher: a registered source, a file, or samples of the teacher itself.

    Args:
        name: A name in the registry, a path, "teacher" or "teacher:COUNT"; None for the teacher's own data.
        split: "train" or "heldout".
        teacher: On the accelerator's device.
        accelerator: Devices and processes.

    Raises:
        RecipeError: The teacher names no data of its own.
        MismatchError: It does not fit the teacher.
    """
    chosen = name or teacher.data
    if not chosen:
        raise RecipeError(
            f"data: teacher {teacher.name!r} names no data of its own; give a source, a path or 'teacher'"
        )
    if is_teacher_data(chosen):
        return teacher_data(chosen, split, teacher, accelerator)
    return fit_source(teacher, load_source(chosen, split))


def fit_source(teacher: Teacher, source: Source) -> Source:
    """Returns the data as the teacher needs it: without labels for an unconditional one.

    Raises:
        MismatchError: Another shape, no labels where the teacher needs them, or more classes than it knows.
    """
    classes = teacher.denoiser.num_classes
    fits = not classes or 0 < source.num_classes <= classes
    if source.shape != teacher.shape or not fits:
        example = f", such as {teacher.data!r}" if teacher.data else ""
        raise MismatchError(
            f"data {source.name!r}: shape {source.shape}, {source.num_classes} classes; teacher {teacher.name!r} "
            f"has shape {teacher.shape}, {classes} classes; choose data that fits{example}"
        )
    return source if classes else replace(source, labels=None, num_classes=0)


def teacher_data(name: str, split: str, teacher: Teacher, accelerator: Accelerator) -> Source:
    """Returns samples of the teacher's own solver (Heun, 34 calls), drawn at first use and read afterwards.

    Args:
        name: "teacher" for 50,000 samples, or "teacher:COUNT".
        split: "train", or "heldout" for samples of other seeds.
        teacher: On the accelerator's device.
        accelerator: Shares the work among its processes.

    Returns:
        uint8 images, rounded as EDM writes them, or float64 vectors, with the labels that were drawn for them. They
        are not mirrored: of these data there are as many as one likes.

    Raises:
        RecipeError: Fewer than two samples, or too many.
        CorruptFileError: A file kept from an earlier run is damaged.
        StoppedError: A signal came; finished pieces are kept.
    """
    count = teacher_data_count(name)
    pieces = [(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
    files = {piece: _folder(teacher) / f"{split}-{piece[0]:08d}-{piece[1]:08d}.safetensors" for piece in pieces}
    missing = [piece for piece, file in files.items() if not file.is_file()]
    accelerator.wait_for_everyone()  # every process has looked before the main one writes
    if missing:
        with progress(sum(end - start for start, end in missing), f"samples of {teacher.name}", "img") as advance:
            for start, end in missing:
                first = _FIRST_SEED[split]
                samples, labels = generate(
                    make_sampler(teacher.denoiser, None), teacher.shape, range(first + start, first + end),
                    teacher.denoiser.num_classes, device=accelerator.device, advance=advance, accelerator=accelerator,
                )  # fmt: skip
                if accelerator.is_main_process:
                    _save(files[start, end], samples, labels, teacher)
        accelerator.wait_for_everyone()
    found = [_load(file) for file in files.values()]
    labels = torch.cat([part["labels"] for part in found]) if teacher.denoiser.num_classes else None
    samples = torch.cat([part["samples"] for part in found])
    return Source(f"teacher:{count}", samples, labels, teacher.denoiser.num_classes)


def _folder(teacher: Teacher) -> Path:
    return asset_folder() / "teacher-data" / teacher.digest[:16]


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path, "samples")[0]
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}; or remove it, and it is drawn again") from error


def _save(path: Path, samples: Tensor, labels: Tensor | None, teacher: Teacher) -> None:
    kept = to_uint8(samples) if len(teacher.shape) == 3 else samples
    tensors = {"samples": kept} if labels is None else {"samples": kept, "labels": labels}
    save_tensors(path, tensors, "samples", {"teacher": teacher.name, "teacher_sha256": teacher.digest})
