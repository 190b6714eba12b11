"""Every registered preconditioning passes every identity."""

import math

import pytest
import torch

from cdistill.errors import CdistillError, RecipeError
from cdistill.preconditionings import Preconditioning, make_preconditioning
from cdistill.preconditionings.coefficients import Coefficients
from cdistill.registry import PRECONDITIONINGS
from cdistill.schedule import EPS, SIGMA_DATA, T, log_uniform_grid, rho_grid

NAMES = PRECONDITIONINGS.names()
GRID = log_uniform_grid(60)


def constant_table(l: float, s: float) -> Coefficients:  # noqa: E741
    t = log_uniform_grid(50)
    return Coefficients(t, torch.full_like(t, l), torch.full_like(t, s))


@pytest.fixture(params=NAMES)
def preconditioning(request, exact_coefficients) -> Preconditioning:
    return make_preconditioning(request.param, table=exact_coefficients)


def jump_ends(preconditioning: Preconditioning, t: torch.Tensor, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs with s = ratio * t; starts just above eps for those that jump to eps only."""
    if preconditioning.to_eps_only:
        return torch.tensor([EPS / ratio], dtype=torch.float64), torch.tensor([EPS], dtype=torch.float64)
    t = t[t * ratio >= EPS]
    return t, t * ratio


def test_jumping_in_place_changes_nothing_exactly(preconditioning):
    f, g = preconditioning(GRID, GRID)
    assert (f == 1).all()
    assert (g == 0).all()


def test_g_is_positive_below_the_diagonal(preconditioning):
    t, s = torch.meshgrid(GRID, GRID[-1:] if preconditioning.to_eps_only else GRID, indexing="ij")
    f, g = preconditioning(t[s < t], s[s < t])
    assert f.dtype == g.dtype == torch.float64
    assert (g > 0).all()
    assert f.isfinite().all()


@pytest.mark.parametrize("distance", [1e-5, 1e-7, 1e-9])
def test_short_jumps_tend_to_the_teacher(preconditioning, distance):
    """(f-1)/log(s/t) -> 1 and g/log(t/s) -> 1; CM's f is off by c_skip(eps) = 1 - 1.6e-5 for ever."""
    t, s = jump_ends(preconditioning, GRID, math.exp(-distance))
    f, g = preconditioning(t, s)
    step = (t / s).log()
    tolerance = 3e-5 + 5 * distance + 1e-15 / distance
    torch.testing.assert_close((1 - f) / step, torch.ones_like(step), rtol=tolerance, atol=0)
    torch.testing.assert_close(g / step, torch.ones_like(step), rtol=tolerance, atol=0)


def test_coefficients_are_continuous(preconditioning):
    """A change of 1e-9 in log t or log s moves f and g by about as much, at nodes and between them."""
    t = torch.cat([GRID[:-3], (GRID[:-1] * GRID[1:]).sqrt()[:-3]])
    s = torch.full_like(t, EPS) if preconditioning.to_eps_only else t / 1.1
    scale = 1 + max(float(part.abs().max()) for part in preconditioning(t, s))
    nearby = [preconditioning(t * (1 - 1e-9), s)] + (
        [] if preconditioning.to_eps_only else [preconditioning(t, s * (1 + 1e-9))]
    )
    for shifted in nearby:
        for here, there in zip(preconditioning(t, s), shifted, strict=True):
            assert float((here - there).abs().max()) < 1e-7 * scale


def test_the_longest_jump_is_finite(preconditioning):
    f, g = preconditioning(torch.tensor([T]), torch.tensor([EPS], dtype=torch.float64))
    assert f.isfinite().all()
    assert 0 < float(g) < 1e5


@pytest.mark.parametrize("wrong", [(1.0, 2.0), (1.0, 0.0), (1.0, -1.0)])
def test_upward_jumps_are_refused_with_the_pair(preconditioning, wrong):
    with pytest.raises(CdistillError, match=r"t = 1, s = "):
        preconditioning(torch.tensor([wrong[0]]), torch.tensor([wrong[1]]))


@pytest.mark.parametrize("name", ["analytic", "analytic-forward"])
@pytest.mark.parametrize(("l", "s"), [(0.0, -1.0), (1.0, 0.0)])
def test_analytic_is_ctm_for_constant_l_and_s(name, l, s):  # noqa: E741
    """(l=0, s=-1) gives CTM exactly, and so does (l=1, s=0)."""
    t, end = torch.meshgrid(GRID, GRID, indexing="ij")
    pairs = t[end <= t], end[end <= t]
    for found, expected in zip(
        make_preconditioning(name, table=constant_table(l, s))(*pairs), make_preconditioning("ctm")(*pairs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_bcm_is_ctms_function_in_terms_of_the_denoiser():
    t, s = torch.meshgrid(GRID, GRID, indexing="ij")
    pairs = t[s <= t], s[s <= t]
    for found, expected in zip(make_preconditioning("bcm")(*pairs), make_preconditioning("ctm")(*pairs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "t", "f", "g"),
    [
        ("cm", 1.0, 0.25 / (0.25 + 0.998**2), 0.5 * 0.998 / math.sqrt(1.25)),
        ("bcm", 1.0, (0.25 + EPS) / 1.25, 0.5 * 0.998 / math.sqrt(1.25)),
        ("ctm", 1.0, EPS, 0.998),
    ],
)
def test_printed_forms_of_table_1(name, t, f, g):
    found = make_preconditioning(name).f_and_g(
        torch.tensor(t, dtype=torch.float64), torch.tensor(EPS, dtype=torch.float64)
    )
    assert [float(part) for part in found] == pytest.approx([f, g], rel=1e-12)


@pytest.mark.parametrize(
    ("t", "s", "f", "g"),
    [(80, 1, 0.0156, 0.5112), (5, 1, 0.2404, 0.4996), (1, 0.5, 0.5219, 0.4649), (0.5, 0.1, 0.1021, 0.8974)],
)
def test_backward_coefficients_of_the_mixture(exact_coefficients, t, s, f, g):
    """Reference numbers of a second derivation, printed with four digits."""
    preconditioning = make_preconditioning("analytic", table=exact_coefficients)
    found = preconditioning(torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64))
    assert [float(part) for part in found] == pytest.approx([f, g], abs=1.5e-4)


def test_forward_coefficients_explode_on_the_longest_jump(exact_coefficients):
    preconditioning = make_preconditioning("analytic-forward", table=exact_coefficients)
    _, g = preconditioning(torch.tensor([T]), torch.tensor([EPS], dtype=torch.float64))
    assert float(g) == pytest.approx(1785, rel=0.01)


def test_backward_is_the_forward_form_turned_round(exact_coefficients):
    """f = 1/f^(s,t) and g = -g^(s,t)/f^(s,t), with Eq. 14 evaluated plainly by a fine trapezoid rule."""
    t, s = 2.0, 0.3
    lam = torch.linspace(-math.log(t), -math.log(s), 200001, dtype=torch.float64)
    nodes = -exact_coefficients.t.log()

    def at(values):
        k = (torch.searchsorted(nodes, lam, right=True) - 1).clamp(0, len(nodes) - 2)
        part = (lam - nodes[k]) / (nodes[k + 1] - nodes[k])
        return values[k] * (1 - part) + values[k + 1] * part

    l, s_coef = at(exact_coefficients.l), at(exact_coefficients.s)  # noqa: E741
    zero = torch.zeros(1, dtype=torch.float64)
    log_l, log_s = (torch.cat([zero, torch.cumulative_trapezoid(v, lam)]) for v in (l, s_coef))
    big_l, big_s = log_l.exp(), log_s.exp()
    eta = float(torch.trapezoid(big_l * big_s, lam))
    f_hat = (big_l[-1] * big_s[-1] + (l[-1] - 1) * -eta) / (big_l[0] * big_s[-1])
    g_hat = -eta / (big_l[0] * big_s[-1])
    preconditioning = make_preconditioning("analytic", table=exact_coefficients)
    f, g = preconditioning(torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64))
    assert float(f) == pytest.approx(float(1 / f_hat), rel=1e-8)
    assert float(g) == pytest.approx(float(-g_hat / f_hat), rel=1e-8)


def test_noise_above_one_in_l_is_clipped():
    table = constant_table(1.0 + 1e-3, 0.0)
    f, g = make_preconditioning("analytic", table=table)(torch.tensor([50.0]), torch.tensor([10.0]))
    assert [float(f), float(g)] == pytest.approx([0.2, 0.8], rel=1e-12)


def test_noise_levels_outside_the_table_are_refused():
    t = rho_grid(20, eps=0.01, t_max=10.0)
    preconditioning = make_preconditioning("analytic", table=Coefficients(t, torch.ones_like(t), torch.zeros_like(t)))
    with pytest.raises(CdistillError, match=r"cover noise levels 0\.01 to 10"):
        preconditioning(torch.tensor([80.0]), torch.tensor([1.0]))


def test_missing_coefficients_are_named():
    with pytest.raises(RecipeError, match="estimate-coeffs"):
        make_preconditioning("analytic")


def test_cm_jumps_to_eps_only():
    with pytest.raises(CdistillError, match="jumps to eps"):
        make_preconditioning("cm")(torch.tensor([1.0]), torch.tensor([0.5]))


def test_a_third_party_preconditioning_is_found_by_its_entry_point(monkeypatch):
    from importlib import metadata

    point = metadata.EntryPoint("halved", "tests.plugin:Halved", PRECONDITIONINGS.group)
    monkeypatch.setitem(PRECONDITIONINGS.__dict__, "_plugins", {"halved": point})
    assert "halved" in PRECONDITIONINGS.names()
    preconditioning = make_preconditioning("halved", sigma_data=SIGMA_DATA)
    f, g = preconditioning(torch.tensor([2.0]), torch.tensor([1.0]))
    assert (float(f), float(g)) == (0.25, 0.75)


def test_a_plug_in_that_does_not_load_is_an_error_that_names_it(monkeypatch):
    from importlib import metadata

    point = metadata.EntryPoint("broken", "tests.plugin:Missing", PRECONDITIONINGS.group)
    monkeypatch.setitem(PRECONDITIONINGS.__dict__, "_plugins", {"broken": point})
    with pytest.raises(CdistillError, match=r"broken.*tests\.plugin:Missing"):
        PRECONDITIONINGS.get("broken")


@pytest.mark.parametrize(
    ("f", "g", "words"),
    [
        (lambda t, s: t * 0 + 1, lambda t, s: 1 - s / t + 0.1, "must hold exactly"),
        (lambda t, s: t * 0 + 1, lambda t, s: (t - s) / 0.0, "not finite"),
        (lambda t, s: torch.ones(3), lambda t, s: t * 0, "shapes"),
    ],
)
def test_plug_ins_that_break_the_rules_are_named_with_the_pair(f, g, words):
    class Broken(Preconditioning):
        def f_and_g(self, t, s):
            return f(t, s), g(t, s)

    with pytest.raises(CdistillError, match=words):
        Broken()(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))


