"""`cdistill estimate-coeffs` as a whole: processes, kills, comparisons, bad input, files, and its use by `distill`."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cdistill.cli.app import run
from cdistill.errors import CdistillError, StoppedError
from cdistill.estimation.base import standard_error
from cdistill.estimation.estimate import CoefficientEstimate, load_estimate
from cdistill.preconditionings import load_preconditioning, make_preconditioning
from cdistill.preconditionings.coefficients import load_coefficients
from cdistill.registry import ESTIMATORS
from cdistill.runtime import signals
from cdistill.storage.checkpoints import load_tensors, save_tensors
from cdistill.storage.run_folder import held
from cdistill.workflows import distill as training
from cdistill.workflows import estimate as estimation
from tests.conftest import FAST, command, environment

MIXTURE = ["-q", "estimate-coeffs", "--teacher", "mixture-1d", "--samples", "128", "--timesteps", "8"]
DIGITS = ["-q", "estimate-coeffs", "--teacher", "digits", "--timesteps", "6"]
# A command whose unfinished statistics are written at every noise level, so that a test knows how far it has come.
SAVING = (
    "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
    "import cdistill.estimation.collecting as collecting; collecting._SAVE_EVERY = 0.0\n"
    "from cdistill.cli.app import run; sys.exit(run(sys.argv[1:]))"
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """An empty folder, and no picture of every estimate, which takes longer than the estimate."""
    monkeypatch.chdir(tmp_path)
    for module in (estimation, training):
        monkeypatch.setattr(module, "draw_coefficients", lambda path, estimate: None)


@pytest.fixture
def fails(capsys) -> Callable[..., tuple[int, str]]:
    """Runs a command that must fail: returns its exit code and its error, one line."""

    def check(*arguments: str) -> tuple[int, str]:
        code = run(arguments)
        text = capsys.readouterr().err
        assert "Traceback" not in text
        assert len(text.strip().splitlines()) == 1, text
        return code, text

    return check


def estimated(*arguments: str, out: str = "whole.safetensors") -> bytes:
    """The file that an uninterrupted command writes, in this process."""
    assert run([*arguments, "--out", out]) == 0
    return Path(out).read_bytes()


def parts() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir() if ".part-" in path.name)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def start_saving(*arguments: str) -> subprocess.Popen[str]:
    return start([sys.executable, "-c", SAVING, str(Path(__file__).parents[2]), *arguments])


def wait_for_pairs(name: str, pairs: int, process: subprocess.Popen[str]) -> None:
    """Waits until a part file holds so many (sample, timestep) pairs of the round in progress."""
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        if Path(name).is_file():
            tensors, _ = load_tensors(Path(name), "unfinished statistics")
            if len(tensors["ends"]) or int(tensors["place"][2]) >= pairs:
                return
        time.sleep(0.01)


def stop_after(monkeypatch, levels: int) -> None:
    """Makes the flag of a SIGTERM appear when so many noise levels of chunks are done."""
    asked = itertools.count()
    monkeypatch.setattr(signals, "requested", lambda: int(signal.SIGTERM) * (next(asked) >= levels))


def interrupted(monkeypatch, *arguments: str) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert run(arguments) == 75


# --- several processes ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "samples", "target"),
    [("autodiff", "384", "0.01"), ("forward", "192", None)],
)
def test_two_processes_are_one(estimator, samples, target, run_cli):
    arguments = [*DIGITS, "--samples", samples, "--estimator", estimator]
    arguments += [] if target is None else ["--target-error", target]
    done = run_cli(*arguments, "--out", "two.safetensors", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert parts() == []
    estimated(*arguments, out="one.safetensors")
    one, two = (load_estimate(Path(f"{name}.safetensors")) for name in ("one", "two"))
    for mine, other in zip(numbers_of(one), numbers_of(two), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=0)
    assert one.sums.samples.tolist() == two.sums.samples.tolist()
    assert (len(set(one.sums.samples.tolist())) > 1) == (target is not None)
    assert one.header == two.header


def numbers_of(estimate: CoefficientEstimate) -> tuple[torch.Tensor, ...]:
    return estimate.coefficients.l, estimate.coefficients.s, estimate.l_error, estimate.s_error


# --- kills, signals, and going on ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "more"),
    [
        (signal.SIGKILL, -9, ["--samples", "192", "--estimator", "autodiff"]),
        (signal.SIGKILL, -9, ["--samples", "320", "--estimator", "forward", "--target-error", "0.02"]),
        (signal.SIGTERM, 75, ["--samples", "320", "--estimator", "forward"]),
        (signal.SIGUSR1, 75, ["--samples", "320", "--estimator", "autodiff", "--target-error", "0.02"]),
        (signal.SIGINT, 130, ["--samples", "192", "--estimator", "autodiff"]),
    ],
    ids=["kill-autodiff", "kill-forward-target", "term-forward", "usr1-autodiff-target", "ctrl-c-autodiff"],
)
def test_stopped_in_the_middle_and_repeated_is_uninterrupted_bit_for_bit(number, code, more):
    arguments = [*DIGITS, *more]
    process = start_saving(*arguments, "--out", "c.safetensors")
    wait_for_pairs(".c.safetensors.part-0-of-1", 400, process)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert not Path("c.safetensors").exists()
    assert parts() == [".c.safetensors.part-0-of-1"]
    if number != signal.SIGKILL:
        assert "run the same command to resume" in errors
        assert len(errors.strip().splitlines()) == 1
    assert estimated(*arguments, out="c.safetensors") == estimated(*arguments)
    assert parts() == []


@pytest.mark.slow
def test_two_processes_stop_together_on_a_signal_and_go_on(run_cli):
    arguments = [*DIGITS, "--samples", "1024", "--target-error", "1e-9", "--nproc", "2"]
    process = start(command([*arguments, "--out", "c.safetensors"]))
    wait_for_pairs(".c.safetensors.part-0-of-2", 800, process)  # the first round is done
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.count("run the same command to resume") == 1
    assert "Traceback" not in errors
    assert not Path("c.safetensors").exists()
    assert parts() == [".c.safetensors.part-0-of-2", ".c.safetensors.part-1-of-2"]
    for name in ("c", "whole"):
        done = run_cli(*arguments, "--out", f"{name}.safetensors")
        assert done.returncode == 0, done.stderr
    assert parts() == []
    assert Path("c.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        ["--seed", "1"], ["--estimator", "autodiff"], ["--samples", "130"], ["--timesteps", "9"], ["--grid", "rho"],
        ["--precision", "fp16"], ["--target-error", "0.5"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_another_command_starts_afresh(changed, monkeypatch):
    interrupted(monkeypatch, *MIXTURE, "--out", "c.safetensors")
    assert parts() == [".c.safetensors.part-0-of-1"]
    assert estimated(*MIXTURE, *changed, out="c.safetensors") == estimated(*MIXTURE, *changed)
    assert parts() == []


def test_another_teacher_or_other_data_start_afresh(monkeypatch):
    arguments = ["-q", "estimate-coeffs", "--samples", "64", "--timesteps", "6"]
    interrupted(monkeypatch, *arguments, "--teacher", "patches", "--out", "c.safetensors")
    assert estimated(*arguments, "--teacher", "digits", out="c.safetensors") == estimated(
        *arguments, "--teacher", "digits"
    )
    interrupted(monkeypatch, *arguments, "--teacher", "digits", "--data", "teacher:64", "--out", "c.safetensors")
    assert parts() == [".c.safetensors.part-0-of-1"]
    assert estimated(*arguments, "--teacher", "digits", out="c.safetensors") == Path("whole.safetensors").read_bytes()
    assert parts() == []


@pytest.mark.parametrize("key", ["device", "versions"])
def test_work_begun_on_another_device_or_version_starts_afresh(key, monkeypatch):
    """A GPU takes eight blocks in a chunk, a CPU one: the numbers of chunks mean something else there."""
    interrupted(monkeypatch, *MIXTURE, "--out", "c.safetensors")
    part = Path(".c.safetensors.part-0-of-1")
    tensors, header = load_tensors(part, "unfinished statistics")
    header["identity"][key] = "cuda" if key == "device" else {"cdistill": "0.0.1"}
    tensors["place"][0] = 2  # the last chunk
    save_tensors(part, tensors, "unfinished statistics", {"identity": header["identity"]})
    assert estimated(*MIXTURE, out="c.safetensors") == estimated(*MIXTURE)


def test_what_was_done_is_not_done_again(monkeypatch, capsys):
    """16 noise levels of chunks in all, 5 of them before the interruption."""
    interrupted(monkeypatch, *MIXTURE, "--out", "c.safetensors")
    made = []
    measure = ESTIMATORS.get("forward").measure
    monkeypatch.setattr(ESTIMATORS.get("forward"), "measure", lambda *a: made.append(1) or measure(*a))
    assert run([*MIXTURE[1:], "--out", "c.safetensors"]) == 0
    assert len(made) == 11
    assert "coefficients (forward) 1024/1024" in capsys.readouterr().err


def test_two_commands_to_one_file_do_not_meet(fails, run_cli):
    with held(Path(".c.safetensors.lock"), "here"):
        for command_line in (MIXTURE, [*MIXTURE, "--seed", "1"]):
            code, text = fails(*command_line, "--out", "c.safetensors")
            assert (code, "c.safetensors: another process estimates to this file; wait, or" in text) == (6, True)
        both = run_cli(*MIXTURE, "--out", "c.safetensors", "--nproc", "2")
        assert both.returncode == 6, both.stderr
        assert both.stderr.count("another process estimates to this file") == 1
        assert estimated(*MIXTURE, out="d.safetensors") == estimated(*MIXTURE)
    assert not Path("c.safetensors").exists()
    assert estimated(*MIXTURE, out="c.safetensors") == estimated(*MIXTURE)


# --- comparing ---


def test_compare_writes_files_picture_and_table(capsys):
    arguments = [*MIXTURE, "--samples", "512", "--timesteps", "24", "--compare", "--out", "c.safetensors"]
    assert run([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["files"] == "c-autodiff.safetensors c-forward.safetensors"
    assert Path(record["plot"]).read_bytes()[:4] == b"\x89PNG"
    assert "mixture-1d: autodiff minus others on the same samples" in captured.err
    rows = record["deviations"]["forward"]
    assert [row["quantity"] for row in rows] == ["l", "s", "f", "g"]
    assert all(0 < row["bars"] < 2.5 and 0 < row["paired"] < 2.5 for row in rows)
    for name in ("autodiff", "forward"):
        found = load_estimate(Path(f"c-{name}.safetensors"))
        assert (found.header["estimator"], found.header["paired"]) == (name, True)
        assert record["estimates"][name]["s"] == found.coefficients.s.tolist()
        assert record["estimates"][name]["s_error"] == found.s_error.tolist()
    assert parts() == []
    assert run(arguments) == 0
    told = capsys.readouterr().out
    assert "autodiff minus others" in told
    assert "files: c-autodiff.safetensors c-forward.safetensors" in told


def test_compare_goes_on_where_it_was_stopped(monkeypatch):
    arguments = [*MIXTURE, "--compare", "--out"]
    with monkeypatch.context() as patch:
        stop_after(patch, 16 + 5)  # 16 noise levels of chunks of autodiff, then 5 of forward
        assert run([*arguments, "c.safetensors"]) == 75
    assert parts() == [".c-forward.safetensors.part-0-of-1"]
    assert run([*arguments, "c.safetensors"]) == run([*arguments, "whole.safetensors"]) == 0
    for name in ("autodiff", "forward"):
        assert Path(f"c-{name}.safetensors").read_bytes() == Path(f"whole-{name}.safetensors").read_bytes()


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "101"], ["samples: got 101", "2"]),
        (["--samples", "2"], ["samples: got 2", "4"]),
        (["--samples", "many"], ["--samples"]),
        (["--target-error", "0"], ["--target-error: got 0"]),
        (["--target-error", "-1"], ["--target-error: got -1"]),
        (["--target-error", "nan"], ["--target-error: got nan"]),
        (["--target-error", "inf"], ["--target-error: got inf"]),
        (["--estimator", "foward"], ["unknown estimator 'foward'", "did you mean 'forward'?"]),
        (["--precision", "bf16"], ["precision: got 'bf16'", "fp16"]),
        (["--precision", "fp16", "--estimator", "autodiff"], ["precision: got fp16", "fp32, or estimator forward"]),
        (["--precision", "fp16", "--compare"], ["--precision: --compare", "leave it out"]),
        (["--compare", "--estimator", "forward"], ["--estimator: --compare", "leave it out"]),
        (["--compare", "--target-error", "0.1"], ["--target-error: --compare", "the same samples"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes_get_one_line_and_the_exit_code(arguments, words, capsys):
    assert run([*MIXTURE, *arguments, "--out", "c.safetensors"]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in text
    assert all(word in text for word in words), text
    assert not Path("c.safetensors").exists()


def test_an_unknown_estimator_is_told_without_torch(run_python):
    code = (
        "import sys, cdistill.cli.app; code = cdistill.cli.app.run("
        "['estimate-coeffs', '--teacher', 'digits', '--estimator', 'nope']); print(code, 'torch' in sys.modules)"
    )
    assert run_python(code).strip() == "2 False"


# --- files ---


@pytest.fixture
def whole() -> Path:
    """A coefficient file."""
    estimated(*MIXTURE)
    return Path("whole.safetensors")


def altered(path: Path, tensors: dict[str, torch.Tensor | None], header: dict[str, object] | None = None) -> Path:
    """Writes a copy with other tensors (None leaves one out) and header, its checksum right."""
    old, facts = load_tensors(path, "coefficients")
    kept = {name: value for name, value in {**old, **tensors}.items() if value is not None}
    target = path.with_name("altered.safetensors")
    save_tensors(target, kept, "coefficients", {**facts, **(header or {})})
    return target


def older(path: Path) -> Path:
    """The same coefficients as version 0.6 wrote them."""
    old, facts = load_tensors(path, "coefficients")
    behind = {
        "sums": old["sums"][0].sum(0),
        "variances": torch.ones(8, 6).double(),
        "groups": torch.ones(32, 8, 6).double(),
    }
    kept = {name: facts[name] for name in ("teacher", "teacher_sha256", "data", "data_sha256", "dim", "samples")}
    target = path.with_name("older.safetensors")
    save_tensors(target, {**{name: old[name] for name in "tls"}, **behind}, "coefficients", kept)
    return target


def test_a_file_that_version_0_1_smoothed_is_read_but_no_longer_estimated(whole):
    old, _ = load_tensors(whole, "coefficients")
    file = altered(whole, {"s": old["s"] + 0.01}, {"smoothing": "spline"})
    estimate = load_estimate(file)
    assert torch.equal(estimate.coefficients.s, old["s"] + 0.01)
    assert torch.equal(estimate.s_error, old["s_error"])
    file.rename("c.safetensors")
    assert estimated(*MIXTURE, out="c.safetensors") == whole.read_bytes()


@pytest.mark.parametrize(("smoothing", "code"), [("none", 0), ("spline", 2)])
def test_recipes_of_version_0_1_name_their_smoothing(smoothing, code, capsys):
    assert run(["distill", "--recipe", "mixture", "--dry-run", "--set", f"estimation.smoothing={smoothing}"]) == code
    error = capsys.readouterr().err
    assert ("went with version 0.2" in error) == (code == 2)


def test_an_older_file_cannot_be_drawn_but_used(whole, fails, capsys):
    file = older(whole)
    code, text = fails("plot", "coefficients", str(file))
    assert code == 4
    assert "lacks sizes, stops, samples" in text
    assert "estimate the coefficients again" in text
    t, s = torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    for mine, other in zip(*(load_preconditioning(coefficients=path)(t, s) for path in (file, whole)), strict=True):
        assert mine == other
    sets = [f"preconditioning.coefficients={file}", *FAST, "training.iterations=1"]
    options = [part for value in sets for part in ("--set", value)]
    assert run(["-q", "distill", "--recipe", "mixture", "--out", "run", *options]) == 0
    assert Path("run/coefficients.safetensors").read_bytes() == file.read_bytes()
    capsys.readouterr()
    assert run(["inspect", str(file)]) == 0


DAMAGES = {
    "NaN in sums": lambda old: {"sums": torch.full_like(old["sums"], torch.nan)},
    "one NaN in sums": lambda old: {"sums": old["sums"].index_fill(2, torch.tensor(3), torch.nan)},
    "zero sums": lambda old: {"sums": torch.zeros_like(old["sums"])},
    "sums of other levels": lambda old: {"sums": old["sums"][:, :, :-1]},
    "sums of other scalars": lambda old: {"sums": old["sums"][..., :-1]},
    "sums without rounds": lambda old: {"sums": old["sums"][0]},
    "sums of single precision": lambda old: {"sums": old["sums"].float()},
    "sizes of other groups": lambda old: {"sizes": old["sizes"][:, :-1]},
    "sizes of other rounds": lambda old: {"sizes": torch.cat([old["sizes"]] * 2)},
    "sizes zero": lambda old: {"sizes": torch.zeros_like(old["sizes"])},
    "sizes flat": lambda old: {"sizes": old["sizes"][0]},
    "one group": lambda old: {"sizes": old["sizes"][:, :1], "sums": old["sums"][:, :1]},
    "no round": lambda old: {"sizes": old["sizes"][:0], "sums": old["sums"][:0]},
    "stops too few": lambda old: {"stops": old["stops"][:-1]},
    "stops beyond": lambda old: {"stops": old["stops"] + 1},
    "stops before": lambda old: {"stops": old["stops"] - 1},
    "stops fractional": lambda old: {"stops": old["stops"].double()},
    "samples too few": lambda old: {"samples": old["samples"][:-1]},
    "no samples": lambda old: {"samples": None},
    "l a number": lambda old: {"l": old["l"][0]},
    "s too long": lambda old: {"s": torch.cat([old["s"]] * 2)},
    "t a matrix": lambda old: {"t": old["t"].reshape(4, 2), "l": old["l"].reshape(4, 2), "s": old["s"].reshape(4, 2)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_statistics_that_make_no_estimate_are_refused(damage, whole, fails):
    old, _ = load_tensors(whole, "coefficients")
    code, text = fails("plot", "coefficients", str(altered(whole, DAMAGES[damage](old))))
    assert code == 4
    assert "altered.safetensors" in text
    assert "estimate the coefficients again" in text


@pytest.mark.parametrize(
    ("header", "code", "words"),
    [
        ({"estimator": "autodif"}, 2, "did you mean 'autodiff'?"),
        ({"estimator": "autodiff"}, 4, "sums are not 1 x 32 x 8 x 6"),
        ({"estimator": None}, 2, "unknown estimator 'None'"),
        ({"sigma_data": "half"}, 4, "half"),
    ],
    ids=str,
)
def test_headers_that_say_something_else_are_refused(header, code, words, whole, fails):
    found, text = fails("plot", "coefficients", str(altered(whole, {}, header)))
    assert (found, words in text) == (code, True), text


@pytest.mark.parametrize(
    "more",
    [[], ["--estimator", "autodiff"], ["--samples", "1024", "--target-error", "0.1"]],
    ids=" ".join,
)
def test_a_file_holds_what_its_sums_give(more, capsys):
    estimated(*MIXTURE, *more)
    tensors, header = load_tensors(Path("whole.safetensors"), "coefficients")
    found = load_estimate(Path("whole.safetensors"))
    for name, value in zip(("l", "s", "l_error", "s_error"), numbers_of(found), strict=True):
        assert torch.equal(tensors[name], value)
        assert bool((value > 0).all()) or name in "ls"
    t, s = tensors["pairs"].unbind(1)
    for name, values in zip("fg", found.f_and_g("analytic", t, s), strict=True):
        assert torch.equal(tensors[f"{name}_error"], standard_error(values[1:]))
    capsys.readouterr()
    assert run(["inspect", "whole.safetensors", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["table"]["l_error"] == tensors["l_error"].tolist()
    assert record["table"]["s_error"] == tensors["s_error"].tolist()
    assert record["pairs"]["g_error"] == tensors["g_error"].tolist()
    assert record["header"]["estimator"] == header["estimator"]
    assert run(["inspect", "whole.safetensors"]) == 0
    told = capsys.readouterr().out
    for name in "ls":
        assert f"{float(tensors[f'{name}_error'][4]):.1e}" in told


# --- distill ---


class Starts:
    """Starts of a distillation of the digits that end before the training; counts the estimations."""

    def __init__(self, monkeypatch) -> None:
        self.estimations = 0
        estimate = training.estimate_coefficients

        def counted(*arguments, **options):
            self.estimations += 1
            return estimate(*arguments, **options)

        def stopped(*arguments):
            raise StoppedError("training: stopped before it has begun", 75)

        monkeypatch.setattr(training, "estimate_coefficients", counted)
        monkeypatch.setattr(training, "train", stopped)

    def __call__(self, *values: str) -> str:
        """Starts, and returns the estimator that the coefficients come from."""
        options = [part for value in [*FAST, "estimation.timesteps=6", *values] for part in ("--set", value)]
        assert run(["-q", "distill", "--recipe", "digits-paper", "--out", "run", *options]) == 75
        estimator: str = load_coefficients(Path("run/coefficients.safetensors"))[2]["estimator"]
        return estimator


@pytest.mark.slow
def test_distill_estimates_by_the_recipe_and_again_when_that_has_changed(monkeypatch):
    start = Starts(monkeypatch)
    assert start('estimation.estimator="autodiff"') == "autodiff"
    before = Path("run/coefficients.safetensors").read_bytes()
    assert start('estimation.estimator="autodiff"') == "autodiff"
    assert start.estimations == 1
    assert Path("run/coefficients.safetensors").read_bytes() == before
    assert start() == "forward"  # "auto", which suits this teacher
    assert start('estimation.estimator="forward"') == "forward"  # which "auto" was
    assert start.estimations == 2
    assert start("estimation.seed=1") == "forward"
    assert start("estimation.target_error=0.5", "estimation.seed=1") == "forward"
    assert start.estimations == 4
    assert parts_in(Path("run")) == []


def parts_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".part-" in path.name]


def test_a_run_that_has_begun_keeps_its_coefficients(monkeypatch, fails):
    values = [part for value in [*FAST, "training.iterations=1"] for part in ("--set", value)]
    arguments = ["-q", "distill", "--recipe", "mixture", "--out", "run", *values]
    assert run(arguments) == 0
    before = Path("run/coefficients.safetensors").read_bytes()
    monkeypatch.setattr(training, "estimate_coefficients", None)  # called no more
    assert run(arguments) == 0
    assert Path("run/coefficients.safetensors").read_bytes() == before
    code, text = fails(*arguments, "--set", 'estimation.estimator="autodiff"')
    assert (code, "estimation.estimator" in text) == (2, True)


def test_an_estimation_that_is_stopped_inside_distill_goes_on(monkeypatch):
    values = [part for value in [*FAST, "training.iterations=1"] for part in ("--set", value)]
    for name, levels in (("run", 5), ("whole", None)):
        arguments = ["-q", "distill", "--recipe", "mixture", "--out", name, *values]
        if levels:
            with monkeypatch.context() as patch:
                stop_after(patch, levels)
                assert run(arguments) == 75
            assert len(parts_in(Path(name))) == 1
        assert run(arguments) == 0
        assert parts_in(Path(name)) == []
    coefficients = [Path(name, "coefficients.safetensors").read_bytes() for name in ("run", "whole")]
    assert coefficients[0] == coefficients[1]


def test_a_plug_in_is_compared_too(monkeypatch, capsys):
    """A third party's estimator is in `ls`, in --estimator and in --compare without a change here."""
    ESTIMATORS.add("mine", type("Mine", (ESTIMATORS.get("forward"),), {}))
    try:
        assert run([*MIXTURE, "--compare", "--out", "c.safetensors", "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert list(record["deviations"]) == ["forward", "mine"]
        assert record["estimates"]["mine"]["s"] == record["estimates"]["forward"]["s"]
        assert estimated(*MIXTURE, "--estimator", "mine")
    finally:
        ESTIMATORS.remove("mine")
    with pytest.raises(CdistillError, match="unknown estimator 'mine'"):
        load_estimate(Path("c-mine.safetensors"))
    form = make_preconditioning("analytic", table=load_coefficients(Path("c-mine.safetensors"))[0])
    assert float(form(torch.tensor([1.0]).double(), torch.tensor([1.0]).double())[1]) == 0
