from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from cdistill.data import load_source
from cdistill.errors import RecipeError
from cdistill.objectives.base import make_objective
from cdistill.objectives.cm import CM
from cdistill.objectives.ctm import CTM, CTMSection
from cdistill.objectives.dsm import draw_dsm_sigma
from cdistill.objectives.pairs import draw_ctm_times
from cdistill.objectives.settings import SolverSection
from cdistill.preconditionings import make_preconditioning
from cdistill.registry import PRECONDITIONINGS
from cdistill.runtime.randomness import generator
from cdistill.training.distillation import Distillation
from cdistill.training.loop import Counters, finish, read
from cdistill.training.settings import GanSection
from cdistill.training.step_data import draw_data, draw_noise, own_rows
from tests.training.reference_step import Sample, cm_points, ctm_points, dsm_loss, total_gradient
from tests.training.tasks import digits, gradients, make_task, moved, sections, small_teacher, step, tensors


def plainly(task, index: int):
    """Losses, weight and gradient of a step as `reference_step` computes them."""
    section = task.objective.section
    a = task.student if getattr(section, "target", "ema") == "live" else task.target_net
    consistency, dsm, gan = [], [], []
    for batch in task.draw(index):
        landed = []
        for k in range(len(batch.x0)):
            only, levels = slice(k, k + 1), {name: level[k] for name, level in batch.levels.items()}
            label = None if batch.labels is None else batch.labels[only]
            z, sigma = (None, None) if batch.z is None else (batch.z[only], batch.sigma[k])
            sample = Sample(
                batch.x0[only], batch.x_t[only], z, sigma, label, levels["path"], levels["s"], levels["eps"]
            )
            if section.name == "ctm":
                points = ctm_points(task.student, a, task.target_net, task.phi, task.form, sample)
            else:
                points = cm_points(task.student, task.target_net, task.phi, task.form, sample)
            landed.append(points[0])
            consistency.append(task.objective.distance(*points)[0])
            if section.dsm:
                dsm.append(dsm_loss(task.student, sample, task.student.sigma_data))
        if task.adversary:
            points = torch.cat(landed)
            gan.append(task.adversary.generator_loss(points, batch.labels, index, batch.rows, task.draw_seed))
    losses = {"consistency": torch.stack(consistency).mean()}
    losses |= {"dsm": torch.stack(dsm).mean()} if section.dsm else {}
    losses |= {"gan": torch.stack(gan).mean()} if gan else {}
    gradient, weights = total_gradient(task.student, losses["consistency"], losses.get("dsm"), losses.get("gan"))
    names = [name for name, parameter in task.student.named_parameters() if parameter.requires_grad]
    return {**losses, **weights}, dict(zip(names, gradient, strict=True))


FORMS = [(name, objective) for name in PRECONDITIONINGS.names() for objective in ("ctm", "cm")]
FORMS.remove(("cm", "ctm"))
OPTIONS = [
    {"dsm": False}, {"target": "live"}, {"accumulation": 2, "target": "live"}, {"accumulation": 3, "dsm": False},
    {"distance": "pseudo-huber"}, {"channels_last": False}, {"target_rate": 0.5},
]  # fmt: skip
CASES = [(*form, options) for form in FORMS for options in ({}, {"accumulation": 2})]
CASES += [("analytic", objective, options) for objective in ("ctm", "cm") for options in OPTIONS]
CASES += [("ctm", "ctm", {"gan": GanSection(), **more}) for more in ({}, {"accumulation": 2}, {"dsm": False})]


