"""Measuring a student beside its teacher, and writing down what came out: for `evaluate` and the end of `distill`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.data.source import QUANTISATION, from_uint8, to_uint8
from cdistill.evaluation.evaluator import Judge
from cdistill.evaluation.features import load_features
from cdistill.evaluation.references import Reference
from cdistill.evaluation.results import Row, as_record, print_rows
from cdistill.evaluation.settings import EvaluationSection
from cdistill.evaluation.statistics_files import find_statistics
from cdistill.networks.denoiser import Denoiser, chunk_size
from cdistill.preconditionings import Preconditioning
from cdistill.registry import FEATURES
from cdistill.reporting.records import STUDENT, UNTRAINED
from cdistill.runtime.console import say
from cdistill.runtime.processes import versions
from cdistill.sampling.image_grids import save_grid
from cdistill.sampling.samplers import SamplerChoice, TimedSampler, default_sampler, make_sampler, sampler_class
from cdistill.storage.files import replacing, write_text
from cdistill.teachers import Teacher


@dataclass(frozen=True)
class Measured:
    """What came out of a measurement.

    Attributes:
        rows: The figures of each sampler.
        drawn: The student's first samples, NFE -> uint8 images (k, C, H, W) or float64 vectors (k, d).
        samplers: The student's samplers as the record describes them, NFE -> name, times, gamma.
    """

    rows: list[Row]
    drawn: dict[int, Tensor] = field(default_factory=dict)
    samplers: dict[str, Any] = field(default_factory=dict)


def make_judge(
    section: EvaluationSection,
    shape: tuple[int, ...],
    num_classes: int,
    teacher: Teacher | None,
    source: Source | None,
    accelerator: Accelerator,
) -> Judge:
    """Returns who measures as a recipe's section says; see :class:`Judge`."""
    network = load_features(section.features)
    if section.features not in FEATURES.names():
        network.check(shape)  # one's own, by its path: it must be there, even if no metric asks for it
    stats = None
    if section.reference is not None:
        stats = find_statistics(section.reference, "" if source is None else source.name)
    reference = Reference(source, stats, accelerator)
    reference.digest()  # a file that is missing or damaged is told before anything is drawn
    seeds = range(section.first_seed, section.first_seed + section.samples)
    return Judge(shape, num_classes, teacher, reference, network, section.metrics, seeds, accelerator)


def measure(
    judge: Judge,
    section: EvaluationSection,
    choice: SamplerChoice,
    student: tuple[Denoiser, Preconditioning] | None,
    untrained: Denoiser | None,
) -> Measured:
    """Measures the teacher, the student before training and the student, as far as there are such.

    Args:
        judge: On whose device all networks are.
        section: How, and the numbers of network calls.
        choice: The students' sampler; without times, at each NFE of the section.
        student: D(x, t, s), and f and g.
        untrained: The student before training.
    """
    baselines = teacher_samplers(judge, section.baselines, section.nfe)  # a mistake is told before anything is drawn
    if student is None:
        return Measured(measure_teacher(judge, baselines))
    denoiser, form = student
    samplers = student_samplers(denoiser, form, choice, section.nfe)
    before = {} if untrained is None else student_samplers(untrained, form, choice, section.nfe)
    rows = measure_teacher(judge, baselines) + measure_student(judge, UNTRAINED, before)[0]
    found, drawn = measure_student(judge, STUDENT, samplers, section.grid_images)
    name = choice.name or default_sampler(form)
    used = {str(k): {"sampler": name, "times": s.times.tolist(), "gamma": choice.gamma} for k, s in samplers.items()}
    return Measured(rows + found, drawn, used)


def student_samplers(
    denoiser: Denoiser, form: Preconditioning, choice: SamplerChoice, nfe: Sequence[int]
) -> dict[int, TimedSampler]:
    """Returns the sampler that is chosen at each NFE, or the one on the times that are chosen."""
    if choice.times is not None:
        sampler = make_sampler(denoiser, form, **vars(choice))
        return {sampler.nfe: sampler}
    return {calls: make_sampler(denoiser, form, **vars(replace(choice, nfe=calls))) for calls in nfe}


def teacher_samplers(judge: Judge, baselines: Sequence[str], nfe: Sequence[int]) -> dict[tuple[str, int], TimedSampler]:
    """Returns each of `baselines` at each NFE that it can spend; none without a teacher."""
    if judge.teacher is None:
        return {}
    return {
        (name, calls): make_sampler(judge.teacher.denoiser, None, name, calls)
        for name in baselines
        for calls in nfe
        if calls % sampler_class(name, "teacher").calls_per_step == 0
    }


