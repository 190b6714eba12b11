"""The commands that prepare a distillation: the coefficients of a teacher, and trajectories of it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cdistill.cli.execution import finish, start
from cdistill.cli.options import (
    DataOption,
    JsonOption,
    ProcessesOption,
    SetOption,
    TeacherOption,
    WeightsOption,
    refuse,
    refuse_others,
    section_options,
    with_suffix,
)
from cdistill.errors import RecipeError
from cdistill.estimation.settings import EstimationSection
from cdistill.runtime import console
from cdistill.runtime.processes import is_main_process
from cdistill.sampling.settings import TrajectoriesSection


@section_options("section", EstimationSection)
def estimate_coeffs(
    *,
    context: typer.Context,
    teacher: TeacherOption,
    weights: WeightsOption = None,
    data: DataOption = None,
    section: EstimationSection,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run every estimator on the same samples and print how far they differ.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File; coefficients-TEACHER.safetensors by default.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG; beside the file by default.")] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Estimate l and s of a teacher, the coefficients of the analytic preconditioning, with their standard errors.

    Example:  cdistill estimate-coeffs --teacher digits --target-error 0.01
    """
    from cdistill.teachers.official import find_weights

    if compare:
        reason = "--compare runs every estimator, in fp32, on all of the same samples; leave it out"
        refuse(context, reason, "estimator", "target_error", "precision")
    file = with_suffix(out or Path(f"coefficients-{Path(teacher).stem}.safetensors"), ".safetensors")
    picture = with_suffix(plot or file.with_suffix(".png"), ".png")
    find_weights(teacher, weights)
    start(processes)
    command = _compare if compare else _estimate
    with console.json_only(as_json):
        record = command(teacher, weights, data, section, file, picture)
    finish(as_json, record, "   ".join(f"{key}: {record[key]}" for key in ("file", "files", "plot") if key in record))


def _estimate(
    teacher: str, weights: Path | None, data: str | None, section: EstimationSection, file: Path, picture: Path
) -> dict[str, Any]:
    from cdistill.workflows.estimate import draw_coefficients, estimate_coefficients

    estimate = estimate_coefficients(teacher, data, section, weights=weights, out=file)
    console.table(*estimate.table())
    for note in filter(None, (estimate.samples_note(), estimate.fit_note())):
        console.say(note)
    if is_main_process():
        draw_coefficients(picture, estimate)
    return {"file": str(file), "plot": str(picture), **estimate.to_dict()}


def _compare(
    teacher: str, weights: Path | None, data: str | None, section: EstimationSection, file: Path, picture: Path
) -> dict[str, Any]:
    from cdistill.workflows.estimate import compare_estimators, draw_comparison, file_of

    comparison = compare_estimators(teacher, data, section, weights=weights, out=file)
    console.table(*comparison.table())
    if is_main_process():
        draw_comparison(picture, comparison)
    files = " ".join(str(file_of(file, name)) for name in comparison.estimates)
    return {"files": files, "plot": str(picture), **comparison.to_dict()}


@section_options("typed", TrajectoriesSection, "count", "substeps", "precision", "levels", overrides=True)
def trajectories(
    *,
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="Those that a recipe reads.")] = None,
    override: SetOption = [],  # noqa: B006
    teacher: Annotated[str | None, typer.Option(help="In place of a recipe: a teacher's name or its file.")] = None,
    weights: WeightsOption = None,
    points: Annotated[int, typer.Option(min=2, max=4096, help="With --teacher: N, noise levels of the rho-grid.")] = 18,
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
