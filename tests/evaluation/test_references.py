"""References: real data seen by a network once, statistics in files, the command that writes them."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch

from cdistill.cli.app import run
from cdistill.data import Source, load_source
from cdistill.errors import CdistillError, CorruptFileError, MismatchError, MissingAssetError, RecipeError
from cdistill.evaluation import references
from cdistill.evaluation.features import Pixels
from cdistill.evaluation.frechet import moments
from cdistill.evaluation.metrics import SampleSet
from cdistill.evaluation.references import (
    Reference,
    Statistics,
    find_statistics,
    kept_indices,
    measure,
    read_statistics,
    write_statistics,
)
from cdistill.registry import METRICS
from cdistill.storage import assets
from cdistill.storage.assets import Asset
from cdistill.storage.files import file_digest

DIGITS = load_source("digits")
STATS = ["reference-stats", "--data", "digits", "--features", "pixels", "--out", "r.npz"]


class Counting(Pixels):
    """Pixels that count how often they are asked."""

    name = "counting"
    digest = "c" * 64

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return super().__call__(images)


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_the_data_are_seen_once(monkeypatch):
    monkeypatch.setattr(references, "_READ", 256)
    network, reference = Counting(), Reference(DIGITS, keep=100)
    mean, covariance = reference.moments(network)
    expected = moments(Pixels()(DIGITS.samples))
    torch.testing.assert_close(mean, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, expected[1], rtol=1e-10, atol=1e-12)
    kept = reference.features(network)
    assert torch.equal(kept, Pixels()(DIGITS.samples[kept_indices(len(DIGITS), 100)]))
    assert network.images == len(DIGITS)


def test_which_data_are_kept_depends_on_their_number_alone():
    assert kept_indices(5, 10_000).tolist() == [0, 1, 2, 3, 4]
    assert kept_indices(1000, 5).tolist() == [75, 143, 172, 722, 742]
    assert len(kept_indices(1797, 100).unique()) == 100


def test_what_was_written_is_read(tmp_path):
    found = measure(DIGITS, Pixels(), 50)
    facts = {"features": {"name": "pixels", "sha256": ""}, "data": {"count": 1797}}
    write_statistics(tmp_path / "r.npz", Statistics(found.mean, found.covariance, found.features, facts))
    read = read_statistics(tmp_path / "r.npz")
    assert (read.facts, read.features.dtype) == (facts, torch.float32)
    for name in ("mean", "covariance", "features"):
        assert torch.equal(getattr(read, name), getattr(found, name))
    with np.load(tmp_path / "r.npz", allow_pickle=False) as plain:  # as EDM's fid.py reads it
        assert (plain["mu"].dtype, plain["sigma"].shape) == (np.float64, (64, 64))


def test_a_file_stands_for_the_data_and_they_for_what_it_does_not_hold(tmp_path, capsys):
    network, mean = Counting(), torch.zeros(64, dtype=torch.float64)
    path = tmp_path / "made.npz"
    made_by = {"features": {"name": "counting", "sha256": network.digest}}
    write_statistics(path, Statistics(mean, torch.eye(64, dtype=torch.float64), None, made_by))
    reference = Reference(DIGITS, path)
    reference.check(network, features=True)
    assert torch.equal(reference.moments(network)[0], mean)
    assert network.images == 0
    assert len(reference.features(network)) == len(DIGITS)
    assert capsys.readouterr().err.count("holds no features of 'counting': the data serve") == 1
    assert not torch.equal(reference.moments(Pixels())[0], mean)  # pixels beside the network: from the data
    assert reference.digest() == file_digest(path)
    assert Reference(DIGITS).digest() == DIGITS.digest


def test_a_file_alone_is_enough_for_what_it_holds(tmp_path):
    found = measure(DIGITS, Pixels(), 300)
    facts = {"features": {"name": "pixels", "sha256": ""}}
    write_statistics(tmp_path / "r.npz", Statistics(found.mean, found.covariance, found.features, facts))
    samples, whole = SampleSet(DIGITS.samples[:200]), Reference(DIGITS, keep=300)
    alone = Reference(None, tmp_path / "r.npz")
    for name in ("fid", "kid", "precision", "recall"):
        metric, other = (METRICS.get(name)(Pixels()) for _ in range(2))
        metric.check(alone)
        assert metric(samples, alone).value == pytest.approx(other(samples, whole).value, rel=1e-12)
    write_statistics(tmp_path / "s.npz", Statistics(found.mean, found.covariance, None, facts))
    METRICS.get("fid")(Pixels()).check(Reference(None, tmp_path / "s.npz"))
    with pytest.raises(CdistillError, match=r"no features .* for 'pixels', and no data"):
        METRICS.get("kid")(Pixels()).check(Reference(None, tmp_path / "s.npz"))


def test_a_file_of_another_network_is_refused(tmp_path):
    path = tmp_path / "r.npz"
    facts = {"features": {"name": "counting", "sha256": "d" * 64}}
    write_statistics(path, Statistics(torch.zeros(64).double(), torch.eye(64).double(), None, facts))
    with pytest.raises(MismatchError, match=r"made by features 'counting' \(sha256 dddd"):
        Reference(DIGITS, path).check(Counting())


def test_edms_files_hold_moments_alone_and_say_nothing(tmp_path, capsys):
    path = saved(tmp_path / "cifar10-32x32.npz", mu=np.zeros(64), sigma=np.eye(64))
    reference = Reference(DIGITS, path)
    assert torch.equal(reference.moments(Counting())[1], torch.eye(64, dtype=torch.float64))
    assert "does not say which features" in capsys.readouterr().err


def test_other_dimensions_are_refused(tmp_path):
    reference = Reference(DIGITS, saved(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.eye(3)))
    with pytest.raises(MismatchError, match="3 dimensions, the samples' features have 64"):
        METRICS.get("fid")(Counting())(SampleSet(DIGITS.samples[:70]), reference)


def test_edm_names_what_edm_published(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    with pytest.raises(MissingAssetError) as caught:
        find_statistics("edm", "cifar10")
    assert "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz" in str(caught.value)
    assert str(tmp_path / "fid-refs" / "cifar10-32x32.npz") in str(caught.value)
    with pytest.raises(RecipeError, match="no statistics of 'digits'; known: afhqv2-64, cifar10, ffhq64, imagenet64"):
        find_statistics("edm", "digits")
    mine = tmp_path / "mine.npz"
    with pytest.raises(MissingAssetError, match="no such file; cdistill reference-stats makes one"):
        find_statistics(str(mine), "digits")
    mine.touch()
    assert find_statistics(str(mine), "digits") == mine


def test_edms_own_files_are_of_one_network(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    monkeypatch.setattr(assets, "LEAST", 1)
    monkeypatch.setattr("cdistill.evaluation.references.EDM_STATISTICS", {"digits": Asset("e.npz", "https://x")})
    saved(tmp_path / "e.npz", mu=np.zeros(64), sigma=np.eye(64))
    path = find_statistics("edm", "digits")
    with pytest.raises(MismatchError, match="made by features 'legacy_tensorflow'"):
        Reference(DIGITS, path).check(Counting())


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(3)}, "arrays mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"shapes \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, "needs"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "finite"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "negative variance"),
        ({"mu": np.zeros(3, np.int64), "sigma": np.eye(3)}, "int64; needs"),
        ({"mu": np.array([print, 1, 2], dtype=object), "sigma": np.eye(3)}, "Python objects, which is never read"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((2, 4))}, "features of shape"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "provenance": np.array("[1]")}, "no JSON object"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "provenance": np.array("{")}, "not a valid"),
    ],
)
def test_files_that_hold_no_moments(arrays, words, tmp_path):
    with pytest.raises(CorruptFileError, match=words):
        read_statistics(saved(tmp_path / "x.npz", **arrays))


def test_files_that_are_damaged(tmp_path):
    path = saved(tmp_path / "x.npz", mu=np.arange(300.0), sigma=np.eye(300))
    whole = path.read_bytes()
    for content in (whole[:500], b"hello", whole[:900] + b"\1" + whole[901:]):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match="not a valid"):
            read_statistics(path)
    with pytest.raises(MissingAssetError, match="no such file"):
        read_statistics(tmp_path / "y.npz")


def test_a_header_that_promises_too_much(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue())
        archive.writestr("sigma.npy", header.getvalue())
    with pytest.raises(CorruptFileError, match="at most"):
        read_statistics(tmp_path / "x.npz")


def test_a_pickle_is_refused_by_name(tmp_path):
    (tmp_path / "img512.pkl").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(CorruptFileError, match=r"a pickle \(EDM2's format\), which is never opened"):
        read_statistics(tmp_path / "img512.pkl")


def test_features_that_are_not_finite_are_refused():
    class Broken(Pixels):
        name = "broken"

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return super().__call__(images).log()

    with pytest.raises(CdistillError, match="'broken': not finite on data 'digits'"):
        measure(DIGITS, Broken())
    with pytest.raises(CdistillError, match="need at least 2"):
        measure(Source("one", DIGITS.samples[:1]), Pixels())


def test_the_command_writes_what_evaluation_computes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([*STATS, "--keep", "40", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["data"] == {"name": "digits", "split": "train", "count": 1797, "sha256": DIGITS.digest}
    assert record["features"] == {"name": "pixels", "sha256": "", "dimensions": 64, "kept": 40}
    assert record["sha256"] == file_digest(tmp_path / "r.npz")
    found = read_statistics(tmp_path / "r.npz")
    assert torch.equal(found.covariance, Reference(DIGITS).moments(Pixels())[1])
    assert len(found.features) == 40
    assert found.facts["features"] == record["features"]
    first = (tmp_path / "r.npz").read_bytes()
    assert run([*STATS, "--keep", "40"]) == 0
    assert (tmp_path / "r.npz").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data", "digits"], 3, "inception-2015-12-05.pt"),
        (["--data", "mixture-1d", "--features", "pixels"], 2, "needs images"),
        (["--data", "digits", "--features", "pixel"], 2, "did you mean 'pixels'"),
        (["--data", "digits", "--features", "pixels", "--out", "x.pkl"], 2, "ends in .npz"),
    ],
)
def test_the_command_refuses(arguments, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    assert run(["reference-stats", *arguments]) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.slow
def test_three_processes_find_what_one_does(run_cli, tmp_path):
    for count in (1, 3):
        command = ["reference-stats", "--data", "patches", "--features", "pixels", "--keep", "500"]
        done = run_cli(*command, "--out", f"{count}.npz", "--nproc", str(count))
        assert done.returncode == 0, done.stderr
    one, three = (read_statistics(tmp_path / f"{count}.npz") for count in (1, 3))
    assert torch.equal(one.features, three.features)
    torch.testing.assert_close(one.mean, three.mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(one.covariance, three.covariance, rtol=1e-12, atol=1e-14)