@pytest.mark.parametrize(("name", "objective", "options"), CASES, ids=str)
def test_losses_and_gradient_are_those_of_the_plain_reference(exact_coefficients, name, objective, options):
    """In float64, for every preconditioning, objective and option."""
    task = moved(make_task(exact_coefficients, name, objective=objective, batch_size=6, **options))
    found = task.backward(0)
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
    assert all(p.grad is None for p in [*teacher.parameters(), *task.target_net.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_gradient_flows_through_the_frozen_last_jump(exact_coefficients):
    """For s > eps the student is seen only through f_mu(.; s->eps); its gradient must not be cut there."""
    task = moved(make_task(exact_coefficients))
    (batch,) = task.draw(0)
    outer = batch.moving["s", "eps"]
    assert len(outer) > 0
    denoised = task.denoise(batch).detach().requires_grad_()
    loss = task.objective.loss(task.predict(batch, denoised), task.target(batch), batch).mean()
    (gradient,) = torch.autograd.grad(loss, [denoised])
    assert (gradient[outer].flatten(1).norm(dim=1) > 0).all()


def test_moving_averages_follow_eq_28(exact_coefficients):
    task = make_task(exact_coefficients, target_rate=0.5, ema_rate=0.9)
    assert task.target_net is not task.student_ema
    start = {name: p.detach().clone() for name, p in task.student.named_parameters()}
    step(task, 0)
    for name, live in task.student.named_parameters():
        for average, rate in ((task.target_net, 0.5), (task.student_ema, 0.9)):
            expected = rate * start[name] + (1 - rate) * live.detach()
            torch.testing.assert_close(dict(average.named_parameters())[name], expected)


def test_equal_rates_share_one_copy(exact_coefficients):
    task = make_task(exact_coefficients)
    assert task.target_net is task.student_ema
    assert set(task.groups()) == {"weights", "ema", "optimizer"}


@pytest.mark.parametrize(("distance", "wrong"), [
    (lambda x, y: (x - y).flatten(1).sum(1) * float("nan"), ["consistency", "balance", "gradient_norm"]),
    (lambda x, y: ((x - y) * 0).flatten(1).square().sum(1).sqrt(), ["balance", "gradient_norm"]),
    (lambda x, y: (x - y).flatten(1).sum(1) * float("inf"), None),
], ids=["loss", "gradient alone", "infinite"])  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(exact_coefficients, distance, wrong):
    """The root at zero has a finite value and no finite gradient."""
    task, counters = make_task(exact_coefficients), Counters()
    step(task, 0)
    before, honest = tensors(task), task.objective.distance
    task.objective.distance = distance
    report = read(task.accelerator, task.backward(1))
    assert report.wrong
    assert wrong is None or report.wrong == wrong
    finish(task, 1, report, counters)
    assert all(torch.equal(*pair) for pair in zip(tensors(task), before, strict=True))
    assert (counters.skipped, counters.row()) == (1, 1)
    task.objective.distance = honest
    finish(task, 2, read(task.accelerator, task.backward(2)), counters)
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
    for a, b in zip(first.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_that_cannot_be_divided_are_refused():
    training, chosen = sections(batch_size=9, accumulation=3)
    training = training.model_copy(update={"batch_size": 10})
    objective = make_objective(chosen, (1, 8, 8))
    with pytest.raises(RecipeError, match="multiple of 3"):
        Distillation(
            small_teacher(), make_preconditioning("ctm"), objective, digits(), Accelerator(cpu=True), training, seed=0
        )


# ---- consistency models ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_cm_uses_the_same_dropout_mask_on_both_sides(exact_coefficients, accumulation):
    task = make_task(exact_coefficients, "cm", objective="cm", dropout=0.5, accumulation=accumulation)
    seen = {"student": [], "target_net": []}

    def spy(name):
        def look(module, inputs):
            if module.training:
                seen[name].append(torch.get_rng_state())

        return look

    for name in seen:
        getattr(task, name).register_forward_pre_hook(spy(name))
    task.backward(0)
    assert len(seen["target_net"]) == accumulation
    assert not any(torch.equal(state, seen["target_net"][0]) for state in seen["student"][accumulation:])
    jumps = [state for state in seen["student"] if any(torch.equal(state, other) for other in seen["target_net"])]
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
    networks, rows = {"teacher": teacher, "target": task.target_net, "live": task.student}, Counter()

    def counter(name):
        def count(module, inputs, output):
            rows[name] += len(inputs[0])

        return count

    for name, network in networks.items():
        network.register_forward_hook(counter(name))
    steps = 40
    for index in range(steps):
        task.backward(index)
    cost = task.objective.cost()
    count = 8 * steps
    assert rows["live"] / count == cost.student + 1 == 2
    assert rows["teacher"] / count == pytest.approx(cost.teacher, rel=0.12)
    assert rows["target"] / count == pytest.approx(cost.target + cost.frozen, rel=0.12)


def test_costs_of_the_papers_grid():
    cost = CTM(CTMSection(distance="l2"), (1, 8, 8)).cost()
    assert cost.teacher == pytest.approx(70 / 3)
    assert cost.frozen == pytest.approx(1 - 0.496, abs=1e-3)
    assert CM(SolverSection(name="cm", distance="l2"), (1, 8, 8)).cost().teacher == 2


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
