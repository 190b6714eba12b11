"""The classes of a conditional network: what they are called, and how often each occurred in the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdistill.errors import RecipeError, suggest

_BALANCED = 0.9  # least over most frequent class, from which on all are drawn alike, as EDM does
_SHOWN = 12  # classes that are named on one line


@dataclass(frozen=True)
class Classes:
    """Classes 0, 1, ... of a network or of data; none of them where both are unconditional.

    Attributes:
        counts: Samples of each class in the data; all alike where that is not known.
        names: What each is called; () where nothing says.
    """

    counts: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def unknown(cls, count: int) -> Classes:
        """Returns `count` classes of which nothing else is known."""
        return cls((1,) * count)

    @classmethod
    def parse(cls, value: Any, count: int) -> Classes:
        """Returns what the header of a file says, see `to_dict`, about `count` classes; ValueError if it cannot be."""
        if not (count and value and value["counts"]):
            return cls.unknown(count)
        counts, names = tuple(value["counts"]), tuple(value["names"])
        if len(counts) != count or len(names) not in (0, count):
            raise ValueError(f"classes: {len(counts)} counts and {len(names)} names of {count} classes")
        if any(type(one) is not int or not 0 <= one < 2**53 for one in counts) or not any(counts):
            raise ValueError("classes: counts must be whole numbers, not all 0")
        if any(not isinstance(name, str) or not name.isprintable() or len(name) > 255 for name in names):
            raise ValueError("classes: names must be short printable texts")
        return cls(counts, names)

    def to_dict(self) -> dict[str, Any]:
        """Returns the classes as JSON."""
        return {"counts": list(self.counts), "names": list(self.names)}

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def shares(self) -> tuple[float, ...]:
        """How often each class is drawn, adding up to 1: as in the data, or all alike where they nearly are."""
        least, most = min(self.counts, default=0), max(self.counts, default=0)
        if least >= _BALANCED * most:
            return (1 / len(self),) * len(self) if len(self) else ()
        whole = sum(self.counts)
        return tuple(count / whole for count in self.counts)

    @property
    def law(self) -> str:
        """How classes are drawn, for people: "alike", or the counts they follow; "" without classes."""
        if not self.counts:
            return ""
        return "alike" if min(self.shares) == max(self.shares) else str(self)

    def alike(self) -> Classes:
        """Returns the classes with all that occur equally often."""
        return Classes(tuple(int(count > 0) for count in self.counts), self.names)

    def name(self, number: int) -> str:
        """Returns what class `number` is called: its number where nothing says."""
        return self.names[number] if self.names else str(number)

    def numbers(self, wanted: Sequence[str]) -> list[int]:
        """Returns the number of each class that is `wanted` by name or number; RecipeError if there is no such."""
        known = {str(k): k for k in range(len(self))} | {name: k for k, name in enumerate(self.names)}
        if unknown := [name for name in wanted if name not in known]:
            allowed = suggest(unknown[0], self.names) if self.names else f"allowed: 0 to {len(self) - 1}"
            allowed = allowed if len(self) else "the network is unconditional; leave the option out"
            raise RecipeError(f"--classes: got {unknown[0]!r}; {allowed}")
        return [known[name] for name in wanted]

    def __str__(self) -> str:
        """The classes that occur, with their counts."""
        parts = [f"{self.name(k)} {count:,}" for k, count in enumerate(self.counts) if count]
        more = f", and {len(parts) - _SHOWN:,} more" if len(parts) > _SHOWN else ""
        return ", ".join(parts[:_SHOWN]) + more
