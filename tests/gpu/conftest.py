"""A GPU, or one that is pretended; and the table in which a session on a GPU ends, to be pasted into an issue.

pytest tests/gpu -n 0      on a machine with one or more GPUs, at most 15 minutes
"""

import platform
from collections.abc import Callable, Iterator

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState

from cdistill import __version__
from cdistill.runtime.devices import compiles
from tests import pretended_cuda

ROWS = pytest.StashKey[list[tuple[str, str, str]]]()
REAL = torch.cuda.is_available()


@pytest.fixture
def cuda(monkeypatch) -> Iterator[None]:
    """A CUDA device, which is pretended where there is none; an accelerator of its own for every test."""
    if not (REAL or pretended_cuda.LOADED[0]):
        pytest.skip("needs a CUDA device, or a C++ compiler to pretend one")
    compiles.cache_clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    if REAL:
        yield
    else:
        with pretended_cuda.pretended(monkeypatch):
            yield
    AcceleratorState._reset_state(reset_partial_state=True)
    compiles.cache_clear()


@pytest.fixture
def device(cuda) -> pretended_cuda.Device:
    """The pretended device."""
    return pretended_cuda.ACTIVE[-1]


@pytest.fixture
def measured(request) -> Callable[[str, str, str], None]:
    """Takes a row of the table: what was measured, the value, and what it is held against."""
    rows = request.config.stash.setdefault(ROWS, [])
    return lambda *row: rows.append(row)


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Writes the table of a session on a GPU."""
    rows = config.stash.get(ROWS, [])
    if not (REAL and rows):
        return
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    outcomes = [(kind, len(terminalreporter.getreports(kind))) for kind in ("passed", "failed", "error")]
    terminalreporter.section("for an issue, with what failed above")
    lines = [
        f"**{len(names)} x {names[0]}**, cdistill {__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"accelerate {accelerate.__version__}, Python {platform.python_version()}; "
        + ", ".join(f"{count} {kind}" for kind, count in outcomes if count),
        "",
        "| | measured | held against |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    for line in lines:
        terminalreporter.write_line(line)
