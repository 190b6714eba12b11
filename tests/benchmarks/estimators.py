"""What the estimators cost beside plain forward passes of the same network on the same points, and their memory.

python -m tests.benchmarks.estimators [--device cuda] [--official]
"""

import argparse
import resource
import statistics
import sys
import time

import torch
from torch import Tensor

from cdistill.analysis.cost import network_cost, on_meta
from cdistill.data import Source
from cdistill.estimation.autodiff import Autodiff
from cdistill.estimation.base import Estimator, Points
from cdistill.estimation.estimate import solve
from cdistill.estimation.forward import Forward
from cdistill.estimation.settings import EstimationSection
from cdistill.networks.denoiser import Denoiser, chunk_size, count_parameters, freeze
from cdistill.runtime.processes import set_threads
from cdistill.runtime.randomness import generator
from cdistill.schedule import log_uniform_grid
from cdistill.teachers.official import OFFICIAL
from tests.benchmarks.clock import seconds
from tests.edm_teacher import random_denoiser
from tests.quadrature import collect_sums

PROMISED = {"forward": 1.15, "autodiff": 5.0}  # times the forward passes alone
ESTIMATORS: dict[str, Estimator] = {"forward": Forward(), "autodiff": Autodiff()}
SMALLER = {"model_channels": 64, "num_blocks": 2}
PEAK = 989.0  # TFLOP/s of an H100 in half precision, without sparsity


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def images(count: int = 512) -> Source:
    """Smooth random images: what matters here is their shape."""
    coarse = torch.randn(count, 3, 4, 4, generator=generator(0, "benchmark"))
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return Source("benchmark", (smooth * 40 + 128).clamp(0, 255).to(torch.uint8))


def draw(count: int, device: str) -> tuple[Points, Tensor]:
    """Returns `count` points in pairs and their noise level."""
    x0, _ = images().batch(torch.arange(count // 2))
    z = torch.randn(x0.shape, generator=generator(0, "noise"))
    probe = torch.randint(0, 2, (count, *x0.shape[1:]), generator=generator(0, "probe")).float() * 2 - 1
    parts = torch.cat([x0, x0]).to(device), torch.cat([z, -z]).to(device), probe.to(device)
    return Points(*parts, None), torch.full((count,), 0.5, dtype=torch.float64, device=device)


def measure_ratios(denoiser: Denoiser, device: str, repeats: int) -> dict[str, list[float]]:
    """Times of each estimator over those of plain forward passes, measured alternately; a list for each."""
    points, t = draw(chunk_size((3, 32, 32)), device)
    x = points.at(t)

    def plain() -> None:
        with torch.inference_mode():
            denoiser(x, t)

    works = {name: lambda one=one: one.measure(denoiser, points, t) for name, one in ESTIMATORS.items()}
    ratios: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        before = seconds(plain, device)
        for name, work in works.items():
            own = seconds(work, device)
            after = seconds(plain, device)
            if repeat:  # the first warms up
                ratios[name].append(own / ((before + after) / 2))
            before = after
    return ratios


def print_ratios(denoiser: Denoiser, device: str, repeats: int) -> None:
    for name, found in measure_ratios(denoiser, device, repeats).items():
        middle = statistics.median(found)
        verdict = "kept" if middle <= PROMISED[name] else "BROKEN"
        say(
            f"{name}: {middle:.2f} times the forward passes alone ({min(found):.2f} to {max(found):.2f}, "
            f"{len(found)} turns); promised {PROMISED[name]:g}: {verdict}"
        )


def peak_mib(device: str) -> float:
    """Most memory so far, MiB: of this process, or of its tensors on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def print_memory(denoiser: Denoiser, device: str, samples: int) -> None:
    """Peak memory after N samples and after 8 N, in one process whose peak only grows."""
    grid, source = log_uniform_grid(3)[:1], images()
    for name, estimator in ESTIMATORS.items():
        peaks = []
        for count in (samples, 8 * samples):
            collect_sums(estimator, denoiser, source, grid, EstimationSection(samples=count))
            peaks.append(peak_mib(device))
        say(f"{name}: peak {peaks[0]:.0f} MiB with {samples} samples, {peaks[1] - peaks[0]:+.1f} MiB with 8 times")


def print_official(levels: int, samples: int) -> None:
    """Estimates the coefficients of a full-size DDPM++, weights at random, end to end on a GPU."""
    denoiser = freeze(random_denoiser(dict(OFFICIAL["edm-cifar10"].architecture))).to("cuda")
    flop = network_cost(on_meta(denoiser)).forward * levels * samples
    grid, source = log_uniform_grid(levels), images(50_000)
    for title in ("first, compiling", "again"):
        start = time.perf_counter()
        found = collect_sums(Forward(), denoiser, source, grid, EstimationSection(samples=samples))
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
        rate = flop / taken / 1e12
        error = float(solve(Forward(), found, denoiser.sigma_data).s_error.max())
        say(
            f"DDPM++ of {count_parameters(denoiser):,} parameters, {levels} x {samples}, {title}: {taken:.1f} s, "
            f"{rate:.0f} TFLOP/s, {rate / PEAK:.0%} of an H100's {PEAK:g}; largest error of s {error:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--official", action="store_true", help="120 x 4096 on the full-size network; needs CUDA")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", type=int, default=32, help="samples whose memory is measured; 0 for none")
    parser.add_argument("--levels", type=int, default=120)
    parser.add_argument("--samples", type=int, default=4096)
    chosen = parser.parse_args()
    if "cuda" in (chosen.device, "cuda" if chosen.official else "") and not torch.cuda.is_available():
        parser.error("needs a CUDA device; there is none")
    set_threads()
    architecture = {**OFFICIAL["edm-cifar10"].architecture, **SMALLER}
    denoiser = freeze(random_denoiser(architecture)).to(chosen.device)
    cost = network_cost(on_meta(denoiser)).forward / 1e9
    size, threads = count_parameters(denoiser), torch.get_num_threads()
    say(f"DDPM++ of {size:,} parameters, {cost:.1f} GFLOP a forward; {threads} threads")
    if chosen.memory:  # first, and the thriftier estimator first: a process's peak never falls
        print_memory(denoiser, chosen.device, chosen.memory)
    print_ratios(denoiser, chosen.device, chosen.repeats)
    if chosen.official:
        print_official(chosen.levels, chosen.samples)


if __name__ == "__main__":
    main()
