"""``cdistill plot curves``: what runs measured against iterations (Figs. 2 and 3), and which reaches a value sooner.

Runs may be unfinished. Nothing here needs torch.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdistill.errors import RecipeError, suggest
from cdistill.evaluation.records import STUDENT, TEACHER, direction
from cdistill.reporting.curves import Points, averaged, crossing, evaluation_curves, training_curves
from cdistill.reporting.panels import Line, Panel, draw_panels, in_rows, save_figure
from cdistill.runtime.console import Table
from cdistill.storage.files import write_text
from cdistill.storage.run_folder import RunFolder, RunRecord, read_run, run_names

Runs = Mapping[str, RunRecord]
"""Name of a run, or its path where two folders have the same name -> what its folder holds."""

_SHARED = ("teacher", "data", "evaluation.samples", "evaluation.split")  # where they differ, values do not compare


def read_runs(paths: Sequence[Path]) -> dict[str, RunRecord]:
    """Reads runs, finished or not.

    Raises:
        RecipeError: One is named twice.
        MissingAssetError: There is no run in a folder.
        CorruptFileError: A file of a run is damaged.
    """
    names = run_names(paths, "plot curves")
    return {name: read_run(RunFolder(path)) for path, name in zip(paths, names, strict=True)}


def labels(runs: Runs) -> list[str]:
    """Returns name and preconditioning of each run; once where they are the same."""
    forms = {name: record.values.get("preconditioning.name") for name, record in runs.items()}
    return [f"{name} ({form})" if form not in (None, name) else name for name, form in forms.items()]


def choose_metric(runs: Runs, wanted: str | None = None) -> str:
    """Returns `wanted`, or the first metric of the first run that all runs have.

    Raises:
        RecipeError: There are no evaluations in a run, or not this metric, or none that all have.
    """
    metrics = {name: list(dict.fromkeys(key for _, key in _curves(record))) for name, record in runs.items()}
    for name, known in metrics.items():
        if not known:
            raise RecipeError(
                f"{name}: no evaluations in its metrics.jsonl yet; they come with --set evaluation.every=N"
            )
        if wanted is not None and wanted not in known:
            raise RecipeError(f"--metric: {name} has no {wanted!r}; {suggest(wanted, known)}")
    first, *others = metrics.values()
    common = [metric for metric in first if all(metric in known for known in others)]
    if not common:
        had = "; ".join(f"{name}: {', '.join(known)}" for name, known in metrics.items())
        raise RecipeError(f"plot curves: no metric that all runs have ({had}); set evaluation.metrics alike")
    return wanted or common[0]


def choose_calls(runs: Runs, metric: str, wanted: Sequence[int] | None = None) -> list[int]:
    """Returns `wanted`, or the numbers of network calls at which all runs measured a metric.

    Raises:
        RecipeError: A run lacks one of them, or all runs share none.
    """
    calls = {name: sorted(nfe for nfe, key in _curves(record) if key == metric) for name, record in runs.items()}
    had = "; ".join(f"{name}: {', '.join(map(str, own))}" for name, own in calls.items())
    common = set.intersection(*map(set, calls.values()))
    if missing := [nfe for nfe in wanted or [] if nfe not in common]:
        raise RecipeError(f"--nfe: not every run measured {metric} at {missing[0]} ({had}); choose among these")
    if not common:
        raise RecipeError(f"plot curves: no NFE at which all runs measured {metric} ({had}); set evaluation.nfe alike")
    return sorted(set(wanted or common))


def arrivals(
    nfe: int, curves: Mapping[str, Points], value: float, logarithmic: bool, higher: bool = False
) -> list[dict[str, Any]]:
    """Returns when each curve reached `value`, as JSON; the first curve is what the others are compared with.

    `at` is None where it was not reached by the `last` evaluation, and may be later than the truth (`at_most`) where
    the first evaluation was there already. `ratio` is the first curve's `at` over this one's: 2 is twice as fast; None
    where either is unknown, or zero.
    """
    reached: list[dict[str, Any]] = []
    for label, points in curves.items():
        at = crossing(points, value, logarithmic, higher)
        at_most = at is not None and 0 < at == points[0][0]
        first, unsure = (reached[0]["at"], reached[0]["at_most"]) if reached else (at, at_most)
        ratio = first / at if at and first is not None and not (at_most or unsure) else None
        reached.append(
            {"nfe": nfe, "value": value, "run": label, "at": at, "at_most": at_most, "last": points[-1][0],
             "ratio": ratio}
        )  # fmt: skip
    return reached


def draw_evaluations(
    runs: Runs, metric: str | None, nfe: Sequence[int] | None, reach: float | None, images: bool, out: Path
) -> dict[str, Any]:
    """Draws the runs' evaluations, writes them as CSV, and finds when each run reached a value.

    Args:
        runs: The first is what the others are compared with.
        metric: Name; the first that all share by default.
        nfe: Network calls; all that the runs share by default.
        reach: Value to reach; by default, for each NFE, the best of the first run.
        images: Count images seen instead of iterations.
        out: PNG; the CSV has the same name.

    Returns:
        What was drawn and reached, as JSON; "notes" are what makes the runs hard to compare.

    Raises:
        RecipeError: The runs have nothing in common, or nothing at all.
    """
    name = choose_metric(runs, metric)
    chosen = choose_calls(runs, name, nfe)
    higher = _higher_is_better(runs, name)
    measured = {run: {nfe: _curves(record)[nfe, name] for nfe in chosen} for run, record in runs.items()}
    logarithmic = all(y > 0 for own in measured.values() for points in own.values() for _, y in points)
    logarithmic = logarithmic and (reach is None or reach > 0)
    teachers = {run: _teacher(record, name) for run, record in runs.items()}
    levels = [("teacher", y) for own in teachers.values() for y in own.values() if y > 0 or not logarithmic]
    unit = "images" if images else "iterations"
    panels: list[Panel] = []
    reached: list[dict[str, Any]] = []
    for calls in chosen:
        curves = _scaled(runs, {run: own[calls] for run, own in measured.items()}, images)
        first = [y for _, y in next(iter(curves.values()))]
        goal = (max(first) if higher else min(first)) if reach is None else reach
        here = arrivals(calls, curves, goal, logarithmic, higher)
        circles = [(one["at"], goal) for one in here if one["at"] is not None]
        lines = _lines(runs, curves)
        panels.append(Panel(f"{calls} NFE", unit, lines, name, y_log=logarithmic, levels=levels, reached=circles))
        reached += here
    save_figure(draw_panels("", in_rows(panels)), out)
    rows: list[Sequence[Any]] = [
        [run, step, STUDENT, calls, name, value]
        for run, own in measured.items()
        for calls, points in own.items()
        for step, value in points
    ]
    rows += [[run, "", TEACHER, calls, name, y] for run, own in teachers.items() for calls, y in own.items()]
    return {
        **_write_csv(out, rows), "metric": name, "better": "higher" if higher else "lower", "nfe": chosen, "unit": unit,
        "runs": labels(runs), "reached": reached, "notes": _notes(runs, images),
    }  # fmt: skip


def draw_losses(runs: Runs, images: bool, out: Path) -> dict[str, Any]:
    """Draws what the trainings logged, a panel for each name, and writes it as CSV; see `draw_evaluations`.

    Raises:
        RecipeError: A run has logged nothing.
    """
    losses = {run: training_curves(record.training) for run, record in runs.items()}
    if empty := [run for run, own in losses.items() if not own]:
        raise RecipeError(f"{empty[0]}: no losses in its metrics.jsonl yet; they come every logging.every steps")
    panels = []
    for name in dict.fromkeys(name for own in losses.values() for name in own):
        curves = _scaled(runs, {run: own[name] for run, own in losses.items() if name in own}, images)
        curves = {label: averaged(points) for label, points in curves.items()}
        values = [y for points in curves.values() for _, y in points]
        y_log = 0 < 10 * min(values) < max(values)
        panels.append(Panel(name, "images" if images else "iterations", _lines(runs, curves), y_log=y_log))
    save_figure(draw_panels("", in_rows(panels)), out)
    rows = [
        [run, step, "", "", name, value]
        for run, own in losses.items()
        for name, points in own.items()
        for step, value in points
    ]
    return {**_write_csv(out, rows), "losses": [one.title for one in panels], "runs": labels(runs), "notes": []}


def arrivals_table(record: Mapping[str, Any]) -> Table:
    """Returns what `draw_evaluations` found."""
    rows = []
    for one in record["reached"]:
        at = f"not by {one['last']:.0f}" if one["at"] is None else f"{'<= ' if one['at_most'] else ''}{one['at']:.0f}"
        ratio = "-" if one["ratio"] is None else f"{one['ratio']:.2f}"
        rows.append([one["run"], str(one["nfe"]), f"{one['value']:.4g}", at, ratio])
    title = f"{record['metric']}, {record['better']} is better: {record['unit']} until a value is reached\n"
    title += f"ratio: those of {record['runs'][0]} over the run's"
    return Table(title, ["run", "NFE", "value", record["unit"], "ratio"], rows)


def _curves(record: RunRecord) -> dict[tuple[int, str], Points]:
    """Returns (NFE, metric) -> points (step, value) of the student."""
    return evaluation_curves(record.evaluations)


def _teacher(record: RunRecord, metric: str) -> dict[int, float]:
    """Returns NFE -> the teacher's value, once the run is evaluated."""
    curves = evaluation_curves([result for result in (record.results.get("evaluation.json"),) if result], TEACHER)
    return {nfe: points[-1][1] for (nfe, name), points in curves.items() if name == metric}


