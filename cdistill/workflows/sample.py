"""``cdistill sample``: images of a student or of a teacher as files."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from cdistill.data.source import QUANTISATION
from cdistill.errors import RecipeError
from cdistill.networks.denoiser import Denoiser
from cdistill.registry import WRITERS
from cdistill.runtime.console import progress, say
from cdistill.runtime.processes import let_main, versions
from cdistill.sampling.drawing import chunks_together
from cdistill.sampling.sample_store import Pieces, draw_missing
from cdistill.sampling.samplers import SamplerChoice, TimedSampler, make_samplers
from cdistill.sampling.writers import Samples, Writer
from cdistill.storage.checkpoints import tensor_digest
from cdistill.storage.files import write_text
from cdistill.storage.run_folder import RunFolder, held
from cdistill.teachers import load_teacher
from cdistill.training.loop import make_accelerator
from cdistill.workflows.students import load_converted, load_student
from cdistill.workflows.targets import run_facts


@dataclass(frozen=True)
class _Job:
    """What the samplers share.

    Attributes:
        denoiser: The network, on the device of the accelerator.
        seeds: One sample each.
        classes: The class of each, in place of the drawn one.
        writer: Of the files.
        out: Their folder.
        batch_size: Images that a network call holds on a GPU.
        accelerator: Devices and processes.
        identity: What the samples depend on besides the sampler.
    """

    denoiser: Denoiser
    seeds: Sequence[int]
    classes: Sequence[int] | None
    writer: Writer
    out: Path
    batch_size: int | None
    accelerator: Accelerator
    identity: dict[str, Any]


def sample(
    run: RunFolder | Path | None,
    teacher_name: str | None,
    weights: Path | None,
    step: str,
    choice: SamplerChoice,
    nfe: Sequence[int] | None,
    seeds: Sequence[int],
    classes: Sequence[int] | None,
    form: str,
    out: Path,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Draws samples of a run's student or of a teacher with each sampler that is asked for, and writes them.

    Where the same command was interrupted, it goes on: finished samples are kept in hidden folders in `out`.

    Args:
        run: The run, the file of a converted student, or None for a teacher.
        teacher_name: The teacher, where `run` is None.
        weights: File of the teacher's weights, where it is in no usual place.
        step: Which student of the run, see `load_student`.
        choice: The sampler; its `nfe` is not read.
        nfe: Numbers of network calls, one sampler for each; see `make_samplers`.
        seeds: One sample each.
        classes: Classes to draw, repeated along the seeds; None draws them from the seeds.
        form: Name of a registered writer.
        out: Folder.
        batch_size: Images that a network call holds on a GPU.

    Returns:
        What was written, from what, and how fast it was drawn.

    Raises:
        StoppedError: A signal came; finished samples are kept.
        RunLockedError: Another process writes the same files.
    """
    writer: Writer = WRITERS.get(form)()
    accelerator = make_accelerator("fp32")
    denoiser, samplers, facts = _samplers(run, teacher_name, weights, step, choice, nfe)
    _check_classes(denoiser, classes)
    writer.check(form, denoiser.sample_shape, len(seeds))
    facts |= {"weights_sha256": tensor_digest(denoiser.state_dict()), "classes": classes and as_ranges(classes)}
    chosen = None if classes is None else [classes[k % len(classes)] for k in range(len(seeds))]
    denoiser.to(accelerator.device)
    job = _Job(denoiser, seeds, chosen, writer, out, batch_size, accelerator, facts)
    files, rates, kept = [], {}, []
    with ExitStack() as stack:
        for name, sampler in samplers.items():
            pieces = _open_pieces(job, name, sampler, stack)
            rates[name] = _draw(job, name, sampler, pieces)
            files.append(_write(job, name, pieces))
            kept.append(pieces)
        if accelerator.is_main_process:
            for pieces in kept:
                pieces.remove()
        _write_records(job, samplers, facts, as_ranges(seeds), files)
    used = {name: {"nfe": sampler.nfe, **sampler.facts} for name, sampler in samplers.items()}
    shared = {
        **facts,
        "nfe": [sampler.nfe for sampler in samplers.values()],
        "samplers": used,
        "seeds": as_ranges(seeds),
        "format": form,
    }
    return {**shared, "files": files, "images_per_second": rates}


