"""Rows of results: samplers measured on the same seeds, as a table and as a record."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from cdistill.console import say, table
from cdistill.data import Source
from cdistill.errors import CdistillError
from cdistill.evaluation.metrics import Metric, Reference
from cdistill.registry import METRICS


@dataclass(frozen=True)
class Row:
    """One sampler, measured.

    Attributes:
        sampler: "student", "untrained student" or "teacher (Heun)".
        nfe: Network calls a sample.
        values: Metric -> value; a metric that could not be computed is missing.
    """

    sampler: str
    nfe: int
    values: dict[str, float] = field(default_factory=dict)


def choose_metrics(names: Sequence[str], source: Source) -> dict[str, Metric]:
    """Returns the metrics called `names`, or all that apply to this kind of data when none is named."""
    found: dict[str, Metric] = {name: METRICS.get(name)() for name in (names or METRICS.names())}
    return found if names else {name: metric for name, metric in found.items() if metric.applies(source)}


def measure(sampler: str, nfe: int, metrics: dict[str, Metric], samples: Tensor, reference: Reference) -> Row:
    """Measures one set of samples; a metric that cannot be computed is named on stderr and left out."""
    values = {}
    for name, metric in metrics.items():
        try:
            values[name] = metric(samples, reference)
        except CdistillError as error:
            say(f"{name}: left out: {error}")
    return Row(sampler, nfe, values)


def print_rows(title: str, metrics: dict[str, Metric], rows: Sequence[Row]) -> None:
    """Prints the table of results."""
    columns = ["sampler", "NFE", *[metric.title for metric in metrics.values()]]
    table(
        title,
        columns,
        [[row.sampler, str(row.nfe), *[_format(row, name) for name in metrics]] for row in rows],
    )


def as_record(rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """Returns the rows and how they were made, as JSON."""
    return {**facts, "rows": [asdict(row) for row in rows]}


def _format(row: Row, name: str) -> str:
    return f"{row.values[name]:.4g}" if name in row.values else "-"
