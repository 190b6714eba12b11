"""What decoding costs: batches of images in memory against decoding them from a zip archive when they are asked for.

python -m tests.benchmarks.decoding
"""

import os
import tempfile
import time
from pathlib import Path

import torch

from cdistill.data import Source, load_source
from cdistill.training.step_data import draw_data
from tests.archives import members, random_images, write_zip

COUNT = 8192
BATCH = 512
SECONDS = 3.0
PAUSE = 0.5  # what a step computes meanwhile


def load(path: Path, memory: str, workers: int) -> Source:
    """Loads an archive with `memory` GiB for its images."""
    os.environ |= {"CDISTILL_DATA_MEMORY": memory, "CDISTILL_WORKERS": str(workers)}
    return load_source(str(path))


def rate(source: Source) -> float:
    """Returns how many images a second come as training asks for them."""
    draw_data(source, 0, 0, BATCH, True)  # decoding processes start here
    step, start = 1, time.monotonic()
    while time.monotonic() - start < SECONDS:
        draw_data(source, 0, step, BATCH, True)
        step += 1
    return (step - 1) * BATCH / (time.monotonic() - start)


def waiting(source: Source, pause: float) -> float:
    """Returns the seconds that a step waits for its batch when it computes for `pause` seconds meanwhile."""
    draw_data(source, 0, 0, BATCH, True)
    waited = 0.0
    for step in range(1, 6):
        time.sleep(pause)
        start = time.monotonic()
        draw_data(source, 0, step, BATCH, True)
        waited += time.monotonic() - start
    return waited / 5


def main() -> None:
    """Prints the rates and their ratios."""
    from cdistill.runtime.console import table

    torch.set_num_threads(1)
    rows = []
    for side in (32, 64):
        with tempfile.TemporaryDirectory() as folder:
            path = write_zip(Path(folder) / "x.zip", members(random_images(COUNT, side), None))
            sources = {"in memory": load(path, "4", 0)}
            sources |= {f"decoded, {workers} workers": load(path, "0", workers) for workers in (0, 1, 2)}
            rates = {name: rate(source) for name, source in sources.items()}
            for name, found in rates.items():
                slower = f"{rates['in memory'] / found:.1f}"
                waits = f"{1000 * waiting(sources[name], PAUSE):.1f}"
                rows.append([f"{side}x{side}, {name}", f"{found:.0f}", slower, waits])
    columns = ["images", "img/s", "times slower", f"ms to wait for a batch after {PAUSE} s"]
    table(f"batches of {BATCH} PNG images of noise, flips included", columns, rows)


if __name__ == "__main__":
    main()
