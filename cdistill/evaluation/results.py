"""Rows of results: samplers measured on the same seeds, as a table and as a record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdistill.console import compact, say, table
from cdistill.errors import CdistillError, StoppedError
from cdistill.evaluation.estimates import LEVEL, Estimate
from cdistill.evaluation.features import FeatureNetwork
from cdistill.evaluation.metrics import Metric
from cdistill.evaluation.references import Reference
from cdistill.registry import METRICS

SCHEMA = 2


@dataclass(frozen=True)
class Row:
    """One sampler, measured.

    Attributes:
        sampler: "student", "untrained student", "teacher (Heun)", ...
        nfe: Network calls a sample; 0 where nobody knows.
        estimates: Metric -> figure.
    """

    sampler: str
    nfe: int
    estimates: Mapping[str, Estimate]

    def as_record(self) -> dict[str, Any]:
        """Returns the figures, their standard errors and their intervals, as JSON."""
        found = self.estimates.items()
        return {
            "sampler": self.sampler,
            "nfe": self.nfe,
            "values": {name: estimate.value for name, estimate in found},
            "errors": {name: estimate.error for name, estimate in found},
            "intervals": {name: list(estimate.interval()) for name, estimate in found},
        }


def choose_metrics(names: Sequence[str], reference: Reference, network: FeatureNetwork) -> dict[str, Metric]:
    """Returns the metrics called `names`, or all that apply to this kind of data when none is named.

    One that cannot be computed here is named on stderr, with what to do, and left out.

    Raises:
        CdistillError: None of those that are named can be computed.
        StoppedError: A signal came while weights were fetched.
    """
    found: dict[str, Metric] = {name: METRICS.get(name)(network) for name in (names or METRICS.names())}
    chosen = found if names else {name: metric for name, metric in found.items() if metric.applies(reference.source)}
    usable, failure = {}, None
    for name, metric in chosen.items():
        try:
            metric.check(reference)
            usable[name] = metric
        except StoppedError:
            raise
        except CdistillError as error:
            failure = error
            say(f"{name}: left out: {error}")
    if names and not usable and failure is not None:
        raise failure
    return usable


def print_rows(title: str, metrics: Mapping[str, Metric], rows: Sequence[Row]) -> None:
    """Prints the table of results, each figure with its standard error in the last digits."""
    columns = ["sampler", "NFE", *[metric.title for metric in metrics.values()]]
    cells = [
        [row.sampler, str(row.nfe or "-"), *[_figure(row.estimates[name]) if name in row.estimates else "-" for name in metrics]]
        for row in rows
    ]
    table(title, columns, cells)


def _figure(estimate: Estimate) -> str:
    return compact(estimate.value, estimate.error) if estimate.error > 0 else f"{estimate.value:.4g}"


def as_record(metrics: Mapping[str, Metric], rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """Returns the rows and how they were made, as JSON."""
    described = {name: {"title": metric.title, "better": metric.better} for name, metric in metrics.items()}
    return {
        "schema": SCHEMA,
        **facts,
        "level": LEVEL,
        "metrics": described,
        "rows": [row.as_record() for row in rows],
    }
