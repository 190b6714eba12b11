"""Which noise levels a student is trained on: draws and their law agree; counts follow from the law."""

import pytest
import torch

from cdistill.errors import RecipeError
from cdistill.objectives.cm import CM
from cdistill.objectives.ctm import CTM, CTMSection
from cdistill.objectives.pairs import draw_times, law_of_times
from cdistill.objectives.regression import Regression, RegressionSection
from cdistill.objectives.settings import SolverSection
from cdistill.runtime.randomness import generator
from cdistill.schedule import rho_grid, sampling_grid
from cdistill.settings import check_section

LAWS = ["ctm", "uniform", "mixed", [1, 2, 3, 6], [2]]


@pytest.mark.parametrize("most", [6, 2])
@pytest.mark.parametrize("pairs", LAWS, ids=str)
def test_the_law_is_that_of_the_draws(pairs, most):
    law, count = law_of_times(pairs, 7, most), 3000
    assert float(law.sum()) == pytest.approx(1)
    drawn = torch.zeros(7, 7, 7, dtype=torch.float64)
    for step in range(count // 30):
        drawn.index_put_(
            draw_times(pairs, 7, most, 30, generator(step, "times")), torch.ones(30).double(), accumulate=True
        )
    assert bool((drawn[law == 0] == 0).all())
    # CTM's h is common to a step: its draws are fewer than they look.
    error = (law * (1 - law) / (count / 30 if pairs in ("ctm", "mixed") else count)).sqrt()
    assert bool(((drawn / count - law).abs() <= 5 * error + 1e-3).all())


@pytest.mark.parametrize("pairs", LAWS, ids=str)
def test_every_jump_goes_down_by_way_of_u(pairs):
    i, k, j = draw_times(pairs, 13, 5, 600, generator(0, "times"))
    assert bool((i >= 0).all() and (i < k).all() and (k <= j).all() and (j < 13).all())
    assert bool((k - i <= 5).all())


def test_mixed_is_half_of_each():
    both = (law_of_times("ctm", 7, 6) + law_of_times("uniform", 7, 6)) / 2
    torch.testing.assert_close(law_of_times("mixed", 7, 6), both)
    torch.testing.assert_close(law_of_times("uniform", 7, 6).sum(1).triu(1), torch.ones(7, 7).double().triu(1) / 21)


def test_the_jumps_of_a_number_of_calls_are_the_samplers():
    law = law_of_times([1, 2, 3, 5], 31, 30).sum(1)
    jumps = {(round(float(t), 6), round(float(s), 6)) for t, s in rho_grid(31)[law.nonzero()].tolist()}
    wanted = {(round(float(t), 6), round(float(s), 6)) for k in (1, 2, 3, 5)
              for t, s in zip(sampling_grid(k)[:-1], sampling_grid(k)[1:], strict=True)}  # fmt: skip
    assert jumps == wanted


def test_calls_must_divide_the_grid():
    with pytest.raises(RecipeError, match="2 calls do not divide the 17 intervals of 18 points"):
        check_section({"pairs": [1, 2]}, CTMSection, "")
    with pytest.raises(RecipeError, match="pairs"):
        check_section({"pairs": []}, RegressionSection, "")


@pytest.mark.parametrize("pairs", ["ctm", "mixed"])
def test_counts_are_expectations_over_the_law(pairs):
    values = {"pairs": pairs, "points": 9, "max_ode_steps": 8, "distance": "l2"}
    rollout, store = (CTM(CTMSection(**values, targets=targets), (1,)).cost() for targets in ("rollout", "store"))
    i, k, j = (torch.cat(steps).double() for steps in zip(
        *(draw_times(pairs, 9, 8, 64, generator(step, "times")) for step in range(2000)), strict=True))  # fmt: skip
    assert rollout.teacher == pytest.approx(float(2 * (k - i).mean()), rel=0.03)
    assert rollout.frozen == pytest.approx(float((j != 8).double().mean()), rel=0.03)
    assert rollout.target - rollout.frozen == pytest.approx(float((j != k).double().mean()), rel=0.03)
    assert (store.teacher, store.target, store.frozen) == (0, rollout.target, rollout.frozen)


def test_the_store_costs_what_the_issue_allows_at_the_papers_size():
    published = CTM(CTMSection(distance="l2"), (1,)).cost().forwards(dsm=True)
    store = CTM(CTMSection(distance="l2", targets="store"), (1,)).cost().forwards(dsm=True)
    regression = Regression(RegressionSection(), (1,)).cost()
    assert store / published < 0.35
    assert regression.forwards(dsm=True) / published < 0.2
    assert regression.forwards(dsm=False) / published < 0.1


def test_objectives_say_what_they_read():
    assert CTM(CTMSection(distance="l2"), (1,)).stored == ()
    assert CTM(CTMSection(distance="l2", targets="store"), (1,)).stored == ("u",)
    assert CM(SolverSection(name="cm", distance="l2", targets="store"), (1,)).stored == ("u",)
    assert Regression(RegressionSection(), (1,)).stored == ("s",)


def test_noisy_points_are_not_compared_as_images():
    with pytest.raises(RecipeError, match=r"objective.distance: 'lpips' compares images; .* 'regression-to-eps'"):
        Regression(RegressionSection(distance="lpips"), (3, 32, 32), meta=True)
