"""Small data sets in files, made at test time."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = "dataset.json"


def random_images(count: int, side: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 (count, channels, side, side)."""
    return np.random.RandomState(seed).randint(0, 256, (count, channels, side, side), dtype=np.uint8)


def encode(image: np.ndarray, form: str = "PNG") -> bytes:
    """One image (C, H, W) as a file's content."""
    content = io.BytesIO()
    pixels = image.transpose(1, 2, 0)
    Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels).save(content, form)
    return content.getvalue()


def members(images: np.ndarray, labels: Sequence[object] | None) -> dict[str, bytes]:
    """Names and contents as EDM packs them."""
    names = [f"{k // 1000:05d}/img{k:08d}.png" for k in range(len(images))]
    table = None if labels is None else [list(pair) for pair in zip(names, labels, strict=True)]
    found = {name: encode(image) for name, image in zip(names, images, strict=True)}
    return {**found, LABELS: json.dumps({"labels": table}).encode()}


def write_zip(path: Path, content: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Packs files; dates are fixed."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return path


def write_folder(path: Path, content: Mapping[str, bytes]) -> Path:
    """Writes files into a folder."""
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_tar(path: Path, content: Mapping[str, bytes]) -> Path:
    """Packs files into a .tar.gz."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def python2_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    """A batch of CIFAR-10's Python edition as Python 2 pickled it (protocol 2, every text a byte string)."""

    def text(content: bytes) -> bytes:
        return b"U" + bytes([len(content)]) + content if len(content) < 256 else b"T" + _int(len(content)) + content

    raw = images.tobytes()
    kind = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\0K\1\x87R(K\3"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    array += b"(K\1J" + _int(len(images)) + b"J" + _int(images[0].size) + b"\x86" + kind + b"\x89" + text(raw) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([k]) for k in labels.tolist()) + b"e"
    entries = text(b"data") + array + text(b"labels") + numbers + text(b"batch_label") + text(b"training batch 1 of 5")
    return b"\x80\2}(" + entries + b"u."


def python3_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The same written by Python 3."""
    return python3_pickle({b"data": images.reshape(len(images), -1), b"labels": labels.tolist()})


def python3_pickle(value: object) -> bytes:
    """Any value, pickled."""
    import pickle  # noqa: TID251

    return pickle.dumps(value, protocol=2)


def cifar_python(
    images: np.ndarray, labels: np.ndarray, test: int, batch: Callable[[np.ndarray, np.ndarray], bytes]
) -> dict[str, bytes]:
    """The Python edition, see `cifar_binary`."""
    parts = zip(np.array_split(images[:-test], 5), np.array_split(labels[:-test], 5), strict=True)
    found = {f"data_batch_{k + 1}": batch(*part) for k, part in enumerate(parts)}
    found["test_batch"] = batch(images[-test:], labels[-test:])
    return {f"cifar-10-batches-py/{name}": data for name, data in found.items()}


def _int(value: int) -> bytes:
    return value.to_bytes(4, "little")


def cifar_binary(images: np.ndarray, labels: np.ndarray, test: int) -> dict[str, bytes]:
    """The binary edition: the last `test` images are held out, the others divided among five batches."""
    records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], 1)
    parts = np.array_split(records[:-test], 5)
    found = {f"data_batch_{k + 1}.bin": part.tobytes() for k, part in enumerate(parts)}
    found |= {"test_batch.bin": records[-test:].tobytes(), "batches.meta.txt": b"airplane\n"}
    return {f"cifar-10-batches-bin/{name}": data for name, data in found.items()}
