"""The tables of a page: results side by side, what recipes differ in, where numbers come from."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdistill.reporting.reading import Evaluation, Interval, Measured, Run, flat

COLUMNS = 6  # of values in a table; more go into another, for the sake of paper
BEST, FIRST = "★", "☆"
_SHARED = (
    "samples",
    "seeds",
    "split",
    "teacher_sha256",
    "data_sha256",
    "quantisation",
    "features_sha256",
    "reference_sha256",
)  # without these alike, values do not compare


@dataclass(frozen=True)
class Cell:
    """A value of a table.

    Attributes:
        text: The value, "" where it was not measured.
        below: Its interval or standard error.
        mark: `BEST`, `FIRST` or "".
    """

    text: str
    below: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        caption: What it shows.
        columns: Heads of the columns of values.
        rows: (sampler, NFE, cells).
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, int, Sequence[Cell]]]

    @property
    def marks(self) -> set[str]:
        """The marks that occur."""
        return {cell.mark for _, _, cells in self.rows for cell in cells} - {""}


@dataclass(frozen=True)
class Results:
    """Evaluations that stand side by side.

    Attributes:
        title: Heading.
        notes: What the reader must know before comparing.
        tables: For one run all metrics abreast, for several a table for each metric.
    """

    title: str
    notes: Sequence[str]
    tables: Sequence[Table]


def results(runs: Sequence[Run]) -> list[Results]:
    """Returns the runs' evaluations, those of the same file name side by side."""
    names = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    found = [
        _results(name, {run.name: run.evaluations[name] for run in runs if name in run.evaluations}) for name in names
    ]
    logged = {run.name: run.logged[-1] for run in runs if run.logged and not run.evaluations}
    if logged:
        found.append(_results("metrics.jsonl, the last evaluation while training", logged))
    return found


def _results(title: str, evaluations: Mapping[str, Evaluation]) -> Results:
    differing = _conflicts(evaluations)
    notes = [_about(name, one) for name, one in evaluations.items()]
    notes += [f"The runs differ in {one}: their values do not compare, and none is marked." for one in differing]
    if len(evaluations) == 1:
        (evaluation,) = evaluations.values()
        names = evaluation.names
        tables = [_one_run(evaluation, names[k : k + COLUMNS]) for k in range(0, len(names), COLUMNS)]
    else:
        metrics = dict.fromkeys(name for one in evaluations.values() for name in one.names)
        parts = [dict(list(evaluations.items())[k : k + COLUMNS]) for k in range(0, len(evaluations), COLUMNS)]
        tables = [_one_metric(metric, part, evaluations, not differing) for metric in metrics for part in parts]
    notes += _legend({mark for one in tables for mark in one.marks})
    return Results(title, notes, tables)


def _one_run(evaluation: Evaluation, metrics: Sequence[str]) -> Table:
    rows = [(row.sampler, row.nfe, [_cell(row, metric) for metric in metrics]) for row in evaluation.rows]
    return Table("Metrics", [_head(evaluation, metric) for metric in metrics], rows)


def _one_metric(
    metric: str, part: Mapping[str, Evaluation], evaluations: Mapping[str, Evaluation], comparable: bool
) -> Table:
    """Returns a metric of the runs in `part`; the best is that of all `evaluations`."""
    first = next(one for one in evaluations.values() if metric in one.names)
    keys = dict.fromkeys((row.sampler, row.nfe) for one in evaluations.values() for row in one.rows)
    rows = []
    for sampler, nfe in keys:
        found = {name: _row(one, sampler, nfe) for name, one in evaluations.items()}
        better = first.facts(metric).better
        marks = best(metric, found, better) if comparable and not sampler.startswith("teacher") else {}
        cells = [Cell("") if (row := found[name]) is None else _cell(row, metric, marks.get(name, "")) for name in part]
        rows.append((sampler, nfe, cells))
    return Table(_head(first, metric), list(part), rows)


def best(metric: str, rows: Mapping[str, Measured | None], better: str | None) -> dict[str, str]:
    """Returns the mark of the best value: `BEST` if its interval meets no other one, else `FIRST`.

    Args:
        metric: Its name.
        rows: Run -> what was measured; None where nothing was.
        better: "lower" or "higher"; nothing is marked for anything else.

    Returns:
        Run -> mark; empty where fewer than two values can be compared, or the best is shared.
    """
    values = {name: row.value(metric) for name, row in rows.items() if row is not None}
    known = {name: value for name, value in values.items() if value is not None}
    if len(known) < 2 or better not in ("lower", "higher"):
        return {}
    extreme = min(known.values()) if better == "lower" else max(known.values())
    winners = [name for name, value in known.items() if value == extreme]
    if len(winners) > 1:
        return {}
    intervals = {name: row.interval(metric) for name, row in rows.items() if row is not None and name in known}
    own = intervals.pop(winners[0])
    return {winners[0]: BEST if all(_apart(own, other) for other in intervals.values()) else FIRST}


