"""``cdistill evaluate``: students, teachers and images measured, compared, and measured again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cdistill.commands.measuring import (
    STUDENT,
    UNTRAINED,
    how,
    make_judge,
    measure_student,
    measure_teacher,
    print_table,
    student_samplers,
    write_results,
)
from cdistill.commands.subjects import Subject, Target, open_subject
from cdistill.console import say
from cdistill.errors import RecipeError
from cdistill.evaluation.comparison import as_json, compare_rows, print_comparison
from cdistill.evaluation.judge import Judge
from cdistill.evaluation.results import Row, as_record
from cdistill.evaluation.samples import SampleSet
from cdistill.sampling import SamplerChoice, TimedSampler, default_sampler
from cdistill.storage import write_text
from cdistill.training.loop import make_accelerator

_ALIKE = ("samples", "seeds", "data_sha256", "reference_sha256", "features", "features_sha256")
_USUAL = ("nfe", "samples", "split")  # changes that the name of a record tells


@dataclass(frozen=True)
class Result:
    """One target, measured.

    Attributes:
        title: What tables call it.
        judge: Who measured it.
        rows: The figures.
        record: The figures and how they were made.
    """

    title: str
    judge: Judge
    rows: Sequence[Row]
    record: dict[str, Any]


def evaluate(targets: Sequence[Target], choice: SamplerChoice, out: Path | None) -> dict[str, Any]:
    """Measures each target and prints its table; compares the others with the first on the same seeds.

    Args:
        targets: What to measure.
        choice: The students' sampler; without times, at each NFE of a target's section.
        out: Where the comparison of several is written; beside the first's results by default.

    Returns:
        The record of the only target, or of the comparison.

    Raises:
        RecipeError: Targets that cannot be compared.
    """
    accelerator = make_accelerator("fp32")
    results = [measure(target, choice, accelerator) for target in targets]
    if len(results) == 1:
        return results[0].record
    return _compare(results, out)


def measure(target: Target, choice: SamplerChoice, accelerator: Accelerator, write: bool = True) -> Result:
    """Measures one target.

    Args:
        target: What.
        choice: See `evaluate`.
        accelerator: Devices and processes.
        write: Whether the record and pictures are written.
    """
    subject = open_subject(target)
    for network in (subject.network, subject.untrained, None if subject.teacher is None else subject.teacher.denoiser):
        if network is not None:
            network.to(accelerator.device)
    section, shape = subject.section, subject.shape
    classes = 0 if subject.network is None else subject.network.num_classes
    judge = make_judge(section, shape, classes, subject.teacher, subject.source(accelerator), accelerator)
    say(f"{subject.title}: {len(judge.seeds)} samples of seeds {judge.seeds[0]}..{judge.seeds[-1]}")
    rows, drawn, samplers = _rows(subject, judge, choice)
    facts = {**subject.facts, "samplers": samplers, "request": {"target": asdict(target), "choice": asdict(choice)}}
    name = _name(subject, target, choice)
    if write:
        record = write_results(subject.folder, name, subject.title, judge, rows, drawn, section, facts, name)
    else:
        record = as_record(judge.metrics, rows, **facts, **how(judge, section))
        print_table(subject.title, judge, section, rows)
    return Result(subject.title, judge, rows, record)


def _rows(
    subject: Subject, judge: Judge, choice: SamplerChoice
) -> tuple[list[Row], dict[int, SampleSet], dict[str, Any]]:
    """Returns the rows of a subject, the student's samples and what its samplers were."""
    rows: list[Row] = []
    if subject.images is not None:
        return [judge.measure("images", 0, SampleSet(subject.images.samples[:], None, judge.accelerator))], {}, {}
    if subject.teacher is not None:
        rows += measure_teacher(judge, subject.section.baselines, subject.section.nfe)
    if subject.student is None:
        return rows, {}, {}
    denoiser, form = subject.student
    if subject.untrained is not None:
        rows += measure_student(judge, UNTRAINED, student_samplers(subject.untrained, form, choice, subject.section.nfe))[0]
    samplers = student_samplers(denoiser, form, choice, subject.section.nfe)
    found, drawn = measure_student(judge, STUDENT, samplers)
    named = choice.name or default_sampler(form)
    facts = {str(k): {"sampler": named, "times": s.times.tolist(), "gamma": choice.gamma} for k, s in samplers.items()}
    return rows + found, dict(drawn), facts


def _name(subject: Subject, target: Target, choice: SamplerChoice) -> str:
    """Returns the name of a record: what was measured, and a digest of what is unusual about how."""
    section = subject.section
    step = subject.facts.get("step")
    what = f"step{step}" if step is not None else Path(target.path or f"teacher-{target.teacher}").stem
    name = f"evaluation-{what}-{section.split}{section.samples}-nfe{'-'.join(map(str, section.nfe))}"
    unusual = {key: value for key, value in target.changes.items() if key not in _USUAL}
    if not unusual and choice == SamplerChoice():
        return name
    text = json.dumps([unusual, asdict(choice)], sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _compare(results: Sequence[Result], out: Path | None) -> dict[str, Any]:
    first, found = results[0], []
    for other in results[1:]:
        _check_alike(first, other)
        metrics = dict(first.judge.metrics)
        if first.record["teacher_sha256"] != other.record["teacher_sha256"]:
            metrics.pop("teacher-mse", None)
            say(f"{other.title}: has another teacher than {first.title}; MSE to the teacher is not compared")
        differences = compare_rows(first.rows, other.rows, metrics)
        print_comparison((first.title, other.title), metrics, differences)
        found.append({"first": first.title, "second": other.title, "differences": as_json(differences)})
    record = {"comparisons": found, "records": [result.record for result in results]}
    if out is not None and first.judge.accelerator.is_main_process:
        write_text(out, json.dumps(record, indent=1) + "\n")
        say(f"comparison: {out}")
    return record


def _check_alike(first: Result, other: Result) -> None:
    for key in _ALIKE:
        if first.record[key] != other.record[key]:
            raise RecipeError(
                f"{other.title}: {key} is {str(other.record[key])[:20]}, that of {first.title} "
                f"{str(first.record[key])[:20]}; they are compared on the same seeds and data: set them by options"
            )
