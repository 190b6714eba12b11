"""The tables of a page: results side by side, differences on the same seeds, what recipes differ in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdistill.reporting.evaluations import Evaluation, Interval, Measured, Pair
from cdistill.reporting.reading import Run

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
        columns: Heads of the columns of values, and what is said below them.
        rows: (sampler, NFE, cells).
    """

    caption: str
    columns: Sequence[tuple[str, str]]
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
    caption = "Metrics" if metrics[:1] == evaluation.names[:1] else "More metrics"
    return Table(caption, [(evaluation.title(metric), _better(evaluation, metric)) for metric in metrics], rows)


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
    caption = ", ".join(text for text in (first.title(metric), _better(first, metric)) if text)
    return Table(caption, [(name, "") for name in part], rows)


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


def contests(pairs: Sequence[Pair], runs: Sequence[Run]) -> list[Table]:
    """Returns the differences of runs on the same seeds, as they were measured together; a table for each pair."""
    titles = {name: one.title(name) for run in runs for one in run.evaluations.values() for name in one.names}
    found = []
    for pair in pairs:
        columns = [(text, "") for text in ("metric", pair.first, pair.second, "difference", f"{pair.second} is")]
        rows = []
        for one in pair.differences:
            digits = decimals((one.interval[1] - one.interval[0]) / 2)
            ends = " to ".join(_fixed(end, digits) for end in one.interval)
            texts = titles.get(one.metric, one.metric), f"{one.first:.4g}", f"{one.second:.4g}"
            cells = [*map(Cell, texts), Cell(_fixed(one.difference, digits), ends), Cell(one.verdict)]
            rows.append((one.sampler, one.nfe, cells))
        found.append(Table(f"{pair.second} compared with {pair.first}, on the same seeds", columns, rows))
    return found


def _row(evaluation: Evaluation, sampler: str, nfe: int) -> Measured | None:
    return next((row for row in evaluation.rows if (row.sampler, row.nfe) == (sampler, nfe)), None)


def _apart(one: Interval | None, other: Interval | None) -> bool:
    return one is not None and other is not None and (one[1] < other[0] or other[1] < one[0])


def _cell(row: Measured, metric: str, mark: str = "") -> Cell:
    value, ends, error = row.value(metric), row.interval(metric), row.errors.get(metric)
    if value is None:
        return Cell("not finite" if metric in row.values else "")
    if ends is None:
        return Cell(f"{value:.4g}", f"± {error:.2g}" if error is not None else "", mark)
    digits = decimals((ends[1] - ends[0]) / 2)
    return Cell(_fixed(value, digits), f"{_fixed(ends[0], digits)} to {_fixed(ends[1], digits)}", mark)


def decimals(half: float) -> int | None:
    """Returns how many decimals two digits of half an interval's width have; None where it has no width.

    >>> decimals(0.12), decimals(0.0034), decimals(25.0), decimals(0.0)
    (2, 4, 0, None)
    """
    return max(0, 1 - math.floor(math.log10(half))) if 0 < half < math.inf else None


def _fixed(value: float, digits: int | None) -> str:
    return f"{value:.4g}" if digits is None or digits > 8 or abs(value) >= 1e6 else f"{value:.{digits}f}"


def _better(evaluation: Evaluation, metric: str) -> str:
    better = evaluation.facts(metric).better
    return f"{better} is better" if better in ("lower", "higher") else ""


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