def differences(values: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns key -> the runs' values of those keys in which they differ; None where a run has none."""
    keys = dict.fromkeys(key for one in values.values() for key in one)
    found = {key: [one.get(key) for one in values.values()] for key in keys}
    return {key: several for key, several in found.items() if any(value != several[0] for value in several)}


def provenance(run: Run) -> list[tuple[str, str]]:
    """Returns what numbers of a run depend on, as names and texts: its surroundings and its records."""
    facts = {key: value for key, value in run.environment.items() if key != "command"}
    rows = [("seed", str(run.values.get("seed", "")))] + [(key, _text(value)) for key, value in facts.items()]
    if run.coefficients is not None:
        header = run.coefficients.get("header") or {}
        rows.append(("coefficients", f"sha256 {run.coefficients['sha256']}"))
        rows += [
            (f"coefficients: {key}", _text(header[key])) for key in ("estimator", "samples", "seed") if key in header
        ]
    for name, evaluation in run.evaluations.items():
        extra = {key: value for key, value in flat(evaluation.model_extra or {}).items() if value not in (None, {}, [])}
        known = {"step": evaluation.step, "samples": evaluation.samples, "seeds": evaluation.seeds}
        rows += [(f"{name}: {key}", _text(value)) for key, value in {**known, **extra}.items() if value is not None]
    return [(key, text) for key, text in rows if text]


def commands(run: Run) -> list[tuple[str, str]]:
    """Returns what to type for the run and each of its evaluations again, as (what, command)."""
    typed = run.environment.get("command")
    found = [("the run", _command(typed))] if isinstance(typed, list | str) else []
    for name, one in run.evaluations.items():
        if one.command:
            found.append((name, _command(one.command)))
        elif one.step is not None:
            found.append((name, _evaluate(run, one)))
    return found


def _evaluate(run: Run, one: Evaluation) -> str:
    """Returns the command that measures the same again, where the record does not say it."""
    calls = dict.fromkeys(row.nfe for row in one.rows if not row.is_teacher)
    options = ["evaluate", "--run", str(run.path), "--step", str(one.step), "--nfe", ",".join(map(str, calls))]
    for name, value in (("--samples", one.samples), ("--split", one.split), ("--metrics", ",".join(one.names))):
        options += [name, str(value)] if value else []
    return _command(options)


def _command(words: Sequence[str] | str) -> str:
    text = words if isinstance(words, str) else shlex.join(map(str, words))
    return text if text.startswith("cdistill ") else f"cdistill {text}"


def _row(evaluation: Evaluation, sampler: str, nfe: int) -> Measured | None:
    return next((row for row in evaluation.rows if (row.sampler, row.nfe) == (sampler, nfe)), None)


def _apart(one: Interval | None, other: Interval | None) -> bool:
    return one is not None and other is not None and (one[1] < other[0] or other[1] < one[0])


def _cell(row: Measured, metric: str, mark: str = "") -> Cell:
    value, ends, error = row.value(metric), row.interval(metric), row.errors.get(metric)
    if value is None:
        return Cell("not finite" if metric in row.values else "")
    below = f"± {error:.2g}" if error is not None else ""
    return Cell(f"{value:.4g}", f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else below, mark)


def _head(evaluation: Evaluation, metric: str) -> str:
    better = evaluation.facts(metric).better
    return (
        f"{evaluation.title(metric)}, {better} is better" if better in ("lower", "higher") else evaluation.title(metric)
    )


def _conflicts(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Returns in what evaluations differ that makes their values incomparable; what one does not state is no reason."""
    values = {name: one.model_dump(include=set(_SHARED)) | (one.model_extra or {}) for name, one in evaluations.items()}
    stated = [key for key in _SHARED if all(one.get(key) is not None for one in values.values())]
    found = differences({name: {key: one[key] for key in stated} for name, one in values.items()})
    return [f"{key} ({', '.join(str(value)[:12] for value in several)})" for key, several in found.items()]


def _about(name: str, one: Evaluation) -> str:
    """Says on what a run was measured, and whether intervals are stated."""
    parts = [f"{name}:" + (f" step {one.step}" if one.step is not None else " a step that is not stated")]
    parts += [f"{one.samples} samples of seeds {one.seeds}"] if one.samples is not None else []
    parts += [f"against the {one.split} data"] if one.split else []
    if any(row.intervals for row in one.rows):
        parts.append(f"below each value its {100 * one.level:g} % interval" if one.level else "with intervals")
    elif any(row.errors for row in one.rows):
        parts.append("below each value its standard error")
    else:
        parts.append("no intervals in this record")
    return ", ".join(parts) + "."


def _legend(marks: set[str]) -> list[str]:
    texts = {
        BEST: f"{BEST} the best of the runs; its interval meets no other one.",
        FIRST: f"{FIRST} the best value, but its interval meets another one, or intervals are not known: no difference "
        "is shown by this table.",
    }
    return [text for mark, text in texts.items() if mark in marks]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)
