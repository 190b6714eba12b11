"""The fast step: half precision within its rounding, the scaler, no reading on the host, what is counted is what runs.

That its losses and gradients are those of the plain step is tested in test_distillation.py; what needs a GPU, or one
that is pretended, in tests/gpu.
"""

import contextlib
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cdistill.analysis.cost import Plan, network_cost, on_meta
from cdistill.cli.app import run
from cdistill.data import load_source
from cdistill.errors import RecipeError
from cdistill.recipe.files import load_recipe, shipped_recipes, to_toml
from cdistill.recipe.schema import DistillRecipe
from cdistill.runtime import devices
from cdistill.runtime.randomness import generator
from cdistill.storage.checkpoints import load_checkpoint, save_checkpoint
from cdistill.storage.files import list_checkpoints
from cdistill.storage.run_folder import RunFolder
from cdistill.teachers import load_teacher
from cdistill.training.acceleration import Acceleration, make_solver_step
from cdistill.training.distillation import Distillation
from cdistill.training.loop import Counters, finish, read
from cdistill.training.settings import GanSection
from cdistill.workflows import plan as planning
from cdistill.workflows.plan import plan
from tests.conftest import fast_distill
from tests.training.tasks import (
    force_levels,
    gradients,
    make_task,
    moved,
    small_teacher,
    step,
    tensors,
)

ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OBJECTIVES = ["ctm", "cm"]


def build(table, accelerator=None, **values) -> Distillation:
    """A task in float64; contiguous, unless asked otherwise."""
    return make_task(table, accelerator=accelerator, **{"channels_last": False, **values})


def single(table, **values) -> Distillation:
    """A task in float32."""
    return build(table, source=load_source("digits"), teacher=small_teacher(torch.float32), **values)


def plain_accelerator() -> SimpleNamespace:
    """An accelerator of one process on a CPU whose parts a test may change."""
    return SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, process_index=0, scaler=None, mixed_precision="no",
        autocast=contextlib.nullcontext, prepare=lambda module: module, reduce=lambda tensors, reduction: tensors,
        gather=lambda tensor: tensor, no_sync=lambda module: contextlib.nullcontext(),
        backward=lambda loss: loss.backward(),
    )  # fmt: skip


def distance_of(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """|g - h| / |h| over all parameters."""
    assert first.keys() == second.keys()
    apart = math.hypot(*(float((first[name] - second[name]).norm()) for name in second))
    return apart / math.hypot(*(float(value.norm()) for value in second.values()))


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


# ---- half precision ----


@pytest.mark.parametrize("kind", list(ROUNDING))
def test_a_half_teacher_moves_the_solution_and_the_step_by_its_rounding(exact_coefficients, kind):
    """In units of the type's rounding: x_u after h steps at most 2, loss and gradient, half of which hang on it, 1."""
    whole = moved(build(exact_coefficients))
    half = moved(build(exact_coefficients, teacher_precision=kind))
    assert half.acceleration.teacher_dtype == TYPES[kind]
    for index in range(2):
        exact, found = whole.backward(index), half.backward(index)
        (batch,) = whole.draw(index)
        assert batch.levels["path"].shape[1] - 1 == (6, 2)[index]
        x_u = half.networks.solve(batch)
        assert x_u.dtype == torch.float64
        assert 0.01 < relative(x_u, whole.networks.solve(batch)) / ROUNDING[kind] < 2
        assert found["dsm"] == exact["dsm"]
        for name, value in exact.items():
            assert abs(found[name] / value - 1) < ROUNDING[kind], name
        assert 0 < distance_of(gradients(half), gradients(whole)) < ROUNDING[kind]


@pytest.mark.parametrize("kind", list(ROUNDING))
def test_what_enters_the_half_teacher_is_rounded_last(kind):
    """dx/dt at t = 0.002 is off by the rounding of the network, about 2; with x itself rounded by thousands of it."""
    teacher, speed = (
        small_teacher(),
        Acceleration(TYPES[kind], compiled=False, channels_last=False, teacher_channels_last=False),
    )
    x = torch.randn(16, 1, 8, 8, dtype=torch.float64, generator=generator(0, "x"))
    t, u = (torch.full((16,), level, dtype=torch.float64) for level in (0.0022, 0.002))

    def slope(step: Callable[..., Tensor]) -> Tensor:
        return (step(x, t, u, torch.arange(16) % 10) - x) / (0.002 - 0.0022)

    half = make_solver_step(teacher, speed)
    exact = slope(make_solver_step(teacher, replace(speed, teacher_dtype=None)))
    rounded = slope(lambda x, *rest: half(x.to(TYPES[kind]), *rest))
    assert relative(slope(half), exact) < 5 * ROUNDING[kind]
    assert relative(rounded, exact) > 1000 * ROUNDING[kind]


@pytest.fixture
def accelerator_of() -> Iterator[Callable[[str], Accelerator]]:
    """Makes accelerators of any precision; by itself accelerate allows one a process."""

    def make(precision: str) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, mixed_precision=precision)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("objective", "accumulation"), [("ctm", 1), ("ctm", 2), ("cm", 1)])
