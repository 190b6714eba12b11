"""Data sources in files: the same images however they are stored and read, and errors that name the file."""

import contextlib
import gzip
import io
import json
import os
import signal
import struct
import tarfile
import time
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cdistill import errors
from cdistill.cli.app import run
from cdistill.data import load_source
from cdistill.data.lazy import DecodedImages, LazySamples
from cdistill.data.memory import free_memory, memory_limit
from cdistill.errors import (
    CdistillError,
    CorruptFileError,
    MismatchError,
    MissingAssetError,
    StoppedError,
    UnknownNameError,
)
from cdistill.evaluation.features import Pixels
from cdistill.evaluation.metrics import PixelFrechet, SampleSet
from cdistill.evaluation.references import Reference
from cdistill.formats.archives import is_picture
from cdistill.formats.images import decode
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe
from cdistill.registry import is_data_path
from cdistill.settings import check_section
from cdistill.teachers import load_teacher
from cdistill.training.step_data import draw_data
from cdistill.workflows.runs import fit_source
from tests.archives import (
    LABELS,
    cifar_binary,
    cifar_python,
    encode,
    members,
    python2_batch,
    python3_batch,
    python3_pickle,
    random_images,
    write_folder,
    write_tar,
    write_zip,
)

COUNT = 24
IMAGES = random_images(COUNT)
CLASSES = [k * 7 % 10 for k in range(COUNT)]
FILES = members(IMAGES, CLASSES)
FIRST = "00000/img00000000.png"
LAZY = {"CDISTILL_DATA_MEMORY": "0"}


@pytest.fixture
def archive(tmp_path):
    return write_zip(tmp_path / "x.zip", FILES)


@pytest.fixture
def lazily(monkeypatch):
    """Loads a file's images lazily, with a number of decoding processes."""

    def load(path: Path, workers: int):
        monkeypatch.setenv("CDISTILL_DATA_MEMORY", "0")
        monkeypatch.setenv("CDISTILL_WORKERS", str(workers))
        source = load_source(str(path))
        assert isinstance(source.samples, LazySamples)
        monkeypatch.delenv("CDISTILL_DATA_MEMORY")
        return source

    return load


def changed(**files: bytes | None) -> dict[str, bytes]:
    """FILES with the first image or the labels replaced, or left out."""
    names = {"image": FIRST, "labels": LABELS}
    found = {**FILES, **{names[key]: content for key, content in files.items()}}
    return {name: content for name, content in found.items() if content is not None}


def labelled(*pairs: list[object]) -> bytes:
    return json.dumps({"labels": pairs}).encode()


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def stores(folder: Path) -> dict[str, Path]:
    """The same images and labels, stored in every way."""
    return {
        "zip": write_zip(folder / "stored.zip", FILES),
        "deflated": write_zip(folder / "deflated.zip", FILES, zipfile.ZIP_DEFLATED),
        "folder": write_folder(folder / "folder", FILES),
        "nchw": npz(folder / "nchw.npz", images=IMAGES, labels=np.array(CLASSES)),
        "nhwc": npz(folder / "nhwc.npz", arr_0=IMAGES.transpose(0, 2, 3, 1).copy(), arr_1=np.array(CLASSES, np.uint8)),
    }


# ------------------------------------------------------------------------------------------------ the same data


@pytest.mark.parametrize("kind", ["zip", "deflated", "folder", "nchw", "nhwc"])
@pytest.mark.parametrize("lazy", [False, True])
def test_every_way_of_storing_gives_the_same_images_and_labels(tmp_path, monkeypatch, kind, lazy):
    path = stores(tmp_path)[kind]
    if lazy:
        monkeypatch.setenv("CDISTILL_DATA_MEMORY", "0")
        monkeypatch.setenv("CDISTILL_WORKERS", "0")
    source = load_source(str(path))
    assert isinstance(source.samples, LazySamples) == lazy
    assert (len(source), source.shape, source.num_classes, source.flips) == (COUNT, (3, 8, 8), 10, True)
    assert source.samples[:].equal(torch.from_numpy(IMAGES))
    assert source.samples[:].is_contiguous()
    assert source.labels.tolist() == CLASSES
    assert source.name == str(path)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("kind", ["zip", "folder", "nhwc"])
