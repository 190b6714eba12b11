import pytest
import torch

from cdistill.objectives.distances import L2, PseudoHuber
from cdistill.objectives.dsm import dsm_loss
from cdistill.runtime.randomness import generator
from cdistill.training.loss_weighting import adaptive_weight


def test_l2_is_the_mean_square():
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert L2()(x, y).tolist() == [2.5]


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    d = 16
    c = 0.00054 * d**0.5
    zero = torch.zeros(1, d, dtype=torch.float64)
    near = torch.full((1, d), 1e-6, dtype=torch.float64)
    far = torch.full((1, d), 10.0, dtype=torch.float64)
    assert float(PseudoHuber()(near, zero)) == pytest.approx(float(near.square().sum()) / (2 * c), rel=1e-4)
    assert float(PseudoHuber()(far, zero)) == pytest.approx(40 - c, rel=1e-6)


def test_pseudo_huber_has_a_gradient_at_zero():
    x = torch.zeros(1, 4, requires_grad=True)
    PseudoHuber()(x, torch.zeros(1, 4)).sum().backward()
    assert x.grad.tolist() == [[0, 0, 0, 0]]


def test_dsm_loss_is_edms_weighted_error():
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    error = torch.tensor([[0.1, 0.3], [1.0, 0.0]])
    found = dsm_loss(error, torch.zeros(2, 2), sigma, 0.5)
    assert found.tolist() == pytest.approx([0.05 * 0.5 / 0.0625, 0.5 * 4.25 / 1.0], rel=1e-6)


def test_dsm_loss_is_the_free_networks_error():
    """weight = 1/c_out^2, so that the loss is |F - target|^2, of order one at every noise level."""
    from cdistill.networks.denoiser import edm_coefficients

    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    _, c_out, _ = edm_coefficients(sigma, 0.5)
    free = torch.randn(9, 5, generator=generator(0, "f"), dtype=torch.float64)
    found = dsm_loss(c_out[:, None] * free, torch.zeros(9, 5), sigma, 0.5)
    torch.testing.assert_close(found, free.square().mean(1))


def test_balance_is_the_clamped_ratio_of_gradient_norms():
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert float(adaptive_weight(first, second, 0, 1e4)) == pytest.approx(5 / (2 + 1e-4), rel=1e-6)
    assert float(adaptive_weight(first * 1e9, second, 0, 1e4)) == 1e4
    assert float(adaptive_weight(first, torch.zeros(2), 0, 1e4)) == 1e4


def test_balance_does_not_depend_on_the_gradient_scale():
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([1e-4, 1e-5])
    assert float(adaptive_weight(first * 2**16, second * 2**16, 0, 1e4, 2.0**16)) == pytest.approx(
        float(adaptive_weight(first, second, 0, 1e4)), rel=1e-6
    )
