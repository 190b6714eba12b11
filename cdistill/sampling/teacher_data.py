"""The data for a teacher: a source that fits it, or samples of its own for people who have only its weights.

A teacher's samples are kept in the asset folder: as training data, and as the endpoints that students are compared
with. Both are drawn by Heun's solver with 34 calls at first use and read afterwards; more seeds extend what is there.
"""

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cdistill import __version__
from cdistill.data import Source, load_source
from cdistill.data.memory import check_memory
from cdistill.errors import MismatchError, RecipeError
from cdistill.networks.classes import Classes
from cdistill.networks.denoiser import chunk_size
from cdistill.registry import is_teacher_data, teacher_data_count
from cdistill.runtime.console import say
from cdistill.sampling.sample_store import SampleStore
from cdistill.sampling.samplers import TEACHER_POINTS, make_sampler
from cdistill.storage.files import asset_folder
from cdistill.teachers import Teacher

# Far from those that people sample and evaluate with; torch's generator on a CPU keeps 32 bits of a seed.
_FIRST_SEED = {"train": 2**30, "heldout": 2**31}


def open_data(name: str | None, split: str, teacher: Teacher, accelerator: Accelerator) -> Source:
    """Returns the data for a teacher: a registered source, a file, or samples of the teacher itself.

    `name` is in the registry, a path, "teacher" or "teacher:COUNT"; None for the teacher's own data, or RecipeError if
    it has none. MismatchError: They do not fit the teacher.
    """
    chosen = name or teacher.data
    if not chosen:
        raise RecipeError(
            f"data: teacher {teacher.name!r} names no data of its own; give a source, a path or 'teacher'"
        )
    if is_teacher_data(chosen):
        return teacher_data(chosen, split, teacher, accelerator)
    return fit_source(teacher, load_source(chosen, split))


def fit_source(teacher: Teacher, source: Source) -> Source:
    """Returns the data as the teacher needs it, without labels for an unconditional one; MismatchError if unfit.

    Where both name their classes, the data's are numbered as the teacher's.
    """
    known = teacher.denoiser.known_classes
    classes = len(known)
    source = renumbered(source, known, f"teacher {teacher.name!r}")
    fits = not classes or 0 < source.num_classes <= classes
    if source.shape != teacher.shape or not fits:
        example = f", such as {teacher.data!r}" if teacher.data else ""
        raise MismatchError(
            f"data {source.name!r}: shape {source.shape}, {source.num_classes} classes; teacher {teacher.name!r} "
            f"has shape {teacher.shape}, {classes} classes; choose data that fits{example}"
        )
    if not classes:
        return replace(source, labels=None, num_classes=0, class_names=())
    return replace(source, num_classes=classes, class_names=known.names or source.class_names)


def renumbered(source: Source, known: Classes, owner: str) -> Source:
    """Returns data whose classes have the numbers by which a network knows them, where both have names.

    Raises:
        MismatchError: The data have a class that the network's `owner`, as messages call it, does not know.
    """
    names = known.names
    if source.labels is None or not (names and source.class_names) or source.class_names == names:
        return source
    if other := [name for name in source.class_names if name not in names]:
        raise MismatchError(
            f"data {source.name!r}: has the class {other[0]!r}; those of {owner} are {', '.join(names)}; "
            "name the folders alike"
        )
    places = torch.tensor([names.index(name) for name in source.class_names])
    return replace(source, labels=places[source.labels], num_classes=len(names), class_names=names)


def teacher_data(name: str, split: str, teacher: Teacher, accelerator: Accelerator) -> Source:
    """Returns samples of the teacher as data: 50,000 for "teacher", or "teacher:COUNT"; "heldout" are others.

    uint8 images, rounded as EDM writes them, or float64 vectors, with the labels that were drawn for them. They are not
    mirrored: of these data there are as many as one likes. After a StoppedError finished samples are kept.
    """
    count = teacher_data_count(name)
    check_memory(count * prod(teacher.shape) * (1 if len(teacher.shape) == 3 else 8), f"data {name!r}")
    seeds = range(_FIRST_SEED[split], _FIRST_SEED[split] + count)
    store = _open({"teacher": teacher.digest}, teacher, teacher.denoiser.known_classes.shares)
    _draw(store, seeds, f"samples of {teacher.name}", teacher, teacher.denoiser.known_classes.shares, accelerator)
    samples, labels = store.rows(seeds)
    known = teacher.denoiser.known_classes
    return Source(f"teacher:{count}", samples, labels, len(known), class_names=known.names)


def teacher_endpoints(teacher: Teacher, seeds: range, shares: Sequence[float], accelerator: Accelerator) -> SampleStore:
    """Returns a store with the endpoints of the teacher's trajectories from the noise of `seeds`; see its `rows`.

    Images are float32, vectors float64; the seeds are consecutive, `shares` say how often
    each class is drawn. All processes call it together. After a StoppedError
    finished samples are kept.
    """
    identity = {
        "teacher": teacher.digest, "device": accelerator.device.type, "torch": torch.__version__,
        "cdistill": __version__,
    }  # fmt: skip
    store = _open(identity, teacher, shares, torch.float32 if len(teacher.shape) == 3 else None)
    _make_writable(store, accelerator)
    size = chunk_size(teacher.shape)
    whole = range(seeds.start // size * size, -(-seeds.stop // size) * size)  # the network sees whole chunks anyway
    _draw(store, whole, "teacher's endpoints", teacher, shares, accelerator)
    return store


def _open(
    identity: dict[str, Any], teacher: Teacher, shares: Sequence[float], dtype: torch.dtype | None = None
) -> SampleStore:
    """Returns the store of a teacher's samples, in a folder named after what they depend on."""
    whole = {**identity, "sampler": "heun", "points": TEACHER_POINTS}
    if shares and min(shares) < max(shares):
        whole["shares"] = list(shares)
    key = hashlib.sha256(json.dumps([whole, str(dtype)]).encode()).hexdigest()[:16]
    return SampleStore(asset_folder() / "teacher-samples" / key, whole, teacher.shape, dtype)


def _draw(
    store: SampleStore, seeds: range, title: str, teacher: Teacher, shares: Sequence[float], accelerator: Accelerator
) -> None:
    sampler = make_sampler(teacher.denoiser, None, nfe=2 * (TEACHER_POINTS - 1))
    store.draw(sampler, seeds, shares, accelerator, title)


def _make_writable(store: SampleStore, accelerator: Accelerator) -> None:
    """Moves a store whose folder cannot be written to a temporary folder, the same for all processes."""
    chosen = [store.folder]
    if accelerator.is_main_process:
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(store.folder, os.W_OK):
                raise PermissionError("not writable")
        except OSError as error:
            say(f"{store.folder}: the teacher's endpoints are not kept for the next evaluation ({error})")
            chosen = [Path(tempfile.mkdtemp(prefix="cdistill-"))]
            weakref.finalize(store, shutil.rmtree, chosen[0], ignore_errors=True)
    store.folder = broadcast_object_list(chosen)[0]