def test_lazy_images_are_those_in_memory_for_any_number_of_processes(tmp_path, lazily, kind, workers):
    path = stores(tmp_path)[kind]
    held, lazy = load_source(str(path)), lazily(path, workers)
    assert lazy.digest == held.digest
    index = torch.tensor([5, 3, 3, 23, 0])
    flip = torch.tensor([True, False, True, False, True])
    for first, second in zip(held.batch(index, flip), lazy.batch(index, flip), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(held.batch(index, flip)[0][0], held.batch(index)[0][0].flip(-1))
    for step in range(5):
        for first, second in zip(*(draw_data(source, 3, step, 7, True) for source in (held, lazy)), strict=True):
            assert torch.equal(first, second)
    assert torch.equal(torch.cat(list(lazy.chunks(7))), held.samples)


def test_what_was_prefetched_and_not_used_changes_nothing(archive, lazily):
    source = lazily(archive, 2)
    source.prefetch(torch.arange(10))
    assert torch.equal(source.samples[3:9], torch.from_numpy(IMAGES[3:9]))
    source.prefetch(torch.arange(4))
    source.prefetch(torch.arange(5))
    assert torch.equal(source.samples[:5], torch.from_numpy(IMAGES[:5]))


def test_many_images_are_read_into_memory_by_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CDISTILL_WORKERS", "2")
    images = random_images(4100, 2, 1)
    source = load_source(str(write_zip(tmp_path / "many.zip", members(images, None))))
    assert source.samples.equal(torch.from_numpy(images))
    assert (source.labels, source.num_classes) == (None, 0)
    assert "reading many.zip 4100/4100" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["zip", "folder", "nchw"])
def test_the_digest_changes_with_every_image_name_and_label(tmp_path, kind):
    def digest(name: str, content: dict[str, bytes], labels: list[int], images: np.ndarray) -> str:
        if kind == "zip":
            return load_source(str(write_zip(tmp_path / f"{name}.zip", content))).digest
        if kind == "folder":
            return load_source(str(write_folder(tmp_path / name, content))).digest
        return load_source(str(npz(tmp_path / f"{name}.npz", images=images, labels=np.array(labels)))).digest

    other = IMAGES.copy()
    other[7, 1, 2, 3] ^= 1
    relabelled = [*CLASSES[:-1], 9 - CLASSES[-1]]
    found = [
        digest("same", FILES, CLASSES, IMAGES),
        digest("image", members(other, CLASSES), CLASSES, other),
        digest("label", members(IMAGES, relabelled), relabelled, IMAGES),
    ]
    assert len(set(found)) == 3
    assert found[0] == digest("again", FILES, CLASSES, IMAGES)


@pytest.mark.parametrize("kind", ["zip", "folder", "nchw"])
def test_the_digest_is_computed_once_when_it_is_asked_for(tmp_path, monkeypatch, capsys, kind):
    path = stores(tmp_path)[kind]
    monkeypatch.setattr("cdistill.data.files._FEW", 3)
    monkeypatch.setenv("CDISTILL_WORKERS", "0")
    expected = load_source(str(path)).digest
    assert ("digesting folder 24/24" in capsys.readouterr().err) == (kind == "folder")
    source = load_source(str(path))
    assert "digesting" not in capsys.readouterr().err
    assert source.digest == replace(source, name="other").digest == expected
    assert capsys.readouterr().err.count("digesting") == (kind == "folder")
    if kind == "folder":
        source = load_source(str(path))
        monkeypatch.setattr("cdistill.runtime.signals._received", [signal.SIGTERM])
        with pytest.raises(StoppedError):
            _ = source.digest


def test_pictures_are_known_by_their_names():
    path = Path("x.zip")
    for name in ("a.png", "a/b.JPG", "./a.png", "../a.png", "a.b/c.webp", "/a.bmp"):
        assert is_picture(path, name), name
    for name in (".a.png", "a/.b.png", ".c/a.png", "__MACOSX/a.png", "a/__MACOSX/b.png", ".png", "png", "a.png/b", ""):
        assert not is_picture(path, name), name


def test_grey_images_and_other_formats(tmp_path):
    grey = random_images(3, 8, 1)
    source = load_source(str(write_folder(tmp_path / "grey", members(grey, None))))
    assert source.samples.equal(torch.from_numpy(grey))
    forms = {f"{k}.{form.lower()}": encode(IMAGES[k], form) for k, form in enumerate(["PNG", "BMP"])}
    source = load_source(str(write_folder(tmp_path / "forms", {**forms, "notes.txt": b"", ".hidden.png": b""})))
    assert source.samples.equal(torch.from_numpy(IMAGES[:2]))
    jpeg = {"a.jpg": encode(IMAGES[0], "JPEG"), "b.webp": encode(IMAGES[1], "WEBP")}
    assert load_source(str(write_folder(tmp_path / "lossy", jpeg))).shape == (3, 8, 8)


def test_lossless_conversions_are_made(tmp_path):
    """A grey image among RGB ones is repeated; a palette is looked up; black and white becomes grey."""
    grey = random_images(1, 8, 1)[0]
    palette, bits = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.repeat(grey.transpose(1, 2, 0) & 192, 3, 2)).convert("P").save(palette, "PNG")
    Image.fromarray((grey[0] > 99).astype(np.uint8) * 255).convert("1").save(bits, "PNG")
    content = {"a.png": encode(IMAGES[0]), "b.png": encode(grey), "c.png": palette.getvalue(), "d.png": bits.getvalue()}
    samples = load_source(str(write_folder(tmp_path / "mixed", content))).samples.numpy()
    assert (samples[1] == grey).all()
    with Image.open(palette) as image:
        assert (samples[2] == np.asarray(image.convert("RGB")).transpose(2, 0, 1)).all()
    assert (samples[3] == (grey > 99) * 255).all()


