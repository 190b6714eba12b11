"""What spinning threads cost: one training step alone and two side by side, with libgomp's default and with ours.

python -m tests.benchmarks.side_by_side
"""

import os
import subprocess
import sys
import time

SECONDS = 8.0


def work() -> float:
    """Returns how many times a second a small step is done: ten teacher forwards, one student forward and backward."""
    import torch

    from cdistill.runtime.processes import set_threads
    from cdistill.teachers import load_teacher

    set_threads()
    teacher = load_teacher("patches").denoiser
    student = teacher.student()
    x, t = torch.randn(96, 1, 12, 12), torch.ones(96, dtype=torch.float64)
    count, start = 0, time.monotonic()
    while time.monotonic() - start < SECONDS:
        with torch.no_grad():
            for _ in range(10):
                teacher(x, t)
        student(x, t, t / 2).square().mean().backward()
        count += 1
    return count / (time.monotonic() - start)


def rates(processes: int, spin: str | None) -> list[float]:
    """Runs `work` in several processes at once and returns their rates."""
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": spin} if spin else {}
    command = [sys.executable, "-m", "tests.benchmarks.side_by_side", "work"]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return [float(process.communicate()[0]) for process in started]


def main() -> None:
    """Prints the rates and their ratios."""
    from cdistill.runtime.console import table

    rows = []
    for processes in (1, 2):
        default, ours = (sum(rates(processes, spin)) for spin in (None, "1000"))
        rows.append([str(processes), f"{default:.2f}", f"{ours:.2f}", f"{ours / default:.2f}"])
    table("steps a second, all processes together", ["processes", "default", "GOMP_SPINCOUNT=1000", "ratio"], rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        sys.stdout.write(str(work()))
    else:
        main()
