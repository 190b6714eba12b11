"""Which metrics are measured, and how samples are."""

import pytest
import torch
from accelerate import Accelerator

from cdistill.data import Source, load_source
from cdistill.data.source import to_uint8
from cdistill.errors import CdistillError, MissingAssetError, RecipeError
from cdistill.evaluation.evaluator import Evaluator, choose_metrics
from cdistill.evaluation.features import load_features
from cdistill.evaluation.references import Reference
from cdistill.evaluation.settings import EvaluationSection
from cdistill.preconditionings import make_preconditioning
from cdistill.sampling.drawing import generate
from cdistill.sampling.samplers import make_sampler
from cdistill.teachers import load_teacher

TEN = (0.1,) * 10  # classes, drawn alike

LARGE = Source("large", torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
INCEPTION = load_features("legacy_tensorflow")


@pytest.mark.parametrize("name", ["frechet-pixels", "fid"])
def test_metrics_of_images_refuse_vectors(name):
    with pytest.raises(CdistillError, match="needs images"):
        choose_metrics([name], Reference(load_source("mixture-1d")), INCEPTION)


def test_metrics_apply_by_the_kind_of_data():
    for data, names in (("digits", {"frechet-pixels", "teacher-mse"}), ("mixture-1d", {"teacher-mse", "wasserstein"})):
        assert set(choose_metrics([], Reference(load_source(data)), INCEPTION)) == names


def test_fid_without_weights_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    with pytest.raises(MissingAssetError) as caught:
        choose_metrics(["fid"], Reference(LARGE), INCEPTION)
    assert str(tmp_path / "inception-2015-12-05.pt") in str(caught.value)
    assert "https://" in str(caught.value)


def test_metrics_that_cannot_be_computed_leave_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    found = choose_metrics(["fid", "kid", "teacher-mse"], Reference(LARGE), INCEPTION)
    assert list(found) == ["teacher-mse"]
    said = capsys.readouterr().err
    assert [name for name in ("fid", "kid", "teacher-mse") if f"{name}: left out: inception-2015-12-05.pt" in said] == [
        "fid",
        "kid",
    ]


def make_evaluator(teacher, seeds, metrics=("frechet-pixels", "teacher-mse"), alone=False):
    section = EvaluationSection(first_seed=seeds.start, samples=len(seeds), metrics=list(metrics))
    classes, source = teacher.denoiser.known_classes, load_source("digits")
    return Evaluator(section, teacher.shape, classes, None if alone else teacher, source, Accelerator(cpu=True))


@pytest.fixture
def assets(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    return tmp_path


def test_the_evaluator_ranks_more_calls_above_fewer(assets):
    teacher = load_teacher("digits")
    evaluator = make_evaluator(teacher, range(128))
    samplers = {k: make_sampler(teacher.denoiser, make_preconditioning("ctm"), nfe=k) for k in (1, 4, 16)}
    rows = [evaluator.measure("untrained", k, evaluator.draw(sampler, "")) for k, sampler in samplers.items()]
    errors = [row.estimates["teacher-mse"].value for row in rows]
    assert errors == sorted(errors, reverse=True)
    own = evaluator.measure_teacher()
    assert (own.nfe, own.estimates["teacher-mse"].value) == (34, 0)
    assert own.estimates["frechet-pixels"].value < rows[0].estimates["frechet-pixels"].value / 3


def test_the_distance_to_the_teacher_is_that_of_each_seed(assets):
    """From the same noise and with the same classes, whatever the first seed is."""
    teacher, count = load_teacher("digits"), 20
    evaluator = make_evaluator(teacher, range(60, 60 + count))  # across chunks
    sampler = make_sampler(teacher.denoiser, make_preconditioning("ctm"), nfe=2)
    found = evaluator.draw(sampler, "")
    x, _ = generate(sampler, teacher.shape, evaluator.seeds, TEN)
    ends, _ = generate(make_sampler(teacher.denoiser, None), teacher.shape, evaluator.seeds, TEN)
    expected = (x - ends.float()).square().flatten(1).mean(1)
    torch.testing.assert_close(found.errors, expected, rtol=1e-12, atol=0)
    assert torch.equal(found.samples, to_uint8(x))


def test_without_a_teacher_the_rest_is_measured():
    teacher = load_teacher("digits")
    evaluator = make_evaluator(teacher, range(64), (), alone=True)
    assert list(evaluator.metrics) == ["frechet-pixels"]
    sampler = make_sampler(teacher.denoiser, make_preconditioning("ctm"), nfe=1)
    assert evaluator.draw(sampler, "").errors is None
    with pytest.raises(RecipeError, match="there is no teacher"):
        make_evaluator(teacher, range(64), ["teacher-mse"], alone=True)
