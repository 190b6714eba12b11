"""A record measured again: which figures came out the same, and what is not as it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = 0.01  # standard errors: other devices and versions move the last bits, and with them single grey levels
ROUNDING = 1e-6  # relative, for a figure without a standard error
_IGNORED = {"rows", "images", "request", "processes", "schema", "level"}


@dataclass(frozen=True)
class Repeated:
    """A figure, and what it was in a record.

    Attributes:
        sampler: Row of the table.
        nfe: Network calls a sample.
        metric: Name.
        before: In the record; None where it was not finite.
        now: Measured again; None where it was not, or is not finite.
        error: Standard error in the record, 0 where there is none.
    """

    sampler: str
    nfe: int
    metric: str
    before: float | None
    now: float | None
    error: float

    @property
    def same(self) -> bool:
        """Whether the two agree within `TOLERANCE` standard errors, or `ROUNDING`."""
        if self.now is None or self.before is None:
            return self.identical
        return abs(self.now - self.before) <= max(TOLERANCE * self.error, ROUNDING * abs(self.before))

    @property
    def identical(self) -> bool:
        """Whether the two agree in every bit."""
        return self.now == self.before


def repeated(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Repeated]:
    """Returns every figure of the record `before` beside that of the record `now`."""
    found = {(row["sampler"], row["nfe"], name): value for row in now["rows"] for name, value in row["values"].items()}
    return [
        Repeated(
            row["sampler"], row["nfe"], name, value, found.get((row["sampler"], row["nfe"], name)),
            row.get("errors", {}).get(name) or 0.0,
        )
        for row in before["rows"]
        for name, value in row["values"].items()
    ]  # fmt: skip


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns what the two records say of how they were made and do not agree on, "key: old -> new"."""
    first, second = _flat(before), _flat(now)
    return [f"{key}: {first[key]} -> {second[key]}" for key in first if key in second and first[key] != second[key]]


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in record.items():
        if key in _IGNORED:
            continue
        found |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return found


def describe(parts: Sequence[Repeated]) -> str:
    """Says in a line how many figures came out again."""
    same, identical = sum(part.same for part in parts), sum(part.identical for part in parts)
    return f"{identical} of {len(parts)} figures identical in every bit, {same} within {TOLERANCE} standard errors"
