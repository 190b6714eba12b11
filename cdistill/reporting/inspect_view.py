"""The pages of ``cdistill inspect``: records as tables. Whatever comes from a file is escaped and shortened."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdistill.errors import printable
from cdistill.runtime.console import facts, table
from cdistill.storage.bounded import parse_toml
from cdistill.storage.run_folder import flatten

TENSORS = 20
LEVELS = 12
PAIRS = 6
_RECIPE = 1 << 16  # characters of a recipe that are parsed
_UNLIMITED = 1 << 30
_DIGEST = re.compile("[0-9a-f]{64}")
NOTHING: tuple[Any, ...] = (None, "", {}, [])

_KINDS = {
    "coefficients": "coefficients of a teacher",
    "teacher": "a teacher",
    "student": "a converted student",
    "samples": "samples drawn from a teacher",
    "checkpoint": "part of a training's checkpoint",
}
# Keys of the header in the order of the page, with another name where the key is not clear by itself; others follow.
_KEYS = {
    "what": "network", "teacher": "", "data": "", "group": "part", "step": "", "estimator": "", "grid": "",
    "timesteps": "noise levels", "samples": "", "target_error": "target error", "smoothing": "", "paired": "in pairs",
    "precision": "", "ran_in": "ran in", "device": "", "seed": "", "dim": "numbers in a sample", "preconditioning": "",
    "architecture": "", "sigma_data": "", "licence": "", "source": "made from", "recipe": "", "versions": "",
    "made_with": "versions",
}  # fmt: skip
_HIDDEN = ("kind", "schema", "teacher_sha256", "data_sha256")


def print_record(record: Mapping[str, Any], full: bool) -> None:
    """Prints what `cdistill.workflows.inspection.inspect` returned; if `full`, every tensor and the whole recipe."""
    page = _file_rows if "tensors" in record else _run_rows if record["kind"] == "run" else _checkpoint_rows
    facts(printable(str(record["file"])), page(record, full))
    if "tensors" in record:
        if record["kind"] == "coefficients":
            _print_columns(record["table"], record["pairs"], full)
        _print_tensors(record["tensors"], full)
        recipe = (record["header"] or {}).get("recipe")
        if full and isinstance(recipe, str):
            facts("recipe", [[printable(line, _UNLIMITED)] for line in recipe.splitlines()])
    elif record["kind"] == "run":
        _print_results(record["results"])
        of_checkpoints = [file for folder in record["checkpoints"] for file in folder["files"]]
        _print_files(record["file"], [*record["files"], *of_checkpoints])
        if full:
            facts("recipe", [[printable(str(key)), _show(value, full)] for key, value in record["recipe"].items()])
    else:
        _print_files(record["file"], record["files"])
        for file in record["files"] if full else []:
            _print_tensors(file["tensors"], full)


def _file_rows(record: Mapping[str, Any], full: bool) -> list[list[str]]:
    types = sorted({tensor["dtype"] for tensor in record["tensors"]})
    return [
        ["what", _what(record)],
        ["size", f"{record['bytes']:,} bytes"],
        ["checksum", f"ok, sha256 {_show(record['sha256'], full)}" if record["checksum"] else "none"],
        *([["weights", f"sha256 {_show(record['weights_sha256'], full)}"]] if "weights_sha256" in record else []),
        *provenance(record["header"] or {}, full),
        *[[f"metadata {printable(key, 40)}", _show(text, full)] for key, text in record["metadata"].items()],
        ["tensors", f"{len(record['tensors'])}, {record['numbers']:,} numbers, {', '.join(types) or 'empty'}"],
    ]


def _checkpoint_rows(record: Mapping[str, Any], full: bool) -> list[list[str]]:
    state = [
        [printable(str(key), 40), _show(value, full)] for key, value in record["state"].items() if value is not None
    ]
    return [["what", "a training's checkpoint"], ["checksum", "ok, of every file"], *state]


def _run_rows(record: Mapping[str, Any], full: bool) -> list[list[str]]:
    status, environment, values = record["status"], record["environment"], flatten(record["recipe"])
    asked = {
        **{key: status.get(key) for key in ("state", "step", "error", "time")},
        **{key: values.get(key) for key in ("teacher", "data", "seed")},
        "objective": values.get("objective.name", values.get("training.method")),  # the latter in version 0.1
        "preconditioning": values.get("preconditioning.name"),
        "iterations": values.get("training.iterations"),
        **{key: environment.get(key) for key in ("device", "processes", "precision", "versions")},
    }
    last = {key: value for key, value in record["last"].items() if not isinstance(value, dict | list)}
    steps = [folder["state"].get("step") for folder in record["checkpoints"]]
    return [
        ["what", f"a run ({_show(status.get('kind', 'of unknown kind'), full)})"],
        *[[key, _show(value, full)] for key, value in asked.items() if value is not None],
        *([["checkpoints", f"step {_show(steps, full)}; checksums ok"]] if steps else []),
        *([["last line of metrics", _show(last, full)]] if last else []),
    ]


def read_toml(text: bytes | str) -> dict[str, Any]:
    """Returns a recipe as values that JSON has too, {} where it is none."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(parse_toml(text), default=str))
        return plain
    except ValueError:
        return {}


