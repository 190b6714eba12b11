from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from cdistill.data import Source, load_source
from cdistill.errors import RecipeError
from cdistill.networks.denoiser import EDMDenoiser, freeze
from cdistill.networks.song import SongUNet
from cdistill.objectives.cost import step_cost
from cdistill.objectives.losses import L2
from cdistill.preconditionings import make_preconditioning
from cdistill.registry import DISTANCES, PRECONDITIONINGS
from cdistill.runtime.randomness import generator
from cdistill.training.distillation import CMTask, CTMTask
from cdistill.training.gan import Adversary
from cdistill.training.loop import Counters, Report, finish, read
from cdistill.training.reference import Sample, cm_points, ctm_points, dsm_loss, total_gradient
from cdistill.training.settings import DistillSection, GanSection
from cdistill.training.step_data import draw_ctm_times, draw_data, draw_dsm_sigma, draw_noise, own_rows

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


def make_task(table, name="analytic", teacher=None, gan=None, **values):
    chosen, form = section(**values), make_preconditioning(name, table=table)
    kind, distance = {"ctm": CTMTask, "cm": CMTask}[chosen.method], DISTANCES.get(chosen.distance)()
    teacher, accelerator = teacher or small_teacher(), Accelerator(cpu=True)
    adversary = gan and Adversary(gan, teacher.sample_shape, teacher.num_classes, accelerator, 1)
    if adversary:
        adversary.discriminator.double()
    task = kind(teacher, form, distance, digits(), accelerator, chosen, 1, adversary)
    task.form, task.phi = form, small_teacher()
    return task


def moved(task):
    """Moves the student away from the start, so that target and student differ and every branch is live."""
    with torch.no_grad():
        for k, (live, target) in enumerate(zip(task.live.parameters(), task.target.parameters(), strict=True)):
            for moving, purpose in ((live, "live"), (target, "target")):
                noise = torch.randn(moving.shape, generator=generator(k, purpose), dtype=moving.dtype)
                moving.add_(0.02 * noise.to(moving.device))
    return task


def step(task, index: int) -> Report:
    """A step as the loop does it."""
    report = read(task.accelerator, task.gradients(index))
    finish(task, index, report, Counters())
    return report


def gradients(task) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in task.live.named_parameters() if p.grad is not None}


def plainly(task, index: int):
    """Losses, weight and gradient of a step as `cdistill.training.reference` computes them."""
    section = task.section
    a = task.live if section.target == "live" else task.target
    consistency, dsm, gan = [], [], []
    for batch in task.draw(index):
        landed = []
        for k in range(len(batch.x0)):
            i, j, only = int(batch.start[k]), int(batch.end[k]), slice(k, k + 1)
            label = None if batch.labels is None else batch.labels[only]
            times, s, eps = task.grid[i : i + batch.h + 1], task.grid[j], task.grid[-1]
            sample = Sample(batch.x0[only], batch.x_t[only], batch.z[only], batch.sigma[k], label, times, s, eps)
            if section.method == "ctm":
                points = ctm_points(task.live, a, task.target, task.phi, task.form, sample)
            else:
                points = cm_points(task.live, task.target, task.phi, task.form, sample)
            landed.append(points[0])
            consistency.append(task.distance(*points)[0])
            dsm.append(dsm_loss(task.live, sample, task.live.sigma_data))
        if task.adversary:
            gan.append(task.adversary.generator_loss(torch.cat(landed), batch.labels, index, batch.rows))
    losses = {"consistency": torch.stack(consistency).mean()}
    losses |= {"dsm": torch.stack(dsm).mean()} if section.dsm else {}
    losses |= {"gan": torch.stack(gan).mean()} if gan else {}
    gradient, weights = total_gradient(task.live, losses["consistency"], losses.get("dsm"), losses.get("gan"))
    names = [name for name, parameter in task.live.named_parameters() if parameter.requires_grad]
    return {**losses, **weights}, dict(zip(names, gradient, strict=True))


