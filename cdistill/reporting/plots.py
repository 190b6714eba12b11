"""Figures, drawn with matplotlib: the paper's (Figs. 2, 3, 4 and 7), and the laboratory's heat maps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from cdistill.analysis.consistency_gap import Score
from cdistill.estimation import Estimate
from cdistill.estimation.jackknife import standard_error
from cdistill.preconditionings import Preconditioning
from cdistill.schedule import log_uniform_grid

mpl.use("Agg")
COLOURS = {"analytic": "C0", "ctm": "C1", "analytic-forward": "C2", "bcm": "C3", "cm": "C4", "analytic-bounded": "C5"}


def plot_coefficients(
    path: Path,
    title: str,
    estimate: Estimate,
    forms: Mapping[str, Preconditioning],
) -> None:
    """Draws l and s_coef, f and g to eps (Fig. 2c), all with standard errors, and g(t,s) of each form (Fig. 4).

    Args:
        path: PNG.
        title: Heading.
        estimate: l and s with their errors.
        forms: Name -> preconditioning; the first two are shown as heat maps.
    """
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(title)
    table = estimate.table
    for axis, values, error, name in (
        (axes[0, 0], table.l, estimate.l_error, "$l_t$"),
        (axes[1, 0], table.s, estimate.s_error, "$s_t$"),
    ):
        _band(axis, table.t, values, error, "C0", "-", "")
        log_axis(axis, "t", f"{name} (band: 2 standard errors)")
    axes[0, 0].axhline(1, color="grey", lw=0.5)
    axes[0, 0].axhline(0, color="grey", lw=0.5)

    grid = log_uniform_grid(200, float(table.t[-1]), float(table.t[0]))
    middle = grid[(grid - 0.5).abs().argmin()]
    for end, style, text in ((grid[-1], "-", "s = eps"), (middle, "--", f"s = {float(middle):.2g}")):
        start = grid[grid >= end]
        for name, form in forms.items():
            jump = start, end.expand(len(start))
            bars = estimate.jump_errors(name, *jump) if form.needs_coefficients else (None, None)
            for row, (values, bar, symbol) in enumerate(zip(form(*jump), bars, "fg", strict=True)):
                _band(axes[row, 1], start, values, bar, COLOURS.get(name), style, f"{name}, {text}")
                log_axis(axes[row, 1], "t", f"{symbol}(t, s)")
    axes[0, 1].legend(fontsize=8)
    axes[1, 1].legend(fontsize=8)
    for axis, (name, form) in zip(axes[:, 2], list(forms.items())[:2], strict=False):
        draw_heat_map(figure, axis, name, form, grid)
    save_figure(figure, path)


def plot_estimates(path: Path, title: str, estimates: Mapping[str, Estimate]) -> None:
    """Draws l and s_coef by several estimators from the same samples, and their differences from the first.

    Args:
        path: PNG.
        title: Heading.
        estimates: Name -> estimate, from the same samples in the same groups.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle(f"{title}: bands are 2 standard errors, below of the difference")
    first, reference = next(iter(estimates.items()))
    for number, (name, one) in enumerate(estimates.items()):
        t, colour = one.table.t, f"C{number}"
        for column, key in enumerate("ls"):
            values, parts = getattr(one.table, key), torch.stack([getattr(part, key) for part in one.parts])
            _band(axes[0, column], t, values, standard_error(parts), colour, "-", name)
            if name != first:
                error = standard_error(parts - torch.stack([getattr(part, key) for part in reference.parts]))
                difference = values - getattr(reference.table, key)
                _band(axes[1, column], t, difference, error, colour, "-", f"{name} - {first}")
    for column, key in enumerate("ls"):
        log_axis(axes[0, column], "", f"${key}_t$")
        log_axis(axes[1, column], "t", "difference")
        axes[1, column].axhline(0, color="grey", lw=0.5)
    for axis in axes.flat:
        axis.legend(fontsize=8)
    save_figure(figure, path)


def _band(
    axis: Axes, t: Tensor, values: Tensor, error: Tensor | None, colour: str | None, style: str, label: str
) -> None:
    """Draws a curve with a band of two standard errors."""
    (line,) = axis.plot(t.numpy(), values.numpy(), style, color=colour, lw=1.2, label=label or None)
    if error is not None:
        low, high = (values - 2 * error).numpy(), (values + 2 * error).numpy()
        axis.fill_between(t.numpy(), low, high, color=line.get_color(), alpha=0.3, lw=0)


