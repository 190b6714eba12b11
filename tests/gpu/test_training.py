"""The fast step on a GPU: CUDA graphs, half precision, no waiting, resident images, memory, two processes.

References are computed on the CPU. What needs no kernels and no memory of a device runs on a pretended one, too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdistill.cli.app import run
from cdistill.data import load_source
from cdistill.recipe.files import load_recipe, shipped_recipes
from cdistill.recipe.schema import DistillRecipe
from cdistill.runtime.randomness import generator
from cdistill.schedule import rho_grid
from cdistill.storage.checkpoints import load_checkpoint, tensor_digest
from cdistill.storage.files import list_checkpoints
from cdistill.storage.run_folder import RunFolder
from cdistill.teachers import load_teacher
from cdistill.training.acceleration import Acceleration, make_solver_step
from cdistill.training.distillation import Distillation
from cdistill.training.loop import Counters, finish, make_accelerator, read
from cdistill.training.settings import GanSection
from cdistill.workflows.plan import plan
from tests.conftest import FAST, fast_distill
from tests.training.tasks import POINTS, force_levels, gradients, make_task, moved, small_teacher, step, tensors

# Compilers and drivers have warnings of their own, which are not ours.
pytestmark = [pytest.mark.usefixtures("cuda"), pytest.mark.filterwarnings("ignore")]

ROUNDING = 2.0**-11  # of fp16
ROUNDINGS = {"fp32": 2.0**-20, "tf32": ROUNDING, "fp16": ROUNDING, "bf16": 2.0**-8}
FLIPPED = replace(load_source("digits"), flips=True)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test compiles anew."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=True), torch._dynamo.config.patch(suppress_errors=False):
        yield


def build(table, device: str, teacher=None, **values) -> Distillation:
    """A task in float32 that is the same on both devices, but for how fast it is.

    It draws to the device of the task that was built last: Accelerate has one state for all.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = values.get("precision", "fp32")
    accelerator = Accelerator(cpu=True) if device == "cpu" else make_accelerator(precision)
    assert accelerator.device.type == device
    teacher = teacher or small_teacher(torch.float32)
    return make_task(table, teacher=teacher, source=FLIPPED, accelerator=accelerator, **values)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.cpu().double() - y.cpu().double()).norm() / y.cpu().double().norm())


# ---- the solver as a CUDA graph ----


@pytest.fixture
def steps() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The teacher's step in float64 on the CPU, and the fastest one."""
    exact = make_solver_step(
        small_teacher(), Acceleration(None, compiled=False, channels_last=False, teacher_channels_last=False)
    )
    fast = make_solver_step(
        small_teacher(torch.float32).to("cuda"),
        Acceleration(torch.float16, compiled=True, channels_last=True, teacher_channels_last=True),
    )
    return exact, fast


def follow(solver: Callable[..., Tensor], seed: int, size: int, h: int, dtype: torch.dtype, device: str) -> Tensor:
    """Solves the ODE for h steps from T; points, and labels too, differ from seed to seed."""
    grid = rho_grid(POINTS).to(device)
    x = 80 * torch.randn(size, 1, 8, 8, dtype=torch.float64, generator=generator(seed, "x"))
    x, labels = x.to(device, dtype), ((torch.arange(size) + seed) % 10).to(device)
    for k in range(h):
        before = x.clone()
        after = solver(x, grid[k].expand(size), grid[k + 1].expand(size), labels)
        assert torch.equal(x, before)
        x = after
    return x


def test_the_replayed_half_step_is_the_eager_one_within_rounding(steps):
    """Two shapes, each recorded once and replayed for every h; on a CPU in fp16 it is off by 0.95 of the rounding."""
    exact, fast = steps
    for size in (4, 12):
        for h in (2, POINTS - 1):
            found = follow(fast, h, size, h, torch.float32, "cuda")
            assert found.dtype == torch.float32
            assert 0 < relative(found, follow(exact, h, size, h, torch.float64, "cpu")) < 3 * ROUNDING


def test_a_replayed_step_sees_its_own_inputs_and_keeps_its_result(steps):
    """Other points, times and labels of the same shape; what the first call returned stays as it was."""
    exact, fast = steps
    first = follow(fast, 0, 4, 3, torch.float32, "cuda")
    copied = first.cpu()
    second = follow(fast, 1, 4, 3, torch.float32, "cuda")
    again = follow(fast, 0, 4, 3, torch.float32, "cuda")
    assert torch.equal(first.cpu(), copied)
    assert torch.equal(again.cpu(), copied)
    for seed, found in ((0, first), (1, second)):
        assert relative(found, follow(exact, seed, 4, 3, torch.float64, "cpu")) < 3 * ROUNDING


