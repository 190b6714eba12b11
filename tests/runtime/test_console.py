"""What a person sees: names are never taken for markup, neither in a bar nor in plain lines nor in a table."""

import doctest
import io

import pytest
from rich.console import Console

from cdistill.runtime import console


@pytest.mark.parametrize("terminal", [True, False], ids=["bar", "plain lines"])
@pytest.mark.parametrize("name", ["[red]run[/red]", "[/]", "runs/[bold]", "a [link=x]"])
def test_progress_prints_names_as_they_are(monkeypatch, terminal, name):
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=terminal, width=200, color_system=None))
    with console.progress(2, name, "it") as advance:
        advance(1, "")
        advance(1, f"note {name}")
    assert f"{name} " in shown.getvalue()
    assert f"note {name}" in shown.getvalue()


def test_progress_counts_what_was_done_before_and_what_is_taken_back(capsys):
    with console.progress(10, "training", "it", done=4) as advance:
        advance(5, "")
        advance(-3, "")
        advance(4, "end")
    line = capsys.readouterr().err.strip()
    assert line.startswith("training 10/10 ")
    assert line.endswith("it/s 0s left end")


def test_tables_and_facts_print_names_as_they_are(capsys):
    console.table("[red]title", ["[red]", "[/]"], [["[bold]a", "1"]], caption="[/x]")
    console.facts("[/]", [["[red]", "[blue]"]])
    text = capsys.readouterr().out
    for name in ("[red]title", "[/]", "[bold]a", "[/x]", "[blue]"):
        assert name in text


def test_json_alone_leaves_tables_to_stderr(capsys):
    with console.json_only(True):
        console.table("title", ["name"], [["a"]])
    console.facts("after", [["b", "c"]])
    told = capsys.readouterr()
    assert "title" in told.err
    assert "title" not in told.out
    assert "after" in told.out


def test_doctests():
    assert doctest.testmod(console).failed == 0
