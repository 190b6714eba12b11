"""The Frechet distance: closed forms, arithmetic of 50 digits, public implementations; what each sample adds to it."""

import math

import mpmath
import pytest
import torch

from cdistill.evaluation.frechet import Sums, _couple, frechet_estimate, gaussian, moments, streamed_moments
from cdistill.runtime.randomness import generator
from tests.waves import waves

# Of `waves(200, 12, 0.3)` and `1.1 * waves(240, 12, 1.1)`, by fid_statistics_to_metric of torch-fidelity 0.4.0 and
# calculate_frechet_distance of pytorch-fid 0.3.0 (SciPy 1.17.1).
TORCH_FIDELITY, PYTORCH_FID = 1.4144588887692788, 1.4144588887692775


def frechet_distance(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> float:
    return _couple(gaussian(*first), gaussian(*second))[0]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed, "frechet"), dtype=torch.float64)


def centred(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(len(covariance), dtype=torch.float64), covariance


def turned(values: torch.Tensor, seed: int) -> torch.Tensor:
    """A covariance with these eigenvalues and random eigenvectors."""
    vectors = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    found = (vectors * values) @ vectors.T
    return (found + found.T) / 2


def precise(first: torch.Tensor, second: torch.Tensor) -> mpmath.mpf:
    """tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)) with 50 digits."""
    with mpmath.workdps(50):
        a, b = (mpmath.matrix(part.tolist()) for part in (first, second))
        values, vectors = mpmath.eigsy(a)
        root = vectors * mpmath.diag([mpmath.sqrt(max(value, 0)) for value in values]) * vectors.T
        inner = root * b * root
        cross = mpmath.eigsy((inner + inner.T) / 2, eigvals_only=True)
        trace = sum(a[i, i] + b[i, i] for i in range(a.rows))
        return trace - 2 * sum(mpmath.sqrt(max(value, 0)) for value in cross)


def test_commuting_gaussians_some_of_them_singular():
    """|m|^2 + sum (sqrt a - sqrt b)^2 for diagonal covariances."""
    a, b = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 2.0]).double()
    m = torch.tensor([1.0, 0.0, -2.0]).double()
    expected = 5 + float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance((m, a.diag()), centred(b.diag())) == pytest.approx(expected, rel=1e-13)


def test_two_dimensions():
    """tr (AB)^(1/2) = (tr AB + 2 (det AB)^(1/2))^(1/2) for 2x2 matrices."""
    a, b = turned(torch.tensor([3.0, 0.2]).double(), 1), turned(torch.tensor([1.0, 0.7]).double(), 2)
    cross = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(a.det() * b.det())))
    expected = float(a.trace() + b.trace()) - 2 * cross
    assert frechet_distance(centred(a), centred(b)) == pytest.approx(expected, rel=1e-12)


def test_rank_one():
    """|u|^2 + |v|^2 - 2 |u.v| for covariances u u' and v v'."""
    u, v = normal(30, seed=1), normal(30, seed=2)
    expected = float(u @ u + v @ v - 2 * (u @ v).abs())
    assert frechet_distance(centred(torch.outer(u, u)), centred(torch.outer(v, v))) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("first", "second"), [(-8, -8), (-16, -16), (-16, 0)], ids=str)
def test_eigenvalues_that_fade_away(first, second):
    """Of 1 to 10^first against 1 to 10^second; the roots of the smallest are as large as the float64 of 1."""
    a, b = (turned(torch.logspace(0, end, 20, dtype=torch.float64), k) for k, end in enumerate((first, second)))
    assert frechet_distance(centred(a), centred(b)) == pytest.approx(float(precise(a, b)), rel=1e-8)