def test_a_step_in_bf16_is_near_that_in_float32(exact_coefficients, objective, accumulation, accelerator_of):
    """In units of its rounding: losses and weights 2, the gradient 5; weights and gradient stay in float32."""
    options = {"objective": objective, "accumulation": accumulation, "batch_size": 6}
    whole = moved(single(exact_coefficients, **options))
    half = moved(single(exact_coefficients, accelerator=accelerator_of("bf16"), precision="bf16", **options))
    assert half.acceleration.teacher_dtype == torch.bfloat16
    exact, found = whole.backward(0), half.backward(0)
    for name, value in exact.items():
        assert 0 < abs(found[name] / value - 1) < 2 * ROUNDING["bf16"], name
    assert all(value.dtype == torch.float32 for value in [*gradients(half).values(), *half.student.parameters()])
    assert 0.1 * ROUNDING["bf16"] < distance_of(gradients(half), gradients(whole)) < 5 * ROUNDING["bf16"]


@pytest.mark.parametrize("options", [
    {}, {"accumulation": 2}, {"objective": "cm"}, {"gan": GanSection()},
], ids=str)  # fmt: skip
def test_a_step_in_fp16_is_near_that_in_float32(exact_coefficients, options):
    """As a GPU does it, with autocast, a half teacher and the scaler; in units of the rounding 3, the gradient 5.

    What the discriminator's kinks do to its gradient goes with the root of the rounding.
    """
    half_cpu = partial(torch.autocast, "cpu", torch.float16)

    def prepare(module: torch.nn.Module) -> torch.nn.Module:
        module.forward = half_cpu()(module.forward)
        return module

    def backward(loss: Tensor) -> None:
        accelerator.scaler.scale(loss).backward()

    accelerator = plain_accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerator.autocast, accelerator.prepare, accelerator.backward = half_cpu, prepare, backward
    whole = moved(single(exact_coefficients, **options))
    half = moved(single(exact_coefficients, accelerator=accelerator, teacher_precision="fp16", **options))
    kinds = set()
    for network in (half.student, half.target_net):
        network.model.register_forward_hook(lambda module, inputs, out: kinds.add(out.dtype))
    exact, found = whole.backward(0), half.backward(0)
    assert kinds == {torch.float16}
    kinked = 1.5 * 2.0**-5.5
    for name, value in exact.items():
        bound = kinked if name in ("gan_balance", "gradient_norm") and "gan" in options else 3 * ROUNDING["fp16"]
        assert float(found[name]) == pytest.approx(float(value), rel=bound), name
    bound = kinked if "gan" in options else 5 * ROUNDING["fp16"]
    assert 0.1 * ROUNDING["fp16"] < distance_of(gradients(half), gradients(whole)) < bound


# ---- the gradient scaler for fp16 ----


