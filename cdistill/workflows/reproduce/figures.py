"""The paper's Figures 2 to 6 and the study's picture, from the outcomes of trials."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cdistill.preconditionings import Preconditioning
from cdistill.reporting.plots import COLOURS, draw_heat_map, log_axis, log_values, save_figure
from cdistill.reporting.records import Points
from cdistill.schedule import EPS, log_uniform_grid
from cdistill.workflows.reproduce.experiments import ARMS
from cdistill.workflows.reproduce.outcomes import Outcomes, Ratio

_SIDE = 3.6  # inches
_EDGE = 3.0  # of the study's picture


@dataclass(frozen=True)
class Panel:
    """Training curves of several arms.

    Attributes:
        title: Heading.
        metric: Label of the vertical axis.
        arms: Arm -> curves, one for each seed.
        teacher: The teacher's value.
    """

    title: str
    metric: str
    arms: Mapping[str, Sequence[Points]]
    teacher: float | None


def panel(found: Outcomes, arms: Sequence[str], nfe: int) -> Panel:
    """Returns the curves of arms at a number of network calls, as far as there are such."""
    metric = found.data.metric
    curves = {arm: list(found.curves(arm, nfe, metric).values()) for arm in arms}
    teacher = found.teacher(metric)
    title = f"{found.data.name}{', CM' if 'cm' in arms else ''}, {nfe} NFE"
    shown = {arm: lines for arm, lines in curves.items() if lines}
    return Panel(title, metric, shown, None if teacher is None else teacher.value)


def plot_panels(path: Path, title: str, rows: Sequence[Sequence[Panel]]) -> None:
    """Draws panels in rows: for each arm the geometric mean over its seeds, and a band from least to greatest."""
    figure, axes = _grid(title, len(rows), max(map(len, rows)))
    for line, panels in zip(axes, rows, strict=True):
        for axis, one in zip(line, panels, strict=False):
            _draw(axis, one)
        for axis in line[len(panels) :]:
            axis.axis("off")
    _legend(figure, axes)
    save_figure(figure, path)


def plot_single_step(path: Path, rows: Sequence[tuple[Panel, Panel, str, Mapping[str, Preconditioning]]]) -> None:
    """Fig. 2: training curves of CM and of CTM in one step, and f and g of jumps to eps.

    Args:
        path: PNG.
        rows: For each data set the two panels, its name, and name -> preconditioning.
    """
    figure, axes = _grid("Fig. 2: one step", len(rows), 3)
    grid = log_uniform_grid(200)
    for line, (consistency, trajectory, name, forms) in zip(axes, rows, strict=True):
        _draw(line[0], consistency)
        _draw(line[1], trajectory)
        for label, preconditioning in forms.items():
            f, g = preconditioning(grid, grid.new_full(grid.shape, EPS))
            colour = COLOURS[label]
            line[2].plot(grid.numpy(), g.numpy(), color=colour, lw=1.2, label=f"{label}: g")
            line[2].plot(grid.numpy(), f.numpy(), color=colour, lw=1.2, ls="--", label=f"{label}: f")
        log_axis(line[2], "t", f"{name}: f(t, eps), g(t, eps)")
        line[2].legend(fontsize=7)
    _legend(figure, [line[:2] for line in axes])
    save_figure(figure, path)


def plot_heat_maps(path: Path, forms: Mapping[str, Preconditioning]) -> None:
    """Fig. 4: g(t, s) of each form."""
    columns = min(len(forms), 4)
    figure, axes = _grid("Fig. 4: g(t, s)", math.ceil(len(forms) / columns), columns)
    flat = [axis for line in axes for axis in line]
    for axis, (name, form) in zip(flat, forms.items(), strict=False):
        draw_heat_map(figure, axis, name, form, log_uniform_grid(120))
    for axis in flat[len(forms) :]:
        axis.axis("off")
    save_figure(figure, path)


@dataclass(frozen=True)
class Mark:
    """A preconditioning on a data set, before and after the training, compared with CTM's.

    Attributes:
        data: The data set.
        form: The preconditioning.
        before: Ratio before the training.
        after: Ratio after it.
    """

    data: str
    form: str
    before: float
    after: Ratio


def plot_study(path: Path, marks: Mapping[str, Sequence[Mark]]) -> None:
    """Draws ratios in the second half of the training against those before it, a panel for each title.

    A colour is a preconditioning, a shape a data set; what lies beyond a factor of `_EDGE` is drawn at the edge.
    """
    title = f"before and in the second half of the training, over CTM (beyond {_EDGE:g} times: at the edge)"
    figure, (line,) = _grid(title, 1, len(marks), 4.4)
    names = dict.fromkeys(mark.data for part in marks.values() for mark in part)
    shapes = dict(zip(names, "osD^v<>Ph*", strict=False))
    for axis, (heading, part) in zip(line, marks.items(), strict=True):
        for mark in part:
            low, middle, high = (_clip(value) for value in (mark.after.low, mark.after.value, mark.after.high))
            axis.errorbar(
                _clip(mark.before), middle, [[middle - low], [high - middle]], marker=shapes[mark.data],
                color=COLOURS[mark.form], ls="", ms=5, lw=0.7,
            )  # fmt: skip
        axis.axhline(1, color="0.6", lw=0.8)
        axis.axvline(1, color="0.6", lw=0.8)
        for limits in (axis.set_xlim, axis.set_ylim):
            limits(0.94 / _EDGE, 1.06 * _EDGE)
        log_values(axis)
        log_values(axis, horizontal=True)
        axis.set_xlabel("untrained, over CTM: MSE to the teacher")
        axis.set_ylabel("trained, over CTM")
        axis.set_title(heading, fontsize=10)
    for name, shape in shapes.items():
        line[0].plot([], [], shape, color="0.4", label=name)
    for form in dict.fromkeys(mark.form for part in marks.values() for mark in part):
        line[0].plot([], [], lw=4, color=COLOURS[form], label=form)
    _legend(figure, [line[:1]])
    save_figure(figure, path)


def _clip(value: float) -> float:
    return min(max(value, 1 / _EDGE), _EDGE)


def _grid(title: str, rows: int, columns: int, side: float = _SIDE) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(max(6.4, 1.25 * side * columns), side * rows + 0.9), layout="constrained")
    figure.suptitle(title)
    return figure, [list(line) for line in figure.subplots(rows, columns, squeeze=False)]


def _draw(axis: Axes, one: Panel) -> None:
    for arm, curves in one.arms.items():
        shared = sorted(set.intersection(*[{step for step, _ in points} for points in curves]))
        values = np.array([[dict(points)[step] for step in shared] for points in curves])
        colour = COLOURS[ARMS[arm].form]
        middle = np.exp(np.log(np.maximum(values, 1e-300)).mean(0))
        axis.plot(shared, middle, ".-", color=colour, lw=1.4, ms=4, label=ARMS[arm].title)
        axis.fill_between(shared, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
    if not one.arms:
        axis.text(0.5, 0.5, "not run", ha="center", transform=axis.transAxes)
    if one.teacher is not None:
        axis.axhline(one.teacher, color="0.35", ls="--", lw=1, label="teacher")
    if one.arms:
        log_values(axis)
    axis.set_title(one.title, fontsize=10)
    axis.set_xlabel("iterations")
    axis.set_ylabel(one.metric)
    axis.grid(alpha=0.25)


def _legend(figure: Figure, axes: Sequence[Sequence[Axes]]) -> None:
    handles = {
        name: handle
        for line in axes
        for axis in line
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
