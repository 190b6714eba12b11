"""What a person sees: progress on stderr, tables on stdout; plain lines where there is no terminal."""

import html
import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from rich import table as rich_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from cdistill.errors import printable
from cdistill.runtime.processes import is_main_process

out = Console(width=None if sys.stdout.isatty() else 140, emoji=False)
err = Console(stderr=True, emoji=False)
_verbosity = 0
_PLAIN_EVERY = 10.0  # seconds between plain progress lines
_LONGEST = 10_000  # characters of a line of an error
_tables = out

Advance = Callable[[int, str], None]
"""advance(count, note): `count` more are done, or fewer if negative; `note` is shown beside the bar."""


def set_verbosity(level: int) -> None:
    """Sets what is printed: -1 for errors and results only, 0 for everything."""
    global _verbosity
    _verbosity = level


def say(message: str) -> None:
    """Prints a line on stderr from the main process, unless `set_verbosity` asked for quiet."""
    if is_main_process() and _verbosity >= 0:
        err.print(message, highlight=False, soft_wrap=True, markup=False)


@cache
def say_once(message: str) -> None:
    """Prints a line on stderr as `say` does, but only the first time."""
    say(message)


def fail(message: str) -> None:
    """Prints an error on stderr, from the main process."""
    if is_main_process():
        lines = "\n".join(printable(line, _LONGEST) for line in message.split("\n"))  # names of files and headers too
        err.print(f"error: {lines}", style="red", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def progress(total: int, title: str, unit: str, done: int = 0) -> Iterator[Advance]:
    """Shows a bar with rate and time left, or plain lines when stderr is no terminal.

    `done` of the `total` were done before; `unit` is what is counted.
    """
    if not is_main_process() or _verbosity < 0:
        yield lambda count, note: None
    elif err.is_terminal:
        yield from _bar(total, title, unit, done)
    else:
        yield from _lines(total, title, unit, done)


def _bar(total: int, title: str, unit: str, done: int) -> Iterator[Advance]:
    title_column, rate_column, note_column = (
        TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[rate]", "fields[note]")
    )
    columns = [title_column, BarColumn(), MofNCompleteColumn(), rate_column, TimeRemainingColumn(), note_column]
    start = time.monotonic()
    counted = 0
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="", note="")

        def advance(count: int, note: str) -> None:
            nonlocal counted
            counted += count
            rate = f"{max(counted, 0) / (time.monotonic() - start + 1e-9):.3g} {unit}/s"
            bar.update(task, advance=count, rate=rate, note=note)

        yield advance


def _lines(total: int, title: str, unit: str, done: int) -> Iterator[Advance]:
    start = shown = time.monotonic()
    counted = 0

    def advance(count: int, note: str) -> None:
        nonlocal counted, shown
        counted += count
        now = time.monotonic()
        if now - shown >= _PLAIN_EVERY or done + counted == total:
            shown = now
            rate = max(counted, 1) / (now - start + 1e-9)
            left = (total - done - counted) / rate
            line = f"{title} {done + counted}/{total} {rate:.3g} {unit}/s {left:.0f}s left {note}"
            err.print(line, highlight=False, soft_wrap=True, markup=False)

    yield advance


class Table(NamedTuple):
    """Results as text, a row for each line, to be printed or shown in a notebook; `caption` stands below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str | None = None

    def __str__(self) -> str:
        console = Console(width=200, file=io.StringIO(), emoji=False)
        console.print(_draw(self))
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        def cells(tag: str, texts: Sequence[str]) -> str:
            return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)

        rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        head = f"<caption>{html.escape(self.title)}</caption><tr>{cells('th', self.columns)}</tr>"
        return f"<table>{head}{rows}</table>{html.escape(self.caption or '')}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    """Prints a table on stdout, from the main process; the first column is aligned left, the others right."""
    if is_main_process():
        _tables.print(_draw(Table(title, columns, rows, caption)))


def _draw(content: Table) -> rich_table.Table:
    below = None if content.caption is None else Text(content.caption)
    style = {"title_justify": "left", "title_style": "bold", "caption_justify": "left"}
    drawn = rich_table.Table(title=Text(content.title), caption=below, **style)  # type: ignore[arg-type]
    for index, column in enumerate(content.columns):
        drawn.add_column(Text(column), justify="right" if index else "left")
    for row in content.rows:
        drawn.add_row(*map(Text, row))
    return drawn


@contextmanager
def rescuing(*results: Table) -> Iterator[None]:
    """Shows results on stderr if their writing fails: nothing that was computed is lost without a word."""
    try:
        yield
    except Exception:
        for result in results:
            say(str(result))
        raise


def facts(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints names and what they are on stdout, from the main process, both aligned left."""
    if not is_main_process():
        return
    drawn = rich_table.Table(title=Text(title), title_justify="left", title_style="bold", show_header=False)
    for row in rows:
        drawn.add_row(*map(Text, row))
    _tables.print(drawn)


@contextmanager
def json_only(active: bool) -> Iterator[None]:
    """Sends tables to stderr while `active`, so that stdout holds JSON alone."""
    global _tables
    _tables = err if active else out
    try:
        yield
    finally:
        _tables = out


def compact(value: float, error: float) -> str:
    """Writes a value with its standard error in units of its last digit.

    >>> compact(0.03124, 0.00042), compact(-52.31, 2.4), compact(0.5, 0.0), compact(0.99999, 2e-9), compact(0, 0.1)
    ('0.0312(4)', '-52(2)', '0.5', '0.9999900', '0.0(1)')
    """
    if not math.isfinite(value):
        return "-"
    if not 0 < error < math.inf or not abs(value) < 1e5:
        return f"{value:.3g}"
    digits = max(0, -math.floor(math.log10(error)))
    return f"{value:.{digits}f}({round(error * 10**digits)})" if digits < 8 else f"{value:.7f}"
