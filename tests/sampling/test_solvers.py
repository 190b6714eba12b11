import itertools
import math

import pytest
import torch

from cdistill.preconditionings import make_preconditioning
from cdistill.preconditionings.coefficients import Coefficients
from cdistill.sampling.solvers import heun_step, jump, solve
from cdistill.schedule import EPS, T, rho_grid, sampling_grid
from cdistill.teachers.mixture import MixtureDenoiser, mixture_1d

VARIANCE = 0.7


def euler_step(denoise, x, t, u):
    """x + (u - t) (x - D)/t: the oracle of CTM's jump."""
    return x + ((u - t) / t)[:, None] * (x - denoise(x, t))


def gaussian() -> MixtureDenoiser:
    return MixtureDenoiser(torch.ones(1), torch.zeros(1, 1), torch.full((1, 1, 1), VARIANCE, dtype=torch.float64))


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2)])
def test_order_of_convergence_against_the_closed_form(step, order):
    """A Gaussian's trajectories are x_t = c sqrt(v + t^2)."""
    x = torch.tensor([[1.3]], dtype=torch.float64)
    t, s = 2.0, 0.5
    exact = 1.3 * math.sqrt((VARIANCE + s**2) / (VARIANCE + t**2))
    errors = []
    for steps in (32, 64, 128):
        times = torch.linspace(t, s, steps + 1, dtype=torch.float64)
        errors.append(abs(float(solve(step, gaussian(), x, times)) - exact))
    rates = [math.log2(first / second) for first, second in itertools.pairwise(errors)]
    assert rates == pytest.approx([order, order], abs=0.1)


def test_heun_agrees_with_an_adaptive_solver():
    from scipy.integrate import solve_ivp

    mixture = mixture_1d()

    def slope(t, x):
        point = torch.tensor([[x[0]]], dtype=torch.float64)
        return [(x[0] - float(mixture(point, torch.tensor([t], dtype=torch.float64)))) / t]

    exact = solve_ivp(slope, (T, EPS), [35.0], method="RK45", rtol=1e-9, atol=1e-9).y[0, -1]
    found = solve(heun_step, mixture, torch.tensor([[35.0]], dtype=torch.float64), rho_grid(801))
    assert float(found) == pytest.approx(float(exact), abs=2e-5)


def test_each_sample_may_have_its_own_times():
    mixture = mixture_1d()
    x = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    grid = rho_grid(10)
    columns = torch.stack([grid[2:5], grid[4:7]], dim=1)
    together = solve(heun_step, mixture, x, columns)
    apart = torch.cat([solve(heun_step, mixture, x[k : k + 1], columns[:, k]) for k in range(2)])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)


def test_a_ctm_jump_is_an_euler_step():
    mixture = mixture_1d()
    x = torch.tensor([[2.0], [0.1]], dtype=torch.float64)
    t, s = torch.full((2,), 3.0, dtype=torch.float64), torch.full((2,), 0.7, dtype=torch.float64)
    found = jump(mixture, x, t, s, make_preconditioning("ctm")(t, s))
    torch.testing.assert_close(found, euler_step(mixture, x, t, s), rtol=1e-12, atol=0)


def test_analytic_jumps_are_exact_for_gaussian_data():
    """g_phi = 0: the forward form lands on the trajectory with D = (1-l_t) x_t, the backward with D = (1-l_s) x_s."""
    grid = rho_grid(2000)
    table = Coefficients(grid, grid**2 / (VARIANCE + grid**2), torch.zeros_like(grid))
    forward, backward = (make_preconditioning(name, table=table) for name in ("analytic-forward", "analytic"))
    times = sampling_grid(3)
    x = torch.tensor([[41.0]], dtype=torch.float64)
    for t, s in zip(times[:-1, None], times[1:, None], strict=True):
        expected = x * ((VARIANCE + s**2) / (VARIANCE + t**2)).sqrt()
        found = jump(gaussian(), x, t, s, forward(t, s))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        f, g = backward(t, s)
        torch.testing.assert_close(f * x + g * gaussian()(expected, s), expected, rtol=1e-5, atol=0)
        x = expected
