"""Images in archives and folders: the same however they are stored, and errors that name the file."""

import contextlib
import io
import json
import os
import signal
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cdistill.cli.app import run
from cdistill.data import load_source
from cdistill.errors import (
    CdistillError,
    CorruptFileError,
    MismatchError,
    MissingAssetError,
    StoppedError,
    UnknownNameError,
)
from cdistill.formats.archives import is_picture
from cdistill.formats.images import decode
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe
from cdistill.registry import is_data_path
from cdistill.sampling.teacher_data import fit_source
from cdistill.settings import check_section
from cdistill.teachers import load_teacher
from tests.archives import (
    LABELS,
    encode,
    members,
    random_images,
    write_folder,
    write_zip,
)
from tests.data.stores import CLASSES, COUNT, FILES, IMAGES, KINDS, write_npz, write_store

FIRST = "00000/img00000000.png"


@pytest.fixture
def archive(tmp_path):
    return write_zip(tmp_path / "x.zip", FILES)


def changed(**files: bytes | None) -> dict[str, bytes]:
    """FILES with the first image or the labels replaced, or left out."""
    names = {"image": FIRST, "labels": LABELS}
    found = {**FILES, **{names[key]: content for key, content in files.items()}}
    return {name: content for name, content in found.items() if content is not None}


def labelled(*pairs: list[object]) -> bytes:
    return json.dumps({"labels": pairs}).encode()


# ------------------------------------------------------------------------------------------------ the same data


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_storing_gives_the_same_images_and_labels(tmp_path, kind):
    path = write_store(tmp_path, kind)
    source = load_source(str(path))
    assert (len(source), source.shape, source.num_classes, source.flips) == (COUNT, (3, 8, 8), 10, True)
    assert source.samples.equal(torch.from_numpy(IMAGES))
    assert source.samples.is_contiguous()
    assert source.labels.tolist() == CLASSES
    assert source.name == str(path)


def test_many_images_are_read_in_order_and_with_progress(tmp_path, capsys):
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
        return load_source(str(write_npz(tmp_path / f"{name}.npz", images=images, labels=np.array(labels)))).digest

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
    path = write_store(tmp_path, kind)
    monkeypatch.setattr("cdistill.data.loading.FEW", 3)
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


KINDS = {"BMP": ".bmp", "DIB": ".dib", "PPM": ".ppm", "GIF": ".gif", "TIFF": ".tif", "TGA": ".tga", "QOI": ".qoi"}


def test_every_kind_that_pillow_reads_is_read_and_the_others_are_counted(tmp_path, capsys):
    grey = random_images(2, 8, 1)
    kinds = {kind: suffix for kind, suffix in KINDS.items() if kind not in ("GIF", "QOI")}  # these have colours
    load_source(
        str(write_folder(tmp_path / "x", {f"{kind}{end}": encode(grey[0], kind) for kind, end in kinds.items()}))
    )
    assert "not read" not in capsys.readouterr().err
    rgb = random_images(1)[0]
    for kind, suffix in {**KINDS, "JPEG": ".jfif", "PNG": ".PNG", "JPEG2000": ".jp2"}.items():
        path = write_folder(tmp_path / kind, {f"a{suffix}": encode(rgb, kind)})
        source = load_source(str(path))
        assert source.shape == (3, 8, 8)
        assert source.lossy == (kind in ("JPEG", "JPEG2000"))
        if not source.lossy and kind != "GIF":
            assert np.array_equal(source.samples[0], rgb)
    mixed = {"a.png": encode(rgb), "b.heic": b"", "c.HEIC": b"", "notes.txt": b"", "LICENSE": b"", ".hidden.gif": b""}
    for path in (write_folder(tmp_path / "mixed", mixed), write_zip(tmp_path / "mixed.zip", mixed)):
        assert len(load_source(str(path))) == 1
        assert f"{path}: 1 images; not read: " in (said := capsys.readouterr().err)
        assert all(words in said for words in ("2 .heic", "1 .txt", "1 no suffix"))


