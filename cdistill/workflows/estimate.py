"""``cdistill estimate-coeffs``."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import CdistillError
from cdistill.estimation import Budget, Part, collect_statistics, solve
from cdistill.estimation.collecting import network_precision
from cdistill.estimation.comparison import Deviation, measure_deviations
from cdistill.estimation.files import Found, read_found, save_found
from cdistill.estimation.settings import EstimationSection
from cdistill.preconditionings import make_preconditioning
from cdistill.preconditionings.coefficients import load_coefficients
from cdistill.registry import ESTIMATORS
from cdistill.runtime.console import compact, progress, say, table
from cdistill.runtime.processes import let_main, versions
from cdistill.sampling.teacher_data import open_data
from cdistill.schedule import log_uniform_grid, rho_grid
from cdistill.storage.run_folder import held
from cdistill.teachers import Teacher, load_teacher
from cdistill.training.loop import make_accelerator

_GRIDS = {"log-uniform": log_uniform_grid, "rho": rho_grid}


def estimate_coefficients(
    teacher_name: str, weights: Path | None, data: str | None, section: EstimationSection, out: Path, plot: Path
) -> dict[str, object]:
    """Estimates, saves, prints and draws the coefficients of a teacher; returns them as JSON."""
    teacher, source, accelerator = _open(teacher_name, weights, data)
    found = estimate(teacher, source, section, out, accelerator)
    print_coefficients(found)
    if accelerator.is_main_process:
        draw_coefficients(plot, found)
    return {"file": str(out), "plot": str(plot), "teacher": teacher.name, **_as_lists(found)}


def _open(name: str, weights: Path | None, data: str | None) -> tuple[Teacher, Source, Accelerator]:
    teacher = load_teacher(name, weights)
    accelerator = make_accelerator("fp32")
    teacher.denoiser.to(accelerator.device)
    return teacher, open_data(data, "train", teacher, accelerator), accelerator


def _as_lists(found: Found) -> dict[str, object]:
    estimate = found.estimate
    values = {"t": estimate.table.t, "l": estimate.table.l, "s": estimate.table.s}
    errors = {"l_error": estimate.l_error, "s_error": estimate.s_error, "samples": found.statistics.samples}
    return {
        "estimator": found.header["estimator"],
        **{key: part.tolist() for key, part in {**values, **errors}.items()},
    }


def estimate(
    teacher: Teacher,
    source: Source,
    section: EstimationSection,
    out: Path,
    accelerator: Accelerator,
    paired: bool = False,
) -> Found:
    """Estimates l and s and writes them to `out`; goes on where the same estimation was interrupted.

    Args:
        teacher: On the accelerator's device.
        source: Its data.
        section: How.
        out: The coefficient file.
        accelerator: Devices and processes.
        paired: Whether to take the points in pairs for estimators that do not need them, too.

    Raises:
        RunLockedError: Another process estimates to `out`.
    """
    with _alone(out, accelerator):
        return _estimate(teacher, source, section, out, accelerator, paired)


@contextmanager
def _alone(out: Path, accelerator: Accelerator) -> Iterator[None]:
    with ExitStack() as stack:
        lock = held(out.with_name(f".{out.name}.lock"), f"{out}: another process estimates to this file")
        let_main(lambda: stack.enter_context(lock), out, accelerator)
        yield


def _estimate(
    teacher: Teacher, source: Source, section: EstimationSection, out: Path, accelerator: Accelerator, paired: bool
) -> Found:
    asked = _identity(teacher, source, section, paired)
    name, grid = asked["estimator"], _GRIDS[section.grid](section.timesteps)
    estimator = ESTIMATORS.get(name)()
    made_by = {"versions": versions(), "device": accelerator.device.type}  # a GPU's chunks are not a CPU's
    budget = Budget(section.samples, section.seed, section.target_error, paired, section.precision)
    part = Part(out, {**asked, **made_by}, accelerator.process_index, accelerator.num_processes)
    total, done = section.samples * section.timesteps, part.finished_pairs(section.samples)
    if done:
        say(f"{out}: goes on after {done:,} of {total:,} pairs of sample and noise level")
    with progress(total, f"coefficients ({name})", "pair", done) as advance:
        statistics = collect_statistics(estimator, teacher.denoiser, source, grid, budget, advance, accelerator, part)
    header = {
        "teacher": teacher.name,
        "data": source.name,
        **asked,
        **made_by,
        "ran_in": network_precision(estimator, section.precision, accelerator.device),
        "dim": statistics.dim,
        "sigma_data": teacher.denoiser.sigma_data,
        "licence": f"statistics of a teacher; the teacher's: {teacher.licence}",
    }
    found = Found(solve(estimator, statistics, teacher.denoiser.sigma_data), statistics, header)
    if accelerator.is_main_process:
        save_found(out, found)
    accelerator.wait_for_everyone()
    part.remove()
    _tell_samples(found, section)
    return found


def _resolve(section: EstimationSection, teacher: Teacher) -> str:
    return teacher.estimator if section.estimator == "auto" else section.estimator


def _identity(teacher: Teacher, source: Source, section: EstimationSection, paired: bool) -> dict[str, Any]:
    """What an estimate depends on, but for the machine."""
    digests = {"teacher_sha256": teacher.digest, "data_sha256": source.digest}
    name = _resolve(section, teacher)
    pairs = paired or ESTIMATORS.get(name).paired
    return {**digests, **section.model_dump(), "estimator": name, "paired": pairs}


def is_estimate(path: Path, teacher: Teacher, source: Source, section: EstimationSection, paired: bool = False) -> bool:
    """Whether `path` holds the whole estimate that `estimate` would make of this teacher on these data."""
    try:
        _, _, header = load_coefficients(path)
    except CdistillError:
        return False
    identity = {**_identity(teacher, source, section, paired), "smoothing": "none"}  # which version 0.1 may have done
    return all({"smoothing": "none", **header}.get(key) == value for key, value in identity.items())


def _tell_samples(found: Found, section: EstimationSection) -> None:
    """Says how many samples a target took, and where it was missed."""
    if section.target_error is None:
        return
    samples, estimate = found.statistics.samples, found.estimate
    missed = int((torch.maximum(estimate.l_error, estimate.s_error) > section.target_error).sum())
    say(
        f"target error {section.target_error:g}: {int(samples.min())} to {int(samples.max())} samples a noise level, "
        f"{int(samples.sum()):,} pairs in place of {section.samples * section.timesteps:,}"
        + (f"; {missed} of {len(samples)} levels are above it" if missed else "")
    )


def print_coefficients(found: Found, rows: int = 16) -> None:
    """Prints l and s, and f and g of halving the noise (0.5 in CTM), at `rows` of the noise levels."""
    estimate, samples = found.estimate, found.statistics.samples
    levels = estimate.table.t
    chosen = torch.linspace(0, len(levels) - 1, rows).round().long().unique()
    t = levels[chosen]
    s = (t / 2).clamp(min=float(levels[-1]))
    f, g = estimate.jump("analytic", t, s)
    f_error, g_error = estimate.jump_errors("analytic", t, s)
    columns = {
        "l": _with_errors(estimate.table.l[chosen], estimate.l_error[chosen]),
        "s_coef": _with_errors(estimate.table.s[chosen], estimate.s_error[chosen]),
        "f(t,t/2)": _with_errors(f, f_error),
        "g(t,t/2)": _with_errors(g, g_error),
    }
    if len(samples.unique()) > 1:
        columns["samples"] = [str(count) for count in samples[chosen].tolist()]
    for column in ("f(t,t/2)", "g(t,t/2)"):
        columns[column] = [text if level > end else "-" for text, level, end in zip(columns[column], t, s, strict=True)]
    lines = [[f"{level:.4g}", *row] for level, *row in zip(t.tolist(), *columns.values(), strict=True)]
    name = found.header["estimator"]
    title = f"{len(t)} of {len(levels)} noise levels, {name}; CTM's f and g: 0.5; in brackets: standard error"
    table(title, ["t", *columns], lines)


def _with_errors(values: Tensor, errors: Tensor) -> list[str]:
    return [compact(value, error) for value, error in zip(values.tolist(), errors.tolist(), strict=True)]


def draw_coefficients(path: Path, found: Found) -> None:
    """Draws l, s, f and g next to CTM's (Figs. 2c and 4)."""
    from cdistill.reporting import figures
    from cdistill.reporting.panels import save_figure

    header, samples = found.header, found.statistics.samples
    count = f"{int(samples.min())} to {int(samples.max())}" if samples.min() < samples.max() else str(int(samples[0]))
    forms = {name: make_preconditioning(name, table=found.estimate.table) for name in ("analytic", "ctm")}
    title = f"{header['teacher']}: {header['estimator']}, {count} samples"
    save_figure(figures.draw_coefficients(title, found.estimate, forms), path)


