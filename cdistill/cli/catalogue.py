"""The commands about what there is to choose, and about this installation."""

from pathlib import Path
from typing import Annotated

import typer

from cdistill.cli.execution import finish
from cdistill.cli.options import JsonOption
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


def doctor() -> None:
    """Check this installation: versions, processors, threads, disk, weights that are present.

    Example:  cdistill doctor
    """
    from cdistill.workflows.doctor import doctor as run_doctor

    console.facts("cdistill doctor", run_doctor())
