"""The paper's figures (Figs. 2c, 4 and 7) and the heat maps of `cdistill compare`, in the style of `panels`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from cdistill.analysis.consistency_gap import Score
from cdistill.estimation.base import standard_error
from cdistill.estimation.estimate import CoefficientEstimate
from cdistill.preconditionings import Preconditioning
from cdistill.reporting.panels import STYLE, Line, Panel, colour_of, draw, draw_panels, grid, log_values, style_of
from cdistill.schedule import log_uniform_grid

_SAME_COLOUR = 6  # between styles that differ in dashes only


@STYLE
def draw_coefficients(
    title: str, estimate: CoefficientEstimate, preconditionings: Mapping[str, Preconditioning]
) -> Figure:
    """Draws l and s_coef, f and g to eps and to a middle level (Fig. 2c), and g(t, s) as heat maps (Fig. 4).

    Bands are two standard errors. The first two preconditionings get heat maps.
    """
    figure, axes = grid(f"{title} (bands: 2 standard errors)", 2, 3, (4.8, 3.4))
    table = estimate.coefficients
    levels = log_uniform_grid(200, float(table.t[-1]), float(table.t[0]))
    own = (_line("", table.t, table.l, estimate.l_error, 0), _line("", table.t, table.s, estimate.s_error, 0))
    for row, (symbol, line, jumps) in enumerate(
        zip("ls", own, _jumps(estimate, preconditionings, levels), strict=True)
    ):
        _draw(axes[row][0], Panel(f"{symbol}(t)", "t", [line], x_log=True))
        _draw(axes[row][1], Panel(f"{'fg'[row]}(t, s)", "t", jumps, x_log=True))
        axes[row][1].legend(fontsize=8)
    for line_of_axes, (name, preconditioning) in zip(axes, list(preconditionings.items())[:2], strict=False):
        draw_heat_map(figure, line_of_axes[2], f"g(t, s), {name}", preconditioning, levels)
    return figure


def _jumps(
    estimate: CoefficientEstimate, preconditionings: Mapping[str, Preconditioning], levels: Tensor
) -> tuple[list[Line], list[Line]]:
    """Returns f and g of every preconditioning, of jumps to the lowest of `levels` and to the one nearest to 0.5."""
    f_lines: list[Line] = []
    g_lines: list[Line] = []
    middle = levels[(levels - 0.5).abs().argmin()]
    for end, text, more in ((levels[-1], "s = eps", 0), (middle, f"s = {float(middle):.2g}", _SAME_COLOUR)):
        start = levels[levels >= end]
        for name, preconditioning in preconditionings.items():
            jump = start, end.expand(len(start))
            errors: tuple[Tensor | None, ...] = (None, None)
            if preconditioning.needs_coefficients:
                errors = tuple(standard_error(values[1:]) for values in estimate.f_and_g(name, *jump))
            for lines, values, error in zip((f_lines, g_lines), preconditioning(*jump), errors, strict=True):
                lines.append(_line(f"{name}, {text}", start, values, error, style_of(name) + more))
    return f_lines, g_lines


@STYLE
def draw_estimates(title: str, estimates: Mapping[str, CoefficientEstimate]) -> Figure:
    """Draws l and s_coef by several estimators, and their differences from the first; all have the same samples."""
    first, reference = next(iter(estimates.items()))
    values: dict[str, list[Line]] = {"l": [], "s": []}
    differences: dict[str, list[Line]] = {"l": [], "s": []}
    for style, (name, estimate) in enumerate(estimates.items()):
        t = estimate.coefficients.t
        for key in "ls":
            own, theirs = getattr(estimate.coefficients, key), getattr(reference.coefficients, key)
            parts = getattr(estimate, f"{key}_replicates")[1:]
            values[key].append(_line(name, t, own, standard_error(parts), style))
            if name != first:
                error = standard_error(parts - getattr(reference, f"{key}_replicates")[1:])
                differences[key].append(_line(f"{name} - {first}", t, own - theirs, error, style))
    rows = [
        [Panel(f"{key}(t)", "t", lines, x_log=True) for key, lines in values.items()],
        [Panel(f"{key}(t): difference", "t", lines, x_log=True) for key, lines in differences.items()],
    ]
    return draw_panels(f"{title}: bands are 2 standard errors, below of the difference", rows)


def _line(label: str, t: Tensor, values: Tensor, error: Tensor | None, style: int) -> Line:
    """Returns a curve with a band of two standard errors."""
    low_and_high = (
        () if error is None else zip((values - 2 * error).tolist(), (values + 2 * error).tolist(), strict=True)
    )
    return Line(label, list(zip(t.tolist(), values.tolist(), strict=True)), list(low_and_high), style)


def _draw(axis: Axes, panel: Panel) -> None:
    draw(axis, panel)
    axis.set_title(panel.title)


@STYLE
def draw_trajectories(
    teacher: Tensor,
    students: Mapping[str, Tensor],
    times: Mapping[str, Tensor],
    notes: Mapping[str, str],
    shown: int = 40,
) -> Figure:
    """Draws trajectories of the 1-D mixture, a panel each for the teacher and the students, as in Fig. 7.

    Args:
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
        axis, below = axes[:, column]
        if name != "teacher":
            _draw_paths(axis, times["teacher"], teacher[:, :shown, 0], "0.8")
        _draw_paths(axis, times[name], points[:, :shown, 0], colour_of(name) if name != "teacher" else "0.3")
        axis.set_title(f"{name}\n{notes.get(name, '')}", fontsize=10)
        below.hist(teacher[-1, :, 0].numpy(), bins, density=True, color="0.8", label="teacher")
        if name != "teacher":
            ends = points[-1, :, 0].numpy()
            below.hist(ends, bins, density=True, histtype="step", color=colour_of(name), label=name)
        below.set_xlabel("end point")
        below.legend(fontsize=8)
    axes[0, 0].set_ylabel("x_t / sqrt(1 + t²)")
    axes[1, 0].set_ylabel("density")
    return figure


