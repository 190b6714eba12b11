"""The paper's Figure 7: ``cdistill plot trajectories``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdistill.data import load_source
from cdistill.estimation.settings import EstimationSection
from cdistill.evaluation.metrics import wasserstein_1d
from cdistill.preconditionings import load_preconditioning
from cdistill.reporting import figures
from cdistill.reporting.panels import save_figure
from cdistill.runtime.console import Table
from cdistill.runtime.randomness import generator
from cdistill.sampling.samplers import teacher_trajectories, trajectories
from cdistill.schedule import T, rho_grid, sampling_grid
from cdistill.teachers import load_teacher
from cdistill.workflows.estimate import estimate_coefficients, with_fit

_FINER = 80  # steps of the teacher's solver in one jump of the students: its error is far below theirs


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
    save_figure(figures.draw_trajectories(truth, students, times, notes), out)
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
