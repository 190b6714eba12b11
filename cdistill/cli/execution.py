"""How a command runs: its processes and threads, and the printing of its result."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer

from cdistill.runtime import console, processes, signals

_arguments: list[str] = []  # of this command line, for the processes that it starts


def set_arguments(arguments: Sequence[str]) -> None:
    """Keeps the command line, for the processes that it starts."""
    _arguments[:] = arguments


def start(count: int = 1) -> None:
    """Prepares a command that computes: processes, threads, and signals that are answered where it can save.

    With several processes, the command runs in them instead of this one, which ends with their exit code.
    """
    if count > 1:
        raise typer.Exit(processes.launch(count, without_nproc(_arguments)))
    signals.install_handlers()
    processes.keep_memory()
    processes.set_threads()


def without_nproc(arguments: Sequence[str]) -> list[str]:
    """Returns the command line with ``--nproc N`` left out."""
    kept = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--nproc" and not argument.startswith("--nproc="):
            kept.append(argument)
        skip = argument == "--nproc"
    return kept


def finish(as_json: bool, record: Any, text: str) -> None:
    """Prints the result: JSON alone, or a line of text."""
    if not processes.is_main_process():
        return
    if as_json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
    elif text:
        console.out.print(text, highlight=False, markup=False, soft_wrap=True)
