"""The tables of a page: results side by side, differences on the same seeds, what recipes differ in."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cdistill.evaluation.records import Difference, Evaluation, Interval, Pair, Row, figure
from cdistill.reporting.reading import Run

COLUMNS = 6  # of values in a table; more go into another, for the sake of paper
BEST, FIRST = "★", "☆"
_LEGEND = {
    BEST: f"{BEST} the best of the runs; its interval meets no other one.",
    FIRST: f"{FIRST} the best value, but its interval meets another one, or intervals are not known: no difference "
    "is shown by this table.",
}
_SHARED = (
    "samples", "seeds", "split", "teacher_sha256", "data_sha256", "quantisation", "features_sha256", "reference_sha256",
)  # fmt: skip
"""Without these alike, values do not compare."""


Cell = tuple[str, str, str]
"""(a value, "" where it was not measured; its interval or standard error; a mark)."""

Table = tuple[str, Sequence[tuple[str, str]], Sequence[tuple[str, int, Sequence[Cell]]]]
"""(caption, heads of the columns of values and the text below each, rows: sampler, NFE and cells)."""

Results = tuple[str, list[str], list[Table]]
"""(heading, what the reader must know before comparing, for one run all metrics abreast, else a table for each)."""


def results(runs: Sequence[Run]) -> list[Results]:
    """Returns the runs' evaluations, those of the same file name side by side."""
    names = dict.fromkeys(name for run in runs for name in run.evaluations)
    parts = [
        _results(name, {run.name: run.evaluations[name] for run in runs if name in run.evaluations}) for name in names
    ]
    logged = {run.name: run.logged[-1] for run in runs if run.logged and not run.evaluations}
    return parts + ([_results("metrics.jsonl, the last evaluation while training", logged)] if logged else [])


def _results(title: str, evaluations: Mapping[str, Evaluation]) -> Results:
    differing = _conflicts(evaluations)
    notes = [_about(name, one) for name, one in evaluations.items()]
    notes += [f"The runs differ in {one}: their values do not compare, and none is marked." for one in differing]
    if len(evaluations) == 1:
        (evaluation,) = evaluations.values()
        tables = [_one_run(evaluation, metrics) for metrics in _chunks(evaluation.names)]
    else:
        metrics = dict.fromkeys(name for one in evaluations.values() for name in one.names)
        tables = [
            _one_metric(metric, names, evaluations, not differing)
            for metric in metrics
            for names in _chunks(list(evaluations))
        ]
    marks = {mark for _, _, rows in tables for _, _, cells in rows for _, _, mark in cells}
    return title, notes + [text for mark, text in _LEGEND.items() if mark in marks], tables


def _chunks(names: Sequence[str]) -> list[Sequence[str]]:
    return [names[first : first + COLUMNS] for first in range(0, len(names), COLUMNS)]


def _one_run(evaluation: Evaluation, metrics: Sequence[str]) -> Table:
    rows = [(row.sampler, row.nfe, [_cell(row, metric) for metric in metrics]) for row in evaluation.rows]
    caption = "Metrics" if metrics[0] == evaluation.names[0] else "More metrics"
    return caption, [(evaluation.title(metric), _direction(evaluation, metric)) for metric in metrics], rows


def _one_metric(metric: str, names: Sequence[str], evaluations: Mapping[str, Evaluation], comparable: bool) -> Table:
    """Returns a metric of the runs called `names`; the best is that of all `evaluations`."""
    first = next(one for one in evaluations.values() if metric in one.names)
    rows = []
    for sampler, nfe in dict.fromkeys((row.sampler, row.nfe) for one in evaluations.values() for row in one.rows):
        of_run = {
            name: next((row for row in one.of(sampler) if row.nfe == nfe), None) for name, one in evaluations.items()
        }
        marked = comparable and not sampler.startswith("teacher")
        marks = best(metric, of_run, first.better(metric)) if marked else {}
        cells = [_cell(of_run[name], metric, marks.get(name, "")) for name in names]
        rows.append((sampler, nfe, cells))
    caption = ", ".join(text for text in (first.title(metric), _direction(first, metric)) if text)
    return caption, [(name, "") for name in names], rows


