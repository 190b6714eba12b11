"""Metrics: the figures of public implementations, what each sample adds, honest errors, bounded memory."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cdistill.data import Source, load_source
from cdistill.errors import CdistillError, MissingAssetError
from cdistill.evaluation import pairs
from cdistill.evaluation.estimates import Estimate
from cdistill.evaluation.features import Pixels, load_features
from cdistill.evaluation.frechet import frechet_estimate, gaussian, moments
from cdistill.evaluation.metrics import SampleSet, wasserstein_1d, wasserstein_estimate
from cdistill.evaluation.pairs import find_balls, kernel_distance, mean_kernel
from cdistill.evaluation.references import Reference
from cdistill.registry import METRICS
from cdistill.runtime.randomness import generator
from cdistill.storage.assets import INCEPTION
from tests.conftest import environment
from tests.waves import waves

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# Of `waves(200, 12, 0.3)` against `1.1 * waves(240, 12, 1.1)`: prdc 0.2 with k = 3, torch-fidelity 0.4.0 (mmd2,
# unbiased, the first 200 of the latter).
PUBLIC = {"precision": 0.85, "recall": 0.475}
PUBLIC_KID = 0.357631387749171
OF_FEATURES = ("fid", "kid", "precision", "recall")


def of_points(x: torch.Tensor, y: torch.Tensor) -> dict[str, Estimate]:
    return {
        "precision": pairs.precision(x, find_balls(y, 3, CPU, "test")),
        "recall": pairs.recall(find_balls(x, 3, CPU, "test"), y),
        "kid": kernel_distance(x, y, mean_kernel(y, CPU), CPU),
    }


def slope(figure, count: int, k: int, step: float = 1e-4) -> float:
    """n times the derivative of a figure of weighted samples by the weight of sample k."""
    change = torch.zeros(count, dtype=torch.float64)
    change[k] = step
    return (figure(1 + change) - figure(1 - change)) / (2 * step) * count


def without_each(figure, x: torch.Tensor) -> torch.Tensor:
    """n - 1 times what the figure loses without each sample, by computing it n times more."""
    rest = [figure(torch.cat([x[:k], x[k + 1 :]])) for k in range(len(x))]
    return (len(x) - 1) * (figure(x) - torch.tensor(rest, dtype=torch.float64))


def test_public_implementations_find_the_same():
    x, y = waves(200, 12, 0.3), waves(240, 12, 1.1) * 1.1
    found = of_points(x, y)
    assert {name: found[name].value for name in PUBLIC} == pytest.approx(PUBLIC, rel=1e-12)
    kid = kernel_distance(x, y[:200], mean_kernel(y[:200], CPU), CPU)
    assert kid.value == pytest.approx(PUBLIC_KID, rel=1e-10)


def test_blocks_change_nothing(monkeypatch):
    x, y = waves(200, 6, 0.3), waves(240, 6, 1.1)
    whole = of_points(x, y)
    monkeypatch.setattr(pairs, "BLOCK", 64)
    for name, part in of_points(x, y).items():
        assert part.value == pytest.approx(whole[name].value, rel=1e-12)
        torch.testing.assert_close(part.influence, whole[name].influence, rtol=1e-9, atol=1e-12)


def test_the_data_themselves():
    digits = load_source("digits")
    same, reference = SampleSet(digits.samples), Reference(digits)
    found = {name: METRICS.get(name)(Pixels())(same, reference).value for name in ("fid", *PUBLIC)}
    assert found["fid"] == pytest.approx(0, abs=1e-20)
    assert [found[name] for name in ("precision", "recall")] == [1, 1]


def test_all_samples_alike_have_no_recall():
    y = waves(50, 4, 0.0)
    x = y[:1].expand(20, -1).contiguous()
    found = of_points(x, y)
    assert found["precision"].value == 1
    assert found["recall"].value == 1 / 50  # the one that they copy
    assert found["recall"].error == 0


def test_kid_is_the_mean_over_all_pairs():
    x, y = waves(30, 5, 0.3).double(), waves(40, 5, 1.1).double()

    def mean(a: torch.Tensor, b: torch.Tensor, pairs: int) -> float:
        kernel = (a @ b.T / 5 + 1) ** 3
        return float((kernel.sum() - (kernel.trace() if a is b else 0)) / pairs)

    expected = mean(x, x, 30 * 29) + mean(y, y, 40 * 39) - 2 * mean(x, y, 1200)
    found = kernel_distance(x, y, mean_kernel(y, CPU), CPU)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert float(found.influence.mean()) / 2 == pytest.approx(expected / 1 - mean(y, y, 1560) + mean(x, y, 1200))


@pytest.mark.parametrize(("count", "size"), [(70, 3), (20, 1)])
def test_recall_without_each_sample(count, size):
    """What the jackknife needs is found at once, larger balls and all."""
    seen = []
    for phase in range(4):
        x, y = waves(count, size, 0.3 + phase), waves(90, size, 1.1 + phase) * 1.2

        def recall(part: torch.Tensor, y: torch.Tensor = y) -> float:
            return pairs.recall(find_balls(part, 3, CPU, "test"), y).value

        expected = without_each(recall, x)
        seen.append(expected)
        found = pairs.recall(find_balls(x, 3, CPU, "test"), y).influence
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (torch.stack(seen) > 0).any()
    assert (torch.stack(seen) < 0).any()  # a ball that grows holds more


def test_what_a_sample_adds_to_the_wasserstein_distance():
    from scipy.stats import wasserstein_distance

    x, y = waves(50, 1, 0.3)[:, 0].double(), waves(80, 1, 1.1)[:, 0].double() * 1.2

    def weighted(weights: torch.Tensor) -> float:
        return float(wasserstein_distance(x.numpy(), y.numpy(), weights.numpy()))

    found = wasserstein_estimate(x, y)
    assert found.value == pytest.approx(wasserstein_distance(x.numpy(), y.numpy()), rel=1e-12)
    centred = found.influence - found.influence.mean()
    assert [slope(weighted, 50, k) for k in (0, 7)] == pytest.approx([float(centred[k]) for k in (0, 7)], rel=1e-6)


def test_wasserstein_of_a_shift_is_the_shift():
    x = torch.randn(1000, 1, generator=generator(0, "w"), dtype=torch.float64)
    assert wasserstein_1d(x, x + 0.3) == pytest.approx(0.3, rel=1e-9)


def test_teacher_error_is_the_mean_of_the_samples_errors():
    metric, reference = METRICS.get("teacher-mse")(Pixels()), Reference(load_source("digits"))
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    found = metric(SampleSet(images, torch.tensor([0.0, 1.0, 5.0]).double()), reference)
    assert (found.value, found.error) == (2, pytest.approx(math.sqrt(7 / 3)))
    with pytest.raises(CdistillError, match="have no teacher"):
        metric(SampleSet(images), reference)


def test_errors_say_how_far_a_figure_varies():
    """Standard errors against the spread over 200 sets of samples; the jackknife's are too large, never too small."""
    torch.set_num_threads(1)
    count, y = 250, torch.randn(250, 4, generator=generator(0, "real"))
    balls = find_balls(y, 3, CPU, "test")
    real, within = gaussian(*moments(y)), mean_kernel(y, CPU)
    figures = {
        "frechet": lambda x: frechet_estimate(x, real),
        "kid": lambda x: kernel_distance(x, y, within, CPU),
        "precision": lambda x: pairs.precision(x, balls),
        "recall": lambda x: pairs.recall(find_balls(x, 3, CPU, "test"), y),
        "wasserstein": lambda x: wasserstein_estimate(x[:, 0], y[:, 0]),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in figures}
    for k in range(200):
        x = 0.7 * torch.randn(count, 4, generator=generator(k, "samples")) + 0.4
        for name, figure in figures.items():
            estimate = figure(x)
            found[name].append((estimate.value, estimate.error))
    for name, drawn in found.items():
        values, errors = torch.tensor(drawn, dtype=torch.float64).T
        ratio = float(errors.mean() / values.std())
        most = 2.0 if name == "recall" else 1.2
        assert 0.85 < ratio < most, (name, ratio)
        inside = float(((values - values.mean()).abs() < 1.96 * errors).double().mean())
        assert inside > 0.89, (name, inside)  # of 200: four standard errors below 95 %