def test_folders_of_held_out_data_are_not_trained_on_silently(tmp_path):
    image = encode(random_images(1)[0])
    for names in ({"train/a.png", "test/a.png"}, {"train/cat/a.png", "train/dog/b.png", "VAL/cat/a.png"}):
        path = write_zip(tmp_path / "x.zip", dict.fromkeys(names, image))
        with pytest.raises(MismatchError, match="data and held-out data; give one of them"):
            load_source(str(path))
    assert (
        load_source(str(write_zip(tmp_path / "y.zip", {"train/a.png": image, "trees/a.png": image}))).num_classes == 2
    )


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
    path = write_npz(tmp_path / "x.npz", images=IMAGES, y=np.array(CLASSES))
    assert load_source(str(path)).labels is None
    assert f"{path}: no classes: ignored ['y.npy']; an array called 'labels' is read" in capsys.readouterr().err
    load_source(str(write_npz(tmp_path / "y.npz", images=IMAGES, labels=np.array(CLASSES), other=np.zeros(2))))
    load_source(str(write_npz(tmp_path / "z.npz", images=IMAGES)))
    assert capsys.readouterr().err == ""


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
    "truncated": (PNG[:-40], "not a valid image"),
    "flipped": (PNG[:99] + bytes([PNG[99] ^ 8]) + PNG[100:], "not a valid image"),
    "text": (b"hello", "not a valid image"),
    "empty": (b"", "not a valid image"),
    "svg": (b"<svg/>", "not a valid image"),
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
@pytest.mark.parametrize("fits", [True, False])
def test_a_bad_image_is_named(tmp_path, monkeypatch, name, fits):
    """Also where the images do not fit in memory; then nothing is kept, and the sound archive can be read after."""
    data, words = BAD_IMAGES[name]
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    if not fits:
        monkeypatch.setattr("cdistill.data.memory.memory_limit", lambda: 0)
    path = write_zip(tmp_path / "x.zip", {**FILES, "00000/img00000005.png": data})
    with pytest.raises(CorruptFileError) as caught:
        load_source(str(path))
    assert str(caught.value).startswith(f"{path}: 00000/img00000005.png: ")
    assert words in str(caught.value)
    assert caught.value.exit_code == 4
    assert not list(tmp_path.glob("assets/decoded/*.npy"))
    with pytest.raises(CorruptFileError, match=r"x: 00000/img00000000\.png: "):  # as the first image, of a folder
        load_source(str(write_folder(tmp_path / "x", changed(image=data))))


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
        "not a valid zip archive": [
            write_folder(tmp_path, {"cut.zip": one("cut").read_bytes()[:-30]}) / "cut.zip",
            write_folder(tmp_path, {"text.zip": b"hello"}) / "text.zip",
            write_folder(tmp_path, {"none.zip": b""}) / "none.zip",
        ],
        "no images in it": [write_zip(tmp_path / "empty.zip", {}), write_zip(tmp_path / "txt.zip", {"a.txt": b""})],
        r"no images in it \(holds 1 \.heic\)": [write_zip(tmp_path / "heic.zip", {"a.heic": b""})],
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
    with pytest.raises(CdistillError, match=r"x\.mat: not a known kind of data"):
        load_source(str(tmp_path / "x.mat"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorruptFileError, match="no images in it"):
        load_source(str(tmp_path / "empty"))
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10'"):
        load_source("cifar-10")
    with pytest.raises(CdistillError, match="only 'train'"):
        load_source(str(write_zip(tmp_path / "x.zip", FILES)), "heldout")


# ------------------------------------------------------------------------------------------------ use of the sources


def test_teacher_and_data_must_fit(tmp_path):
    digits, patches = load_teacher("digits"), load_teacher("patches")

    def data(side: int, labels: list[int] | None):
        return load_source(str(write_zip(tmp_path / "x.zip", members(random_images(4, side, 1), labels))))

    dropped = fit_source(patches, data(12, [0, 1, 2, 3]))
    assert (dropped.labels, dropped.num_classes) == (None, 0)
    assert dropped.digest != data(12, [0, 1, 2, 3]).digest
    assert fit_source(digits, data(8, [0, 1, 2, 3])).classes.counts == (1, 1, 1, 1, 0, 0, 0, 0, 0, 0)
    for side, labels in ((8, None), (8, [0, 1, 2, 10]), (12, [0, 1, 2, 3])):
        with pytest.raises(MismatchError, match="choose data that fits, such as 'digits'"):
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


def test_the_command_line_takes_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_zip(tmp_path / "x.zip", members(random_images(20, 8, 1), [k % 10 for k in range(20)]))
    estimate = ["estimate-coeffs", "--teacher", "digits", "--samples", "16", "--timesteps", "4", "--data"]
    assert run([*estimate, "x.zip", "--out", "held.safetensors"]) == 0
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setattr("cdistill.data.memory.memory_limit", lambda: 0)
    assert run([*estimate, str(tmp_path / "x.zip"), "--out", "mapped.safetensors"]) == 0
    assert (tmp_path / "held.safetensors").read_bytes() == (tmp_path / "mapped.safetensors").read_bytes()
    write_zip(tmp_path / "bad.zip", {**FILES, FIRST: b"hello"})
    capsys.readouterr()
    for path, code, words in (("none.zip", 3, "no such file"), ("bad.zip", 4, "not a valid image")):
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
    assert run(fast_distill(tmp_path / "run", *sets, recipe="digits-paper")) == 0
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "here" / "x.zip") in (tmp_path / "run" / "recipe.resolved.toml").read_text()
    assert run(["evaluate", "--run", "run", "--nfe", "1", "--samples", "16"]) == 0