def compare_estimators(
    teacher_name: str, weights: Path | None, data: str | None, section: EstimationSection, out: Path, plot: Path
) -> dict[str, object]:
    """Runs every registered estimator on the same samples; prints, draws and returns how far they differ."""
    teacher, source, accelerator = _open(teacher_name, weights, data)
    found = {}
    for name in ESTIMATORS.names():
        only, file = section.model_copy(update={"estimator": name}), _file_of(out, name)
        there = is_estimate(file, teacher, source, only, paired=True)
        accelerator.wait_for_everyone()  # every process has looked before the main one writes
        found[name] = read_found(file) if there else estimate(teacher, source, only, file, accelerator, paired=True)
    first, *others = found
    deviations = {name: measure_deviations(found[first].estimate, found[name].estimate) for name in others}
    for name, rows in deviations.items():
        print_deviations(teacher.name, first, name, rows)
    if accelerator.is_main_process:
        from cdistill.reporting import figures
        from cdistill.reporting.panels import save_figure

        save_figure(figures.draw_estimates(teacher.name, {name: one.estimate for name, one in found.items()}), plot)
    compared = {name: [asdict(row) for row in rows] for name, rows in deviations.items()}
    estimates = {name: _as_lists(one) for name, one in found.items()}
    files = " ".join(str(_file_of(out, name)) for name in found)
    return {
        "teacher": teacher.name, "files": files, "plot": str(plot), "against": first, "deviations": compared,
        "estimates": estimates,
    }  # fmt: skip


def _file_of(out: Path, estimator: str) -> Path:
    return out.with_name(f"{out.stem}-{estimator}.safetensors")


def print_deviations(teacher: str, first: str, second: str, rows: Sequence[Deviation]) -> None:
    """Prints how far two estimators are from each other."""
    columns = ["", "largest difference", "in error bars, rms", "in errors of the difference, rms", "beyond 2 of them"]
    lines = [
        [row.quantity, f"{row.largest:.2e}", f"{row.bars:.2f}", f"{row.paired:.2f}", f"{row.beyond:.0%}"]
        for row in rows
    ]
    title = f"{teacher}: {first} minus {second} on the same samples; 1.0 and 5% are chance"
    table(title, columns, lines)
