"""Rows of results: samplers measured on the same seeds, as a table and as a record."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from cdistill.console import say, table
from cdistill.data import Source
from cdistill.errors import CdistillError, StoppedError
from cdistill.evaluation.metrics import Metric, Reference
from cdistill.registry import METRICS


@dataclass(frozen=True)
class Row:
    """One sampler, measured.

    Attributes:
        sampler: "student", "untrained student" or "teacher (Heun)".
        nfe: Network calls a sample.
        values: Metric -> value.
    """

    sampler: str
    nfe: int
    values: dict[str, float] = field(default_factory=dict)


def choose_metrics(names: Sequence[str], source: Source) -> dict[str, Metric]:
    """Returns the metrics called `names`, or all that apply to this kind of data when none is named.

    One that cannot be computed here is named on stderr, with what to do, and left out.

    Raises:
        CdistillError: None of those that are named can be computed.
        StoppedError: A signal came while weights were fetched.
    """
    found: dict[str, Metric] = {name: METRICS.get(name)() for name in (names or METRICS.names())}
    chosen = found if names else {name: metric for name, metric in found.items() if metric.applies(source)}
    usable, failure = {}, None
    for name, metric in chosen.items():
        try:
            metric.check(source)
            usable[name] = metric
        except StoppedError:
            raise
        except CdistillError as error:
            failure = error
            say(f"{name}: left out: {error}")
    if names and not usable and failure is not None:
        raise failure
    return usable


def measure(sampler: str, nfe: int, metrics: dict[str, Metric], samples: Tensor, reference: Reference) -> Row:
    """Measures one set of samples."""
    return Row(sampler, nfe, {name: metric(samples, reference) for name, metric in metrics.items()})


def print_rows(title: str, metrics: dict[str, Metric], rows: Sequence[Row]) -> None:
    """Prints the table of results."""
    columns = ["sampler", "NFE", *[metric.title for metric in metrics.values()]]
    table(
        title,
        columns,
        [[row.sampler, str(row.nfe), *[f"{row.values[name]:.4g}" for name in metrics]] for row in rows],
    )


def as_record(rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """Returns the rows and how they were made, as JSON."""
    return {**facts, "rows": [asdict(row) for row in rows]}