def _draw_paths(axis: Axes, times: Tensor, points: Tensor, colour: str) -> None:
    scaled = points / (1 + times[:, None] ** 2).sqrt()
    axis.plot(times.numpy(), scaled.numpy(), color=colour, lw=0.7)
    log_values(axis, horizontal=True)
    axis.set_xlabel("t")
    axis.set_xlim(float(times[0]), float(times[-1]))


@STYLE
def draw_gaps(title: str, levels: Tensor, scores: Sequence[Score], bound: Score) -> Figure:
    """Draws the consistency gap (above) and the avoidable jump error (below) of each preconditioning over (t, s).

    The best f and g leave a residual that is orthogonal to x_t and D, so that squared jump errors are those of the
    best plus what another f and g would avoid: the mean square of (f-f*) x_t + (g-g*) D.

    Args:
        title: Heading.
        levels: Noise levels (L,), descending.
        scores: The preconditionings, from left to right.
        bound: The best f and g of all; the last panel below is their jump error, which no preconditioning avoids.
    """
    columns = [*scores, bound]
    figure = Figure(figsize=(1.5 + 2.6 * len(columns), 6), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex=True, sharey=True, squeeze=False)
    figure.suptitle(title)
    least = bound.jump_error
    avoidable = [(one.jump_error.square() - least.square()).clamp(min=0).sqrt() for one in scores]
    for lower, panels, label in (
        (0, [one.gap for one in scores], "consistency gap: rms of D* - D"),
        (1, [*avoidable, least], "jump error, rms"),
    ):
        norm = _log_colours(panels)
        for axis, one, values in zip(axes[lower], columns, panels, strict=False):
            image = axis.pcolormesh(values.clamp(min=1e-300).numpy(), norm=norm, cmap="viridis")
            axis.set_title(one.name if not lower else f"{one.name}: avoidable", fontsize=10)
            axis.grid(visible=False)
        figure.colorbar(image, ax=list(axes[lower]), label=label, extend="both")
    axes[1, -1].set_title("unavoidable, by any f, g", fontsize=10)
    axes[0, -1].axis("off")
    _label_levels(axes, levels)
    return figure


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


@STYLE
def draw_heat_maps(title: str, preconditionings: Mapping[str, Preconditioning]) -> Figure:
    """Draws g(t, s) of each preconditioning (Fig. 4)."""
    columns = min(len(preconditionings), 4)
    figure, axes = grid(title, math.ceil(len(preconditionings) / columns), columns)
    flat = [axis for line in axes for axis in line]
    for axis, (name, preconditioning) in zip(flat, preconditionings.items(), strict=False):
        draw_heat_map(figure, axis, name, preconditioning, log_uniform_grid(120))
    for axis in flat[len(preconditionings) :]:
        axis.axis("off")
    return figure


def draw_heat_map(figure: Figure, axis: Axes, title: str, preconditioning: Preconditioning, levels: Tensor) -> None:
    """Draws g(t, s) for s <= t on a grid of noise levels."""
    t, s = torch.meshgrid(levels, levels, indexing="ij")
    values = torch.full_like(t, math.nan)
    below = s <= t
    values[below] = preconditioning(t[below], s[below])[1]
    image = axis.pcolormesh(s.numpy(), t.numpy(), values.numpy(), vmin=0, vmax=1, cmap="viridis", rasterized=True)
    log_values(axis)
    log_values(axis, horizontal=True)
    axis.grid(visible=False)
    axis.set_xlabel("s")
    axis.set_ylabel("t")
    axis.set_title(title)
    figure.colorbar(image, ax=axis)
