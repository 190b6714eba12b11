"""Every objective on a CUDA device that is pretended: devices, types and waits, without a GPU."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from cdistill.data import load_source
from cdistill.registry import OBJECTIVES
from cdistill.runtime.devices import compiles
from cdistill.sampling.settings import TrajectoriesSection
from cdistill.sampling.trajectories import TrajectoryStore, open_trajectories
from cdistill.schedule import rho_grid
from cdistill.teachers import Teacher
from cdistill.training.loop import Counters, finish, make_accelerator, read
from cdistill.training.settings import GanSection
from tests import pretended_cuda
from tests.pretended_cuda import pretended
from tests.training.tasks import make_task, moved, small_teacher, step

pytestmark = pytest.mark.skipif(not pretended_cuda.LOADED[0], reason="needs a C++ compiler, and no GPU")

OBJECTIVE_OPTIONS = [
    *({"objective": name} for name in OBJECTIVES.names()),
    {"objective": "ctm", "targets": "store"}, {"objective": "ctm", "target": "live", "dropout": 0.1},
]  # fmt: skip
FEW = 4  # noise levels
READ = {"read training/loop.py:read"}  # the one transfer of a step, when the next batch is ready
SCALED = {"value training/loop.py:step_scaled"}  # the scaler asks after it whether the gradients were finite


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TrajectoryStore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDISTILL_ASSETS", str(tmp_path_factory.mktemp("assets")))
        section, teacher = TrajectoriesSection(count=64, precision="fp32"), Teacher("small", small_teacher(), "digits")
        return open_trajectories(section, rho_grid(FEW), teacher, None, Accelerator(cpu=True))


def build(table, store, precision: str, **options):
    """A task in float32 at best, with its student moved away from the teacher."""
    name = "cm" if options["objective"] == "cm" else "analytic"
    return moved(
        make_task(
            table, name, small_teacher(torch.float32), load_source("digits"), make_accelerator(precision), store=store,
            precision=precision, points=FEW, max_ode_steps=FEW - 1, **options,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("options", "gan", "accumulation", "precision"), [
    *product(OBJECTIVE_OPTIONS, (None, GanSection()), (1, 2), ("fp32", "tf32", "fp16", "bf16")),
], ids=lambda value: "gan" if isinstance(value, GanSection) else str(value))  # fmt: skip
def test_a_step_stays_on_the_device_and_waits_once(
    options, gan, accumulation, precision, exact_coefficients, store, device
):
    """With the GAN loss the first step trains the student, the second the discriminator."""
    task = build(exact_coefficients, store, precision, gan=gan, accumulation=accumulation, **options)
    assert task.accelerator.device.type == "cuda"
    task.prepare(0)
    for index in range(2):
        device.waits.clear()
        values = task.backward(index)
        task.prepare(index + 1)
        assert not device.waits
        assert all(value.is_cuda and value.isfinite() for name, value in values.items() if "norm" not in name)
        device.waits.clear()
        finish(task, index, read(task.accelerator, values), Counters())
        assert set(device.waits) - SCALED == READ
        assert device.waits.total() <= 1 + 2 * (precision == "fp16")
    assert all(parameter.is_cuda for parameter in (*task.student.parameters(), *task.student_ema.parameters()))


@pytest.mark.parametrize("options", OBJECTIVE_OPTIONS, ids=str)
def test_a_step_in_float32_is_that_of_a_cpu(options, exact_coefficients, store, monkeypatch):
    options = {**options, "dropout": 0.0, "channels_last": False}
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = step(build(exact_coefficients, store, "fp32", **options), 0).values
    AcceleratorState._reset_state(reset_partial_state=True)
    with pretended(monkeypatch):
        assert step(build(exact_coefficients, store, "fp32", **options), 0).values == pytest.approx(plain, rel=1e-5)


def test_data_stay_on_the_device_if_they_take_at_most_a_tenth_of_what_is_free(device, monkeypatch):
    source, free = load_source("digits"), 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    free = 10 * source.samples.nbytes - 1
    assert source.resident(torch.device("cuda")) is source
    free += 1
    assert source.resident(torch.device("cpu")) is source
    found = source.resident(torch.device("cuda"))
    assert found.samples.is_cuda
    assert found.samples.dtype == torch.uint8
    device.waits.clear()
    x, labels = found.batch(torch.arange(5), torch.ones(5, dtype=torch.bool))
    assert x.is_cuda
    assert labels is not None
    assert labels.is_cuda
    assert not device.waits


def test_networks_are_compiled_where_a_compiler_works_and_a_line_says_where_not(
    exact_coefficients, store, device, monkeypatch, capsys
):
    task = build(exact_coefficients, store, "fp16", objective="ctm")
    assert len(device.compiled) == 4  # the attempt, the target, the solver's step, the student
    assert str(task.acceleration) == "teacher float16, compiled, channels_last, teacher channels_last"
    assert "uncompiled" not in capsys.readouterr().err

    def broken(network, **options):
        raise RuntimeError("no compiler here\nand many lines more")

    compiles.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    for _ in range(2):
        task = build(exact_coefficients, store, "fp16", objective="ctm")
        assert not task.acceleration.compiled
    line = "networks run uncompiled, slower: nothing can be compiled here (no compiler here)"
    assert capsys.readouterr().err.splitlines().count(line) == 1


# ---- what is put in on purpose is found ----


def test_a_value_that_is_read_in_a_step_is_seen(exact_coefficients, store, device, monkeypatch):
    task = build(exact_coefficients, store, "fp32", objective="ctm")
    loss = task.objective.loss

    def reading(*arguments):
        found = loss(*arguments)
        assert found.mean().item() >= 0
        return found

    monkeypatch.setattr(task.objective, "loss", reading)
    task.prepare(0)
    device.waits.clear()
    task.backward(0)
    assert device.waits == {"value training/distillation.py:consistency_loss": 1}


def test_a_tensor_that_is_left_on_the_cpu_is_seen(exact_coefficients, store, device):
    task = build(exact_coefficients, store, "fp32", objective="ctm")
    (batch,) = task.draw(0)
    task.ready = (0, 0, [replace(batch, z=batch.z.cpu())])
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        task.backward(0)


def test_what_a_gpu_refuses_is_refused(device):
    there, here = torch.arange(6.0, device="cuda"), torch.arange(6)
    for refused in (
        lambda: there + here,
        lambda: here[there.long()],
        lambda: here.add_(there),
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: there.normal_(generator=torch.Generator()),
        lambda: there.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            refused()
    assert not device.waits
    waiting = {
        "value": lambda: there.sum().item(), "read": lambda: there.tolist(), "size": lambda: there[there > 2],
        "upload": lambda: here.to("cuda"),
    }  # fmt: skip
    for kind, wait in waiting.items():
        for mode in (torch.no_grad, torch.inference_mode):
            device.waits.clear()
            with mode():
                wait()
            assert device.waits == {f"{kind} tests": 1}
    device.waits.clear()
    assert (here.pin_memory().to("cuda", non_blocking=True) + there).is_cuda
    assert (there * torch.tensor(2.0)).is_cuda
    assert not device.waits