def plot_trajectories(
    path: Path,
    teacher: Tensor,
    students: Mapping[str, Tensor],
    times: Mapping[str, Tensor],
    notes: Mapping[str, str],
    shown: int = 40,
) -> None:
    """Draws trajectories of the 1-D mixture, a panel each for the teacher and the students, as in Fig. 7.

    Args:
        path: PNG.
        teacher: All points (k, n, 1) of the teacher's trajectories.
        students: Name -> points (k', n, 1) from the same noise.
        times: Name -> noise levels of those points; "teacher" for the teacher's.
        notes: Name -> text under the panel's title.
        shown: How many trajectories are drawn.
    """
    figure = Figure(figsize=(4.2 * (1 + len(students)), 6.4), layout="constrained")
    axes = figure.subplots(2, 1 + len(students), sharey="row", squeeze=False)
    bins = np.linspace(-6, 4, 101).tolist()
    for column, (name, points) in enumerate({"teacher": teacher, **students}.items()):
        axis, below = axes[0, column], axes[1, column]
        if name != "teacher":
            _draw_paths(axis, times["teacher"], teacher[:, :shown, 0], "0.8")
        _draw_paths(axis, times[name], points[:, :shown, 0], COLOURS.get(name, "C0") if name != "teacher" else "0.3")
        axis.set_title(f"{name}\n{notes.get(name, '')}", fontsize=10)
        below.hist(teacher[-1, :, 0].numpy(), bins, density=True, color="0.8", label="teacher")
        if name != "teacher":
            below.hist(
                points[-1, :, 0].numpy(),
                bins,
                density=True,
                histtype="step",
                color=COLOURS.get(name),
                label=name,
            )
        below.set_xlabel("$x_\\epsilon$")
        below.legend(fontsize=8)
    axes[0, 0].set_ylabel("$x_t / \\sqrt{1 + t^2}$")
    save_figure(figure, path)


def plot_gaps(path: Path, title: str, levels: Tensor, scores: Sequence[Score], bound: Score) -> None:
    """Draws the consistency gap (above) and the avoidable jump error (below) of each form over (t, s).

    The best f and g leave a residual that is orthogonal to x_t and D, so that squared jump errors are those of the
    best plus what another f and g would avoid: the mean square of (f-f*) x_t + (g-g*) D.

    Args:
        path: PNG.
        title: Heading.
        levels: Noise levels (L,), descending.
        scores: The forms, from left to right.
        bound: The best f and g of all; the last panel below is their jump error, which no form avoids.
    """
    columns = [*scores, bound]
    figure = Figure(figsize=(1.5 + 2.6 * len(columns), 6), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex=True, sharey=True, squeeze=False)
    figure.suptitle(title)
    least = bound.jump_error
    avoidable = [(one.jump_error.square() - least.square()).clamp(min=0).sqrt() for one in scores]
    for lower, panels, label in (
        (0, [one.gap for one in scores], "consistency gap: rms of $D^*-D$"),
        (1, [*avoidable, least], "jump error, rms"),
    ):
        norm = _log_colours(panels)
        for axis, one, values in zip(axes[lower], columns, panels, strict=False):
            image = axis.pcolormesh(values.clamp(min=1e-300).numpy(), norm=norm, cmap="viridis")
            axis.set_title(one.name if not lower else f"{one.name}: avoidable", fontsize=10)
        figure.colorbar(image, ax=list(axes[lower]), label=label, extend="both")
    axes[1, -1].set_title("unavoidable, by any f, g", fontsize=10)
    axes[0, -1].axis("off")
    _label_levels(axes, levels)
    save_figure(figure, path)


