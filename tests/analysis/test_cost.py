"""Counting before running: against the counts of other people, by hand, and against what really is kept."""

import json
import weakref
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cdistill.analysis.cost import _FORWARD_SHARE, Plan, distance_cost, network_cost, on_meta
from cdistill.cli.app import run
from cdistill.networks.architecture import build_denoiser
from cdistill.networks.denoiser import Denoiser, broadcast
from cdistill.objectives.distances import L2
from cdistill.objectives.lpips import LPIPS
from cdistill.recipe.files import load_any_recipe, shipped_recipes
from cdistill.registry import TEACHERS
from cdistill.teachers.official import OFFICIAL
from cdistill.workflows import plan as planning
from cdistill.workflows.plan import duration, plan, scaled


@pytest.fixture(scope="module")
def plans() -> dict[tuple[str, int], Plan]:
    """What was planned, by the recipe and the number of devices: plans of networks of full size take seconds."""
    return {}


@pytest.fixture
def planned(plans, monkeypatch) -> Callable[..., Plan]:
    """`plan`, for the commands too, once for each recipe and number of devices."""

    def once(recipe, devices: int) -> Plan:
        key = (recipe.model_dump_json(), devices)
        if key not in plans:
            plans[key] = plan(recipe, devices)
        return plans[key]

    monkeypatch.setattr(planning, "plan", once)
    return once


