"""Panels of lines in one style, as figures of matplotlib or as SVG within a page. Needs no torch.

Lines differ by colour, dashes and markers alike. Texts of a file never get into an SVG: labels stand in the page.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cdistill.registry import PRECONDITIONINGS
from cdistill.reporting.curves import Points

WIDTH, HEIGHT = 340, 220  # of a panel, in points
COLOURS = ("#0b5fae", "#b34700", "#00735f", "#8e24aa", "#7a5c00", "#b8144f")
_DASHES: tuple[Any, ...] = (
    "-", (0, (4.4, 1.9)), (0, (1.3, 1.9)), (0, (5.6, 1.9, 1.3, 1.9)), (0, (7.5, 2.5)), (0, (2.5, 1.3))
)  # fmt: skip
_MARKERS = "os^Dx"  # one fewer than colours, so that 30 lines differ
_QUIET, _RULE, _PAPER = "#55585d", "#d6d6d1", "#ffffff"
_VARIABLES = {_QUIET: "var(--quiet)", _RULE: "var(--rule)", _PAPER: "var(--page)"}
_VARIABLES |= {colour: f"var(--c{k})" for k, colour in enumerate(COLOURS)}
_BARS = 6  # points of a line that get error bars; more make a band
_MARKED = 24  # points of a line that get markers
STYLE = mpl.rc_context({
    "text.parse_math": False, "font.size": 11, "axes.titlesize": 11, "figure.titlesize": 12, "legend.fontsize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.edgecolor": _QUIET,
    "axes.labelcolor": _QUIET, "xtick.color": _QUIET, "ytick.color": _QUIET, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": _RULE, "grid.linewidth": 0.75, "axes.axisbelow": True, "ytick.major.size": 0, "xtick.minor.size": 0,
        "ytick.minor.size": 0,
    "axes.xmargin": 0.03, "axes.ymargin": 0.06, "lines.linewidth": 1.6, "lines.markersize": 5, "svg.fonttype": "none",
})  # fmt: skip
"""Decorates what makes a figure."""


@dataclass(frozen=True)
class Line:
    """A line of a panel."""

    label: str  # in the legend
    points: Points  # (x, y), from left to right
    ends: Sequence[tuple[float, float]] = ()
    """Lower and upper end of an interval around each y; empty where none is known."""
    style: int = 0  # which colour, dashes and marker; a multiple of 6 more has the same colour


@dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes."""

    title: str  # heading
    x: str  # name of the horizontal axis
    lines: Sequence[Line]  # what is drawn
    y: str = ""  # name of the vertical axis
    x_log: bool = False  # whether the horizontal axis is logarithmic
    y_log: bool = False  # whether the vertical axis is; values must be positive then
    ticks: Sequence[float] = ()  # places of the horizontal ticks; chosen by the values when empty
    levels: Sequence[tuple[str, float]] = ()  # (label, y) of horizontal lines, the teacher's value for example
    reached: Points = ()  # points where lines reach a level

    def describe(self) -> str:
        """Returns the panel in words: where each line begins and ends."""
        parts = []
        for line in self.lines:
            if line.points:
                (x, y), (x_last, y_last) = line.points[0], line.points[-1]
                parts.append(f"{line.label}: {y:.4g} at {x:g}, {y_last:.4g} at {x_last:g}")
        parts += [f"{label}: {value:.4g}" for label, value in self.levels]
        return f"{self.title} against {self.x}. {'; '.join(parts)}"


def legend(panels: Sequence[Panel]) -> list[tuple[str, int | None]]:
    """Returns (label, style) of the lines of all panels; the style is None for horizontal lines."""
    lines: dict[tuple[str, int | None], None] = {}
    for panel in panels:
        lines |= {(line.label, line.style): None for line in panel.lines}
        lines |= {(label, None): None for label, _ in panel.levels}
    return list(lines)


def style_of(preconditioning: str) -> int:
    """Returns the style of a preconditioning, the same in all figures."""
    names = PRECONDITIONINGS.names()
    return names.index(preconditioning) if preconditioning in names else len(names)


def colour_of(preconditioning: str) -> str:
    """Returns the colour of a preconditioning, the same in all figures."""
    return COLOURS[style_of(preconditioning) % len(COLOURS)]


def draw(axis: Axes, panel: Panel) -> None:
    """Draws a panel without its title."""
    for line in panel.lines:
        if line.points:
            _draw_line(axis, line)
    for label, level in panel.levels:
        axis.axhline(level, color=_QUIET, ls=":", label=label)
    if panel.reached:
        axis.plot(*zip(*panel.reached, strict=True), "o", mfc="none", mec=_QUIET, ms=9, label="reaches the value")
    if not any(line.points for line in panel.lines):
        axis.text(0.5, 0.5, "not run", ha="center", transform=axis.transAxes)
    _scale(axis, panel)
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)


def _scale(axis: Axes, panel: Panel) -> None:
    if panel.y_log:
        log_values(axis)
    else:
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_formatter(FuncFormatter(_short))
    if panel.x_log:
        log_values(axis, horizontal=True)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.ticks:
        axis.set_xticks(panel.ticks, [f"{place:g}" for place in panel.ticks])


