"""Two samplers on the same seeds: by how much they differ, and whether that can be told from chance."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdistill.evaluation.estimates import difference
from cdistill.evaluation.metrics import Metric
from cdistill.evaluation.results import Row, figure, finite
from cdistill.runtime.console import table

UNDECIDED = "not distinguishable"


@dataclass(frozen=True)
class Difference:
    """A figure of one sampler less that of another on the same seeds.

    Attributes:
        metric: Its name.
        sampler: Which row of both.
        nfe: Network calls a sample.
        first: The first one's figure.
        second: The other's.
        difference: Second minus first.
        error: Standard error of the difference; the noise that both share cancels.
        interval: Two-sided, at `estimates.LEVEL`, for this one difference alone.
        verdict: "better", "worse" or "not distinguishable": the second compared with the first.
    """

    metric: str
    sampler: str
    nfe: int
    first: float
    second: float
    difference: float
    error: float
    interval: tuple[float, float]
    verdict: str


def compare_rows(
    first: Sequence[Row], second: Sequence[Row], metrics: Mapping[str, Metric], samplers: Collection[str]
) -> list[Difference]:
    """Compares what two lists of rows have in common: the same one of `samplers`, NFE and metric."""
    others = {(row.sampler, row.nfe): row for row in second if row.sampler in samplers}
    pairs = [(row, others[row.sampler, row.nfe]) for row in first if (row.sampler, row.nfe) in others]
    return [
        _compare(name, metric.better, row, other)
        for name, metric in metrics.items()
        for row, other in pairs
        if name in row.estimates and name in other.estimates
    ]


def _compare(name: str, better: str, row: Row, other: Row) -> Difference:
    first, second = row.estimates[name], other.estimates[name]
    found = difference(second, first)
    low, high = found.interval()
    verdict = UNDECIDED
    if low > 0 or high < 0:  # neither where a figure is not finite
        verdict = "better" if (found.value < 0) == (better == "lower") else "worse"
    return Difference(
        name, row.sampler, row.nfe, first.value, second.value, found.value, found.error, (low, high), verdict
    )


def print_comparison(names: tuple[str, str], metrics: Mapping[str, Metric], found: Sequence[Difference]) -> None:
    """Prints the differences; the verdict is about the second name."""
    cells = [
        [
            metrics[part.metric].title, str(part.nfe), f"{part.first:.4g}", f"{part.second:.4g}",
            figure(part.difference, part.interval), part.verdict,
        ]
        for part in found
    ]  # fmt: skip
    table(
        f"{names[1]} compared with {names[0]}, on the same seeds",
        ["metric", "NFE", "first", "second", "difference", f"{names[1]} is"],
        cells,
    )


def as_json(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """Returns the differences as JSON."""
    numbers = "first", "second", "difference", "error"
    return [
        {
            **vars(part),
            **{key: finite(getattr(part, key)) for key in numbers},
            "interval": [finite(end) for end in part.interval],
        }
        for part in differences
    ]
