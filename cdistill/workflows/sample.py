"""Images of a student or of a teacher as files, and the noise that its sampler takes to given images."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cdistill.data import Source, load_source
from cdistill.data.source import QUANTISATION, from_uint8
from cdistill.errors import MismatchError, RecipeError
from cdistill.networks.classes import Classes
from cdistill.networks.denoiser import Denoiser, chunk_size
from cdistill.preconditionings import Preconditioning
from cdistill.registry import WRITERS
from cdistill.runtime import signals
from cdistill.runtime.console import Table, progress, say
from cdistill.runtime.processes import let_main, versions
from cdistill.sampling.drawing import chunks_together
from cdistill.sampling.image_grids import as_ranges
from cdistill.sampling.inversion import TOLERANCE, invert
from cdistill.sampling.sample_store import SampleStore
from cdistill.sampling.samplers import SamplerChoice, make_samplers
from cdistill.sampling.teacher_data import renumbered
from cdistill.sampling.writers import Samples, Writer, is_picture_of_seed
from cdistill.schedule import T
from cdistill.storage.checkpoints import tensor_digest
from cdistill.storage.files import replacing, write_text
from cdistill.storage.run_folder import RunFolder, held
from cdistill.teachers import load_teacher
from cdistill.training.loop import make_accelerator
from cdistill.workflows.students import load_converted, load_student
from cdistill.workflows.targets import run_facts

_ANY = SamplerChoice()


@dataclass(frozen=True)
class SampleFiles:
    """What `sample` wrote.

    Attributes:
        files: A file or folder for each sampler.
        record: What the samples come from, the samplers, and how many images a second were drawn, as JSON.
    """

    files: list[Path]
    record: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the record with the names of the files."""
        return {**self.record, "files": [str(file) for file in self.files]}

    def table(self) -> Table:
        """Returns a row for each file: network calls, images drawn per second."""
        rates = self.record["images_per_second"].values()
        rows = [
            [str(file), str(nfe), "-" if rate is None else f"{rate:.3g}"]
            for file, nfe, rate in zip(self.files, self.record["nfe"], rates, strict=True)
        ]
        return Table("samples", ["file", "NFE", "img/s"], rows)


