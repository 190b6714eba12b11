"""``cdistill evaluate`` and ``cdistill sample``, and the results that ``distill`` ends with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdistill.commands.common import open_data, versions
from cdistill.console import say
from cdistill.evaluation.judge import Judge
from cdistill.evaluation.results import Row, as_record, print_rows
from cdistill.networks.denoiser import Denoiser
from cdistill.pictures import save_grid
from cdistill.preconditionings import Preconditioning
from cdistill.recipe import EvaluationSection, check_section
from cdistill.runs import RunFolder
from cdistill.storage import read_json, write_text
from cdistill.student import load_student, untrained_student
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
