"""Which metrics are measured, and the judge."""

import math

import pytest
import torch

from cdistill.data import Source, load_source
from cdistill.errors import CdistillError, MissingAssetError
from cdistill.evaluation.features import load_features
from cdistill.evaluation.judge import Judge
from cdistill.evaluation.references import Reference
from cdistill.evaluation.results import choose_metrics
from cdistill.preconditionings import make_preconditioning
from cdistill.teachers import load_teacher

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


@pytest.mark.slow
