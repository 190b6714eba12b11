"""``cdistill plot curves``: what runs measured against iterations (Figs. 2 and 3), and which reaches a value sooner.

Runs may be unfinished. Nothing here needs torch.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cdistill.errors import RecipeError, suggest
from cdistill.evaluation.records import STUDENT, TEACHER, direction
from cdistill.reporting.panels import Line, Panel, draw_panels, in_rows, save_figure
from cdistill.reporting.records import (
    Points,
    averaged,
    crossing,
    evaluation_curves,
    training_curves,
)
from cdistill.storage.files import write_text
from cdistill.storage.run_folder import RunFolder, RunRecord, read_run, run_names

_SHARED = ("teacher", "data", "evaluation.samples", "evaluation.split")  # where they differ, values do not compare


@dataclass(frozen=True)
class CurvesOfRun:
    """The curves of a run.

    Attributes:
        name: The folder's name, or its path where two folders have the same name.
        record: What its folder holds.
    """

    name: str
    record: RunRecord

    @cached_property
    def evaluations(self) -> Mapping[tuple[int, str], Points]:
        """(NFE, metric) -> points (step, value) of the student."""
        return evaluation_curves(self.record.evaluations)

    @cached_property
    def losses(self) -> Mapping[str, Points]:
        """Name -> points (step, value) that the training logged."""
        return training_curves(self.record.training)

    def teacher(self, metric: str) -> dict[int, float]:
        """NFE -> the teacher's value, once the run is evaluated."""
        results = [self.record.results[name] for name in ("evaluation.json",) if name in self.record.results]
        curves = evaluation_curves(results, TEACHER)
        return {nfe: points[-1][1] for (nfe, name), points in curves.items() if name == metric}

    @property
    def label(self) -> str:
        """Name and preconditioning; once where they are the same."""
        preconditioning = self.record.values.get("preconditioning.name")
        return f"{self.name} ({preconditioning})" if preconditioning not in (None, self.name) else self.name

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order in which they were measured."""
        return list(dict.fromkeys(metric for _, metric in self.evaluations))

    def calls(self, metric: str) -> list[int]:
        """Numbers of network calls at which a metric was measured."""
        return sorted(nfe for nfe, name in self.evaluations if name == metric)

    def scaled(self, points: Points, images: bool) -> Points:
        """Returns points (iterations, value), or (images, value)."""
        size = int(self.record.values["training.batch_size"]) if images else 1
        return [(step * size, value) for step, value in points]


@dataclass(frozen=True)
class Arrival:
    """When a run reached a value.

    Attributes:
        nfe: Network calls.
        value: What was to be reached.
        run: Label.
        at: Iterations or images; None if it was not reached.
        at_most: Whether it may have been sooner: the first evaluation was there already.
        last: The last evaluation.
        ratio: The first run's `at` over this one's: 2 is twice as fast; None where either is unknown, or zero.
    """

    nfe: int
    value: float
    run: str
    at: float | None
    at_most: bool
    last: float
    ratio: float | None = None


def read_runs(paths: Sequence[Path]) -> list[CurvesOfRun]:
    """Reads runs, finished or not.

    Raises:
        RecipeError: One is named twice.
        MissingAssetError: There is no run in a folder.
        CorruptFileError: A file of a run is damaged.
    """
    names = run_names(paths, "plot curves")
    return [CurvesOfRun(name, read_run(RunFolder(path))) for path, name in zip(paths, names, strict=True)]


def choose_metric(runs: Sequence[CurvesOfRun], wanted: str | None = None) -> str:
    """Returns `wanted`, or the first metric of the first run that all runs have.

    Raises:
        RecipeError: There are no evaluations in a run, or not this metric, or none that all have.
    """
    for run in runs:
        if not run.evaluations:
            raise RecipeError(
                f"{run.name}: no evaluations in its metrics.jsonl yet; they come with --set evaluation.every=N"
            )
        if wanted is not None and wanted not in run.metrics:
            raise RecipeError(f"--metric: {run.name} has no {wanted!r}; {suggest(wanted, run.metrics)}")
    common = [metric for metric in runs[0].metrics if all(metric in run.metrics for run in runs)]
    if not common:
        had = "; ".join(f"{run.name}: {', '.join(run.metrics)}" for run in runs)
        raise RecipeError(f"plot curves: no metric that all runs have ({had}); set evaluation.metrics alike")
    return wanted or common[0]


def choose_calls(runs: Sequence[CurvesOfRun], metric: str, wanted: Sequence[int] | None = None) -> list[int]:
    """Returns `wanted`, or the numbers of network calls at which all runs measured a metric.

    Raises:
        RecipeError: A run lacks one of them, or all runs share none.
    """
    had = "; ".join(f"{run.name}: {', '.join(map(str, run.calls(metric)))}" for run in runs)
    common = [calls for calls in runs[0].calls(metric) if all(calls in run.calls(metric) for run in runs)]
    if missing := [calls for calls in wanted or [] if calls not in common]:
        raise RecipeError(f"--nfe: not every run measured {metric} at {missing[0]} ({had}); choose among these")
    if not common:
        raise RecipeError(f"plot curves: no NFE at which all runs measured {metric} ({had}); set evaluation.nfe alike")
    return sorted(set(wanted or common))


def arrivals(
    nfe: int, lines: Mapping[str, Points], value: float, logarithmic: bool, higher: bool = False
) -> list[Arrival]:
    """Returns when each line reached `value`; the first line is what the others are compared with."""
    reached: list[Arrival] = []
    for label, points in lines.items():
        at = crossing(points, value, logarithmic, higher)
        at_most = at is not None and 0 < at == points[0][0]
        ratio = None
        if at and not at_most and not (reached and reached[0].at_most):
            first = reached[0].at if reached else at
            ratio = None if first is None else first / at
        reached.append(Arrival(nfe, value, label, at, at_most, points[-1][0], ratio))
    return reached


def draw_evaluations(
    runs: Sequence[CurvesOfRun],
    metric: str | None,
    nfe: Sequence[int] | None,
    reach: float | None,
    images: bool,
    out: Path,
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
    logarithmic = all(value > 0 for run in runs for calls in chosen for _, value in run.evaluations[calls, name])
    logarithmic = logarithmic and (reach is None or reach > 0)
    unit = "images" if images else "iterations"
    heights = [("teacher", value) for run in runs for value in run.teacher(name).values()]
    panels, reached = [], []
    for calls in chosen:
        curves = {run.label: run.scaled(run.evaluations[calls, name], images) for run in runs}
        first = [value for _, value in curves[runs[0].label]]
        goal = (max(first) if higher else min(first)) if reach is None else reach
        found = arrivals(calls, curves, goal, logarithmic, higher)
        reached += found
        panels.append(
            Panel(
                f"{calls} NFE", unit, _lines(curves), y=name, y_log=logarithmic,
                levels=[(label, y) for label, y in heights if y > 0 or not logarithmic],
                reached=[(one.at, goal) for one in found if one.at is not None],
            )
        )  # fmt: skip
    save_figure(draw_panels("", in_rows(panels)), out)
    rows = [
        [run.name, step, STUDENT, calls, name, value]
        for run in runs
        for calls in chosen
        for step, value in run.evaluations[calls, name]
    ]
    rows += [[run.name, "", TEACHER, calls, name, value] for run in runs for calls, value in run.teacher(name).items()]
    return {
        **_write_csv(out, rows), "metric": name, "better": "higher" if higher else "lower", "nfe": chosen, "unit": unit,
        "runs": [run.label for run in runs], "reached": [asdict(one) for one in reached],
        "notes": _notes(runs, images),
    }  # fmt: skip


def draw_losses(runs: Sequence[CurvesOfRun], images: bool, out: Path) -> dict[str, Any]:
    """Draws what the trainings logged, a panel for each name, and writes it as CSV; see `draw_evaluations`.

    Raises:
        RecipeError: A run has logged nothing.
    """
    if empty := [run.name for run in runs if not run.losses]:
        raise RecipeError(f"{empty[0]}: no losses in its metrics.jsonl yet; they come every logging.every steps")
    panels = []
    for name in dict.fromkeys(name for run in runs for name in run.losses):
        curves = {run.label: averaged(run.scaled(run.losses[name], images)) for run in runs if name in run.losses}
        values = [value for points in curves.values() for _, value in points]
        steep = 0 < 10 * min(values) < max(values)
        panels.append(Panel(name, "images" if images else "iterations", _lines(curves), y_log=steep))
    save_figure(draw_panels("", in_rows(panels)), out)
    rows = [
        [run.name, step, "", "", name, value]
        for run in runs
        for name, points in run.losses.items()
        for step, value in points
    ]
    names = [panel.title for panel in panels]
    return {**_write_csv(out, rows), "losses": names, "runs": [run.label for run in runs], "notes": []}


def arrivals_table(record: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Returns title, columns and rows of what `draw_evaluations` found."""
    rows = []
    for one in record["reached"]:
        at = f"not by {one['last']:.0f}" if one["at"] is None else f"{'<= ' if one['at_most'] else ''}{one['at']:.0f}"
        ratio = "-" if one["ratio"] is None else f"{one['ratio']:.2f}"
        rows.append([one["run"], str(one["nfe"]), f"{one['value']:.4g}", at, ratio])
    title = f"{record['metric']}, {record['better']} is better: {record['unit']} until a value is reached\n"
    title += f"ratio: those of {record['runs'][0]} over the run's"
    return title, ["run", "NFE", "value", record["unit"], "ratio"], rows


def _lines(curves: Mapping[str, Points]) -> list[Line]:
    return [Line(label, points, style=style) for style, (label, points) in enumerate(curves.items())]


def _higher_is_better(runs: Sequence[CurvesOfRun], metric: str) -> bool:
    """Whether the runs' records say so of a metric; those of version 0.1 lack it."""
    records = [record for run in runs for record in (*run.record.evaluations, *run.record.results.values())]
    facts = {name: fact for record in records for name, fact in record.get("metrics", {}).items()}
    return direction(metric, facts) == "higher"


def _notes(runs: Sequence[CurvesOfRun], images: bool) -> list[str]:
    """Returns what makes the runs' values or iterations hard to compare, and which runs have no curve."""
    notes = [
        f"plot curves: {run.name} has one evaluation so far; a curve needs --set evaluation.every=N"
        for run in runs
        if all(len(points) == 1 for points in run.evaluations.values())
    ]
    for key in (*_SHARED, *(() if images else ("training.batch_size",))):
        values = [str(run.record.values.get(key)) for run in runs]
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
