import pytest
import torch

from cdistill.randomness import generator
from cdistill.teachers.mixture import MixtureDenoiser, mixture_1d

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