def test_a_plug_in_of_another_kind_is_refused():
    PRECONDITIONINGS.add("number", 3)
    try:
        with pytest.raises(CdistillError, match="no subclass"):
            make_preconditioning("number")
    finally:
        PRECONDITIONINGS.remove("number")


def test_coefficients_that_overflow_are_named_with_the_pair():
    preconditioning = make_preconditioning("analytic", table=constant_table(0.5, -300.0))
    with pytest.raises(CdistillError, match=r"t = 80, s = 0\.002; f or g is not finite"):
        preconditioning(torch.tensor([T]), torch.tensor([EPS], dtype=torch.float64))


@pytest.fixture
def triangle() -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs s < t of 60 noise levels."""
    t, s = torch.meshgrid(GRID, GRID, indexing="ij")
    return t[s < t], s[s < t]


def test_bounded_is_the_forward_form_where_its_g_is_at_most_one_and_keeps_g_at_one_elsewhere(
    exact_coefficients, triangle
):
    forward, bounded = (
        make_preconditioning(name, table=exact_coefficients)(*triangle)
        for name in ("analytic-forward", "analytic-bounded")
    )
    small = forward[1] <= 1
    assert 0.1 < float(small.double().mean()) < 0.9  # both happen
    assert torch.equal(forward[0][small], bounded[0][small])
    assert torch.equal(forward[1][small], bounded[1][small])
    torch.testing.assert_close(bounded[1][~small], torch.ones_like(bounded[1][~small]), rtol=1e-12, atol=0)


def test_bounded_is_a_theta_method(exact_coefficients, triangle):
    """f and g are means of the forward and the backward form, with the same weight."""
    (f_fwd, g_fwd), (f_bwd, g_bwd), (f, g) = (
        make_preconditioning(name, table=exact_coefficients)(*triangle)
        for name in ("analytic-forward", "analytic", "analytic-bounded")
    )
    # f = ((1-theta) f_F + theta q_B f_B) / q and the same for g, with q = 1-theta + theta q_B: a mean of the two forms.
    weight = torch.where((g_bwd - g_fwd).abs() > 1e-9, (g - g_fwd) / (g_bwd - g_fwd), torch.zeros_like(g))
    assert bool(((weight >= -1e-9) & (weight <= 1 + 1e-9)).all())
    torch.testing.assert_close(f, f_fwd + weight * (f_bwd - f_fwd), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("l", "s"), [(0.0, -1.0), (1.0, 0.0)])
def test_bounded_is_ctm_where_the_others_are(l, s, triangle):  # noqa: E741
    f, g = make_preconditioning("analytic-bounded", table=constant_table(l, s))(*triangle)
    t, end = triangle
    torch.testing.assert_close(f, end / t, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(g, 1 - end / t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("l", "s"), [(0.9, 0.0), (0.97, 0.3), (0.999, 0.5), (0.5, 1.0), (0.3, -1.5), (1.0, 0.4)])
def test_bounded_keeps_g_below_one_or_the_backward_forms(l, s, triangle):  # noqa: E741
    """Where the backward form's own g exceeds 1, which happens for l near 1, nothing between the forms is lower."""
    table = constant_table(l, s)
    (f, g), (_, limit), (_, forward) = (
        make_preconditioning(name, table=table)(*triangle)
        for name in ("analytic-bounded", "analytic", "analytic-forward")
    )
    assert f.isfinite().all()
    assert bool((g <= limit.clamp(min=1) * (1 + 1e-9)).all())
    assert bool((g <= forward * (1 + 1e-9)).all())