# ---- a step ----


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", list(ROUNDINGS))
def test_a_step_is_that_of_a_cpu_within_the_rounding(exact_coefficients, precision, compiled, measured):
    """The gradient of CTM's two losses; in half precision the teacher too."""
    whole = moved(build(exact_coefficients, "cpu"))
    whole.backward(0)
    found = moved(build(exact_coefficients, "cuda", precision=precision, compile=compiled))
    found.backward(0)
    mine, theirs = (torch.cat([value.flatten().cpu() for value in gradients(task).values()]) for task in (found, whole))
    error, bound = relative(mine, theirs), 20 * ROUNDINGS[precision]
    how = f"{precision}, compiled" if compiled else precision
    measured(f"gradient of a step, {how}", f"off by {error:.1e}", f"at most {bound:.1e}")
    assert error < bound


@pytest.mark.parametrize("options", [
    {}, {"accumulation": 2}, {"objective": "cm"}, {"gan": GanSection()}, {"compile": False, "channels_last": False},
], ids=str)  # fmt: skip
def test_a_step_in_fp16_is_near_that_of_a_cpu_in_float32(exact_coefficients, options):
    """In units of its rounding; on a CPU in fp16 losses are off by at most 1.3, the gradient by 2.7.

    What the discriminator's kinks do to its gradient goes with the root of the rounding.
    """
    whole = moved(build(exact_coefficients, "cpu", **{**options, "compile": False}))
    exact = whole.backward(0)
    half = moved(build(exact_coefficients, "cuda", precision="fp16", **options))
    half.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    assert half.acceleration.teacher_dtype == torch.float16
    assert half.acceleration.compiled == half.acceleration.channels_last == ("compile" not in options)
    found = half.backward(0)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        bound = 3 * ROUNDING**0.5 if "gan" in options else 10 * ROUNDING
        assert float(found[name]) == pytest.approx(float(value), rel=bound, abs=10 * ROUNDING), name
    mine, theirs = (torch.cat([value.flatten().cpu() for value in gradients(task).values()]) for task in (half, whole))
    assert 0 < relative(mine, theirs) < (3 * ROUNDING**0.5 if "gan" in options else 20 * ROUNDING)


def test_fp16_skips_the_steps_that_overflow_and_goes_on(exact_coefficients):
    task, counters = build(exact_coefficients, "cuda", precision="fp16", compile=False), Counters()
    task.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60, backoff_factor=2.0**-10)
    before, begun = tensors(task), [parameter.clone() for parameter in task.student.parameters()]
    for index in range(12):
        finish(task, index, read(task.accelerator, task.backward(index)), counters)
        if index == 0:
            assert counters.skipped == 1
            assert all(torch.equal(*pair) for pair in zip(tensors(task), before, strict=True))
    assert 1 <= counters.skipped <= 7
    assert counters.row() == 0
    assert task.accelerator.scaler.get_scale() == 2.0 ** (60 - 10 * counters.skipped)
    assert all(parameter.isfinite().all() for parameter in task.student.parameters())
    assert not all(torch.equal(*pair) for pair in zip(task.student.parameters(), begun, strict=True))