def vectors(name: str, samples: torch.Tensor) -> Reference:
    return Reference(Source(name, samples))


def test_the_frechet_distance_of_vectors_is_that_of_their_gaussians():
    """|m|^2 + sum (sqrt a - sqrt b)^2 for diagonal covariances; in float64, unscaled and whatever the network."""
    a, b = torch.tensor([4.0, 1.0, 1e-6]).double(), torch.tensor([1.0, 2.0, 4e-6]).double()
    m = torch.tensor([0.5, -1.0, 0.0]).double()
    y, x = (torch.randn(n, 3, generator=generator(n, "v"), dtype=torch.float64) for n in (40_000, 4000))
    metric, expected = METRICS.get("frechet-vectors")(Pixels()), float(m @ m + (a.sqrt() - b.sqrt()).square().sum())
    found = metric(SampleSet(x * b.sqrt() + m), vectors("near", y * a.sqrt()))
    assert abs(found.value - expected) < 3 * found.error < 0.2
    shift = 2.0**20  # float32 would lose the third value
    far = metric(SampleSet(x * b.sqrt() + m + shift), vectors("far", y * a.sqrt() + shift))
    assert far.value == pytest.approx(found.value, rel=1e-9)
    tiny = metric(SampleSet(x[:, 1:] * 1e-9), vectors("tiny", y[:, 1:] * 3e-9))
    expected = METRICS.get("frechet-vectors")(Pixels())(SampleSet(x[:, 1:]), vectors("one", y[:, 1:] * 3)).value
    assert tiny.value == pytest.approx(1e-18 * expected, rel=1e-6)


