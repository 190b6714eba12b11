"""``cdistill plot curves``: what runs measured against iterations (Figs. 2 and 3), and which reaches a value sooner.

Runs may be unfinished. Nothing here needs torch before the picture is drawn.
"""

import csv
import io
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cdistill.errors import CorruptFileError, MissingAssetError, RecipeError, suggest
from cdistill.reporting.records import (
    STUDENT,
    TEACHER,
    Points,
    averaged,
    crossing,
    evaluation_curves,
    training_curves,
)
from cdistill.runtime.console import say, table
from cdistill.storage.files import write_text
from cdistill.storage.run_folder import RunFolder, run_names

_SHARED = ("teacher", "data", "evaluation.samples", "evaluation.split")  # where they differ, values do not compare


@dataclass(frozen=True)
class Run:
    """What a run folder tells.

    Attributes:
        name: The folder's name, or its path where two folders have the same name.
        recipe: The resolved recipe's values: "teacher", "preconditioning.name" and so on.
        evaluations: (NFE, metric) -> points (step, value) of the student.
        losses: Name -> points (step, value) that the training logged.
        teacher: (NFE, metric) -> the teacher's value, where the run got so far.
    """

    name: str
    recipe: Mapping[str, Any]
    evaluations: Mapping[tuple[int, str], Points]
    losses: Mapping[str, Points]
    teacher: Mapping[tuple[int, str], float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and preconditioning; once where they are the same."""
        form = self.recipe.get("preconditioning.name")
        return f"{self.name} ({form})" if form not in (None, self.name) else self.name

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order in which they were measured."""
        return list(dict.fromkeys(metric for _, metric in self.evaluations))

    def calls(self, metric: str) -> list[int]:
        """Numbers of network calls at which a metric was measured."""
        return sorted(nfe for nfe, name in self.evaluations if name == metric)

    def scaled(self, points: Points, images: bool) -> Points:
        """Returns points (iterations, value), or (images, value)."""
        size = int(self.recipe["training.batch_size"]) if images else 1
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


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads runs, finished or not.

    Raises:
        RecipeError: One is named twice.
        MissingAssetError: There is no run in a folder.
        CorruptFileError: A recipe is no TOML.
    """
    names = run_names(paths, "plot curves")
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _read_run(path: Path, name: str) -> Run:
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        raise MissingAssetError(f"{path}: no run here, {folder.recipe.name} is missing; name the folder of a run")
    try:
        recipe = tomllib.loads(folder.recipe.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{folder.recipe}: not TOML: {error}; restore it, or leave this run out") from error
    records = folder.metrics()
    flat = {key: value for key, value in recipe.items() if not isinstance(value, dict)} | {
        f"{name}.{key}": value
        for name, section in recipe.items()
        if isinstance(section, dict)
        for key, value in section.items()
    }
    heun = {key: points[-1][1] for key, points in evaluation_curves([folder.results()], TEACHER).items()}
    return Run(name, flat, evaluation_curves(records), training_curves(records), heun)


def choose_metric(runs: Sequence[Run], wanted: str | None = None) -> str:
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


def choose_calls(runs: Sequence[Run], metric: str, wanted: Sequence[int] | None = None) -> list[int]:
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


def arrivals(nfe: int, lines: Mapping[str, Points], value: float, logarithmic: bool) -> list[Arrival]:
    """Returns when each line reached `value`; the first line is what the others are compared with."""
    found: list[Arrival] = []
    for label, points in lines.items():
        at = crossing(points, value, logarithmic)
        at_most = at is not None and 0 < at == points[0][0]
        ratio = None
        if at and not at_most and not (found and found[0].at_most):
            first = found[0].at if found else at
            ratio = None if first is None else first / at
        found.append(Arrival(nfe, value, label, at, at_most, points[-1][0], ratio))
    return found


def draw_evaluations(
    runs: Sequence[Run], metric: str | None, nfe: Sequence[int] | None, reach: float | None, images: bool, out: Path
) -> dict[str, Any]:
    """Draws the runs' evaluations, writes them as CSV, and prints when each run reached a value.

    Args:
        runs: The first is what the others are compared with.
        metric: Name; the first that all share by default.
        nfe: Network calls; all that the runs share by default.
        reach: Value to reach; by default, for each NFE, the best of the first run. Lower is better in all metrics.
        images: Count images seen instead of iterations.
        out: PNG; the CSV has the same name.

    Returns:
        What was drawn and reached, as JSON.

    Raises:
        RecipeError: The runs have nothing in common, or nothing at all.
    """
    name = choose_metric(runs, metric)
    chosen = choose_calls(runs, name, nfe)
    _warn(runs, images)
    logarithmic = all(value > 0 for run in runs for calls in chosen for _, value in run.evaluations[calls, name])
    logarithmic = logarithmic and (reach is None or reach > 0)
    from cdistill.reporting.plots import Panel, plot_curves

    panels, reached = [], []
    heights = [value for run in runs for (_, key), value in run.teacher.items() if key == name]
    for calls in chosen:
        lines = {run.label: run.scaled(run.evaluations[calls, name], images) for run in runs}
        goal = min(value for _, value in lines[runs[0].label]) if reach is None else reach
        found = arrivals(calls, lines, goal, logarithmic)
        reached += found
        ends = [one.at for one in found if one.at is not None]
        panels.append(Panel(f"{calls} NFE", lines, logarithmic, heights, goal, ends))
    unit = "images" if images else "iterations"
    plot_curves(out, unit, name, panels)
    rows = [
        [run.name, step, STUDENT, calls, name, value]
        for run in runs
        for calls in chosen
        for step, value in run.evaluations[calls, name]
    ]
    rows += [
        [run.name, "", TEACHER, calls, key, value]
        for run in runs
        for (calls, key), value in run.teacher.items()
        if key == name
    ]
    _print_arrivals(
        f"{name}: {unit} until a value is reached\nratio: those of {runs[0].label} over the run's", unit, reached
    )
    return {
        **_write_csv(out, rows), "metric": name, "nfe": chosen, "unit": unit, "runs": [run.label for run in runs],
        "reached": [asdict(one) for one in reached],
    }  # fmt: skip


def draw_losses(runs: Sequence[Run], images: bool, out: Path) -> dict[str, Any]:
    """Draws what the trainings logged, a panel for each name, and writes it as CSV; see `draw_evaluations`.

    Raises:
        RecipeError: A run has logged nothing.
    """
    if empty := [run.name for run in runs if not run.losses]:
        raise RecipeError(f"{empty[0]}: no losses in its metrics.jsonl yet; they come every logging.every steps")
    from cdistill.reporting.plots import Panel, plot_curves

    panels = []
    for name in dict.fromkeys(name for run in runs for name in run.losses):
        lines = {run.label: averaged(run.scaled(run.losses[name], images)) for run in runs if name in run.losses}
        values = [value for points in lines.values() for _, value in points]
        panels.append(Panel(name, lines, 0 < 10 * min(values) < max(values)))
    plot_curves(out, "images" if images else "iterations", "", panels)
    rows = [
        [run.name, step, "", "", name, value]
        for run in runs
        for name, points in run.losses.items()
        for step, value in points
    ]
    names = [panel.title for panel in panels]
    return {**_write_csv(out, rows), "losses": names, "runs": [run.label for run in runs]}


def _warn(runs: Sequence[Run], images: bool) -> None:
    """Says what makes the runs' values or iterations hard to compare, and which runs have no curve."""
    for run in runs:
        if all(len(points) == 1 for points in run.evaluations.values()):
            say(f"plot curves: {run.name} has one evaluation so far; a curve needs --set evaluation.every=N")
    for key in (*_SHARED, *(() if images else ("training.batch_size",))):
        values = [str(run.recipe.get(key)) for run in runs]
        if len(set(values)) > 1:
            advice = "--images compares images seen" if key == "training.batch_size" else "values do not compare"
            say(f"plot curves: the runs differ in {key} ({', '.join(values)}); {advice}")


def _write_csv(picture: Path, rows: Sequence[Sequence[Any]]) -> dict[str, str]:
    """Writes the numbers beside the picture; returns both paths."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "step", "sampler", "nfe", "metric", "value"])
    writer.writerows(rows)
    path = picture.with_suffix(".csv")
    write_text(path, text.getvalue())
    return {"plot": str(picture), "csv": str(path)}


def _print_arrivals(title: str, unit: str, found: Sequence[Arrival]) -> None:
    rows = []
    for one in found:
        at = f"not by {one.last:.0f}" if one.at is None else f"{'<= ' if one.at_most else ''}{one.at:.0f}"
        rows.append([one.run, str(one.nfe), f"{one.value:.4g}", at, "-" if one.ratio is None else f"{one.ratio:.2f}"])
    table(title, ["run", "NFE", "value", unit, "ratio"], rows)
