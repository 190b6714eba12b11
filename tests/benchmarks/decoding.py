"""What decoding costs: images a second while an archive is read, and batches from memory and from a mapped file.

python -m tests.benchmarks.decoding
"""

import os
import tempfile
import time
from pathlib import Path

import torch

from cdistill.data import Source, load_source, memory
from cdistill.training.step_data import draw_data
from tests.archives import members, random_images, write_zip

COUNT = 8192
BATCH = 512
SECONDS = 3.0


def load(path: Path, fits: bool) -> tuple[Source, float]:
    """Loads an archive into memory or into a mapped file; returns how many images a second were decoded, too."""
    memory.memory_limit = lambda: float("inf") if fits else 0.0
    start = time.monotonic()
    source = load_source(str(path))
    return source, len(source) / (time.monotonic() - start)


def rate(source: Source) -> float:
    """Returns how many images a second come as training asks for them."""
    draw_data(source, 0, 0, BATCH, True)
    step, start = 1, time.monotonic()
    while time.monotonic() - start < SECONDS:
        draw_data(source, 0, step, BATCH, True)
        step += 1
    return (step - 1) * BATCH / (time.monotonic() - start)


def main() -> None:
    """Prints the rates."""
    from cdistill.runtime.console import table

    torch.set_num_threads(1)
    rows = []
    for side in (32, 64, 256):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CDISTILL_ASSETS"] = folder
            images = random_images(COUNT // (side // 32), side)
            path = write_zip(Path(folder) / "x.zip", members(images, None))
            for name, fits in (("in memory", True), ("mapped", False)):
                source, decoded = load(path, fits)
                rows.append([f"{side}x{side}, {name}", f"{decoded:.0f}", f"{rate(source):.0f}"])
    columns = ["images", "decoded, img/s", "in batches, img/s"]
    table(f"PNG images of noise; batches of {BATCH}, flips included", columns, rows)


if __name__ == "__main__":
    main()
