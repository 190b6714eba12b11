"""Every reader of files with a sound file for it, and ways to break that; for the property tests and the long command.

A reader may raise a CdistillError alone. Files of our own are broken with right checksums too, as a stranger could
make them.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cdistill.data.loading import load_file
from cdistill.estimation.collecting import Progress
from cdistill.evaluation.records import Evaluation
from cdistill.evaluation.references import Statistics, read_statistics, write_statistics
from cdistill.formats.images import decode
from cdistill.networks.architecture import build_denoiser
from cdistill.preconditionings.coefficients import load_coefficients
from cdistill.recipe.files import load_any_recipe
from cdistill.reporting.curves import evaluation_curves, training_curves
from cdistill.reporting.page import render
from cdistill.reporting.reading import read_pairs
from cdistill.reporting.reading import read_run as read_shown
from cdistill.sampling.sample_store import SampleStore
from cdistill.sampling.settings import TrajectoriesSection
from cdistill.sampling.trajectories import SHARD, TrajectoryStore, stored_trajectories, trajectory_store
from cdistill.schedule import rho_grid
from cdistill.storage.checkpoints import load_checkpoint, load_tensors, save_checkpoint, save_tensors
from cdistill.storage.files import file_digest
from cdistill.storage.run_folder import RunFolder, read_run
from cdistill.teachers import load_teacher
from cdistill.teachers.base import read_teacher
from cdistill.training.loop import restore
from cdistill.workflows.evaluate import _request
from cdistill.workflows.inspection import inspect, inspect_file
from cdistill.workflows.students import load_converted
from tests.archives import (
    cifar_binary,
    cifar_python,
    encode,
    members,
    python2_batch,
    random_images,
    write_tar,
    write_zip,
)
from tests.report_runs import evaluation, make_run

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    5,
    1e308,
    10**30,
    "",
    "x",
    "../../x",
    "\x1b[31m",
    [],
    [1],
    {},
    {"a": 1},
    [[[]]],
    0.5,
]
CHECKPOINT = "run/checkpoints/step-00000060"


@dataclass(frozen=True)
class Reader:
    """What reads the file `name` of a folder, once `make` has put sound files there; `kind` is what the file is."""

    name: str
    kind: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


def make_checkpoint(folder: Path) -> None:
    if not (folder / "run").exists():
        make_run(folder / "run")
    state = {"identity": {"teacher_sha256": "a"}, "counters": {"latest": {"a": 1.0}}, "due": True, "scaler": None}
    save_checkpoint(folder / "run" / "checkpoints", 60, {"weights": {"a": torch.ones(2, 3)}}, state, 2)


def read_checkpoint(folder: Path) -> None:
    """The manifest is made right again, as whoever breaks another file could do."""
    checkpoint = folder / CHECKPOINT
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    (checkpoint / "manifest.json").write_text(json.dumps({name: file_digest(checkpoint / name) for name in names}))
    load_checkpoint(checkpoint)
    task = SimpleNamespace(
        identity={}, load=lambda groups: groups["weights"]["a"], accelerator=SimpleNamespace(scaler=None), attempt=0
    )
    restore(task, checkpoint)
    inspect(folder / "run")


def read_log(folder: Path) -> None:
    run = RunFolder(folder / "run")
    record = read_run(run)
    evaluation_curves(record.evaluations)
    training_curves(record.training)
    run.best_step()
    inspect(run.path)
    read_shown(run, "a", inspect_file)


def read_record(folder: Path) -> None:
    read_log(folder)
    path = folder / "run" / "evaluation.json"
    _request(path, Evaluation.read(path))


def read_page(folder: Path) -> None:
    render([read_shown(RunFolder(folder / "run"), "a", inspect_file)])


def make_record(folder: Path) -> None:
    make_run(folder / "run")
    record = json.loads((folder / "run" / "evaluation.json").read_text())
    record["request"] = {"target": {"path": "run", "changes": {"samples": 4}}, "choice": {"times": [1.0]}}
    (folder / "run" / "evaluation.json").write_text(json.dumps(record))


def make_pairs(folder: Path) -> None:
    difference = {
        "metric": "fid", "sampler": "student", "nfe": 1, "first": 1.0, "second": 2.0, "difference": 1.0, "error": 0.1,
        "interval": [0.8, 1.2], "verdict": "worse",
    }  # fmt: skip
    pair = {"first": "a", "second": "b", "differences": [difference]}
    (folder / "pairs.json").write_text(json.dumps({"comparisons": [pair], "records": [evaluation()]}))


def make_store(folder: Path) -> TrajectoryStore:
    teacher = load_teacher("mixture-1d")
    store = trajectory_store(TrajectoriesSection(count=SHARD), rho_grid(3), teacher, None)
    store.folder = folder / "trajectories" / "x"
    return store


def make_shard(folder: Path) -> None:
    store = make_store(folder)
    columns = {"points": torch.zeros(SHARD, 3, 1, dtype=store.dtype), "labels": torch.zeros(SHARD, dtype=torch.int64)}
    save_tensors(store.shards[0], columns, "trajectories", {"identity": store.identity, "first": 0})
    (store.folder / "about.json").write_text(json.dumps({"teacher": "x", "seconds": 1.5, **store.identity}))


def read_shard(folder: Path) -> None:
    store = make_store(folder)
    store._verify(store.shards[0])
    file, _, _ = store._map(store.shards[0])
    file[0].close()


def read_about(folder: Path) -> None:
    import os

    before = os.environ.get("CDISTILL_ASSETS")
    os.environ["CDISTILL_ASSETS"] = str(folder)
    try:
        from cdistill.workflows.trajectories import kept_table

        stored_trajectories()
        kept_table()
        make_store(folder).seconds  # noqa: B018
    finally:
        del os.environ["CDISTILL_ASSETS"]
        if before is not None:
            os.environ["CDISTILL_ASSETS"] = before


def store_of(folder: Path) -> SampleStore:
    return SampleStore(folder / "samples", {"a": 1}, (1, 2, 2))


def make_samples(folder: Path) -> None:
    columns = {"seeds": torch.arange(4), "samples": torch.zeros(4, 1, 2, 2, dtype=torch.uint8)}
    save_tensors(folder / "samples" / "0-x.safetensors", columns, "samples", {"identity": store_of(folder).identity})


def read_samples(folder: Path) -> None:
    store = store_of(folder)
    if not len(store.missing(range(4))):
        store.rows(range(4))


def progress_of(folder: Path) -> Progress:
    return Progress((2, 3, 4), folder / "c", {"a": 1})


def make_network(folder: Path) -> None:
    architecture = {
        "network": "song", "resolution": 8, "channels": 1, "model_channels": 16, "channel_mult": [1], "num_blocks": 1,
        "attn_resolutions": [],
    }  # fmt: skip
    tensors = build_denoiser(architecture, 0.5).state_dict()
    header = {"architecture": architecture, "sigma_data": 0.5, "preconditioning": "ctm", "name": "x", "data": "digits"}
    save_tensors(folder / "student.safetensors", tensors, "student", header)
    save_tensors(folder / "teacher.safetensors", tensors, "teacher", header)


def make_npz(folder: Path) -> None:
    np.savez(folder / "x.npz", images=random_images(4).transpose(0, 2, 3, 1), labels=np.arange(4))


def make_statistics(folder: Path) -> None:
    eye = torch.eye(3, dtype=torch.float64)
    write_statistics(folder / "x.npz", Statistics(eye[0], eye, torch.zeros(4, 3), {"features": {"name": "pixels"}}))


def make_deflated(folder: Path) -> None:
    write_zip(folder / "x.zip", members(random_images(3), None), 8)


def make_folder(folder: Path) -> None:
    for name, content in members(random_images(3), [0, 1, 2]).items():
        (folder / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "x" / name).write_bytes(content)


def cifar(content: Callable[..., Any]) -> Callable[[Path], object]:
    return lambda folder: write_tar(folder / "c.tar.gz", content(random_images(33, 32), np.arange(33) % 10, 8))


def make_recipe(folder: Path) -> None:
    (folder / "r.toml").write_text(
        'extends = "digits"\nseed = 3\n[objective]\nname = "ctm"\npoints = 10\nmax_ode_steps = 9\n[evaluation]\n'
        "nfe = [1, 2]\nsamples = 100\n[training]\nlearning_rate = 1e-3\n"
    )


def image(form: str, name: str) -> Reader:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(encode(random_images(1)[0], form))

    return Reader(name, "bytes", make, lambda folder: decode((folder / name).read_bytes(), name))


def loaded(name: str, kind: str, make: Callable[[Path], object], path: str = "") -> Reader:
    return Reader(name, kind, make, lambda folder: load_file(folder / (path or name)))


def run_file(name: str, kind: str, read: Callable[[Path], object] = read_log) -> Reader:
    return Reader(f"run/{name}", kind, lambda folder: make_run(folder / "run"), read)


READERS: dict[str, Reader] = {
    "recipe": Reader("r.toml", "toml", make_recipe, lambda folder: load_any_recipe(folder / "r.toml")),
    "recipe.resolved.toml": run_file("recipe.resolved.toml", "toml"),
    "metrics.jsonl": run_file("metrics.jsonl", "lines"),
    "status.json": run_file("status.json", "json"),
    "env.json": run_file("env.json", "json"),
    "evaluation.json": Reader("run/evaluation.json", "json", make_record, read_record),
    "comparison": Reader("pairs.json", "json", make_pairs, lambda folder: read_pairs(folder / "pairs.json")),
    "pictures": run_file("samples/step-00000060.npz", "bytes"),
    "coefficients": run_file(
        "coefficients.safetensors", "tensors",
        lambda folder: (load_coefficients(folder / "run/coefficients.safetensors"), read_log(folder)),
    ),
    "state.json": Reader(f"{CHECKPOINT}/state.json", "json", make_checkpoint, read_checkpoint),
    "manifest.json": Reader(
        f"{CHECKPOINT}/manifest.json", "json", make_checkpoint, lambda folder: load_checkpoint(folder / CHECKPOINT)
    ),
    "checkpoint": Reader(f"{CHECKPOINT}/weights.safetensors", "tensors", make_checkpoint, read_checkpoint),
    "about.json": Reader("trajectories/x/about.json", "json", make_shard, read_about),
    "trajectories": Reader("trajectories/x/000000000.safetensors", "tensors", make_shard, read_shard),
    "samples": Reader("samples/0-x.safetensors", "tensors", make_samples, read_samples),
    "unfinished statistics": Reader(
        ".c.part-0-of-1", "tensors", lambda folder: progress_of(folder).save(), progress_of
    ),
    "student": Reader(
        "student.safetensors", "tensors", make_network, lambda folder: load_converted(folder / "student.safetensors")
    ),
    "teacher": Reader(
        "teacher.safetensors", "tensors", make_network, lambda folder: read_teacher(folder / "teacher.safetensors", "x")
    ),
    "inspect": Reader(
        "teacher.safetensors", "tensors", make_network, lambda folder: inspect(folder / "teacher.safetensors")
    ),
    "statistics": Reader("x.npz", "bytes", make_statistics, lambda folder: read_statistics(folder / "x.npz")),
    "npz": loaded("x.npz", "bytes", make_npz),
    "zip": loaded("x.zip", "bytes", lambda folder: write_zip(folder / "x.zip", members(random_images(3), [0, 1, 2]))),
    "deflated zip": loaded("x.zip", "bytes", make_deflated),
    "dataset.json": loaded("x/dataset.json", "json", make_folder, "x"),
    "an image in a folder": loaded("x/00000/img00000001.png", "bytes", make_folder, "x"),
    "CIFAR, binary": loaded("c.tar.gz", "bytes", cifar(cifar_binary)),
    "CIFAR, Python": loaded("c.tar.gz", "bytes", cifar(partial(cifar_python, batch=python2_batch))),
    **{form: image(form, f"x.{form.lower()}") for form in ("PNG", "JPEG", "WEBP", "BMP")},
}  # fmt: skip

PAGES = {
    f"the page of {name}": replace(READERS[name], read=read_page)
    for name in ("recipe.resolved.toml", "metrics.jsonl", "status.json", "env.json", "evaluation.json")
}
"""A second each: for the long command."""


def broken_file(reader: Reader, folder: Path, content: bytes, rng: random.Random) -> None:
    """Replaces the file of a reader by a broken one."""
    path = folder / reader.name
    kind = reader.kind if rng.random() < 0.7 else "bytes"
    if kind == "json":
        path.write_text(json.dumps(odd(json.loads(content), rng)))
    elif kind == "lines":
        lines = content.decode().splitlines()
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(odd(json.loads(lines[place]), rng))
        path.write_text("\n".join(lines))
    elif kind == "toml":
        path.write_text(broken_toml(content.decode(), rng))
    elif kind == "tensors":
        signed(path, content, rng)
    else:
        path.write_bytes(broken_bytes(content, rng))


def odd(value: Any, rng: random.Random) -> Any:
    """Replaces, removes or doubles something within a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: odd(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], odd(value[place], rng), *value[place + rng.choice([0, 1]) :]]
    return rng.choice(ODD)