class Linear(Denoiser):
    """D = W x, to be counted by hand."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.sample_shape, self.sigma_data = (size,), 0.5
        self.weight = nn.Parameter(torch.zeros(size, size))

    def forward(self, x, t, s=None, labels=None):
        return x @ self.weight.T * broadcast(t, x) ** 0

    def student(self, takes_s=True, dropout=0.0):
        return self


def test_a_matrix_by_hand():
    denoiser = on_meta(Linear(10))
    cost = network_cost(denoiser)
    assert (cost.forward, cost.backward) == (200, 200)  # 2 n^2; the gradient of W alone
    denoiser.requires_grad_(False)
    assert network_cost(denoiser).backward == 200


# GFLOP of a forward pass an image, counted on the public code (`../shared/spec/training.md`).
GFLOP = {"edm-cifar10": 42.4, "edm-ffhq64": 83.7, "edm-imagenet64": 219.3}


@pytest.mark.parametrize("name", list(GFLOP))
def test_networks_cost_what_others_counted(name):
    with torch.device("meta"):
        denoiser = build_denoiser(OFFICIAL[name].architecture, 0.5)
    cost = network_cost(denoiser.student())
    assert cost.forward / 1e9 == pytest.approx(GFLOP[name], rel=0.002)
    assert cost.backward == pytest.approx(2 * cost.forward, rel=0.01)


def test_vgg_costs_what_others_counted():
    cost = distance_cost(LPIPS.meta(), (3, 32, 32))
    assert cost.forward / 1e9 == pytest.approx(30.7, rel=0.002)
    assert cost.backward == pytest.approx(cost.forward, rel=0.01)
    assert distance_cost(L2(), (3, 32, 32)).forward == 0


@pytest.mark.slow
def test_the_papers_hours_follow_from_what_its_cards_can_do(planned):
    """490, 735, 900 and 6400 A800-hours are 42, 42, 33 and 44 TFLOP/s a card, if it did the work that we count."""
    runs = {"cifar10": (490, 42), "cifar10-cond": (735, 42), "ffhq64": (900, 33), "imagenet64": (6400, 44)}
    for name, (hours, tflops) in runs.items():
        found = planned(load_any_recipe(shipped_recipes()[name]), 1).hours(tflops, 1)
        assert found == pytest.approx(hours, rel=0.02), name


def test_what_is_kept_for_the_backward_pass_is_what_a_real_call_keeps():
    denoiser = TEACHERS.get("digits")().denoiser.student()
    kept: dict[int, torch.Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in denoiser.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, t = torch.randn(2, 1, 8, 8), torch.ones(2, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = denoiser(x, t, t, torch.zeros(2, dtype=torch.int64))
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own) / 2
    assert out.requires_grad
    assert network_cost(on_meta(denoiser)).saved == pytest.approx(real, rel=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_every_shipped_recipe_can_be_dry_run_without_weights_data_and_network(name, capsys, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", "/dev/null")
    command = "train-teacher" if name.startswith("teacher-") else "distill"
    assert run([command, "--recipe", name, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "[training]" in printed
    assert "GFLOP an image" in printed
    assert "device-hours" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-ctm", "teacher-patches", "mixture"])
def test_plans_are_json_for_machines(name, capsys):
    assert run(["plan", "--recipe", name, "--devices", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training"] > 0
    assert found["micro_batch"] == found["batch_size"] // 2
    if name != "teacher-patches":
        assert run(["distill", "--recipe", name, "--dry-run", "--nproc", "2", "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["plan"] == found
        assert again["objective"]["name"] == "ctm"


@cache
def fast_plan(*overrides: str) -> Plan:
    return plan(load_any_recipe(shipped_recipes()["digits-paper"], overrides), 1)


@pytest.mark.slow
def test_coefficients_cost_what_the_estimator_that_suits_the_teacher_does(planned):
    """`forward` a forward pass a pair; `autodiff` three more, whose vector-Jacobian products go to the input alone."""
    asked = ["estimation.estimator='autodiff'"]
    for name, overrides, passes in (("digits-paper", [], 1), ("digits-paper", asked, 4), ("cifar10", [], 4)):
        recipe = load_any_recipe(shipped_recipes()[name], overrides)
        found, section = planned(recipe, 1), recipe.estimation
        _, forwards, flop = found.parts[0]
        forward = flop / forwards
        assert found.estimation / (section.samples * section.timesteps) == pytest.approx(passes * forward, rel=0.02)
    assert fast_plan("preconditioning.name=ctm").estimation == 0


def test_evaluations_are_counted_as_the_loop_makes_them():
    """iterations = 100, every = 99: at steps 0 and 99, at the end, and the untrained student; the teacher once."""
    sets = ["training.iterations=100", "evaluation.nfe=[1,2]", "evaluation.samples=10"]
    none, two = (fast_plan(*sets, f"evaluation.every={every}").evaluation for every in (0, 99))
    student = (two - none) / (2 * 3 * 10)
    assert none == pytest.approx(10 * (2 * 3 * student + 34 * teacher_forward("digits-paper")))


@cache
def teacher_forward(name: str) -> float:
    _, forwards, flop = plan(load_any_recipe(shipped_recipes()[name], ["objective.name=ctm"]), 1).parts[0]
    return flop / forwards


def test_data_drawn_from_the_teacher_are_counted():
    assert fast_plan().data == 0
    assert fast_plan("data=teacher:100").data == pytest.approx(100 * 34 * teacher_forward("digits-paper"))


def test_hours_are_work_over_throughput():
    found = fast_plan()
    work = found.training + found.estimation + found.evaluation
    assert found.hours(2.0, 4) == pytest.approx(work / 8e12 / 3600)


def test_half_precision_and_several_devices_change_the_memory():
    single, half = fast_plan(), fast_plan("training.precision=fp16")
    assert half.activation_bytes == pytest.approx(0.88 * single.activation_bytes, rel=1e-3)
    copies = 2 * (half.student - half.teacher)  # the teacher that runs is half as large
    assert half.state_bytes - single.state_bytes == pytest.approx(copies, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "cifar10", "--devices", "3"], "cannot be divided among 3 processes"),
        (["--recipe", "cifar10", "--devices", "4", "--set", "training.accumulation=256"], "cannot be divided"),
        (["--recipe", "mixture", "--set", "objective.distance=lpips"], "compares grey or RGB images"),
        (["--recipe", "mixture", "--set", "gan.start=0"], "judges grey or RGB images"),
        (["--recipe", "mixture", "--tflops", "inf"], "--tflops: got inf"),
    ],
)
def test_what_cannot_run_is_not_planned(arguments, message, capsys):
    assert run(["plan", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_numbers_are_written_for_people():
    assert [scaled(value, "B") for value in (0, 999, 1.5e3, 2e9)] == ["0 B", "999 B", "1.5 kB", "2 GB"]
    assert [duration(hours) for hours in (100, 3.5, 0.5, 0.001)] == ["4.17 d", "3.5 h", "30 min", "3.6 s"]


class Live(TorchDispatchMode):
    """Adds up what lives of the tensors that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.counted: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.counted:
                self.counted.add(key)
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self.forget, key, size)
        return out

    def forget(self, key: int, size: int) -> None:
        self.counted.discard(key)
        self.now -= size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm-cifar10", "edm-ffhq64", "edm-imagenet64"])
def test_a_forward_pass_alone_holds_at_most_a_tenth(name):
    """What a CUDA graph of the teacher takes for itself, of what a backward pass of the same network keeps."""
    with torch.device("meta"):
        network = build_denoiser(OFFICIAL[name].architecture, 0.5)
    x, t = torch.empty(2, *network.sample_shape, device="meta"), torch.ones(2, dtype=torch.float64, device="meta")
    labels = torch.zeros(2, dtype=torch.int64, device="meta") if network.num_classes else None
    with torch.inference_mode(), Live() as live:
        network(x, t, None, labels)
    assert 0.04 < live.peak / 2 / network_cost(network).saved < _FORWARD_SHARE
