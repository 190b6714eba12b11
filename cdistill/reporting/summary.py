"""A run in a line, and what its folder lacks."""

import shlex
from collections.abc import Sequence
from typing import Any

from cdistill.reporting.reading import Run

CLOSED = ("cm", "bcm", "ctm")  # preconditionings that need no coefficients


def is_teacher(run: Run) -> bool:
    """Whether the run trains a teacher."""
    return run.status.get("kind") == "teacher" or "network.model_channels" in run.values


def heading(run: Run) -> str:
    """Returns what the run is, in a few words."""
    if is_teacher(run):
        return f"a teacher of {run.values.get('data', 'unknown data')}"
    return f"a student of {run.values.get('teacher', 'an unknown teacher')}"


def facts(run: Run) -> list[tuple[str, str]]:
    """Returns teacher, preconditioning, steps, state and hardware: names and texts."""
    status, values, machine = run.status, run.values, run.environment
    step, steps = status.get("step", 0), values.get("training.iterations", status.get("iterations", "?"))
    state = str(status.get("state", "not known"))
    if status.get("error"):
        state += f": {status['error']}"
    found: list[tuple[str, Any]] = [
        ("teacher", values.get("teacher")),
        ("data", values.get("data")),
        ("preconditioning", run.form),
        ("method", values.get("training.method")),
        ("steps", f"{step} of {steps}"),
        ("state", state),
        ("hardware", _hardware(machine)),
    ]
    return [(key, str(value)) for key, value in found if value]


def missing(run: Run) -> list[str]:
    """Returns what a page about the run lacks, and where it would come from; a sentence each."""
    found = []
    if run.status.get("state") != "finished":
        found.append("The run is not finished: figures are those of its last evaluation. The same command goes on.")
    if not run.log:
        found.append("No training log yet: lines come every logging.every steps.")
    if is_teacher(run):
        return [*found, "A teacher's training has neither evaluations nor samples."]
    if not run.evaluations:
        found.append(f"No evaluation in the folder: {measuring(run)} makes one.")
    elif not any(row.intervals for one in run.evaluations.values() for row in one.rows):
        found.append(f"No intervals: an older version measured this; {measuring(run)} measures again.")
    if len(run.logged) < 2:
        found.append("No curve of metrics: they are measured while training with --set evaluation.every=N.")
    return found + _missing_files(run)


def command_line(words: Sequence[str] | str) -> str:
    """Returns what was typed, as one types it.

    >>> command_line(["sample", "--out", "my pictures"])
    "cdistill sample --out 'my pictures'"
    """
    text = words if isinstance(words, str) else shlex.join(map(str, words))
    return text if text.startswith("cdistill ") else f"cdistill {text}"


def measuring(run: Run, *options: str) -> str:
    """Returns the command that evaluates a run."""
    return command_line(["evaluate", "--run", str(run.path), *options])


def _missing_files(run: Run) -> list[str]:
    found = []
    if run.coefficients is None and run.form not in CLOSED:
        found.append("No coefficients yet: they are estimated before the training.")
    if run.evaluations and run.pictures is None:
        found.append(
            "Samples as one picture only: an older version drew it."
            if run.grid is not None
            else "No samples to show: the folder holds none, as for vectors."
        )
    if not run.environment:
        found.append("No env.json: versions and device are not known.")
    return found


def _hardware(machine: Any) -> str:
    if not machine:
        return "not known"
    parts = [str(machine.get("device", "an unknown device"))]
    for key, unit in (("processes", "process"), ("threads", "thread")):
        if key in machine:
            ending = "es" if unit.endswith("s") else "s"
            parts.append(f"{machine[key]} {unit}{'' if machine[key] == 1 else ending}")
    parts += [str(machine["precision"])] if "precision" in machine else []
    return ", ".join(parts)
