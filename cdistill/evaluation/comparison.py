"""Evaluations compared: of two students on the same seeds, and of a record with itself when it is measured again."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class RepeatedFigure:
    """A figure measured again; `before` and `now` are None where it was not finite, `error` 0 where there is none."""

    sampler: str
    nfe: int
    metric: str
    before: float | None
    now: float | None
    error: float

    @property
    def identical(self) -> bool:
        """Whether the two agree in every bit."""
        return self.now == self.before

    @property
    def same(self) -> bool:
        """Whether the two agree within `TOLERANCE` standard errors, or `ROUNDING`."""
        if self.now is None or self.before is None:
            return self.identical
        return abs(self.now - self.before) <= max(TOLERANCE * self.error, ROUNDING * abs(self.before))

    def cells(self) -> list[str]:
        """Returns the row of a table."""
        verdict = "identical" if self.identical else "same" if self.same else "DIFFERS"
        numbers = [figure(value) if value is None else f"{value:.6g}" for value in (self.before, self.now)]
        return [self.sampler, str(self.nfe), self.metric, *numbers, verdict]


@dataclass(frozen=True)
class Repetition:
    """A record in the file `path` measured again: all its figures, and what else has changed, "key: old -> new"."""

    path: Path
    figures: Sequence[RepeatedFigure]
    changes: Sequence[str]

    @property
    def reproduced(self) -> bool:
        """Whether every figure came out again."""
        return all(repeated.same for repeated in self.figures)

    def table(self) -> Table:
        """Returns each figure beside that of the record."""
        columns = ["sampler", "NFE", "metric", "recorded", "now", ""]
        return Table(f"{self.path}, measured again", columns, [repeated.cells() for repeated in self.figures])

    def summary(self) -> str:
        """Returns in a line how many figures came out again."""
        identical = sum(repeated.identical for repeated in self.figures)
        same = sum(repeated.same for repeated in self.figures)
        count = len(self.figures)
        return f"{identical} of {count} figures identical in every bit, {same} within {TOLERANCE} standard errors"

    def check(self) -> None:
        """Raises MismatchError if a figure came out differently."""
        wrong = [repeated for repeated in self.figures if not repeated.same]
        if wrong:
            raise MismatchError(
                f"{self.path}: {len(wrong)} of {len(self.figures)} figures came out differently, first "
                f"{wrong[0].metric} of {wrong[0].sampler} at {wrong[0].nfe} NFE"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON."""
        figures = [asdict(repeated) for repeated in self.figures]
        return {
            "record": str(self.path), "changes": list(self.changes), "figures": figures, "reproduced": self.reproduced
        }  # fmt: skip


def repetition(path: Path, before: Evaluation, now: Evaluation) -> Repetition:
    """Returns every figure of the record `before`, which is in the file `path`, beside that of `now`."""
    again = {(row.sampler, row.nfe, name): value for row in now.rows for name, value in row.values.items()}
    figures = [
        RepeatedFigure(
            row.sampler, row.nfe, name, value, again.get((row.sampler, row.nfe, name)), row.errors.get(name) or 0.0
        )
        for row in before.rows
        for name, value in row.values.items()
    ]
    first, second = (
        flatten({key: value for key, value in record.to_dict().items() if key not in _IGNORED})
        for record in (before, now)
    )
    changes = [f"{key}: {first[key]} -> {second[key]}" for key in first if key in second and first[key] != second[key]]
    return Repetition(path, figures, changes)
