"""Where the numbers of a page come from, and what to type for them again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdistill.reporting.evaluations import Evaluation
from cdistill.reporting.reading import Run
from cdistill.reporting.summary import command_line, measuring

_NOTHING: tuple[Any, ...] = (None, "", {}, [])
_OWN = ("kind", "schema")  # of a file's header: the format's, not the numbers'


@dataclass(frozen=True)
class Origin:
    """Where numbers come from.

    Attributes:
        what: Which numbers.
        command: What to type for them again, "" where it is not known.
        rows: Names and texts.
    """

    what: str
    command: str
    rows: Sequence[tuple[str, str]]


def provenance(run: Run) -> list[Origin]:
    """Returns what the numbers of a run depend on: of the run itself, of each evaluation, of the coefficients."""
    typed = run.environment.get("command")
    facts = {
        "seed": run.values.get("seed"),
        **{key: value for key, value in run.environment.items() if key != "command"},
    }
    command = command_line(typed) if isinstance(typed, list | str) else ""
    found = [Origin("Run", command, _rows(facts))]
    for name, one in run.evaluations.items():
        known = {"step": one.step, "samples": one.samples, "seeds": one.seeds, "split": one.split}
        found.append(Origin(name, _measure_again(run, name, one), _rows({**known, **(one.model_extra or {})})))
    if run.coefficients is not None:
        header = {key: value for key, value in (run.coefficients.get("header") or {}).items() if key not in _OWN}
        found.append(Origin("Coefficients", "", _rows({"sha256": run.coefficients["sha256"], **header})))
    return found


def _measure_again(run: Run, name: str, one: Evaluation) -> str:
    """Returns what was typed, or what repeats the record, or what measures the same; "" where it says nothing."""
    if one.command:
        return command_line(one.command)
    if "request" in (one.model_extra or {}):
        return command_line(["evaluate", "--check", str(run.path / name)])
    if one.step is None:
        return ""
    calls = dict.fromkeys(row.nfe for row in one.rows if not row.is_teacher)
    options = ["--step", str(one.step), "--nfe", ",".join(map(str, calls))]
    for name, value in (("--samples", one.samples), ("--split", one.split), ("--metrics", ",".join(one.names))):
        options += [name, str(value)] if value else []
    return measuring(run, *options)


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _text(value)) for key, value in facts.items() if value not in _NOTHING]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)
