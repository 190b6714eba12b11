"""Times chosen by the distance to the teacher's ends, and what they are worth on other seeds."""

import pytest
import torch

from cdistill.errors import RecipeError
from cdistill.preconditionings import make_preconditioning
from cdistill.sampling import generate, make_sampler, student_sampler, teacher_sampler
from cdistill.sampling.optimising import FITTING, HELD_OUT, Alignment, optimise_times
from cdistill.schedule import EPS, T, sampling_grid
from cdistill.teachers.mixture import mixture_1d

FORM = make_preconditioning("ctm")
FIT, HELD = range(128), range(1024, 1536)


def build(times):
    return student_sampler(mixture_1d(), FORM, None, times=times)


def alignment() -> Alignment:
    return Alignment(teacher_sampler(mixture_1d()), (1,))


def mse(times, seeds) -> float:
    truth, _ = generate(teacher_sampler(mixture_1d()), (1,), seeds)
    return float((generate(build(times), (1,), seeds)[0] - truth).square().mean())


def test_one_time_is_found_where_a_fine_scan_finds_it():
    """CTM's two Euler steps on the exact mixture; the scan's resolution is 0.16 in log t."""
    found = optimise_times(build, sampling_grid(2), alignment(), FIT, HELD)
    scan = [torch.tensor([T, t, EPS], dtype=torch.float64) for t in torch.logspace(-2.5, 1.8, 64).tolist()]
    losses = [mse(times, FIT) for times in scan]
    best = min(losses)
    assert mse(found.candidate, FIT) <= best * 1.001
    assert found.confirmed
    assert torch.equal(found.times, found.candidate)
    assert abs(float((found.times[1] / scan[losses.index(best)][1]).log())) < 0.3


def test_what_is_reported_is_measured_on_the_held_out_seeds():
    found = optimise_times(build, sampling_grid(3), alignment(), FIT, HELD)
    assert found.before == pytest.approx(mse(sampling_grid(3), HELD), rel=1e-12)
    assert found.after == pytest.approx(mse(found.candidate, HELD), rel=1e-12)
    truth, _ = generate(teacher_sampler(mixture_1d()), (1,), HELD)
    first, second = (
        (generate(build(times), (1,), HELD)[0] - truth).square()[:, 0] for times in (found.grid, found.candidate)
    )
    assert found.error == pytest.approx(float((first - second).std()) / len(HELD) ** 0.5, rel=1e-12)
    assert (found.candidate.diff() < 0).all()
    assert found.candidate[0] == T
    assert found.candidate[-1] == EPS
    typed = torch.tensor([float(f"{t:.4g}") for t in found.candidate.tolist()], dtype=torch.float64)
    assert torch.equal(found.candidate, typed)


def test_the_search_is_deterministic_and_costs_what_it_says():
    counted = alignment()
    found = optimise_times(build, sampling_grid(2), counted, range(64), range(64, 128))
    again = optimise_times(build, sampling_grid(2), alignment(), range(64), range(64, 128))
    assert torch.equal(found.candidate, again.candidate)
    assert (found.before, found.after, found.error, found.calls) == (
        again.before, again.after, again.error, again.calls
    )  # fmt: skip
    assert counted.calls == found.calls
    teachers = 34 * 128
    assert 64 * 2 * (1 + 8) < found.calls - teachers - 2 * 2 * 64 <= 64 * 2 * (1 + 16)


def test_a_gain_that_the_held_out_seeds_do_not_confirm_is_not_taken():
    """Fitted on one single seed, the times fit its noise; and from the best times on there is nothing to gain."""
    best = optimise_times(build, sampling_grid(2), alignment(), FIT, HELD).times
    again = optimise_times(build, best, alignment(), [5], HELD)
    assert not torch.equal(again.candidate, best)
    assert again.after > again.before
    assert not again.confirmed
    assert torch.equal(again.times, best)


def test_any_deterministic_sampler_can_be_optimised():
    """Two DPM-Solver++ steps of the teacher itself."""
    found = optimise_times(
        lambda times: make_sampler(mixture_1d(), None, "dpmpp-2m", times=times),
        sampling_grid(4),
        alignment(),
        FIT,
        HELD,
    )
    assert found.confirmed
    assert found.after < 0.5 * found.before


@pytest.mark.parametrize(
    ("make", "grid", "held", "words"),
    [
        (build, sampling_grid(1), HELD, "got 1 network call"),
        (lambda times: make_sampler(mixture_1d(), FORM, "cm", times=times), sampling_grid(2), HELD, "fresh noise"),
        (build, sampling_grid(2), range(100, 300), "in both sets"),
    ],
)
def test_what_cannot_be_optimised_is_refused(make, grid, held, words):
    with pytest.raises(RecipeError, match=words):
        optimise_times(make, grid, alignment(), FIT, held)


def test_the_default_seeds_are_apart_and_not_those_that_people_draw():
    assert not set(FITTING) & set(HELD_OUT)
    assert min(*FITTING, *HELD_OUT) >= 2**31
    assert max(*FITTING, *HELD_OUT) < 2**32
