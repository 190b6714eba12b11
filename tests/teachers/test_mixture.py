import json
from itertools import combinations

import pytest
import torch

from cdistill.cli.app import run
from cdistill.data import load_source
from cdistill.estimation.autodiff import Autodiff
from cdistill.estimation.estimate import solve
from cdistill.estimation.settings import EstimationSection
from cdistill.runtime.randomness import generator
from cdistill.teachers import load_teacher
from cdistill.teachers.mixture import (
    MixtureDenoiser,
    broad_spectrum,
    mixture_1d,
    narrow_spectrum,
    spectral_means,
    spectral_mixture,
)
from tests.conftest import fast_distill
from tests.quadrature import collect_sums

COMPONENTS = ((1 / 3, -2.0, 1.0), (2 / 3, 1.0, 0.25))  # weight, mean, variance


def random_mixture(components: int, dim: int) -> MixtureDenoiser:
    draw = generator(0, "mixture", dim)
    factors = torch.randn(components, dim, dim, generator=draw, dtype=torch.float64) / dim**0.5
    means = 2 * torch.randn(components, dim, generator=draw, dtype=torch.float64)
    weights = torch.rand(components, generator=draw, dtype=torch.float64) + 0.1
    return MixtureDenoiser(weights, means, factors @ factors.mT)


@pytest.mark.parametrize("t", [0.002, 0.1, 1.0, 10.0, 80.0])
def test_the_denoiser_is_the_posterior_mean_by_quadrature(t):
    x0 = torch.linspace(-9, 6, 200001, dtype=torch.float64)
    prior = sum(w * torch.exp(-((x0 - m) ** 2) / (2 * v)) / v**0.5 for w, m, v in COMPONENTS)
    for x in (-3.0, -0.4, 0.0, 0.3, 1.5):
        posterior = prior * torch.exp(-((x - x0) ** 2) / (2 * t**2))
        expected = float((posterior * x0).sum() / posterior.sum())
        found = mixture_1d()(torch.tensor([[x]], dtype=torch.float64), torch.tensor([t], dtype=torch.float64))
        assert float(found) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dim", [1, 2, 8, 64])
def test_the_denoiser_is_tweedies_formula(dim):
    """D = x + t^2 grad log q_t(x), the density written with torch's own multivariate normal."""
    mixture = random_mixture(3, dim)
    t = torch.tensor([0.5], dtype=torch.float64)
    x = torch.randn(4, dim, generator=generator(1, "x"), dtype=torch.float64, requires_grad=True)
    noisy = mixture.covariances + t**2 * torch.eye(dim)
    parts = torch.distributions.MultivariateNormal(mixture.means, noisy)
    density = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weights), parts)
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    torch.testing.assert_close(mixture(x, t.expand(4)), x + t**2 * score, rtol=1e-9, atol=1e-9)


def test_draws_have_the_mixtures_moments():
    mixture = random_mixture(3, 2)
    draws, labels = mixture.draw(400_000, generator(0, "draws"))
    assert labels is None
    mean = (mixture.weights[:, None] * mixture.means).sum(0)
    centred = mixture.means - mean
    second = mixture.covariances + centred[:, :, None] * centred[:, None]
    covariance = (mixture.weights[:, None, None] * second).sum(0)
    torch.testing.assert_close(draws.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(draws.T), covariance, atol=0.05, rtol=0)


def test_the_student_starts_at_the_teacher_bit_for_bit_and_can_move():
    teacher = mixture_1d()
    student = teacher.student()
    x = torch.randn(16, 1, generator=generator(0, "x"), dtype=torch.float64) * 3
    t = torch.full((16,), 2.0, dtype=torch.float64)
    for s in (2.0, 0.5, 0.002):
        assert torch.equal(student(x, t, torch.full_like(t, s)), teacher(x, t))
    student(x, t, t / 2).square().sum().backward()
    assert float(student.balance_weight().grad.abs().sum()) > 0