# ---- nothing is waited for ----


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_seen():
    one = torch.ones((), device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        one.item()


@pytest.mark.parametrize("options", [
    {}, {"accumulation": 2}, {"objective": "cm"}, {"precision": "fp16"}, {"gan": GanSection()},
    {"gan": GanSection(), "accumulation": 2, "precision": "fp16"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_never_waits_for_the_device(exact_coefficients, compiled, options):
    """The second and the third step; with the GAN loss the former is the discriminator's.

    Steps of the same shapes were done before: whatever is compiled or recorded once may wait.
    """
    task = build(exact_coefficients, "cuda", compile=compiled, **options)
    for index in range(3):
        step(task, index)
    for index in (1, 2):
        with no_waiting():
            values = task.backward(index)
            task.prepare(index + 1)
        finish(task, index, read(task.accelerator, values), Counters())


def test_images_stay_on_the_device_and_give_the_same_batches(exact_coefficients):
    """Eight bits a value there; what is drawn does not depend on it, but for the rounding of x / 127.5."""
    far = build(exact_coefficients, "cpu")
    theirs = [far.draw(index)[0] for index in range(2)]
    near = build(exact_coefficients, "cuda")
    assert near.source.samples.is_cuda
    assert near.source.samples.dtype == torch.uint8
    assert near.source.labels is not None
    assert near.source.labels.is_cuda
    for index, there in enumerate(theirs):
        (here,) = near.draw(index)
        for name in ("labels", "z", "sigma"):
            assert getattr(here, name).is_cuda
            assert torch.equal(getattr(here, name).cpu(), getattr(there, name)), name
        for name in ("x0", "x_t"):
            assert getattr(here, name).is_cuda
            torch.testing.assert_close(getattr(here, name).cpu(), getattr(there, name))


# ---- memory ----


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_planned_memory_is_about_what_is_used(exact_coefficients, precision, accumulation, monkeypatch, measured):
    """Within a factor of 2, without what compilation saves: the digits' own network, and all need the last jump."""
    size, few = 1024, {"precision": precision, "accumulation": accumulation, "compile": False}
    recipe = load_recipe(shipped_recipes()["digits-paper"], DistillRecipe)
    training = recipe.training.model_copy(update={"batch_size": size, **few})
    planned = plan(recipe.model_copy(update={"training": training}), 1).device_bytes
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    teacher = load_teacher("digits").denoiser
    options = {"batch_size": size, "points": 10, "max_ode_steps": 9, **few}
    task = build(exact_coefficients, "cuda", teacher=teacher, **options)
    force_levels(task, monkeypatch, t=0, s=5, h=3)
    for index in range(3):
        finish(task, index, read(task.accelerator, task.backward(index)), Counters())
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    how = f"{precision}, {accumulation} micro-batch(es)"
    measured(f"memory of a step, {how}", f"{used / 2**20:.0f} MiB", f"planned {planned / 2**20:.0f} MiB")
    assert 0.5 < used / planned < 2


# ---- whole runs ----


def distill(out, *more: str) -> int:
    sets = [part for value in (*FAST, "training.precision=fp16", *more) for part in ("--set", value)]
    return run(["distill", "--recipe", "digits-paper", "--out", str(out), *sets])


@pytest.mark.gpu
def test_the_digits_are_distilled_in_fp16(tmp_path):
    assert distill(tmp_path / "run") == 0
    folder = RunFolder(tmp_path / "run")
    assert folder.results()["rows"]
    last = [record for record in folder.metrics() if record["event"] == "train"][-1]
    assert last["step"] == 30
    assert last["skipped"] < 20
    assert 0 < last["teacher_share"] < 1
    _, state = load_checkpoint(list_checkpoints(folder.checkpoints)[-1])
    assert state["scaler"]["scale"] > 0


@pytest.fixture
def repeatable(monkeypatch) -> Iterator[None]:
    """Lets CUDA choose kernels that give the same bits every time, wherever it has such."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_a_resumed_run_in_fp16_is_the_uninterrupted_one_bit_for_bit(tmp_path, repeatable):
    """CTM's form needs no coefficients, so that training alone is compared; the scaler is part of the state."""
    options = ("preconditioning.name=ctm", "training.compile=false", "checkpoint.every=5")

    def state(name: str) -> dict[str, object]:
        groups, header = load_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1])
        assert header["step"] == 12
        return {**{stem: tensor_digest(group) for stem, group in groups.items()}, "scaler": header["scaler"]}

    assert distill(tmp_path / "whole", *options, "training.iterations=12") == 0
    for iterations in (5, 12):
        assert distill(tmp_path / "resumed", *options, f"training.iterations={iterations}") == 0
    assert state("resumed") == state("whole")


@pytest.mark.gpu
def test_two_processes_are_one(tmp_path, run_cli, measured):
    """On two GPUs the same student to the rounding of a sum in another order; on one it is refused."""
    options = ("preconditioning.name=ctm", "training.compile=false")
    done = {
        count: run_cli(*fast_distill(tmp_path / f"by-{count}", *options, recipe="digits-paper"), "--nproc", count)
        for count in ("1", "2")
    }
    if torch.cuda.device_count() < 2:
        assert done["2"].returncode == 2
        assert "2 processes on this machine, which has 1 GPUs; start one for each GPU" in done["2"].stderr
        measured("two processes", "refused", "one GPU")
        return
    assert [result.returncode for result in done.values()] == [0, 0], done["2"].stderr
    one, two = (
        load_checkpoint(list_checkpoints(tmp_path / f"by-{count}" / "checkpoints")[-1])[0]["weights"] for count in done
    )
    error = max(relative(two[name], value) for name, value in one.items())
    measured("two processes after 30 steps", f"weights off by {error:.1e}", "at most 1.0e-03")
    assert error < 1e-3
