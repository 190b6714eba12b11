import pytest
import torch

from cdistill.data import Source, load_source
from cdistill.estimation import (
    GROUPS,
    collect_statistics,
    jackknife_errors,
    make_table,
    sample_scalars,
    solve_coefficients,
)
from cdistill.networks.denoiser import chunk_size
from cdistill.preconditionings import make_preconditioning
from cdistill.randomness import generator, shuffled_indices
from cdistill.schedule import log_uniform_grid, rho_grid
from cdistill.teachers import load_teacher
from cdistill.teachers.mixture import MixtureDenoiser, mixture_1d

# t, l_t, s_t of 1/3 N(-2,1) + 2/3 N(1,0.25), from a second derivation by quadrature. t is rounded to four decimals,
# which moves l by up to 1e-3 of itself where it is proportional to t^2.
REFERENCE = (
    (21.2732, 0.99451, 1.9786),
    (5.6569, 0.92768, 1.7435),
    (1.5042, 0.52743, 0.6648),
    (0.4000, 0.22929, -1.0162),
    (0.1064, 0.02708, -1.8993),
)


def at(t: float, grid: torch.Tensor, values: torch.Tensor) -> float:
    """The value at noise level t, by a cubic spline in log t."""
    from scipy.interpolate import CubicSpline

    return float(CubicSpline(-grid.log().numpy(), values.numpy())(-torch.tensor(t).double().log().numpy()))


@pytest.mark.parametrize(("t", "l", "s"), REFERENCE)
def test_exact_expectations_give_the_reference(exact_coefficients, t, l, s):  # noqa: E741
    table = exact_coefficients
    assert at(t, table.t, table.l) == pytest.approx(l, abs=1e-5, rel=1e-3)
    assert at(t, table.t, table.s) == pytest.approx(s, abs=5e-4)


@pytest.fixture(scope="module")
def sampled():
    grid = log_uniform_grid(60)
    return collect_statistics(mixture_1d(), load_source("mixture-1d"), grid, 2048, seed=0)


def test_sampled_coefficients_lie_within_their_own_error_bars(sampled, exact_coefficients):
    """All 60 levels within 4.5 standard errors, 9 of 10 within 2.5; the levels share their samples."""
    from scipy.interpolate import CubicSpline

    table = make_table(sampled)
    errors = jackknife_errors(sampled.t, sampled.groups, sampled.count, sampled.dim)
    lam = -sampled.t.log().numpy()
    for name, error in zip(("l", "s"), errors, strict=True):
        exact = CubicSpline(-exact_coefficients.t.log().numpy(), getattr(exact_coefficients, name).numpy())(lam)
        deviations = (getattr(table, name) - torch.from_numpy(exact)).abs() / error
        assert float(deviations.max()) < 4.5
        assert float((deviations < 2.5).double().mean()) > 0.9


@pytest.mark.slow
def test_jackknife_errors_cover_the_truth(exact_coefficients):
    """Over 40 repetitions, the deviation in standard errors has a root mean square near 1."""
    grid = log_uniform_grid(12)
    exact = [torch.tensor([at(float(t), exact_coefficients.t, v) for t in grid]) for v in (exact_coefficients.l,)]
    squares = []
    for seed in range(40):
        found = collect_statistics(mixture_1d(), load_source("mixture-1d"), grid, 512, seed=seed)
        error, _ = jackknife_errors(grid, found.groups, found.count, 1)
        squares.append(((make_table(found).l - exact[0]) / error).square())
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(1, abs=0.2)


def test_stored_variances_are_those_of_the_samples(sampled):
    level, index = 30, 3  # D.D
    draws = []
    for first in range(0, 2048, 64):
        x0, _ = load_source("mixture-1d").batch(shuffled_indices(65536, 0, first, 64))
        draw = generator(0, "estimation", first)
        x = x0 + sampled.t[level] * torch.randn(x0.shape, generator=draw, dtype=x0.dtype)
        draws.append(mixture_1d()(x, sampled.t[level].expand(64)).square().sum(1))
    values = torch.cat(draws)
    assert float(sampled.sums[level, index]) == pytest.approx(float(values.sum()), rel=1e-12)
    assert float(sampled.variances[level, index]) == pytest.approx(float(values.var()), rel=1e-9)


@pytest.mark.parametrize("dim", [1, 5])
def test_gaussian_data_is_exact_and_gives_no_nan(dim):
    """l = t^2/(v+t^2) for every sample; g vanishes, so that s_coef is 0/0 and must be told as 0."""
    variance = 0.25
    eye = torch.eye(dim, dtype=torch.float64)
    teacher = MixtureDenoiser(torch.ones(1), torch.zeros(1, dim), variance * eye[None])
    source = Source("gaussian", teacher.draw(256, generator(0, "gaussian")))
    grid = rho_grid(24)
    found = collect_statistics(teacher, source, grid, 96, seed=0)
    table = make_table(found)
    torch.testing.assert_close(table.l, grid**2 / (variance + grid**2), rtol=1e-9, atol=1e-12)
    assert (table.s == 0).all()
    errors = jackknife_errors(grid, found.groups, found.count, dim)
    assert all(part.isfinite().all() for part in errors)
    f, g = make_preconditioning("analytic", table=table)(grid[:-1], grid[1:])
    assert f.isfinite().all()
    assert (g > 0).all()