def scaling(**values) -> Accelerator:
    """An accelerator as with fp16, but on a CPU, which has none: autocast does nothing."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", **values)
    return accelerator


@pytest.mark.parametrize("options", [
    {}, {"accumulation": 2}, {"dsm": False}, {"objective": "cm"}, {"gan": GanSection()},
    {"gan": GanSection(), "accumulation": 3},
], ids=str)  # fmt: skip
def test_the_scaler_changes_neither_gradient_nor_weights_nor_losses(exact_coefficients, options):
    """In float64; the losses that are logged and the adaptive weights are those without the factor."""
    plain = moved(build(exact_coefficients, batch_size=6, **options))
    scaled = moved(build(exact_coefficients, scaling(init_scale=2.0**10), batch_size=6, **options))
    expected, found = plain.backward(0), scaled.backward(0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-10), name
    assert distance_of(gradients(scaled), gradients(plain)) < 1e-10
    for task in (plain, scaled):
        finish(task, 0, read(task.accelerator, found), Counters())
    for first, second in zip(tensors(scaled), tensors(plain), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_overflow_is_skipped_and_lowers_the_scale(exact_coefficients, accumulation):
    accelerator = scaling(init_scale=2.0**127, backoff_factor=2.0**-110)
    task, counters = single(exact_coefficients, accelerator=accelerator, accumulation=accumulation), Counters()
    before = tensors(task)
    report = read(accelerator, task.backward(0))
    assert math.isfinite(report.values["consistency"])
    assert "gradient_norm" in report.wrong
    finish(task, 0, report, counters)
    assert (counters.skipped, counters.row()) == (1, 1)
    assert all(torch.equal(*pair) for pair in zip(tensors(task), before, strict=True))
    assert accelerator.scaler.get_scale() == 2.0**17
    report = read(accelerator, task.backward(1))
    plain = single(exact_coefficients, accumulation=accumulation)
    plain.backward(1)
    assert distance_of(gradients(task), gradients(plain)) < 1e-5
    finish(task, 1, report, counters)
    step(plain, 1)
    assert (counters.skipped, counters.row()) == (1, 0)
    assert accelerator.scaler.get_scale() == 2.0**17
    for first, second in zip(task.student.parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-4)  # RAdam begins with the plain gradient


# ---- the work that is done ----


@pytest.mark.parametrize("options", [
    {}, {"dsm": False}, {"accumulation": 2}, {"objective": "cm"}, {"objective": "cm", "dsm": False},
    {"objective": "cm", "accumulation": 2},
], ids=str)  # fmt: skip
def test_a_step_does_the_counted_work_and_nothing_else(exact_coefficients, options):
    """To the FLOP, the planned cost of a call times the rows that need one.

    The balance weight costs two gradients of the last layer's weight alone, of CTM's one batch of both predictions or
    of CM's one prediction each; with micro-batches it costs nothing.
    """
    task = moved(build(exact_coefficients, **options))
    batches, rows = task.draw(1), 12
    teacher, student = on_meta(small_teacher()), on_meta(small_teacher().student(task.objective.takes_s))
    teaching, learning = network_cost(teacher), network_cost(student)
    frozen = network_cost(student.requires_grad_(False))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # attention as the plan counts it
        task.backward(1)
    steps = batches[0].levels["path"].shape[1] - 1
    expected = 2 * steps * rows * teaching.forward + (1 + task.objective.section.dsm) * rows * _both(learning)
    if task.objective.section.name == "ctm":
        inner, outer = (sum(len(batch.moving[pair]) for batch in batches) for pair in task.objective.jumps)
        assert 0 < inner < rows
        assert 0 < outer < rows
        expected += (inner + outer) * learning.forward + outer * _both(frozen)
    else:
        expected += rows * learning.forward
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


def _both(cost) -> float:
    return cost.forward + cost.backward


@pytest.mark.parametrize(("gan", "losses"), [(None, 2), (GanSection(), 3)])
def test_the_student_is_called_and_passed_back_through_once_a_loss(exact_coefficients, gan, losses):
    task, count = moved(build(exact_coefficients, gan=gan)), Counter()

    def note(module, inputs, output):
        count["forward"] += 1
        count["rows"] += len(output)
        output.register_hook(lambda gradient: count.update(["backward"]))

    next(iter(task.student.model.enc.values())).register_forward_hook(note)
    task.backward(0)
    assert count == {"forward": losses, "rows": losses * 12, "backward": losses}


# ---- compilation ----


@pytest.fixture
def compiled_by(monkeypatch) -> Iterator[Callable[[object], None]]:
    """Chooses the backend of torch.compile; the default one needs a C++ compiler."""
    compiler = torch.compile

    def choose(backend: object) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()  # which earlier tests have filled
        devices.compiles.cache_clear()
        monkeypatch.setattr(torch, "compile", partial(compiler, backend=backend))

    with functorch.patch(donated_buffer=True), torch._dynamo.config.patch(suppress_errors=False):
        yield choose
    torch._dynamo.reset()
    devices.compiles.cache_clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo hides it, unless warnings are errors
@pytest.mark.parametrize(("backend", "options"), [
    ("eager", {"objective": "cm"}), ("eager", {"target": "live", "accumulation": 2}),
    ("aot_eager", {"gan": GanSection()}),
], ids=str)  # fmt: skip
def test_compilation_changes_neither_losses_nor_gradients(exact_coefficients, backend, options, compiled_by):
    """In float64, over steps whose shapes differ; CTM's two losses are in the step with the GAN's too.

    "eager" runs the captured graphs as they are; "aot_eager" compiles their backward passes too, three times as slowly,
    and so only of the step with the most losses and networks.
    """
    compiled_by(backend)
    eager, fast = (moved(build(exact_coefficients, batch_size=6, compile=on, **options)) for on in (False, True))
    assert str(fast.acceleration) == "compiled"
    assert [list(group) for group in fast.groups().values()] == [list(group) for group in eager.groups().values()]
    for index in (0, 2) if "gan" in options else (0, 1):  # the student's
        expected, found = eager.backward(index), fast.backward(index)
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-10), name
        assert distance_of(gradients(fast), gradients(eager)) < 1e-10
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    for index in range(3):
        step(fast, index)
    graphs = counters["stats"]["unique_graphs"]
    assert 3 <= graphs <= 32  # solver, target, student, in the forms in which they are called
    for index in range(3, 7):
        step(fast, index)
    assert counters["stats"]["unique_graphs"] == graphs
    eager.load(fast.groups())


def broken(graph, inputs):
    raise RuntimeError("no compiler here\nand many lines more")


def test_without_a_compiler_a_step_that_is_to_be_compiled_is_refused(exact_coefficients, compiled_by):
    compiled_by(broken)
    with pytest.raises(RecipeError, match="no compiler here") as caught:
        build(exact_coefficients, objective="cm", batch_size=2, compile=True)
    assert "\n" not in str(caught.value)


def test_what_alone_cannot_be_compiled_runs_as_it_is(exact_coefficients, compiled_by):
    """As with compile = "auto", once the compiler has shown that it works."""
    compiled_by("eager")
    eager, fast = (moved(build(exact_coefficients, objective="cm", batch_size=2, compile=on)) for on in (False, True))
    compiled_by(broken)
    fast.networks = replace(fast.networks, target=torch.compile(fast.target_net))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no compiler here"):
        fast.backward(0)
    torch._dynamo.config.suppress_errors = True
    expected, found = eager.backward(0), fast.backward(0)
    assert found.keys() == expected.keys()
    assert distance_of(gradients(fast), gradients(eager)) < 1e-12


@pytest.mark.slow
def test_a_compiled_network_has_the_dropout_masks_of_an_uncompiled_one():
    """So that CM's two networks have the same ones where only one can be compiled; by default they would not."""
    torch._dynamo.reset()
    assert devices.compiles.__wrapped__(True, "cpu")
    network = torch.nn.Dropout(0.5).train()

    def masks(called: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(3)
        return called(torch.ones(64, 8))

    assert torch.equal(masks(torch.compile(network)), masks(network))


# ---- memory format ----


@pytest.mark.parametrize("innermost", [True, False])
def test_checkpoints_do_not_depend_on_the_memory_format(exact_coefficients, tmp_path, innermost):
    """Written with the channels innermost, read without, and the other way round."""
    first, second = (build(exact_coefficients, batch_size=4, channels_last=on) for on in (innermost, not innermost))
    step(first, 0)
    save_checkpoint(tmp_path, 1, first.groups(), {}, 1)
    groups, _ = load_checkpoint(list_checkpoints(tmp_path)[-1])
    second.load(groups)
    assert (lies_last(first), lies_last(second)) == (innermost, not innermost)
    for stem, group in second.groups().items():
        for name, value in first.groups()[stem].items():
            assert torch.equal(group[name], value), name
    values = [step(task, 1).values for task in (first, second)]
    assert values[1] == pytest.approx(values[0], rel=1e-10)


def lies_last(task: Distillation) -> bool:
    """Whether the channels of a convolution's weight are innermost."""
    return task.student.model.dec["8x8_in0"].conv0.weight.stride(1) == 1


# ---- batches ----


FIELDS = ["x0", "labels", "x_t", "z", "sigma"]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 3), (2, 1), (2, 3)])
def test_micro_batches_are_the_rows_of_the_whole_batch(exact_coefficients, objective, processes, accumulation):
    (whole,) = build(exact_coefficients, objective=objective).draw(5)
    parts = []
    for rank in range(processes):
        accelerator = plain_accelerator()
        accelerator.num_processes, accelerator.process_index = processes, rank
        parts += build(exact_coefficients, accelerator, objective=objective, accumulation=accumulation).draw(5)
    assert [part.rows for part in parts] == [slice(k, k + len(parts[0].x0)) for k in range(0, 12, len(parts[0].x0))]
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    for name, level in whole.levels.items():
        assert torch.equal(torch.cat([part.levels[name] for part in parts]), level), name
    for pair, some in whole.moving.items():
        assert torch.equal(torch.cat([part.moving[pair] + part.rows.start for part in parts]), some), pair
    assert len({part.seed for part in parts}) == len(parts)


