"""The commands that train, and the one that counts what a training costs."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cdistill.cli.evaluate import show
from cdistill.cli.execution import finish, start
from cdistill.cli.options import (
    AcceptDataOption,
    JsonOption,
    MicroBatchOption,
    ProcessesOption,
    RecipeOption,
    ResumeOption,
    SetOption,
    TflopsOption,
    WeightsOption,
    refuse,
)
from cdistill.errors import RecipeError
from cdistill.runtime import console
from cdistill.storage.run_folder import RUNS, RunFolder

TFLOPS = 42.0  # what an A800 of the paper sustained on CIFAR-10, by its hours and our count

OutOption = Annotated[Path | None, typer.Option(help="Run folder; runs/RECIPE by default.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and its cost, and stop.")]


def distill(
    *,
    context: typer.Context,
    recipe: RecipeOption,
    override: SetOption = [],  # noqa: B006
    weights: WeightsOption = None,
    out: OutOption = None,
    resume: ResumeOption = "auto",
    accept_data: AcceptDataOption = False,
    dry_run: DryRunOption = False,
    micro_batch: MicroBatchOption = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Distil a teacher into a student; ends in a table of results and a picture of samples.

    Example:  cdistill distill --recipe digits --set preconditioning.name=ctm --out runs/ctm
    """
    from cdistill.recipe.files import load_recipe
    from cdistill.recipe.schema import DistillRecipe
    from cdistill.teachers.official import find_weights

    named = [] if weights is None else [f"weights={json.dumps(str(weights))}"]
    chosen = load_recipe(recipe, DistillRecipe, [*override, *named])
    if dry_run:
        refuse(context, "--dry-run trains nothing; leave it out", "out", "resume", "accept_data", "micro_batch")
        return _print_cost(chosen, processes, as_json)
    find_weights(chosen.teacher, chosen.weights_path)
    start(processes)
    from cdistill.workflows.distill import distill as run_distill

    with console.json_only(as_json):
        folder = _run_folder(recipe, out, resume)
        mode: Literal["auto", "never"] = "never" if resume == "never" else "auto"
        run = run_distill(chosen, out=folder, resume=mode, micro_batch=micro_batch, accept_data=accept_data)
        show(run.evaluation)
    return finish(as_json, RunFolder(folder).results(), "")


def train_teacher(
    *,
    context: typer.Context,
    recipe: RecipeOption,
    override: SetOption = [],  # noqa: B006
    out: OutOption = None,
    resume: ResumeOption = "auto",
    accept_data: AcceptDataOption = False,
    dry_run: DryRunOption = False,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Train a teacher from scratch, as the embedded ones were.

    Example:  cdistill train-teacher --recipe teacher-digits
    """
    from cdistill.recipe.files import load_recipe
    from cdistill.recipe.schema import TeacherRecipe

    chosen = load_recipe(recipe, TeacherRecipe, override)
    if dry_run:
        refuse(context, "--dry-run trains nothing; leave it out", "out", "resume", "accept_data")
        return _print_cost(chosen, processes, as_json)
    start(processes)
    from cdistill.workflows.distill import train_teacher as run_train

    with console.json_only(as_json):
        path = run_train(chosen, _run_folder(recipe, out, resume), resume, accept_data)
    return finish(as_json, {"teacher": str(path)}, f"teacher: {path}; use it with --teacher {path}")


def plan(
    *,
    recipe: RecipeOption,
    override: SetOption = [],  # noqa: B006
    devices: Annotated[int, typer.Option(min=1, max=10**6, help="Devices that share the batch.")] = 1,
    tflops: TflopsOption = TFLOPS,
    as_json: JsonOption = False,
) -> None:
    """Count what a recipe will cost before anything runs: forwards, FLOPs, memory, hours.

    Example:  cdistill plan --recipe cifar10 --devices 4
    """
    from cdistill.recipe.files import load_any_recipe

    chosen = load_any_recipe(recipe, override)
    start()
    _print_cost(chosen, devices, as_json, tflops, with_recipe=False)


def _print_cost(recipe: Any, devices: int, as_json: bool, tflops: float = TFLOPS, with_recipe: bool = True) -> None:
    from cdistill.recipe.files import to_toml
    from cdistill.workflows.plan import as_record, plan, print_plan

    cost = plan(recipe, devices)
    if as_json:
        record = as_record(cost, devices, tflops)
        return finish(True, {**recipe.model_dump(), "plan": record} if with_recipe else record, "")
    if with_recipe:
        console.out.print(to_toml(recipe), highlight=False, markup=False, soft_wrap=True)
    return print_plan(cost, devices, tflops)


def _run_folder(recipe: Path, out: Path | None, resume: str) -> Path:
    """Returns the folder of a run: `out`, the one to resume, or runs/NAME-OF-RECIPE.

    Raises:
        RecipeError: `resume` is neither auto, never nor a run folder.
    """
    if resume in ("auto", "never"):
        return out or RUNS / recipe.stem
    if out is not None:
        raise RecipeError("--out: goes with --resume auto or never; --resume PATH names the folder itself")
    if not RunFolder(Path(resume)).recipe.is_file():
        raise RecipeError(f"--resume: got {resume!r}; needs auto, never or the folder of a run")
    return Path(resume)
