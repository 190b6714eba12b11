"""A run in a line, what its folder lacks, where its numbers come from, and what to type for them again."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cdistill.evaluation.records import TEACHER, Evaluation
from cdistill.reporting.inspect_view import NOTHING, flat
from cdistill.reporting.reading import Run

_OWN = ("kind", "schema")  # of a file's header: the format's, not the numbers'

Provenance = tuple[str, str, list[tuple[str, str]]]
"""(which numbers, the command that gives them again or "", names and texts)."""


def heading(run: Run) -> str:
    """Returns what the run is, in a few words."""
    if run.of_teacher:
        return f"a teacher of {run.record.values.get('data', 'unknown data')}"
    return f"a student of {run.record.values.get('teacher', 'an unknown teacher')}"


def facts(run: Run) -> list[tuple[str, str]]:
    """Returns teacher, preconditioning, steps, state and hardware: names and texts."""
    status, values = run.record.status, run.record.values
    steps = values.get("training.iterations", status.get("iterations", "?"))
    state = str(status.get("state", "not known"))
    for detail in filter(None, (status.get("error"), status.get("note"))):
        state += f": {detail}"
    known = {
        "teacher": values.get("teacher"),
        "data": values.get("data"),
        "preconditioning": run.preconditioning,
        "objective": values.get("objective.name", values.get("training.method")),
        "steps": f"{status.get('step', 0)} of {steps}",
        "state": state,
        "hardware": _hardware(run.record.environment),
    }
    return [(key, str(value)) for key, value in known.items() if value]


def missing(run: Run) -> list[str]:
    """Returns what a page about the run lacks, and where it would come from; a sentence each."""
    lacks = {
        "The run is not finished: figures are those of its last evaluation. The same command resumes it.": (
            run.record.status.get("state") != "finished"
        ),
        "No training log yet: lines come every logging.every steps.": not run.record.training,
    }
    if run.of_teacher:
        lacks["A teacher's training has neither evaluations nor samples."] = True
        return [text for text, lacking in lacks.items() if lacking]
    measured = bool(run.evaluations)
    intervals = any(row.intervals for one in run.evaluations.values() for row in one.rows)
    lacks |= {
        f"No evaluation in the folder: {evaluate_command(run)} makes one.": not measured,
        f"No intervals: an older version measured this; {evaluate_command(run)} measures again.": (
            measured and not intervals
        ),
        "No curve of metrics: they are measured while training with --set evaluation.every=N.": len(run.logged) < 2,
        "No coefficients yet: a preconditioning that needs some has them estimated before the training.": (
            run.coefficients is None and not run.record.training
        ),
        "Samples as one picture only: an older version drew it.": run.grid is not None,
        "No samples to show: the folder holds none, as for vectors.": (
            measured and run.pictures is None and run.grid is None
        ),
        "No env.json: versions and device are not known.": not run.record.environment,
    }
    return [text for text, lacking in lacks.items() if lacking]


def provenance(run: Run) -> list[Provenance]:
    """Returns what the numbers of a run depend on: of the run itself, of each evaluation, of the coefficients."""
    typed = run.record.environment.get("command")
    settings = {
        "seed": run.record.values.get("seed"),
        **{key: value for key, value in run.record.environment.items() if key not in ("command", "jumps")},
    }
    command = command_line(typed) if isinstance(typed, list | str) else ""
    parts = [("Run", command, _rows(settings))]
    for name, one in run.evaluations.items():
        known = {"step": one.step, "samples": one.samples, "seeds": one.seeds, "split": one.split}
        parts.append((name, _measure_again(run, name, one), _rows({**known, **(one.model_extra or {})})))
    if run.coefficients is not None:
        header = {key: value for key, value in (run.coefficients.get("header") or {}).items() if key not in _OWN}
        parts.append(("Coefficients", "", _rows({"sha256": run.coefficients["sha256"], **header})))
    return parts


def command_line(words: Sequence[str] | str) -> str:
    """Returns what was typed, as one types it.

    >>> command_line(["sample", "--out", "my pictures"])
    "cdistill sample --out 'my pictures'"
    """
    text = words if isinstance(words, str) else shlex.join(map(str, words))
    return text if text.startswith("cdistill ") else f"cdistill {text}"


def evaluate_command(run: Run, options: Iterable[str] = ()) -> str:
    """Returns the command that evaluates a run."""
    return command_line(["evaluate", "--run", str(run.path), *options])


def _measure_again(run: Run, name: str, one: Evaluation) -> str:
    """Returns what was typed, or what repeats the record, or what measures the same; "" where it is not known."""
    if one.command:
        return command_line(one.command)
    if "request" in (one.model_extra or {}):
        return command_line(["evaluate", "--check", str(run.path / name)])
    if one.step is None:
        return ""
    calls = dict.fromkeys(row.nfe for row in one.rows if row.sampler != TEACHER)
    options = ["--step", str(one.step), "--nfe", ",".join(map(str, calls))]
    for name, value in (("--samples", one.samples), ("--split", one.split), ("--metrics", ",".join(one.names))):
        options += [name, str(value)] if value else []
    return evaluate_command(run, options)


def _hardware(machine: Mapping[str, Any]) -> str:
    if not machine:
        return "not known"
    parts = [str(machine.get("device", "an unknown device"))]
    for key, one, many in (("processes", "process", "processes"), ("threads", "thread", "threads")):
        if key in machine:
            parts.append(f"{machine[key]} {one if machine[key] == 1 else many}")
    return ", ".join(parts + [str(machine[key]) for key in ("precision",) if key in machine])


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), flat(value, full=True)) for key, value in facts.items() if value not in NOTHING]