def test_what_is_prepared_is_what_would_be_drawn(exact_coefficients):
    ahead, plain = (build(exact_coefficients, dropout=0.1) for _ in range(2))
    for index in range(3):
        found, expected = ahead.backward(index), plain.backward(index)
        ahead.prepare(index + 1)
        prepared = ahead.draw(index + 1)
        assert prepared is ahead.ready[2]
        assert [batch.index for batch in prepared] == [index + 1]
        assert found == expected
        assert all(torch.equal(value, gradients(plain)[name]) for name, value in gradients(ahead).items())


def test_another_attempt_draws_other_numbers(exact_coefficients):
    """Also where the batch of the first had been prepared."""
    task = build(exact_coefficients)
    task.prepare(3)
    (first,) = task.draw(3)
    task.attempt = 1
    (second,) = task.draw(3)
    for name in FIELDS:
        assert not torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.seed != second.seed
    task.attempt = 0
    assert torch.equal(task.draw(3)[0].x_t, first.x_t)


# ---- micro-batches by memory ----


def micro_recipe(**values) -> DistillRecipe:
    recipe = load_recipe(shipped_recipes()["digits-paper"], DistillRecipe)
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": 24, **values})})


def others(*counts: int) -> SimpleNamespace:
    """A process among others, which need so many micro-batches."""
    return SimpleNamespace(
        num_processes=1 + len(counts), device=torch.device("cpu"),
        gather=lambda mine: torch.cat([mine, *[torch.tensor([count]) for count in counts]]),
    )  # fmt: skip


