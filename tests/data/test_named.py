"""The data sets that go by a name."""

import pytest
import torch

from cdistill.data import load_source
from cdistill.errors import CdistillError, MismatchError, MissingAssetError
from tests.archives import cifar_binary, members, random_images, write_tar, write_zip


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
