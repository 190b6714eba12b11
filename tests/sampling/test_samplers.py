"""The registered samplers: orders, laws, calls, misuse."""

import itertools
import json
import math

import pytest
import torch

from cdistill.errors import CdistillError, RecipeError, UnknownNameError
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning, make_preconditioning
from cdistill.registry import SAMPLERS
from cdistill.sampling.drawing import generate
from cdistill.sampling.samplers import StudentSampler, TeacherSampler, make_sampler, teacher_trajectories
from cdistill.sampling.solvers import jump
from cdistill.schedule import EPS, T, rho_grid, sampling_grid
from cdistill.teachers.mixture import MixtureDenoiser, mixture_1d

SOLVERS = [name for name in SAMPLERS.names() if issubclass(SAMPLERS.get(name), TeacherSampler)]
JUMPERS = [name for name in SAMPLERS.names() if issubclass(SAMPLERS.get(name), StudentSampler)]
ORDERS = {"dpmpp-2m": 2, "euler": 1, "heun": 2}
VARIANCE = 0.7
X = torch.linspace(-150, 150, 61, dtype=torch.float64)[:, None]


def gamma_of(name: str, value: float = 0.5) -> float | None:
    return value if SAMPLERS.get(name).takes_gamma else None


def gaussian() -> MixtureDenoiser:
    return MixtureDenoiser(torch.ones(1), torch.zeros(1, 1), torch.full((1, 1, 1), VARIANCE, dtype=torch.float64))


class Counting(Denoiser):
    """The mixture's denoiser, with a record of its calls (number of points, t, s)."""

    def __init__(self) -> None:
        super().__init__()
        self.sample_shape, self.sigma_data, self.calls = (1,), 0.5, []

    def forward(self, x, t, s=None, labels=None):
        self.calls.append((len(x), float(t[0]), None if s is None else float(s[0])))
        return mixture_1d()(x, t)

    def student(self, takes_s=True, dropout=0.0):
        raise NotImplementedError


class Exact(Preconditioning):
    """x_s = sqrt((v+s^2)/(v+t^2)) x_t: the consistency function of Gaussian data, without a network."""

    def f_and_g(self, t, s):
        return ((VARIANCE + s**2) / (VARIANCE + t**2)).sqrt(), torch.zeros_like(t)


def normal(seed: int, shape=(40_000, 1)):
    draw = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=draw, dtype=torch.float64)


def test_every_solver_states_its_order():
    assert sorted(ORDERS) == SOLVERS


@pytest.fixture(scope="module")
def truth():
    """Points at T, and where a fine solution takes them."""
    x = torch.tensor([[-120.0], [-30.0], [45.0], [100.0]], dtype=torch.float64)
    return x, make_sampler(mixture_1d(), None, nfe=8192)(x, None, normal(0))


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence_on_the_exact_mixture(name, truth):
    """From T to eps on nested rho-grids, against Heun on a grid 16 times finer."""
    x, truth = truth
    errors = []
    for steps in (64, 128, 256):
        found = make_sampler(mixture_1d(), None, name, times=rho_grid(steps + 1))(x, None, normal(0))
        errors.append(float((found - truth).square().mean().sqrt()))
    rates = [math.log2(first / second) for first, second in itertools.pairwise(errors)]
    assert rates == pytest.approx([ORDERS[name]] * 2, abs=0.15)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("nfe", [2, 10])
def test_a_solver_spends_exactly_the_calls_it_is_given(name, nfe):
    teacher = Counting()
    sampler = make_sampler(teacher, None, name, nfe)
    sampler(X, None, normal(0))
    assert len(teacher.calls) == sampler.nfe == nfe
    assert teacher.calls[0] == (len(X), T, None)
    assert all(EPS <= t <= T for _, t, _ in teacher.calls)


@pytest.mark.parametrize("name", JUMPERS)
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_a_student_makes_one_call_a_step(name, nfe):
    student = Counting()
    sampler = make_sampler(student, make_preconditioning("ctm"), name, nfe=nfe, gamma=gamma_of(name))
    sampler(X, None, normal(0, X.shape))
    assert len(student.calls) == sampler.nfe == nfe
    assert [t for _, t, _ in student.calls] == sampling_grid(nfe)[:-1].tolist()
    assert all(s <= end for (_, _, s), end in zip(student.calls, sampling_grid(nfe)[1:].tolist(), strict=True))
    assert student.calls[-1][2] == EPS


