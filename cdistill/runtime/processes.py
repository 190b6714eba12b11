"""Processes and threads: which one prints, how several are started, how many threads each has.

Nothing here imports torch before it is needed: the rank is read from the environment.
"""

import ctypes
import multiprocessing
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from cdistill import __version__
from cdistill.errors import CdistillError
from cdistill.runtime import signals

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_THREADS = 1024  # of one process; torch ends in a segmentation fault with a hundred thousand
_PEER_SIGNS = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "gloo")  # in what torch says
PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "scipy", "scikit-learn")
_GRACE = 30.0  # seconds that the others get to save when one process has failed


def is_main_process() -> bool:
    """Whether this process prints: rank 0 of several, or the only one."""
    return rank() == 0


def rank() -> int:
    """Number of this process among all."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes that the launcher states it started."""
    return _number("WORLD_SIZE", 1, 1)


def thread_count(processes: int | None = None) -> int:
    """Returns the threads of a process: ``$CDISTILL_THREADS``, or its share of the cores among `processes` here."""
    return _number("CDISTILL_THREADS", max(1, _cores() // (processes or local_processes())), 1, MOST_THREADS)


def local_processes() -> int:
    """Number of processes that the launcher started on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, 1)


def calm_threads() -> None:
    """Makes waiting OpenMP threads sleep soon; must run before torch is imported.

    By default they spin for milliseconds, and whoever shares the cores waits for the spinning. Measured on two cores
    (tests/benchmarks/side_by_side.py): two trainings side by side run 2.4 to 3.3 times as fast as with the default, one
    alone 0.91 to 1.08 times. The user's own settings come first.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of giving it back and clearing new pages every time.

    A training step frees and takes the same gigabytes again and again. Measured on two cores: a forward pass of a
    DDPM++ for 32 images runs 1.3 to 1.5 times as fast, and a training (patches) takes 1.2 times the memory. The user's
    own ``MALLOC_*`` settings come first.
    """
    settings = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "LD_PRELOAD")
    if sys.platform != "linux" or any(name in os.environ for name in settings):
        return
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def set_threads() -> None:
    """Sets torch's threads; accelerate's launcher would leave 1, and a change alters the last bits of gradients."""
    import torch

    torch.set_num_threads(thread_count())


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs this program again in `processes` processes on this machine, with torchrun's environment.

    Signals are passed on, so that every process saves before it ends; when one fails, the others are stopped. Not
    `torch.distributed.run`: that ends with 1 whatever code a process ended with, and passes on no SIGUSR1.

    Returns:
        The first failing process's exit code, or 0.
    """
    command = [sys.executable, str(Path(__file__).parents[1]), *arguments]
    if world_size() > 1:
        raise CdistillError("--nproc: this is one of several processes already; leave it to the launcher")
    common = {
        "OMP_NUM_THREADS": thread_count(processes),
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _free_port(),
        signals.PARENT: os.getpid(),
    }
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        _send(children, number)

    for number in signals.EXIT_CODES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    for own_rank in range(processes):
        variables = {**common, "RANK": own_rank, "LOCAL_RANK": own_rank}
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        children.append(subprocess.Popen(command, env=environment, start_new_session=True))
    return _wait(children)


def let_main(work: Callable[[], object], where: Path, accelerator: "Accelerator") -> None:
    """Runs `work`, what only one process may do, in the main one; if that raises, all do, with the same exit code.

    Raises:
        CdistillError: What `work` raised in the main process; in the others one about the file or folder `where`.
    """
    import torch

    failure: CdistillError | None = None
    if accelerator.is_main_process:
        try:
            work()
        except CdistillError as error:
            failure = error
    code = int(accelerator.reduce(torch.tensor(failure.exit_code if failure else 0, device=accelerator.device), "sum"))
    if code and failure is None:
        failure = CdistillError(f"{where}: the main process refused it")
        failure.exit_code = code
    if failure is not None:
        raise failure


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that numbers depend on."""
    return {
        "cdistill": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def this_process() -> dict[str, Any]:
    """Returns what this process is known by, on this machine and on others, as JSON; see `is_gone`."""
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()}


def is_gone(process: Any) -> bool:
    """Whether a process, as `this_process` describes it, has run on this machine and does no longer."""
    import psutil

    try:
        host, number, began = process["host"], int(process["pid"]), float(process["began"])
        if host != socket.gethostname() or number < 1:
            return False
        return bool(abs(psutil.Process(number).create_time() - began) > 2)  # another one has its number now
    except psutil.NoSuchProcess:
        return True
    except (KeyError, TypeError, ValueError, OverflowError, psutil.Error):
        return False


def peer_gone(error: Exception) -> bool:
    """Whether an error is what the others see when one of several processes has died, on this machine or another."""
    text = str(error)
    return world_size() > 1 and isinstance(error, RuntimeError) and any(sign in text for sign in _PEER_SIGNS)


def leave_group() -> None:
    """Takes this process out of its group of processes, if it is in one; must run before the interpreter ends.

    Otherwise a thread of the group may ask for Python's lock when it is too late, and the process aborts with code 134
    whatever its own code: one process in five after a gloo collective, measured with torch 2.15.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def end(code: int) -> NoReturn:
    """Ends this process; one of several at once, because even after `leave_group` one in hundreds aborted (see there).

    All files are closed by then; where there are child processes, the interpreter ends them in its own way.
    """
    if "WORLD_SIZE" in os.environ and not multiprocessing.active_children():
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed by the reader, see `cli.guard`
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; after a failure tells the others to stop, and kills them if they do not."""
    failed, deadline = 0, float("inf")
    while any(child.poll() is None for child in children):
        codes = [child.returncode for child in children if child.returncode]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + _GRACE
            _send(children, signal.SIGTERM)
        if time.monotonic() > deadline:
            _send(children, signal.SIGKILL)
        time.sleep(0.05)
    failed = failed or next((child.returncode for child in children if child.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def _send(children: list[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(name: str, default: int, least: int = 0, most: int = 2**31) -> int:
    """Reads a number from the environment; the default where there is none within the bounds."""
    text = os.environ.get(name, "")
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1
    return number if least <= number <= most else default


def check_environment() -> None:
    """Raises CdistillError unless what the environment says about processes and threads makes sense."""
    bounds = {"RANK": (0, 2**31), "WORLD_SIZE": (1, 2**31), "LOCAL_WORLD_SIZE": (1, 2**31)}
    for name, (least, most) in {**bounds, "CDISTILL_THREADS": (1, MOST_THREADS)}.items():
        if os.environ.get(name) and _number(name, -1, least, most) < 0:
            raise CdistillError(f"${name}: got {os.environ[name]!r}; needs a whole number from {least} to {most:,}")
    alone = {"RANK", "WORLD_SIZE"} & os.environ.keys()
    if len(alone) == 1 or rank() >= world_size():
        raise CdistillError(
            f"launch: $RANK is {os.environ.get('RANK')}, $WORLD_SIZE {os.environ.get('WORLD_SIZE')}; a launcher sets "
            "both, the first below the second: use cdistill distill --nproc N, or unset them"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
