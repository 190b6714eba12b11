"""Steps that read kept trajectories: the same numbers as plainly computed, however the batch is cut."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cdistill.errors import MismatchError, RecipeError
from cdistill.networks.denoiser import broadcast
from cdistill.objectives.base import make_objective
from cdistill.recipe.files import load_recipe
from cdistill.recipe.schema import DistillRecipe
from cdistill.sampling.settings import TrajectoriesSection
from cdistill.sampling.solvers import heun_step
from cdistill.sampling.trajectories import open_trajectories
from cdistill.schedule import rho_grid
from cdistill.teachers import Teacher
from cdistill.training.settings import GanSection
from cdistill.workflows.distill import distill
from tests.training.tasks import POINTS, gradients, make_task, moved, sections, small_teacher, step

READERS = {"ctm": {"targets": "store"}, "cm": {"targets": "store"}, "regression": {}, "regression-to-eps": {}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDISTILL_ASSETS", str(tmp_path_factory.mktemp("assets")))
        section = TrajectoriesSection(count=200, precision="fp32")
        teacher = Teacher("small", small_teacher(), "digits")
        return open_trajectories(section, rho_grid(POINTS), teacher, None, Accelerator(cpu=True))


def task_of(table, store, objective, **values):
    to_eps = objective in ("cm", "regression-to-eps")
    given = {"objective": objective, **READERS[objective], **values}
    return moved(make_task(table, "cm" if to_eps else "analytic", store=store, **given))


@pytest.mark.parametrize("objective", ["ctm", "cm"])
def test_x_u_is_where_the_solver_comes_from_x_t(exact_coefficients, store, objective):
    task = task_of(exact_coefficients, store, objective)
    (batch,) = task.draw(0)
    x = batch.x_t
    for t, u in pairwise(batch.levels["path"].T):
        x = heun_step(lambda point, level: task.phi(point, level, None, batch.labels), x, t, u)
    error = ((x - task.networks.solve(batch)).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).max()
    assert float(error) < 1e-5  # the store's float32, through h steps
    assert batch.labels.tolist() != batch.x0_labels.tolist()


def test_regression_is_the_mean_square_between_jump_and_trajectory(exact_coefficients, store):
    task = task_of(exact_coefficients, store, "regression", pairs="uniform")
    (batch,) = task.draw(3)
    plain = 0
    for row in range(12):
        t, s = batch.levels["t"][row], batch.levels["s"][row]
        f, g = task.form(t, s)
        one = slice(row, row + 1)
        x_t, x_s = batch.x_t[one], batch.points["s"][one]
        d = task.student(x_t, t[None], s[None], batch.labels[one])
        plain = plain + (f * x_t + g * d - x_s).square().mean() / 12
    wanted = torch.autograd.grad(plain, list(task.student.parameters()), allow_unused=True)
    report = task.backward(3)
    assert set(report) == {"consistency", "gradient_norm"}
    torch.testing.assert_close(report["consistency"], plain.detach())
    for parameter, gradient in zip(task.student.parameters(), wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("objective", list(READERS))
def test_the_gradient_does_not_depend_on_micro_batches(exact_coefficients, store, objective):
    found = []
    for accumulation in (1, 3):
        task = task_of(exact_coefficients, store, objective, dsm=True, accumulation=accumulation)
        task.backward(1)
        found.append(gradients(task))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_mirrored_trajectories_are_mirrored_at_all_their_levels(exact_coefficients, store):
    task = task_of(exact_coefficients, store, "ctm")
    (plain,) = task.draw(0)
    task.ready = None
    try:
        store.flips = True
        (mixed,) = task.draw(0)
    finally:
        store.flips = False
    same = (plain.x_t == mixed.x_t).flatten(1).all(1)
    assert 0 < int(same.sum()) < len(same)
    for before, after in ((plain.x_t, mixed.x_t), (plain.points["u"], mixed.points["u"])):
        assert torch.equal(torch.where(broadcast(same, before).bool(), before, before.flip(-1)), after)


def test_warm_up_trains_by_another_objective_first(exact_coefficients, store):
    section = sections("regression", pairs="uniform")[1]
    warmup = (make_objective(section, (1, 8, 8)), 2)
    both = task_of(exact_coefficients, store, "ctm", warmup=warmup)
    alone = task_of(exact_coefficients, store, "regression", pairs="uniform", target_rate=0.9)
    assert [set(both.losses(k)) for k in range(3)] == [{"consistency"}, {"consistency"}, {"consistency", "dsm"}]
    for index in range(2):
        assert step(both, index).values["consistency"] == step(alone, index).values["consistency"]
    (batch,) = both.draw(2)
    assert set(batch.points) == {"u"}


def test_the_discriminator_sees_each_image_with_its_own_class(exact_coefficients, store):
    task = task_of(exact_coefficients, store, "regression", gan=GanSection(discriminator="small"))
    (batch,) = task.draw(1)
    seen = []
    task.adversary.discriminator.register_forward_hook(lambda module, arguments, logits: seen.append(arguments[1]))
    task.adversary.backward([(batch, task.fake(batch))], 1, 0)
    assert torch.equal(seen[0], torch.cat([batch.x0_labels, batch.labels]))
    assert not torch.equal(batch.x0_labels, batch.labels)


SMALL = [
    "training.batch_size=16", "preconditioning.name=ctm", "evaluation.samples=16", "evaluation.nfe=[1, 2]",
    "objective.points=6", "trajectories.count=256", "checkpoint.every=2",
]  # fmt: skip


@pytest.mark.parametrize("name", ["ctm", "regression"])
def test_a_run_resumes_exactly_and_keeps_to_its_trajectories(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    own = ["objective.targets=store", "objective.max_ode_steps=5"] if name == "ctm" else ["objective.pairs=uniform"]
    sets = [*SMALL, f"objective.name={name}", *own]
    whole = distill("mixture", [*sets, "training.iterations=5"], out=tmp_path / "whole")
    distill("mixture", [*sets, "training.iterations=3"], out=tmp_path / "parts")
    parts = distill("mixture", [*sets, "training.iterations=5"], out=tmp_path / "parts")
    for first, second in zip(
        whole.student.denoiser.state_dict().values(), parts.student.denoiser.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second)
    (shard,) = (tmp_path / "assets" / "trajectories").glob("*/0*.safetensors")
    shard.rename(shard.with_suffix(".kept"))
    monkeypatch.setattr("cdistill.sampling.trajectories._FIRST_SEED", 5)
    with pytest.raises(MismatchError, match="made with another trajectory store"):
        distill("mixture", [*sets, "training.iterations=7"], out=tmp_path / "parts")


def test_a_recipe_checks_its_warm_up():
    recipe = load_recipe(Path("digits-paper"), DistillRecipe, ["warmup.name=regression", "warmup.iterations=20"])
    assert (recipe.warmup.name, recipe.warmup.dsm, recipe.warmup.pairs) == ("regression", False, "mixed")
    bad = {
        "warmup.iterations=20": r"warmup.max_ode_steps: unknown key",
        "warmup.iterations=9999": r"warmup.iterations: got 9999; of \d+ in training",
    }
    for override, message in bad.items():
        more = ["warmup.max_ode_steps=3"] if "unknown" in message else []
        with pytest.raises(RecipeError, match=message):
            load_recipe(Path("digits-paper"), DistillRecipe, ["warmup.name=regression", override, *more])
    with pytest.raises(RecipeError, match=r"warmup.name: 'regression-to-eps' trains another kind of student"):
        load_recipe(Path("digits-paper"), DistillRecipe, ["warmup.name=regression-to-eps", "warmup.iterations=2"])


def test_both_objectives_must_read_the_same_grid(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    sets = [*SMALL, "objective.name=regression", "training.iterations=3", "warmup.name=regression", "warmup.points=7"]
    with pytest.raises(RecipeError, match="need one grid of noise levels"):
        distill("mixture", [*sets, "warmup.iterations=1"], out=tmp_path / "run")
