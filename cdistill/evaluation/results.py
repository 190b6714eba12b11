"""Rows of results: samplers measured on the same seeds, as a table and as a record."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdistill.errors import CdistillError, StoppedError
from cdistill.evaluation.estimates import LEVEL, Estimate
from cdistill.evaluation.features import FeatureNetwork
from cdistill.evaluation.metrics import FeatureMetric, Metric
from cdistill.evaluation.references import Reference
from cdistill.registry import METRICS
from cdistill.runtime.console import say, table

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
            "values": {name: finite(estimate.value) for name, estimate in found},
            "errors": {name: finite(estimate.error) for name, estimate in found},
            "intervals": {name: [finite(end) for end in estimate.interval()] for name, estimate in found},
        }


def finite(value: float) -> float | None:
    """Returns what JSON can hold: None for a value that is not finite."""
    return value if math.isfinite(value) else None


def choose_metrics(names: Sequence[str], reference: Reference, network: FeatureNetwork) -> dict[str, Metric]:
    """Returns the metrics called `names`, or all that apply to this kind of data when none is named.

    One that cannot be computed here is named on stderr, with what to do, and left out.

    Raises:
        CdistillError: None of those that are named can be computed.
        StoppedError: A signal came while weights were fetched.
    """
    source = reference.source
    found: dict[str, Metric] = {name: METRICS.get(name)(network) for name in (names or METRICS.names())}
    chosen = found
    if not names:
        default = ["fid", "teacher-mse"]  # where there are statistics of the data and no data
        if source is not None:
            default = [name for name, metric in found.items() if metric.applies(source)]
        chosen = {name: found[name] for name in default}
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


def _described(metric: Metric) -> dict[str, str]:
    facts = {"title": metric.title, "better": metric.better}
    if isinstance(metric, FeatureMetric):
        facts |= {"features": metric.network.name, "features_sha256": metric.network.digest}
    return facts


def print_rows(title: str, metrics: Mapping[str, Metric], rows: Sequence[Row]) -> None:
    """Prints the table of results, each figure with half the width of its interval."""
    columns = ["sampler", "NFE", *[metric.title for metric in metrics.values()]]
    caption = f"± half the {LEVEL:.0%} confidence interval over the seeds"
    table(title, columns, [[row.sampler, str(row.nfe or "-"), *_figures(row, metrics)] for row in rows], caption)


def _figures(row: Row, metrics: Mapping[str, Metric]) -> list[str]:
    found = [row.estimates.get(name) for name in metrics]
    return ["-" if estimate is None else figure(estimate.value, estimate.interval()) for estimate in found]


def figure(value: float, interval: tuple[float, float]) -> str:
    """Writes a value and half the width of its interval, with two digits of that.

    >>> figure(0.21387, (0.20291, 0.22483)), figure(0.5, (0.5, 0.5)), figure(1234.5, (1200.0, 1269.0))
    ('0.214 ± 0.011', '0.5', '1234 ± 34')
    """
    width = (interval[1] - interval[0]) / 2
    if not 0 < width < math.inf:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(width)))
    return f"{value:.{digits}f} ± {width:.{digits}f}"


def as_record(metrics: Mapping[str, Metric], rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """Returns the rows and how they were made, as JSON."""
    described = {name: _described(metric) for name, metric in metrics.items()}
    return {
        "schema": SCHEMA,
        **facts,
        "level": LEVEL,
        "metrics": described,
        "rows": [row.as_record() for row in rows],
    }
