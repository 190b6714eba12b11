"""Estimating the coefficients of a teacher: ``cdistill estimate-coeffs``, and the first step of a distillation."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from cdistill.data import Source
from cdistill.errors import CdistillError
from cdistill.estimation.collecting import Collection
from cdistill.estimation.estimate import CoefficientEstimate, EstimatorComparison, load_estimate, solve
from cdistill.estimation.settings import EstimationSection
from cdistill.preconditionings import make_preconditioning
from cdistill.preconditionings.coefficients import Fit, load_coefficients
from cdistill.registry import ESTIMATORS, PRECONDITIONINGS
from cdistill.runtime.console import progress, rescuing, say
from cdistill.runtime.processes import let_main, versions
from cdistill.sampling.moments import collect_moments, fit_f_and_g
from cdistill.sampling.teacher_data import open_data
from cdistill.schedule import log_uniform_grid, rho_grid
from cdistill.settings import check_section
from cdistill.storage.run_folder import held
from cdistill.teachers import Teacher, load_teacher
from cdistill.training.loop import make_accelerator

_GRIDS = {"log-uniform": log_uniform_grid, "rho": rho_grid}
_FIT_LEVELS, _FIT_SUBSTEPS = 18, 2
_FIT_SEED = 5 * 2**29  # apart from those of samples and of kept trajectories


def estimate_coefficients(
    teacher: str | Path | Teacher,
    data: str | Source | None = None,
    settings: EstimationSection | None = None,
    *,
    weights: str | Path | None = None,
    out: str | Path | None = None,
    reuse: bool = False,
    paired: bool = False,
    accelerator: Accelerator | None = None,
    compiled: bool | Literal["auto"] = "auto",
    **fields: Any,
) -> CoefficientEstimate:
    """Estimates l and s of a teacher, the coefficients of the analytic preconditioning, with their standard errors.

    Args:
        teacher: A name (``cdistill ls teachers``), a file, or a loaded teacher.
        data: Name or path of a data source, "teacher", or a loaded source; the teacher's own by default.
        settings: How l and s are estimated.
        weights: File of the teacher's weights, where its name alone does not find them.
        out: The coefficient file to write. An interrupted estimation to the same file is resumed. None writes nothing.
        reuse: Whether to return what `out` holds if it is the estimate that this call would make.
        paired: Whether to draw points in pairs x_0 + t z, x_0 - t z for estimators that do not need them, too.
        accelerator: Devices and processes; one for this machine by default.
        compiled: Whether the teacher is compiled where forward passes alone run on a GPU; "auto" if that works.
        **fields: Fields of :class:`EstimationSection`, in place of `settings`.

    Raises:
        RunLockedError: Another process estimates to `out`.
        StoppedError: A signal came; the same call resumes.
        CdistillError: The teacher's outputs are not finite, or anything is wrong with the arguments.

    >>> estimate = estimate_coefficients("mixture-1d", samples=64, timesteps=8)
    >>> estimate.coefficients.l.shape, estimate.l_error.shape
    (torch.Size([8]), torch.Size([8]))
    """
    settings = settings or check_section(fields, EstimationSection, "estimate_coefficients")
    accelerator = accelerator or make_accelerator("fp32")
    out = None if out is None else Path(out)
    teacher = open_teacher(teacher, None if weights is None else Path(weights), accelerator)
    source = data if isinstance(data, Source) else open_data(data, "train", teacher, accelerator)
    if reuse and out is not None:
        there = is_estimate(out, teacher, source, settings, paired)
        accelerator.wait_for_everyone()  # every process has looked before the main one writes
        if there:
            return load_estimate(out)
    with _locked(out, accelerator):
        return _estimate(teacher, source, settings, out, accelerator, paired, compiled)


def open_teacher(teacher: str | Path | Teacher, weights: Path | None, accelerator: Accelerator) -> Teacher:
    """Returns a teacher, loaded if need be, on the accelerator's device."""
    loaded = teacher if isinstance(teacher, Teacher) else load_teacher(str(teacher), weights)
    loaded.denoiser.to(accelerator.device)
    return loaded


@contextmanager
def _locked(out: Path | None, accelerator: Accelerator) -> Iterator[None]:
    """Holds the lock of a coefficient file in the main process."""
    with ExitStack() as stack:
        if out is not None:
            lock = held(out.with_name(f".{out.name}.lock"), f"{out}: another process estimates to this file")
            let_main(lambda: stack.enter_context(lock), out, accelerator)
        yield


