from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cdistill.data import Source, load_source
from cdistill.errors import CdistillError, RecipeError, StoppedError
from cdistill.estimation.autodiff import Autodiff, logit_slope
from cdistill.estimation.base import Points, matched_slope, replicates, standard_error
from cdistill.estimation.collecting import GROUPS, Collection, Progress, network_precision, round_ends
from cdistill.estimation.estimate import deviations, solve
from cdistill.estimation.forward import Forward
from cdistill.estimation.settings import EstimationSection
from cdistill.networks.denoiser import chunk_size
from cdistill.preconditionings import make_preconditioning
from cdistill.registry import ESTIMATORS
from cdistill.runtime import signals
from cdistill.runtime.randomness import generator
from cdistill.schedule import lam_of, log_uniform_grid, rho_grid
from cdistill.teachers import load_teacher
from cdistill.teachers.mixture import MixtureDenoiser, mixture_1d
from tests.quadrature import as_sums, collect_sums, exact_estimate, exact_means, random_mixture

BOTH = [Autodiff(), Forward()]
NAMES = [type(estimator).__name__ for estimator in BOTH]

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


def collect(estimator, denoiser, source, t, samples, seed=0, paired=False, **options):
    return collect_sums(
        estimator, denoiser, source, t, EstimationSection(samples=samples, seed=seed, **options), paired=paired
    )


def collect_1d(estimator, t, samples, seed=0, **options):
    return collect(estimator, mixture_1d(), load_source("mixture-1d"), t, samples, seed, **options)


def mixture_source(denoiser: MixtureDenoiser, count: int = 65536) -> Source:
    return Source("mixture", denoiser.draw(count, generator(0, "mixture of a test", denoiser.means.shape[1]))[0])


@pytest.mark.parametrize(("t", "l", "s"), REFERENCE)
def test_exact_expectations_give_the_reference(exact_coefficients, t, l, s):  # noqa: E741
    table = exact_coefficients
    assert at(t, table.t, table.l) == pytest.approx(l, abs=1e-5, rel=1e-3)
    assert at(t, table.t, table.s) == pytest.approx(s, abs=5e-4)


@pytest.mark.parametrize("dim", [1, 2, 8, 64])
def test_with_exact_expectations_both_estimators_are_one(dim):
    """The identity behind `forward`: for the exact denoiser, s is the slope of log sqrt(E|g|^2)."""
    grid = log_uniform_grid(60)
    mixture = None if dim == 1 else random_mixture(dim, seed=dim)
    means, dim = exact_means(mixture, grid)
    a, b = (solve(estimator, as_sums(means, grid, dim, estimator), 0.5).coefficients for estimator in BOTH)
    torch.testing.assert_close(a.l, b.l, rtol=1e-12, atol=0)
    assert float((a.s - b.s)[2:-2].abs().max()) < 2e-4
    assert float((a.s - b.s).abs().max()) < 2e-3  # the spline's ends


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 2, 8, 64])
@pytest.mark.parametrize("estimator", BOTH, ids=NAMES)
def test_estimates_lie_within_three_of_their_errors(estimator, dim):
    """At 95 % or more of 40 noise levels, l and s; the truth is taken from a grid that is twice as fine."""
    grid = log_uniform_grid(40)
    mixture = None if dim == 1 else random_mixture(dim, seed=dim)
    fine = exact_estimate(mixture, log_uniform_grid(79)).coefficients
    denoiser = mixture_1d() if mixture is None else mixture.denoiser
    statistics = collect(estimator, denoiser, mixture_source(denoiser), grid, 1024)
    found = solve(estimator, statistics, 0.5)
    for values, truth, error in (
        (found.coefficients.l, fine.l[::2], found.l_error),
        (found.coefficients.s, fine.s[::2], found.s_error),
    ):
        resolved = 1e-9 + 1e-3 * (values is found.coefficients.s)  # of l in float64; of s between 40 points
        outside = (values - truth).abs() > 3 * error + resolved
        assert float(outside.double().mean()) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "target"), [(8, None), (1, 0.04)])