def best(metric: str, rows: Mapping[str, Row | None], better: str) -> dict[str, str]:
    """Returns the mark of the best value: `BEST` if its interval meets no other one, else `FIRST`.

    Args:
        metric: Its name.
        rows: Run -> what was measured; None where nothing was.
        better: "lower" or "higher"; nothing is marked for anything else.

    Returns:
        Run -> mark; empty where fewer than two values can be compared, or the best is shared.
    """
    values = {name: value for name, row in rows.items() if row is not None and (value := row.value(metric)) is not None}
    if len(values) < 2 or better not in ("lower", "higher"):
        return {}
    extreme = min(values.values()) if better == "lower" else max(values.values())
    winners = [name for name, value in values.items() if value == extreme]
    if len(winners) > 1:
        return {}
    intervals = {name: row.interval(metric) for name, row in rows.items() if row is not None and name in values}
    own = intervals.pop(winners[0])
    return {winners[0]: BEST if all(_disjoint(own, other) for other in intervals.values()) else FIRST}


def differences(values: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns key -> the runs' values of those keys in which they differ; None where a run has none."""
    keys = dict.fromkeys(key for one in values.values() for key in one)
    several = {key: [one.get(key) for one in values.values()] for key in keys}
    return {key: column for key, column in several.items() if any(value != column[0] for value in column)}


def pair_tables(pairs: Sequence[Pair], runs: Sequence[Run]) -> list[Table]:
    """Returns the differences of runs on the same seeds, as they were measured together; a table for each pair."""
    titles = {name: one.title(name) for run in runs for one in run.evaluations.values() for name in one.names}
    tables: list[Table] = []
    for pair in pairs:
        columns = [(text, "") for text in ("metric", pair.first, pair.second, "difference", f"{pair.second} is")]
        rows = []
        for one in pair.differences:
            texts = titles.get(one.metric, one.metric), figure(one.first), figure(one.second)
            cells: list[Cell] = [*((text, "", "") for text in texts), _difference(one), (one.verdict, "", "")]
            rows.append((one.sampler, one.nfe, cells))
        tables.append((f"{pair.second} compared with {pair.first}, on the same seeds", columns, rows))
    return tables


def _disjoint(one: Interval | None, other: Interval | None) -> bool:
    return one is not None and other is not None and (one[1] < other[0] or other[1] < one[0])


def _cell(row: Row | None, metric: str, mark: str = "") -> Cell:
    if row is None or (value := row.value(metric)) is None:
        return "not finite" if row is not None and metric in row.values else "", "", ""
    interval, error = row.interval(metric), row.errors.get(metric)
    if interval is None:
        return f"{value:.4g}", f"± {error:.2g}" if error is not None else "", mark
    return *_with_interval(value, interval), mark


def _difference(one: Difference) -> Cell:
    low, high = one.interval
    if one.difference is None or low is None or high is None:
        return figure(one.difference), "", ""
    return *_with_interval(one.difference, (low, high)), ""


def _with_interval(value: float, interval: Interval) -> tuple[str, str]:
    """Returns a value above its interval, both with two digits of half its width.

    >>> _with_interval(4.0, (3.95, 4.05)), _with_interval(0.5, (0.5, 0.5))
    (('4.000', '3.950 to 4.050'), ('0.5', '0.5 to 0.5'))
    """
    half = (interval[1] - interval[0]) / 2
    digits = max(0, 1 - math.floor(math.log10(half))) if 0 < half < math.inf else 99
    texts = [f"{x:.4g}" if digits > 8 or abs(x) >= 1e6 else f"{x:.{digits}f}" for x in (value, *interval)]
    return texts[0], f"{texts[1]} to {texts[2]}"


def _direction(evaluation: Evaluation, metric: str) -> str:
    better = evaluation.better(metric)
    return f"{better} is better" if better else ""


def _conflicts(evaluations: Mapping[str, Evaluation]) -> Iterable[str]:
    """Returns in what evaluations differ that makes their values incomparable; what one does not state is no reason."""
    values = {name: one.model_dump(include=set(_SHARED)) | (one.model_extra or {}) for name, one in evaluations.items()}
    stated = [key for key in _SHARED if all(one.get(key) is not None for one in values.values())]
    several = differences({name: {key: one[key] for key in stated} for name, one in values.items()})
    return [f"{key} ({', '.join(str(value)[:12] for value in column)})" for key, column in several.items()]


def _about(name: str, one: Evaluation) -> str:
    """Returns on what a run was measured, and whether intervals are stated."""
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
