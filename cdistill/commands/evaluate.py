"""``cdistill evaluate`` and ``cdistill sample``, and the results that ``distill`` ends with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdistill.commands.common import open_data, versions
from cdistill.console import progress, say
from cdistill.errors import CdistillError, RecipeError
from cdistill.evaluation.judge import Judge
from cdistill.evaluation.results import Row, as_record, print_rows
from cdistill.networks.denoiser import Denoiser
from cdistill.pictures import save_arrays, save_grid, save_images
from cdistill.preconditionings import Preconditioning
from cdistill.recipe import EvaluationSection, check_section
from cdistill.runs import RunFolder
from cdistill.sampling import Sampler, generate, student_sampler, teacher_sampler
from cdistill.storage import read_json, write_text
from cdistill.student import load_converted, load_student, untrained_student
from cdistill.teachers import load_teacher
from cdistill.training.loop import make_accelerator


def evaluate(run: RunFolder, weights: Path | None, step: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Measures a student of a run, the untrained student and the teacher.

    Args:
        run: The run.
        weights: File of its teacher's weights, where it has moved since.
        step: Which student, see `load_student`.
        changes: Values that replace those of the recipe's evaluation section.

    Returns:
        The record, which is written beside the run's own ``evaluation.json``, under a name of its own.
    """
    student = load_student(run, weights, step)
    values = {**student.recipe.evaluation.model_dump(), **changes}
    section = check_section(values, EvaluationSection, "evaluate")
    accelerator = make_accelerator("fp32")
    student.teacher.denoiser.to(accelerator.device)
    source = open_data(student.recipe.data, section.split, student.teacher, accelerator)
    student.denoiser.to(accelerator.device)
    judge = Judge(student.teacher, source, section.samples, section.metrics, accelerator)
    say(f"{run.path}: step {student.step}, {section.samples} samples of seeds 0..{section.samples - 1}")
    untrained = untrained_student(student.teacher, student.recipe)
    name = f"evaluation-step{student.step}-{section.split}{section.samples}-nfe{'-'.join(map(str, section.nfe))}"
    report(run, judge, untrained, student.denoiser, student.preconditioning, section, student.step, name)
    judge.wait()
    return read_json(run.path / f"{name}.json")


def report(
    run: RunFolder,
    judge: Judge,
    untrained: Denoiser,
    trained: Denoiser,
    form: Preconditioning,
    section: EvaluationSection,
    step: int,
    name: str = "evaluation",
) -> list[Row]:
    """Measures teacher, untrained and trained student; prints the table, writes `name`.json and a picture."""
    rows = [judge.judge_teacher()]
    rows += judge.judge_student("untrained student", untrained.to(judge.device), form, section.nfe)[0]
    students, drawn = judge.judge_student("student", trained, form, section.nfe)
    rows += students
    own = f"step-{step:08d}" if name == "evaluation" else name
    grid = draw_grid(run, judge, drawn, section, own)
    record = as_record(
        rows,
        run=str(run.path),
        step=step,
        samples=section.samples,
        seeds=f"0..{section.samples - 1}",
        split=section.split,
        quantisation="uint8 = clamp(127.5 x + 128)",
        teacher=judge.teacher.name,
        teacher_sha256=judge.teacher.digest,
        data_sha256=judge.source.digest,
        device=str(judge.device),
        versions=versions(),
    )
    if judge.main:
        write_text(run.path / f"{name}.json", json.dumps(record, indent=1) + "\n")
        title = f"{run.path}, step {step}: {section.samples} samples against {judge.source.name} ({section.split})"
        print_rows(title, judge.metrics, rows)
        say(f"results: {run.path / name}.json" + (f"   samples: {grid}" if grid else ""))
    return rows


def draw_grid(
    run: RunFolder, judge: Judge, drawn: Sequence[Tensor], section: EvaluationSection, name: str
) -> Path | None:
    """Shows the first seeds at every NFE, the teacher's above, as one picture; None for vectors.

    Args:
        run: The run.
        judge: Who has the teacher's samples.
        drawn: The student's samples (n, ...) at each NFE of the section.
        section: How many images.
        name: The file's, without its ending.
    """
    if len(judge.teacher.shape) != 3:
        return None
    count = min(section.grid_images, section.samples)
    rows = [part[:count] for part in [judge.reference.teacher_samples, *drawn]]
    path = run.path / "samples" / f"{name}.png"
    if judge.main:
        save_grid(path, torch.cat(rows), count, ["teacher", *[f"{calls} NFE" for calls in section.nfe]])
    return path


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