def test_where_g_is_lost_in_rounding_s_is_that_of_the_nearest_level():
    """Section 5.3's mixture, 30 times wider: s tends to -2 at small noise, where |g| is below D's rounding."""
    small = mixture_1d()
    wide = MixtureDenoiser(small.weights, 30 * small.means, 900 * small.covariances)
    source = Source("wide", wide.draw(4096, generator(0, "wide")))
    table = make_table(collect_statistics(wide, source, log_uniform_grid(40), 256, seed=0))
    assert float(table.s[-1]) == pytest.approx(-2, abs=0.2)


def test_scalars_agree_with_finite_differences_on_the_digits_teacher():
    teacher = load_teacher("digits").denoiser.double()
    x0, labels = load_source("digits").batch(torch.arange(4))
    draw = generator(0, "fd")
    t = torch.tensor([0.3, 1.0, 3.0, 0.05], dtype=torch.float64)
    x = x0.double() + t[:, None, None, None] * torch.randn(x0.shape, generator=draw, dtype=torch.float64)
    probe = torch.randint(0, 2, x.shape, generator=draw).double() * 2 - 1
    trace, xx, xd, dd, d_ddot, x_ddot = sample_scalars(teacher, x, t, probe, labels).unbind(1)
    with torch.no_grad():
        out = teacher(x, t, None, labels)
        step = 1e-5
        jv = (teacher(x + step * probe, t, None, labels) - teacher(x - step * probe, t, None, labels)) / (2 * step)
        ahead, behind = (
            teacher(x + h * (out - x), t * torch.tensor(-h).double().exp(), None, labels) for h in (step, -step)
        )
        slope = (ahead - behind) / (2 * step)  # dD/dlam along the ODE: dx = (D - x) dlam, dt = -t dlam
    for found, expected in (
        (trace, probe * jv), (xx, x * x), (xd, x * out), (dd, out * out), (d_ddot, out * slope), (x_ddot, x * slope),
    ):  # fmt: skip
        torch.testing.assert_close(found, expected.flatten(1).sum(1), rtol=1e-5, atol=1e-5)


def test_one_forward_and_three_backward_passes_a_chunk():
    calls = []
    teacher = mixture_1d()

    class Counting(MixtureDenoiser):
        def forward(self, x, t, s=None, labels=None):
            calls.append(len(x))
            return super().forward(x, t, s, labels)

    counting = Counting(teacher.weights, teacher.means, teacher.covariances)
    collect_statistics(counting, load_source("mixture-1d"), rho_grid(5), 130, seed=0)
    size = chunk_size((1,))
    assert calls == [size] * (5 * 3)  # three chunks of 64 for 130 samples: always whole ones


def test_the_parts_of_two_processes_add_up_to_one(monkeypatch):
    """Each process takes every other chunk; the reduced sums are those of one process."""

    class Half:
        def __init__(self, rank: int) -> None:
            self.process_index, self.num_processes = rank, 2

        def reduce(self, tensor, how):
            return tensor

    grid = rho_grid(6)
    arguments = mixture_1d(), load_source("mixture-1d"), grid, 200, 3
    whole = collect_statistics(*arguments)
    halves = [collect_statistics(*arguments, accelerator=Half(rank)) for rank in range(2)]
    torch.testing.assert_close(halves[0].groups + halves[1].groups, whole.groups, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(halves[0].squares + halves[1].squares, whole.squares, rtol=1e-12, atol=1e-12)


def test_sums_are_those_of_the_groups(sampled):
    assert sampled.groups.shape == (GROUPS, 60, 6)
    torch.testing.assert_close(sampled.sums, sampled.groups.sum(0))


def test_s_is_the_slope_of_log_s_for_any_table():
    """With D = 0 the residual is g = -(1-l) x and dx/dlam = -x, so that s = -1 - l'/(1-l)."""
    grid = log_uniform_grid(200)
    l = 0.5 / (1 + grid)  # noqa: E741
    xx = 3.0 * grid**2
    zero = torch.zeros_like(grid)
    means = torch.stack([1 - l, xx, zero, zero, zero, zero], dim=1)
    found_l, found_s = solve_coefficients(grid, means, 1)
    slope = 0.5 * grid / (1 + grid) ** 2  # dl/dlam
    torch.testing.assert_close(found_l, l)
    torch.testing.assert_close(found_s, -1 - slope / (1 - l), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [log_uniform_grid, rho_grid])
def test_coarse_grids_do_not_overshoot(make):
    """With 16 points and exact expectations, s stays within 0.1 of the truth, at the ends too."""
    from tests.quadrature import mixture_statistics

    fine, coarse = make_table(mixture_statistics(log_uniform_grid(200))), make_table(mixture_statistics(make(16)))
    exact = torch.tensor([at(float(t), fine.t, fine.s) for t in coarse.t])
    assert float((coarse.s - exact).abs().max()) < 0.1


def test_the_spline_of_logit_l_beats_central_differences(exact_coefficients):
    """The numbers in README.md: the largest error of s over 120 log-uniform noise levels, with exact expectations."""
    import cdistill.estimation as estimation
    from tests.quadrature import mixture_statistics

    fine = make_table(mixture_statistics(log_uniform_grid(953)))  # 8 x 119 + 1: every eighth point is one of the 120
    exact = fine.s[::8]
    assert float((exact_coefficients.s - exact).abs().max()) < 5e-5
    grid = exact_coefficients.t
    statistics = mixture_statistics(grid)
    differences = torch.gradient(1 - statistics.sums[:, 0], spacing=(-grid.log(),), edge_order=2)[0]
    original = estimation.logit_slope
    try:
        estimation.logit_slope = lambda lam, l: differences  # noqa: E741
        plain = make_table(statistics)
    finally:
        estimation.logit_slope = original
    assert float((plain.s - exact).abs().max()) > 2e-2