NOWHERE = RunFolder(Path("no run here"))


@pytest.mark.parametrize(("most", "counts", "expected"), [
    ("24", (), 1), ("12", (), 2), ("7", (), 4), ("1", (), 24), ("100", (), 1), ("5", (2,), 3), ("12", (4,), 4),
])  # fmt: skip
def test_a_micro_batch_of_at_most_n_images(most, counts, expected):
    """Only equal parts: at most 7 of 24 images are 6; the process that needs the most parts decides."""
    recipe = micro_recipe(accumulation=4)
    found = planning.with_micro_batches(recipe, most, others(*counts), NOWHERE)
    assert found.training.accumulation == expected
    assert found.model_copy(update={"training": recipe.training}) == recipe


@pytest.mark.parametrize(("limit", "counts", "expected"), [
    (100 + 20 * 24, (), 1), (100 + 20 * 24 - 1, (), 2), (150 + 10 * 12, (), 2), (150 + 10 * 12 - 1, (), 3),
    (150 + 10 * 7, (), 4), (0, (), 24), (100 + 20 * 12, (1,), 1), (150 + 10 * 3, (1,), 4), (100 + 20 * 12, (6,), 6),
])  # fmt: skip
def test_auto_takes_what_fits_in_memory(limit, counts, expected, monkeypatch):
    """One pass takes 100 + 20 n bytes for n images, several take 150 + 10 n; a fifth of what is free is left."""
    base = Plan([], 1, 24, 0, 0, 100, 20, 24, 0, 0, 0)

    def counted(recipe: DistillRecipe, devices: int) -> Plan:
        several = recipe.training.accumulation > 1
        return replace(base, state_bytes=150, activation_bytes=10) if several else base

    monkeypatch.setattr(planning, "plan", counted)
    monkeypatch.setattr(planning, "free_bytes", lambda device: (limit + 1e-6) / 0.8)
    found = planning.with_micro_batches(micro_recipe(), "auto", others(*counts), NOWHERE)
    assert found.training.accumulation == expected


