"""The paper's Figures 2 to 6, from the outcomes of trials, and Figure 7, which needs no training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cdistill.data import load_source
from cdistill.estimation.settings import EstimationSection
from cdistill.evaluation.metrics import wasserstein_1d
from cdistill.preconditionings import Preconditioning, load_preconditioning
from cdistill.reporting.curves import Points
from cdistill.reporting.figures import draw_heat_maps
from cdistill.reporting.figures import draw_trajectories as panels_of_figure_7
from cdistill.reporting.panels import Line, Panel, draw_panels, in_rows, save_figure, style_of
from cdistill.runtime.console import Table
from cdistill.runtime.randomness import generator
from cdistill.sampling.samplers import teacher_trajectories, trajectories
from cdistill.schedule import EPS, T, log_uniform_grid, rho_grid, sampling_grid
from cdistill.teachers import load_teacher
from cdistill.workflows.estimate import estimate_coefficients, with_fit
from cdistill.workflows.reproduce.experiments import ARMS, CONSISTENCY, GAN, TRAJECTORY, DataSet
from cdistill.workflows.reproduce.jobs import Request
from cdistill.workflows.reproduce.outcomes import Outcomes

_SAME_COLOUR = 6  # between styles that differ in dashes and markers only
_FINER = 80  # steps of the teacher's solver in one jump of the students: its error is far below theirs


def draw_all(request: Request, outcomes: Sequence[Outcomes]) -> list[str]:
    """Draws Figures 2 to 6; returns the names of all that are there, Figure 7 too."""
    figures = {
        "figure-2": _single_step(request, outcomes),
        "figure-3": _curves("Fig. 3: two steps", outcomes, TRAJECTORY[:-1], (2,)),
        "figure-4": _heat_maps(request),
        "figure-5": _curves("Fig. 5: BCM's preconditioning", outcomes, ("ctm", "bcm"), (1, 2)),
        "figure-6": _curves("Fig. 6: with the GAN loss", outcomes, GAN, (1, 2)),
    }
    folder = request.out / "figures"
    for name, figure in figures.items():
        if figure is not None:
            save_figure(figure, folder / f"{name}.png")
    return sorted(path.stem for path in folder.glob("figure-?.png"))


def panel(outcomes: Outcomes, arms: Sequence[str], nfe: int) -> Panel:
    """Returns the curves of arms at a number of network calls, as far as there are such.

    Lines are geometric means over the seeds, bands go from the least to the greatest.
    """
    metric, teacher = outcomes.data.metric, outcomes.teacher(outcomes.data.metric)
    curves = {arm: list(outcomes.curves(arm, nfe, metric).values()) for arm in arms}
    lines = [_mean_line(arm, seeds) for arm, seeds in curves.items() if seeds]
    return Panel(
        f"{outcomes.data.name}{', CM' if 'cm' in arms else ''}, {nfe} NFE",
        "iterations",
        lines,
        y=metric,
        y_log=all(y > 0 for line in lines for _, y in line.points),
        levels=[] if teacher is None else [("teacher", teacher.value)],
    )


def _mean_line(arm: str, curves: Sequence[Points]) -> Line:
    shared = sorted(set.intersection(*[{step for step, _ in points} for points in curves]))
    values = np.array([[dict(points)[step] for step in shared] for points in curves])
    middle = np.exp(np.log(np.maximum(values, 1e-300)).mean(0))
    ends = zip(values.min(0).tolist(), values.max(0).tolist(), strict=True)
    style = style_of(ARMS[arm].preconditioning)
    return Line(ARMS[arm].title, list(zip(shared, middle.tolist(), strict=True)), list(ends), style)


def _curves(title: str, outcomes: Sequence[Outcomes], arms: Sequence[str], calls: Sequence[int]) -> Figure | None:
    rows = [[panel(one, arms, nfe) for nfe in calls] for one in outcomes]
    rows = [row for row in rows if all(one.lines for one in row)]
    if not rows:
        return None
    return draw_panels(title, rows if len(calls) > 1 else in_rows([row[0] for row in rows]))


def _single_step(request: Request, outcomes: Sequence[Outcomes]) -> Figure | None:
    """Fig. 2: training curves of CM and of CTM in one step, and f and g of jumps to eps, a row for each data set."""
    rows = [
        [panel(one, CONSISTENCY, 1), panel(one, TRAJECTORY[:-1], 1), _jumps(request, one.data)]
        for one in outcomes
        if set(CONSISTENCY) <= {arm for arm, _ in one.by_trial} and request.coefficients(one.data.teacher).is_file()
    ]
    return draw_panels("Fig. 2: one step", rows) if rows else None


def _jumps(request: Request, data: DataSet) -> Panel:
    levels = log_uniform_grid(200)
    lines = []
    for name, preconditioning in load_all(request, data, ("cm", "ctm", "analytic")).items():
        f, g = preconditioning(levels, levels.new_full(levels.shape, EPS))
        for symbol, values, more in (("g", g, 0), ("f", f, _SAME_COLOUR)):
            points = list(zip(levels.tolist(), values.tolist(), strict=True))
            lines.append(Line(f"{name}: {symbol}", points, style=style_of(name) + more))
    return Panel(f"{data.name}: f(t, eps), g(t, eps)", "t", lines, x_log=True)


def _heat_maps(request: Request) -> Figure | None:
    """Fig. 4: g(t, s) of CTM, and of Analytic for each teacher whose coefficients are there."""
    shown = {
        "g(t, s), CTM" if name == "ctm" else f"g(t, s), {name}: {data.name}": one
        for data in request.data
        if request.coefficients(data.teacher).is_file()
        for name, one in load_all(request, data, ("ctm", "analytic")).items()
    }
    return draw_heat_maps("Fig. 4: g(t, s)", shown) if shown else None


def load_all(request: Request, data: DataSet, names: Sequence[str]) -> dict[str, Preconditioning]:
    """Returns preconditionings with the coefficients of a data set's teacher."""
    teacher = load_teacher(data.teacher)
    return {name: load_preconditioning(name, teacher, request.coefficients(data.teacher)) for name in names}


