"""``distill --micro-batch``: into how many parts a batch is cut, so that a step fits in memory."""

from dataclasses import replace

import torch
from accelerate import Accelerator

from cdistill.data.memory import free_memory
from cdistill.recipe.files import load_recipe
from cdistill.recipe.schema import DistillRecipe
from cdistill.runtime.console import say
from cdistill.runtime.processes import local_processes
from cdistill.storage.files import list_checkpoints
from cdistill.storage.run_folder import RunFolder
from cdistill.training.step_data import check_divisible
from cdistill.workflows.plan import plan

_SHARE = 0.8  # of the free memory that may be planned with: the plan is an estimate


def with_micro_batches(recipe: DistillRecipe, wanted: str, accelerator: Accelerator, run: RunFolder) -> DistillRecipe:
    """Returns the recipe with the number of micro-batches that a device needs; the results do not depend on it.

    But for rounding, and for the dropout masks, which are drawn for each micro-batch.

    Args:
        recipe: The recipe; its own `accumulation` does not count.
        wanted: "auto" for as few as fit in the memory that is free now, or the most images of one, a number.
        accelerator: Devices and processes; all agree on the largest number that one needs.
        run: With "auto" a resumed run keeps its micro-batches, if they still divide the batch.

    Raises:
        RecipeError: The batch cannot be divided among the processes.
    """
    processes: int = accelerator.num_processes
    check_divisible(recipe.training.batch_size, processes, 1)
    own = recipe.training.batch_size // processes
    if wanted == "auto" and list_checkpoints(run.checkpoints) and run.recipe.is_file():
        before = load_recipe(run.recipe, DistillRecipe).training.accumulation
        if own % before == 0:
            return _divided(recipe, before)
    if wanted == "auto":
        limit = _SHARE * free_bytes(accelerator.device)
        whole = plan(_divided(recipe, 1), processes)
        parts = plan(_divided(recipe, own), processes)

    def fits(count: int) -> bool:
        if wanted != "auto":
            return own // count <= int(wanted)
        return replace(whole if count == 1 else parts, micro_batch=own // count).device_bytes <= limit

    fewest = next((count for count in range(1, own) if own % count == 0 and fits(count)), own)
    count = int(accelerator.gather(torch.tensor([fewest], device=accelerator.device)).max())
    say(f"{count} micro-batch(es) of {own // count} images on each of {processes} process(es)")
    return _divided(recipe, count)


def free_bytes(device: torch.device) -> float:
    """Returns the bytes that a process may still take on its device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_memory() / local_processes()


def _divided(recipe: DistillRecipe, count: int) -> DistillRecipe:
    training = recipe.training.model_copy(update={"accumulation": count})
    return recipe.model_copy(update={"training": training})