def test_sub_folders_are_classes_unless_they_are_shards(tmp_path):
    png = encode(IMAGES[0])
    cases = {
        "classes": ({"dog/a.png": png, "cat/b.png": png, "cat/a.png": png}, [0, 0, 1]),
        "shards": ({"00000/a.png": png, "00001/b.png": png}, None),
        "deep": ({"cat/x/a.png": png, "dog/y/b.png": png}, None),
        "top": ({"a.png": png, "dog/b.png": png, "cat/b.png": png}, None),
        "one": ({"cat/a.png": png, "cat/b.png": png}, None),
        "null": ({"dog/a.png": png, "cat/b.png": png, LABELS: b'{"labels": null}'}, None),
    }
    for name, (content, labels) in cases.items():
        for path in (write_folder(tmp_path / name, content), write_zip(tmp_path / f"{name}.zip", content)):
            found = load_source(str(path)).labels
            assert (found if labels is None else found.tolist()) == labels, name


def test_what_is_not_taken_for_classes_is_said(tmp_path, capsys):
    png = encode(IMAGES[0])
    said = {
        "wrapped": {"mydata/cat/a.png": png, "mydata/dog/b.png": png},
        "top": {"a.png": png, "dog/b.png": png},
    }
    silent = {
        "shards": {"x/00000/a.png": png, "x/00001/b.png": png},
        "one": {"cat/a.png": png, "cat/b.png": png},
        "null": {"a/cat/a.png": png, "a/dog/b.png": png, LABELS: b'{"labels": null}'},
        "classes": {"cat/a.png": png, "dog/b.png": png},
    }
    for name, content in {**said, **silent}.items():
        path = write_zip(tmp_path / f"{name}.zip", content)
        assert (load_source(str(path)).labels is None) == (name != "classes")
        error = capsys.readouterr().err
        assert error.startswith(f"{path}: no classes: 2 folders (") == (name in said)
        assert error.count("\n") == (name in said)
    path = npz(tmp_path / "x.npz", images=IMAGES, y=np.array(CLASSES))
    assert load_source(str(path)).labels is None
    assert f"{path}: no classes: ignored ['y.npy']; an array called 'labels' is read" in capsys.readouterr().err
    load_source(str(npz(tmp_path / "y.npz", images=IMAGES, labels=np.array(CLASSES), other=np.zeros(2))))
    load_source(str(npz(tmp_path / "z.npz", images=IMAGES)))
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------- CIFAR-10's own files


@pytest.fixture
def cifar():
    return random_images(33, 32), np.arange(33) % 10


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
    "a number that is none": tar_header(b"0", 8**11),
    "a wrong checksum": BATCH[:3] + b"_" + BATCH[4:],
    "more than 1,000 entries": 1001 * tar_header(b"5", 0),
    "it ends too early": tar_header(b"0", 1 << 30),
}