def sample(
    run: RunFolder | str | Path | None = None,
    *,
    teacher: str | None = None,
    weights: Path | None = None,
    step: str = "last",
    choice: SamplerChoice = _ANY,
    nfe: Sequence[int] | None = None,
    seeds: Sequence[int] = range(64),
    classes: Sequence[int | str] | Literal["uniform"] | None = None,
    output_format: str = "grid",
    out: str | Path = "samples",
    batch_size: int | None = None,
    overwrite: bool = False,
) -> SampleFiles:
    """Draws samples of a run's student or of a teacher with each sampler that is asked for, and writes them.

    An interrupted call resumes: finished samples are kept in hidden folders in `out`. How the samples were made is
    written next to each file, as NAME.json.

    Args:
        run: The run, the file of a converted student, or None for a teacher.
        teacher: The teacher, where `run` is None.
        weights: File of the teacher's weights, where it is in no usual place.
        step: Which student of the run, see `load_student`.
        choice: The sampler; its `nfe` is not read.
        nfe: Numbers of network calls, one sampler for each; see `make_samplers`.
        seeds: One sample each; repeated ones are drawn once.
        classes: Numbers or names, repeated along the seeds; "uniform" draws them from the seeds, all that occur in the
            data alike, None as often as there.
        output_format: Name of a registered writer.
        out: Folder.
        batch_size: Images that a network call holds on a GPU.
        overwrite: Whether pictures of other seeds that lie in a folder to be written are removed, not refused.

    Raises:
        RecipeError: No such class, other files where samples are to lie, or as `make_samplers`.
        StoppedError: A signal came; finished samples are kept.
        RunLockedError: Another process writes the same files.

    >>> sample(teacher="digits", seeds=range(4), out=Path("drawn")).files
    [PosixPath('drawn/teacher.png')]
    """
    seeds, out = list(dict.fromkeys(seeds)), Path(out)
    writer: Writer = WRITERS.get(output_format)()
    accelerator = make_accelerator("fp32")
    denoiser, preconditioning, facts = load_network(Path(run) if isinstance(run, str) else run, teacher, weights, step)
    samplers = make_samplers(denoiser, preconditioning, choice, nfe)
    known, numbers = _choose_classes(denoiser.known_classes, classes)
    shape, device = denoiser.sample_shape, accelerator.device
    writer.check(output_format, shape, len(seeds))
    _check_places([out / f"{name}{writer.suffix}" for name in samplers], writer, seeds, overwrite)
    drawn_classes = as_ranges(numbers) if numbers else known.law or None
    facts |= {"weights_sha256": tensor_digest(denoiser.state_dict()), "classes": drawn_classes}
    chosen = numbers and [numbers[k % len(numbers)] for k in range(len(seeds))]
    denoiser.to(device)
    how = {"precision": "fp32", "device": device.type, "versions": versions()}
    files, rates, stores = [], {}, []
    with ExitStack() as stack:
        for name, sampler in samplers.items():
            folder, path = out / f".{name}.shards", out / f"{name}{writer.suffix}"
            lock = held(folder / "lock", f"{out / name}: another process samples to this place")
            let_main(partial(stack.enter_context, lock), folder, accelerator)
            identity = {
                **facts, **how, "sampler": sampler.facts, "seeds": _digest(seeds),
                "classes": _digest(chosen or known.counts), "chunks": chunks_together(shape, device, batch_size),
            }  # fmt: skip
            store = SampleStore(folder, identity, shape)
            start = time.monotonic()
            drawn = store.draw(sampler, seeds, known.shares, accelerator, name, chosen, batch_size)
            rates[name] = drawn / (time.monotonic() - start) if drawn else None
            samples = Samples(np.array(seeds), shape, partial(store.read, seeds))
            let_main(partial(_write, writer, path, samples, out / f"{name}.json"), path, accelerator)
            files.append(path)
            stores.append(store)
        if accelerator.is_main_process:
            for store in stores:
                store.remove()
    used = {name: {"nfe": sampler.nfe, **sampler.facts} for name, sampler in samplers.items()}
    shared = {**facts, "seeds": as_ranges(seeds)}
    if accelerator.is_main_process:
        for (name, sampler_facts), file in zip(used.items(), files, strict=True):
            record = {"file": file.name, **sampler_facts, **shared, **how, "quantisation": QUANTISATION}
            write_text(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    calls = [sampler.nfe for sampler in samplers.values()]
    record = {**shared, "nfe": calls, "samplers": used, "format": output_format, "images_per_second": rates}
    return SampleFiles(files, record)


def load_network(
    run: RunFolder | Path | None, teacher: str | None, weights: Path | None = None, step: str = "last"
) -> tuple[Denoiser, Preconditioning | None, dict[str, Any]]:
    """Loads what is drawn from: a run's student, a converted student, or a teacher.

    Returns:
        The denoiser; f and g, None for a teacher; what they come from, as JSON.
    """
    if run is None:
        return load_teacher(teacher or "", weights).denoiser, None, {"teacher": teacher}
    if not isinstance(run, RunFolder):
        denoiser, preconditioning = load_converted(run)
        return denoiser, preconditioning, {"file": str(run), "preconditioning": type(preconditioning).__name__}
    student = load_student(run, weights, step)
    say(f"{run.path}: step {student.step}")
    facts = run_facts(run, student.recipe, student.step, student.denoiser)
    return student.denoiser, student.preconditioning, facts


def _write(writer: Writer, path: Path, samples: Samples, record: Path) -> None:
    """Writes samples, and removes first the record that says how others were made."""
    record.unlink(missing_ok=True)
    writer.write(path, samples)


def _choose_classes(
    known: Classes, classes: Sequence[int | str] | Literal["uniform"] | None
) -> tuple[Classes, list[int] | None]:
    """Returns the classes as often as they are to be drawn, and the numbers of those that are given in their place."""
    if classes is not None and classes != "uniform":
        return known, known.numbers(list(map(str, classes)))
    drawn = known if classes is None else known.alike()
    if drawn.law not in ("", "alike"):
        say(f"classes: {drawn.law}")
    return drawn, None


def _check_places(paths: Sequence[Path], writer: Writer, seeds: Sequence[int], overwrite: bool) -> None:
    """Raises RecipeError if samples of `seeds` would lie among other files; pictures may be overwritten."""
    for path in paths:
        others = [name for name in writer.others(path, seeds) if not (overwrite and is_picture_of_seed(name))]
        if others:
            remedy = "choose another --out" + ("" if overwrite else ", or --overwrite, which removes pictures")
            raise RecipeError(f"{path}: holds {len(others):,} other files ({others[0]}, ...); {remedy}")


def _digest(numbers: Sequence[int]) -> str:
    return hashlib.sha256(np.array(numbers, np.int64).tobytes()).hexdigest()


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
    sampler, *others = make_samplers(denoiser, preconditioning, choice, nfe).values()
    if others:
        raise RecipeError(f"--nfe: got {1 + len(others)} numbers; an image is inverted with one")
    source = _fit(load_source(str(images.absolute())), denoiser)
    device = make_accelerator("fp32").device
    denoiser.to(device)
    size, batches = chunk_size(denoiser.sample_shape), []
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
