from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from cdistill.data import Source, load_source
from cdistill.errors import DivergedError, RecipeError
from cdistill.losses import L2
from cdistill.networks.denoiser import EDMDenoiser, freeze
from cdistill.networks.song import SongUNet
from cdistill.preconditionings import make_preconditioning
from cdistill.randomness import generator
from cdistill.recipe import DistillSection
from cdistill.schedule import rho_grid
from cdistill.training.batches import draw_data, draw_noise, own_rows
from cdistill.training.consistency import CMTask, CTMTask, draw_ctm_times, draw_dsm_sigma
from cdistill.training.cost import step_cost
from cdistill.training.loop import check_finite
from tests.reference import ctm_losses

POINTS = 8


def small_teacher(dtype: torch.dtype = torch.float64) -> EDMDenoiser:
    torch.manual_seed(0)
    network = SongUNet(8, 1, 10, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return freeze(EDMDenoiser(network, (1, 8, 8), 0.5, 10).to(dtype))


def section(**values) -> DistillSection:
    base = {"iterations": 10, "batch_size": 12, "points": POINTS, "max_ode_steps": POINTS - 1, "distance": "l2"}
    return DistillSection(**{**base, "target_rate": 0.9, "ema_rate": 0.9, "learning_rate": 1e-3, **values})


class Doubles(Source):
    """The digits in float64, so that only the mathematics is compared."""

    def batch(self, indices, flip=None):
        x, labels = super().batch(indices, flip)
        return x.double(), labels


def digits() -> Source:
    source = load_source("digits")
    return Doubles(source.name, source.samples, source.labels, source.num_classes)


def make_task(table, name="analytic", kind=CTMTask, **values):
    form = make_preconditioning(name, table=table)
    return kind(small_teacher(), form, L2(), digits(), Accelerator(cpu=True), section(**values), seed=1)


def moved(task):
    """Moves the student away from the start, so that target and student differ and every branch is live."""
    with torch.no_grad():
        for k, (live, target) in enumerate(zip(task.live.parameters(), task.target.parameters(), strict=True)):
            live.add_(0.02 * torch.randn(live.shape, generator=generator(k, "live"), dtype=live.dtype))
            target.add_(0.02 * torch.randn(target.shape, generator=generator(k, "target"), dtype=live.dtype))
    return task


def gradients(task) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in task.live.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["ctm", "analytic", "bcm"])
@pytest.mark.parametrize("index", range(3))
def test_loss_and_gradient_are_those_of_the_plain_reference(exact_coefficients, name, index):
    task = moved(make_task(exact_coefficients, name))
    batch, h = task.draw(index)
    form = make_preconditioning(name, table=exact_coefficients)
    expected, expected_dsm = ctm_losses(task.live, task.target, task.teacher, form, task.grid, batch, h)
    reference = torch.autograd.grad(expected, list(task.live.parameters()), retain_graph=True, allow_unused=True)
    loss = task.consistency_loss(batch, h)
    found = torch.autograd.grad(loss, list(task.live.parameters()), allow_unused=True)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    for first, second in zip(found, reference, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-12)
    dsm = task.dsm_loss(batch)
    assert float(dsm.detach()) == pytest.approx(float(expected_dsm.detach()), rel=1e-10)


def test_the_whole_gradient_is_consistency_plus_balance_times_dsm(exact_coefficients, monkeypatch):
    task = moved(make_task(exact_coefficients))
    batch, h = task.draw(0)
    form = make_preconditioning("analytic", table=exact_coefficients)
    parts = ctm_losses(task.live, task.target, task.teacher, form, task.grid, batch, h)
    names = [name for name, _ in task.live.named_parameters()]
    consistency, dsm = (torch.autograd.grad(loss, list(task.live.parameters())) for loss in parts)
    last = next(k for k, p in enumerate(task.live.parameters()) if p is task.live.balance_weight())
    weight = consistency[last].norm() / (dsm[last].norm() + 1e-4)
    monkeypatch.setattr(task.optimizer, "step", lambda: None)
    losses = task.step(0)
    assert float(losses["balance"]) == pytest.approx(float(weight), rel=1e-6)
    found = gradients(task)
    for name, first, second in zip(names, consistency, dsm, strict=True):
        torch.testing.assert_close(found[name], first + losses["balance"] * second, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_micro_batches_change_nothing(exact_coefficients, monkeypatch, accumulation):
    results = []
    for count in (1, accumulation):
        task = moved(make_task(exact_coefficients, accumulation=count))
        monkeypatch.setattr(task.optimizer, "step", lambda: None)
        losses = task.step(0)
        results.append((losses, gradients(task)))
    (first, whole), (second, parts) = results
    assert float(first["balance"]) == pytest.approx(float(second["balance"]), rel=1e-6)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-12)


