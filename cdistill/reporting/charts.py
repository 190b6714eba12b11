"""Which charts a page has: metrics against calls and iterations, losses, coefficients."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cdistill.evaluation.records import STUDENT, TEACHER, UNTRAINED, Evaluation, Row
from cdistill.reporting.curves import averaged, training_curves
from cdistill.reporting.panels import Line, Panel, steep
from cdistill.reporting.reading import Run

_TABLE = (("l", "l_error", "l(t)"), ("s", "s_error", "s(t)"))
_PAIRS = (("f", "f_error", "f(t, s)"), ("g", "g_error", "g(t, s)"))


Group = tuple[str, str, Sequence[Panel]]
"""(heading, what the reader must know, panels with one legend, at least one)."""


def by_calls(runs: Sequence[Run]) -> list[Group]:
    """Returns each metric against the number of network calls, with its intervals, from the runs' own evaluations."""
    shown = [(run, next(iter(run.evaluations.values()))) for run in runs if run.evaluations]
    panels: list[Panel] = []
    for metric, title in _titles(evaluation for _, evaluation in shown).items():
        lines: list[Line] = []
        for run, evaluation in shown:
            for sampler in dict.fromkeys(row.sampler for row in evaluation.rows if row.sampler != TEACHER):
                if len(runs) == 1 or sampler != UNTRAINED:
                    label = sampler if len(runs) == 1 else f"{run.name}: {sampler}"
                    rows = sorted(evaluation.of(sampler), key=lambda row: row.nfe)
                    lines.append(_line(label, [(row.nfe, row) for row in rows if row.nfe], metric, len(lines)))
        levels = _levels([(run.name, evaluation) for run, evaluation in shown], metric)
        places = sorted({x for line in lines for x, _ in line.points})
        panels += _panel(title, "NFE", lines, x_log=True, ticks=places, levels=levels)
    return _group("Metrics against network calls", _interval_note([one for _, one in shown]), panels)


def while_training(runs: Sequence[Run]) -> list[Group]:
    """Returns what was measured and logged during the trainings, against iterations."""
    note = "Values of the steps that were logged; neighbours are averaged where there are many."
    lines = [line for run in runs for line in _trained(run, len(runs) > 1)]
    jumps = _panel("jumps", "noise level", lines, x_log=True, linear=True)
    about = "How often a jump from t to s that is trained starts, and ends, at each noise level."
    return [
        *_group("Metrics against iterations", "Of the student, measured while it was trained.", _metrics(runs)),
        *_group("Losses", note, _losses(runs)),
        *_group("Which jumps are trained", about, jumps),
    ]


def _trained(run: Run, named: bool) -> Iterator[Line]:
    """Yields the shares of the trained jumps that start, and that end, at each noise level."""
    jumps = run.record.environment.get("jumps") or {}
    for style, (key, what) in enumerate((("starts", "start"), ("ends", "end"))):
        try:
            points = [(float(t), float(share)) for t, share in zip(jumps["levels"], jumps[key], strict=True)]
        except (TypeError, KeyError, ValueError, OverflowError):
            return  # an older run, or a file that says something else
        if all(math.isfinite(t) and t > 0 and math.isfinite(share) for t, share in points):
            yield Line(f"{run.name}: {what}" if named else what, points, style=style)


def _metrics(runs: Sequence[Run]) -> list[Panel]:
    shown = [run for run in runs if len(run.logged) > 1]
    titles = _titles(one for run in shown for one in [*run.evaluations.values(), *run.logged])
    calls = sorted({row.nfe for run in shown for one in run.logged for row in one.of(STUDENT)})
    panels: list[Panel] = []
    for metric, title in titles.items():
        if len(runs) == 1:
            lines = [_line(f"{nfe} NFE", _by_steps(shown[0], nfe), metric, k) for k, nfe in enumerate(calls)]
            panels += _panel(title, "iterations", lines)
            continue
        for nfe in calls:
            lines = [_line(run.name, _by_steps(run, nfe), metric, runs.index(run)) for run in shown]
            panels += _panel(f"{title}, {nfe} NFE", "iterations", lines)
    return panels


def _losses(runs: Sequence[Run]) -> list[Panel]:
    """Returns everything that the trainings logged and that is not zero throughout."""
    curves = [training_curves(run.record.training) for run in runs]
    panels: list[Panel] = []
    for name in dict.fromkeys(name for one in curves for name in one):
        lines: list[Line] = []
        for number, (run, one) in enumerate(zip(runs, curves, strict=True)):
            points = [point for point in one.get(name, []) if math.isfinite(point[1])]
            lines.append(Line(run.name, averaged(points) if points else [], style=number))
        if any(y for line in lines for _, y in line.points):
            panels += _panel(name.replace("_", " "), "iterations", lines)
    return panels


