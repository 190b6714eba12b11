"""Reads random points of a store of CIFAR-10's size as a training does; says how many images a second come.

python -m tests.benchmarks.trajectories --count 50000 --folder DIR

The numbers of the store are noise: what is timed is reading. Once with the files in memory as far as they fit, once
after they were pushed out of it. Beside it stands what the fastest objective needs (regression without DSM, 3 forwards
of EDM's network an image) on a device that sustains so many TFLOP/s.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from cdistill.objectives.pairs import draw_times
from cdistill.runtime.console import table
from cdistill.runtime.randomness import generator
from cdistill.sampling.trajectories import SHARD, TrajectoryStore
from cdistill.schedule import rho_grid
from cdistill.storage.checkpoints import save_tensors
from cdistill.training.step_data import draw_points

SHAPE, POINTS, BATCH = (3, 32, 32), 18, 512
FLOP = 127.2e9  # of an image: forward and backward of DDPM++ at 32x32, as `cdistill plan --recipe cifar10` counts
DEVICES = (42, 300)  # TFLOP/s: an A800 of the paper, and a generous H100


def make(folder: Path, count: int) -> TrajectoryStore:
    """Writes the shards that are missing."""
    identity = {"levels": rho_grid(POINTS).tolist(), "precision": "fp16", "classes": None}
    store = TrajectoryStore(folder, identity, count, SHAPE, 0.5)
    for path in store.missing():
        first = int(path.stem)
        points = torch.randn(SHARD, POINTS, *SHAPE, generator=generator(first, "points")).half()
        columns = {"points": points, "labels": torch.zeros(SHARD, dtype=torch.int64)}
        save_tensors(path, columns, "trajectories", {"identity": store.identity, "first": first})
    return store


def evict(store: TrajectoryStore) -> None:
    """Asks the system to drop the files from its cache."""
    for path in store.shards:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(store: TrajectoryStore, steps: int) -> float:
    """Images a second: two points of a random trajectory each."""
    grid, begun = rho_grid(POINTS), time.monotonic()
    for index in range(steps):
        i, _, j = draw_times("uniform", POINTS, POINTS - 1, BATCH, generator(index, "levels"))
        draw_points(store, 0, index, BATCH, slice(0, BATCH), {"t": grid[i], "s": grid[j]})
    return steps * BATCH / (time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    store = make(arguments.folder, arguments.count)
    begun = time.monotonic()
    store.open(Accelerator(cpu=True))
    size = sum(path.stat().st_size for path in store.shards)
    checked = time.monotonic() - begun
    evict(store)
    cold, warm = rate(store, arguments.steps), rate(store, arguments.steps)
    rows = [
        ["size", f"{size / 1e9:.2f} GB"],
        ["checking it at the start", f"{checked:.1f} s, {size / checked / 1e9:.2f} GB/s"],
        ["images/s, not in memory", f"{cold:,.0f}"],
        ["images/s, the same again", f"{warm:,.0f}"],
    ]
    for tflops in DEVICES:
        needed = tflops * 1e12 / FLOP
        rows.append(
            [f"needed at {tflops} TFLOP/s", f"{needed:,.0f}: {cold / needed:.1f} and {warm / needed:.1f} times"]
        )
    table("reading kept trajectories", ["what", "how much"], rows)


if __name__ == "__main__":
    main()