def measure_teacher(judge: Judge, baselines: Mapping[tuple[str, int], TimedSampler]) -> list[Row]:
    """Measures the teacher by Heun's solver, and by other solvers; nothing without a teacher."""
    if judge.teacher is None:
        return []
    return [judge.judge_teacher()] + [
        judge.measure(f"teacher ({name})", calls, judge.draw(sampler, f"{name}, {calls} NFE"))
        for (name, calls), sampler in baselines.items()
    ]


def measure_student(
    judge: Judge, name: str, samplers: Mapping[int, TimedSampler], kept: int = 0
) -> tuple[list[Row], dict[int, Tensor]]:
    """Measures a student with each sampler; returns the rows, and the first `kept` samples behind each."""
    rows, shown = [], {}
    for calls, sampler in samplers.items():
        samples = judge.draw(sampler, f"{name}, {calls} NFE")
        rows.append(judge.measure(name, calls, samples))
        shown[calls] = samples.samples[:kept].clone()  # and no more: all of all would not fit
    return rows, shown


def save_images(folder: Path, name: str, judge: Judge, drawn: Mapping[int, Tensor]) -> Path | None:
    """Shows the first seeds at every NFE, the teacher's above: ``samples/NAME.png``, and the arrays as ``.npz``.

    Returns:
        The PNG; None for vectors.
    """
    if len(judge.shape) != 3 or not drawn:
        return None
    count = len(next(iter(drawn.values())))
    parts = {"teacher": to_uint8(judge.teacher_ends(count))} if judge.teacher is not None else {}
    parts |= {f"nfe{calls}": samples for calls, samples in drawn.items()}
    path = folder / "samples" / f"{name}.png"
    if judge.accelerator.is_main_process:
        labels = [key if key == "teacher" else f"{key.removeprefix('nfe')} NFE" for key in parts]
        save_grid(path, from_uint8(torch.cat(list(parts.values()))), count, labels)
        arrays = {key: part.numpy() for key, part in parts.items()}
        with replacing(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, seeds=np.array(judge.seeds[:count]), **arrays)
    return path


def write_results(
    folder: Path,
    name: str,
    title: str,
    judge: Judge,
    found: Measured,
    section: EvaluationSection,
    facts: Mapping[str, Any],
    images: str,
) -> dict[str, Any]:
    """Prints the table, and writes ``NAME.json`` and pictures; returns the record.

    Args:
        folder: Where to.
        name: Of the record.
        title: What was measured.
        judge: Who measured it.
        found: The figures and samples.
        section: How it was measured.
        facts: Whatever else belongs into the record.
        images: Name of the pictures.
    """
    path = save_images(folder, images, judge, found.drawn)
    shown = {} if path is None else {"images": str(path.with_suffix(".npz").relative_to(folder))}
    record = make_record(judge, found, section, {**facts, **shown})
    if judge.accelerator.is_main_process:
        print_table(title, judge, section, found.rows)
        write_text(folder / f"{name}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        say(f"results: {folder / name}.json" + (f"   samples: {path}" if path else ""))
    return record


def print_table(title: str, judge: Judge, section: EvaluationSection, rows: Sequence[Row]) -> None:
    """Prints the table of results."""
    source = judge.reference.source
    real = section.reference if source is None else f"{source.name} ({section.split})"
    print_rows(f"{title}: {len(judge.seeds)} samples against {real}", judge.metrics, rows)


def make_record(judge: Judge, found: Measured, section: EvaluationSection, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures, `facts`, and what else the figures depend on, as JSON."""
    source, teacher = judge.reference.source, judge.teacher
    how = {
        "samples": len(judge.seeds),
        "split": section.split,
        "quantisation": QUANTISATION,
        "teacher": None if teacher is None else teacher.name,
        "teacher_sha256": None if teacher is None else teacher.digest,
        "data": None if source is None else source.name,
        "data_sha256": None if source is None else source.digest,
        "reference_sha256": judge.reference.digest(),
        "network_batch": chunk_size(judge.shape),
        "precision": "fp32",
        "kept_features": judge.reference.keep,
        "device": judge.accelerator.device.type,
        "processes": judge.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return as_record(judge.metrics, found.rows, **facts, **how, samplers=found.samplers)
