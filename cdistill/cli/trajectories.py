"""The command that follows trajectories of a teacher, and removes them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cdistill.cli.execution import finish, start
from cdistill.cli.options import (
    JsonOption,
    ProcessesOption,
    SetOption,
    WeightsOption,
    refuse,
    refuse_others,
    section_options,
)
from cdistill.errors import RecipeError
from cdistill.runtime import console
from cdistill.sampling.settings import TrajectoriesSection

POINTS = 18


@section_options("typed", TrajectoriesSection, "count", "substeps", "precision", "levels", overrides=True)
def trajectories(
    *,
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="Those that a recipe reads.")] = None,
    override: SetOption = [],  # noqa: B006
    teacher: Annotated[str | None, typer.Option(help="In place of a recipe: a teacher's name or its file.")] = None,
    weights: WeightsOption = None,
    points: Annotated[int, typer.Option(min=2, help="With --teacher: N, noise levels of the rho-grid.")] = POINTS,
    typed: dict[str, Any],
    listed: Annotated[bool, typer.Option("--list", help="Show what is kept, and stop.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove what is kept, of --teacher or of all.")] = False,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Follow trajectories of a teacher and keep them for objectives that read them; distill does it by itself.

    Example:  cdistill trajectories --teacher digits --points 10 --count 4096
    """
    if listed or prune:
        refuse_others(context, "--list and --prune follow nothing; leave it out", "listed", "prune", "teacher")
        return _show_kept(teacher, prune, as_json)
    if (recipe is None) == (teacher is None):
        raise RecipeError("trajectories: needs --recipe or --teacher, one of them")
    if recipe is not None:
        refuse(context, "is the recipe's; use --set", "points", "weights")
    start(processes)
    with console.json_only(as_json):
        record = _follow(recipe, override, teacher, weights, points, typed)
    return finish(as_json, record, f"{record['trajectories']:,} trajectories in {record['folder']}")


def _follow(
    recipe: Path | None,
    override: list[str],
    teacher: str | None,
    weights: Path | None,
    points: int,
    typed: dict[str, Any],
) -> dict[str, Any]:
    """Follows the trajectories of a recipe or of a teacher; returns the record."""
    from cdistill.recipe.files import load_recipe
    from cdistill.recipe.schema import DistillRecipe
    from cdistill.workflows.trajectories import follow_for_recipe, follow_trajectories, summary

    if recipe is not None:
        return summary(follow_for_recipe(load_recipe(recipe, DistillRecipe, override), typed))
    assert teacher is not None
    return summary(follow_trajectories(teacher, points, weights=weights, **typed))


def _show_kept(teacher: str | None, remove: bool, as_json: bool) -> None:
    """Prints what is kept, or removes it."""
    from cdistill.workflows.trajectories import kept_table, prune

    if remove:
        gone = prune(teacher)
        return finish(as_json, gone, f"removed {len(gone['removed'])} stores, {gone['bytes'] / 2**20:,.1f} MiB")
    kept = kept_table()
    if as_json:
        return finish(True, {"kept": [dict(zip(kept.columns, row, strict=True)) for row in kept.rows]}, "")
    return console.table(*kept)