@dataclass(frozen=True)
class Panel:
    """One panel of training curves.

    Attributes:
        title: Heading.
        lines: Run -> its points (iterations or images, value), from left to right.
        logarithmic: Whether values are drawn on a logarithmic axis; all must be positive then.
        teacher: Values of the runs' teachers.
        goal: A value to reach.
        reached: Where runs reach it.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    logarithmic: bool
    teacher: Sequence[float] = ()
    goal: float | None = None
    reached: Sequence[float] = ()


def plot_curves(path: Path, horizontal: str, vertical: str, panels: Sequence[Panel]) -> None:
    """Draws training curves, a panel each and a line for every run (Figs. 2a, 2b and 3).

    Args:
        path: PNG.
        horizontal: Label of the horizontal axes.
        vertical: Label of the vertical axes.
        panels: At least one.
    """
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    width = max(6.4, 4.6 * columns)
    abreast = max(1, int(12 * width) // (8 + max(map(len, labels))))
    height = 3.4 * rows + 0.3 * math.ceil((len(labels) + 2) / abreast)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, labels)
        axis.set_xlabel(horizontal)
    for axis in axes[::columns]:
        axis.set_ylabel(vertical)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=abreast, fontsize=9)
    save_figure(figure, path)


def _draw_panel(axis: Axes, panel: Panel, labels: Sequence[str]) -> None:
    for label, points in panel.lines.items():
        style, place = ".-" if len(points) <= 60 else "-", labels.index(label)
        thick = 1.2 + 1.4 * (1 - place / len(labels))  # a line that lies on an earlier one leaves it visible
        x, y = np.array(points).T
        axis.plot(x, y, style, color=f"C{place}", lw=thick, ms=5 * thick**0.5, label=label)
    for value in panel.teacher:
        if value > 0 or not panel.logarithmic:
            axis.axhline(value, color="0.35", ls="--", lw=1, label="teacher")
    if panel.goal is not None:
        axis.axhline(panel.goal, color="0.6", ls=":", lw=1)
        heights = [panel.goal] * len(panel.reached)
        axis.plot(panel.reached, heights, "o", mfc="none", mec="0.2", ms=8, ls="", label="reaches the dotted value")
    if panel.logarithmic:
        log_values(axis)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.25)


def _log_colours(panels: Sequence[Tensor]) -> LogNorm:
    """Returns one logarithmic scale for all panels, of three decades at most."""
    values = torch.cat([panel[panel.isfinite() & (panel > 0)] for panel in panels])
    high = float(values.quantile(0.98)) if len(values) else 1.0
    low = float(values.min()) if len(values) else 0.1
    return LogNorm(min(max(low, high / 1000), 0.9 * high), high)


def _label_levels(axes: NDArray[Any], levels: Tensor) -> None:
    """Writes noise levels beside some cells: t from ``levels[:-1]`` grows upwards, s from ``levels[1:]`` rightwards."""
    chosen = np.unique(np.linspace(0, len(levels) - 2, 5).round().astype(int))
    axes[0, 0].invert_yaxis()
    axes[0, 0].invert_xaxis()
    for axis in axes[:, 0]:
        axis.set_ylabel("t")
        axis.set_yticks(chosen + 0.5, [f"{float(levels[k]):.2g}" for k in chosen])
    for axis in axes[-1]:
        axis.set_xlabel("s")
        axis.set_xticks(chosen + 0.5, [f"{float(levels[k + 1]):.2g}" for k in chosen])


def _draw_paths(axis: Axes, times: Tensor, points: Tensor, colour: str) -> None:
    scaled = points / (1 + times[:, None] ** 2).sqrt()
    axis.plot(times.numpy(), scaled.numpy(), color=colour, lw=0.7)
    log_axis(axis, "t", "")
    axis.set_xlim(float(times[0]), float(times[-1]))


def draw_heat_map(figure: Figure, axis: Axes, name: str, form: Preconditioning, grid: Tensor) -> None:
    """Draws g(t, s) for s <= t on a grid of noise levels (Fig. 4)."""
    t, s = torch.meshgrid(grid, grid, indexing="ij")
    values = torch.full_like(t, float("nan"))
    below = s <= t
    values[below] = form(t[below], s[below])[1]
    image = axis.pcolormesh(s.numpy(), t.numpy(), values.numpy(), vmin=0, vmax=1, cmap="viridis", rasterized=True)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("s")
    axis.set_ylabel("t")
    axis.set_title(f"g(t, s), {name}", fontsize=10)
    figure.colorbar(image, ax=axis)


def log_axis(axis: Axes, label: str, title: str) -> None:
    """Gives an axis a logarithmic abscissa with a label, and a title unless it is empty."""
    axis.set_xscale("log")
    axis.set_xlabel(label)
    if title:
        axis.set_title(title, fontsize=10)


def log_values(axis: Axes, horizontal: bool = False) -> None:
    """Gives an axis a logarithmic ordinate, or abscissa, with plain numbers that can be read in a narrow range too."""
    scale, limits, ticks = (
        (axis.set_xscale, axis.get_xlim, axis.xaxis) if horizontal else (axis.set_yscale, axis.get_ylim, axis.yaxis)
    )
    scale("log")
    low, high = limits()
    ticks.set_major_locator(LogLocator(subs=[1.0, 2.0, 5.0]) if high > 8 * low else MaxNLocator(5))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
