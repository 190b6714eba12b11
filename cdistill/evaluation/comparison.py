"""Evaluations compared: of two students on the same seeds, and of a record with itself when it is measured again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdistill.errors import MismatchError, RecipeError
from cdistill.evaluation.estimates import Estimate, difference
from cdistill.evaluation.records import (
    IMAGES,
    STUDENT,
    UNDECIDED,
    Difference,
    Evaluation,
    Pair,
    Row,
    figure,
    finite,
    finite_interval,
)
from cdistill.runtime.console import Table
from cdistill.storage.run_folder import flatten

TOLERANCE = 0.01  # standard errors: other devices and versions move the last bits, and with them single grey levels
ROUNDING = 1e-6  # relative, for a figure without a standard error
_ALIKE = ("samples", "seeds", "data_sha256", "reference_sha256")
_IGNORED = {"rows", "images", "request", "processes", "schema", "level"}


def compare(first: Evaluation, second: Evaluation) -> Pair:
    """Compares what two evaluations have in common: the same student or images, NFE and metric; paired by seed.

    The metrics must be of the same feature network, and the error to the teacher is of the same teacher or left out.
    RecipeError: They are of other seeds or data, or have no metric in common.
    """
    before, now = first.to_dict(), second.to_dict()
    for key in _ALIKE:
        if before.get(key) != now.get(key):
            raise RecipeError(
                f"{second.subject}: {key} is {str(now.get(key))[:80]}, that of {first.subject} "
                f"{str(before.get(key))[:80]}; they are compared on the same seeds and data: set them by options"
            )
    names = [name for name, facts in first.metrics.items() if second.metrics.get(name) == facts]
    if before.get("teacher_sha256") != now.get("teacher_sha256"):
        names = [name for name in names if name != "teacher-mse"]
    others = {(row.sampler, row.nfe): row for row in second.of(STUDENT, IMAGES)}
    pairs = [
        (row, others[row.sampler, row.nfe]) for row in first.of(STUDENT, IMAGES) if (row.sampler, row.nfe) in others
    ]
    differences = [
        _difference(name, first.better(name), row, other)
        for name in names
        for row, other in pairs
        if name in row.estimates and name in other.estimates
    ]
    if not differences:
        raise RecipeError(
            f"{second.subject}: no metric in common with {first.subject}; set --metrics and --features alike"
        )
    return Pair(first=first.subject, second=second.subject, differences=differences)


def _difference(name: str, better: str, row: Row, other: Row) -> Difference:
    first: Estimate = row.estimates[name]
    second: Estimate = other.estimates[name]
    change = difference(second, first)
    low, high = change.interval()
    verdict = UNDECIDED
    if better and (low > 0 or high < 0):  # neither where a figure is not finite
        verdict = "better" if (change.value < 0) == (better == "lower") else "worse"
    return Difference(
        metric=name,
        sampler=row.sampler,
        nfe=row.nfe,
        first=finite(first.value),
        second=finite(second.value),
        difference=finite(change.value),
        error=finite(change.error),
        interval=finite_interval((low, high)),
        verdict=verdict,
    )


def _verdict(repeated: Mapping[str, Any]) -> str:
    """Whether a figure agrees in every bit, or within `TOLERANCE` standard errors or `ROUNDING`, or not."""
    before, now = repeated["before"], repeated["now"]
    if now == before:
        return "identical"
    if now is None or before is None:
        return "DIFFERS"
    return "same" if abs(now - before) <= max(TOLERANCE * repeated["error"], ROUNDING * abs(before)) else "DIFFERS"


@dataclass(frozen=True)
class Repetition:
    """A record in the file `path` measured again: all its figures, and what else has changed, "key: old -> new".

    A figure is a dict of its "sampler", "nfe" and "metric", its values "before" and "now", None where it was not
    finite, and its standard "error", 0 where there is none.
    """

    path: Path
    figures: Sequence[dict[str, Any]]
    changes: Sequence[str]

    @property
    def reproduced(self) -> bool:
        """Whether every figure came out again."""
        return "DIFFERS" not in map(_verdict, self.figures)

    def table(self) -> Table:
        """Returns each figure beside that of the record."""
        rows = []
        for repeated in self.figures:
            sampler, nfe, metric, *values = list(repeated.values())[:5]
            numbers = [figure(value) if value is None else f"{value:.6g}" for value in values]
            rows.append([sampler, str(nfe), metric, *numbers, _verdict(repeated)])
        return Table(f"{self.path}, measured again", ["sampler", "NFE", "metric", "recorded", "now", ""], rows)

    def summary(self) -> str:
        """Returns in a line how many figures came out again."""
        verdicts = [_verdict(repeated) for repeated in self.figures]
        same = len(verdicts) - verdicts.count("DIFFERS")
        identical, count = verdicts.count("identical"), len(verdicts)
        return f"{identical} of {count} figures identical in every bit, {same} within {TOLERANCE} standard errors"

    def check(self) -> None:
        """Raises MismatchError if a figure came out differently."""
        wrong = [repeated for repeated in self.figures if _verdict(repeated) == "DIFFERS"]
        if wrong:
            raise MismatchError(
                f"{self.path}: {len(wrong)} of {len(self.figures)} figures came out differently, first "
                f"{wrong[0]['metric']} of {wrong[0]['sampler']} at {wrong[0]['nfe']} NFE"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return {
            "record": str(self.path), "changes": list(self.changes), "figures": list(self.figures),
            "reproduced": self.reproduced,
        }  # fmt: skip


def repetition(path: Path, before: Evaluation, now: Evaluation) -> Repetition:
    """Returns every figure of the record `before`, which is in the file `path`, beside that of `now`."""
    again = {(row.sampler, row.nfe, name): value for row in now.rows for name, value in row.values.items()}
    figures = [
        {"sampler": row.sampler, "nfe": row.nfe, "metric": name, "before": value,
         "now": again.get((row.sampler, row.nfe, name)), "error": row.errors.get(name) or 0.0}
        for row in before.rows
        for name, value in row.values.items()
    ]  # fmt: skip
    first, second = (
        flatten({key: value for key, value in record.to_dict().items() if key not in _IGNORED})
        for record in (before, now)
    )
    changes = [f"{key}: {first[key]} -> {second[key]}" for key in first if key in second and first[key] != second[key]]
    return Repetition(path, figures, changes)
