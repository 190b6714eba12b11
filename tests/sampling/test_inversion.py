"""Samples back to noise, and the same samples from it again."""

import itertools
import math

import pytest
import torch

from cdistill.errors import RecipeError
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning, make_preconditioning
from cdistill.sampling.drawing import draw_chunks
from cdistill.sampling.inversion import TOLERANCE, invert, invert_jump
from cdistill.sampling.samplers import make_sampler
from cdistill.schedule import EPS, T
from cdistill.teachers import load_teacher
from cdistill.teachers.mixture import MixtureDenoiser, mixture_1d

TEN = (0.1,) * 10  # classes, drawn alike

VARIANCE = 0.7
X = torch.linspace(-150, 150, 31, dtype=torch.float64)[:, None]


def nothing():
    raise AssertionError("no noise is needed")


def rms(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())


def test_the_way_back_and_forth_of_a_teacher_converges_with_order_3():
    """One more than Heun's: the leading term of the error changes its sign with the direction."""
    errors = []
    for points in (33, 65, 129):
        sampler = make_sampler(mixture_1d(), None, nfe=2 * (points - 1))
        samples = sampler(X, None, nothing)
        latents, residual = invert(sampler, samples)
        assert not residual.any()
        errors.append(rms(sampler(latents, None, nothing) - samples))
    assert errors[-1] < 1e-3
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([3, 3], abs=0.1)


def test_gaussian_latents_are_the_closed_form():
    gaussian = MixtureDenoiser(torch.ones(1), torch.zeros(1, 1), torch.full((1, 1, 1), VARIANCE, dtype=torch.float64))
    x = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    found, _ = invert(make_sampler(gaussian, None, nfe=256), x)
    exact = x * math.sqrt((VARIANCE + T**2) / (VARIANCE + EPS**2))
    torch.testing.assert_close(found, exact, rtol=5e-3, atol=0)


def test_the_round_trip_of_the_digits_teacher():
    teacher = load_teacher("digits").denoiser
    chunk = next(draw_chunks((1, 8, 8), range(64), TEN))
    x, labels = chunk.x[:8], chunk.labels[:8]
    sampler = make_sampler(teacher, None, nfe=64)
    with torch.inference_mode():
        samples = sampler(x, labels, nothing)
        latents, _ = invert(sampler, samples, labels)
        again = sampler(latents, labels, nothing)
    assert rms(again - samples) < 0.02
    assert rms(latents - x) < 0.2 * T


@pytest.mark.parametrize("steps", [60, 100])
def test_short_jumps_are_inverted_to_rounding(steps):
    """|g/f D'| < 1 for each of them: the iteration contracts."""
    sampler = make_sampler(mixture_1d(), make_preconditioning("ctm"), nfe=steps)
    samples = sampler(X, None, nothing)
    latents, residual = invert(sampler, samples)
    assert residual.max() <= TOLERANCE
    assert rms(sampler(latents, None, nothing) - samples) < 20 * TOLERANCE


def test_a_jump_that_forgets_where_it_came_from_says_so():
    """From 80 to eps at once, g/f = 40,000: nothing contracts, and the residual is no small number."""
    sampler = make_sampler(mixture_1d(), make_preconditioning("ctm"), nfe=1)
    samples = sampler(X, None, nothing)
    latents, residual = invert(sampler, samples)
    assert residual.min() > TOLERANCE
    assert residual.isfinite().all()
    again = sampler(latents, None, nothing) - samples
    torch.testing.assert_close(residual, again.abs()[:, 0], rtol=1e-6, atol=1e-12)


def test_a_jump_without_a_network_needs_one_call():
    class Linear(Preconditioning):
        def f_and_g(self, t, s):
            return s / t, torch.zeros_like(t)

    t, s = (torch.full((31,), level, dtype=torch.float64) for level in (2.0, 0.5))
    back, residual, calls = invert_jump(mixture_1d(), X, t, s, Linear()(t, s))
    torch.testing.assert_close(back, 4 * X, rtol=1e-12, atol=0)
    assert calls <= 2
    assert float(residual.max()) < 1e-12


def test_samplers_with_fresh_noise_have_no_inverse():
    for name, gamma in (("cm", None), ("gamma", 0.5)):
        sampler = make_sampler(mixture_1d(), make_preconditioning("ctm"), name, 2, gamma=gamma)
        with pytest.raises(RecipeError, match="only 'ctm' has an inverse"):
            invert(sampler, X)


def test_each_sample_keeps_its_best_iterate():
    class Exploding(Denoiser):
        """D = x^3: contracts for small x and explodes for large ones."""

        def __init__(self):
            super().__init__()
            self.sample_shape, self.sigma_data = (1,), 0.5

        def forward(self, x, t, s=None, labels=None):
            return x**3

        def student(self, takes_s=True, dropout=0.0):
            raise NotImplementedError

    x = torch.tensor([[0.01], [30.0]], dtype=torch.float64)
    t, s = (torch.full((2,), level, dtype=torch.float64) for level in (1.0, 0.5))
    half = torch.full((2,), 0.5, dtype=torch.float64)
    back, residual, _ = invert_jump(Exploding(), x, t, s, (half, half))
    assert float(residual[0]) < TOLERANCE
    assert float(residual[1]) > 1
    assert back.isfinite().all()
    left = (0.5 * back + 0.5 * back**3 - x).abs()[:, 0]
    torch.testing.assert_close(residual, left, rtol=1e-9, atol=1e-15)
