"""Whether the stated intervals are right: two runs are measured on many disjoint blocks of seeds.

python -m tests.benchmarks.coverage runs/digits runs/digits-ctm --nfe 2 --samples 1000 --blocks 100

For each metric, and for the difference between the runs: the spread over the blocks divided by the mean standard error
(1 is right), and how many of the 95 % intervals hold the mean over all *other* blocks.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from cdistill.evaluation.estimates import LEVEL, Estimate, difference, quantile
from cdistill.evaluation.evaluator import Evaluator
from cdistill.sampling.samplers import make_sampler
from cdistill.training.loop import make_accelerator
from cdistill.workflows.targets import LoadedTarget, Target, load_target


def measure(target: LoadedTarget, block: int, nfe: int) -> dict[str, Estimate]:
    """Returns the figures of a block of seeds."""
    section = target.section.model_copy(update={"first_seed": block * target.section.samples})
    accelerator = make_accelerator("fp32")
    denoiser, preconditioning = target.student
    source = target.source(accelerator)
    evaluator = Evaluator(section, target.shape, denoiser.known_classes, None, source, accelerator)
    sampler = make_sampler(denoiser, preconditioning, nfe=nfe)
    return dict(evaluator.measure("student", nfe, evaluator.draw(sampler, f"block {block}")).estimates)


def report(name: str, found: list[Estimate]) -> None:
    """Prints the spread and the coverage of one figure over all blocks."""
    values = torch.tensor([part.value for part in found], dtype=torch.float64)
    errors = torch.tensor([part.error for part in found], dtype=torch.float64)
    blocks = len(found)
    others = (values.sum() - values) / (blocks - 1)
    width = quantile(LEVEL) * (errors.square() + values.var() / (blocks - 1)).sqrt()  # the target has an error as well
    hits = float(((values - others).abs() <= width).double().mean())
    expected = math.sqrt(LEVEL * (1 - LEVEL) / blocks)
    sys.stdout.write(
        f"{name:40} mean {values.mean():.5g}  spread {values.std():.3g}  stated {errors.mean():.3g}  "
        f"ratio {values.std() / errors.mean():.3f} +- {1 / math.sqrt(2 * (blocks - 1)):.3f}  "
        f"coverage {hits:.3f} (0.95 +- {expected:.3f})\n"
    )  # fmt: skip
    sys.stdout.flush()


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--nfe", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--metrics", default="frechet-pixels")
    parser.add_argument("--features", default="pixels")
    options = parser.parse_args()
    changes = {"samples": options.samples, "metrics": options.metrics.split(","), "features": options.features}
    targets = [load_target(Target(str(run), changes=changes)) for run in options.runs]
    found = [[measure(target, block, options.nfe) for block in range(options.blocks)] for target in targets]
    for metric in changes["metrics"]:
        columns = [[block[metric] for block in blocks] for blocks in found]
        for run, column in zip(options.runs, columns, strict=True):
            report(f"{run.name}, {metric}, {options.nfe} NFE", column)
        for run, column in zip(options.runs[1:], columns[1:], strict=True):
            pairs = zip(column, columns[0], strict=True)
            report(f"{run.name} - {options.runs[0].name}", [difference(a, b) for a, b in pairs])


if __name__ == "__main__":
    main()
