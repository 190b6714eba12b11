"""CIFAR-10's own archives in every edition, and that damaged or hostile ones are refused."""

import gzip
import io
import tarfile
from functools import partial

import numpy as np
import pytest
import torch

from cdistill.data import load_source
from cdistill.errors import CdistillError, CorruptFileError
from tests.archives import (
    cifar_binary,
    cifar_python,
    python2_batch,
    python3_batch,
    python3_pickle,
    write_folder,
    write_tar,
)

EDITIONS = {
    "binary": cifar_binary,
    "python 2": partial(cifar_python, batch=python2_batch),
    "python 3": partial(cifar_python, batch=python3_batch),
}


@pytest.mark.parametrize("form", ["archive", "folder", "parent"])
@pytest.mark.parametrize("edition", list(EDITIONS))
def test_cifars_own_editions(tmp_path, cifar, edition, form):
    images, labels = cifar
    content = EDITIONS[edition](images, labels, 8)
    path = write_tar(tmp_path / "c.tar.gz", content) if form == "archive" else write_folder(tmp_path / "c", content)
    path = path / next(iter(content)).split("/")[0] if form == "folder" else path
    train, heldout = load_source(str(path)), load_source(str(path), "heldout")
    assert train.samples.equal(torch.from_numpy(images[:25]))
    assert heldout.samples.equal(torch.from_numpy(images[25:]))
    assert (train.labels.tolist(), heldout.labels.tolist()) == (labels[:25].tolist(), labels[25:].tolist())
    assert (train.num_classes, heldout.num_classes) == (10, 10)
    with pytest.raises(CdistillError, match="only 'train' and 'heldout'"):
        load_source(str(path), "test")


def test_damaged_cifar_archives_are_refused(tmp_path, cifar):
    content = cifar_binary(*cifar, 8)
    first = "cifar-10-batches-bin/data_batch_1.bin"
    whole = write_tar(tmp_path / "whole.tar.gz", content).read_bytes()
    cases = {
        "no multiple of 3,073": {**content, first: content[first][:-1]},
        "label 10": {**content, first: b"\x0a" + content[first][1:]},
        "no data_batch_3.bin": {k: v for k, v in content.items() if "batch_3" not in k},
        "needs CIFAR-10's": {"readme.txt": b"hello"},
    }
    for words, files in cases.items():
        with pytest.raises(CorruptFileError, match=words) as caught:
            load_source(str(write_tar(tmp_path / "bad.tar.gz", files)))
        assert "bad.tar.gz" in str(caught.value)
    for damaged in (whole[: len(whole) // 2], b"hello", b"", whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:]):
        (tmp_path / "bad.tar.gz").write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"bad\.tar\.gz"):
            load_source(str(tmp_path / "bad.tar.gz"))


def test_hostile_and_damaged_pickles_are_refused(tmp_path, cifar):
    images, labels = cifar
    sound = cifar_python(images, labels, 8, python2_batch)
    first = "cifar-10-batches-py/data_batch_1"
    cases = {
        "asks for .os.system., which no": b"cos\nsystem\n(S'touch evil'\ntR.",
        "has no 'data'": b"}.",
        "3 images|labels": python3_batch(images[:3], labels[:2]),
        "uint8": python3_batch(images[:3].astype(np.int16), labels[:3]),
        "label 1[0-2];": python3_batch(images[:3], labels[:3] + 10),
        "truncated": sound[first][:-50],
    }
    for words, content in cases.items():
        with pytest.raises(CorruptFileError, match=words) as caught:
            load_source(str(write_tar(tmp_path / "bad.tar.gz", {**sound, first: content})))
        assert "bad.tar.gz: data_batch_1: " in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar.gz"]


def nested(depth: int) -> list[object]:
    """2**depth zeros in lists that are shared."""
    found: list[object] = [0, 0]
    for _ in range(depth - 1):
        found = [found, found]
    return found


def endless() -> list[object]:
    found: list[object] = []
    found.extend([found, found])
    return found


BAD_BATCHES = {
    "label a list;": {"labels": nested(40)},
    "label a list; ": {"labels": endless()},
    "no list of 2 numbers": {"labels": [1]},
    "no list of 2 numbers, one": {"labels": "ab"},
    "no list of 2 numbers,": {"labels": {1: 2, 3: 4}},
    "label True;": {"labels": [1, True]},
    "label a int;": {"labels": [1, 2**70]},
    "uint8 images ();": {"data": np.array(5, np.uint8)},
    "uint8 images (2, 3071);": {"data": np.zeros((2, 3071), np.uint8)},
    "uint8 images (0, 3072);": {"data": np.zeros((0, 3072), np.uint8), "labels": []},
}


@pytest.mark.parametrize("words", list(BAD_BATCHES))
def test_batches_with_other_arrays_and_labels_are_refused(tmp_path, words):
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], **BAD_BATCHES[words]}
    files = {f"data_batch_{k}": python3_pickle(batch) for k in range(1, 6)}
    with pytest.raises(CorruptFileError) as caught:
        load_source(str(write_tar(tmp_path / "x.tar", files)))
    assert words in str(caught.value)
    assert "data_batch_1: " in str(caught.value)