@pytest.mark.parametrize("name", SAMPLERS.names())
@pytest.mark.parametrize("nfe", [2, 4])
def test_fresh_noise_is_drawn_by_those_that_say_so(name, nfe):
    drawn = []

    def noise():
        drawn.append(1)
        return torch.zeros_like(X)

    kind = SAMPLERS.get(name)
    if issubclass(kind, StudentSampler):
        make_sampler(mixture_1d(), make_preconditioning("ctm"), name, nfe, gamma=gamma_of(name))(X, None, noise)
        assert len(drawn) == (nfe - 1 if kind.fresh_noise else 0)
    else:
        make_sampler(mixture_1d(), None, name, nfe)(X, None, noise)
        assert not drawn
        assert not kind.fresh_noise


@pytest.mark.parametrize("nfe", [1, 2, 3, 7])
def test_gamma_0_is_ctm_and_gamma_1_is_cm_bit_for_bit(nfe):
    form = make_preconditioning("ctm")
    x = 80 * normal(0)()
    for gamma, name in ((0.0, "ctm"), (1.0, "cm")):
        found = make_sampler(mixture_1d(), form, "gamma", nfe=nfe, gamma=gamma)(x, None, normal(1))
        assert torch.equal(found, make_sampler(mixture_1d(), form, name, nfe=nfe)(x, None, normal(1)))