def draw_trajectories(
    names: Sequence[str], nfe: int, count: int, seed: int, samples: int, out: Path
) -> list[dict[str, Any]]:
    """Fig. 7: the 1-D mixture's trajectories against those of students that use the exact denoiser for every s.

    Args:
        names: Preconditionings.
        nfe: Jumps of the students.
        count: Trajectories that are measured.
        seed: Of their noise.
        samples: Samples of the coefficient estimation.
        out: PNG.

    Returns:
        How well each preconditioning follows the teacher, as JSON: the mean square error of the end points (`mse_end`)
        and of all points after the start, each divided by 1 + t^2 (`mse_path`), and the Wasserstein-1 distance of the
        end points from the mixture.
    """
    teacher, source = load_teacher("mixture-1d"), load_source("mixture-1d")
    settings = with_fit(EstimationSection(samples=samples, seed=seed), names)
    coefficients = estimate_coefficients("mixture-1d", source, settings).coefficients
    x = torch.randn(count, 1, generator=generator(seed, "trajectories"), dtype=torch.float64) * T
    truth = teacher_trajectories(teacher.denoiser, _FINER * nfe + 1, x)
    times = {"teacher": rho_grid(_FINER * nfe + 1)}
    students: dict[str, Tensor] = {}
    results, notes = [], {"teacher": f"Wasserstein {wasserstein_1d(truth[-1], source.samples[:]):.4f}"}
    for name in names:
        points = trajectories(teacher.denoiser, load_preconditioning(name, teacher, coefficients), nfe, x)
        scale = 1 + sampling_grid(nfe)[1:, None, None] ** 2
        result = {
            "preconditioning": name,
            "nfe": nfe,
            "mse_end": float((points[-1] - truth[-1]).square().mean()),
            "mse_path": float(((points - truth[::_FINER])[1:].square() / scale).mean()),
            "wasserstein": wasserstein_1d(points[-1], source.samples[:]),
        }
        students[name], times[name] = points, sampling_grid(nfe)
        notes[name] = f"{nfe} steps, MSE {result['mse_end']:.4g}, Wasserstein {result['wasserstein']:.4f}"
        results.append(result)
    save_figure(panels_of_figure_7(truth, students, times, notes), out)
    return results


def trajectory_table(results: Sequence[dict[str, Any]]) -> Table:
    """Returns how well each preconditioning follows the teacher."""
    columns = ["preconditioning", "NFE", "MSE of ends", "MSE of paths", "Wasserstein-1"]
    rows = [
        [
            one["preconditioning"],
            str(one["nfe"]),
            *(f"{one[key]:.5f}" for key in ("mse_end", "mse_path", "wasserstein")),
        ]
        for one in results
    ]
    return Table("1-D mixture, optimal denoiser, no training", columns, rows)
