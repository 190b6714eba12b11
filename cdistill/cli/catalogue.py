"""The commands about what there is to choose, and about this installation."""

from pathlib import Path
from typing import Annotated

import typer

from cdistill.cli.execution import finish
from cdistill.cli.options import JsonOption
from cdistill.errors import RecipeError
from cdistill.registry import (
    DISCRIMINATORS,
    DISTANCES,
    ESTIMATORS,
    FEATURES,
    METRICS,
    PRECONDITIONINGS,
    SAMPLERS,
    SOURCES,
    TEACHERS,
    WRITERS,
)
from cdistill.runtime import console


def list_names(
    kind: Annotated[
        str,
        typer.Argument(
            help="teachers, recipes, preconditionings, estimators, data, distances, discriminators, samplers, metrics, "
            "features or formats."
        ),
    ] = "recipes",
    as_json: JsonOption = False,
) -> None:
    """List what can be chosen."""
    from cdistill.recipe.files import shipped_recipes

    registries = {
        "teachers": TEACHERS, "preconditionings": PRECONDITIONINGS, "estimators": ESTIMATORS, "data": SOURCES,
        "distances": DISTANCES, "discriminators": DISCRIMINATORS, "samplers": SAMPLERS, "metrics": METRICS,
        "features": FEATURES, "formats": WRITERS,
    }  # fmt: skip
    if kind not in {*registries, "recipes"}:
        raise RecipeError(f"ls: unknown {kind!r}; known: {', '.join([*registries, 'recipes'])}")
    names = list(shipped_recipes()) if kind == "recipes" else registries[kind].names()
    finish(as_json, {kind: names}, "\n".join(names))


def show_recipe(recipe: Annotated[Path, typer.Argument(help="A recipe's file or name.")]) -> None:
    """Print a recipe with its comments."""
    from cdistill.recipe.files import find_recipe

    console.out.print(find_recipe(recipe).read_text(), end="", highlight=False, markup=False, soft_wrap=True)


def copy_recipe(
    recipe: Annotated[Path, typer.Argument(help="A shipped recipe's name.")],
    target: Annotated[Path, typer.Argument(help="Where to.")],
) -> None:
    """Copy a shipped recipe, to change it."""
    from cdistill.recipe.files import find_recipe

    text = find_recipe(recipe).read_text()
    if target.exists():
        raise RecipeError(f"{target}: exists already; choose another name")
    target.write_text(text)


def doctor() -> None:
    """Check this installation: versions, processors, threads, disk, weights that are present."""
    from cdistill.workflows.doctor import doctor as run_doctor

    console.facts("cdistill doctor", run_doctor())
