"""The output formats: what is in the files, the same bytes always, whole or not at all."""

import hashlib
import io
import json
import tarfile
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdistill.data import load_source
from cdistill.errors import CdistillError
from cdistill.registry import WRITERS
from cdistill.sampling.image_grids import tile
from cdistill.sampling.sample_store import Batch
from cdistill.sampling.writers import Samples, encode_png

SEEDS = [5, 1_000_000, 7, *range(100, 122)]
FORMS = WRITERS.names()


def images(count: int = len(SEEDS), shape: tuple[int, ...] = (3, 6, 4)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def samples_of(array: np.ndarray, labels: np.ndarray | None = None, size: int = 10) -> Samples:
    def read():
        for start in range(0, len(array), size):
            part = slice(start, start + size)
            yield Batch(start, array[part], None if labels is None else labels[part])

    seeds = np.array(SEEDS if len(array) == len(SEEDS) else range(len(array)))
    return Samples(seeds, array.shape[1:], read)


def write(form: str, folder: Path, samples: Samples) -> Path:
    writer = WRITERS.get(form)()
    path = folder / f"found{writer.suffix}"
    writer.write(path, samples)
    return path


def contents(path: Path) -> str:
    """A digest of a file, or of all files of a folder and their names."""
    found = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_do_not_depend_on_the_batches_or_the_hour(form, labelled, tmp_path, monkeypatch):
    labels = np.arange(len(SEEDS)) % 7 if labelled else None
    first = contents(write(form, tmp_path / "a", samples_of(images(), labels, 1)))
    monkeypatch.setattr("time.time", lambda: 2e9)
    for size in (7, 64):
        assert contents(write(form, tmp_path / str(size), samples_of(images(), labels, size))) == first
    assert contents(write(form, tmp_path / "b", samples_of(images() ^ 1, labels))) != first


@pytest.mark.parametrize("form", FORMS)
def test_a_write_that_fails_leaves_what_was_there(form, tmp_path):
    whole = samples_of(images())
    path = write(form, tmp_path, whole)
    before = contents(path)

    def read():
        yield Batch(0, images()[:3] ^ 1, None)
        raise RuntimeError("no more")

    for broken in (whole, replace(whole, seeds=whole.seeds + 1)):
        with pytest.raises(RuntimeError, match="no more"):
            write(form, tmp_path, replace(broken, read=read))
        assert contents(path) == before
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 5, 7), (1, 1, 1), (3, 200, 200)])
def test_pngs_are_read_by_pillow(shape):
    (image,) = images(1, shape)
    with Image.open(io.BytesIO(encode_png(image))) as found:
        found.load()
        assert found.mode == ("L" if shape[0] == 1 else "RGB")
        assert np.array_equal(np.asarray(found).reshape(*shape[1:], shape[0]).transpose(2, 0, 1), image)


def test_a_folder_has_a_file_for_each_seed_beside_what_was_there(tmp_path):
    path = write("png", tmp_path, samples_of(images()))
    assert [file.name for file in sorted(path.iterdir())][:2] == ["000005.png", "000007.png"]
    with Image.open(path / "1000000.png") as found:
        assert np.array_equal(np.asarray(found).transpose(2, 0, 1), images()[1])
    (path / "mine.png").write_bytes(b"mine")
    write("png", tmp_path, samples_of(images() ^ 1))
    assert (path / "mine.png").read_bytes() == b"mine"
    assert WRITERS.get("png")().others(path, SEEDS) == ["mine.png"]
    with Image.open(path / "1000000.png") as found:
        assert np.array_equal(np.asarray(found).transpose(2, 0, 1), images()[1] ^ 1)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("form", ["zip", "npz"])
def test_what_was_written_is_a_data_set(form, labelled, tmp_path):
    labels = np.arange(2500) % 7 if labelled else None
    array = images(2500, (1, 4, 4))
    source = load_source(str(write(form, tmp_path, samples_of(array, labels))))
    assert np.array_equal(source.samples[:].numpy(), array)
    assert source.num_classes == (7 if labelled else 0)
    if labelled:
        assert np.array_equal(source.labels.numpy(), labels)


def test_a_zip_is_edms(tmp_path):
    array, labels = images(1002, (1, 4, 4)), np.arange(1002) % 3
    with zipfile.ZipFile(write("zip", tmp_path, samples_of(array, labels))) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names[0] == "00000/img00000000.png"
        assert names[1000:] == ["00001/img00001000.png", "00001/img00001001.png", "dataset.json"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        found = json.loads(archive.read("dataset.json"))["labels"]
    assert found == [[name, int(label)] for name, label in zip(names[:-1], labels, strict=True)]
    with zipfile.ZipFile(write("zip", tmp_path, samples_of(array))) as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}