def _estimate(
    teacher: Teacher,
    source: Source,
    settings: EstimationSection,
    out: Path | None,
    accelerator: Accelerator,
    paired: bool,
    compiled: bool | Literal["auto"],
) -> CoefficientEstimate:
    identity = _identity(teacher, source, settings, paired)
    identity |= {"versions": versions(), "device": accelerator.device.type}  # a GPU's chunks are not a CPU's
    name, t = identity["estimator"], _GRIDS[settings.grid](settings.timesteps)
    estimator = ESTIMATORS.get(name)()
    collection = Collection(
        estimator, teacher.denoiser, source, t, settings, paired, accelerator, out, identity, compiled
    )
    total, done = settings.samples * settings.timesteps, collection.progress.finished_pairs(settings.samples)
    if done:
        say(f"{out}: resumes after {done:,} of {total:,} pairs of sample and noise level")
    with progress(total, f"coefficients ({name})", "pair", done) as advance:
        sums = collection.run(advance)
    header = {
        "teacher": teacher.name,
        "data": source.name,
        **({"classes": source.classes.to_dict()} if len(source.classes) else {}),
        **identity,
        "ran_in": collection.precision,
        "dim": sums.dim,
        "sigma_data": teacher.denoiser.sigma_data,
        "licence": f"statistics of a teacher; the teacher's: {teacher.licence}",
    }
    estimate = solve(estimator, sums, teacher.denoiser.sigma_data, header)
    if settings.form == "least-squares":
        estimate = replace(estimate, fit=_fit(teacher, source, settings, accelerator))
    if accelerator.is_main_process and out is not None:
        with rescuing(estimate.table()):
            estimate.save(out)
    accelerator.wait_for_everyone()
    collection.progress.remove()
    return estimate


def _fit(teacher: Teacher, source: Source, settings: EstimationSection, accelerator: Accelerator) -> Fit:
    """Fits f and g to trajectories of the teacher, of other noise than any evaluation's."""
    count = settings.fit_trajectories
    with progress(count, "f and g by least squares", "trajectory") as advance:
        seed = _FIT_SEED // count + settings.seed
        moments = collect_moments(
            teacher.denoiser, _FIT_LEVELS, count, seed, _FIT_SUBSTEPS, advance=advance, accelerator=accelerator,
            classes=source.classes,
        )  # fmt: skip
    return fit_f_and_g(moments)


def with_fit(settings: EstimationSection, names: Iterable[str]) -> EstimationSection:
    """Returns settings that fit f and g too, if one of the preconditionings needs it."""
    if not any(PRECONDITIONINGS.get(name).needs_fit for name in names):
        return settings
    return settings.model_copy(update={"form": "least-squares"})


def _identity(teacher: Teacher, source: Source, settings: EstimationSection, paired: bool) -> dict[str, Any]:
    """What an estimate depends on, but for the machine."""
    digests = {"teacher_sha256": teacher.digest, "data_sha256": source.digest}
    name = teacher.estimator if settings.estimator == "auto" else settings.estimator
    pairs = paired or ESTIMATORS.get(name).paired
    fit = set() if settings.form == "least-squares" else {"form", "fit_trajectories"}  # as version 0.1 wrote it
    return {**digests, **settings.model_dump(exclude=fit), "estimator": name, "paired": pairs}


def is_estimate(
    path: Path, teacher: Teacher, source: Source, settings: EstimationSection, paired: bool = False
) -> bool:
    """Whether `path` holds the whole estimate that `estimate_coefficients` would make of this teacher on these data."""
    try:
        _, _, header = load_coefficients(path)
    except CdistillError:
        return False
    identity = {**_identity(teacher, source, settings, paired), "smoothing": "none"}  # which version 0.1 may have done
    return all({"smoothing": "none", **header}.get(key) == value for key, value in identity.items())


def compare_estimators(
    teacher: str | Path | Teacher,
    data: str | Source | None = None,
    settings: EstimationSection | None = None,
    *,
    weights: Path | None = None,
    out: Path | None = None,
    accelerator: Accelerator | None = None,
    compiled: bool | Literal["auto"] = "auto",
    **fields: Any,
) -> EstimatorComparison:
    """Runs every registered estimator on the same samples.

    Args and errors as :func:`estimate_coefficients`, but that `out` names the files of all estimators, see `file_of`;
    what they hold already is reused.
    """
    settings = settings or check_section(fields, EstimationSection, "compare_estimators")
    accelerator = accelerator or make_accelerator("fp32")
    teacher = open_teacher(teacher, weights, accelerator)
    source = data if isinstance(data, Source) else open_data(data, "train", teacher, accelerator)
    estimates = {
        name: estimate_coefficients(
            teacher, source, settings.model_copy(update={"estimator": name}),
            out=None if out is None else file_of(out, name), reuse=True, paired=True, accelerator=accelerator,
        )
        for name in ESTIMATORS.names()
    }  # fmt: skip
    return EstimatorComparison(teacher.name, estimates)


def file_of(out: Path, estimator: str) -> Path:
    """Returns the file of one of several estimators that are compared."""
    return out.with_name(f"{out.stem}-{estimator}.safetensors")


def draw_coefficients(path: Path, estimate: CoefficientEstimate) -> None:
    """Draws l, s, f and g next to CTM's (Figs. 2c and 4)."""
    from cdistill.reporting import figures
    from cdistill.reporting.panels import save_figure

    header, samples = estimate.header, estimate.sums.samples
    count = f"{int(samples.min())} to {int(samples.max())}" if samples.min() < samples.max() else str(int(samples[0]))
    shown = {name: make_preconditioning(name, table=estimate.coefficients) for name in ("analytic", "ctm")}
    title = f"{header['teacher']}: {header['estimator']}, {count} samples"
    save_figure(figures.draw_coefficients(title, estimate, shown), path)


def draw_comparison(path: Path, comparison: EstimatorComparison) -> None:
    """Draws l and s by several estimators, and their differences from the first."""
    from cdistill.reporting import figures
    from cdistill.reporting.panels import save_figure

    save_figure(figures.draw_estimates(comparison.teacher, comparison.estimates), path)
