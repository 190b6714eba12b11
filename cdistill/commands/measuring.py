"""Measuring a student beside its teacher, and writing down what came out: for `evaluate` and the end of `distill`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from cdistill.commands.common import versions
from cdistill.commands.samplers import optimised_samplers
from cdistill.console import say
from cdistill.data import Source
from cdistill.data.source import from_uint8, to_uint8
from cdistill.errors import RecipeError
from cdistill.evaluation.features import load_features
from cdistill.evaluation.judge import Judge
from cdistill.evaluation.references import Reference
from cdistill.evaluation.results import Row, as_record, print_rows
from cdistill.evaluation.samples import SampleSet
from cdistill.networks.denoiser import Denoiser, chunk_size
from cdistill.pictures import save_grid
from cdistill.preconditionings import Preconditioning
from cdistill.recipe import EvaluationSection
from cdistill.sampling import SamplerChoice, TimedSampler, default_sampler, sampler_class
from cdistill.storage import replacing, write_text
from cdistill.teachers import Teacher

STUDENT, UNTRAINED = "student", "untrained student"


@dataclass(frozen=True)
class Measured:
    """What came out of a measurement.

    Attributes:
        rows: The figures of each sampler.
        drawn: The student's samples, NFE -> samples.
        samplers: The student's samplers as the record describes them, NFE -> name, times, gamma.
    """

    rows: list[Row]
    drawn: dict[int, SampleSet] = field(default_factory=dict)
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
    reference = Reference(source, Path(section.reference) if section.reference else None, accelerator)
    seeds = range(section.first_seed, section.first_seed + section.samples)
    return Judge(shape, num_classes, teacher, reference, network, section.metrics, seeds, accelerator)


def measure(
    judge: Judge,
    section: EvaluationSection,
    choice: SamplerChoice,
    student: tuple[Denoiser, Preconditioning] | None,
    untrained: Denoiser | None,
    optimise: bool = False,
) -> Measured:
    """Measures the teacher, the student before training and the student, as far as there are such.

    Args:
        judge: On whose device all networks are.
        section: How, and the numbers of network calls.
        choice: The students' sampler; without times, at each NFE of the section.
        student: D(x, t, s), and f and g.
        untrained: The student before training.
        optimise: Whether the student's times are moved to where it ends nearest to the teacher.

    Raises:
        RecipeError: Times are to be moved, and there is no teacher.
    """
    rows = [] if judge.teacher is None else measure_teacher(judge, section.baselines, section.nfe)
    if student is None:
        return Measured(rows)
    denoiser, form = student
    if untrained is not None:
        rows += measure_student(judge, UNTRAINED, student_samplers(untrained, form, choice, section.nfe))[0]
    samplers = student_samplers(denoiser, form, choice, section.nfe)
    if optimise:
        if judge.teacher is None:
            raise RecipeError("--optimise-steps: there is no teacher to follow; name one with --teacher")
        named = {str(calls): sampler for calls, sampler in samplers.items()}
        moved = optimised_samplers(choice, student, judge.teacher, named, judge.accelerator)
        samplers = dict(zip(samplers, moved.values(), strict=True))
    found, drawn = measure_student(judge, STUDENT, samplers)
    name = choice.name or default_sampler(form)
    used = {str(k): {"sampler": name, "times": s.times.tolist(), "gamma": choice.gamma} for k, s in samplers.items()}
    return Measured(rows + found, drawn, used)


def student_samplers(
    denoiser: Denoiser, form: Preconditioning, choice: SamplerChoice, nfe: Sequence[int]
) -> dict[int, TimedSampler]:
    """Returns the sampler that is chosen at each NFE, or the one on the times that are chosen."""
    if choice.times is not None:
        sampler = choice.build(denoiser, form)
        return {sampler.nfe: sampler}
    return {calls: replace(choice, nfe=calls).build(denoiser, form) for calls in nfe}


def measure_teacher(judge: Judge, baselines: Sequence[str], nfe: Sequence[int]) -> list[Row]:
    """Measures the teacher by Heun's solver, and by each of `baselines` at each NFE that it can spend."""
    rows = [judge.judge_teacher()]
    if judge.teacher is None:
        return rows
    for name in baselines:
        for calls in nfe:
            if calls % sampler_class(name, "teacher").calls_per_step == 0:
                sampler = SamplerChoice(name, calls).build(judge.teacher.denoiser, None)
                rows.append(judge.measure(f"teacher ({name})", calls, judge.draw(sampler, f"{name}, {calls} NFE")))
    return rows


def measure_student(
    judge: Judge, name: str, samplers: Mapping[int, TimedSampler]
) -> tuple[list[Row], dict[int, SampleSet]]:
    """Measures a student with each sampler; returns the rows and the samples behind them."""
    drawn = {calls: judge.draw(sampler, f"{name}, {calls} NFE") for calls, sampler in samplers.items()}
    return [judge.measure(name, calls, samples) for calls, samples in drawn.items()], drawn


def save_images(folder: Path, name: str, judge: Judge, drawn: Mapping[int, SampleSet], count: int) -> Path | None:
    """Shows the first seeds at every NFE, the teacher's above: ``samples/NAME.png``, and the arrays as ``.npz``.

    Returns:
        The PNG; None for vectors.
    """
    if len(judge.shape) != 3 or not drawn:
        return None
    count = min(count, len(judge.seeds))
    parts = {"teacher": to_uint8(judge.teacher_ends(count))} if judge.teacher is not None else {}
    parts |= {f"nfe{calls}": samples.samples[:count] for calls, samples in drawn.items()}
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
    path = save_images(folder, images, judge, found.drawn, section.grid_images)
    shown = {} if path is None else {"images": str(path.with_suffix(".npz").relative_to(folder))}
    record = make_record(judge, found, section, {**facts, **shown})
    if judge.accelerator.is_main_process:
        write_text(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
        print_table(title, judge, section, found.rows)
        say(f"results: {folder / name}.json" + (f"   samples: {path}" if path else ""))
    return record


def print_table(title: str, judge: Judge, section: EvaluationSection, rows: Sequence[Row]) -> None:
    """Prints the table of results."""
    source = judge.reference.source
    real = section.reference if source is None else f"{source.name} ({section.split})"
    print_rows(f"{title}: {len(judge.seeds)} samples against {real}, ± 95 %", judge.metrics, rows)


def make_record(judge: Judge, found: Measured, section: EvaluationSection, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures, `facts`, and what else the figures depend on, as JSON."""
    source, teacher = judge.reference.source, judge.teacher
    how = {
        "samples": len(judge.seeds),
        "seeds": f"{judge.seeds[0]}..{judge.seeds[-1]}",
        "split": section.split,
        "quantisation": "uint8 = clamp(127.5 x + 128)",
        "teacher": None if teacher is None else teacher.name,
        "teacher_sha256": None if teacher is None else teacher.digest,
        "data": None if source is None else source.name,
        "data_sha256": None if source is None else source.digest,
        "reference_sha256": judge.reference.digest(),
        "network_batch": chunk_size(judge.shape),
        "precision": "fp32",
        "device": str(judge.accelerator.device),
        "processes": judge.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return as_record(judge.metrics, found.rows, **facts, **how, samplers=found.samplers)
