"""Kills a run that follows trajectories and trains on them; compares it with an uninterrupted one, bit for bit.

python -m tests.benchmarks.kill_store --kills 20 --seed 0

Half of the kills come while the store is written, half while it is read by a training. Prints where they hit and what
differs at the end, and ends with 1 if anything does.
"""

import argparse
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

from cdistill.runtime.console import table
from tests.runner import final_state, finish, kill, start, steps_of

SHARDS, STEPS = 12, 160
SETS = [
    "objective.name=regression", "objective.dsm=false", "objective.points=6", f"trajectories.count={256 * SHARDS}",
    f"training.iterations={STEPS}", "training.batch_size=16", "preconditioning.name=ctm", "checkpoint.every=10",
    "evaluation.samples=16", "evaluation.nfe=[1]",
]  # fmt: skip


def arguments_of(run: Path) -> list[str]:
    return ["distill", "--recipe", "digits", "--out", str(run), *(word for one in SETS for word in ("--set", one))]


def store_of(assets: Path) -> dict[str, bytes]:
    """The shards, and whatever else is not a record of times."""
    files = assets.glob("trajectories/*/*")
    return {path.name: path.read_bytes() for path in files if path.suffix not in (".json", ".lock")}


def main() -> None:
    """Runs, kills, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-store-"))
    run, assets = folder / "killed", folder / "assets"
    places: collections.Counter[str] = collections.Counter()
    while places.total() < options.kills:
        reading = places.total() >= options.kills // 2
        if not reading and len(store_of(assets)) >= SHARDS:
            for path in list(assets.glob("trajectories/*/*.safetensors"))[2:]:  # so that there is more to write
                path.unlink()
        process = start(arguments_of(run), folder, CDISTILL_ASSETS=str(assets))
        known = (len(store_of(assets)), steps_of(run)[-1:])
        while process.poll() is None and known == (len(store_of(assets)), steps_of(run)[-1:]):
            time.sleep(0.01)
        deadline = time.monotonic() + draw.uniform(0, 2)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        place = "reading" if steps_of(run) else "writing" if len(store_of(assets)) < SHARDS else "between"
        kill(process)
        places[place] += 1
        sys.stderr.write(f"kill {places.total()}: {place}; {len(store_of(assets))} files, steps {steps_of(run)[-1:]}\n")
    last = finish(arguments_of(run), folder, CDISTILL_ASSETS=str(assets))
    whole = finish(arguments_of(folder / "whole"), folder, CDISTILL_ASSETS=str(folder / "other"))
    assert last.returncode == whole.returncode == 0, last.stderr + whole.stderr
    same = {
        "store": store_of(assets) == store_of(folder / "other"),
        "student": final_state(run) == final_state(folder / "whole"),
    }
    table("killed while", ["", "kills"], [[name, str(count)] for name, count in places.most_common()])
    table("at the end", ["", ""], [[name, "same" if equal else "DIFFERENT"] for name, equal in same.items()])
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