@pytest.mark.slow
def test_auto_cuts_a_real_recipe(monkeypatch):
    """`plan` counts each of the three divisions once, however often it is asked."""
    counted: dict[str, Plan] = {}

    def once(recipe: DistillRecipe, devices: int) -> Plan:
        key = f"{recipe.model_dump_json()} {devices}"
        if key not in counted:
            counted[key] = plan(recipe, devices)
        return counted[key]

    monkeypatch.setattr(planning, "plan", once)
    whole, parts = (once(micro_recipe(accumulation=count), 1) for count in (1, 2))
    for free, expected in ((whole.device_bytes / 0.79, 1), (parts.device_bytes / 0.79, 2), (0, 24)):
        monkeypatch.setattr(planning, "free_bytes", lambda device, free=free: free)
        found = planning.with_micro_batches(micro_recipe(), "auto", others(), NOWHERE)
        assert found.training.accumulation == expected


def test_a_run_that_goes_on_keeps_its_micro_batches(monkeypatch, tmp_path):
    """What is free now does not decide, as long as the old number still divides the batch."""
    run = RunFolder(tmp_path)
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    monkeypatch.setattr(planning, "free_bytes", lambda device: 0)
    for before, expected in ((3, 3), (5, 24)):
        changed = {"batch_size": before * 24, "accumulation": before}
        old = micro_recipe().model_copy(update={"training": micro_recipe().training.model_copy(update=changed)})
        run.recipe.write_text(to_toml(old))
        found = planning.with_micro_batches(micro_recipe(), "auto", others(), run)
        assert found.training.accumulation == expected


@pytest.fixture
def memory_for(monkeypatch) -> Callable[[int], list[int]]:
    """Lets a device hold only so many images at once; returns how many were tried."""

    def limit(most: int) -> list[int]:
        tried: list[int] = []
        backward = Distillation.backward

        def limited(task: Distillation, index: int) -> dict[str, Tensor]:
            tried.append(len(task.draw(index)[0].x0))
            if tried[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return backward(task, index)

        monkeypatch.setattr(Distillation, "backward", limited)
        return tried

    return limit


def test_auto_tries_half_as_many_images_where_memory_runs_out(memory_for, tmp_path, capsys):
    """The first step comes again with 16 and 8 images; the run is the one that had 8 from the start."""
    for name, size in (("first", "auto"), ("second", "8")):
        tried = memory_for(8)
        assert run([*fast_distill(tmp_path / name, "training.iterations=2"), "--micro-batch", size]) == 0
        assert tried == ([32, 16, 8, 8] if size == "auto" else [8, 8])
    assert "the device's memory is full, with 16 images at once; 8 are tried" in capsys.readouterr().err
    first, second = (
        load_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1])[0] for name in ("first", "second")
    )
    for name, value in second["weights"].items():
        assert torch.equal(first["weights"][name], value)