FORMS = [(name, method) for name in PRECONDITIONINGS.names() for method in ("ctm", "cm")]
FORMS.remove(("cm", "ctm"))
OPTIONS = [
    {"dsm": False}, {"target": "live"}, {"accumulation": 2, "target": "live"}, {"accumulation": 3, "dsm": False},
    {"distance": "pseudo-huber"}, {"channels_last": False}, {"target_rate": 0.5},
]  # fmt: skip
CASES = [(*form, options) for form in FORMS for options in ({}, {"accumulation": 2})]
CASES += [("analytic", method, options) for method in ("ctm", "cm") for options in OPTIONS]
CASES += [("ctm", "ctm", {"gan": GanSection(), **more}) for more in ({}, {"accumulation": 2}, {"dsm": False})]


@pytest.mark.parametrize(("name", "method", "options"), CASES, ids=str)
def test_losses_and_gradient_are_those_of_the_plain_reference(exact_coefficients, name, method, options):
    """In float64, for every preconditioning, objective and option."""
    task = moved(make_task(exact_coefficients, name, method=method, batch_size=6, **options))
    found = task.gradients(0)
    values, expected = plainly(task, 0)
    values["gradient_norm"] = norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert found.keys() == values.keys()
    for key, value in values.items():
        assert float(found[key]) == pytest.approx(float(value.detach()), rel=1e-10), key
    for key, gradient in gradients(task).items():
        assert float((gradient - expected[key]).norm()) <= 1e-10 * float(norm), key


