"""``cdistill trajectories``: following the teacher before a training, and removing what is kept."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cdistill.errors import RecipeError
from cdistill.objectives.base import make_objective
from cdistill.recipe.schema import DistillRecipe
from cdistill.runtime.console import Table
from cdistill.sampling.settings import TrajectoriesSection
from cdistill.sampling.teacher_data import open_data
from cdistill.sampling.trajectories import TrajectoryStore, open_trajectories, stored_trajectories
from cdistill.schedule import rho_grid
from cdistill.settings import check_section
from cdistill.teachers import Teacher
from cdistill.training.loop import make_accelerator
from cdistill.workflows.estimate import open_teacher


def follow_trajectories(
    teacher: str | Path | Teacher,
    points: int = 18,
    settings: TrajectoriesSection | None = None,
    *,
    data: str | None = None,
    weights: str | Path | None = None,
    accelerator: Accelerator | None = None,
    **fields: Any,
) -> TrajectoryStore:
    """Follows trajectories of a teacher from T to eps and keeps them in the asset folder; reads those that are there.

    Args:
        teacher: A name (``cdistill ls teachers``), a file, or a loaded teacher.
        points: N, noise levels of the rho-grid.
        settings: How many, and how they are followed and kept.
        data: The data whose classes are drawn; the teacher's own by default. Read for a conditional teacher only.
        weights: File of the teacher's weights, where its name alone does not find them.
        accelerator: Devices and processes; one for this machine by default.
        **fields: Fields of :class:`TrajectoriesSection`, in place of `settings`.

    Raises:
        DiskFullError: They do not fit on the disk.
        StoppedError: A signal came; the same call resumes.
        CdistillError: A kept shard is damaged, or anything is wrong with the arguments.

    >>> import torch
    >>> store = follow_trajectories("mixture-1d", points=6, count=256)
    >>> store.points(torch.tensor([0, 7]), store.levels[[0, 5]]).shape
    torch.Size([2, 1])
    """
    settings = settings or check_section(fields, TrajectoriesSection, "follow_trajectories")
    accelerator = accelerator or make_accelerator("fp32")
    loaded = open_teacher(teacher, None if weights is None else Path(weights), accelerator)
    source = open_data(data, "train", loaded, accelerator) if loaded.denoiser.num_classes else None
    return open_trajectories(settings, rho_grid(points), loaded, source, accelerator)


def follow_for_recipe(recipe: DistillRecipe, changes: dict[str, Any]) -> TrajectoryStore:
    """Follows the trajectories that a recipe reads, as its training would; errors as `follow_trajectories`.

    Args:
        recipe: The recipe.
        changes: Fields of its section [trajectories] that take other values.

    Raises:
        RecipeError: Neither its objective nor its warm-up reads any.
    """
    accelerator = make_accelerator("fp32")
    teacher = open_teacher(recipe.teacher, recipe.weights_path, accelerator)
    sections = [recipe.objective, *([recipe.warmup] if recipe.warmup else [])]
    readers = [made for made in (make_objective(section, teacher.shape) for section in sections) if made.stored]
    if not readers or readers[0].grid is None:
        raise RecipeError(
            f"objective.name: {recipe.objective.name!r} reads no trajectories; set objective.targets=store"
        )
    source = open_data(recipe.data, "train", teacher, accelerator) if teacher.denoiser.num_classes else None
    section = recipe.trajectories.model_copy(update=changes)
    return open_trajectories(section, readers[0].grid, teacher, source, accelerator)


def summary(store: TrajectoryStore) -> dict[str, Any]:
    """Returns what a store holds, as JSON."""
    size = sum(path.stat().st_size for path in store.shards)
    return {
        "folder": str(store.folder), "trajectories": len(store), "levels": store.levels.tolist(),
        "bytes": size, "seconds": store.seconds, "sha256": store.digest,
    }  # fmt: skip


def kept_table() -> Table:
    """Returns the stores in the asset folder, a line each."""
    rows = []
    for store in stored_trajectories():
        size = f"{store['bytes'] / 2**20:,.1f} MiB"
        facts = [store["teacher"], f"{store['count']:,}", str(len(store["levels"])), store["precision"], size]
        rows.append([str(store["folder"]), *facts])
    return Table("kept trajectories", ["folder", "teacher", "trajectories", "levels", "precision", "size"], rows)


def prune(teacher: str | None = None) -> dict[str, Any]:
    """Removes the kept trajectories of a teacher, of all teachers by default; returns what went, as JSON.

    A training that reads them at this moment is not disturbed: its files stay until it has ended.
    """
    gone = [store for store in stored_trajectories() if teacher in (None, store["teacher"])]
    for store in gone:
        shutil.rmtree(store["folder"])
    return {"removed": [str(store["folder"]) for store in gone], "bytes": sum(store["bytes"] for store in gone)}