def test_fewer_samples_than_dimensions(capsys):
    """The samples' own factors give the cross term: the singular values of X Y'. It is said, but not twice."""
    x, y = normal(9, 40, seed=1), normal(15, 40, seed=2) * 1.3 + 0.2
    own, other = x - x.mean(0), y - y.mean(0)
    cross = torch.linalg.svdvals(own @ other.T).sum() / math.sqrt(8 * 14)
    spread = own.square().sum() / 8 + other.square().sum() / 14
    expected = float((x.mean(0) - y.mean(0)).square().sum() + spread - 2 * cross)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(moments(y), moments(x)) == pytest.approx(expected, rel=1e-12)
    for _ in range(2):
        assert frechet_estimate(x, gaussian(*moments(y))).value == pytest.approx(expected, rel=1e-12)
    assert capsys.readouterr().err.count("9 samples have a singular covariance in 40 dimensions") == 1


@pytest.mark.parametrize("rank", [4, 20])
def test_a_gaussian_has_no_distance_to_itself(rank):
    x = normal(rank + 1, 20, seed=3)
    assert 0 <= frechet_distance(moments(x), moments(x)) < 1e-24


@pytest.mark.parametrize("rank", [4, 20])
def test_nearly_equal_covariances_lose_no_digits(rank):
    """(sqrt(k) - 1)^2 tr C for C and k C."""
    covariance = moments(normal(rank + 1, 20, seed=3))[1]
    factor = 1 + 2.0**-20
    found = frechet_distance(centred(covariance), centred(factor * covariance))
    assert found == pytest.approx((math.sqrt(factor) - 1) ** 2 * float(covariance.trace()), rel=1e-8)


def test_public_implementations_find_the_same():
    first, second = moments(waves(200, 12, 0.3)), moments(waves(240, 12, 1.1) * 1.1)
    found = frechet_distance(first, second)
    assert found == pytest.approx(TORCH_FIDELITY, rel=1e-10)
    assert found == pytest.approx(PYTORCH_FID, rel=1e-10)


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_scipys_matrix_root_finds_the_same(dim):
    from scipy.linalg import sqrtm

    first, second = (moments(normal(3 * dim, dim, seed=k))[1] for k in (0, 1))
    expected = float(first.trace() + second.trace()) - 2 * sqrtm((first @ second).numpy()).real.trace()
    assert frechet_distance(centred(first), centred(second)) == pytest.approx(expected, rel=1e-8)


def test_moments_are_unbiased_and_may_come_in_parts():
    features = normal(50, 3)
    for parts in ([features], features.split(7), features.split(1)):
        mean, covariance = streamed_moments(part + 1e6 for part in parts)
        torch.testing.assert_close(mean, features.mean(0) + 1e6, rtol=1e-14, atol=0)
        torch.testing.assert_close(covariance, torch.cov(features.T), rtol=1e-8, atol=1e-9)


def test_sums_merge():
    features, whole, parts = normal(50, 3), Sums(), Sums()
    whole.add(features)
    for part in features.split([20, 30]):
        own = Sums()
        own.add(part)
        parts.merge(own.count, own.mean, own.scatter)
    assert parts.count == 50
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("count", [400, 6])
def test_what_a_sample_adds_is_the_derivative_by_its_weight(count):
    """n times the derivative of the distance of weighted moments, also where the covariance is singular."""
    x, real = normal(count, 8, seed=1) * 0.8 + 0.1, moments(normal(300, 8, seed=2))

    def weighted(weights: torch.Tensor) -> float:
        share = weights / weights.sum()
        mean = share @ x
        rest = x - mean
        return frechet_distance((mean, (rest.T * share) @ rest * count / (count - 1)), real)

    found = frechet_estimate(x, gaussian(*real)).influence
    found = found - found.mean()
    for k in (0, 3, 5):
        step = torch.zeros(count, dtype=torch.float64)
        step[k] = 1e-4
        slope = (weighted(1 + step) - weighted(1 - step)) / 2e-4 * count
        # Weights leave the covariance's n / (n - 1) alone, which a larger sample would not.
        assert slope == pytest.approx(float(found[k]), rel=3 / count + 1e-5, abs=3 / count)