def _open_pieces(job: _Job, name: str, sampler: TimedSampler, stack: ExitStack) -> Pieces:
    """Opens the place where a sampler's finished samples are kept, and holds it for this command."""
    folder, shape, device = job.out / f".{name}.pieces", job.denoiser.sample_shape, job.accelerator.device
    lock = held(folder / "lock", f"{job.out / name}: another process samples to this place")
    let_main(lambda: stack.enter_context(lock), folder, job.accelerator)
    identity = {
        **job.identity, "sampler": sampler.facts, "seeds": _digest(job.seeds), "classes": _digest(job.classes or []),
        "precision": "fp32", "device": device.type, "chunks": chunks_together(shape, device, job.batch_size),
        "versions": versions(),
    }  # fmt: skip
    return Pieces(folder, identity, len(job.seeds), shape)


def _draw(job: _Job, name: str, sampler: TimedSampler, pieces: Pieces) -> float | None:
    """Draws what is missing; returns the images per second, None where nothing was missing."""
    missing = pieces.missing()
    job.accelerator.wait_for_everyone()  # every process has looked before one adds something
    done = len(job.seeds) - len(missing)
    if done:
        say(f"{job.out / name}: goes on after {done:,} of {len(job.seeds):,} samples")
    start = time.monotonic()
    with progress(len(job.seeds), name, "img", done) as advance:
        draw_missing(
            pieces, missing, sampler, job.seeds, job.denoiser.num_classes, job.classes, advance, job.accelerator,
            job.batch_size,
        )  # fmt: skip
    return len(missing) / (time.monotonic() - start) if len(missing) else None


def _write(job: _Job, name: str, pieces: Pieces) -> str:
    """Lets the main process write the samples; returns the file or folder."""
    path = job.out / f"{name}{job.writer.suffix}"
    found = Samples(np.array(job.seeds), pieces.shape, job.denoiser.num_classes > 0, pieces.read)
    let_main(lambda: job.writer.write(path, found), path, job.accelerator)
    return str(path)


def _write_records(
    job: _Job, samplers: dict[str, TimedSampler], facts: dict[str, Any], seeds: str, files: Sequence[str]
) -> None:
    """Writes beside each result how it was made, as NAME.json."""
    if not job.accelerator.is_main_process:
        return
    shared = {
        **facts, "seeds": seeds, "precision": "fp32",
        "quantisation": QUANTISATION, "device": job.accelerator.device.type, "versions": versions(),
    }  # fmt: skip
    for (name, sampler), file in zip(samplers.items(), files, strict=True):
        record = {"file": Path(file).name, "nfe": sampler.nfe, **sampler.facts, **shared}
        write_text(job.out / f"{name}.json", json.dumps(record, indent=1) + "\n")


def _digest(numbers: Sequence[int]) -> str:
    return hashlib.sha256(np.array(numbers, np.int64).tobytes()).hexdigest()


def as_ranges(seeds: Sequence[int]) -> str:
    """Writes numbers in their order as the command line takes them.

    >>> as_ranges([0, 1, 2, 7, 5, 6])
    '0-2,7,5-6'
    """
    array = np.array(seeds)
    stretches = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in stretches)


def _samplers(
    run: RunFolder | Path | None,
    teacher_name: str | None,
    weights: Path | None,
    step: str,
    choice: SamplerChoice,
    nfe: Sequence[int] | None,
) -> tuple[Denoiser, dict[str, TimedSampler], dict[str, Any]]:
    """Returns the denoiser to draw from, title -> sampler for each that is asked for, and what they come from."""
    if run is None:
        denoiser = load_teacher(teacher_name or "", weights).denoiser
        return denoiser, make_samplers(denoiser, None, choice, nfe), {"teacher": teacher_name}
    if not isinstance(run, RunFolder):
        denoiser, form = load_converted(run)
        facts = {"file": str(run), "preconditioning": type(form).__name__}
        return denoiser, make_samplers(denoiser, form, choice, nfe), facts
    student = load_student(run, weights, step)
    say(f"{run.path}: step {student.step}")
    samplers = make_samplers(student.denoiser, student.preconditioning, choice, nfe)
    facts = run_facts(run, student.recipe, student.step, student.denoiser)
    return student.denoiser, samplers, facts


def _check_classes(denoiser: Denoiser, classes: Sequence[int] | None) -> None:
    count = denoiser.num_classes
    if classes is not None and not all(0 <= k < count for k in classes):
        allowed = f"0 to {count - 1}" if count else "none, it is unconditional"
        raise RecipeError(f"--classes: got {list(classes)}; this network has {allowed}")