def provenance(header: Mapping[str, Any], full: bool) -> list[list[str]]:
    """Returns the facts of a header as rows, those that matter most first."""
    keys = [key for key in _KEYS if key in header]
    keys += [key for key in header if key not in _KEYS and key not in _HIDDEN]
    rows = []
    for key in keys:
        text = (_recipe if key == "recipe" else _show)(header[key], full)
        digest = header.get(f"{key}_sha256")
        if isinstance(digest, str):
            text += f", sha256 {_show(digest, full)}"
        if header[key] not in NOTHING:
            rows.append([(_KEYS[key] or key) if key in _KEYS else f"header {printable(key, 40)}", text])
    return rows


def _what(record: Mapping[str, Any]) -> str:
    if record["kind"] is None:
        return "safetensors, not made by cdistill: there is no checksum in it, nothing was verified"
    kind = record["kind"]
    return (
        f"{_KINDS.get(kind, printable(kind, 40))} (kind {printable(kind, 40)}, schema {_show(record['schema'], False)})"
    )


def _show(value: Any, full: bool) -> str:
    """Returns a value of a header in one line, its digests by their first 12 digits unless `full`."""
    return printable(flat(value, full), _UNLIMITED if full else 160)


def flat(value: Any, full: bool = False) -> str:
    """Returns a value of a record in one line, its digests by their first 12 digits unless `full`."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_nested(item, full)}" for key, item in value.items() if item not in NOTHING)
    if isinstance(value, list):
        return ", ".join(_nested(item, full) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)[:12] if not full and _DIGEST.fullmatch(str(value)) else str(value)


def _nested(value: Any, full: bool = False) -> str:
    return f"({flat(value, full)})" if isinstance(value, dict | list) else flat(value, full)


def _recipe(value: Any, full: bool) -> str:
    if not isinstance(value, str):
        return _show(value, full)
    recipe = read_toml(value)
    named = {key: recipe[key] for key in ("teacher", "data", "seed") if key in recipe}
    return f"{_show(named, full) or 'cannot be read'} ({'whole below' if full else 'whole with --full'})"


def _chosen(count: int, most: int) -> list[int]:
    """Returns at most `most` of the indices below `count`, evenly, both ends among them."""
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)}) if count > most else list(range(count))


def _print_columns(levels: Mapping[str, Any] | None, pairs: Mapping[str, Any] | None, full: bool) -> None:
    if levels is None:
        facts("coefficients", [["t, l and s", "missing, or of shapes that make no table"]])
    else:
        count = len(levels["t"])
        rows = range(count) if full else _chosen(count, LEVELS)
        digits = {"t": ".4g", "l": ".5f", "l_error": ".1e", "s": ".4f", "s_error": ".1e"}
        _print_rows("{} of {} noise levels", levels, rows, digits)
    if pairs is not None:
        count = len(pairs["t"])
        title = "{} of {} jumps of the analytic preconditioning, with standard errors"
        digits = dict.fromkeys(("t", "s", "f", "f_error", "g", "g_error"), ".5g")
        _print_rows(title, pairs, range(count if full else min(count, PAIRS)), digits)


def _print_rows(title: str, columns: Mapping[str, Any], rows: Sequence[int], digits: Mapping[str, str]) -> None:
    shown = [name for name in digits if name in columns]
    cells = [[format(columns[name][row], digits[name]) for name in shown] for row in rows]
    table(title.format(len(rows), len(columns["t"])), shown, cells)


def _print_tensors(tensors: Sequence[Mapping[str, Any]], full: bool) -> None:
    shown = tensors if full else tensors[:TENSORS]
    rows = [
        [
            printable(tensor["name"], 100),
            tensor["dtype"],
            " x ".join(map(str, tensor["shape"])) or "-",
            f"{tensor['bytes']:,}",
        ]
        for tensor in shown
    ]
    if len(shown) < len(tensors):
        rows.append([f"... and {len(tensors) - len(shown):,} more; --full prints all", "", "", ""])
    if rows:
        table("tensors", ["name", "type", "shape", "bytes"], rows)


def _print_files(folder: str, files: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        [
            printable(str(Path(f["file"]).relative_to(folder))),
            f["kind"] or "foreign",
            f"{f['bytes']:,}",
            str(len(f["tensors"])),
            f"{f['numbers']:,}",
        ]
        for f in files
    ]
    if rows:
        table("files", ["file", "kind", "bytes", "tensors", "numbers"], rows)


def _print_results(results: Mapping[str, Any]) -> None:
    """Prints the rows of evaluation.json as far as they are rows."""
    rows = results.get("rows")
    rows = rows if isinstance(rows, list) else []
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("values"), dict)]
    if rows:
        names = list(rows[0]["values"])
        cells = [
            [_show(row.get(key), False) for key in ("sampler", "nfe")]
            + [_show(row["values"].get(name), False) for name in names]
            for row in rows
        ]
        table("results", ["sampler", "NFE", *[printable(name, 40) for name in names]], cells)
