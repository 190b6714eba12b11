"""Runs as one HTML page that needs nothing else: no script, no font, no address but those inside of it.

Whatever comes from a file is escaped: `plain` writes out what steers a terminal or a reading direction, Jinja's
autoescape what is HTML, and the page's own policy forbids scripts and the network in any case.
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cdistill import __version__
from cdistill.errors import printable
from cdistill.evaluation.records import Pair
from cdistill.reporting import charts, image_grids, panels, summary, tables
from cdistill.reporting.reading import Run

_UNLIMITED = 1 << 30
_NAME = re.compile("[^A-Za-z0-9]+")


def render(runs: Sequence[Run], pairs: Sequence[Pair] = ()) -> str:
    """Returns the page about runs with different names; the same files give the same page."""
    environment = Environment(
        loader=PackageLoader("cdistill.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["anchor"] = anchor
    return environment.get_template("page.html.jinja").render(
        runs=runs,
        version=__version__,
        summary=summary,
        panels=panels,
        image_grids=image_grids,
        results=tables.results(runs),
        pairs=tables.pair_tables(pairs, runs),
        by_calls=charts.by_calls(runs),
        comparisons=image_grids.compare_samples(runs),
        training=charts.while_training(runs),
        coefficients=charts.coefficients(runs),
        differing=tables.differences({run.name: run.record.values for run in runs}),
    )


def plain(value: Any) -> Any:
    r"""Returns a text as it may be shown, line by line; anything else, and markup of the page's own, as it is.

    >>> plain("a\x00b\n\u202ec")
    'a\\x00b\n\\u202ec'
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(printable(line, _UNLIMITED) for line in value.split("\n"))


def anchor(title: str) -> str:
    """Returns a text as a name within the page.

    >>> anchor("Metrics against calls")
    'metrics-against-calls'
    """
    return _NAME.sub("-", title).strip("-").lower()
