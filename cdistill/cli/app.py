"""The command line: every command in its place, and what becomes of an error. Commands import what is heavy."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from cdistill import __version__
from cdistill.cli.execution import set_arguments
from cdistill.errors import CdistillError, DiskFullError, StoppedError
from cdistill.registry import first_line
from cdistill.runtime import console
from cdistill.runtime import processes as launch
from cdistill.runtime.streams import output_error
from cdistill.storage.files import FULL

COMMANDS = {
    "Distil": {
        "estimate-coeffs": "estimate:estimate_coeffs",
        "compare": "evaluate:compare",
        "trajectories": "estimate:trajectories",
        "distill": "distill:distill",
        "plan": "distill:plan",
        "train-teacher": "distill:train_teacher",
    },
    "Draw and measure": {
        "sample": "sample:sample",
        "invert": "sample:invert",
        "evaluate": "evaluate:evaluate",
        "reference-stats": "evaluate:reference_stats",
    },
    "Show results": {
        "report": "report:report",
        "reproduce": "report:reproduce",
        "plot trajectories": "report:plot_trajectories",
        "plot curves": "report:plot_curves",
        "plot coefficients": "report:plot_coefficients",
    },
    "Look around": {
        "ls": "catalogue:list_names",
        "show": "catalogue:show_recipe",
        "cp": "catalogue:copy_recipe",
        "inspect": "catalogue:inspect",
        "convert": "catalogue:convert",
        "doctor": "catalogue:doctor",
    },
}  # panel of the help -> command -> module of this room and function


def build(wanted: str | None = None) -> typer.Typer:
    """Builds the command line.

    Args:
        wanted: The first word of the only command whose module is imported; the others have a first line of help and
            nothing else. None imports all.
    """
    settings: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": "rich"}
    app = typer.Typer(
        name="cdistill",
        help="Distil a diffusion model into a student that draws an image in one to ten network calls.\n\n"
        "Start with:  cdistill distill --recipe digits",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        callback=options,
        **settings,
    )
    plots = typer.Typer(**settings)
    for panel, commands in COMMANDS.items():
        for words, target in commands.items():
            first, _, second = words.partition(" ")
            place = plots if second else app
            function = _load(target) if wanted in (None, first) else _stub(target)
            place.command(second or first, rich_help_panel=None if second else panel)(function)
    app.add_typer(plots, name="plot", help="Draw the paper's figures.", rich_help_panel="Show results")
    return app


def _load(target: str) -> Callable[..., None]:
    module, function = target.split(":")
    command: Callable[..., None] = getattr(import_module(f"cdistill.cli.{module}"), function)
    return command


def _stub(target: str) -> Callable[..., None]:
    """Returns what stands in the list of commands for one that does not run."""

    def stub() -> None:
        pass

    stub.__doc__ = first_line(f"cdistill.cli.{target}")
    return stub


def _print_version(wanted: bool) -> None:
    if wanted:
        console.out.print(f"cdistill {__version__}", highlight=False)
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors and results only.")] = False,
) -> None:
    """Takes the options that stand in front of the command."""
    console.set_verbosity(-1 if quiet else 0)


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code; prints one line for every error that a person can fix."""
    set_arguments(arguments)
    wanted = next((argument for argument in arguments if not argument.startswith("-")), "")
    try:
        return _printed(guard(lambda: _run(wanted, list(arguments))))
    finally:
        launch.leave_group()


def _run(wanted: str, arguments: list[str]) -> int:
    launch.check_environment()
    return build(wanted)(arguments, standalone_mode=False) or 0


def _printed(code: int) -> int:
    """Returns the exit code, another one where the results could not be printed."""
    error = output_error()
    if error is None or code:
        return code
    console.fail(f"standard output: {error.strerror}; the results are in files only, as far as the command writes some")
    return DiskFullError.exit_code if error.errno in FULL else 2


def _explain_usage(error: TyperException) -> int:
    """Prints what is wrong with the options; nothing where no command was named, whose help is printed already."""
    if message := error.format_message():
        console.fail(message)
    return int(getattr(error, "exit_code", 2))


def _advice(error: OSError) -> str:
    """Returns what the system said about a file, and what to do."""
    if isinstance(error, IsADirectoryError):
        return "is a folder; a file is needed"
    if isinstance(error, PermissionError) and isinstance(error.filename, str) and os.path.exists(error.filename):
        return f"{error.strerror}; check its permissions"
    return f"{error.strerror}; choose another place, or make room"


def guard(command: Callable[[], int]) -> int:
    """Runs `command` and turns the errors that a person can fix into a message and an exit code."""
    try:
        return command()
    except CdistillError as error:
        console.fail(str(error))
        return error.exit_code
    except TyperException as error:
        return _explain_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        console.fail("interrupted")
        return 130
    except OSError as error:
        console.fail(f"{error.filename or 'writing'}: {_advice(error)}")
        return DiskFullError.exit_code if error.errno in FULL else 2
    except Exception as error:
        if launch.peer_gone(error):
            console.fail("another of the processes has died; what was saved is kept: run the same command to resume")
            return StoppedError.exit_code
        if launch.is_main_process():
            raise
        # The main process explains; the others die of its death, and their tracebacks would only hide that.
        sys.stderr.write(f"process {launch.rank()}: {type(error).__name__}: {str(error).splitlines()[0]}\n")
        return 1
