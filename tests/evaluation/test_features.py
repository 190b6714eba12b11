"""Feature networks: Inception from a local file, a user's own network."""

import hashlib
import warnings
from pathlib import Path

import pytest
import torch

from cdistill.errors import CdistillError, CorruptFileError, MissingAssetError, UnknownNameError
from cdistill.evaluation.features import Pixels, load_features
from cdistill.registry import FEATURES, METRICS
from cdistill.runtime.randomness import generator
from cdistill.storage import assets
from cdistill.storage.assets import Asset
from cdistill.storage.files import file_digest

IMAGES = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "i"))


class Whole(torch.nn.Module):
    """Stands in for the scripted network, which has features only where it is asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Identity()  # clean-fid looks for it

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        flat = x.flatten(1)
        return torch.cat([flat, flat], 1)[:, :2048] / 255 if return_features else flat[:, :10].softmax(1)


class Half(torch.nn.Module):
    """A user's network."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((5, 3), 0.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3)) @ self.weight.T


HALF = Half()


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    """A user's function."""
    assert images.dtype == torch.uint8
    assert images.shape[1] == 3
    return images.float().mean((2, 3))


def no_vectors(images: torch.Tensor) -> torch.Tensor:
    """A user's mistake."""
    return images.float()


def save(module: torch.nn.Module, path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(path)


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A small TorchScript network in Inception's place."""
    path = tmp_path / "inception-2015-12-05.pt"
    save(Whole(), path)
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    monkeypatch.setattr(assets, "INCEPTION", Asset(path.name, "https://x", file_digest(path)))
    return path


def test_pixels_are_scaled():
    assert Pixels()(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist() == [[-1.0, 1.0]]


def test_legacy_tensorflow_resizes_nothing_itself(scripted):
    network = load_features("legacy_tensorflow")
    expected = IMAGES.float().flatten(1)[:, :2048] / 255
    torch.testing.assert_close(network(IMAGES).cpu(), expected, rtol=0, atol=0)
    assert network.digest == file_digest(scripted)
    grey = network(IMAGES[:, :1]).cpu()
    torch.testing.assert_close(grey, IMAGES[:, :1].expand(-1, 3, -1, -1).flatten(1)[:, :2048] / 255)


def test_an_altered_network_is_refused(scripted):
    scripted.write_bytes(scripted.read_bytes() + b"x")
    with pytest.raises(CorruptFileError, match="sha256 is"):
        load_features("legacy_tensorflow").check((3, 32, 32))


def test_a_torchscript_file_is_a_feature_network(tmp_path):
    path = tmp_path / "mine.pt"
    save(Half(), path)
    network = load_features(str(path))
    network.check((1, 8, 8))
    torch.testing.assert_close(network(IMAGES).cpu(), HALF(IMAGES).detach())
    assert (network.name, network.digest) == (str(path), file_digest(path))
    assert METRICS.get("fid")(network).title == f"Frechet ({path})"


def test_a_file_that_is_no_torchscript(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"hello")
    network = load_features(str(tmp_path / "x.pt"))
    with pytest.raises(CdistillError, match="does not load as TorchScript"):
        network(IMAGES)
    with pytest.raises(MissingAssetError, match="no such file"):
        load_features(str(tmp_path / "y.pt")).check((3, 32, 32))


def test_a_callable_is_a_feature_network():
    network = load_features("tests.evaluation.test_features:mean_colours")
    assert torch.equal(network(IMAGES[:, :1]), IMAGES[:, :1].float().mean((2, 3)).expand(-1, 3))
    assert network.digest == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def test_the_digest_of_a_module_covers_its_weights(monkeypatch):
    first = load_features("tests.evaluation.test_features:HALF").digest
    with torch.no_grad():
        monkeypatch.setattr(HALF, "weight", torch.nn.Parameter(HALF.weight + 1))
    assert load_features("tests.evaluation.test_features:HALF").digest != first


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("pixel", UnknownNameError, "did you mean 'pixels'"),
        ("tests.nowhere:f", CdistillError, "does not import"),
        ("tests.evaluation.test_features:nothing", CdistillError, "does not import"),
        ("tests.evaluation.test_features:IMAGES", CdistillError, "not a function"),
    ],
)
def test_networks_that_are_none(name, error, words):
    with pytest.raises(error, match=words):
        load_features(name)


def test_what_is_no_vector_is_refused():
    with pytest.raises(CdistillError, match=r"got \(8, 3, 32, 32\) for 8 images; needs a tensor \(8, d\)"):
        load_features("tests.evaluation.test_features:no_vectors")(IMAGES)


@pytest.mark.parametrize("name", FEATURES.names())
def test_every_network_refuses_vectors_and_loads_nothing_before_it_is_used(name):
    with pytest.raises(CdistillError, match="needs"):
        load_features(name).check((5,))


def test_a_network_from_another_package(monkeypatch):
    class Mine(Pixels):
        name = "mine"

    FEATURES.add("mine", Mine)
    try:
        assert isinstance(load_features("mine"), Mine)
    finally:
        FEATURES.remove("mine")


@pytest.mark.parametrize(("registry", "name"), [(FEATURES, "clean"), (METRICS, "density")])
def test_names_of_version_0_1_are_refused_as_such(registry, name):
    with pytest.raises(UnknownNameError, match=f"{name}': was removed in cdistill 0.2; choose from"):
        registry.check(name)
    registry.add(name, object)  # another package may use the name
    try:
        assert registry.check(name) == name
    finally:
        registry.remove(name)
