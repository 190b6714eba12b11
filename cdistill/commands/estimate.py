"""``cdistill estimate-coeffs``."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.commands.common import open_data, versions
from cdistill.console import progress, table
from cdistill.data import Source
from cdistill.errors import CdistillError
from cdistill.estimation import collect_statistics, jackknife_errors, make_table
from cdistill.preconditionings import make_preconditioning
from cdistill.preconditionings.coefficients import Coefficients, load_coefficients, save_coefficients
from cdistill.recipe import EstimationSection
from cdistill.schedule import log_uniform_grid, rho_grid
from cdistill.teachers import Teacher, load_teacher
from cdistill.training.loop import make_accelerator

_GRIDS = {"log-uniform": log_uniform_grid, "rho": rho_grid}


def estimate_coefficients(
    teacher_name: str, weights: Path | None, data: str | None, section: EstimationSection, out: Path, plot: Path
) -> dict[str, object]:
    """Estimates, saves, prints and draws the coefficients of a teacher; returns them as JSON."""
    teacher = load_teacher(teacher_name, weights)
    accelerator = make_accelerator("fp32")
    teacher.denoiser.to(accelerator.device)
    source = open_data(data, "train", teacher, accelerator)
    found, errors = estimate(teacher, source, section, out, accelerator)
    print_coefficients(found, errors)
    if accelerator.is_main_process:
        draw_coefficients(plot, f"{teacher.name}: {section.samples} samples", found, errors)
    lists = {name: values.tolist() for name, values in (("t", found.t), ("l", found.l), ("s", found.s))}
    return {"file": str(out), "plot": str(plot), "teacher": teacher.name, **lists}


def estimate(
    teacher: Teacher,
    source: Source,
    section: EstimationSection,
    out: Path,
    accelerator: Accelerator | None = None,
) -> tuple[Coefficients, tuple[Tensor, Tensor]]:
    """Estimates l and s, writes them to `out` and returns them with their standard errors."""
    grid = _GRIDS[section.grid](section.timesteps)
    with progress(section.samples * section.timesteps, "coefficients", "pair") as advance:
        sums = collect_statistics(teacher.denoiser, source, grid, section.samples, section.seed, advance, accelerator)
    found, errors = make_table(sums), jackknife_errors(sums.t, sums.groups, sums.count, sums.dim)
    header = {
        "teacher": teacher.name,
        "teacher_sha256": teacher.digest,
        "data": source.name,
        "data_sha256": source.digest,
        "estimator": "autodiff",
        "dim": sums.dim,
        "versions": versions(),
        **section.model_dump(),
    }
    statistics = {"sums": sums.sums, "variances": sums.variances, "groups": sums.groups}
    if accelerator is None or accelerator.is_main_process:
        save_coefficients(out, found, statistics, header)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return found, errors


def is_estimate(path: Path, teacher: Teacher, source: Source, section: EstimationSection) -> bool:
    """Whether `path` holds the whole estimate that `section` asks for, of this teacher on these data."""
    try:
        _, _, header = load_coefficients(path)
    except CdistillError:
        return False
    expected = {"teacher_sha256": teacher.digest, "data_sha256": source.digest, **section.model_dump()}
    return all(header.get(key) == value for key, value in expected.items())


def print_coefficients(found: Coefficients, errors: tuple[Tensor, Tensor], rows: int = 16) -> None:
    """Prints l and s, and f and g of halving the noise next to CTM's, at `rows` of the noise levels."""
    chosen = torch.linspace(0, len(found.t) - 1, rows).round().long().unique()
    t = found.t[chosen]
    s = (t / 2).clamp(min=float(found.t[-1]))
    f, g = make_preconditioning("analytic", table=found)(t, s)
    ctm_f, ctm_g = make_preconditioning("ctm")(t, s)
    columns = {
        "t": (t, ".4g"),
        "l": (found.l[chosen], ".5f"),
        "+-": (errors[0][chosen], ".1e"),
        "s_coef": (found.s[chosen], ".4f"),
        "+- ": (errors[1][chosen], ".1e"),
        "f(t,t/2)": (f, ".4f"),
        "ctm": (ctm_f, ".4f"),
        "g(t,t/2)": (g, ".4f"),
        "ctm ": (ctm_g, ".4f"),
    }
    lines: Sequence[Sequence[str]] = [
        [format(float(values[k]), form) for values, form in columns.values()] for k in range(len(t))
    ]
    table(f"{len(t)} of {len(found.t)} noise levels; +- is one standard error", [*columns], lines)


def draw_coefficients(path: Path, title: str, found: Coefficients, errors: tuple[Tensor, Tensor]) -> None:
    """Draws l, s, f and g next to CTM's (Figs. 2c and 4)."""
    from cdistill.plots import plot_coefficients

    forms = {name: make_preconditioning(name, table=found) for name in ("analytic", "ctm")}
    plot_coefficients(path, title, found, errors, forms)