@pytest.mark.parametrize("estimator", BOTH, ids=NAMES)
def test_stated_errors_are_right(estimator, dim, target):
    """Over 24 repetitions the deviations of l, s, f, g in standard errors have a root mean square near 1.

    With a target too, where levels stop at different numbers of samples, and where stopping looks at the errors.
    """
    grid = log_uniform_grid(16)
    mixture = None if dim == 1 else random_mixture(dim, seed=dim)
    truth = exact_estimate(mixture, grid, estimator)
    denoiser = mixture_1d() if mixture is None else mixture.denoiser
    source = mixture_source(denoiser, 2**18)
    t, s = truth.pairs()
    squares: dict[str, list[torch.Tensor]] = {"l": [], "s": [], "f": [], "g": []}
    for seed in range(24):
        samples = 512 if target is None else 1536
        found = solve(estimator, collect(estimator, denoiser, source, grid, samples, seed, target_error=target), 0.5)
        squares["l"].append((found.coefficients.l - truth.coefficients.l) / found.l_error)
        squares["s"].append((found.coefficients.s - truth.coefficients.s) / found.s_error)
        pairs = zip("fg", found.f_and_g("analytic", t, s), truth.f_and_g("analytic", t, s), strict=True)
        for name, mine, other in pairs:
            squares[name].append((mine[0] - other[0]) / standard_error(mine[1:]))
    for values in squares.values():
        assert float(torch.stack(values).square().mean().sqrt()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("estimator", BOTH, ids=NAMES)
@pytest.mark.parametrize("dim", [1, 5])
def test_gaussian_data_is_exact_and_gives_no_nan(estimator, dim):
    """l = t^2/(v+t^2) for every sample; g vanishes, so that s_coef is 0/0 and must be told as 0."""
    variance = 0.25
    eye = torch.eye(dim, dtype=torch.float64)
    teacher = MixtureDenoiser(torch.ones(1), torch.zeros(1, dim), variance * eye[None])
    source = Source("gaussian", teacher.draw(256, generator(0, "gaussian"))[0])
    grid = rho_grid(24)
    found = solve(estimator, collect(estimator, teacher, source, grid, 96), 0.5)
    torch.testing.assert_close(found.coefficients.l, grid**2 / (variance + grid**2), rtol=1e-9, atol=1e-12)
    assert (found.coefficients.s == 0).all()
    assert found.l_error.isfinite().all()
    assert found.s_error.isfinite().all()
    f, g = found.f_and_g("analytic", grid[:-1], grid[1:])
    assert f.isfinite().all()
    assert (g > 0).all()


@pytest.mark.parametrize("estimator", BOTH, ids=NAMES)
def test_where_g_is_lost_in_rounding_s_is_that_of_the_nearest_level(estimator):
    """Section 5.3's mixture, 30 times wider: s tends to -2 at small noise, where |g| is below D's rounding."""
    small = mixture_1d()
    wide = MixtureDenoiser(small.weights, 30 * small.means, 900 * small.covariances)
    source = Source("wide", wide.draw(4096, generator(0, "wide"))[0])
    statistics = collect(estimator, wide, source, log_uniform_grid(40), 256)
    found = solve(estimator, statistics, 0.5)
    assert float(found.coefficients.s[-1]) == pytest.approx(-2, abs=0.2)


def test_autodiff_agrees_with_finite_differences_on_the_digits_teacher():
    teacher = load_teacher("digits").denoiser.double()
    x0, labels = load_source("digits").batch(torch.arange(4))
    draw = generator(0, "fd")
    t = torch.tensor([0.3, 1.0, 3.0, 0.05], dtype=torch.float64)
    z = torch.randn(x0.shape, generator=draw, dtype=torch.float64)
    probe = torch.randint(0, 2, z.shape, generator=draw).double() * 2 - 1
    points = Points(x0.double(), z, probe, labels)
    x = points.at(t)
    trace, xx, xd, dd, d_ddot, x_ddot = Autodiff().measure(teacher, points, t).unbind(1)
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


def test_the_gap_between_the_estimators_is_what_the_derivation_says():
    """s(autodiff) - s(forward) = E[(D - x_0).(dg/dx)'g]/E|g|^2, here for a denoiser that is wrong on purpose."""

    class Wrong(MixtureDenoiser):
        def forward(self, x, t, s=None, labels=None):
            return 0.8 * super().forward(x, t) + 0.4 * torch.tanh(3 * x)

    right = mixture_1d()
    wrong = Wrong(right.weights, right.means, right.covariances)
    grid, source = log_uniform_grid(8, 0.004, 0.1), load_source("mixture-1d")
    budget = EstimationSection(samples=4096)
    a, b = (solve(e, collect_sums(e, wrong, source, grid, budget, paired=True), 0.5).coefficients for e in BOTH)
    level = 4
    draw = generator(0, "gap")
    x0 = source.samples[:]
    x = (x0 + grid[level] * torch.randn(x0.shape, generator=draw, dtype=x0.dtype)).requires_grad_()
    denoised = wrong(x, grid[level].expand(len(x)))
    residual = denoised - (1 - a.l[level]) * x
    (pulled,) = torch.autograd.grad(residual, x, residual.detach())
    expected = ((denoised - x0) * pulled).mean().detach() / residual.square().mean().detach()
    assert abs(float(expected)) > 8e-3
    assert float(a.s[level] - b.s[level]) == pytest.approx(float(expected), abs=1e-3)


class Counting(MixtureDenoiser):
    """Notes the size of every call, and whether it keeps a graph."""

    def forward(self, x, t, s=None, labels=None):
        self.calls.append((len(x), torch.is_grad_enabled() and x.requires_grad, torch.is_inference_mode_enabled()))
        return super().forward(x, t, s, labels)


def count(estimator, monkeypatch, samples=130):
    teacher = mixture_1d()
    counting = Counting(teacher.weights, teacher.means, teacher.covariances)
    counting.calls, passes = [], []
    grad = torch.autograd.grad

    def counted(*arguments, **options):
        passes.append(1)
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    collect(estimator, counting, load_source("mixture-1d"), rho_grid(5), samples)
    return counting.calls, len(passes)


def test_autodiff_takes_one_forward_and_three_backward_passes_a_chunk(monkeypatch):
    calls, passes = count(Autodiff(), monkeypatch)
    assert calls == [(chunk_size((1,)), True, False)] * (5 * 3)  # three chunks of 64 for 130 samples: always whole
    assert passes == 3 * len(calls) == Autodiff.backwards * len(calls)


def test_forward_takes_one_forward_pass_a_chunk_and_keeps_no_graph(monkeypatch):
    calls, passes = count(Forward(), monkeypatch)
    assert calls == [(chunk_size((1,)), False, True)] * (5 * 3)
    assert passes == Forward.backwards == 0


class Half:
    """An accelerator that is one of two processes, without the other."""

    def __init__(self, rank: int) -> None:
        self.process_index, self.num_processes = rank, 2

    def reduce(self, tensor, how):
        return tensor

    def gather(self, tensor):
        return tensor


@pytest.mark.parametrize("estimator", BOTH, ids=NAMES)
def test_the_parts_of_two_processes_add_up_to_one(estimator):
    """Each process takes every other chunk; the reduced sums are those of one process."""
    arguments = estimator, mixture_1d(), load_source("mixture-1d"), rho_grid(6), EstimationSection(samples=200, seed=3)
    whole = collect_sums(*arguments)
    halves = [collect_sums(*arguments, accelerator=Half(rank)) for rank in range(2)]
    torch.testing.assert_close(halves[0].sums + halves[1].sums, whole.sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(halves[0].sizes, whole.sizes)


@pytest.mark.parametrize("estimator", BOTH, ids=NAMES)
@pytest.mark.parametrize("samples", [4, 62, 64, 200])
def test_sizes_are_those_of_the_groups(estimator, samples):
    each = 2 if estimator.paired else 1
    found = collect_1d(estimator, rho_grid(4), samples)
    assert found.sums.shape == (1, min(GROUPS, samples // each), 4, len(estimator.scalars))
    assert float(found.sizes.sum()) == samples / each
    ones = torch.bincount(torch.arange(samples // each) % found.sizes.shape[1])
    assert found.sizes[0].tolist() == ones.tolist()
    assert found.samples.tolist() == [samples] * 4


def test_pairs_give_each_estimator_the_same_points():
    """E[D.D] of both estimators, from the same pairs, is the same number."""
    grid = rho_grid(6)
    a, b = (collect_1d(estimator, grid, 200, paired=True) for estimator in BOTH)
    torch.testing.assert_close(a.means()[0, :, 1:4], b.means()[0, :, 2:5], rtol=1e-13, atol=0)
    torch.testing.assert_close(a.sizes, b.sizes)


def test_more_samples_take_no_more_memory(monkeypatch):
    """What is kept does not grow with the samples, and the network never sees more than a chunk at once."""
    small, large = (collect_1d(Forward(), rho_grid(4), samples) for samples in (128, 2048))
    assert small.sums.shape == large.sums.shape
    calls, _ = count(Forward(), monkeypatch, samples=1000)
    assert {size for size, _, _ in calls} == {chunk_size((1,))}


# --- targets ---


def test_a_target_stops_each_level_when_it_is_precise_enough():
    grid = log_uniform_grid(16)
    budget = {"samples": 4096, "target_error": 0.04}
    for estimator in BOTH:
        statistics = collect_1d(estimator, grid, **budget)
        found = solve(estimator, statistics, 0.5)
        assert statistics.samples.min() < statistics.samples.max() < 4096  # none needed them all
        assert float(found.l_error.max()) <= 0.04
        assert float(found.s_error.max()) <= 0.04 * 1.3  # a level's slope also hangs on neighbours that stopped before
        everything = collect_1d(estimator, grid, 4096)
        for column, stop in enumerate(statistics.stops.tolist()):
            taken = int(statistics.samples[column]) // (2 if estimator.paired else 1)
            assert float(statistics.sizes[: stop + 1].sum()) == taken
            assert float(statistics.sums[stop + 1 :, :, column].abs().sum()) == 0
        assert float(everything.sizes.sum()) > float(statistics.sizes[: int(statistics.stops.min()) + 1].sum())


def test_a_target_that_cannot_be_reached_takes_all_samples_and_changes_nothing():
    grid = log_uniform_grid(12)
    for estimator in BOTH:
        plain = collect_1d(estimator, grid, 700)
        driven = collect_1d(estimator, grid, 700, target_error=1e-9)
        assert driven.samples.tolist() == [700] * 12
        torch.testing.assert_close(driven.means()[-1], plain.means()[0], rtol=1e-12, atol=1e-15)
        for mine, other in zip(replicates(estimator, driven), replicates(estimator, plain), strict=True):
            torch.testing.assert_close(
                standard_error(mine), standard_error(other), rtol=2e-3, atol=1e-12
            )  # |g|^2 is 1e-11 of |D|^2 at t = eps


def test_rounds_grow_by_half_and_end_at_the_budget():
    ends = round_ends(EstimationSection(samples=4096, target_error=0.1))
    assert ends == [256, 384, 576, 832, 1216, 1792, 2688, 4032, 4096]
    assert round_ends(EstimationSection(samples=100, target_error=0.1)) == [100]
    assert round_ends(EstimationSection(samples=4096)) == [4096]


def test_where_levels_stop_at_different_samples_slopes_use_what_they_share():
    """Common noise that changes with the round: the slope of a line stays exact, differences of raw values do not."""
    lam = torch.linspace(0, 5, 11, dtype=torch.float64)
    noise = torch.tensor([0.7, -0.3, 0.1])
    values = 2 * lam + noise[:, None]
    stops = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 1, 0, 0])
    torch.testing.assert_close(matched_slope(lam, values, stops), torch.full((11,), 2.0, dtype=torch.float64))


# --- stopping and resuming ---


def interrupted(estimator, budget, calls, monkeypatch, path, identity):
    """Collects until the network was called `calls` times."""
    teacher = mixture_1d()

    class Signalling(MixtureDenoiser):
        made = 0

        def forward(self, x, t, s=None, labels=None):
            Signalling.made += 1
            if Signalling.made == calls:
                monkeypatch.setattr(signals, "_received", [15])
            return super().forward(x, t, s, labels)

    network = Signalling(teacher.weights, teacher.means, teacher.covariances)
    with pytest.raises(StoppedError):
        collect_sums(estimator, network, load_source("mixture-1d"), rho_grid(5), budget, path=path, identity=identity)
    monkeypatch.setattr(signals, "_received", [])
    return Signalling.made


def collect_five(estimator, budget, **options):
    return collect_sums(estimator, mixture_1d(), load_source("mixture-1d"), rho_grid(5), budget, **options)


@pytest.mark.parametrize("target", [None, 0.02])
@pytest.mark.parametrize("estimator", BOTH, ids=NAMES)
def test_an_interrupted_collection_resumes_at_the_last_finished_level(estimator, target, tmp_path, monkeypatch):
    budget = EstimationSection(samples=640, seed=1, target_error=target)
    whole = collect_five(estimator, budget)
    kept = tmp_path / "c.safetensors", {"of": "test"}
    made = interrupted(estimator, budget, 13, monkeypatch, *kept)
    made += interrupted(estimator, budget, 12, monkeypatch, *kept)
    assert made == 25  # 2 chunks of 5 levels and 3 more, then 12 more: no call was made twice
    source = load_source("mixture-1d")
    collection = Collection(estimator, mixture_1d(), source, rho_grid(5), budget, path=kept[0], identity=kept[1])
    assert collection.progress.finished_pairs(640) == made * 64
    resumed = collection.run()
    assert torch.equal(resumed.sums, whole.sums)
    assert torch.equal(resumed.samples, whole.samples)
    collection.progress.remove()
    assert list(tmp_path.iterdir()) == []


def test_unfinished_sums_of_something_else_are_not_resumed_from(tmp_path, monkeypatch):
    path, shape = tmp_path / "c.safetensors", (32, 5, 5)
    interrupted(Forward(), EstimationSection(samples=640), 7, monkeypatch, path, {"teacher": "a"})
    assert Progress(shape, path, {"teacher": "a"}).pairs == 7 * 64
    assert Progress(shape, path, {"teacher": "b"}).pairs == 0
    assert Progress(shape, path, {"teacher": "a"}, rank=1, world=2).pairs == 0
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert Progress(shape, path, {"teacher": "a"}).pairs == 0


def test_processes_that_were_killed_in_different_rounds_resume_in_the_earlier(tmp_path, monkeypatch):
    """One process had come to the second round, the other had not finished the first: both begin the first again."""
    budget = EstimationSection(samples=1024, target_error=1e-9)  # rounds of 256, 384, ...

    class Ahead(Half):
        def gather(self, tensor):
            return torch.cat([tensor, torch.zeros_like(tensor)])

    path, shape = tmp_path / "c", (32, 5, 5)
    interrupted(Forward(), budget, 25, monkeypatch, path, {})  # 20 calls in the first round, then 5 of 10 in the second
    Path(tmp_path / ".c.part-0-of-1").rename(tmp_path / ".c.part-0-of-2")
    assert len(Progress(shape, path, {}, 0, 2).ends) == 1
    again = collect_five(Forward(), budget, accelerator=Ahead(0), path=path, identity={})
    fresh = collect_five(Forward(), budget, accelerator=Ahead(0))
    assert torch.equal(again.sums, fresh.sums)
    progress = Progress(shape, path, {}, 0, 2)
    progress.back_to(0)
    assert (progress.ends, progress.chunk, progress.level, progress.pairs) == ([], 0, 0, 0)
    assert float(progress.current.abs().sum()) == 0
    assert progress.active() == list(range(5))


# --- precision ---


def test_precision_is_half_only_where_forward_passes_run_on_a_gpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [network_precision(e, "auto", d) for e in BOTH for d in (cpu, cuda)] == ["fp32", "fp32", "fp32", "fp16"]
    assert network_precision(Forward(), "fp16", cpu) == "fp16"
    with pytest.raises(RecipeError, match="backward passes underflow"):
        network_precision(Autodiff(), "fp16", cuda)


def test_half_precision_moves_the_coefficients_less_than_their_errors():
    """The rounding of F averages out over elements and samples; below t = 0.01 the teacher runs in float32."""
    teacher, source = load_teacher("digits"), load_source("digits")
    grid = log_uniform_grid(8)
    full, half = (
        solve(Forward(), collect(Forward(), teacher.denoiser, source, grid, 256, precision=p), 0.5)
        for p in ("fp32", "fp16")
    )
    assert float((full.coefficients.l - half.coefficients.l).abs().max()) > 0
    assert full.coefficients.l[-1] == half.coefficients.l[-1]
    assert bool(((full.coefficients.l - half.coefficients.l).abs() < 0.1 * full.l_error).all())
    assert bool(((full.coefficients.s - half.coefficients.s).abs() < 0.3 * full.s_error).all())


def test_outputs_that_are_not_finite_are_refused():
    class Broken(MixtureDenoiser):
        def forward(self, x, t, s=None, labels=None):
            return super().forward(x, t) / 0

    teacher = mixture_1d()
    broken = Broken(teacher.weights, teacher.means, teacher.covariances)
    with pytest.raises(CdistillError, match="not finite in fp32"):
        collect(Forward(), broken, load_source("mixture-1d"), rho_grid(4), 64)


# --- comparison ---


def test_the_comparison_finds_what_is_there():
    """Nothing between the estimators with the exact denoiser; a clear difference with a wrong one."""
    grid, source, teacher = log_uniform_grid(40), load_source("mixture-1d"), mixture_1d()

    class Wrong(MixtureDenoiser):
        def forward(self, x, t, s=None, labels=None):
            return super().forward(x, t) + 0.3 * torch.tanh(3 * x)

    for denoiser, wrong in ((teacher, False), (Wrong(teacher.weights, teacher.means, teacher.covariances), True)):
        budget = EstimationSection(samples=2048)
        a, b = (solve(e, collect_sums(e, denoiser, source, grid, budget, paired=True), 0.5) for e in BOTH)
        rows = {row["quantity"]: row for row in deviations(a, b)}
        assert list(rows) == ["l", "s", "f", "g"]
        assert rows["l"]["paired"] < 2  # Stein's identity holds for any denoiser
        assert (rows["s"]["paired"] > 5) == wrong
        assert (rows["g"]["bars"] > 2) == wrong


def test_registered_estimators_are_these():
    assert ESTIMATORS.names() == ["autodiff", "forward"]
    assert [load_teacher(name).estimator for name in ("digits", "patches", "mixture-1d")] == ["forward"] * 3


# --- slopes ---


def test_s_is_the_slope_of_log_s_for_any_table():
    """With D = 0 the residual is g = -(1-l) x and dx/dlam = -x, so that s = -1 - l'/(1-l)."""
    grid = log_uniform_grid(200)
    l = 0.5 / (1 + grid)  # noqa: E741
    xx = 3.0 * grid**2
    zero = torch.zeros_like(grid)
    means = torch.stack([1 - l, xx, zero, zero, zero, zero], dim=1)
    found_l, found_s = Autodiff().solve(grid, means[None], torch.zeros(200, dtype=torch.int64), 1)
    slope = 0.5 * grid / (1 + grid) ** 2  # dl/dlam
    torch.testing.assert_close(found_l, l)
    torch.testing.assert_close(found_s, -1 - slope / (1 - l), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", BOTH, ids=NAMES)
@pytest.mark.parametrize("make", [log_uniform_grid, rho_grid])
def test_coarse_grids_do_not_overshoot(make, estimator):
    """With 16 points and exact expectations, s stays within 0.1 of the truth, at the ends too."""
    fine, coarse = (
        exact_estimate(None, log_uniform_grid(200)).coefficients,
        exact_estimate(None, make(16), estimator).coefficients,
    )
    exact = torch.tensor([at(float(t), fine.t, fine.s) for t in coarse.t])
    assert float((coarse.s - exact).abs().max()) < 0.1


def test_the_spline_of_logit_l_beats_central_differences(exact_coefficients, monkeypatch):
    """The numbers in README.md: the largest error of s over 120 log-uniform noise levels, with exact expectations."""
    import cdistill.estimation.autodiff as module

    fine = exact_estimate(None, log_uniform_grid(953)).coefficients  # 8 x 119 + 1: every eighth point is one of the 120
    exact = fine.s[::8]
    assert float((exact_coefficients.s - exact).abs().max()) < 5e-5
    grid = exact_coefficients.t
    differences = torch.gradient(exact_coefficients.l, spacing=(lam_of(grid),), edge_order=2)[0]
    monkeypatch.setattr(module, "logit_slope", lambda *arguments: differences)
    plain = exact_estimate(None, grid).coefficients
    assert float((plain.s - exact).abs().max()) > 2e-2


def test_logit_slope_of_a_logistic_curve_is_exact():
    lam = torch.linspace(-4, 6, 30, dtype=torch.float64)
    l = torch.sigmoid(1 - 2 * lam)  # noqa: E741
    slope = logit_slope(lam, l[None], torch.zeros(30, dtype=torch.int64))
    torch.testing.assert_close(slope, -2 * l * (1 - l), rtol=1e-9, atol=1e-12)


def test_errors_of_f_and_g_vanish_for_jumps_of_no_length():
    found = solve(Forward(), collect_1d(Forward(), log_uniform_grid(24), 256), 0.5)
    t = found.coefficients.t
    f_error, g_error = (standard_error(values[1:]) for values in found.f_and_g("analytic", t, t))
    assert float(f_error.max()) == float(g_error.max()) == 0
    g = found.f_and_g("analytic", t[:1], t[12:13])[1]
    g_error = standard_error(g[1:])
    assert 0 < float(g_error) < 0.1
    form = make_preconditioning("analytic", table=replace(found.coefficients))
    assert float(form(t[:1], t[12:13])[1]) == float(g[0])