def broken_toml(text: str, rng: random.Random) -> str:
    """Replaces a value, a key or a line."""
    lines = text.splitlines()
    place = rng.randrange(len(lines))
    key, equals, _ = lines[place].partition("=")
    values = [
        "1",
        "-1",
        "1e400",
        "nan",
        "true",
        '"x"',
        "[]",
        "[[1]]",
        "{a = 1}",
        "9" * 30,
        "2024-01-01",
        '"\\u001b"',
        "",
    ]
    keys = ["extends", "objective", "evaluation", "evaluation.nfe", "warmup", "gan", "[gan]\nx", "training", '"a\\nb"']
    lines[place] = f"{key if equals and rng.random() < 0.7 else rng.choice(keys)} = {rng.choice(values)}"
    if rng.random() < 0.1:
        lines[place] = rng.choice(["[", "]", "=", "[a]", "[[a]]", "a.b.c = 1", "\ufeff", "x = '''"])
    return "\n".join(lines)


def signed(path: Path, content: bytes, rng: random.Random) -> None:
    """Writes a file of ours with other tensors or another header, and the checksum of these."""
    path.write_bytes(content)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["cdistill"])["header"]
    kind = header.pop("kind")
    header.pop("schema")
    tensors, _ = load_tensors(path, kind)
    if rng.random() < 0.5:
        changed = odd(header, rng)
        header = changed if isinstance(changed, dict) else {}
    else:
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        types = [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float16]
        changes: list[Callable[[], torch.Tensor | None]] = [
            lambda: None,
            lambda: tensor.to(rng.choice(types)),
            lambda: tensor[:0],
            lambda: tensor.flatten()[:1],
            lambda: torch.cat([tensor, tensor]),
            lambda: tensor.reshape(-1),
            lambda: torch.full_like(tensor.double(), rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e300])),
            lambda: torch.full_like(tensor, rng.choice([0, 1])),
            lambda: torch.zeros(()),
        ]
        other = rng.choice(changes)() if tensor.dim() else torch.zeros(2)
        if other is not None:
            tensors[name if rng.random() < 0.9 else "other"] = other
    save_tensors(path, tensors, kind, header)


def broken_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, repeats, overwrites or splices bytes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        number = rng.choice([0, 1, 127, 255, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1])
        piece = number.to_bytes(8, "little")[: rng.choice([1, 2, 4, 8])]
        change = rng.randrange(6)
        if change == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif change == 1:
            data = data[:at]
        elif change == 2:
            data = data[:at] + data[at : at + rng.choice([1, 8, 50])] * rng.choice([2, 3, 300]) + data[at:]
        elif change == 3:
            data = data[:at] + piece + data[at + len(piece) :]
        elif change == 4:
            data = data[:at] + data[at + rng.choice([1, 2, 30]) :]
        else:
            data = data[:at] + rng.randbytes(rng.choice([1, 3, 20])) + data[at:]
    return bytes(data[:500_000])
