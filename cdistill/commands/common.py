"""What several commands need: opening a run, checking that teacher and data fit, versions."""

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from typing import Any

import torch
from accelerate import Accelerator

from cdistill import __version__
from cdistill.console import say
from cdistill.data import Source
from cdistill.errors import (
    CdistillError,
    DiskFullError,
    MismatchError,
    RecipeError,
    RunLockedError,
    StoppedError,
)
from cdistill.launch import thread_count
from cdistill.recipe import DistillRecipe, TeacherRecipe, differences, load_recipe, to_toml
from cdistill.runs import RunFolder, read_json
from cdistill.storage import list_checkpoints, write_text
from cdistill.teachers import Teacher
from cdistill.training.loop import effective_precision

_FREE = ("training.iterations", "evaluation", "checkpoint")  # what may change when a run goes on
_PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "scikit-learn")


@contextmanager
def opened_run(
    folder: RunFolder, recipe: DistillRecipe | TeacherRecipe, resume: str, accelerator: Accelerator
) -> Iterator[None]:
    """Locks a run folder for the main process and writes or compares its recipe.

    Raises:
        RunLockedError: Another process holds it.
        RecipeError: It holds a run of another recipe, or any run and `resume` is "never".
    """
    with ExitStack() as stack:
        failure: RunLockedError | None = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(folder.locked())
            except RunLockedError as error:
                failure = error
        locked = accelerator.reduce(torch.tensor(int(failure is not None), device=accelerator.device), "sum")
        if int(locked):
            raise failure or RunLockedError(f"{folder.path}: locked")
        _check_recipe(folder, recipe, resume)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_text(folder.recipe, to_toml(recipe))
            _write_environment(folder, accelerator)
        accelerator.wait_for_everyone()
        try:
            yield
        except CdistillError as error:
            if accelerator.is_main_process and not isinstance(error, StoppedError | DiskFullError):
                folder.write_status(state="failed", exit_code=error.exit_code, error=str(error))
            raise


def check_fit(teacher: Teacher, source: Source) -> None:
    """Raises MismatchError unless the data have the shape and classes of the teacher."""
    expected = (teacher.shape, teacher.denoiser.num_classes)
    if (source.shape, source.num_classes) != expected:
        raise MismatchError(
            f"data {source.name!r}: shape {source.shape}, {source.num_classes} classes; teacher {teacher.name!r} "
            f"has shape {expected[0]}, {expected[1]} classes; choose data that fit, {teacher.data!r} say"
        )


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that numbers depend on."""
    return {
        "cdistill": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def _check_recipe(folder: RunFolder, recipe: DistillRecipe | TeacherRecipe, resume: str) -> None:
    if not folder.recipe.is_file():
        return
    if resume == "never":
        raise RecipeError(f"{folder.path}: already holds a run; choose another --out, or --resume auto to go on")
    if list_checkpoints(folder.checkpoints):
        changed = differences(load_recipe(folder.recipe, type(recipe)), recipe, _FREE)
        if changed:
            raise RecipeError(
                f"{folder.path}: holds a run of another recipe ({'; '.join(changed)}); choose another --out"
            )


def _write_environment(folder: RunFolder, accelerator: Accelerator) -> None:
    facts: dict[str, Any] = {
        "command": sys.argv[1:],
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": thread_count(),
        "precision": effective_precision(accelerator),
        "versions": versions(),
    }
    old = read_json(folder.path / "env.json")
    changed = [
        f"{key} {old[key]} -> {facts[key]}"
        for key in ("device", "processes", "threads")
        if old.get(key, facts[key]) != facts[key]
    ]
    if changed and list_checkpoints(folder.checkpoints):
        say(f"{folder.path}: goes on with {', '.join(changed)}: the same algorithm, no longer the same last bits")
    write_text(folder.path / "env.json", json.dumps(facts, indent=1) + "\n")
