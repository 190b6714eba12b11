"""A whole evaluation: a student beside its teacher and itself before training, its record and its pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdistill.data.source import to_uint8
from cdistill.evaluation.evaluator import Evaluator
from cdistill.evaluation.records import STUDENT, UNTRAINED, Evaluation, Row, to_json
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning
from cdistill.runtime.console import rescuing
from cdistill.sampling.image_grids import tile
from cdistill.sampling.samplers import (
    SamplerChoice,
    TimedSampler,
    default_sampler,
    make_sampler,
    make_samplers,
    sampler_class,
)
from cdistill.storage.files import replacing
from cdistill.storage.own_words import write_own

Network = tuple[Denoiser, Preconditioning]
"""A student: D(x, t, s), and f and g."""


def evaluate_networks(
    evaluator: Evaluator,
    choice: SamplerChoice,
    student: Network | None,
    untrained: Denoiser | None = None,
    **facts: Any,
) -> Evaluation:
    """Measures the teacher, the student before training and the student, as far as there are such.

    All networks are on the evaluator's device. Without times in `choice`, the students' sampler, it runs at each NFE of
    the evaluator's section; `facts` is what else the record says. RecipeError before anything is drawn.
    """
    baselines = _baselines(evaluator)
    if student is None:
        return evaluator.evaluation(_measure_teacher(evaluator, baselines), **facts, **evaluator.facts(), samplers={})
    denoiser, preconditioning = student
    samplers = _samplers(evaluator, choice, denoiser, preconditioning)
    before = {} if untrained is None else _samplers(evaluator, choice, untrained, preconditioning)
    rows = _measure_teacher(evaluator, baselines) + _measure(evaluator, UNTRAINED, before)
    drawn: dict[int, Tensor] = {}
    rows += _measure(evaluator, STUDENT, samplers, drawn)
    name = choice.name or default_sampler(preconditioning)
    used = {
        str(calls): {"sampler": name, "times": sampler.times.tolist(), "gamma": choice.gamma}
        for calls, sampler in samplers.items()
    }
    evaluation = evaluator.evaluation(rows, **facts, **evaluator.facts(), samplers=used)
    evaluation.drawn.update(drawn)
    return evaluation


def evaluate_student(evaluator: Evaluator, student: Network) -> Evaluation:
    """Measures a student alone by its default sampler, as during a training; the record holds figures only."""
    drawn: dict[int, Tensor] = {}
    samplers = _samplers(evaluator, SamplerChoice(), *student)
    evaluation = evaluator.evaluation(_measure(evaluator, STUDENT, samplers, drawn))
    evaluation.drawn.update(drawn)
    return evaluation


def _samplers(
    evaluator: Evaluator, choice: SamplerChoice, denoiser: Denoiser, preconditioning: Preconditioning
) -> dict[int, TimedSampler]:
    """Returns the sampler that is chosen at each NFE, or the one on the times that are chosen."""
    calls = evaluator.section.nfe if choice.times is None else None
    built = make_samplers(denoiser, preconditioning, choice, calls)
    return {sampler.nfe: sampler for sampler in built.values()}


def _baselines(evaluator: Evaluator) -> dict[tuple[str, int], TimedSampler]:
    """Returns each of the teacher's baselines at each NFE that it can spend; none without a teacher."""
    teacher, section = evaluator.teacher, evaluator.section
    if teacher is None:
        return {}
    return {
        (name, nfe): make_sampler(teacher.denoiser, None, name, nfe)
        for name in section.baselines
        for nfe in section.nfe
        if nfe % sampler_class(name, "teacher").calls_per_step == 0
    }


def _measure_teacher(evaluator: Evaluator, baselines: Mapping[tuple[str, int], TimedSampler]) -> list[Row]:
    """Measures the teacher by Heun's solver, and by other solvers; nothing without a teacher."""
    if evaluator.teacher is None:
        return []
    return [evaluator.measure_teacher()] + [
        evaluator.measure(f"teacher ({name})", nfe, evaluator.draw(sampler, f"{name}, {nfe} NFE"))
        for (name, nfe), sampler in baselines.items()
    ]


def _measure(
    evaluator: Evaluator, name: str, samplers: Mapping[int, TimedSampler], drawn: dict[int, Tensor] | None = None
) -> list[Row]:
    """Measures a student with each sampler; keeps the first samples in `drawn`."""
    rows = []
    for nfe, sampler in samplers.items():
        samples = evaluator.draw(sampler, f"{name}, {nfe} NFE")
        rows.append(evaluator.measure(name, nfe, samples))
        if drawn is not None:
            drawn[nfe] = samples.samples[: evaluator.section.grid_images].clone()  # all of all would not fit
    return rows


def save_evaluation(
    evaluator: Evaluator, evaluation: Evaluation, folder: Path, name: str, images: str | None = None
) -> Evaluation:
    """Writes ``NAME.json`` and the pictures, see `save_images`; returns the record as it was written."""
    with rescuing(evaluation.table()):
        return _save_evaluation(evaluator, evaluation, folder, name, images)


def _save_evaluation(
    evaluator: Evaluator, evaluation: Evaluation, folder: Path, name: str, images: str | None
) -> Evaluation:
    picture = save_images(evaluator, folder, images or name, evaluation.drawn)
    if picture is not None:
        shown = str(picture.with_suffix(".npz").relative_to(folder))
        evaluation = evaluation.model_copy(update={"images": shown})
    evaluation._path = folder / f"{name}.json"
    if evaluator.accelerator.is_main_process:
        write_own(evaluation._path, to_json(evaluation))
    return evaluation


def save_images(evaluator: Evaluator, folder: Path, name: str, drawn: Mapping[int, Tensor]) -> Path | None:
    """Shows the first seeds at every NFE, the teacher's above: ``samples/NAME.png``, and the arrays as ``.npz``.

    Returns the PNG; None for vectors, or where nothing was drawn.
    """
    if len(evaluator.shape) != 3 or not drawn:
        return None
    count = len(next(iter(drawn.values())))
    shown = {"teacher": to_uint8(evaluator.teacher_endpoints(count))} if evaluator.teacher is not None else {}
    shown |= {f"nfe{nfe}": samples for nfe, samples in drawn.items()}
    path = folder / "samples" / f"{name}.png"
    if evaluator.accelerator.is_main_process:
        labels = [key if key == "teacher" else f"{key.removeprefix('nfe')} NFE" for key in shown]
        with replacing(path) as temporary:
            tile(torch.cat(list(shown.values())).numpy(), count, labels).save(temporary, "PNG")
        arrays = {key: samples.numpy() for key, samples in shown.items()}
        with replacing(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, seeds=np.array(evaluator.seeds[:count]), **arrays)
    return path
