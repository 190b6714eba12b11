"""The life of a run folder: opened, locked, checked against the recipe, its environment and status recorded."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from cdistill.analysis.cost import trained_jumps
from cdistill.errors import CdistillError, CorruptFileError, DiskFullError, RecipeError, StoppedError, brief
from cdistill.objectives.base import make_objective
from cdistill.recipe.files import differences, load_recipe, to_toml
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe
from cdistill.runtime.console import say
from cdistill.runtime.processes import let_main, peer_gone, versions
from cdistill.storage.bounded import read_json
from cdistill.storage.files import list_checkpoints, write_text
from cdistill.storage.own_words import write_own
from cdistill.storage.run_folder import RunFolder
from cdistill.training.acceleration import choose_acceleration
from cdistill.training.loop import effective_precision


@contextmanager
def opened_run(
    folder: RunFolder, recipe: DistillRecipe | TeacherRecipe, resume: str, accelerator: Accelerator
) -> Iterator[None]:
    """Locks a run folder for the main process, writes or compares its recipe, and records how the work ends.

    Raises:
        RunLockedError: Another process holds it.
        RecipeError: It holds a run of another recipe, any run and `resume` is "never", or something that is no run.
        CorruptFileError: It holds checkpoints without a recipe.
    """
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(folder.locked())
            check_run(folder, recipe, resume)

        let_main(enter, folder.path, accelerator)
        if accelerator.is_main_process:
            write_own(folder.recipe, to_toml(recipe))
            _write_environment(folder, recipe, accelerator)
            kind = "teacher" if isinstance(recipe, TeacherRecipe) else "distill"
            folder.write_status(state="preparing", kind=kind, error=None, note=None, exit_code=None)
        accelerator.wait_for_everyone()
        try:
            yield
        except CdistillError as error:
            if accelerator.is_main_process and not isinstance(error, DiskFullError):
                state = "stopped" if isinstance(error, StoppedError) else "failed"
                folder.write_status(state=state, exit_code=error.exit_code, error=str(error))
            raise
        except Exception as error:
            if accelerator.is_main_process:
                state, code = ("stopped", StoppedError.exit_code) if peer_gone(error) else ("failed", 1)
                folder.write_status(state=state, exit_code=code, error=f"{type(error).__name__}: {brief(error)}")
            raise


def check_run(folder: RunFolder, recipe: DistillRecipe | TeacherRecipe, resume: str) -> None:
    """Checks that a folder is free, or holds a run that this recipe resumes.

    Raises:
        RecipeError: It holds a run of another recipe, any run and `resume` is "never", or something that is no run.
        CorruptFileError: It holds checkpoints without a recipe.
    """
    started = bool(list_checkpoints(folder.checkpoints))
    if not folder.recipe.is_file():
        if started:
            raise CorruptFileError(f"{folder.recipe}: missing, but there are checkpoints; choose another --out")
        if folder.foreign_entries():
            raise RecipeError(
                f"{folder.path}: holds {folder.foreign_entries()[0]!r} and is no run; choose another --out"
            )
        return
    if resume == "never":
        raise RecipeError(f"{folder.path}: already holds a run; choose another --out, or --resume auto to resume it")
    if started:
        changed = differences(load_recipe(folder.recipe, type(recipe)), recipe, recipe.may_change)
        if changed:
            raise RecipeError(
                f"{folder.path}: holds a run of another recipe ({'; '.join(changed)}); choose another --out; only "
                f"{', '.join(recipe.may_change)} may change"
            )


def _write_environment(folder: RunFolder, recipe: DistillRecipe | TeacherRecipe, accelerator: Accelerator) -> None:
    facts: dict[str, Any] = {
        "command": sys.argv[1:],
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": effective_precision(accelerator),
        **_engine(recipe, accelerator),
        "versions": versions(),
    }
    if isinstance(recipe, DistillRecipe):
        facts["jumps"] = trained_jumps(make_objective(recipe.objective, (1,), meta=True))
    old = read_json(folder.path / "env.json")
    changed = [
        f"{key} {old[key]} -> {facts[key]}"
        for key in ("device", "processes", "threads", *_engine(recipe, accelerator))
        if old.get(key, facts[key]) != facts[key]
    ]
    if changed and list_checkpoints(folder.checkpoints):
        say(f"{folder.path}: resumes with {', '.join(changed)}: the same algorithm, no longer the same last bits")
    write_text(folder.path / "env.json", json.dumps(facts, indent=1) + "\n")


def _engine(recipe: DistillRecipe | TeacherRecipe, accelerator: Accelerator) -> dict[str, Any]:
    """Returns what else the last bits depend on."""
    if isinstance(recipe, TeacherRecipe):
        return {}
    acceleration = str(choose_acceleration(recipe.training, accelerator))
    return {"micro-batches": recipe.training.accumulation, "networks": acceleration}
