import pytest
import torch

from cdistill.errors import RecipeError
from cdistill.schedule import EPS, T, log_uniform_grid, rho_grid, sampling_grid, time_list


@pytest.mark.parametrize("make", [rho_grid, log_uniform_grid])
@pytest.mark.parametrize("points", [2, 3, 18, 40, 160])
def test_grids_descend_from_exactly_t_to_exactly_eps(make, points):
    grid = make(points)
    assert grid.dtype == torch.float64
    assert grid[0] == T
    assert grid[-1] == EPS
    assert len(grid) == points
    assert (grid.diff() < 0).all()


def test_rho_grid_is_uniform_in_the_seventh_root():
    roots = rho_grid(18) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), torch.full((17,), float(roots.diff().mean()), dtype=torch.float64))


def test_log_uniform_grid_has_a_constant_ratio():
    grid = log_uniform_grid(120)
    ratios = grid[1:] / grid[:-1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, (EPS / T) ** (1 / 119)))


def test_sampling_grid_has_one_point_more_than_calls():
    assert sampling_grid(1).tolist() == [T, EPS]
    assert len(sampling_grid(5)) == 6


@pytest.mark.parametrize("nfe", [0, -1])
def test_sampling_grid_refuses_fewer_than_one_call(nfe):
    with pytest.raises(RecipeError, match="1 or more"):
        sampling_grid(nfe)


@pytest.mark.parametrize("arguments", [(1,), (5, 0.0, 80.0), (5, 3.0, 2.0)])
def test_rho_grid_refuses_what_is_no_grid(arguments):
    with pytest.raises(RecipeError, match="needs 2 or more"):
        rho_grid(*arguments)


@pytest.mark.parametrize("text", ["80,2.5,0.002", "2.5", "80,2.5", "2.5,0.002", " 80, 2.5 ,2e-3", [2.5], (T, 2.5, EPS)])
def test_a_list_of_times_may_leave_out_its_ends(text):
    times = time_list(text)
    assert times.dtype == torch.float64
    assert times.tolist() == [T, 2.5, EPS]


def test_a_grid_is_its_own_list_of_times():
    assert torch.equal(time_list(sampling_grid(7)), sampling_grid(7))
    assert time_list("80,0.002").tolist() == [T, EPS]
    assert torch.equal(time_list(sampling_grid(2).float())[[0, -1]], sampling_grid(1))
    assert len(time_list(sampling_grid(2).float())) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "a",
        "1,2",
        "2.5,2.5",
        "81",
        "80,80",
        "0.001",
        "0.002,0.002",
        "nan",
        "inf,2",
        "2.5,,1",
        [],
        "-1",
        "0.002,2.5,80",
        "2.5,80",
        "0.002,1",
    ],
)
def test_times_that_do_not_fall_from_t_to_eps_are_refused(wrong):
    with pytest.raises(RecipeError, match=r"^times: got '.*'; needs noise levels that fall strictly from 80 to 0\.002"):
        time_list(wrong)