def test_no_gradient_reaches_teacher_or_target(exact_coefficients):
    task = moved(make_task(exact_coefficients))
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    task.step(0)
    assert all(p.grad is None for p in [*task.teacher.parameters(), *task.target.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())


def test_the_gradient_flows_through_the_frozen_last_jump(exact_coefficients):
    """For s > eps the student is seen only through f_mu(.; s->eps); its gradient must not be cut there."""
    task = moved(make_task(exact_coefficients))
    batch, h = task.draw(0)
    inside = (batch.end < POINTS - 1).nonzero()[:, 0]
    part = replace(
        batch, **{f: getattr(batch, f)[inside] for f in ("x0", "labels", "x_t", "start", "end", "z", "sigma")}
    )
    assert len(inside) > 0
    (gradient,) = torch.autograd.grad(task.consistency_loss(part, h), [task.live.balance_weight()])
    assert float(gradient.norm()) > 0


def test_moving_averages_follow_eq_28(exact_coefficients):
    task = make_task(exact_coefficients, target_rate=0.5, ema_rate=0.9)
    assert task.target is not task.ema
    start = {name: p.detach().clone() for name, p in task.live.named_parameters()}
    task.step(0)
    for name, live in task.live.named_parameters():
        for average, rate in ((task.target, 0.5), (task.ema, 0.9)):
            expected = rate * start[name] + (1 - rate) * live.detach()
            torch.testing.assert_close(dict(average.named_parameters())[name], expected)


def test_equal_rates_share_one_copy(exact_coefficients):
    task = make_task(exact_coefficients)
    assert task.target is task.ema
    assert set(task.groups()) == {"weights", "ema", "optimizer"}


def test_a_nan_stops_before_the_weights_are_touched(exact_coefficients):
    task = make_task(exact_coefficients)
    task.distance = lambda x, y: (x - y).flatten(1).sum(1) * float("nan")
    before = [p.detach().clone() for p in task.live.parameters()]
    with pytest.raises(DivergedError, match=r"step 0: consistency is nan"):
        task.step(0)
    assert all(torch.equal(p, old) for p, old in zip(task.live.parameters(), before, strict=True))


def test_a_nan_in_the_gradient_alone_stops_too(exact_coefficients):
    """sqrt(0) has a finite value and no finite gradient."""
    task = make_task(exact_coefficients)
    task.distance = lambda x, y: ((x - y) * 0).flatten(1).square().sum(1).sqrt()
    before = [p.detach().clone() for p in task.live.parameters()]
    with pytest.raises(DivergedError, match=r"gradient's norm is nan"):
        task.step(0)
    assert all(torch.equal(p, old) for p, old in zip(task.live.parameters(), before, strict=True))


def test_forms_that_jump_to_eps_only_are_refused_for_trajectories(exact_coefficients):
    with pytest.raises(RecipeError, match="jumps to eps only"):
        make_task(exact_coefficients, "cm")


def test_check_finite_names_the_step_and_the_loss():
    with pytest.raises(DivergedError, match="step 7: dsm is inf"):
        check_finite({"consistency": torch.tensor(1.0), "dsm": torch.tensor(float("inf"))}, 7)


def test_state_round_trip_continues_bit_for_bit(exact_coefficients):
    first = make_task(exact_coefficients, dropout=0.1)
    for index in range(3):
        first.step(index)
    saved = {stem: {k: v.clone() for k, v in group.items()} for stem, group in first.groups().items()}
    second = make_task(exact_coefficients, dropout=0.1)
    second.load(saved)
    torch.manual_seed(12345)  # a scrambled global generator must not matter
    for task in (first, second):
        for index in range(3, 6):
            task.step(index)
    for a, b in zip(first.live.parameters(), second.live.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_that_cannot_be_divided_are_refused(exact_coefficients):
    accelerator = Accelerator(cpu=True)
    form = make_preconditioning("ctm")
    values = section(batch_size=9, accumulation=3).model_copy(update={"batch_size": 10})
    with pytest.raises(RecipeError, match="multiple of 3"):
        CTMTask(small_teacher(), form, L2(), digits(), accelerator, values, seed=0)


# ---- consistency models ----


def test_cm_loss_by_hand(exact_coefficients):
    task = moved(make_task(exact_coefficients, "cm", CMTask, method="cm", dsm=False))
    batch, h = task.draw(0)
    assert h == 1
    grid, form, total = rho_grid(POINTS), make_preconditioning("cm"), []
    for k in range(len(batch.x0)):
        t, s, eps = grid[batch.start[k]], grid[batch.start[k] + 1], grid[-1]
        label = batch.labels[k : k + 1]
        x_t = batch.x_t[k : k + 1]
        with torch.no_grad():
            slope = (x_t - task.teacher(x_t, t[None], None, label)) / t
            guess = x_t + (s - t) * slope
            x_s = x_t + (s - t) * (slope + (guess - task.teacher(guess, s[None], None, label)) / s) / 2
            f, g = form(s, eps)
            y = x_s if s == eps else f * x_s + g * task.target(x_s, s[None], eps[None], label)
            f, g = form(t, eps)
            total.append((f * x_t + g * task.live(x_t, t[None], eps[None], label) - y).square().mean())
    loss = float(task.consistency_loss(batch, 1).detach())
    assert loss == pytest.approx(float(torch.stack(total).mean()), rel=1e-9)


def test_cm_uses_the_same_dropout_mask_on_both_sides(exact_coefficients):
    """With equal weights and a distance that compares masks through D, both see the same units dropped."""
    task = make_task(exact_coefficients, "cm", CMTask, method="cm", dsm=False, dropout=0.5)
    seen = []

    def spy(module, inputs, output):
        if module.training:
            seen.append(torch.get_rng_state())

    for network in (task.live, task.target):
        network.register_forward_hook(spy)
    batch, _ = task.draw(0)
    task.consistency_loss(batch, 1)
    assert len(seen) == 2
    assert torch.equal(*seen)


# ---- draws ----


def test_ctm_times_are_ordered_and_cover_everything():
    seen_h = set()
    for seed in range(300):
        start, end, h = draw_ctm_times(6, 5, 64, generator(seed, "times"))
        assert (start >= 0).all()
        assert (start + h <= end).all()
        assert (end <= 5).all()
        seen_h.add(h)
    assert seen_h == {1, 2, 3, 4, 5}


@pytest.mark.slow
def test_ctm_times_have_the_laws_of_the_reference():
    """N = 18, M = 17: E[h] = 11.67 and P(s = u) = P(s = eps) = 0.496."""
    steps, same, final = [], [], []
    for seed in range(4000):
        start, end, h = draw_ctm_times(18, 17, 64, generator(seed, "times"))
        steps.append(h)
        same.append((end == start + h).double().mean())
        final.append((end == 17).double().mean())
    assert sum(steps) / len(steps) == pytest.approx(11.67, abs=0.25)
    assert float(torch.stack(same).mean()) == pytest.approx(0.496, abs=0.02)
    assert float(torch.stack(final).mean()) == pytest.approx(0.496, abs=0.02)


def test_dsm_noise_levels_are_half_log_normal_half_schedule():
    sigma = draw_dsm_sigma(40000, generator(0, "sigma"))
    lognormal, schedule = sigma[::2].log(), sigma[1::2]
    assert float(lognormal.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(lognormal.std()) == pytest.approx(1.2, abs=0.03)
    place = (schedule ** (1 / 7) - 80 ** (1 / 7)) / (0.002 ** (1 / 7) - 80 ** (1 / 7))
    assert float(place.min()) >= 0
    assert float(place.max()) <= 0.7
    assert float(place.mean()) == pytest.approx(0.35, abs=0.01)


def test_costs_are_those_that_a_step_makes(exact_coefficients):
    """The enumerated forwards agree with forwards counted over many steps."""
    task = make_task(exact_coefficients, batch_size=32)
    rows = {"teacher": 0, "target": 0, "live": 0}

    def counter(name):
        def count(module, inputs, output):
            rows[name] += len(inputs[0])

        return count

    for name in rows:
        getattr(task, name).register_forward_hook(counter(name))
    steps = 60
    for index in range(steps):
        batch, h = task.draw(index)
        with torch.no_grad():
            task.consistency_loss(batch, h)
            task.dsm_loss(batch)
    cost = step_cost("ctm", POINTS, POINTS - 1, True)
    count = 32 * steps
    assert rows["live"] / count == cost.student == 2
    assert rows["teacher"] / count == pytest.approx(cost.teacher, rel=0.12)
    assert rows["target"] / count == pytest.approx(cost.target + cost.frozen, rel=0.12)


def test_costs_of_the_papers_grid():
    cost = step_cost("ctm", 18, 17, True)
    assert cost.teacher == pytest.approx(70 / 3)
    assert cost.frozen == pytest.approx(1 - 0.496, abs=1e-3)
    assert step_cost("cm", 18, 17, False).teacher == 2


def test_each_process_reads_its_own_part_of_what_is_drawn_for_all():
    """Two parts of the data and of the noise are the whole; nothing else is asked of the source."""
    source, draws = load_source("digits"), (lambda: generator(0, "noise"))
    whole, labels = draw_data(source, 0, 3, 12, True)
    noise = draw_noise(whole, draws(), 12, slice(None))
    for rank in range(2):
        rows = own_rows(SimpleNamespace(num_processes=2, process_index=rank), 12)
        x0, own_labels = draw_data(source, 0, 3, 12, True, rows)
        assert torch.equal(x0, whole[6 * rank : 6 * rank + 6])
        assert torch.equal(own_labels, labels[6 * rank : 6 * rank + 6])
        assert torch.equal(draw_noise(x0, draws(), 12, rows), noise[6 * rank : 6 * rank + 6])
