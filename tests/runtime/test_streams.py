"""Results and training never depend on whether somebody reads what is printed."""

import subprocess
import sys
from pathlib import Path

import pytest

from cdistill.runtime.streams import SteadyStream
from tests.conftest import FAST, command, environment

SMALL = [*FAST, "training.iterations=2", "evaluation.samples=16", "preconditioning.name=ctm"]
DISTILL = ["distill", "--recipe", "mixture", "--out", "r", *(word for value in SMALL for word in ("--set", value))]
EVALUATE = ["evaluate", "--teacher", "mixture-1d", "--samples", "64"]


def shell(arguments: list[str], redirection: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    text = f'set -o pipefail; "$@" {redirection}'
    return subprocess.run(
        ["bash", "-c", text, "bash", *command(arguments)], cwd=cwd, env=environment(**variables), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["| true", "2>&1 | true", ">&-", ">&- 2>&-", "2>&-"])
def test_a_training_needs_no_reader(tmp_path, redirection):
    found = shell(DISTILL, redirection, tmp_path)
    assert found.returncode == 0, found
    assert (tmp_path / "r" / "evaluation.json").is_file()
    assert "Traceback" not in found.stderr
    assert "Exception ignored" not in found.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_an_error_after_the_work(tmp_path):
    found = shell(EVALUATE, "> /dev/full", tmp_path)
    assert found.returncode == 7
    assert "error: standard output: No space left on device; the results are in files only" in found.stderr
    assert len(list(tmp_path.glob("**/evaluation-*.json"))) == 1
    assert shell(EVALUATE, "2> /dev/full", tmp_path).returncode == 0


def test_signs_that_a_terminal_lacks_are_written_in_others(tmp_path):
    found = shell(EVALUATE, "", tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert found.returncode == 0, found.stderr
    assert "+-" in found.stdout


def test_the_first_error_is_kept_and_nothing_is_raised():
    class Broken:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def fileno(self) -> int:
            raise ValueError("none")

        def isatty(self) -> bool:
            return True

        def flush(self) -> None:
            raise AssertionError("after an error nothing is tried")

    stream = SteadyStream(Broken())
    assert stream.isatty()
    print("text", file=stream)
    assert isinstance(stream.error, BrokenPipeError)
    assert not stream.isatty()
    stream.flush()


def test_it_stands_in_for_the_stream(capsys):
    stream = SteadyStream(sys.stdout)
    print("text", file=stream, flush=True)
    assert (capsys.readouterr().out, stream.error, stream.writable()) == ("text\n", None, True)