def test_gamma_lies_between_by_kim_et_al():
    """x <- G(x, t_n, sqrt(1-gamma^2) t_{n+1}) + gamma t_{n+1} z, and a last jump to eps without noise."""
    form, z = make_preconditioning("ctm"), torch.tensor([[0.4], [-1.1]], dtype=torch.float64)
    x = expected = torch.tensor([[50.0], [-20.0]], dtype=torch.float64)
    times = sampling_grid(3).tolist()
    for t, u in itertools.pairwise(times):
        last = u == EPS
        s = u if last else math.sqrt(1 - 0.6**2) * u
        levels = [torch.full((2,), level, dtype=torch.float64) for level in (t, s)]
        expected = jump(mixture_1d(), expected, *levels, form(*levels)) + (0 if last else 0.6 * u * z)
    found = make_sampler(mixture_1d(), form, "gamma", nfe=3, gamma=0.6)(x, None, lambda: z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_multistep_sampling_is_what_it_was_bit_for_bit():
    """The loop of the version before there was a registry."""
    form, times = make_preconditioning("cm"), sampling_grid(4)
    x = expected = 80 * normal(0)()
    noise = normal(1)
    end = torch.full((len(x),), EPS, dtype=torch.float64)
    for number, time in enumerate(times[:-1]):
        t = time.expand(len(x))
        if number:
            expected = expected + (time**2 - EPS**2).sqrt() * noise()
        expected = jump(mixture_1d(), expected, t, end, form(t, end))
    assert torch.equal(make_sampler(mixture_1d(), form, nfe=4)(x, None, normal(1)), expected)


@pytest.mark.parametrize("name", JUMPERS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_with_the_exact_consistency_function_the_law_is_right_after_any_number_of_steps(name, gamma, nfe):
    """Gaussian data: mean 0 and variance v + eps^2, whatever noise is added between the jumps."""
    x = normal(7)() * math.sqrt(VARIANCE + T**2)
    sampler = make_sampler(gaussian(), Exact(), name, nfe=nfe, gamma=gamma_of(name, gamma))
    found = sampler(x, None, normal(8))
    error = math.sqrt(2 / len(x))
    assert float(found.mean()) == pytest.approx(0, abs=4 * math.sqrt(VARIANCE / len(x)))
    assert float(found.square().mean()) == pytest.approx(VARIANCE + EPS**2, rel=4 * error)
    kept = float((found * x).mean()) / math.sqrt((VARIANCE + EPS**2) * (VARIANCE + T**2))
    moves = SAMPLERS.get(name).fresh_noise and nfe > 1 and (name == "cm" or gamma > 0)
    assert (kept < 0.999) == moves


def test_two_dpm_solver_steps_are_those_of_the_paper():
    """Lu et al. 2022, Alg. 2, with sigma = t, alpha = 1: x <- (t/u)... written with h and r."""
    x = torch.tensor([[50.0]], dtype=torch.float64)
    denoise = lambda point, t: mixture_1d()(point, torch.tensor([t], dtype=torch.float64))  # noqa: E731
    t0, t1, t2 = 80.0, 1.5, EPS
    d0 = denoise(x, t0)
    h1, h2 = math.log(t0 / t1), math.log(t1 / t2)
    first = t1 / t0 * x - math.expm1(-h1) * d0
    d1, r = denoise(first, t1), h1 / h2
    expected = t2 / t1 * first - math.expm1(-h2) * ((1 + 1 / (2 * r)) * d1 - d0 / (2 * r))
    found = make_sampler(mixture_1d(), None, "dpmpp-2m", times="1.5")(x, None, normal(0))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_times_take_the_place_of_the_grid():
    form = make_preconditioning("ctm")
    named = make_sampler(mixture_1d(), form, times="2.5")
    assert named.times.tolist() == [T, 2.5, EPS]
    assert named.nfe == 2
    assert make_sampler(mixture_1d(), None, times=[10, 1, 0.1]).nfe == 8
    grid = make_sampler(mixture_1d(), form, times=sampling_grid(3))
    assert torch.equal(grid(X, None, normal(0)), make_sampler(mixture_1d(), form, nfe=3)(X, None, normal(0)))


def test_the_facts_of_a_sampler_tell_it_from_others():
    form = make_preconditioning("ctm")
    choices = [("ctm", 2, None), ("ctm", 3, None), ("cm", 2, None), ("gamma", 2, 0.5), ("gamma", 2, 0.7)]
    facts = [make_sampler(mixture_1d(), form, name, nfe=k, gamma=gamma).facts for name, k, gamma in choices]
    assert json.loads(json.dumps(facts)) == facts
    assert all(first != second for first, second in itertools.combinations(facts, 2))
    assert facts[3] == {
        "sampler": "cdistill.sampling.samplers:GammaSampling",
        "times": sampling_grid(2).tolist(),
        "gamma": 0.5,
    }


def test_at_34_calls_heun_is_the_default_of_a_teacher():
    truth = teacher_trajectories(mixture_1d(), 18, X)[-1]
    for sampler in (make_sampler(mixture_1d(), None), make_sampler(mixture_1d(), None, "heun", 34)):
        torch.testing.assert_close(sampler(X, None, normal(0)), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("form", "values", "words"),
    [
        (None, {"name": "ctm"}, "draws from a student; for a teacher: dpmpp-2m, euler, heun"),
        ("ctm", {"name": "heun", "nfe": 2}, "draws from a teacher; for a student: cm, ctm, gamma"),
        (None, {"nfe": 35}, "a multiple of 2"),
        (None, {"nfe": 0}, "got 0"),
        ("ctm", {}, "nfe: missing"),
        ("ctm", {"nfe": 0}, "1 or more"),
        ("ctm", {"nfe": 2, "times": "2.5"}, "leave --nfe out"),
        ("ctm", {"nfe": 2, "gamma": 0.5}, "goes with the sampler 'gamma'"),
        ("ctm", {"nfe": 2, "name": "gamma"}, "got None"),
        ("ctm", {"nfe": 2, "name": "gamma", "gamma": 1.5}, "got 1.5"),
        ("ctm", {"nfe": 2, "name": "gamma", "gamma": math.nan}, "got nan"),
        ("cm", {"nfe": 2, "name": "gamma", "gamma": 1.0}, "jumps to eps only; use 'cm'"),
        ("cm", {"nfe": 2, "name": "ctm"}, "use 'cm'"),
        (None, {"gamma": 0.5}, "adds no noise"),
    ],
)
def test_misuse_is_one_line(form, values, words):
    preconditioning = make_preconditioning(form) if form else None
    with pytest.raises(RecipeError, match=words) as error:
        make_sampler(mixture_1d(), preconditioning, **values)
    assert "\n" not in str(error.value)


def test_an_unknown_name_and_an_entry_that_is_no_sampler():
    with pytest.raises(UnknownNameError, match="did you mean 'heun'"):
        make_sampler(mixture_1d(), None, "huen")
    SAMPLERS.add("no-sampler", dict)
    try:
        with pytest.raises(CdistillError, match="no subclass"):
            make_sampler(mixture_1d(), None, "no-sampler")
    finally:
        SAMPLERS.remove("no-sampler")


def test_a_sampler_of_another_package_is_drawn_from():
    class Halfway(StudentSampler):
        """Jumps to half of the next level."""

        fresh_noise = True

        def jump_ends(self, times):
            return (times[1:] / 2).maximum(times[-1])

    SAMPLERS.add("halfway", Halfway)
    try:
        sampler = make_sampler(gaussian(), Exact(), "halfway", nfe=3)
        found, _ = generate(sampler, (1,), range(64 * 60))
    finally:
        SAMPLERS.remove("halfway")
    assert float(found.square().mean()) == pytest.approx(VARIANCE, rel=0.1)