@pytest.mark.parametrize(("most", "size", "advice"), [
    (8, "16", "with 16 images at once; --micro-batch 8 has the same result"),
    (0, "auto", "with 1 images at once; fp16"),
])  # fmt: skip
def test_where_memory_runs_out_an_error_says_what_to_do(most, size, advice, memory_for, tmp_path, capsys):
    memory_for(most)
    assert run([*fast_distill(tmp_path / "run", "training.iterations=2"), "--micro-batch", size]) == 2
    assert advice in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_is_not_cut():
    with pytest.raises(RecipeError, match="cannot be divided among 5 processes"):
        planning.with_micro_batches(micro_recipe(), "auto", others(1, 1, 1, 1), NOWHERE)


@pytest.mark.parametrize("text", ["0", "x", "-1", "1.5", ""])
def test_a_wrong_micro_batch_is_refused(text, capsys):
    assert run(["distill", "--recipe", "digits", "--micro-batch", text, "--out", "nowhere"]) == 2
    assert "--micro-batch: got" in capsys.readouterr().err


class Kept:
    """The bytes that are kept for backward passes, now and at most, beside the weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.own = {weight.untyped_storage()._cdata for weight in weights}
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        held = tensor.detach()
        if key not in self.own:
            self.now += 0 if self.holders[key] else size
            self.holders[key] += 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(held, self.free, key, size)
        return held

    def free(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        self.now -= 0 if self.holders[key] else size


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_planned_memory_is_what_a_step_keeps(exact_coefficients, accumulation, monkeypatch):
    """The plan lets every sample need the last jump; a step in which fewer do keeps less."""
    teacher, source = load_teacher("digits").denoiser, load_source("digits")
    options = {"batch_size": 24, "accumulation": accumulation, "points": 10, "max_ode_steps": 9}
    task = build(exact_coefficients, source=source, teacher=teacher, **options)
    found = plan(micro_recipe(accumulation=accumulation), 1)

    def share() -> float:
        kept = Kept([*task.student.parameters(), *task.target_net.parameters()])
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            task.backward(0)
        assert kept.now == 0
        return kept.peak / (found.activation_bytes * found.micro_batch)

    assert 0.3 < share() < 0.95
    force_levels(task, monkeypatch, t=0, s=5, h=3)
    assert share() == pytest.approx(1, abs=0.1)


# ---- memory that glibc keeps ----

_KEPT = """
import ctypes
from cdistill.runtime.processes import keep_memory

class Noting:
    def __getattr__(self, name):
        if name == "mallopt" and {has_mallopt}:
            return lambda *arguments: print(name, *arguments)
        raise AttributeError(name)

ctypes.CDLL = lambda *arguments: Noting()
keep_memory()
print("fine")
"""
_USED = """
import ctypes, sys
from cdistill.runtime.processes import keep_memory

keep_memory()
libc, size = ctypes.CDLL(None), 256 << 20
libc.malloc.argtypes, libc.malloc.restype, libc.free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before, block = resident(), libc.malloc(size)
ctypes.memset(block, 1, size)
assert resident() - before > 0.9 * size
libc.free(block)
print((resident() - before) / size)
"""


@pytest.fixture(autouse=True)
def _no_settings_of_malloc(monkeypatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_kept_unless_the_user_wants_it_otherwise(run_python):
    assert float(run_python(_USED)) > 0.9
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        assert float(run_python(_USED, **{name: "131072"})) < 0.1
    for name in ("MALLOC_MMAP_MAX_", "LD_PRELOAD"):
        assert run_python(_KEPT.format(has_mallopt=True), **{name: ""}).split() == ["fine"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_a_library_without_these_settings_does_no_harm(run_python):
    """M_MMAP_MAX is -4 and M_TRIM_THRESHOLD -1 in malloc.h; musl has no mallopt."""
    assert run_python(_KEPT.format(has_mallopt=True)).splitlines() == ["mallopt -4 0", "mallopt -1 2147483647", "fine"]
    assert run_python(_KEPT.format(has_mallopt=False)).split() == ["fine"]