def _scaled(runs: Runs, curves: Mapping[str, Points], images: bool) -> dict[str, Points]:
    """Returns label -> points (iterations, value), or (images, value)."""
    scaled: dict[str, Points] = {}
    for (run, record), label in zip(runs.items(), labels(runs), strict=True):
        if run in curves:
            size = int(record.values["training.batch_size"]) if images else 1
            scaled[label] = [(step * size, value) for step, value in curves[run]]
    return scaled


def _lines(runs: Runs, curves: Mapping[str, Points]) -> list[Line]:
    names = labels(runs)
    return [Line(label, points, style=names.index(label)) for label, points in curves.items()]


def _higher_is_better(runs: Runs, metric: str) -> bool:
    """Whether the runs' records state it of a metric; those of version 0.1 may lack it."""
    records = [one for record in runs.values() for one in (*record.evaluations, *record.results.values())]
    facts = {name: fact for record in records for name, fact in record.get("metrics", {}).items()}
    return direction(metric, facts) == "higher"


def _notes(runs: Runs, images: bool) -> list[str]:
    """Returns what makes the runs' values or iterations hard to compare, and which runs have no curve."""
    notes = [
        f"plot curves: {name} has one evaluation so far; a curve needs --set evaluation.every=N"
        for name, record in runs.items()
        if all(len(points) == 1 for points in _curves(record).values())
    ]
    for key in (*_SHARED, *(() if images else ("training.batch_size",))):
        values = [str(record.values.get(key)) for record in runs.values()]
        if len(set(values)) > 1:
            advice = "--images compares images seen" if key == "training.batch_size" else "values do not compare"
            notes.append(f"plot curves: the runs differ in {key} ({', '.join(values)}); {advice}")
    return notes


def _write_csv(picture: Path, rows: Sequence[Sequence[Any]]) -> dict[str, str]:
    """Writes the numbers beside the picture; returns both paths."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "step", "sampler", "nfe", "metric", "value"])
    writer.writerows(rows)
    path = picture.with_suffix(".csv")
    write_text(path, text.getvalue())
    return {"plot": str(picture), "csv": str(path)}
