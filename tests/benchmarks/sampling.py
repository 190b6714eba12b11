"""How much of the images/s of the bare network calls is left when samples are drawn and written; and the peak memory.

python -m tests.benchmarks.sampling [--device cuda] [--threads 1] [--memory]

Alternately, on the same number of images: the calls of the free network alone, one after the other, on inputs that are
there already; then everything that `cdistill sample` does for them: noise, labels, float64 states, finished shards on
the disk, and the files. A ratio of 1 means that nothing is lost; on a CPU with several threads it may be more, because
samples are drawn in threads of their own. Besides the wall's the ratio of the CPU times of all threads is printed.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cdistill.networks.denoiser import EDMDenoiser, chunk_size, count_parameters, freeze
from cdistill.preconditionings import make_preconditioning
from cdistill.registry import WRITERS
from cdistill.runtime.console import table
from cdistill.runtime.processes import keep_memory, set_threads, thread_count
from cdistill.sampling.drawing import Sampler, chunks_together
from cdistill.sampling.sample_store import SampleStore
from cdistill.sampling.samplers import make_sampler
from cdistill.sampling.writers import Samples
from cdistill.teachers import load_teacher
from cdistill.teachers.official import OFFICIAL
from cdistill.training.loop import make_accelerator
from tests.benchmarks.clock import both_seconds
from tests.benchmarks.estimators import say
from tests.benchmarks.training import SMALL
from tests.edm_teacher import random_denoiser

FORMS = ("npz", "png", "zip", "tar")
HEUN_CALLS = 34


def networks() -> dict[str, EDMDenoiser]:
    """Returns the teachers that ship with the package, and a DDPM++ for 32x32 pixels."""
    found = {name: load_teacher(name).denoiser for name in ("digits", "patches")}
    found["DDPM++"] = freeze(random_denoiser({**OFFICIAL["edm-cifar10"].architecture, **SMALL}))
    return found


def bare(denoiser: EDMDenoiser, count: int, calls: int, device: str) -> Callable[[], None]:
    """Returns what calls the free network so often on so many images."""
    size = chunk_size(denoiser.sample_shape) * chunks_together(denoiser.sample_shape, device, None)
    x = torch.randn(size, *denoiser.sample_shape, device=device)
    t = torch.ones(size, device=device)
    labels = torch.zeros(size, dtype=torch.int64, device=device) if denoiser.num_classes else None

    def work() -> None:
        with torch.inference_mode():
            for _ in range(calls * count // size):
                denoiser.model(x, t, None, labels)

    return work


def whole(denoiser: EDMDenoiser, sampler: Sampler, count: int, form: str, root: Path) -> Callable[[], None]:
    """Returns what draws and writes so many images, in a new folder below `root` each time."""
    threads = torch.get_num_threads()
    accelerator = make_accelerator("fp32")
    torch.set_num_threads(threads)  # which accelerate and we have changed
    shape, seeds = denoiser.sample_shape, range(count)

    def work() -> None:
        folder = Path(tempfile.mkdtemp(dir=root))
        store = SampleStore(folder / "shards", {}, shape)
        store.draw(sampler, seeds, denoiser.known_classes.shares, accelerator, "samples")
        writer = WRITERS.get(form)()
        samples = Samples(np.array(seeds), shape, partial(store.read, seeds))
        writer.write(folder / f"found{writer.suffix}", samples)
        store.remove()

    return work


def measure(name: str, denoiser: EDMDenoiser, calls: int, form: str, device: str, scale: int) -> list[str]:
    """Returns a line of the table."""
    if calls == HEUN_CALLS:
        sampler = make_sampler(denoiser, None)
    else:
        sampler = make_sampler(denoiser, make_preconditioning("ctm"), nfe=calls)
    size = chunk_size(denoiser.sample_shape) * chunks_together(denoiser.sample_shape, device, None)
    chunks = max(1, scale * (2 if name == "DDPM++" else 64) // calls)
    count = size * chunks
    plain = bare(denoiser, count, calls, device)
    with tempfile.TemporaryDirectory() as folder:
        full = whole(denoiser, sampler, count, form, Path(folder))
        rounds = [(both_seconds(plain, device), both_seconds(full, device)) for _ in range(3 if chunks > 1 else 2)]
    walls, works = zip(*[(p[0] / f[0], p[1] / f[1]) for p, f in rounds], strict=True)
    rate = count / statistics.median(full[0] for _, full in rounds)
    what = "Heun" if calls == HEUN_CALLS else f"{calls} NFE"
    return [
        f"{name}, {what}, {form}", str(count), f"{rate:.0f}", f"{statistics.median(walls):.3f}",
        f"{statistics.median(works):.3f}",
    ]  # fmt: skip


MEMORY = """
import resource, sys
from functools import partial
from pathlib import Path
from cdistill.cli.app import run
code = run(["-q", "sample", *sys.argv[1:]])
sys.stderr.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")
sys.exit(code)
"""


def peak(student: Path, count: int, form: str) -> int:
    """Returns the largest memory in MiB of a process that samples so many images."""
    with tempfile.TemporaryDirectory() as out:
        arguments = ["--run", str(student), "--nfe", "1", "--seeds", f"0-{count - 1}", "--format", form, "--out", out]
        found = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
    return int(found.stderr.split()[-1])


def print_memory() -> None:
    """Prints the peak memory of sampling more and more images by a small student."""
    from cdistill.storage.checkpoints import save_tensors
    from tests.workflows.test_sample import TINY

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.safetensors"
        header = {"architecture": TINY, "sigma_data": 0.5, "preconditioning": "ctm"}
        save_tensors(path, random_denoiser(TINY).state_dict(), "student", header)
        rows = [[form, *[str(peak(path, count, form)) for count in (500, 5_000, 50_000)]] for form in FORMS]
    table("peak memory of `cdistill sample` in MiB, a network of 8x8 pixels", ["form", "500", "5,000", "50,000"], rows)


def main() -> None:
    """Prints the ratios, or the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="of torch; all by default")
    parser.add_argument("--scale", type=int, default=1, help="times as many images")
    parser.add_argument("--network", help="digits, patches or DDPM++; all by default")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory instead")
    chosen = parser.parse_args()
    if chosen.memory:
        return print_memory()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA device; there is none")
    keep_memory()
    set_threads()
    rows = []
    for name, denoiser in networks().items():
        if chosen.network in (None, name):
            torch.set_num_threads(chosen.threads or thread_count())
            say(f"{name}: {count_parameters(denoiser):,} parameters, {torch.get_num_threads()} threads")
            denoiser.to(chosen.device)
            for calls in (1, 2, 5, HEUN_CALLS):
                for form in FORMS if calls == 1 else FORMS[:1]:
                    rows.append(measure(name, denoiser, calls, form, chosen.device, chosen.scale))
                    say("   ".join(rows[-1]))
    columns = ["network, sampler, format", "images", "img/s", "of the bare calls (wall)", "(CPU time)"]
    return table("samples drawn and written, against the network's calls alone", columns, rows)


if __name__ == "__main__":
    main()
