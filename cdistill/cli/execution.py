"""How a command runs: its processes and threads, and the printing of its result."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer

from cdistill.runtime import console
from cdistill.runtime import processes as launch

_arguments: list[str] = []  # of this run, for the processes that it starts


def start_processes(processes: int) -> None:
    """Runs this command in several processes in place of this one, if more than one are asked for."""
    if processes > 1:
        raise typer.Exit(launch.launch(processes, without_nproc(_arguments)))


def start() -> None:
    """Prepares a command that computes: threads, and signals that are answered where it can save."""
    from cdistill.runtime import signals

    signals.install_handlers()
    launch.keep_memory()
    launch.set_threads()


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
    if not launch.is_main_process():
        return
    if as_json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
    elif text:
        console.out.print(text, highlight=False, markup=False, soft_wrap=True)


def set_arguments(arguments: Sequence[str]) -> None:
    """Keeps the command line of this run, for the processes that it starts."""
    _arguments[:] = arguments
