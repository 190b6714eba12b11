"""Which charts a page has: metrics against calls and iterations, losses, coefficients."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cdistill.reporting.charts import Chart, Group, Line, group
from cdistill.reporting.evaluations import Evaluation
from cdistill.reporting.reading import Run
from cdistill.reporting.records import STUDENT, TEACHER, UNTRAINED, averaged, training_curves

_TABLE = (("l", "l_error", "l(t)"), ("s", "s_error", "s(t)"))
_PAIRS = (("f", "f_error", "f(t, s)"), ("g", "g_error", "g(t, s)"))


def metrics_by_calls(runs: Sequence[Run]) -> Group | None:
    """Draws each metric against the number of network calls, with its intervals; from the runs' own evaluations."""
    shown = [(run, next(iter(run.evaluations.values()))) for run in runs if run.evaluations]
    charts = []
    for metric, title in _titles(evaluation for _, evaluation in shown).items():
        lines: list[Line] = []
        for run, evaluation in shown:
            for sampler in dict.fromkeys(row.sampler for row in evaluation.rows if row.sampler != TEACHER):
                if len(runs) == 1 or sampler != UNTRAINED:
                    label = sampler if len(runs) == 1 else f"{run.name}: {sampler}"
                    lines.append(_by_calls(evaluation, metric, sampler, label, len(lines)))
        levels = _levels([(run.name, evaluation) for run, evaluation in shown], metric)
        places = sorted({x for line in lines for x, _ in line.points})
        charts += _chart(title, "NFE", lines, x_log=True, ticks=_apart(places), levels=levels)
    if not charts:
        return None
    return group("Metrics against network calls", _interval_note([one for _, one in shown]), charts)


def metrics_by_steps(runs: Sequence[Run]) -> Group | None:
    """Draws what was measured during the training against iterations."""
    shown = [run for run in runs if len(run.logged) > 1]
    titles = _titles(one for run in shown for one in [*run.evaluations.values(), *run.logged])
    calls = sorted({row.nfe for run in shown for one in run.logged for row in one.rows if row.sampler == STUDENT})
    charts: list[Chart] = []
    for metric, title in titles.items():
        if len(runs) == 1:
            lines = [_by_steps(shown[0], metric, nfe, f"{nfe} NFE", k) for k, nfe in enumerate(calls)]
            charts += _chart(title, "iterations", lines)
        else:
            for nfe in calls:
                lines = [_by_steps(run, metric, nfe, run.name, runs.index(run)) for run in shown]
                charts += _chart(f"{title}, {nfe} NFE", "iterations", lines)
    return (
        group("Metrics against iterations", "Of the student, measured while it was trained.", charts)
        if charts
        else None
    )


def losses(runs: Sequence[Run]) -> Group | None:
    """Draws everything that the trainings logged and that is not zero throughout."""
    curves = [training_curves(run.log) for run in runs]
    charts: list[Chart] = []
    for name in dict.fromkeys(name for one in curves for name in one):
        lines: list[Line] = []
        for number, (run, one) in enumerate(zip(runs, curves, strict=True)):
            points = [point for point in one.get(name, []) if math.isfinite(point[1])]
            lines.append(Line(run.name, averaged(points) if points else [], style=number))
        if any(y for line in lines for _, y in line.points):
            charts += _chart(name.replace("_", " "), "iterations", lines)
    note = "Values of the steps that were logged; neighbours are averaged where there are many."
    return group("Losses", note, charts) if charts else None


def coefficients(runs: Sequence[Run]) -> list[Group]:
    """Draws l, s, f and g of the runs that have a coefficient file, with two standard errors; a shared file once."""
    files: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for run in runs:
        if run.coefficients is not None and run.coefficients.get("table"):
            digest = str(run.coefficients["sha256"])
            names = f"{files[digest][0]}, {run.name}" if digest in files else run.name
            files[digest] = names, run.coefficients
    named = list(files.values())
    tables: list[Chart] = []
    for key, error, title in _TABLE:
        lines = [_with_errors(name, file["table"], key, error, k) for k, (name, file) in enumerate(named)]
        tables += _chart(title, "t", lines, x_log=True, linear=True)
    jumps = [
        chart for key, error, title in _PAIRS for chart in _chart(title, "t", _jumps(named, key, error), True, True)
    ]
    note = "f and g multiply x_t and D(x_t, t, s) in a jump from t to s. Bars: two standard errors."
    found = [group("l and s", "Bands: two standard errors.", tables), group("f and g", note, jumps)]
    return [one for one in found if one.drawings]