def points(dim: int, count: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t from 0.002 to 80 and labels from 0 to 3."""
    x = torch.randn(count, dim, generator=generator(2, "points"), dtype=torch.float64)
    return x, torch.logspace(-2.7, 1.9, count, dtype=torch.float64), torch.arange(count) % 4


def test_the_parameters_of_the_mixtures_in_sixteen_dimensions():
    torch.testing.assert_close(spectral_means() @ spectral_means().T, 4 * torch.eye(4).double(), rtol=0, atol=0)
    assert spectral_means().abs().eq(0.5).all()
    assert spectral_means().sum(1).tolist() == [0, 0, 0, 0]
    assert narrow_spectrum().unique().tolist() == [0.04]
    first, *others = broad_spectrum()
    assert (float(first[0]), float(first[-1])) == (pytest.approx(4e-6, rel=1e-14), pytest.approx(0.4, rel=1e-14))
    torch.testing.assert_close(first[1:] / first[:-1], torch.full((15,), 1e5 ** (1 / 15)).double(), rtol=1e-6, atol=0)
    assert all(torch.equal(first, other.roll(-4 * k)) for k, other in enumerate(others, 1))


@pytest.mark.parametrize(("width", "spectrum"), [("narrow", narrow_spectrum()), ("broad", broad_spectrum())])
def test_given_a_class_the_denoiser_is_a_gaussians(width, spectrum):
    """D(x, t | k) = m_k + e_k / (e_k + t^2) (x - m_k)."""
    x, t, labels = points(16)
    e, m = spectrum[labels], spectral_means()[labels]
    found = spectral_mixture(f"mixture-{width}-cond")(x, t, None, labels)
    torch.testing.assert_close(found, m + e / (e + t[:, None] ** 2) * (x - m), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("width", ["narrow", "broad"])
def test_without_a_class_it_is_the_mean_over_the_classes(width):
    """D(x, t) = sum_k p(k | x) D(x, t | k), with torch's own densities; the unconditional teacher's is the same."""
    x, t, _ = points(16)
    conditional, unconditional = spectral_mixture(f"mixture-{width}-cond"), spectral_mixture(f"mixture-{width}")
    noisy = conditional.covariances + (t[:, None, None, None] ** 2) * torch.eye(16)
    density = torch.distributions.MultivariateNormal(conditional.means.expand(12, 4, 16), noisy)
    share = density.log_prob(x[:, None]).softmax(1)
    each = [conditional(x, t, None, torch.full((12,), k)) for k in range(4)]
    expected = torch.einsum("bk,bkd->bd", share, torch.stack(each, 1))
    torch.testing.assert_close(conditional(x, t), expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(unconditional(x, t), conditional(x, t))
    assert unconditional.num_classes == 0
    assert conditional.num_classes == 4


def test_a_class_may_have_several_components():
    whole, x, t = random_mixture(3, 4), *points(4)[:2]
    classed = MixtureDenoiser(whole.weights, whole.means, whole.covariances, classes=torch.tensor([0, 1, 0]))
    part = MixtureDenoiser(*(each[[0, 2]] for each in (whole.weights, whole.means, whole.covariances)))
    torch.testing.assert_close(classed(x, t, None, torch.zeros(12, dtype=torch.int64)), part(x, t))
    assert classed.draw(1000, generator(0, "several"))[1].unique().tolist() == [0, 1]


@pytest.mark.parametrize("width", ["narrow", "broad"])
def test_l_is_the_mean_of_the_shrinkages(width):
    """l = mean_j t^2 / (e_j + t^2), whatever the class; probes of +-1 meet the diagonal exactly."""
    name, t = f"mixture-{width}-cond", torch.logspace(1, -2.5, 6, dtype=torch.float64)
    e = load_teacher(name).denoiser.eigenvalues[0]
    teacher, source = load_teacher(name), load_source(name)
    sums = collect_sums(Autodiff(), teacher.denoiser, source, t, EstimationSection(samples=16))
    found = solve(Autodiff(), sums, 0.5).coefficients.l
    torch.testing.assert_close(found, (t[:, None] ** 2 / (e + t[:, None] ** 2)).mean(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", ["narrow", "broad"])
def test_draws_carry_their_class(width):
    source = load_source(f"mixture-{width}-cond")
    assert (len(source), source.num_classes, source.labels.dtype) == (65536, 4, torch.int64)
    for k, variance in enumerate(spectral_mixture(f"mixture-{width}").covariances.diagonal(dim1=1, dim2=2)):
        rows = source.samples[source.labels == k]
        assert len(rows) == pytest.approx(16384, abs=5 * 111)  # standard deviation of a count: 111
        z = (rows - spectral_means()[k]) / variance.sqrt()
        assert float(z.mean(0).abs().max()) < 5 / len(rows) ** 0.5
        assert float((torch.cov(z.T) - torch.eye(16)).abs().max()) < 0.06
    unconditional = load_source(f"mixture-{width}")
    assert (unconditional.labels, unconditional.num_classes) == (None, 0)


def test_no_two_of_the_mixtures_are_taken_for_one_another():
    names = [f"mixture-{width}{kind}" for width in ("narrow", "broad") for kind in ("", "-cond")]
    assert len({load_teacher(name).digest for name in names}) == 4
    assert len({load_source(name, split).digest for name in names for split in ("train", "heldout")}) == 8


def test_a_conditional_student_starts_at_the_teacher_and_sees_the_class():
    teacher = spectral_mixture("mixture-broad-cond")
    student = teacher.student()
    x, t, labels = points(16)
    for given in (labels, None):
        assert torch.equal(student(x, t, t / 2, given), teacher(x, t, None, given))
    torch.nn.init.normal_(student.last.weight, generator=generator(0, "last"))
    with torch.no_grad():
        change = [student(x, t, t / 2, given) - teacher(x, t, None, given) for given in (labels, 3 - labels, None)]
    scale = float(change[0].abs().max())
    assert all(float((one - other).abs().max()) > 0.01 * scale for one, other in combinations(change, 2))


def test_an_unconditional_student_has_no_input_for_classes():
    assert mixture_1d().student().hidden[0].in_features == 1 + 2 * 32
    assert spectral_mixture("mixture-broad").student().hidden[0].in_features == 16 + 2 * 32


def test_a_conditional_mixture_is_distilled_and_judged(tmp_path):
    assert run(["-q", *fast_distill(tmp_path / "run", "teacher=mixture-broad-cond", "evaluation.samples=200")]) == 0
    record = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    rows = {(row["sampler"], row["nfe"]): row["values"] for row in record["rows"]}
    assert all(values.keys() == {"frechet-vectors", "teacher-mse"} for values in rows.values())
    for k in (1, 2):
        assert rows["student", k]["teacher-mse"] < rows["untrained student", k]["teacher-mse"] < 0.1
    teacher = rows["teacher (Heun)", 34]
    assert teacher["frechet-vectors"] < rows["student", 2]["frechet-vectors"] < rows["student", 1]["frechet-vectors"]


@pytest.mark.parametrize("name", ["mixture-1d", "mixture-narrow", "mixture-broad-cond"])
def test_what_moves_a_teacher_moves_neither_its_data_nor_another_one(name):
    """On a GPU they would meet a CPU's random numbers there."""
    first, second = load_teacher(name), load_teacher(name)
    first.denoiser.to("meta")
    assert {tensor.device.type for tensor in second.denoiser.state_dict().values()} == {"cpu"}
    assert load_source(name).samples.device.type == "cpu"
