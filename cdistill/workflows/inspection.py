"""What is in a file or folder, verified, as a record; and runs as one HTML page. Needs no torch."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdistill.errors import CorruptFileError
from cdistill.reporting.inspect_view import read_toml
from cdistill.reporting.page import render
from cdistill.reporting.reading import read_pairs, read_run
from cdistill.storage.bounded import open_regular, parse_json, read_bytes, read_json
from cdistill.storage.files import list_checkpoints, read_steadily, write_text
from cdistill.storage.integrity import (
    NUMBERS,
    Layout,
    check_manifest,
    layout_digest,
    load_state,
    numbers,
    read_layout,
    verify,
)
from cdistill.storage.run_folder import RunFolder, run_names, true_status

_FOREIGN = (".pkl", ".pt", ".pth")
_STEP = re.compile(r"step-\d+")
_LARGEST_TEXT = 4 << 20  # bytes of a JSON or TOML file, or of the end of the metrics, that are read
_MOST_ROWS = 100_000  # of a table that is read


def inspect(path: Path) -> dict[str, Any]:
    """Verifies a file or folder and returns what it is; `cdistill.reporting.inspect_view` shows it.

    Args:
        path: A file that cdistill made, the folder of a checkpoint or that of a run.

    Raises:
        MissingAssetError: There is nothing.
        CorruptFileError: It is damaged, altered, or nothing that can be read here.
    """
    if path.is_dir() and ((path / "manifest.json").is_file() or _STEP.fullmatch(path.name)):
        return inspect_checkpoint(path)
    return inspect_run(RunFolder(path)) if path.is_dir() else inspect_file(path)


def to_json(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record with what JSON lacks as text: dates, NaN and infinity."""
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str), parse_constant=str)
    return plain


def inspect_file(path: Path) -> dict[str, Any]:
    """Returns what a safetensors file holds; "checksum" is "ok", or None where there is none to compare.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged or altered, or someone else's pickle.
    """
    if path.suffix in _FOREIGN and path.is_file():
        raise CorruptFileError(
            f"{path}: someone else's weights, which are not inspected; cdistill convert says what they are, and makes "
            "them safetensors without executing anything in them"
        )
    return read_steadily(path, lambda: _inspect_file(path))


def _inspect_file(path: Path) -> dict[str, Any]:
    layout = read_layout(path)
    record: dict[str, Any] = {
        "file": str(path), "kind": None, "schema": None, "bytes": layout.size, "checksum": None, "sha256": None,
        "header": None, "metadata": {key: text for key, text in layout.metadata.items() if key != "cdistill"},
        "numbers": sum(math.prod(shape) for _, shape, *_ in layout.entries.values()),
        "tensors": [
            {"name": name, "dtype": dtype, "shape": list(shape), "bytes": size}
            for name, (dtype, shape, _, size) in layout.entries.items()
        ],
    }  # fmt: skip
    if "cdistill" in layout.metadata:
        header, digest = verify(layout)
        kind = header["kind"]
        record |= {"kind": kind, "schema": header["schema"], "header": header, "checksum": "ok", "sha256": digest}
        if kind == "teacher":
            record["weights_sha256"] = layout_digest(layout, "")
        if kind == "coefficients":
            record |= {"table": _table(layout), "pairs": _pairs(layout)}
    return record


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Returns what a checkpoint holds, every file of it verified.

    Raises:
        CorruptFileError: A file is missing or altered; the message names it.
    """
    names = check_manifest(folder)
    files = [inspect_file(folder / name) for name in names if name.endswith(".safetensors")]
    state = load_state(folder)
    return {"file": str(folder), "kind": "checkpoint folder", "checksum": "ok", "state": state, "files": files}


def inspect_run(run: RunFolder) -> dict[str, Any]:
    """Returns what a run holds, its checkpoints and files verified; its small files may hold anything.

    Raises:
        CorruptFileError: It is no run, or one of its files is damaged.
    """
    status = _object(run.path / "status.json")
    if not (run.recipe.is_file() or status):
        raise CorruptFileError(f"{run.path}: a folder, but neither a run nor a checkpoint; name one, or a file")
    return {
        "file": str(run.path),
        "kind": "run",
        "checksum": "ok",
        "status": true_status(status),
        "recipe": read_toml(read_bytes(run.recipe) if _is_small(run.recipe) else ""),
        "environment": _object(run.path / "env.json"),
        "last": _last_record(run.path / "metrics.jsonl"),
        "results": _object(run.path / "evaluation.json"),
        "files": [inspect_file(file) for file in sorted(run.path.glob("*.safetensors")) if file.is_file()],
        "checkpoints": [inspect_checkpoint(folder) for folder in list_checkpoints(run.checkpoints)],
    }


def _table(layout: Layout) -> dict[str, list[float]] | None:
    """Returns t, l, s and their errors where the file has such; None if they make no table."""
    if "t" not in layout.entries:
        return None
    columns = _columns(layout, ("t", "l", "s", "l_error", "s_error"), layout.entries["t"][1])
    return columns if {"t", "l", "s"} <= set(columns) else None


def _pairs(layout: Layout) -> dict[str, list[float]] | None:
    """Returns t, s and what is known of each of the pairs of noise levels; None if the file has no such table."""
    _, shape, *_ = layout.entries.get("pairs", ("", ()))
    if len(shape) != 2 or shape[1] != 2 or not _can_be_read(layout, "pairs"):
        return None
    both = numbers(layout, "pairs", range(shape[0]))
    known = _columns(layout, ("f", "f_error", "g", "g_error"), shape[:1])
    return {"t": [t for t, _ in both], "s": [s for _, s in both], **known}


def _columns(layout: Layout, names: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, list[float]]:
    """Returns those of the tensors that are columns of numbers of this shape."""
    columns = {}
    for name in names:
        same = name in layout.entries and layout.entries[name][1] == shape
        if same and len(shape) == 1 and _can_be_read(layout, name):
            columns[name] = [value for (value,) in numbers(layout, name, range(shape[0]))]
    return columns


def _can_be_read(layout: Layout, name: str) -> bool:
    dtype, shape, *_ = layout.entries[name]
    return dtype in NUMBERS and shape[0] <= _MOST_ROWS


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if _is_small(path) else {}


def _is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= _LARGEST_TEXT


def _last_record(path: Path) -> dict[str, Any]:
    """Returns the last whole line of metrics.jsonl, {} if there is none near the end of it."""
    if not path.is_file():
        return {}
    with open_regular(path) as file:
        file.seek(max(0, file.seek(0, 2) - _LARGEST_TEXT))
        lines = file.read().splitlines()
    for line in reversed(lines[-2:]):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return {}


def report(paths: Sequence[Path], out: Path, comparison: Path | None = None) -> dict[str, str]:
    """Writes the page about runs, finished or not; returns where it is, as JSON.

    Args:
        paths: Run folders; those that shall be compared stand side by side in this order.
        out: The page.
        comparison: What ``cdistill evaluate`` wrote about several runs on the same seeds.

    Raises:
        RecipeError: A run is named twice.
        MissingAssetError: There is no run in a folder.
        CorruptFileError: A file of a run is damaged.
    """
    names = run_names(paths, "report")
    runs = [read_run(RunFolder(path), name, inspect_file) for path, name in zip(paths, names, strict=True)]
    write_text(out, render(runs, [] if comparison is None else read_pairs(comparison)))
    return {"report": str(out)}
