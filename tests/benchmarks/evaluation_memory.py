"""How much memory the evaluation of 50,000 images of 32x32 takes above the feature network's own.

    python -m tests.benchmarks.evaluation_memory [IMAGES] [FEATURES] [METRICS]

A random convolution stands in for Inception. What counts begins with the images, samples and data, which are held in
memory too.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cdistill.data import Source
from cdistill.evaluation.features import FeatureNetwork, extracting
from cdistill.evaluation.metrics import SampleSet
from cdistill.evaluation.references import Reference
from cdistill.registry import METRICS
from cdistill.runtime.processes import thread_count
from cdistill.runtime.randomness import generator

NAMES = "fid,kid,precision,recall"


class Convolution(FeatureNetwork):
    """ReLU of a random convolution, averaged over the places.

    Args:
        features: How many.
    """

    name = "random convolution"

    def __init__(self, features: int) -> None:
        self.weight = torch.randn(features, 3, 8, 8, generator=generator(0, "weight")) / 14

    def __call__(self, images: Tensor) -> Tensor:
        with extracting():
            return F.conv2d(images / 127.5 - 1, self.weight, stride=8).relu().mean((2, 3))


def memory(field: str) -> float:
    """Returns VmRSS (now) or VmHWM (most so far) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def random_images(count: int, name: str) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator(0, name))


def measure(count: int, features: int, names: str) -> dict[str, object]:
    """Evaluates `count` random images against as many; returns figures, seconds and MiB above the network's own."""
    torch.set_num_threads(thread_count())
    network = Convolution(features)
    metrics = {name: METRICS.get(name)(network) for name in names.split(",")}
    torch.linalg.svd(torch.randn(64, 64).double())
    network(random_images(64, "warm"))
    Path("/proc/self/clear_refs").write_text("5")  # the most so far begins anew
    before = memory("VmRSS")
    samples = SampleSet(random_images(count, "samples"))
    reference = Reference(Source("random", random_images(count, "data")))
    figures, seconds, peaks = {}, {}, {}
    for name, metric in metrics.items():
        metric.check(reference)
        begin = time.perf_counter()
        found = metric(samples, reference)
        figures[name], seconds[name] = [found.value, found.error], time.perf_counter() - begin
        peaks[name] = memory("VmHWM") - before
    return {"images": count, "features": features, "figures": figures, "seconds": seconds, "peak_mib": peaks}


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    found = measure(int(given.get(1, 50_000)), int(given.get(2, 2048)), given.get(3, NAMES))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
