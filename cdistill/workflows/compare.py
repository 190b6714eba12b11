"""Comparing preconditionings before training: ``cdistill compare``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from cdistill.analysis.consistency_gap import Rank, Score, f_and_g_at_pairs, rank, score, score_bound
from cdistill.errors import CdistillError, brief
from cdistill.estimation.settings import EstimationSection
from cdistill.preconditionings import load_preconditioning
from cdistill.preconditionings.coefficients import Coefficients, check_teacher, load_coefficients
from cdistill.registry import PRECONDITIONINGS
from cdistill.runtime.console import Table, compact, progress, rescuing
from cdistill.runtime.processes import versions
from cdistill.sampling.drawing import Sampler
from cdistill.sampling.moments import Number, Student, collect_moments
from cdistill.sampling.samplers import make_sampler
from cdistill.schedule import rho_grid
from cdistill.storage.files import check_place, write_text
from cdistill.teachers import Teacher
from cdistill.training.loop import make_accelerator
from cdistill.workflows.estimate import estimate_coefficients, open_teacher, with_fit


@dataclass(frozen=True)
class PreconditioningComparison:
    """Preconditionings, ordered by their untrained students.

    Attributes:
        scores: In the order of `ranks`.
        bound: What the best f and g of all would do.
        ranks: The order, the best first.
        left_out: Name -> why a preconditioning could not take part.
        levels: Noise levels between which all jumps were made (L,).
        facts: Teacher, coefficients, settings and versions, as JSON.
    """

    scores: Sequence[Score]
    bound: Score
    ranks: Sequence[Rank]
    left_out: Mapping[str, str]
    levels: Tensor
    facts: Mapping[str, Any]

    @property
    def title(self) -> str:
        """A heading for tables and figures."""
        return f"{self.facts['teacher']}: {self.facts['trajectories']} trajectories"

    def table(self) -> Table:
        """Returns the ranking: end points of the untrained students, a line for each preconditioning."""
        nfe, missing = self.facts["nfe"], (math.nan, math.nan)
        ranks = [*self.ranks, Rank(self.bound.name, None)]
        rows = [
            [
                score.name,
                "-" if place.place is None else f"{place.place}{'=' if place.tied else ''}",
                *[compact(*score.ends.get(calls, missing)) for calls in nfe],
                "-" if place.ratio is None else f"{compact(*percent(place.ratio))}%",
            ]
            for score, place in zip([*self.scores, self.bound], ranks, strict=True)
        ]
        title = (
            f"{self.title}; untrained students' end points against the teacher's\n"
            "rms per element (standard error); worse: than the one above, over all NFE"
        )
        return Table(title, ["preconditioning", "rank", *[f"{calls} NFE" for calls in nfe], "worse by"], rows)

    def pair_table(self) -> Table:
        """Returns jump errors, gaps and the largest f and g over all pairs (t, s)."""
        rows = [
            [score.name, compact(*score.mean_jump_error), compact(*score.mean_gap),
             f"{_largest(score.f):.3g}", f"{_largest(score.g):.3g}"]
            for score in [*self.scores, self.bound]
        ]  # fmt: skip
        return Table("over all pairs (t, s)", ["preconditioning", "jump error", "gap", "max |f|", "max |g|"], rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON; what is not finite becomes null."""
        record = {
            **self.facts,
            "levels": self.levels.tolist(),
            "ranking": [asdict(place) for place in self.ranks],
            "left_out": dict(self.left_out),
            "forms": {score.name: _as_json(score) for score in self.scores},
            "bound": _as_json(self.bound),
        }
        plain: dict[str, Any] = json.loads(json.dumps(record), parse_constant=lambda name: None)
        return plain

    def save(self, folder: Path) -> None:
        """Writes ``compare.json`` and the heat maps ``compare.png``."""
        from cdistill.reporting.figures import draw_gaps
        from cdistill.reporting.panels import save_figure

        write_text(folder / "compare.json", json.dumps(self.to_dict(), indent=1) + "\n")
        save_figure(draw_gaps(self.title, self.levels, self.scores, self.bound), folder / "compare.png")


