"""``cdistill sample``: images of a student or of a teacher as files."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from cdistill.commands.samplers import Request, optimised_samplers, requested_samplers
from cdistill.console import progress, say
from cdistill.errors import CdistillError, RecipeError
from cdistill.networks.denoiser import Denoiser
from cdistill.pictures import save_arrays, save_grid, save_images
from cdistill.runs import RunFolder
from cdistill.sampling import TimedSampler, generate
from cdistill.student import load_converted, load_student
from cdistill.teachers import load_teacher
from cdistill.training.loop import make_accelerator


def sample(
    run: RunFolder | Path | None,
    teacher_name: str | None,
    weights: Path | None,
    step: str,
    request: Request,
    seeds: Sequence[int],
    classes: Sequence[int] | None,
    form: str,
    out: Path,
) -> list[Path]:
    """Draws samples of a run's student or of a teacher with each sampler that is asked for, and writes them.

    Args:
        run: The run, the file of a converted student, or None for a teacher.
        teacher_name: The teacher, where `run` is None.
        weights: File of the teacher's weights, where it is in no usual place.
        step: Which student of the run, see `load_student`.
        request: The samplers.
        seeds: One sample each.
        classes: Classes to draw, repeated along the seeds; None draws them from the seeds.
        form: "grid", "png" or "npz".
        out: Folder.

    Returns:
        What was written.
    """
    accelerator = make_accelerator("fp32")
    denoiser, samplers = _samplers(run, teacher_name, weights, step, request, accelerator)
    _check_request(denoiser, classes, form)
    denoiser.to(accelerator.device)
    chosen = None if classes is None else [classes[k % len(classes)] for k in range(len(seeds))]
    written = []
    for name, sampler in samplers.items():
        with progress(len(seeds), name, "img") as advance:
            samples, labels = generate(
                sampler, denoiser.sample_shape, seeds, denoiser.num_classes, chosen,
                accelerator.device, advance, accelerator,
            )  # fmt: skip
        if not accelerator.is_main_process:
            continue
        if form == "grid":
            written.append(out / f"{name}.png")
            save_grid(written[-1], samples)
        elif form == "png":
            written.append(out / name)
            save_images(written[-1], samples, list(seeds))
        else:
            written.append(out / f"{name}.npz")
            save_arrays(written[-1], samples, labels, list(seeds))
    return written


def _samplers(
    run: RunFolder | Path | None,
    teacher_name: str | None,
    weights: Path | None,
    step: str,
    request: Request,
    accelerator: Accelerator,
) -> tuple[Denoiser, dict[str, TimedSampler]]:
    """Returns the denoiser to draw from, and title -> sampler for each that is asked for."""
    if run is None:
        denoiser = load_teacher(teacher_name or "", weights).denoiser
        return denoiser, requested_samplers(request, denoiser, None)
    if not isinstance(run, RunFolder):
        denoiser, form = load_converted(run)
        return denoiser, requested_samplers(request, denoiser, form)
    student = load_student(run, weights, step)
    say(f"{run.path}: step {student.step}")
    samplers = requested_samplers(request, student.denoiser, student.preconditioning)
    if request.optimise:
        samplers = optimised_samplers(request, student, samplers, accelerator)
    return student.denoiser, samplers


def _check_request(denoiser: Denoiser, classes: Sequence[int] | None, form: str) -> None:
    count = denoiser.num_classes
    if classes is not None and not all(0 <= k < count for k in classes):
        allowed = f"0 to {count - 1}" if count else "none, it is unconditional"
        raise RecipeError(f"--classes: got {list(classes)}; this network has {allowed}")
    if form != "npz" and len(denoiser.sample_shape) != 3:
        raise CdistillError(f"--format {form}: this network draws vectors, not pictures; use --format npz")
