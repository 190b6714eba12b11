"""Small data sets in files, made at test time."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
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


def cifar_binary(images: np.ndarray, labels: np.ndarray, test: int) -> dict[str, bytes]:
    """The binary edition: the last `test` images are held out, the others divided among five batches."""
    records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], 1)
    parts = np.array_split(records[:-test], 5)
    found = {f"data_batch_{k + 1}.bin": part.tobytes() for k, part in enumerate(parts)}
    found |= {"test_batch.bin": records[-test:].tobytes(), "batches.meta.txt": b"airplane\n"}
    return {f"cifar-10-batches-bin/{name}": data for name, data in found.items()}