@pytest.mark.parametrize("words", list(BAD_TARS))
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_archives_of_another_kind_are_refused(tmp_path, words, suffix):
    content = BAD_TARS[words] + (b"" if "early" in words else bytes(1024))
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".tar.gz" else content)
    with pytest.raises(CorruptFileError) as caught:
        load_source(str(path))
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: not a sound tar archive (")


def test_what_comes_out_of_a_tar_archive_is_bounded(tmp_path, monkeypatch, cifar):
    """Also after its end, where nothing but zeros should be, and where gzip's checksum is."""
    monkeypatch.setattr("cdistill.data.tars._MOST_TOTAL", 2**18)
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


# ------------------------------------------------------------------------------------------------------- bad labels

PAIRS = [[f"00000/img{k:08d}.png", CLASSES[k]] for k in range(COUNT)]
BAD_LABELS = {
    "no label for 00000/img00000023.png": labelled(*PAIRS[:-1]),
    "a label for 'b.png', which is missing": labelled(*PAIRS, ["b.png", 1]),
    "named twice": labelled(*PAIRS, PAIRS[0]),
    "label 1.0 of": labelled(*PAIRS[:-1], [PAIRS[-1][0], 1.0]),
    "label True of": labelled(*PAIRS[:-1], [PAIRS[-1][0], True]),
    "label '1' of": labelled(*PAIRS[:-1], [PAIRS[-1][0], "1"]),
    "label -1 of": labelled(*PAIRS[:-1], [PAIRS[-1][0], -1]),
    "label 1000000000000000000000 of": labelled(*PAIRS[:-1], [PAIRS[-1][0], 10**21]),
    "label None of": labelled(*PAIRS[:-1], [PAIRS[-1][0], None]),
    "got the name 3": labelled([3, 1]),
    "dataset.json: cannot be understood": b"{",
    "needs {": b"[1, 2]",
    "KeyError": b"{}",
    "6,136": b"[" * 200_000,
    "TypeError": b'{"labels": 3}',
    "ValueError": b'{"labels": [[1, 2, 3]]}',
    "codec": b"\xff\xfe\xfd",
}


@pytest.mark.parametrize("words", list(BAD_LABELS))
def test_labels_that_do_not_match_are_refused(tmp_path, words):
    content = changed(labels=BAD_LABELS[words])
    for path in (write_zip(tmp_path / "x.zip", content), write_folder(tmp_path / "x", content)):
        with pytest.raises(CorruptFileError) as caught:
            load_source(str(path))
        assert words in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_labels_may_be_as_large_as_the_images_justify(tmp_path):
    """Escaped names, and air between the words, are read; a small archive's large labels are not even inflated."""
    content = {"é" * 50 + f"{k}.png": PNG for k in range(100)}
    content[LABELS] = json.dumps({"labels": [[name, 1] for name in content]}, indent=4).encode()
    assert load_source(str(write_zip(tmp_path / "x.zip", content))).num_classes == 2
    hostile = changed(labels=b'{"labels": [' + b"[]," * 2**20 + b"[]]}")
    with pytest.raises(CorruptFileError, match=r"dataset\.json: 3,145,744 bytes; at most 6,136"):
        load_source(str(write_zip(tmp_path / "y.zip", hostile, zipfile.ZIP_DEFLATED)))


@pytest.mark.parametrize("kind", [RecursionError, MemoryError])
def test_labels_that_cannot_be_parsed_are_refused(archive, monkeypatch, kind):
    def refuse(content: bytes) -> None:
        raise kind

    monkeypatch.setattr("cdistill.data.labels.json.loads", refuse)
    with pytest.raises(CorruptFileError, match=kind.__name__):
        load_source(str(archive))


# ------------------------------------------------------------------------------------------------------- bad images


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more than there is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def picture(mode: str, form: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    Image.new(mode, (8, 8)).save(content, form, **options)
    return content.getvalue()


PNG = FILES[FIRST]
BAD_IMAGES = {
    "truncated": (PNG[:-40], "not a sound image"),
    "flipped": (PNG[:99] + bytes([PNG[99] ^ 8]) + PNG[100:], "not a sound image"),
    "text": (b"hello", "not a sound image"),
    "empty": (b"", "not a sound image"),
    "svg": (b"<svg/>", "not a sound image"),
    "bomb": (bomb(50_000, 50_000), "decompression bomb"),
    "smaller bomb": (bomb(12_000, 10_000), "12000x10000 pixels; at most"),
    "large": (bomb(8192, 4096), "8192x4096 pixels; at most 16,777,216"),
    "RGBA": (picture("RGBA"), "mode RGBA"),
    "16 bits": (picture("I;16"), "mode I;16"),
    "CMYK": (picture("CMYK", "JPEG"), "mode CMYK"),
    "transparent": (picture("RGB", transparency=(0, 0, 0)), "mode RGB with transparency"),
    "animated": (picture("RGB", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]), "several frames"),
}


def test_a_jpeg_of_many_scans_is_refused(tmp_path):
    """Each passes over all pixels, however few bytes it has."""
    content = io.BytesIO()
    Image.new("L", (64, 64)).save(content, "JPEG", progressive=True)
    data = content.getvalue()
    assert 2 < data.count(b"\xff\xda") < 20
    assert decode(data, "x").shape == (1, 64, 64)
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(CorruptFileError, match=r"x\.zip: a\.jpg: a JPEG of 3,\d\d\d scans; at most 100 are read"):
        load_source(str(write_zip(tmp_path / "x.zip", {"a.jpg": data[:-2] + 3000 * last + data[-2:]})))


def test_the_bytes_of_an_image_are_bounded_by_its_pixels():
    assert decode(PNG + bytes(2**18), "x").shape == (3, 8, 8)
    with pytest.raises(CorruptFileError, match=r"x: .* bytes for 8x8 pixels; at most 262,656 are read"):
        decode(PNG + bytes(2**18 + 512), "x")


def test_too_little_memory_does_not_make_an_image_bad(monkeypatch):
    def refuse(image: Image.Image, mode: str) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(CdistillError, match="x: too little memory") as caught:
        decode(PNG, "x")
    assert not isinstance(caught.value, CorruptFileError)


@pytest.mark.parametrize("name", list(BAD_IMAGES))
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named(tmp_path, lazily, name, workers):
    data, words = BAD_IMAGES[name]
    path = write_zip(tmp_path / "x.zip", {**FILES, "00000/img00000005.png": data})
    if workers == 0:
        with pytest.raises(CorruptFileError) as caught:
            load_source(str(path))
        with pytest.raises(CorruptFileError, match=r"x: 00000/img00000000\.png: "):  # as the first image, of a folder
            load_source(str(write_folder(tmp_path / "x", changed(image=data))))
    else:
        source = lazily(path, workers)
        with pytest.raises(CorruptFileError) as caught:
            source.batch(torch.arange(10))
        assert torch.equal(source.samples[:5], torch.from_numpy(IMAGES[:5]))  # the others can still be read
    assert str(caught.value).startswith(f"{path}: 00000/img00000005.png: ")
    assert words in str(caught.value)
    assert caught.value.exit_code == 4


def test_images_of_other_sizes_and_colours_among_grey_ones(tmp_path):
    cases = [(encode(random_images(1, 9)[0]), "9x9 pixels; the others have 8x8"), (PNG, "has colours")]
    for data, words in cases:
        grey = {"a.png": encode(IMAGES[0][:1]), "b.png": data}
        with pytest.raises(MismatchError, match=f"b.png: {words}"):
            load_source(str(write_zip(tmp_path / "x.zip", grey)))


# ----------------------------------------------------------------------------------------------------- bad archives


def with_bytes(path: Path, *changes: tuple[bytes, int, bytes]) -> Path:
    """Overwrites bytes at a distance from the last place where something stands."""
    data = bytearray(path.read_bytes())
    for anchor, distance, new in changes:
        at = data.rindex(anchor) + distance
        data[at : at + len(new)] = new
    path.write_bytes(data)
    return path


DIRECTORY = b"PK\1\2"


def test_a_zip_bomb_with_a_lying_size_is_refused(tmp_path):
    zeros = write_zip(tmp_path / "x.zip", {"a.png": bytes(80 * 2**20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptFileError, match=r"a\.png: 83,886,080 bytes; at most 67,108,864"):
        load_source(str(zeros))
    with_bytes(zeros, (DIRECTORY, 24, struct.pack("<I", 1000)))
    with pytest.raises(CorruptFileError, match=r"a\.png: its content is not what was packed"):
        load_source(str(zeros))


def test_damaged_members_and_directories_are_refused(tmp_path):
    def one(name: str) -> Path:
        return write_zip(tmp_path / f"{name}.zip", {"a.png": PNG})

    cases = {
        "not what was packed": [
            with_bytes(one("crc"), (DIRECTORY, 16, b"\0\0\0\0")),
            with_bytes(one("content"), (b"IDAT", 9, b"\0\0\0")),
            with_bytes(one("size"), (DIRECTORY, 24, struct.pack("<I", len(PNG) - 1))),
            with_bytes(one("place"), (DIRECTORY, 42, struct.pack("<I", 7))),
        ],
        "encrypted": [with_bytes(one("encrypted"), (DIRECTORY, 8, b"\1"))],
        "compressed in a way": [write_zip(tmp_path / "bz.zip", {"a.png": PNG}, zipfile.ZIP_BZIP2)],
        "not a sound zip archive": [
            write_folder(tmp_path, {"cut.zip": one("cut").read_bytes()[:-30]}) / "cut.zip",
            write_folder(tmp_path, {"text.zip": b"hello"}) / "text.zip",
            write_folder(tmp_path, {"none.zip": b""}) / "none.zip",
        ],
        "no images in it": [write_zip(tmp_path / "empty.zip", {}), write_zip(tmp_path / "txt.zip", {"a.txt": b""})],
        ".gif is not read": [write_zip(tmp_path / "gif.zip", {"a.gif": b""})],
    }
    for words, paths in cases.items():
        for path in paths:
            with pytest.raises(CorruptFileError, match=words) as caught:
                load_source(str(path))
            assert str(caught.value).startswith(str(path))


def test_misplaced_labels_links_and_unprintable_names_are_refused(tmp_path):
    cases = {
        "at the top; move everything up": {f"x/{name}": content for name, content in FILES.items()},
        "cannot be printed": {"a\n.png": PNG},
    }
    for words, content in cases.items():
        for path in (write_zip(tmp_path / "x.zip", content), write_folder(tmp_path / words[:3], content)):
            with pytest.raises(CorruptFileError, match=words) as caught:
                load_source(str(path))
            assert "\n" not in str(caught.value)
    (write_folder(tmp_path / "links", FILES) / "more").symlink_to(tmp_path / "at ")
    with pytest.raises(CorruptFileError, match="links/more: a link to a folder is not followed"):
        load_source(str(tmp_path / "links"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_stored_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for _ in range(2):
            file.writestr("a.png", PNG)
    with pytest.raises(CorruptFileError, match=r"a\.png: stored twice"):
        load_source(str(tmp_path / "x.zip"))


def test_names_that_point_outside_touch_nothing(tmp_path):
    content = {"../../evil.png": PNG, "/etc/b.png": PNG, "a/../c.png": PNG}
    source = load_source(str(write_zip(tmp_path / "sub.zip", content)))
    assert len(source) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["sub.zip"]


def test_every_truncation_of_an_archive_is_an_error(tmp_path):
    data = write_zip(tmp_path / "x.zip", members(IMAGES[:2], [0, 1])).read_bytes()
    for length in range(0, len(data), 37):
        (tmp_path / "x.zip").write_bytes(data[:length])
        with pytest.raises(CorruptFileError):
            load_source(str(tmp_path / "x.zip"))


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    """Whatever byte is damaged, the result is an error, or images that were packed."""
    data = write_zip(tmp_path / "x.zip", members(IMAGES[:2], [0, 1])).read_bytes()
    for place in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "x.zip").write_bytes(damaged)
        with contextlib.suppress(CorruptFileError):
            source = load_source(str(tmp_path / "x.zip"))
            known = {image.tobytes() for image in IMAGES[:2]}
            assert {image.numpy().tobytes() for image in source.samples} <= known, place


# ------------------------------------------------------------------------------------------------------- bad arrays

ONE = np.zeros((4, 8, 8, 3), np.uint8)
BAD_ARRAYS = {
    "float32; images must be uint8": {"images": ONE.astype(np.float32)},
    "Python objects": {"images": np.array([{}, []], dtype=object)},
    "shape (4, 8, 8);": {"images": ONE[..., 0]},
    "shape (4, 8, 8, 4)": {"images": np.zeros((4, 8, 8, 4), np.uint8)},
    "shape (4, 3, 8, 3)": {"images": np.zeros((4, 3, 8, 3), np.uint8)},
    "shape (0, 8, 8, 3)": {"images": ONE[:0]},
    "needs an array 'images'": {"pictures": ONE},
    "shape (3,); 4 images": {"images": ONE, "labels": np.arange(3)},
    "float64; classes": {"images": ONE, "labels": np.zeros(4)},
    "bool; classes": {"images": ONE, "labels": np.zeros(4, bool)},
    "label -1;": {"images": ONE, "labels": np.array([0, -1, 1, 2])},
    "label 18446744073709551615;": {"images": ONE, "labels": np.array([0, 2**64 - 1, 1, 2], np.uint64)},
    "objects, which is never": {"images": ONE, "labels": np.array([1, 2, 3, None])},
    "Fortran": {"images": np.asfortranarray(ONE)},
}


@pytest.mark.parametrize("words", list(BAD_ARRAYS))
def test_arrays_that_are_no_images_or_labels_are_refused(tmp_path, words):
    with pytest.raises(CorruptFileError) as caught:
        load_source(str(npz(tmp_path / "x.npz", **BAD_ARRAYS[words])))
    assert words in str(caught.value)
    assert str(tmp_path / "x.npz") in str(caught.value)


def array_file(text: str, version: int = 1) -> bytes:
    """A header of NumPy's format."""
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode()


HEADER = '{"descr": "|u1", "fortran_order": False, "shape": (1, 3, 32, 32)}'
BAD_HEADERS = {
    "a header of 20,065 bytes; at most 10,000": array_file(HEADER + " " * 20_000),
    "a header of 1,000,065 bytes; at most 10,000": array_file(HEADER + " " * 1_000_000, 2),
    "a header that cannot be understood": array_file("(" * 3000 + ")" * 3000),
    "a header that cannot be understood;": array_file("{}"),
    "a header that cannot be understood; ": array_file(HEADER)[:-3],
    "not version 1 or 2": b"\x93NUMPY\3\0",
    "not version 1 or 2 ": b"",
    "shape (-1, 3, -32, 32)": array_file(HEADER.replace("1,", "-1,").replace(", 32,", ", -32,")) + bytes(3072),
}


@pytest.mark.parametrize("words", list(BAD_HEADERS))
def test_headers_of_arrays_are_read_with_care(tmp_path, words):
    for version in (1, 2):
        path = write_zip(tmp_path / "good.npz", {"images.npy": array_file(HEADER, version) + bytes(3072)})
        assert load_source(str(path)).shape == (3, 32, 32)
    path = write_zip(tmp_path / "x.npz", {"images.npy": BAD_HEADERS[words]})
    with pytest.raises(CorruptFileError) as caught:
        load_source(str(path))
    assert str(caught.value).startswith(f"{path}: images: {words.strip()}")
    assert "\n" not in str(caught.value)
    assert "pickle" not in str(caught.value)


def test_damaged_npz_files_are_refused(tmp_path):
    path = npz(tmp_path / "x.npz", images=IMAGES)
    data = path.read_bytes()
    for damaged in (data[:500], b"hello", data[:900] + bytes([data[900] ^ 1]) + data[901:]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"x\.npz: not a sound"):
            load_source(str(path))


def test_a_compressed_array_that_does_not_fit_says_what_to_do(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", images=ONE)
    assert len(load_source(str(tmp_path / "x.npz"))) == 4
    monkeypatch.setenv("CDISTILL_DATA_MEMORY", "1e-9")
    with pytest.raises(CdistillError, match=r"numpy\.savez"):
        load_source(str(tmp_path / "x.npz"))


# ------------------------------------------------------------------------------------------ names, memory, processes


def test_pipes_are_not_waited_for(tmp_path):
    for name in ("x.zip", "x.npz", "x.tar.gz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(CdistillError, match="neither a file nor a folder"):
            load_source(str(tmp_path / name))


def test_missing_and_unknown_files(tmp_path):
    for name in ("none.zip", "none/", "none.npz", "a/b", "none.tar.gz"):
        with pytest.raises(MissingAssetError, match="no such file"):
            load_source(str(tmp_path / name))
    (tmp_path / "x.mat").write_bytes(b"")
    with pytest.raises(CdistillError, match=r"x\.mat: not a kind of data"):
        load_source(str(tmp_path / "x.mat"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorruptFileError, match="no images in it"):
        load_source(str(tmp_path / "empty"))
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10'"):
        load_source("cifar-10")
    with pytest.raises(CdistillError, match="only 'train'"):
        load_source(str(write_zip(tmp_path / "x.zip", FILES)), "heldout")


def test_memory_limit(monkeypatch):
    assert 0 < memory_limit() <= free_memory()
    monkeypatch.setenv("CDISTILL_DATA_MEMORY", "0.5")
    assert memory_limit() == 2**29
    for wrong in ("much", "-1", "nan"):
        monkeypatch.setenv("CDISTILL_DATA_MEMORY", wrong)
        with pytest.raises(CdistillError, match="CDISTILL_DATA_MEMORY"):
            memory_limit()


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_its_limit_less_what_is_in_use(tmp_path, monkeypatch, version):
    """Cached files are not in use: they are given up when memory is needed."""
    monkeypatch.setattr("cdistill.data.memory._CGROUPS", tmp_path)
    free = free_memory()
    folder, limit, used, cached = {
        1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: (".", "memory.max", "memory.current", "inactive_file"),
    }[version]
    counters = {limit: b"1000000\n", used: b"300000\n", "memory.stat": f"anon 7\n{cached} 100000\n".encode()}
    write_folder(tmp_path / folder, counters)
    assert free_memory() == 800_000
    write_folder(tmp_path / folder, {used: b"2000000\n"})
    assert free_memory() == 0
    for unlimited in (b"max\n", b"9223372036854771712\n"):
        write_folder(tmp_path / folder, {limit: unlimited})
        assert free_memory() > free / 2


@pytest.mark.parametrize("moment", ["idle", "asked"])
def test_a_killed_decoding_process_is_an_error_and_no_hang(archive, lazily, moment):
    source = lazily(archive, 2)
    source.batch(torch.arange(4))
    if moment == "asked":
        source.prefetch(torch.arange(8))
    os.kill(source.samples._pool.processes[0].pid, signal.SIGKILL)
    with pytest.raises(CdistillError, match=r"x\.zip: a decoding process died .*CDISTILL_WORKERS=0"):
        torch.cat([source.samples[:8] for _ in range(2)])  # the first may still find its answer in the pipe
    assert torch.equal(source.samples[:], torch.from_numpy(IMAGES))  # and others take their place


def test_a_signal_ends_the_waiting_for_a_stuck_process(archive, lazily, monkeypatch):
    source = lazily(archive, 2)
    source.batch(torch.arange(4))
    processes = source.samples._pool.processes
    monkeypatch.setattr("cdistill.data.lazy._PATIENCE", 0)
    monkeypatch.setattr("cdistill.data.lazy._LOOK_EVERY", 0.01)
    monkeypatch.setattr("cdistill.runtime.signals._received", [signal.SIGTERM])
    os.kill(processes[1].pid, signal.SIGSTOP)
    with pytest.raises(StoppedError, match="reading the data: stopped by SIGTERM") as caught:
        source.batch(torch.arange(8))
    assert caught.value.exit_code == 75
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_decoding_processes_find_the_standard_library_first(archive, lazily, tmp_path, monkeypatch):
    """Also if the package lies beside something that is called like a part of it, as in site-packages."""
    package = Path(errors.__file__).parent
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "cdistill").symlink_to(package)
    (tmp_path / "site" / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.setattr("cdistill.data.lazy._PACKAGE_PARENT", tmp_path / "site")
    assert torch.equal(lazily(archive, 1).samples[:], torch.from_numpy(IMAGES))


def test_decoding_processes_end_with_their_parent(archive, run_python):
    """Killed, the parent can tell nobody; its end of the pipe closes all the same."""
    code = (
        "import os, signal, sys, torch; from cdistill.data import load_source\n"
        f"source = load_source({str(archive)!r}); source.batch(torch.arange(4)); source.prefetch(torch.arange(4))\n"
        "print(*[p.pid for p in source.samples._pool.processes], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    pids = [int(pid) for pid in run_python(code, **LAZY, CDISTILL_WORKERS="2").split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_decoding_processes_ignore_signals_and_load_no_torch(archive, lazily):
    source = lazily(archive, 1)
    source.batch(torch.arange(4))
    pid = source.samples._pool.processes[0].pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert torch.equal(source.samples[:], torch.from_numpy(IMAGES))
    if Path("/proc/self/maps").exists():
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


# ------------------------------------------------------------------------------------------------ use of the sources


def test_moments_of_a_lazy_source_are_those_in_memory(tmp_path, lazily, monkeypatch):
    monkeypatch.setattr("cdistill.evaluation.references._READ", 64)
    images = random_images(300, 8, 1)
    path = write_zip(tmp_path / "x.zip", members(images, None))
    held, lazy = load_source(str(path)), lazily(path, 2)
    samples = SampleSet(torch.from_numpy(random_images(200, 8, 1, seed=1)))
    distances = [PixelFrechet(Pixels())(samples, Reference(source)).value for source in (held, lazy)]
    assert distances[0] == distances[1] > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_lazy_source_is_training_in_memory(tmp_path, lazily, workers):
    from cdistill.networks.architecture import build_denoiser
    from cdistill.training.denoising import DenoisingTask
    from cdistill.training.loop import Counters, finish, make_accelerator, read
    from cdistill.training.settings import DenoisingSection

    path = write_zip(tmp_path / "x.zip", members(random_images(COUNT, 8, 1), CLASSES))
    section = DenoisingSection(iterations=3, batch_size=8, learning_rate=1e-3, ema_rate=0.9)
    architecture = {"network": "song", "resolution": 8, "channels": 1, "num_classes": 10, "model_channels": 16}
    architecture |= {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    weights = []
    for source in (load_source(str(path)), lazily(path, workers)):
        torch.manual_seed(0)
        task = DenoisingTask(build_denoiser(architecture, 0.5), source, make_accelerator("fp32"), section, 0)
        for step in range(3):
            finish(task, step, read(task.accelerator, task.gradients(step)), Counters())
        weights.append(torch.cat([value.flatten() for value in task.live.state_dict().values()]))
    assert torch.equal(*weights)


def test_teacher_and_data_must_fit(tmp_path):
    digits, patches = load_teacher("digits"), load_teacher("patches")

    def data(side: int, labels: list[int] | None):
        return load_source(str(write_zip(tmp_path / "x.zip", members(random_images(4, side, 1), labels))))

    dropped = fit_source(patches, data(12, [0, 1, 2, 3]))
    assert (dropped.labels, dropped.num_classes) == (None, 0)
    assert dropped.digest != data(12, [0, 1, 2, 3]).digest
    assert fit_source(digits, data(8, [0, 1, 2, 3])).num_classes == 4
    for side, labels in ((8, None), (8, [0, 1, 2, 10]), (12, [0, 1, 2, 3])):
        with pytest.raises(MismatchError, match="choose data that fit, 'digits' say"):
            fit_source(digits, data(side, labels))


def test_recipes_take_paths_and_samples_of_the_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "photos").mkdir()
    assert [is_data_path(name) for name in ("digits", "photos", "x.zip", "a/b", "teacher", "teacher:64", "")] == [
        False, True, True, True, False, False, False,
    ]  # fmt: skip
    values = {"teacher": "digits", "training": {"iterations": 1, "batch_size": 1}}
    for name in ("photos", "x.zip", "teacher:4096"):
        assert check_section({**values, "data": name}, DistillRecipe, "r").data == name
    for name in ("teachers", "cifar", "x.safetensors"):
        with pytest.raises(CdistillError, match="unknown data source"):
            check_section({**values, "data": name}, DistillRecipe, "r")
    with pytest.raises(CdistillError, match="unknown data source"):
        check_section({"data": "teacher"}, TeacherRecipe, "r")


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


def test_the_command_line_takes_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_zip(tmp_path / "x.zip", members(random_images(20, 8, 1), [k % 10 for k in range(20)]))
    estimate = ["estimate-coeffs", "--teacher", "digits", "--samples", "16", "--timesteps", "4", "--data"]
    assert run([*estimate, "x.zip", "--out", "held.safetensors"]) == 0
    monkeypatch.setenv("CDISTILL_DATA_MEMORY", "0")
    assert run([*estimate, str(tmp_path / "x.zip"), "--out", "lazy.safetensors"]) == 0
    assert (tmp_path / "held.safetensors").read_bytes() == (tmp_path / "lazy.safetensors").read_bytes()
    write_zip(tmp_path / "bad.zip", {**FILES, FIRST: b"hello"})
    capsys.readouterr()
    for path, code, words in (("none.zip", 3, "no such file"), ("bad.zip", 4, "not a sound image")):
        assert run([*estimate, path]) == code
        error = capsys.readouterr().err.strip()
        assert words in error
        assert "\n" not in error


def test_a_run_finds_its_data_from_any_folder(tmp_path, monkeypatch, capsys):
    from tests.conftest import fast_distill

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_zip(Path("x.zip"), members(random_images(20, 8, 1), [k % 10 for k in range(20)]))
    sets = ["data=x.zip", "training.iterations=2", "training.batch_size=8", "evaluation.metrics=['frechet-pixels']"]
    assert run(fast_distill(tmp_path / "run", *sets, recipe="digits")) == 0
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "here" / "x.zip") in (tmp_path / "run" / "recipe.resolved.toml").read_text()
    assert run(["evaluate", "--run", "run", "--nfe", "1", "--samples", "16"]) == 0


def test_decoding_processes_are_few(monkeypatch):
    from cdistill.runtime.processes import worker_count

    monkeypatch.delenv("CDISTILL_WORKERS", raising=False)
    assert 0 <= worker_count() <= 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
    assert worker_count() == 0


def test_a_lazy_source_starts_no_process_before_it_is_used(archive, lazily):
    samples = lazily(archive, 3).samples
    assert isinstance(samples, DecodedImages)
    assert samples._pool is None