def compare(
    teacher: str | Path | Teacher,
    preconditionings: Sequence[str] | None = None,
    nfe: Sequence[int] = (1, 2, 3, 5),
    *,
    coefficients: str | Path | Coefficients | None = None,
    data: str | None = None,
    settings: EstimationSection | None = None,
    points: int = 18,
    trajectories: int = 256,
    substeps: int = 4,
    seed: int = 0,
    weights: Path | None = None,
    out: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> PreconditioningComparison:
    """Compares preconditionings before training, on a teacher's own trajectories.

    Args:
        teacher: A name (``cdistill ls teachers``), a file, or a loaded teacher.
        preconditionings: Names; all that are registered by default.
        nfe: Numbers of network calls of the untrained students.
        coefficients: l and s of this teacher, or their file; estimated by default where a preconditioning needs them.
        data: What they are estimated on; the teacher's own by default.
        settings: How they are estimated.
        points: Noise levels of the rho-grid, between which all jumps are made.
        trajectories: How many.
        substeps: Heun's steps from one level to the next.
        seed: Of the trajectories.
        weights: File of the teacher's weights, where its name alone does not find them.
        out: Folder of ``compare.json``, ``compare.png`` and the estimated coefficients; None writes nothing.
        accelerator: Devices and processes; one for this machine by default.

    Raises:
        CdistillError: No preconditioning is left to compare.
        MismatchError: The coefficients were made for another teacher.

    >>> comparison = compare("mixture-1d", ["bcm", "ctm"], nfe=[1, 2], trajectories=32)
    >>> [(place.name, place.place) for place in comparison.ranks]
    [('bcm', 1), ('ctm', 1)]
    """
    names = list(preconditionings or PRECONDITIONINGS.names())
    accelerator = accelerator or make_accelerator("fp32")
    teacher, out = open_teacher(teacher, weights, accelerator), None if out is None else Path(out)
    if out is not None:
        check_place(out / "compare.json")
    known = Path(coefficients) if isinstance(coefficients, str) else coefficients
    if any(_asks(name, "needs_coefficients") for name in names):
        fitted = [name for name in names if _asks(name, "needs_fit")]
        settings = with_fit(settings or EstimationSection(), fitted)
        known = _coefficients_of(teacher, known, data, settings, out, accelerator)
    f_and_g, samplers, left_out = _take_part(teacher, names, nfe, points, known)
    with progress(trajectories, "trajectories", "trajectory") as advance:
        moments = collect_moments(
            teacher.denoiser, points, trajectories, seed, substeps, samplers, advance, accelerator
        )
    scores = {name: score(name, moments, values, nfe) for name, values in f_and_g.items()}
    ranks = rank(list(scores.values()))
    facts = {
        "teacher": teacher.name,
        "teacher_sha256": teacher.digest,
        "coefficients": {"file": str(known), **load_coefficients(known)[2]} if isinstance(known, Path) else None,
        "device": str(accelerator.device),
        "versions": versions(),
        "names": names, "nfe": list(nfe), "points": points, "trajectories": trajectories, "substeps": substeps,
        "seed": seed,
    }  # fmt: skip
    ordered = [scores[place.name] for place in ranks]
    comparison = PreconditioningComparison(ordered, score_bound(moments), ranks, left_out, moments.levels, facts)
    if out is not None and accelerator.is_main_process:
        with rescuing(comparison.table(), comparison.pair_table()):
            comparison.save(out)
    accelerator.wait_for_everyone()
    return comparison


def _coefficients_of(
    teacher: Teacher,
    given: Path | Coefficients | None,
    data: str | None,
    settings: EstimationSection | None,
    out: Path | None,
    accelerator: Accelerator,
) -> Path | Coefficients:
    """Returns the given coefficients if they are the teacher's, or estimates them, unless they lie in `out` already."""
    if isinstance(given, Path):
        check_teacher(given, load_coefficients(given)[2], teacher.name, teacher.digest)
    if given is not None:
        return given
    file = None if out is None else out / "coefficients.safetensors"
    estimate = estimate_coefficients(teacher, data, settings, out=file, reuse=True, accelerator=accelerator)
    return file or estimate.coefficients


def _take_part(
    teacher: Teacher, names: Sequence[str], nfe: Sequence[int], points: int, coefficients: Path | Coefficients | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[Student, Sampler], dict[str, str]]:
    """Builds the preconditionings; one that fails, whatever another package raises, is left out.

    Returns:
        f and g at all pairs by name, the untrained students, and why others were left out.

    Raises:
        CdistillError: None takes part.
    """
    f_and_g: dict[str, tuple[Tensor, Tensor]] = {}
    samplers: dict[Student, Sampler] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            preconditioning = load_preconditioning(name, teacher, coefficients)
            values = f_and_g_at_pairs(preconditioning, rho_grid(points))
            # CM draws fresh noise after the first call, so that its end points are not the trajectory's
            calls = [k for k in nfe if k == 1 or not preconditioning.to_eps_only]
            samplers |= {(name, k): make_sampler(teacher.denoiser, preconditioning, nfe=k) for k in calls}
            f_and_g[name] = values
        except CdistillError as error:
            left_out[name] = brief(error)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {brief(error)}"
    if not f_and_g:
        raise CdistillError(f"compare: no preconditioning is left; {'; '.join(left_out.values())}")
    return f_and_g, samplers, left_out


def _as_json(score: Score) -> dict[str, Any]:
    return {
        "mean_gap": _number(score.mean_gap),
        "mean_jump_error": _number(score.mean_jump_error),
        "ends": {str(calls): _number(number) for calls, number in score.ends.items()},
        "geometric_mean": math.exp(float(score.overall[0])),
        "max_f": _largest(score.f),
        "max_g": _largest(score.g),
        **{name: getattr(score, name).tolist() for name in ("gap", "jump_error", "f", "g")},
    }


def _number(number: Number) -> dict[str, Any]:
    return {"value": number[0], "standard_error": number[1]}


def percent(ratio: Number) -> Number:
    """Returns ln of a ratio and its error as a difference in percent; what is below 1e-6 % is rounding.

    >>> percent((0.0099503308531681, 0.0))
    (1.0, 0.0)
    """
    value = 100 * math.expm1(ratio[0])
    return round(value, 6), round((100 + value) * ratio[1], 6)


def _largest(values: Tensor) -> float:
    return float(values[values.isfinite()].abs().max())


def _asks(name: str, attribute: str) -> bool:
    """Whether a preconditioning says that it needs something; one that cannot be imported is left out later."""
    try:
        return bool(getattr(PRECONDITIONINGS.get(name), attribute, False))
    except CdistillError:
        return False