def test_the_error_of_the_frechet_distance_of_vectors_is_its_spread():
    reference, samples = Reference(load_source("mixture-broad")), load_source("mixture-broad", "heldout").samples
    metric = METRICS.get("frechet-vectors")(Pixels())
    found = [metric(SampleSet(part * 1.3 + 0.1), reference) for part in samples[:32000].split(400)]
    spread = float(torch.tensor([part.value for part in found], dtype=torch.float64).std())
    assert 0.9 < sum(part.error for part in found) / len(found) / spread < 1.2  # found 1.03; 8 % is one deviation
    assert found[0].splits is not None


@pytest.mark.parametrize("shape", [(1,), (1025,), (1, 8, 8)], ids=str)
def test_the_frechet_distance_of_vectors_refuses_other_data(shape):
    metric = METRICS.get("frechet-vectors")(Pixels())
    for reference in (vectors("other", torch.zeros(4, *shape, dtype=torch.float64)), Reference(None)):
        with pytest.raises(CdistillError, match="needs data that are vectors of 2 to 1,024 values"):
            metric.check(reference)


def test_the_frechet_distance_of_vectors_needs_two_samples():
    with pytest.raises(CdistillError, match="got 1 samples"):
        METRICS.get("frechet-vectors")(Pixels())(
            SampleSet(torch.zeros(1, 2, dtype=torch.float64)), vectors("some", torch.eye(2).double())
        )


