"""Small charts as inline SVG: lines with bands or error bars, told apart by colour, dashes and markers alike.

The page's style sheet colours them, so that they follow the reader's scheme and the printer; a chart is as wide as a
telephone, and wider screens show several abreast.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 36
STYLES = 6  # colours and dashes; there are as many markers less one, so that 30 lines differ
_SHOWN = 24  # points of a line that get a marker and an error bar; more make a band
_STEEP = 8  # from this ratio of the largest to the smallest value on, ticks are at 1, 2, 5
_MARKERS = (
    "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "m-3-3h6v6h-6z",
    "m0-4l4 7h-8z",
    "m0-4l4 4l-4 4l-4-4z",
    "m-3-3l6 6m0-6l-6 6",
)

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: In the legend.
        points: (x, y), from left to right.
        ends: Lower and upper end of an interval around each y; empty where none is known.
        style: Which colour, dashes and marker; the same in all charts of a group.
    """

    label: str
    points: Sequence[tuple[float, float]]
    ends: Sequence[tuple[float, float]] = ()
    style: int = 0


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: Heading.
        x: Name of the horizontal axis.
        lines: At least one point altogether.
        x_log: Whether the horizontal axis is logarithmic.
        y_log: Whether the vertical axis is; everything drawn must be positive then.
        ticks: Places of the horizontal ticks; chosen by the values when empty.
        levels: (label, y) of horizontal lines: the teacher's value, say.
    """

    title: str
    x: str
    lines: Sequence[Line]
    x_log: bool = False
    y_log: bool = False
    ticks: Sequence[float] = ()
    levels: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Stroke:
    """A drawn line: SVG path data and the numbers of its style."""

    path: str
    area: str
    bars: str
    markers: str
    style: int


@dataclass(frozen=True)
class Drawing:
    """A chart in pixels; ticks are (place, text)."""

    title: str
    x: str
    alt: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    levels: Sequence[float]
    strokes: Sequence[Stroke]


@dataclass(frozen=True)
class Group:
    """Charts with one legend.

    Attributes:
        title: Heading.
        note: What the reader must know.
        drawings: The charts.
        legend: (label, style) of the lines; the style is None for horizontal lines.
    """

    title: str
    note: str
    drawings: Sequence[Drawing]
    legend: Sequence[tuple[str, int | None]]


def group(title: str, note: str, charts: Sequence[Chart]) -> Group:
    """Draws charts that share a legend."""
    lines: dict[tuple[str, int | None], None] = {}
    for chart in charts:
        lines |= {(line.label, line.style): None for line in chart.lines} | {
            (label, None): None for label, _ in chart.levels
        }
    return Group(title, note, [draw(chart) for chart in charts], list(lines))


def draw(chart: Chart) -> Drawing:
    """Places everything in a chart."""
    xs = [x for line in chart.lines for x, _ in line.points]
    ys = [y for line in chart.lines for _, y in line.points] + [y for _, y in chart.levels]
    ends = [end for line in chart.lines for pair in line.ends for end in pair]
    ys += [end for end in ends if math.isfinite(end) and (end > 0 or not chart.y_log)]
    x_ends, y_ends = span(xs, chart.x_log, 0), span(ys, chart.y_log, 0.04)
    across = _scale(x_ends, LEFT, WIDTH - RIGHT, chart.x_log)
    down = _scale(y_ends, HEIGHT - BOTTOM, TOP, chart.y_log)
    x_places = list(chart.ticks) or ticks(*x_ends, chart.x_log)
    return Drawing(
        chart.title,
        chart.x,
        describe(chart),
        [(across(place), short(place)) for place in x_places],
        [(down(place), short(place)) for place in ticks(*y_ends, chart.y_log)],
        [down(level) for _, level in chart.levels],
        [_stroke(line, across, down) for line in chart.lines if line.points],
    )


def describe(chart: Chart) -> str:
    """Returns a chart in words: where each line begins and ends."""
    parts = []
    for line in chart.lines:
        if line.points:
            (x, y), (x_last, y_last) = line.points[0], line.points[-1]
            parts.append(f"{line.label}: {y:.4g} at {short(x)}, {y_last:.4g} at {short(x_last)}")
    parts += [f"{label}: {value:.4g}" for label, value in chart.levels]
    return f"{chart.title} against {chart.x}. {'; '.join(parts)}"


def span(values: Sequence[float], logarithmic: bool, margin: float) -> tuple[float, float]:
    """Returns the ends of an axis: those of the values, and `margin` of the length more on both sides."""
    low, high = min(values), max(values)
    if logarithmic:
        if high == low:
            return low / 2, high * 2
        more = (high / low) ** margin
        return low / more, high * more
    if high == low:
        return low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    return low - margin * (high - low), high + margin * (high - low)


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Returns about five round places between `low` and `high`."""
    if logarithmic and high > _STEEP * low:
        subs = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
        places = LogLocator(subs=subs, numticks=6).tick_values(low, high)
    else:
        places = MaxNLocator(5).tick_values(low, high)
    return [float(place) for place in np.asarray(places) if low * (1 - 1e-9) <= place <= high * (1 + 1e-9)] or [
        low,
        high,
    ]


def short(value: float) -> str:
    """Writes a number as briefly as a tick needs.

    >>> short(0.30000000000000004), short(25000), short(1e-5), short(80.0)
    ('0.3', '25k', '1e-5', '80')
    """
    if 1e4 <= abs(value) < 1e7:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def mark(style: int) -> str:
    """Returns the SVG path of a style's marker, relative to its centre."""
    return _MARKERS[style % len(_MARKERS)]


def _scale(ends: tuple[float, float], first: float, last: float, logarithmic: bool) -> Scale:
    """Returns the map of an axis to pixels; what lies outside of the axis is put on its end."""
    low, high = (math.log(end) for end in ends) if logarithmic else ends

    def place(value: float) -> float:
        if logarithmic:
            value = math.log(value) if value > 0 else low
        return round(first + (last - first) * min(1.0, max(0.0, (value - low) / (high - low))), 1)

    return place


def _stroke(line: Line, across: Scale, down: Scale) -> Stroke:
    spots = [(across(x), down(y)) for x, y in line.points]
    whiskers = [(x, down(low), down(high)) for (x, _), (low, high) in zip(spots, line.ends, strict=False)]
    few = len(spots) <= _SHOWN
    marker = mark(line.style)
    edge = [(x, low) for x, low, _ in whiskers] + [(x, high) for x, _, high in reversed(whiskers)]
    return Stroke(
        path=_path(spots) if len(spots) > 1 else "",
        area="" if few or not edge else f"{_path(edge)}z",
        bars="".join(f"M{x} {a}V{b}m-3 0h6M{x - 3:.1f} {a}h6" for x, a, b in whiskers) if few else "",
        markers="".join(f"M{x} {y}{marker}" for x, y in spots) if few else "",
        style=line.style % STYLES,
    )


def _path(spots: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in spots)
