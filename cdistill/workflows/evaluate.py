"""``cdistill evaluate``: students, teachers and images measured, compared, and measured again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cdistill.errors import CorruptFileError, MismatchError, MissingAssetError, RecipeError
from cdistill.evaluation.checking import Repeated, changes, describe, repeated
from cdistill.evaluation.comparison import as_json, compare_rows, print_comparison
from cdistill.evaluation.evaluator import Judge
from cdistill.evaluation.metrics import SampleSet
from cdistill.evaluation.results import Row
from cdistill.reporting.records import STUDENT
from cdistill.runtime.console import say, table
from cdistill.sampling.samplers import SamplerChoice
from cdistill.storage.files import read_json, write_text
from cdistill.training.loop import make_accelerator
from cdistill.workflows.measuring import Measured, make_judge, make_record, measure, write_results
from cdistill.workflows.targets import Subject, Target, open_subject

_ALIKE = ("samples", "seeds", "data_sha256", "reference_sha256")
IMAGES = "images"
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
    subjects = [open_subject(target) for target in targets]  # all, before the first is measured
    for target, subject in zip(targets, subjects, strict=True):
        _check_options(target, subject, choice)
    _check_common(subjects, choice)
    if len(targets) == 1 and "run" in subjects[0].facts and (targets[0].teacher or targets[0].data):
        raise RecipeError(f"{subjects[0].title}: a run knows its teacher and its data; leave out --teacher and --data")
    accelerator = make_accelerator("fp32")
    results = [measure_target(*pair, choice, accelerator) for pair in zip(targets, subjects, strict=True)]
    if len(results) == 1:
        return results[0].record
    return _compare(
        results, out or subjects[0].folder / f"comparison-{_digest([asdict(part) for part in targets])}.json"
    )


def _check_options(target: Target, subject: Subject, choice: SamplerChoice) -> None:
    """Refuses options that would do nothing.

    Raises:
        RecipeError: There are such.
    """
    given = {"--sampler": choice.name, "--times": choice.times, "--gamma": choice.gamma}
    asked = [name for name, value in given.items() if value is not None]
    if asked and subject.student is None:
        raise RecipeError(f"{subject.title}: {', '.join(asked)}: goes with a student; --baselines measures solvers")
    if choice.times is not None and "nfe" in target.changes:
        raise RecipeError("--times: the times say how many network calls there are; leave --nfe out")
    if "nfe" in target.changes and subject.student is None and not subject.section.baselines:
        raise RecipeError(f"{subject.title}: --nfe: goes with a student, or with --baselines")
    if subject.images is not None and {"first_seed", "baselines"} & target.changes.keys():
        raise RecipeError(f"{subject.title}: --first-seed, --baselines: go with networks; images are taken as they are")
    if target.step != "last" and "run" not in subject.facts:
        raise RecipeError(f"{subject.title}: --step: goes with a run; it is of one step alone")


def _check_common(subjects: Sequence[Subject], choice: SamplerChoice) -> None:
    """Raises RecipeError unless the others have something in common with the first that can be compared."""
    first = subjects[0]
    for other in subjects[1:]:
        if (first.images is None) != (other.images is None) or (first.student is None) != (other.student is None):
            raise RecipeError(
                f"{other.title}: cannot be compared with {first.title}: students go with students, images with images"
            )
        if choice.times is None and first.student and not set(first.section.nfe) & set(other.section.nfe):
            raise RecipeError(
                f"{other.title}: NFE {other.section.nfe}, {first.title} {first.section.nfe}: none in common; give --nfe"
            )


def measure_target(
    target: Target, subject: Subject, choice: SamplerChoice, accelerator: Accelerator, write: bool = True
) -> Result:
    """Measures one target.

    Args:
        target: What a person asked for.
        subject: It, opened.
        choice: See `evaluate`.
        accelerator: Devices and processes.
        write: Whether the record and pictures are written.
    """
    for network in (subject.network, subject.untrained, None if subject.teacher is None else subject.teacher.denoiser):
        if network is not None:
            network.to(accelerator.device)
    section, shape = subject.section, subject.shape
    classes = 0 if subject.network is None else subject.network.num_classes
    judge = make_judge(section, shape, classes, subject.teacher, subject.source(accelerator), accelerator)
    if subject.images is not None:
        say(f"{subject.title}: {len(subject.images)} images")
        images = SampleSet(subject.images.samples[:], None, accelerator)
        found = Measured([judge.measure(IMAGES, 0, images)])
    else:
        say(f"{subject.title}: {len(judge.seeds)} samples of seeds {judge.seeds[0]}..{judge.seeds[-1]}")
        found = measure(judge, section, choice, subject.student, subject.untrained)
    asked = replace(target, step=str(subject.facts.get("step", target.step)))  # "last" may be another one tomorrow
    seeds = None if subject.images is not None else f"{judge.seeds[0]}..{judge.seeds[-1]}"
    facts = {**subject.facts, "seeds": seeds, "request": {"target": asdict(asked), "choice": asdict(choice)}}
    if not write:
        return Result(subject.title, judge, found.rows, make_record(judge, found, section, facts))
    name = _name(subject, target, choice)
    record = write_results(subject.folder, name, subject.title, judge, found, section, facts, name)
    return Result(subject.title, judge, found.rows, record)


def _name(subject: Subject, target: Target, choice: SamplerChoice) -> str:
    """Returns the name of a record: what was measured, and a digest of what is unusual about how."""
    section = subject.section
    step = subject.facts.get("step")
    what = f"step{step}" if step is not None else Path(target.path or f"teacher-{target.teacher}").name
    calls = f"-nfe{'-'.join(map(str, section.nfe))}" if subject.student is not None else ""
    name = f"evaluation-{what}-{section.split}{section.samples}{calls[:40]}"
    if step is None:
        return f"{name}-{_digest([asdict(target), asdict(choice)])}"
    unusual = {key: value for key, value in target.changes.items() if key not in _USUAL}
    if not (unusual or len(calls) > 40) and choice == SamplerChoice():
        return name
    return f"{name}-{_digest([unusual, asdict(choice), section.nfe])}"


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _compare(results: Sequence[Result], out: Path) -> dict[str, Any]:
    first, found = results[0], []
    for other in results[1:]:
        _check_alike(first, other)
        described, others = first.record["metrics"], other.record["metrics"]
        metrics = {n: metric for n, metric in first.judge.metrics.items() if described[n] == others.get(n)}
        if first.record["teacher_sha256"] != other.record["teacher_sha256"]:
            metrics.pop("teacher-mse", None)
            say(f"{other.title}: has another teacher than {first.title}; MSE to the teacher is not compared")
        differences = compare_rows(first.rows, other.rows, metrics, (STUDENT, IMAGES))
        if not differences:
            raise RecipeError(
                f"{other.title}: no metric in common with {first.title}; set --metrics and --features alike"
            )
        print_comparison((first.title, other.title), metrics, differences)
        found.append({"first": first.title, "second": other.title, "differences": as_json(differences)})
    record = {"comparisons": found, "records": [result.record for result in results]}
    if first.judge.accelerator.is_main_process:
        write_text(out, json.dumps(record, indent=1) + "\n")
        say(f"comparison: {out}")
    return record


def _check_alike(first: Result, other: Result) -> None:
    for key in _ALIKE:
        if first.record[key] != other.record[key]:
            raise RecipeError(
                f"{other.title}: {key} is {str(other.record[key])[:80]}, that of {first.title} "
                f"{str(first.record[key])[:80]}; they are compared on the same seeds and data: set them by options"
            )


def check(path: Path) -> dict[str, Any]:
    """Measures again what a record describes, and compares every figure with it; writes nothing.

    Raises:
        MissingAssetError: No such record, or something that it names is gone.
        CorruptFileError: It is no record, or one of an older version without what is needed to repeat it.
        MismatchError: A figure came out otherwise.
    """
    before = _read_record(path)
    try:
        asked = dict(before["request"]["target"])
        optimised = asked.pop("optimise", False)  # written by version 0.1
        target, choice = Target(**asked), SamplerChoice(**before["request"]["choice"])
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a record that can be repeated; cdistill evaluate writes one") from error
    if optimised:
        raise RecipeError(
            f"{path}: made by cdistill 0.1 with --optimise-steps, which version 0.2 no longer has; evaluate with the "
            "record's own --times"
        )
    if target.path is not None and not Path(target.path).exists():
        target = replace(target, path=str(path.parent))  # the run has moved, and the record with it
    now = measure_target(target, open_subject(target), choice, make_accelerator("fp32"), write=False).record
    parts = repeated(before, now)
    table(
        f"{path}, measured again",
        ["sampler", "NFE", "metric", "recorded", "now", ""],
        [[p.sampler, str(p.nfe), p.metric, f"{p.before:.6g}", f"{p.now:.6g}", _told(p)] for p in parts],
    )
    otherwise = changes(before, now)
    for line in otherwise:
        say(f"not as it was: {line}")
    wrong = [part for part in parts if not part.same]
    if wrong:
        raise MismatchError(
            f"{path}: {len(wrong)} of {len(parts)} figures came out otherwise, first {wrong[0].metric} of "
            f"{wrong[0].sampler} at {wrong[0].nfe} NFE"
        )
    say(f"{path}: {describe(parts)}")
    return {"record": str(path), "changes": otherwise, "figures": [vars(part) for part in parts], "reproduced": True}


def _told(part: Repeated) -> str:
    if part.identical:
        return "identical"
    return "same" if part.same else "DIFFERS"


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingAssetError(f"{path}: no such record; evaluate writes one beside every result")
    return read_json(path)
