import math

import pytest
import torch

from cdistill.data import Source, load_source
from cdistill.errors import CdistillError, MissingAssetError
from cdistill.evaluation.frechet import frechet_distance, moments
from cdistill.evaluation.judge import Judge
from cdistill.evaluation.metrics import (
    InceptionFrechet,
    PixelFrechet,
    Reference,
    TeacherError,
    Wasserstein,
    wasserstein_1d,
)
from cdistill.evaluation.results import choose_metrics, measure
from cdistill.preconditionings import make_preconditioning
from cdistill.randomness import generator
from cdistill.teachers import load_teacher


def spd(dim: int, seed: int, rank: int | None = None) -> torch.Tensor:
    factor = torch.randn(dim, rank or dim, generator=generator(seed, "spd"), dtype=torch.float64)
    return factor @ factor.T


def test_frechet_distance_of_commuting_gaussians():
    """|m|^2 + sum (sqrt a - sqrt b)^2 for diagonal covariances."""
    a, b = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 2.0]).double()
    m = torch.tensor([1.0, 0.0, -2.0]).double()
    expected = 5 + float((a.sqrt() - b.sqrt()).square().sum())
    found = frechet_distance((m, a.diag()), (torch.zeros(3).double(), b.diag()))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_frechet_distance_agrees_with_scipys_matrix_root(dim):
    from scipy.linalg import sqrtm

    first, second = spd(dim, 0), spd(dim, 1)
    zero = torch.zeros(dim, dtype=torch.float64)
    expected = float(first.trace() + second.trace()) - 2 * sqrtm((first @ second).numpy()).real.trace()
    assert frechet_distance((zero, first), (zero, second)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_a_singular_gaussian_to_itself_is_zero():
    covariance = spd(20, 3, rank=4)
    mean = torch.ones(20, dtype=torch.float64)
    assert frechet_distance((mean, covariance), (mean, covariance)) == pytest.approx(0, abs=1e-6)


def test_moments_are_unbiased():
    features = torch.randn(50, 3, generator=generator(0, "m"), dtype=torch.float64)
    mean, covariance = moments(features.float())
    torch.testing.assert_close(mean, features.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(covariance, torch.cov(features.T), rtol=1e-5, atol=1e-6)


def test_pixel_frechet_of_the_data_against_itself_is_zero():
    digits = load_source("digits")
    x, _ = digits.batch(torch.arange(len(digits)))
    assert PixelFrechet()(x.double(), Reference(digits, x)) == pytest.approx(0, abs=1e-6)


def test_pixel_frechet_sees_images_as_they_would_be_stored():
    """Values beyond [-1, 1] and finer than a grey level do not count."""
    digits = load_source("digits")
    x, _ = digits.batch(torch.arange(len(digits)))
    beyond = torch.where(x == 1, 3.0, x).double() + 1e-4
    assert PixelFrechet()(beyond, Reference(digits, x)) == pytest.approx(0, abs=1e-6)


def test_teacher_error_is_the_mean_square():
    reference = Reference(load_source("digits"), torch.zeros(4, 1, 8, 8).double())
    assert TeacherError()(torch.full((4, 1, 8, 8), 0.5).double(), reference) == 0.25


def test_wasserstein_of_a_shift_is_the_shift():
    x = torch.randn(1000, 1, generator=generator(0, "w"), dtype=torch.float64)
    assert wasserstein_1d(x, x + 0.3) == pytest.approx(0.3, rel=1e-9)


def test_wasserstein_refuses_images():
    with pytest.raises(CdistillError, match="one-dimensional"):
        Wasserstein().check(load_source("digits"))


@pytest.mark.parametrize("name", ["frechet-pixels", "fid"])
def test_metrics_of_images_refuse_vectors(name):
    with pytest.raises(CdistillError, match="needs images"):
        choose_metrics([name], load_source("mixture-1d"))


def test_metrics_apply_by_the_kind_of_data():
    assert set(choose_metrics([], load_source("digits"))) == {"frechet-pixels", "teacher-mse"}
    assert set(choose_metrics([], load_source("mixture-1d"))) == {"teacher-mse", "wasserstein"}
    large = Source("large", torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert [metric.applies(large) for metric in (InceptionFrechet(), PixelFrechet(), Wasserstein())] == [
        True,
        False,
        False,
    ]


def test_fid_without_weights_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    source = Source("large", torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(MissingAssetError) as caught:
        choose_metrics(["fid"], source)
    assert str(tmp_path / "inception-2015-12-05.pt") in str(caught.value)
    assert "https://" in str(caught.value)


def test_a_metric_that_cannot_be_computed_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    source = load_source("digits")
    x = source.batch(torch.arange(64))[0].double()
    metrics = choose_metrics(["fid", "teacher-mse"], source)
    assert measure("student", 2, metrics, x, Reference(source, x)).values == {"teacher-mse": 0.0}
    assert "inception-2015-12-05.pt" in capsys.readouterr().err


def test_fid_features_come_from_clean_fids_network(tmp_path, monkeypatch):
    """A small TorchScript network in Inception's place: the features, the repetition of grey, the moments."""
    from cdistill import assets
    from cdistill.assets import Asset
    from cdistill.storage import file_digest

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Identity()

        def forward(self, x: torch.Tensor, return_features: bool) -> torch.Tensor:
            flat = x.flatten(1) / 255
            return torch.cat([flat, flat], 1)[:, :2048]

    with pytest.warns(Warning, match="deprecated"):
        torch.jit.script(Features()).save(tmp_path / "inception-2015-12-05.pt")
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    path = tmp_path / "inception-2015-12-05.pt"
    monkeypatch.setattr(assets, "INCEPTION", Asset(path.name, "https://x", file_digest(path)))
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "i"))
    source = Source("large", images)
    samples = images.double() / 127.5 - 1
    with pytest.warns(Warning, match="deprecated"):
        found = InceptionFrechet()(samples, Reference(source, samples))
    assert found == pytest.approx(0, abs=1e-5)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CdistillError, match=r"sha256 is"):
        InceptionFrechet().check(source)


@pytest.mark.slow
def test_the_judge_ranks_more_calls_above_fewer():
    teacher = load_teacher("digits")
    judge = Judge(teacher, load_source("digits"), samples=256)
    rows, drawn = judge.judge_student("untrained student", teacher.denoiser, make_preconditioning("ctm"), [1, 4, 16])
    assert [part.shape for part in drawn] == [(256, 1, 8, 8)] * 3
    errors = [row.values["teacher-mse"] for row in rows]
    assert errors == sorted(errors, reverse=True)
    teacher_row = judge.judge_teacher()
    assert teacher_row.values["teacher-mse"] == 0
    assert teacher_row.nfe == 34
    assert teacher_row.values["frechet-pixels"] < rows[0].values["frechet-pixels"] / 3
    assert all(math.isfinite(value) for row in rows for value in row.values.values())
