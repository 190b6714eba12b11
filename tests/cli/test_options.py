"""Options agree with the sections of a recipe, and every command explains itself."""

import ast
from pathlib import Path

import pytest
import typer

from cdistill.cli import app as command_line
from cdistill.cli.app import build, run
from cdistill.cli.options import limits, section_options
from cdistill.errors import RecipeError
from cdistill.estimation.settings import EstimationSection
from cdistill.evaluation.settings import EvaluationSection

ROOM = Path(command_line.__file__).parent
SECTIONS = {
    "estimate-coeffs": EstimationSection,
    "compare": EstimationSection,
    "plot trajectories": EstimationSection,
    "evaluate": EvaluationSection,
    "reference-stats": EvaluationSection,
}
OWN = {("compare", "nfe"), ("plot trajectories", "nfe")}  # of the untrained students, not of an evaluation


def commands():
    """Name -> command, with all of its parameters."""
    root = typer.main.get_command(build())
    flat = {name: command for name, command in root.commands.items() if name != "plot"}
    return flat | {f"plot {name}": command for name, command in root.commands["plot"].commands.items()}


COMMANDS = commands()


def test_an_option_that_repeats_a_field_has_its_default_limits_and_help():
    checked = set()
    for name, section in SECTIONS.items():
        for parameter in COMMANDS[name].params:
            if parameter.name not in section.model_fields or (name, parameter.name) in OWN:
                continue
            field = section.model_fields[parameter.name]
            assert field.description
            assert parameter.help.startswith(field.description), (name, parameter.name)
            assert limits(field) in parameter.help
            default = ",".join(map(str, field.default)) if isinstance(field.default, list) else field.default
            shown = parameter.show_default if name == "evaluate" else parameter.default
            assert shown == (default or None) or str(default) in str(shown) or shown == "the run's recipe"
            checked.add((name, parameter.name))
    assert {("estimate-coeffs", "samples"), ("compare", "samples"), ("evaluate", "samples")} < checked
    assert {(name, key) for name in ("estimate-coeffs",) for key in EstimationSection.model_fields} <= checked
    assert len(checked) >= 20


def test_every_option_has_help_and_every_command_an_example():
    silent = [
        f"{name} {parameter.name}"
        for name, command in COMMANDS.items()
        for parameter in command.params
        if parameter.name != "help" and not getattr(parameter, "help", None)
    ]
    assert silent == []
    assert [name for name, command in COMMANDS.items() if "cdistill " not in (command.help or "")] == []


def test_the_list_of_commands_has_the_first_line_of_each(capsys):
    """It is read without importing the commands."""
    assert run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, command in COMMANDS.items():
        if not name.startswith("plot "):
            assert " ".join(command.help.partition("\n")[0].split()) in text, name


def test_the_decorator_checks_what_is_typed():
    received = []

    @section_options("changes", EvaluationSection, "nfe", "samples", "metrics", overrides=True)
    def command(*, changes):
        received.append(changes)

    command(nfe="1-3", samples=None, metrics="fid,kid,fid")
    assert received == [{"nfe": [1, 2, 3], "metrics": ["fid", "kid"]}]
    with pytest.raises(RecipeError, match=r"--samples: got 1; .*\n--metrics: unknown metric 'fd'"):
        command(nfe=None, samples=1, metrics="fd")


def test_no_command_is_longer_than_25_lines():
    long = []
    for path in ROOM.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                long += [f"{path.name}: {node.name}: {lines}"] * (lines > 25)
    assert long == []