def coefficients(runs: Sequence[Run]) -> list[Group]:
    """Returns l, s, f and g of the runs that have a coefficient file, with two standard errors; a shared file once."""
    files: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for run in runs:
        if run.coefficients is not None and run.coefficients.get("table"):
            digest = str(run.coefficients["sha256"])
            names = f"{files[digest][0]}, {run.name}" if digest in files else run.name
            files[digest] = names, run.coefficients
    named = list(files.values())
    tables: list[Panel] = []
    for key, error, title in _TABLE:
        lines = [_with_errors(name, file["table"], key, error, k) for k, (name, file) in enumerate(named)]
        tables += _panel(title, "t", lines, x_log=True, linear=True)
    jumps = [
        panel
        for key, error, title in _PAIRS
        for panel in _panel(title, "t", list(_jumps(named, key, error)), x_log=True, linear=True)
    ]
    note = "f and g multiply x_t and D(x_t, t, s) in a jump from t to s. Bars and bands: two standard errors."
    return [*_group("l and s", "Bands: two standard errors.", tables), *_group("f and g", note, jumps)]


def _jumps(files: Sequence[tuple[str, Mapping[str, Any]]], key: str, error: str) -> Iterator[Line]:
    """Yields f or g against t, to the lowest noise level and to one in the middle."""
    style = 0
    for name, file in files:
        pairs, about = file.get("pairs"), f"{name}, " if len(files) > 1 else ""
        if pairs and key in pairs:
            ends = sorted(set(pairs["s"]))
            for end in dict.fromkeys([ends[0], ends[len(ends) // 2]]):
                rows = [k for k, s in enumerate(pairs["s"]) if s == end]
                columns = {column: [values[k] for k in rows] for column, values in pairs.items()}
                yield _with_errors(f"{about}s = {end:.3g}", columns, key, error, style)
                style += 1


def _with_errors(label: str, columns: Mapping[str, Sequence[float]], key: str, error: str, style: int) -> Line:
    errors = columns.get(error) or [0.0] * len(columns["t"])
    rows = sorted(
        (t, value, bar)
        for t, value, bar in zip(columns["t"], columns[key], errors, strict=True)
        if math.isfinite(value)
    )
    bars = [(y - 2 * bar, y + 2 * bar) if math.isfinite(bar) else (y, y) for _, y, bar in rows]
    return Line(label, [(t, y) for t, y, _ in rows], bars if error in columns else [], style)


def _line(label: str, rows: Iterable[tuple[float, Row]], metric: str, style: int) -> Line:
    """Returns the finite values of a metric, with their intervals."""
    points = [(x, y, row.interval(metric) or (y, y)) for x, row in rows if (y := row.value(metric)) is not None]
    return Line(label, [(x, y) for x, y, _ in points], [ends for _, _, ends in points], style)


def _by_steps(run: Run, nfe: int) -> list[tuple[float, Row]]:
    return [(one.step or 0, row) for one in run.logged for row in one.of(STUDENT) if row.nfe == nfe]


def _levels(shown: Sequence[tuple[str, Evaluation]], metric: str) -> list[tuple[str, float]]:
    """Returns the teachers' values; one that several runs agree on is named once."""
    values: dict[tuple[int, float], list[str]] = {}
    for name, evaluation in shown:
        for row in evaluation.of(TEACHER):
            if (value := row.value(metric)) is not None:
                values.setdefault((row.nfe, value), []).append(name)
    alone = len({nfe for nfe, _ in values}) == len(values)
    return [
        (f"{TEACHER}, {nfe} NFE" if alone else f"{', '.join(names)}: {TEACHER}, {nfe} NFE", value)
        for (nfe, value), names in values.items()
    ]


def _panel(title: str, x: str, lines: Sequence[Line], *, x_log: bool = False, linear: bool = False,
           ticks: Sequence[float] = (), levels: Sequence[tuple[str, float]] = ()) -> list[Panel]:  # fmt: skip
    """Returns a panel, none where nothing can be drawn; values of more than one scale get a logarithmic axis."""
    lines = [line for line in lines if line.points]
    values = [y for line in lines for _, y in line.points]
    if not values:
        return []
    crossing = any(low <= 0 for line in lines for low, _ in line.ends)
    y_log = not (linear or crossing) and steep(values)
    drawn = [(label, y) for label, y in levels if y > 0 or not y_log]
    x_log = x_log and min(x for line in lines for x, _ in line.points) > 0
    return [Panel(title, x, lines, x_log=x_log, y_log=y_log, ticks=ticks, levels=drawn)]


def _group(title: str, note: str, panels: Sequence[Panel]) -> list[Group]:
    return [(title, note, panels)] if panels else []


def _titles(evaluations: Iterable[Evaluation]) -> dict[str, str]:
    """Returns metric -> title, in the order in which they occur, from the first record that has a title."""
    titles: dict[str, str] = {}
    for evaluation in evaluations:
        for metric in evaluation.names:
            if titles.get(metric, metric) == metric:
                titles[metric] = evaluation.title(metric)
    return titles


def _interval_note(evaluations: Sequence[Evaluation]) -> str:
    if not any(row.intervals for one in evaluations for row in one.rows):
        return "The files state no intervals."
    levels = sorted({one.level for one in evaluations if one.level is not None})
    stated = ", ".join(f"{100 * level:g} %" for level in levels)
    return f"Bars and bands: {stated} intervals." if levels else "Bars and bands: intervals."