def test_no_gradient_reaches_teacher_or_target(exact_coefficients):
    teacher = small_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    task = moved(make_task(exact_coefficients, teacher=teacher))
    step(task, 0)
    assert all(p.grad is None for p in [*teacher.parameters(), *task.target.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_gradient_flows_through_the_frozen_last_jump(exact_coefficients):
    """For s > eps the student is seen only through f_mu(.; s->eps); its gradient must not be cut there."""
    task = moved(make_task(exact_coefficients))
    (batch,) = task.draw(0)
    assert len(batch.outer) > 0
    denoised = task.student_jump(batch).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(task.consistency_loss(task.land(batch, denoised), task.goal(batch)), [denoised])
    assert (gradient[batch.outer].flatten(1).norm(dim=1) > 0).all()


def test_moving_averages_follow_eq_28(exact_coefficients):
    task = make_task(exact_coefficients, target_rate=0.5, ema_rate=0.9)
    assert task.target is not task.ema
    start = {name: p.detach().clone() for name, p in task.live.named_parameters()}
    step(task, 0)
    for name, live in task.live.named_parameters():
        for average, rate in ((task.target, 0.5), (task.ema, 0.9)):
            expected = rate * start[name] + (1 - rate) * live.detach()
            torch.testing.assert_close(dict(average.named_parameters())[name], expected)


def test_equal_rates_share_one_copy(exact_coefficients):
    task = make_task(exact_coefficients)
    assert task.target is task.ema
    assert set(task.groups()) == {"weights", "ema", "optimizer"}


def tensors(task):
    return [value.clone() for group in task.groups().values() for value in group.values()]


@pytest.mark.parametrize(("distance", "wrong"), [
    (lambda x, y: (x - y).flatten(1).sum(1) * float("nan"), ["consistency", "balance", "gradient_norm"]),
    (lambda x, y: ((x - y) * 0).flatten(1).square().sum(1).sqrt(), ["balance", "gradient_norm"]),
    (lambda x, y: (x - y).flatten(1).sum(1) * float("inf"), None),
], ids=["loss", "gradient alone", "infinite"])  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(exact_coefficients, distance, wrong):
    """The root at zero has a finite value and no finite gradient."""
    task, counters = make_task(exact_coefficients), Counters()
    step(task, 0)
    before, honest = tensors(task), task.distance
    task.distance = distance
    report = read(task.accelerator, task.gradients(1))
    assert report.wrong
    assert wrong is None or report.wrong == wrong
    finish(task, 1, report, counters)
    assert all(torch.equal(*pair) for pair in zip(tensors(task), before, strict=True))
    assert (counters.skipped, counters.row()) == (1, 1)
    task.distance = honest
    finish(task, 2, read(task.accelerator, task.gradients(2)), counters)
    assert (counters.skipped, counters.row()) == (1, 0)
    assert not all(torch.equal(*pair) for pair in zip(tensors(task), before, strict=True))


def test_forms_that_jump_to_eps_only_are_refused_for_trajectories(exact_coefficients):
    with pytest.raises(RecipeError, match="jumps to eps only"):
        make_task(exact_coefficients, "cm")


@pytest.mark.parametrize("options", [{}, {"gan": GanSection()}, {"target_rate": 0.5}, {"accumulation": 2}], ids=str)
def test_state_round_trip_continues_bit_for_bit(exact_coefficients, options):
    first = make_task(exact_coefficients, dropout=0.1, **options)
    for index in range(3):
        step(first, index)
    saved = {stem: {k: v.clone() for k, v in group.items()} for stem, group in first.groups().items()}
    second = make_task(exact_coefficients, dropout=0.1, **options)
    second.load(saved)
    torch.manual_seed(12345)  # a scrambled global generator must not matter
    for task in (first, second):
        for index in range(3, 6):
            step(task, index)
    for a, b in zip(first.live.parameters(), second.live.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_that_cannot_be_divided_are_refused(exact_coefficients):
    accelerator = Accelerator(cpu=True)
    form = make_preconditioning("ctm")
    values = section(batch_size=9, accumulation=3).model_copy(update={"batch_size": 10})
    with pytest.raises(RecipeError, match="multiple of 3"):
        CTMTask(small_teacher(), form, L2(), digits(), accelerator, values, seed=0)


# ---- consistency models ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_cm_uses_the_same_dropout_mask_on_both_sides(exact_coefficients, accumulation):
    task = make_task(exact_coefficients, "cm", method="cm", dropout=0.5, accumulation=accumulation)
    seen = {"live": [], "target": []}

    def spy(name):
        def look(module, inputs):
            if module.training:
                seen[name].append(torch.get_rng_state())

        return look

    for name in seen:
        getattr(task, name).register_forward_pre_hook(spy(name))
    task.gradients(0)
    assert len(seen["target"]) == accumulation
    assert not any(torch.equal(state, seen["target"][0]) for state in seen["live"][accumulation:])
    jumps = [state for state in seen["live"] if any(torch.equal(state, other) for other in seen["target"])]
    assert len(jumps) == accumulation


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


@pytest.mark.parametrize("accumulation", [1, 2])
def test_costs_are_those_that_a_step_makes(exact_coefficients, accumulation):
    """The enumerated forwards agree with forwards counted over many steps."""
    teacher = small_teacher()
    task = make_task(exact_coefficients, batch_size=8, teacher=teacher, accumulation=accumulation, channels_last=False)
    networks, rows = {"teacher": teacher, "target": task.target, "live": task.live}, Counter()

    def counter(name):
        def count(module, inputs, output):
            rows[name] += len(inputs[0])

        return count

    for name, network in networks.items():
        network.register_forward_hook(counter(name))
    steps = 40
    for index in range(steps):
        task.gradients(index)
    cost = step_cost("ctm", POINTS, POINTS - 1, True)
    count = 8 * steps
    assert rows["live"] / count == cost.student == 2
    assert rows["teacher"] / count == pytest.approx(cost.teacher, rel=0.12)
    assert rows["target"] / count == pytest.approx(cost.target + cost.frozen, rel=0.12)


def test_costs_of_the_papers_grid():
    cost = step_cost("ctm", 18, 17, True)
    assert cost.teacher == pytest.approx(70 / 3)
    assert cost.frozen == pytest.approx(1 - 0.496, abs=1e-3)
    assert step_cost("cm", 18, 17, False).teacher == 2


def test_each_process_reads_its_own_part_of_what_is_drawn_for_all():
    """Two or three parts of the data and of the noise are the whole; nothing else is asked of the source."""
    source = load_source("digits")
    whole, labels = draw_data(source, 0, 3, 36, True)
    noise = draw_noise(0, "x_t", 3, slice(0, 36), whole)
    assert torch.unique(noise.flatten(1), dim=0).shape == (36, 64)
    for count in (2, 3):
        for rank in range(count):
            rows = own_rows(SimpleNamespace(num_processes=count, process_index=rank), 36)
            x0, own_labels = draw_data(source, 0, 3, 36, True, rows)
            assert torch.equal(x0, whole[rows])
            assert torch.equal(own_labels, labels[rows])
            assert torch.equal(draw_noise(0, "x_t", 3, rows, x0), noise[rows])
