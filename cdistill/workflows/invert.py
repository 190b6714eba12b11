"""``cdistill invert``: the noise that a sampler takes to given images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdistill.data import Source, load_source
from cdistill.data.source import from_uint8
from cdistill.errors import MismatchError, RecipeError
from cdistill.networks.denoiser import Denoiser, chunk_size
from cdistill.preconditionings import Preconditioning
from cdistill.runtime import signals
from cdistill.runtime.console import progress, say
from cdistill.sampling.inversion import invert
from cdistill.sampling.samplers import SamplerChoice, TimedSampler, make_samplers
from cdistill.schedule import T
from cdistill.storage.files import replacing
from cdistill.storage.run_folder import RunFolder
from cdistill.teachers import load_teacher
from cdistill.training.loop import make_accelerator
from cdistill.workflows.students import load_converted, load_student


@dataclass(frozen=True)
class Trip:
    """Images back to noise and forth again.

    Attributes:
        latents: Points at T (n, ...), float64.
        residual: Of the inversion (n,), see :class:`cdistill.sampling.Inverse`.
        converged: Whether that is small (n,).
        error: Root mean square distance from each image to what its latent is sampled to (n,).
    """

    latents: Tensor
    residual: Tensor
    converged: Tensor
    error: Tensor


def invert_images(
    images: Path,
    run: RunFolder | Path | None,
    teacher_name: str | None,
    weights: Path | None,
    choice: SamplerChoice,
    nfe: Sequence[int] | None,
    out: Path,
) -> dict[str, Any]:
    """Inverts the images of a file or folder, writes their latents and says how well they lead back.

    Args:
        images: See `cdistill.data.loading`; with labels where the network needs them.
        run: The run, the file of a converted student, or None for a teacher.
        teacher_name: The teacher, where `run` is None.
        weights: File of the teacher's weights, where it is in no usual place.
        choice: The sampler; its `nfe` is not read.
        nfe: One number of network calls, or None for the default.
        out: An .npz with `latents`, `residual` and, if there are any, `labels`.

    Returns:
        The record.

    Raises:
        MismatchError: The images do not fit the network.
        RecipeError: More samplers than one, or one with fresh noise.
    """
    denoiser, preconditioning = _network(run, teacher_name, weights)
    samplers = list(make_samplers(denoiser, preconditioning, choice, nfe).values())
    if len(samplers) > 1:
        raise RecipeError(f"--nfe: got {len(samplers)} numbers; an image is inverted with one")
    source = _fitting(load_source(str(images.absolute())), denoiser)
    sampler, device = samplers[0], make_accelerator("fp32").device
    denoiser.to(device)
    trip = _travel(sampler, source, device)
    arrays = {"latents": trip.latents.numpy(), "residual": trip.residual.numpy()}
    if source.labels is not None:
        arrays["labels"] = source.labels.numpy()
    with replacing(out) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)
    record = {
        "images": len(source),
        "converged": int(trip.converged.sum()),
        "round_trip_rms": float(trip.error.square().mean().sqrt()),
        "latent_rms": float(trip.latents.square().mean().sqrt() / T),
        "file": str(out),
        **sampler.facts,
    }
    if missed := len(source) - record["converged"]:
        say(f"{missed} images are not inverted: jumps too long for the iteration; use more calls, or the teacher")
    return record


def _network(
    run: RunFolder | Path | None, teacher_name: str | None, weights: Path | None
) -> tuple[Denoiser, Preconditioning | None]:
    if run is None:
        return load_teacher(teacher_name or "", weights).denoiser, None
    if not isinstance(run, RunFolder):
        return load_converted(run)
    student = load_student(run, weights)
    return student.denoiser, student.preconditioning


def _travel(sampler: TimedSampler, source: Source, device: torch.device) -> Trip:
    size, parts = chunk_size(sampler.denoiser.sample_shape), []
    with progress(len(source), "inverting", "img") as advance, torch.inference_mode():
        for begin in range(0, len(source), size):
            signals.check("inversion")
            rows = slice(begin, begin + size)
            x = from_uint8(source.samples[rows]).double().to(device)
            labels = None if source.labels is None else source.labels[rows].to(device)
            found = invert(sampler, x, labels)
            again = sampler(found.x, labels, x.clone)  # asks for no noise: `invert` has refused those that do
            parts.append((found.x, found.residual, found.converged, _rms(again - x)))
            advance(len(x), "")
    return Trip(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def _rms(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1).sqrt()


def _fitting(source: Source, denoiser: Denoiser) -> Source:
    classes = denoiser.num_classes
    if source.shape != denoiser.sample_shape or (classes and not 0 < source.num_classes <= classes):
        raise MismatchError(
            f"{source.name}: images of shape {tuple(source.shape)}, {source.num_classes} classes; the network has "
            f"shape {denoiser.sample_shape}, {classes} classes, which must be in the file where there are any"
        )
    return source if classes else Source(source.name, source.samples)
