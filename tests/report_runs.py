"""Folders of runs as distill leaves them, made in no time, for the tests of the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdistill.preconditionings.coefficients import Coefficients, save_coefficients

SEEDS = [3, 4, 5, 6, 7, 8, 9, 20, 21, 22]
METRICS = {
    "frechet-pixels": {"title": "Frechet (pixels)", "better": "lower"},
    "precision": {"title": "Precision", "better": "higher"},
}
VERSIONS = {"cdistill": "0.2.0", "torch": "2.15.0"}


def make_run(
    path: Path, form: str = "analytic", shift: float = 0.0, spread: float = 0.05, calls: tuple[int, ...] = (1, 2)
) -> Path:
    """A finished run; its figures are those of the run before it plus `shift`, their intervals +- `spread`."""
    path.mkdir(parents=True)
    write(path / "recipe.resolved.toml", recipe(form))
    status = {"state": "finished", "kind": "distill", "error": None, "step": 60, "iterations": 60}
    write_json(path / "status.json", status)
    machine = {"device": "cpu", "processes": 1, "threads": 2, "precision": "fp32", "versions": VERSIONS}
    machine["jumps"] = {"levels": [80.0, 2.0, 0.002], "starts": [0.7, 0.3, 0.0], "ends": [0.0, 0.4, 0.6]}
    write_json(path / "env.json", {"command": ["distill", "--out", "my runs/a"], **machine})
    write_json(path / "evaluation.json", evaluation(shift, spread, calls))
    records = [{"step": k, "event": "train", "consistency": 1 / (1 + k), "skipped": 0} for k in range(10, 70, 10)]
    for step in (0, 30, 60):
        rows = [row("student", k, 4 / k - step / 60 + 0.5 + shift, spread) for k in calls]
        records.append({"step": step, "event": "evaluation", "rows": rows})
    write(path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_images(path / "samples" / "step-00000060.npz", calls)
    if form == "analytic":
        write_coefficients(path / "coefficients.safetensors")
    return path


def recipe(form: str) -> str:
    return (
        f'teacher = "digits"\nseed = 7\n\n[preconditioning]\nname = "{form}"\n\n'
        '[training]\nmethod = "ctm"\niterations = 60\nbatch_size = 96\n'
    )


def row(sampler: str, nfe: int, value: float, spread: float) -> dict[str, Any]:
    values = {"frechet-pixels": value, "precision": value / 10}
    ends = {name: [one - spread, one + spread] for name, one in values.items()}
    return {"sampler": sampler, "nfe": nfe, "values": values, "errors": dict.fromkeys(values, 0.02), "intervals": ends}


def evaluation(shift: float = 0.0, spread: float = 0.05, calls: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    rows = [row("teacher (Heun)", 34, 0.25, spread)]
    rows += [row("untrained student", k, 8 / k, spread) for k in calls]
    rows += [row("student", k, 4 / k + shift, spread) for k in calls]
    return {
        "schema": 2, "run": "runs/a", "step": 60, "samples": 200, "seeds": "0..199", "split": "train",
        "teacher": "digits", "teacher_sha256": "ab" * 32, "data_sha256": "cd" * 32, "level": 0.95, "metrics": METRICS,
        "device": "cpu", "versions": VERSIONS, "images": "samples/step-00000060.npz", "rows": rows,
    }  # fmt: skip


def images(index: int, channels: int = 1, side: int = 8) -> np.ndarray:
    """Images (10, C, side, side), other ones for each index, and no two of them alike."""
    return np.random.default_rng(index).integers(0, 256, (len(SEEDS), channels, side, side), np.uint8)


def write_images(path: Path, calls: tuple[int, ...], channels: int = 1, side: int = 8) -> None:
    path.parent.mkdir(exist_ok=True)
    arrays = {f"nfe{k}": images(k, channels, side) for k in calls}
    np.savez(path, seeds=np.array(SEEDS), teacher=images(0, channels, side), **arrays)


def write_coefficients(path: Path) -> None:
    t = torch.logspace(1.9, -2.7, 30, dtype=torch.float64)
    levels = t[::5]
    pairs = torch.tensor([[float(a), float(b)] for a in levels for b in levels if b < a], dtype=torch.float64)
    f = pairs[:, 1] / pairs[:, 0]
    small = torch.full_like(f, 0.01)
    jumps = {"pairs": pairs, "f": f, "f_error": small, "g": 1 - f, "g_error": small}
    behind = {"l_error": t / 5000, "s_error": t / 4000, **jumps}
    header = {"teacher": "digits", "estimator": "forward", "samples": 64}
    save_coefficients(path, Coefficients(t, 1 / (1 + t), -t / 100), behind, header)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value))


def change_json(path: Path, **values: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **values})
