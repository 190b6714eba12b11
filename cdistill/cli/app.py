"""The command line: every command in its place, and what becomes of an error; commands import what is heavy."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from cdistill import __version__
from cdistill.cli import catalogue, distill, estimate, evaluate, files, report, sample
from cdistill.cli.execution import set_arguments
from cdistill.errors import CdistillError, DiskFullError
from cdistill.runtime import console
from cdistill.runtime import processes as launch
from cdistill.storage.files import FULL

app = typer.Typer(
    name="cdistill",
    help="Distil a diffusion model into a student that draws an image in one to ten network calls.\n\n"
    "Start with:  cdistill distill --recipe digits",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
plot_app = typer.Typer(help="Draw the paper's figures.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(plot_app, name="plot")
COMMANDS: dict[str, Callable[..., None]] = {
    "estimate-coeffs": estimate.estimate_coeffs,
    "distill": distill.distill,
    "plan": distill.plan,
    "train-teacher": distill.train_teacher,
    "convert": files.convert,
    "inspect": files.inspect,
    "sample": sample.sample,
    "invert": sample.invert,
    "evaluate": evaluate.evaluate,
    "reference-stats": evaluate.reference_stats,
    "compare": evaluate.compare,
    "report": report.report,
    "reproduce": report.reproduce,
    "ls": catalogue.list_names,
    "show": catalogue.show_recipe,
    "cp": catalogue.copy_recipe,
    "doctor": catalogue.doctor,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
plot_app.command("trajectories")(report.plot_trajectories)
plot_app.command("curves")(report.plot_curves)
plot_app.command("coefficients")(report.plot_coefficients)


def print_version(wanted: bool) -> None:
    """Prints the version and stops, if it is wanted."""
    if wanted:
        console.out.print(f"cdistill {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors and results only.")] = False,
) -> None:
    """Takes the options that stand in front of the command."""
    console.set_verbosity(-1 if quiet else 0)


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code; prints one line for every error that a person can mend."""
    set_arguments(arguments)
    try:
        return guard(lambda: app(list(arguments), standalone_mode=False) or 0)
    finally:
        launch.leave_group()


def _advice(error: OSError) -> str:
    """Returns what the system said about a file, and what to do."""
    if isinstance(error, IsADirectoryError):
        return "is a folder; a file is needed"
    if isinstance(error, PermissionError) and isinstance(error.filename, str) and os.path.exists(error.filename):
        return f"{error.strerror}; check its permissions"
    return f"{error.strerror}; choose another place, or make room"


def guard(command: Callable[[], int]) -> int:
    """Runs `command` and turns the errors that a person can mend into a message and an exit code."""
    try:
        return command()
    except CdistillError as error:
        console.fail(str(error))
        return error.exit_code
    except TyperException as error:
        error.show()  # type: ignore[attr-defined]
        return int(getattr(error, "exit_code", 2))
    except (KeyboardInterrupt, typer.Abort):
        console.fail("interrupted")
        return 130
    except BrokenPipeError:
        sys.stdout = None  # the reader, `head` say, has gone: nothing is left to flush
        return 0
    except OSError as error:
        console.fail(f"{error.filename or 'writing'}: {_advice(error)}")
        return DiskFullError.exit_code if error.errno in FULL else 2
    except Exception as error:
        if launch.is_main_process():
            raise
        # The main process explains; another one dies of its death, say, and its traceback would only hide that.
        sys.stderr.write(f"process {launch.rank()}: {type(error).__name__}: {str(error).splitlines()[0]}\n")
        return 1