def _jumps(files: Sequence[tuple[str, Mapping[str, Any]]], key: str, error: str) -> list[Line]:
    """Returns f or g against t, to the lowest noise level and to one in the middle."""
    lines: list[Line] = []
    for name, file in files:
        pairs, about = file.get("pairs"), f"{name}, " if len(files) > 1 else ""
        if pairs and key in pairs:
            ends = sorted(set(pairs["s"]))
            for end in dict.fromkeys([ends[0], ends[len(ends) // 2]]):
                rows = [k for k, s in enumerate(pairs["s"]) if s == end]
                part = {column: [values[k] for k in rows] for column, values in pairs.items()}
                lines.append(_with_errors(f"{about}s = {end:.3g}", part, key, error, len(lines)))
    return lines


def _with_errors(label: str, columns: Mapping[str, Sequence[float]], key: str, error: str, style: int) -> Line:
    errors = columns.get(error) or [0.0] * len(columns["t"])
    rows = sorted(
        (t, value, bar)
        for t, value, bar in zip(columns["t"], columns[key], errors, strict=True)
        if math.isfinite(value)
    )
    bars = [(y - 2 * bar, y + 2 * bar) if math.isfinite(bar) else (y, y) for _, y, bar in rows]
    return Line(label, [(t, y) for t, y, _ in rows], bars if error in columns else [], style)


def _by_calls(evaluation: Evaluation, metric: str, sampler: str, label: str, style: int) -> Line:
    rows = sorted((row for row in evaluation.rows if row.sampler == sampler and row.nfe > 0), key=lambda row: row.nfe)
    points = [(row.nfe, y, row.interval(metric) or (y, y)) for row in rows if (y := row.value(metric)) is not None]
    return Line(label, [(x, y) for x, y, _ in points], [ends for _, _, ends in points], style)


def _by_steps(run: Run, metric: str, nfe: int, label: str, style: int) -> Line:
    points = [
        (one.step or 0, y, row.interval(metric) or (y, y))
        for one in run.logged
        for row in one.rows
        if row.sampler == STUDENT and row.nfe == nfe and (y := row.value(metric)) is not None
    ]
    return Line(label, [(x, y) for x, y, _ in points], [ends for _, _, ends in points], style)


def _levels(shown: Sequence[tuple[str, Evaluation]], metric: str) -> list[tuple[str, float]]:
    """Returns the teachers' values; one that several runs agree on is named once."""
    found: dict[tuple[str, int, float], list[str]] = {}
    for name, evaluation in shown:
        for row in evaluation.rows:
            value = row.value(metric)
            if row.sampler == TEACHER and value is not None:
                found.setdefault((row.sampler, row.nfe, value), []).append(name)
    alone = len({key[:2] for key in found}) == len(found)
    return [
        (f"{sampler}, {nfe} NFE" if alone else f"{', '.join(names)}: {sampler}, {nfe} NFE", value)
        for (sampler, nfe, value), names in found.items()
    ]


def _chart(
    title: str,
    x: str,
    lines: Sequence[Line],
    x_log: bool = False,
    linear: bool = False,
    ticks: Sequence[float] = (),
    levels: Sequence[tuple[str, float]] = (),
) -> list[Chart]:
    """Returns a chart, none where nothing can be drawn; values of more than one scale get a logarithmic axis."""
    lines = [line for line in lines if line.points]
    values = [y for line in lines for _, y in line.points]
    if not values:
        return []
    crossing = any(low <= 0 for line in lines for low, _ in line.ends)
    steep = not (linear or crossing) and 0 < 5 * min(values) < max(values)
    drawn = [(label, y) for label, y in levels if y > 0 or not steep]
    return [Chart(title, x, lines, x_log and min(x for line in lines for x, _ in line.points) > 0, steep, ticks, drawn)]


def _titles(evaluations: Iterable[Evaluation]) -> dict[str, str]:
    """Returns metric -> title, in the order in which they occur; the first record that has a title says it."""
    found: dict[str, str] = {}
    for evaluation in evaluations:
        for metric in evaluation.names:
            if found.get(metric, metric) == metric:
                found[metric] = evaluation.title(metric)
    return found


def _interval_note(evaluations: Sequence[Evaluation]) -> str:
    if any(row.intervals for one in evaluations for row in one.rows):
        levels = sorted({one.level for one in evaluations if one.level is not None})
        return (
            f"Bars: {', '.join(f'{100 * level:g} %' for level in levels)} intervals." if levels else "Bars: intervals."
        )
    return "The files state no intervals."


def _apart(places: Sequence[float]) -> list[float]:
    """Returns those of ascending positive places that are far enough from each other for their texts."""
    kept: list[float] = []
    for place in places:
        if not kept or place >= 1.15 * kept[-1]:
            kept.append(place)
    return kept
