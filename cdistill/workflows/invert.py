"""The noise that a sampler takes to given images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdistill.data.loading import load_source
from cdistill.data.source import Source, from_uint8
from cdistill.errors import MismatchError, RecipeError
from cdistill.networks.denoiser import Denoiser, chunk_size
from cdistill.runtime import signals
from cdistill.runtime.console import progress
from cdistill.sampling.inversion import TOLERANCE, invert
from cdistill.sampling.samplers import SamplerChoice, TimedSampler, make_samplers
from cdistill.sampling.teacher_data import renumbered
from cdistill.schedule import T
from cdistill.storage.files import replacing
from cdistill.storage.run_folder import RunFolder
from cdistill.training.loop import make_accelerator
from cdistill.workflows.sample import load_network

_ANY = SamplerChoice()


@dataclass(frozen=True)
class InvertedImages:
    """Latents of images, and how well they lead back to them.

    Attributes:
        latents: Points at T (n, ...), float64.
        residual: Of the inversion (n,), see `cdistill.sampling.inversion.invert`.
        converged: Whether that is small (n,).
        error: Root mean square distance from each image to what its latent is sampled to (n,).
        labels: Classes (n,), int64, or None.
        sampler: What was inverted, as JSON.
    """

    latents: Tensor
    residual: Tensor
    converged: Tensor
    error: Tensor
    labels: Tensor | None
    sampler: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures of all images together and the sampler, as JSON."""
        return {
            "images": len(self.latents),
            "converged": int(self.converged.sum()),
            "round_trip_rms": float(self.error.square().mean().sqrt()),
            "latent_rms": float(self.latents.square().mean().sqrt() / T),
            **self.sampler,
        }

    def save(self, path: Path) -> None:
        """Writes an .npz with `latents`, `residual` and, if there are any, `labels`."""
        arrays = {"latents": self.latents.numpy(), "residual": self.residual.numpy()}
        if self.labels is not None:
            arrays["labels"] = self.labels.numpy()
        with replacing(path) as temporary:
            np.savez(temporary, allow_pickle=False, **arrays)


def invert_images(
    images: Path,
    run: RunFolder | Path | None = None,
    *,
    teacher: str | None = None,
    weights: Path | None = None,
    choice: SamplerChoice = _ANY,
    nfe: Sequence[int] | None = None,
) -> InvertedImages:
    """Inverts the images of a file or folder, and samples from their latents again.

    Args:
        images: A folder or archive of images, see `load_source`; with labels where the network needs them.
        run: The run, the file of a converted student, or None for a teacher.
        teacher: The teacher, where `run` is None.
        weights: File of the teacher's weights, where it is in no usual place.
        choice: The sampler; its `nfe` is not read.
        nfe: One number of network calls, or None for the default.

    Raises:
        MismatchError: The images do not fit the network.
        RecipeError: More than one sampler, or one with fresh noise.
    """
    denoiser, preconditioning, _ = load_network(run, teacher, weights)
    samplers = list(make_samplers(denoiser, preconditioning, choice, nfe).values())
    if len(samplers) > 1:
        raise RecipeError(f"--nfe: got {len(samplers)} numbers; an image is inverted with one")
    source = _fit(load_source(str(images.absolute())), denoiser)
    device = make_accelerator("fp32").device
    denoiser.to(device)
    return _invert_all(samplers[0], source, device)


def _invert_all(sampler: TimedSampler, source: Source, device: torch.device) -> InvertedImages:
    size, batches = chunk_size(sampler.denoiser.sample_shape), []
    with progress(len(source), "inverting", "img") as advance, torch.inference_mode():
        for begin in range(0, len(source), size):
            signals.check("inversion")
            rows = slice(begin, begin + size)
            x = from_uint8(source.samples[rows]).double().to(device)
            labels = None if source.labels is None else source.labels[rows].to(device)
            latents, residual = invert(sampler, x, labels)
            again = sampler(latents, labels, x.clone)  # asks for no noise: `invert` has refused those that do
            error = (again - x).square().flatten(1).mean(1).sqrt()
            batches.append((latents, residual, residual <= TOLERANCE, error))
            advance(len(x), "")
    latents, residual, converged, errors = (torch.cat(columns).cpu() for columns in zip(*batches, strict=True))
    return InvertedImages(latents, residual, converged, errors, source.labels, sampler.facts)


def _fit(source: Source, denoiser: Denoiser) -> Source:
    classes, source = denoiser.num_classes, renumbered(source, denoiser.known_classes, "the network")
    if source.shape != denoiser.sample_shape or (classes and not 0 < source.num_classes <= classes):
        raise MismatchError(
            f"{source.name}: images of shape {tuple(source.shape)}, {source.num_classes} classes; the network has "
            f"shape {denoiser.sample_shape}, {classes} classes, which must be in the file where there are any"
        )
    return source if classes else Source(source.name, source.samples)