@pytest.mark.parametrize(("name", "size"), [("frechet-vectors", 2), ("wasserstein", 1), ("teacher-mse", 2)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_student_that_has_diverged_has_no_figure_and_stops_nothing(name, size, value):
    samples = torch.zeros(4, size, dtype=torch.float64)
    samples[2] = value
    reference = vectors("some", torch.eye(3, size).double())
    found = METRICS.get(name)(Pixels())(SampleSet(samples, samples.square().mean(1)), reference)
    assert not math.isfinite(found.value)
    assert not math.isfinite(found.error)


def test_without_weights_each_metric_of_features_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    network, reference = (
        load_features("legacy_tensorflow"),
        Reference(Source("large", torch.zeros(4, 3, 32, 32, dtype=torch.uint8))),
    )
    for name in OF_FEATURES:
        with pytest.raises(MissingAssetError) as caught:
            METRICS.get(name)(network).check(reference)
        assert f"put it at {tmp_path / INCEPTION.name}" in str(caught.value)
        assert INCEPTION.address in str(caught.value)
    for name in ("frechet-pixels", "teacher-mse"):
        METRICS.get(name)(network).check(reference)


@pytest.mark.parametrize("name", ["frechet-pixels", *OF_FEATURES])
def test_metrics_of_images_refuse_vectors(name):
    with pytest.raises(CdistillError, match="needs images"):
        METRICS.get(name)(Pixels()).check(Reference(load_source("mixture-1d")))


def test_wasserstein_refuses_images():
    with pytest.raises(CdistillError, match="one-dimensional"):
        METRICS.get("wasserstein")(Pixels()).check(Reference(load_source("digits")))


def test_large_images_are_too_much_for_pixels():
    with pytest.raises(CdistillError, match="12,288 values; at most 4,096"):
        METRICS.get("frechet-pixels")(Pixels()).check(
            Reference(Source("large", torch.zeros(4, 3, 64, 64, dtype=torch.uint8)))
        )


@pytest.mark.parametrize(("features", "kinds"), [("pixels", 0), ("legacy_tensorflow", 4)])
def test_metrics_apply_by_the_kind_of_data(features, kinds):
    network = load_features(features)
    large = Source("large", torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    sources = load_source("digits"), load_source("mixture-1d"), large, load_source("mixture-narrow-cond")
    applied = [{name for name in METRICS.names() if METRICS.get(name)(network).applies(data)} for data in sources]
    assert applied[0] == {"frechet-pixels", "teacher-mse"}
    assert applied[1] == {"wasserstein", "teacher-mse"}
    assert applied[2] == {"teacher-mse", *["fid", "kid", "precision", "recall"][:kinds]}
    assert applied[3] == {"frechet-vectors", "teacher-mse"}


def test_titles_name_the_network_and_say_what_is_better():
    titles = {name: METRICS.get("fid")(load_features(name)).title for name in ("legacy_tensorflow", "pixels")}
    assert titles == {"legacy_tensorflow": "FID", "pixels": "Frechet (pixels)"}
    assert METRICS.get("frechet-pixels")(load_features("legacy_tensorflow")).title == "Frechet (pixels)"
    higher = {name for name in METRICS.names() if METRICS.get(name).better == "higher"}
    assert higher == {"precision", "recall"}


def test_too_few_samples_for_neighbours():
    reference, few = Reference(load_source("digits")), SampleSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(CdistillError, match="4 points; the 3 nearest neighbours need at least 5"):
        METRICS.get("recall")(Pixels())(few, reference)


def test_features_that_are_not_finite_are_refused():
    class Broken(Pixels):
        name = "broken"

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return super().__call__(images) / 0

    with pytest.raises(CdistillError, match="'broken': not finite on the samples"):
        METRICS.get("fid")(Broken())(SampleSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8)), None)


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """6,000 points have 36 million pairs: 288 MB in float64. Here they take blocks, and the images 37 MB."""
    arguments = ["-m", "tests.benchmarks.evaluation_memory", "6000", "64", "fid,kid,precision,recall"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
        timeout=200, check=True,
    )  # fmt: skip
    peaks = json.loads(done.stdout)["peak_mib"]
    assert max(peaks.values()) < 230
    assert peaks["fid"] > 36


def test_the_metric_in_the_readme_is_one():
    text = (ROOT / "cdistill/evaluation/README.md").read_text()
    names: dict[str, type] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    METRICS.add("brightness", names["Brightness"])
    try:
        metric, digits = METRICS.get("brightness")(Pixels()), load_source("digits")
        found = metric(SampleSet(digits.samples), Reference(digits))
    finally:
        METRICS.remove("brightness")
    assert (metric.applies(digits), metric.better) == (True, "higher")
    assert found.value == pytest.approx(float(digits.samples.double().mean()), rel=1e-12)
