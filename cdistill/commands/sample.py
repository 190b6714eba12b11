"""``cdistill sample``: images of a student or of a teacher as files."""

from collections.abc import Sequence
from pathlib import Path

from cdistill.console import progress, say
from cdistill.errors import CdistillError, RecipeError
from cdistill.networks.denoiser import Denoiser
from cdistill.pictures import save_arrays, save_grid, save_images
from cdistill.runs import RunFolder
from cdistill.sampling import Sampler, generate, student_sampler, teacher_sampler
from cdistill.student import load_converted, load_student
from cdistill.teachers import load_teacher
from cdistill.training.loop import make_accelerator


def sample(
    run: RunFolder | Path | None,
    teacher_name: str | None,
    weights: Path | None,
    step: str,
    nfe: Sequence[int],
    seeds: Sequence[int],
    classes: Sequence[int] | None,
    form: str,
    out: Path,
) -> list[Path]:
    """Draws samples of a run's student at each NFE, or of a teacher by Heun's solver, and writes them.

    Args:
        run: The run, the file of a converted student, or None for a teacher.
        teacher_name: The teacher, where `run` is None.
        weights: File of the teacher's weights, where it is in no usual place.
        step: Which student of the run, see `load_student`.
        nfe: Numbers of network calls; unused for a teacher.
        seeds: One sample each.
        classes: Classes to draw, repeated along the seeds; None draws them from the seeds.
        form: "grid", "png" or "npz".
        out: Folder.

    Returns:
        What was written.
    """
    denoiser, samplers = _samplers(run, teacher_name, weights, step, nfe)
    _check_request(denoiser, classes, form)
    accelerator = make_accelerator("fp32")
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
    run: RunFolder | Path | None, teacher_name: str | None, weights: Path | None, step: str, nfe: Sequence[int]
) -> tuple[Denoiser, dict[str, Sampler]]:
    """Returns the denoiser to draw from, and a sampler for each NFE, or the teacher's one."""
    if run is None:
        denoiser = load_teacher(teacher_name or "", weights).denoiser
        return denoiser, {"teacher": teacher_sampler(denoiser)}
    if isinstance(run, RunFolder):
        student = load_student(run, weights, step)
        say(f"{run.path}: step {student.step}")
        denoiser, form = student.denoiser, student.preconditioning
    else:
        denoiser, form = load_converted(run)
    return denoiser, {f"nfe{k}": student_sampler(denoiser, form, k) for k in nfe}


def _check_request(denoiser: Denoiser, classes: Sequence[int] | None, form: str) -> None:
    count = denoiser.num_classes
    if classes is not None and not all(0 <= k < count for k in classes):
        allowed = f"0 to {count - 1}" if count else "none, it is unconditional"
        raise RecipeError(f"--classes: got {list(classes)}; this network has {allowed}")
    if form != "npz" and len(denoiser.sample_shape) != 3:
        raise CdistillError(f"--format {form}: this network draws vectors, not pictures; use --format npz")
