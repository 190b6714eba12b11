"""The data sets that go by a name, and the contract that every loader keeps."""

import re
from pathlib import Path

import pytest
import torch

from cdistill.data import load_source
from cdistill.errors import CdistillError, MismatchError, MissingAssetError
from cdistill.registry import SOURCES
from tests.archives import cifar_binary, members, random_images, write_tar, write_zip

README = Path(__file__).parents[2] / "cdistill" / "data" / "README.md"


@pytest.fixture
def stripes():
    """The example of the README, registered."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    SOURCES.add("stripes", names["load_stripes"])
    yield
    SOURCES.remove("stripes")


@pytest.mark.parametrize("name", ["stripes", "digits", "patches", "mixture-1d", "mixture-broad", "mixture-narrow-cond"])
def test_loaders_keep_their_contract(stripes, name):
    """The same samples twice, of the right types, with a class each or with none; a missing split is refused."""
    source, again = load_source(name), load_source(name)
    assert source.digest == again.digest
    assert source.samples.dtype == (torch.uint8 if len(source.shape) == 3 else torch.float64)
    x, labels = source.batch(torch.arange(2))
    assert x.shape == (2, *source.shape)
    if source.labels is None:
        assert (labels, source.num_classes) == (None, 0)
    else:
        assert labels.dtype == torch.int64
        assert source.labels.shape == (len(source),)
        assert 0 <= int(source.labels.min()) <= int(source.labels.max()) < source.num_classes
    if len(source.shape) == 3:
        assert x.dtype == torch.float32
        assert -1 <= float(x.min()) < float(x.max()) <= 1
    if name in ("stripes", "digits"):
        with pytest.raises(CdistillError, match=f"data '{name}': has no split 'heldout'; only 'train'"):
            load_source(name, "heldout")
    else:
        assert load_source(name, "heldout").digest != source.digest


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    source = load_source("digits")
    assert len(source) == 1797
    torch.testing.assert_close(
        (source.samples.double() * 16 / 255).flatten(1), torch.from_numpy(pixels), atol=0.04, rtol=0
    )
    assert source.labels.tolist() == labels.tolist()


def test_patches_are_held_out_by_pixels():
    """No held-out patch occurs in the training part: every patch lies inside stripes of its own."""
    import numpy as np

    from cdistill.data.named import SIDE, _corners

    draw = np.random.RandomState(0)
    columns = {
        split: {c for _, left in _corners((213, 320), split, 4000, draw) for c in range(left, left + SIDE)}
        for split in ("train", "heldout")
    }
    assert columns["train"].isdisjoint(columns["heldout"])
    assert columns["train"] | columns["heldout"] == set(range(320))
    assert (len(load_source("patches")), len(load_source("patches", "heldout"))) == (16384, 4096)


@pytest.mark.parametrize(
    ("name", "file", "side", "classes"),
    [
        ("cifar10", "cifar10-32x32.zip", 32, 10),
        ("ffhq64", "ffhq-64x64.zip", 64, 0),
        ("afhqv2-64", "afhqv2-64x64.zip", 64, 0),
        ("imagenet64", "imagenet-64x64.zip", 64, 1000),
    ],
)
def test_registered_data_sets(tmp_path, monkeypatch, name, file, side, classes):
    monkeypatch.setenv("CDISTILL_DATA", str(tmp_path))
    with pytest.raises(MissingAssetError) as caught:
        load_source(name)
    assert all(word in str(caught.value) for word in (file, str(tmp_path), "https://"))
    labels = [0, classes - 1] if classes else [0, 1]  # FFHQ and AFHQv2 are used without
    write_zip(tmp_path / file, members(random_images(2, side), labels))
    source = load_source(name)
    assert (source.name, source.shape, source.num_classes, source.flips) == (name, (3, side, side), classes, True)
    assert (source.labels is None) == (classes == 0)
    with pytest.raises(CdistillError):
        load_source(name, "heldout")
    write_zip(tmp_path / file, members(random_images(2, side // 2), labels))
    with pytest.raises(MismatchError, match=file):
        load_source(name)


def test_cifar10_takes_its_own_archive(tmp_path, monkeypatch, cifar):
    monkeypatch.setenv("CDISTILL_DATA", str(tmp_path))
    write_tar(tmp_path / "cifar-10-binary.tar.gz", cifar_binary(*cifar, 8))
    assert (len(load_source("cifar10")), len(load_source("cifar10", "heldout"))) == (25, 8)