def tar_header(kind: bytes, size: int, name: str = "x") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


BATCH = tar_header(b"0", 3073, "data_batch_1.bin") + bytes(3584)
BAD_TARS = {
    "an entry of kind 'L'": tar_header(b"L", 1) + b"a" + bytes(511),
    "an entry of kind 'K'": tar_header(b"K", 1) + b"a" + bytes(511),
    "an entry of kind 'S'": tar_header(b"S", 512, "data_batch_1.bin") + bytes(512),
    "an entry of kind '2'": tar_header(b"2", 0, "data_batch_1.bin"),
    "an entry of kind 'x', 1,073,741,824 bytes": tar_header(b"x", 1 << 30),
    "data_batch_1.bin has 1,073,741,824 bytes": tar_header(b"0", 1 << 30, "data_batch_1.bin"),
    "data_batch_1.bin is in it twice": 2 * BATCH,
    "data_batch_1 is in it twice": BATCH + tar_header(b"0", 0, "a/data_batch_1"),
    "unexpected end of data": tar_header(b"0", 8**11),
    "bad checksum": BATCH[:3] + b"_" + BATCH[4:],
    "more than 1,000 entries": 1001 * tar_header(b"5", 0),
    "unexpected end": tar_header(b"0", 1 << 30),
}


@pytest.mark.parametrize("words", list(BAD_TARS))
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_archives_of_another_kind_are_refused(tmp_path, words, suffix):
    content = BAD_TARS[words] + (b"" if "end" in words else bytes(1024))
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".tar.gz" else content)
    with pytest.raises(CorruptFileError) as caught:
        load_source(str(path))
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: not a valid tar archive (")


def test_what_comes_out_of_a_tar_archive_is_bounded(tmp_path, monkeypatch, cifar):
    """Also after its end, where nothing but zeros should be, and where gzip's checksum is."""
    monkeypatch.setattr("cdistill.data.cifar._MOST_TOTAL", 2**18)
    path = write_tar(tmp_path / "x.tar.gz", cifar_binary(*cifar, 8))
    assert len(load_source(str(path))) == 25
    whole = gzip.decompress(path.read_bytes())
    for content in (whole + bytes(2**18), tar_header(b"0", 2**20) + bytes(2**20 + 1024)):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(CorruptFileError, match="more than 262,144 bytes, no CIFAR-10"):
            load_source(str(path))
    damaged = bytearray(gzip.compress(whole))
    damaged[-8] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptFileError, match="CRC"):
        load_source(str(path))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_writer_of_tar_archives_is_read(tmp_path, cifar, form):
    """Times with fractions make pax headers; folders are entries of their own."""
    content = cifar_binary(*cifar, 8)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", format=form) as archive:
        folder = tarfile.TarInfo("cifar-10-batches-bin")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1234567890.5
            archive.addfile(member, io.BytesIO(data))
    assert load_source(str(tmp_path / "x.tar.gz")).samples.equal(torch.from_numpy(cifar[0][:25]))
