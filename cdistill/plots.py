"""The paper's figures, drawn with matplotlib: coefficients (Figs. 2c and 4) and trajectories (Fig. 7)."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cdistill.estimation import Estimate
from cdistill.estimation.jackknife import standard_error
from cdistill.preconditionings import Preconditioning
from cdistill.schedule import log_uniform_grid

mpl.use("Agg")
_COLOURS = {"analytic": "C0", "ctm": "C1", "analytic-forward": "C2", "bcm": "C3"}


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
        _log_axis(axis, "t", f"{name} (band: 2 standard errors)")
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
                _band(axes[row, 1], start, values, bar, _COLOURS.get(name), style, f"{name}, {text}")
                _log_axis(axes[row, 1], "t", f"{symbol}(t, s)")
    axes[0, 1].legend(fontsize=8)
    axes[1, 1].legend(fontsize=8)
    for axis, (name, form) in zip(axes[:, 2], list(forms.items())[:2], strict=False):
        _heat_map(figure, axis, name, form, grid)
    _save(figure, path)


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
        _log_axis(axes[0, column], "", f"${key}_t$")
        _log_axis(axes[1, column], "t", "difference")
        axes[1, column].axhline(0, color="grey", lw=0.5)
    for axis in axes.flat:
        axis.legend(fontsize=8)
    _save(figure, path)


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
        _draw_paths(axis, times[name], points[:, :shown, 0], _COLOURS.get(name, "C0") if name != "teacher" else "0.3")
        axis.set_title(f"{name}\n{notes.get(name, '')}", fontsize=10)
        below.hist(teacher[-1, :, 0].numpy(), bins, density=True, color="0.8", label="teacher")
        if name != "teacher":
            below.hist(
                points[-1, :, 0].numpy(),
                bins,
                density=True,
                histtype="step",
                color=_COLOURS.get(name),
                label=name,
            )
        below.set_xlabel("$x_\\epsilon$")
        below.legend(fontsize=8)
    axes[0, 0].set_ylabel("$x_t / \\sqrt{1 + t^2}$")
    _save(figure, path)


def _draw_paths(axis: Axes, times: Tensor, points: Tensor, colour: str) -> None:
    scaled = points / (1 + times[:, None] ** 2).sqrt()
    axis.plot(times.numpy(), scaled.numpy(), color=colour, lw=0.7)
    _log_axis(axis, "t", "")
    axis.set_xlim(float(times[0]), float(times[-1]))


def _heat_map(figure: Figure, axis: Axes, name: str, form: Preconditioning, grid: Tensor) -> None:
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


def _log_axis(axis: Axes, label: str, title: str) -> None:
    axis.set_xscale("log")
    axis.set_xlabel(label)
    if title:
        axis.set_title(title, fontsize=10)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