def test_a_tar_is_a_webdataset_shard_in_the_order_of_the_request(tmp_path):
    labels = np.arange(len(SEEDS)) % 7
    with tarfile.open(write("tar", tmp_path, samples_of(images(), labels))) as archive:
        assert archive.getnames() == [f"{seed:010d}.{kind}" for seed in SEEDS for kind in ("png", "cls")]
        content = {name: archive.extractfile(name).read() for name in archive.getnames()}
    assert [int(content[f"{seed:010d}.cls"]) for seed in SEEDS] == labels.tolist()
    for seed, image in zip(SEEDS, images(), strict=True):
        with Image.open(io.BytesIO(content[f"{seed:010d}.png"])) as found:
            assert np.array_equal(np.asarray(found).transpose(2, 0, 1), image)
    with tarfile.open(write("tar", tmp_path, samples_of(images()))) as archive:
        assert archive.getnames() == [f"{seed:010d}.png" for seed in SEEDS]


def test_arrays_are_adms_for_images_and_plain_for_vectors(tmp_path):
    labels = np.arange(len(SEEDS)) % 7
    with np.load(write("npz", tmp_path, samples_of(images(), labels))) as found:
        assert set(found) == {"arr_0", "seeds", "labels"}
        assert np.array_equal(found["arr_0"], images().transpose(0, 2, 3, 1))
        assert found["seeds"].tolist() == SEEDS
        assert np.array_equal(found["labels"], labels)
    vectors = np.random.default_rng(0).normal(size=(len(SEEDS), 2))
    with np.load(write("npz", tmp_path, samples_of(vectors))) as found:
        assert set(found) == {"samples", "seeds"}
        assert np.array_equal(found["samples"], vectors)


def test_a_grid_holds_every_image_at_its_place(tmp_path):
    path = write("grid", tmp_path, samples_of(images()))
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    factor, columns = 8, 5  # 6 pixels become 48; 25 images in rows of 5
    height, width = 6 * factor + 4, 4 * factor + 4
    assert pixels.shape == (5 * height, columns * width, 3)
    for k, image in enumerate(images()):
        top, left = k // columns * height + 2, k % columns * width + 2
        shown = pixels[top : top + 6 * factor : factor, left : left + 4 * factor : factor]
        assert np.array_equal(shown.transpose(2, 0, 1), image)
        assert (pixels[top - 1, left : left + 4 * factor] == 128).all()


@pytest.mark.parametrize("colours", [1, 3])
def test_rows_can_be_labelled_and_the_last_one_unfinished(colours):
    array = images(5, (colours, 8, 8))
    plain, labelled = tile(array, 3), tile(array, 3, ["teacher", "2 NFE"])
    assert labelled.height == plain.height == 2 * 52
    margin = labelled.width - plain.width
    assert margin > 10
    assert np.array_equal(np.asarray(labelled)[:, margin:], np.asarray(plain))
    assert (np.asarray(plain)[52:, 2 * 52 :] == 128).all()
    assert (np.asarray(labelled)[:, :margin] < 100).any()


@pytest.mark.parametrize("form", FORMS)
def test_what_a_form_cannot_hold_is_refused(form):
    writer = WRITERS.get(form)()
    writer.check(form, (3, 8, 8), 400)
    if form == "npz":
        writer.check(form, (2,), 400)
    else:
        with pytest.raises(CdistillError, match=f"--format {form}: this network draws vectors.*use --format npz"):
            writer.check(form, (2,), 400)
    if form == "grid":
        with pytest.raises(CdistillError, match="got 401 seeds; one picture shows at most 400"):
            writer.check(form, (3, 8, 8), 401)
    else:
        writer.check(form, (3, 8, 8), 10**9)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "grid"])
def test_memory_does_not_grow_with_the_images(form, tmp_path):
    """A zip archive keeps its directory, less than half a kilobyte an image; the images have three."""
    image = images(64, (3, 32, 32))

    def peak(count: int) -> int:
        def read():
            for start in range(0, count, len(image)):
                yield Batch(start, image.copy(), None)

        tracemalloc.start()
        write(form, tmp_path / str(count), Samples(np.arange(count), (3, 32, 32), read))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(64)
    grown = peak(1280) - peak(320)
    assert grown < 960 * (450 if form == "zip" else 50)