def _draw_line(axis: Axes, line: Line) -> None:
    x, y = ([float(point[k]) for point in line.points] for k in (0, 1))
    colour = COLOURS[line.style % len(COLOURS)]
    dash, marker = _DASHES[(line.style + 3 * (line.style // 6)) % len(_DASHES)], _MARKERS[line.style % len(_MARKERS)]
    marker = marker if len(x) <= _MARKED else ""
    axis.plot(x, y, color=colour, ls=dash, marker=marker, mfc=_PAPER, mec=colour, label=line.label)
    if line.ends and len(x) <= _BARS:
        below, above = ([abs(end[k] - value) for end, value in zip(line.ends, y, strict=True)] for k in (0, 1))
        axis.errorbar(x, y, [below, above], fmt="none", ecolor=colour, elinewidth=1, capsize=3)
    elif line.ends:
        low, high = zip(*line.ends, strict=True)
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)


def log_values(axis: Axes, horizontal: bool = False) -> None:
    """Gives an axis a logarithmic ordinate, or abscissa, with plain numbers that can be read in a narrow range too."""
    scale, limits, ticks = (
        (axis.set_xscale, axis.get_xlim, axis.xaxis) if horizontal else (axis.set_yscale, axis.get_ylim, axis.yaxis)
    )
    scale("log")
    low, high = sorted(limits())
    steep = (1.0, 2.0, 5.0) if high < (20 if horizontal else 200) * low else (1.0,)
    ticks.set_major_locator(LogLocator(subs=steep, numticks=6) if high > 8 * low else MaxNLocator(5))
    ticks.set_major_formatter(FuncFormatter(_short))
    ticks.set_minor_formatter(NullFormatter())


def _short(value: float, _place: int | None = None) -> str:
    """Writes a number as briefly as a tick needs.

    >>> _short(0.30000000000000004), _short(25000), _short(1e-5), _short(80.0)
    ('0.3', '25k', '1e-5', '80')
    """
    if 1e4 <= abs(value) < 1e7:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def grid(
    title: str, rows: int, columns: int, size: tuple[float, float] = (4.4, 3.2)
) -> tuple[Figure, list[list[Axes]]]:
    """Returns a figure of rows of axes, each of `size` in inches."""
    figure = Figure(figsize=(max(6.4, size[0] * columns), size[1] * rows + 0.7), layout="constrained")
    figure.suptitle(title)
    return figure, [list(line) for line in figure.subplots(rows, columns, squeeze=False)]


def add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Adds one legend of the axes' lines below them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    abreast = max(1, int(12 * figure.get_figwidth()) // (8 + max(map(len, handles), default=0)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=abreast)


@STYLE
def draw_panels(title: str, rows: Sequence[Sequence[Panel]]) -> Figure:
    """Returns a figure of rows of panels, at least one in each, with one legend."""
    figure, axes = grid(title, len(rows), max(map(len, rows)))
    for line, panels in zip(axes, rows, strict=True):
        for axis, panel in zip(line, panels, strict=False):
            draw(axis, panel)
            axis.set_title(panel.title)
        for axis in line[len(panels) :]:
            axis.axis("off")
    add_legend(figure, [axis for line in axes for axis in line])
    return figure


def in_rows(panels: Sequence[Panel]) -> list[Sequence[Panel]]:
    """Puts panels in rows of three, or of two where that fills them."""
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    return [panels[first : first + columns] for first in range(0, len(panels), columns)]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


@STYLE
def svg(panel: Panel, salt: str) -> Markup:
    """Returns what is inside of the SVG of a panel, WIDTH x HEIGHT; its colours are variables of the page.

    Args:
        panel: Its titles and labels are left to the page.
        salt: Differs from that of every other SVG in the page.
    """
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    draw(figure.add_axes((52 / WIDTH, 36 / HEIGHT, 1 - 66 / WIDTH, 1 - 44 / HEIGHT)), panel)
    return _inside(figure, salt)


@STYLE
def swatch(style: int | None, salt: str) -> Markup:
    """Returns what is inside of the SVG of a style in a legend, 36 x 12; None for a level."""
    figure = Figure(figsize=(36 / 72, 12 / 72))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set_xlim(0, 2)
    if style is None:
        axis.axhline(0, color=_QUIET, ls=":")
    else:
        _draw_line(axis, Line("", [(0, 0), (1, 0), (2, 0)], style=style))
        axis.lines[0].set_markevery([1])
    return _inside(figure, salt)


def _inside(figure: Figure, salt: str) -> Markup:
    """Returns a figure's SVG without its frame, its style sheet and names that nothing refers to."""
    stream = io.StringIO()
    facts: Mapping[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(stream, format="svg", transparent=True, metadata=facts)
    text = stream.getvalue()
    text = text[text.index("<g id=") : text.index("</svg>")]
    named = set(re.findall(r"#([a-z]\w+)", text))
    text = re.sub(r' id="([^"]+)"', lambda name: name.group() if name[1] in named else "", text)
    return Markup(re.sub("#[0-9a-f]{6}", lambda colour: _VARIABLES.get(colour.group(), colour.group()), text))


def steep(values: Sequence[float]) -> bool:
    """Whether values are positive and of more than one scale, so that a logarithmic axis shows them better."""
    return 0 < 5 * min(values) < max(values) < math.inf
