"""The commands about what there is: names, recipes, files of ours and of others, this installation."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cdistill.cli.execution import finish, start
from cdistill.cli.options import JsonOption, with_suffix
from cdistill.errors import RecipeError, suggest
from cdistill.registry import REGISTRIES
from cdistill.runtime import console


def list_names(
    kind: Annotated[str, typer.Argument(help=f"recipes, {', '.join(REGISTRIES)}; all of them by default.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List what can be chosen, and what it is.

    Example:  cdistill ls teachers
    """
    kinds = ["recipes", *REGISTRIES]
    if kind and kind not in kinds:
        raise RecipeError(f"ls: unknown {kind!r}; {suggest(kind, kinds)}")
    entries = {name: _entries(name) for name in ([kind] if kind else kinds)}
    if as_json:
        return finish(True, {name: list(lines) for name, lines in entries.items()}, "")
    for name, lines in entries.items():
        about = REGISTRIES[name].about if name in REGISTRIES else "TOML files for cdistill distill and train-teacher."
        width = max(map(len, lines), default=0)
        text = "\n".join(f"  {entry:{width}}  {line}" for entry, line in lines.items())
        finish(False, None, f"{name}: {about}\n{text}" + ("" if kind else "\n"))
    return None


def _entries(kind: str) -> dict[str, str]:
    """Returns the names of a kind, each with a line that says what it is."""
    from cdistill.recipe.files import shipped_recipes

    if kind != "recipes":
        return {name: REGISTRIES[kind].summary(name) for name in REGISTRIES[kind].names()}
    return {
        name: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for name, path in shipped_recipes().items()
    }


def show_recipe(recipe: Annotated[Path, typer.Argument(help="A recipe's file or name.")]) -> None:
    """Print a recipe with its comments.

    Example:  cdistill show digits
    """
    from cdistill.recipe.files import find_recipe

    console.out.print(find_recipe(recipe).read_text(), end="", highlight=False, markup=False, soft_wrap=True)


def copy_recipe(
    recipe: Annotated[Path, typer.Argument(help="A shipped recipe's name.")],
    target: Annotated[Path, typer.Argument(help="Where to.")],
) -> None:
    """Copy a shipped recipe, to change it.

    Example:  cdistill cp digits mine.toml
    """
    from cdistill.recipe.files import find_recipe

    text = find_recipe(recipe).read_text()
    if target.exists():
        raise RecipeError(f"{target}: exists already; choose another name")
    target.write_text(text)


def convert(
    file: Annotated[Path, typer.Argument(help="A .pkl or .pt of EDM, or a checkpoint of CTM or OpenAI.")],
    out: Annotated[Path | None, typer.Option(help="File; the same name with .safetensors by default.")] = None,
    flavour: Annotated[
        str | None, typer.Option("--as", help="Of OpenAI's ImageNet-64 files, which look alike: edm, cd or ct.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn someone else's weights into safetensors, without executing anything that is in the file.

    Example:  cdistill convert edm-cifar10-32x32-uncond-vp.pkl
    """
    if flavour not in (None, "edm", "cd", "ct"):
        raise RecipeError(f"--as: got {flavour!r}; needs edm, cd or ct")
    target = with_suffix(out or file.with_suffix(".safetensors"), ".safetensors")
    start()
    from cdistill.workflows.convert import convert as run_convert

    with console.json_only(as_json):
        record = run_convert(file, flavour, target)
        _print_conversion(file, record)
    finish(as_json, record, "")


def _print_conversion(file: Path, record: dict[str, Any]) -> None:
    classes = f"{record['num_classes']} classes" if record["num_classes"] else "unconditional"
    rows = [
        ["what", f"{record['what']} ({record['kind']})"],
        ["images", f"{' x '.join(map(str, record['shape']))}, {classes}"],
        ["parameters", f"{record['parameters']:,}"],
        ["licence", record["licence"]],
        ["sha256 of the file", record["source"]["file_sha256"]],
        ["written", record["file"]],
    ]
    console.facts(file.name, rows)
    if record["source"].get("entry") == "net":
        console.say(
            "a training state without the average 'ema': these weights are those of the last step, not averaged"
        )
    use = "sample --run" if record["kind"] == "student" else "estimate-coeffs --teacher"
    console.say(f"use it: cdistill {use} {record['file']}")


def inspect(
    file: Annotated[Path, typer.Argument(help="A file that cdistill made, the folder of a checkpoint or of a run.")],
    full: Annotated[bool, typer.Option("--full", help="Every tensor and noise level, and the whole recipe.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a file is and where it comes from, and verify its checksum.

    Example:  cdistill inspect coefficients-digits.safetensors
    """
    from cdistill.reporting.inspect_view import print_record
    from cdistill.workflows.inspection import inspect as run_inspect
    from cdistill.workflows.inspection import to_json

    record = run_inspect(file)
    if as_json:
        finish(as_json, to_json(record), "")
    else:
        print_record(record, full)


def doctor() -> None:
    """Check this installation: versions, processors, threads, disk, weights that are present.

    Example:  cdistill doctor
    """
    from cdistill.workflows.doctor import doctor as run_doctor

    console.facts("cdistill doctor", run_doctor())
