"""``cdistill compare``: preconditionings judged before training."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from cdistill.analysis.consistency_gap import (
    Moments,
    Number,
    Rank,
    Score,
    collect_moments,
    pair_coefficients,
    rank,
    score,
    score_bound,
)
from cdistill.errors import CdistillError, brief
from cdistill.estimation.settings import EstimationSection
from cdistill.preconditionings import load_preconditioning
from cdistill.preconditionings.coefficients import check_teacher, load_coefficients
from cdistill.registry import PRECONDITIONINGS
from cdistill.runtime.console import compact, facts, progress, table
from cdistill.runtime.processes import versions
from cdistill.sampling.drawing import Sampler
from cdistill.sampling.samplers import make_sampler
from cdistill.sampling.teacher_data import open_data
from cdistill.schedule import rho_grid
from cdistill.storage.files import write_text
from cdistill.teachers import Teacher, load_teacher
from cdistill.training.loop import make_accelerator
from cdistill.workflows.estimate import estimate_coefficients


@dataclass(frozen=True)
class Request:
    """What is compared on what.

    Attributes:
        names: Preconditionings.
        nfe: Numbers of network calls of the untrained students.
        points: Noise levels of the rho-grid whose pairs are judged.
        trajectories: How many.
        substeps: Heun's steps from one level to the next.
        seed: Of the trajectories.
    """

    names: Sequence[str]
    nfe: Sequence[int]
    points: int
    trajectories: int
    substeps: int
    seed: int


@dataclass(frozen=True)
class Entrant:
    """A preconditioning that takes part.

    Attributes:
        coefficients: f and g at all pairs, see `pair_coefficients`.
        samplers: NFE -> sampler of the untrained student.
    """

    coefficients: tuple[Tensor, Tensor]
    samplers: dict[int, Sampler]


def compare(
    teacher_name: str,
    weights: Path | None,
    data: str | None,
    request: Request,
    coefficients: Path | None,
    section: EstimationSection,
    out: Path,
) -> dict[str, Any]:
    """Judges preconditionings on a teacher's trajectories; prints, draws and returns the result as JSON.

    Args:
        teacher_name: Name or file.
        weights: File of its weights, where it is in no usual place.
        data: What coefficients are estimated on; the teacher's own by default.
        request: What is compared on what.
        coefficients: File of coefficients; None to estimate them where a form needs some.
        section: How they are estimated.
        out: Folder of ``compare.json``, ``compare.png`` and the estimated coefficients.

    Raises:
        CdistillError: No preconditioning is left to compare.
    """
    teacher = load_teacher(teacher_name, weights)
    accelerator = make_accelerator("fp32")
    teacher.denoiser.to(accelerator.device)
    if any(map(_needs_coefficients, request.names)):
        own = out / "coefficients.safetensors"
        coefficients = find_coefficients(teacher, coefficients, data, section, own, accelerator)
    entrants, refused = admit(teacher, request, coefficients)
    samplers = [sampler for entrant in entrants.values() for sampler in entrant.samplers.values()]
    with progress(request.trajectories, "trajectories", "trajectory") as advance:
        moments = collect_moments(
            teacher.denoiser, request.points, request.trajectories, request.seed, request.substeps,
            samplers, advance, accelerator,
        )  # fmt: skip
    scores, bound = judge(entrants, moments, request.nfe), score_bound(moments)
    ranks = rank(scores)
    record = as_record(
        scores, bound, ranks, refused,
        teacher=teacher.name,
        teacher_sha256=teacher.digest,
        coefficients=None if coefficients is None else _provenance(coefficients),
        levels=moments.levels.tolist(),
        device=str(accelerator.device),
        versions=versions(),
        **{**asdict(request), "names": list(request.names), "nfe": list(request.nfe)},
    )  # fmt: skip
    if accelerator.is_main_process:
        report(out, f"{teacher.name}: {request.trajectories} trajectories", record, moments, scores, bound, ranks)
    accelerator.wait_for_everyone()
    return record


def find_coefficients(
    teacher: Teacher,
    given: Path | None,
    data: str | None,
    section: EstimationSection,
    own: Path,
    accelerator: Accelerator,
) -> Path:
    """Returns the file of the teacher's coefficients: the given one, or `own`, estimated now unless it is there.

    Raises:
        MismatchError: The given one was made for another teacher.
    """
    if given is not None:
        check_teacher(given, load_coefficients(given)[2], teacher.name, teacher.digest)
        return given
    estimate_coefficients(teacher, data, section, out=own, reuse=True, accelerator=accelerator)
    return own


def admit(teacher: Teacher, request: Request, coefficients: Path | None) -> tuple[dict[str, Entrant], dict[str, str]]:
    """Builds the preconditionings; one that fails, whatever another package raises, is left out.

    Returns:
        Those that take part, and the errors of those that do not, both by name.

    Raises:
        CdistillError: None takes part.
    """
    found: dict[str, Entrant] = {}
    refused: dict[str, str] = {}
    for name in request.names:
        try:
            form = load_preconditioning(name, teacher, coefficients)
            pairs = pair_coefficients(form, rho_grid(request.points))
            calls = [k for k in request.nfe if k == 1 or not form.to_eps_only]  # CM draws fresh noise behind the first
            samplers: dict[int, Sampler] = {k: make_sampler(teacher.denoiser, form, nfe=k) for k in calls}
            found[name] = Entrant(pairs, samplers)
        except CdistillError as error:
            refused[name] = brief(error)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {brief(error)}"
    if not found:
        raise CdistillError(f"compare: no preconditioning is left; {'; '.join(refused.values())}")
    return found, refused


def judge(entrants: dict[str, Entrant], moments: Moments, nfe: Sequence[int]) -> list[Score]:
    """Scores all entrants, whose samplers stand in ``moments.ends`` one after the other."""
    scores, first = [], 0
    for name, entrant in entrants.items():
        columns = {calls: first + index for index, calls in enumerate(entrant.samplers)}
        first += len(columns)
        scores.append(score(name, moments, entrant.coefficients, columns, nfe))
    return scores


def report(
    out: Path,
    title: str,
    record: dict[str, Any],
    moments: Moments,
    scores: Sequence[Score],
    bound: Score,
    ranks: Sequence[Rank],
) -> None:
    """Writes the record and the picture, and prints the ranking."""
    from cdistill.reporting.figures import draw_gaps
    from cdistill.reporting.panels import save_figure

    by_name = {one.name: one for one in scores}
    ordered = [by_name[place.name] for place in ranks]
    write_text(out / "compare.json", json.dumps(record, indent=1) + "\n")
    save_figure(draw_gaps(title, moments.levels, ordered, bound), out / "compare.png")
    print_ranking(title, ordered, bound, ranks, record["nfe"])
    if record["left_out"]:
        facts("left out", list(record["left_out"].items()))


def print_ranking(
    title: str, ordered: Sequence[Score], bound: Score, ranks: Sequence[Rank], nfe: Sequence[int]
) -> None:
    """Prints two tables with a line for each form in the order of `ranks`, and the bound below them."""
    missing = (math.nan, math.nan)
    rows = [
        [
            one.name,
            "-" if place.place is None else f"{place.place}{'=' if place.tied else ''}",
            *[compact(*one.ends.get(calls, missing)) for calls in nfe],
            "-" if place.ratio is None else f"{compact(*percent(place.ratio))}%",
        ]
        for one, place in zip([*ordered, bound], [*ranks, Rank(bound.name, None)], strict=True)
    ]
    table(
        f"{title}; untrained students' end points against the teacher's\n"
        "rms per element (standard error); behind: the form above, over all NFE",
        ["preconditioning", "rank", *[f"{calls} NFE" for calls in nfe], "behind"],
        rows,
    )
    table(
        "over all pairs (t, s)",
        ["preconditioning", "jump error", "gap", "max |f|", "max |g|"],
        [
            [one.name, compact(*one.mean_jump_error), compact(*one.mean_gap),
             f"{_largest(one.f):.3g}", f"{_largest(one.g):.3g}"]
            for one in [*ordered, bound]
        ],
    )  # fmt: skip


def as_record(
    scores: Sequence[Score], bound: Score, ranks: Sequence[Rank], refused: dict[str, str], **values: Any
) -> dict[str, Any]:
    """Returns everything as JSON; what is not finite becomes null."""
    forms = {one.name: _as_json(one) for one in scores}
    return {**values, "ranking": [asdict(one) for one in ranks], "left_out": refused, "forms": forms,
            "bound": _as_json(bound)}  # fmt: skip


def _as_json(one: Score) -> dict[str, Any]:
    matrices = {name: _finite(getattr(one, name).tolist()) for name in ("gap", "jump_error", "f", "g")}
    numbers = {"mean_gap": one.mean_gap, "mean_jump_error": one.mean_jump_error}
    return {
        **{name: _number(number) for name, number in numbers.items()},
        "ends": {str(calls): _number(number) for calls, number in one.ends.items()},
        "geometric_mean": _finite(math.exp(float(one.overall[0]))),
        "max_f": _finite(_largest(one.f)),
        "max_g": _finite(_largest(one.g)),
        **matrices,
    }


def _number(number: Number) -> dict[str, Any]:
    return {"value": _finite(number[0]), "standard_error": _finite(number[1])}


def _finite(values: Any) -> Any:
    """Returns numbers, in lists of any depth, with None for those that JSON has no word for."""
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return values if math.isfinite(values) else None


def percent(ratio: Number) -> Number:
    """Returns ln of a ratio and its error as a difference in percent; what is below 1e-6 % is rounding.

    >>> percent((0.0099503308531681, 0.0))
    (1.0, 0.0)
    """
    value = 100 * math.expm1(ratio[0])
    return round(value, 6), round((100 + value) * ratio[1], 6)


def _largest(values: Tensor) -> float:
    return float(values[values.isfinite()].abs().max())


def _provenance(coefficients: Path) -> dict[str, Any]:
    return {"file": str(coefficients), **load_coefficients(coefficients)[2]}


def _needs_coefficients(name: str) -> bool:
    """Whether a form needs some; one that cannot be imported is left out later."""
    try:
        return bool(getattr(PRECONDITIONINGS.get(name), "needs_coefficients", False))
    except CdistillError:
        return False
