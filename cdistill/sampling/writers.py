"""Output formats: one class for each ``--format``.

A third party writes a subclass of :class:`Writer`, names it in the entry-point group ``cdistill.writers`` and has it as
``--format``.
"""

import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import override

from cdistill.errors import CdistillError
from cdistill.sampling.image_grids import tile
from cdistill.sampling.sample_store import Batch
from cdistill.storage.files import disk_full, replacing

_READABLE = 0o644
_PICTURE = re.compile(r"\d{6,}\.png")


@dataclass(frozen=True)
class Samples:
    """Samples of one `shape` in the order of their `seeds` (n,), read when asked for, some hundreds at a time."""

    seeds: NDArray[np.int64]
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Batch]]


class Writer(ABC):
    """One output format.

    The same samples make the same bytes, whenever and wherever they are written; memory does not grow with the images,
    and under the final name there is never an incomplete file.
    """

    suffix: ClassVar[str]  # of the file's name; "" for a folder
    vectors: ClassVar[bool] = False  # whether samples that are no images can be written
    most: ClassVar[int] = 0  # the largest number of samples, 0 for any

    @abstractmethod
    def write(self, path: Path, samples: Samples) -> None:
        """Writes all samples; DiskFullError if they do not fit."""

    def others(self, path: Path, seeds: Sequence[int]) -> list[str]:
        """Returns what lies at `path` and would stay there beside the samples of `seeds`."""
        return []

    def check(self, name: str, shape: tuple[int, ...], count: int) -> None:
        """Raises CdistillError if `count` samples of `shape` cannot be written; `name` is the format's own."""
        if len(shape) != 3 and not self.vectors:
            raise CdistillError(f"--format {name}: this network draws vectors, not pictures; use --format npz")
        if self.most and count > self.most:
            raise CdistillError(
                f"--format {name}: got {count:,} seeds; one picture shows at most {self.most}; "
                "use --format png, zip, npz or tar"
            )


class GridWriter(Writer):
    """One PNG to look at, row by row, small images enlarged."""

    suffix: ClassVar[str] = ".png"
    most: ClassVar[int] = 400

    @override
    def write(self, path: Path, samples: Samples) -> None:
        images = np.concatenate([batch.samples for batch in samples.read()])
        with replacing(path) as temporary:
            tile(images).save(temporary, "PNG")


class FolderWriter(Writer):
    """``SEED.png``, six digits, in one folder: what EDM's generate.py writes, its fid.py and clean-fid read.

    Where the folder exists already, its files are replaced one by one, and pictures of other seeds are removed.
    """

    suffix: ClassVar[str] = ""

    @override
    def others(self, path: Path, seeds: Sequence[int]) -> list[str]:
        names = {f"{seed:06d}.png" for seed in seeds}
        return sorted(file.name for file in os.scandir(path) if file.name not in names) if path.is_dir() else []

    @override
    def write(self, path: Path, samples: Samples) -> None:
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            with disk_full(path):
                temporary.mkdir(parents=True)
                for batch in samples.read():
                    for seed, image in zip(samples.seeds[batch.start :].tolist(), batch.samples, strict=False):
                        (temporary / f"{seed:06d}.png").write_bytes(encode_png(image))
                os.sync()
                if path.is_dir():
                    for name in self.others(path, samples.seeds.tolist()):
                        if is_picture_of_seed(name):
                            (path / name).unlink()
                _move(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_picture_of_seed(name: str) -> bool:
    """Whether a file is called as a `FolderWriter` calls its pictures."""
    return bool(_PICTURE.fullmatch(name))


def _move(source: Path, target: Path) -> None:
    """Puts a folder in its place; into an existing one, file by file."""
    if not target.is_dir():
        source.rename(target)
        return
    for file in os.scandir(source):
        os.replace(file.path, target / file.name)


class ZipWriter(Writer):
    """``00000/img00000000.png`` and so on, stored, and ``dataset.json``: what EDM's dataset_tool.py makes.

    The numbers are positions in the list of seeds. `load_source` reads it, as ``--data FILE.zip``. The archive's own
    directory is in memory until the end: 0.4 kB an image.
    """

    suffix: ClassVar[str] = ".zip"

    @override
    def write(self, path: Path, samples: Samples) -> None:
        labels: list[int] = []
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for batch in samples.read():
                for position, image in enumerate(batch.samples, batch.start):
                    archive.writestr(_member(_name(position)), encode_png(image))
                if batch.labels is not None:
                    labels += batch.labels.tolist()
            pairs = [[_name(position), label] for position, label in enumerate(labels)]
            archive.writestr(_member("dataset.json"), json.dumps({"labels": pairs or None}))


class TarWriter(Writer):
    """``SEED.png``, ``SEED.cls`` (the class, if there are any) for each seed, in their order: a WebDataset shard.

    Seeds have ten digits, so that names sort as numbers do.
    """

    suffix: ClassVar[str] = ".tar"

    @override
    def write(self, path: Path, samples: Samples) -> None:
        with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
            for batch in samples.read():
                for k, image in enumerate(batch.samples):
                    name = f"{int(samples.seeds[batch.start + k]):010d}"
                    _add(archive, f"{name}.png", encode_png(image))
                    if batch.labels is not None:
                        _add(archive, f"{name}.cls", str(int(batch.labels[k])).encode())


class ArrayWriter(Writer):
    """One .npz: ``arr_0`` for images, ``samples`` for vectors, ``seeds``, and ``labels`` if there are any.

    ``arr_0`` is uint8 (n, H, W, C), which ADM's evaluator.py wants and `load_source` reads, as ``--data FILE.npz``;
    ``samples`` is float64 (n, d).
    """

    suffix: ClassVar[str] = ".npz"
    vectors: ClassVar[bool] = True

    @override
    def write(self, path: Path, samples: Samples) -> None:
        images = len(samples.shape) == 3
        shape = (*samples.shape[1:], samples.shape[0]) if images else samples.shape
        header = {"descr": "|u1" if images else "<f8", "fortran_order": False, "shape": (len(samples.seeds), *shape)}
        labels: list[NDArray[Any]] = []
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open(_member(f"{'arr_0' if images else 'samples'}.npy"), "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                for batch in samples.read():
                    file.write((batch.samples.transpose(0, 2, 3, 1) if images else batch.samples).tobytes())
                    if batch.labels is not None:
                        labels.append(batch.labels)
            arrays = {"seeds": samples.seeds} | ({"labels": np.concatenate(labels)} if labels else {})
            for name, array in arrays.items():
                with archive.open(_member(f"{name}.npy"), "w") as file:
                    npy.write_array(file, array)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Returns a PNG file of one image (C, H, W), C = 1 or 3, stored without compression as EDM stores its images."""
    buffer = io.BytesIO()
    image = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _member(name: str) -> zipfile.ZipInfo:
    """Returns a member of a zip archive, stored, with the format's first time stamp."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, _READABLE << 16  # Unix, wherever we are
    return info


def _name(position: int) -> str:
    return f"{position // 1000:05d}/img{position:08d}.png"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.mode, info.size = _READABLE, len(content)
    archive.addfile(info, io.BytesIO(content))
    archive.getmembers().clear()  # or every header would stay in memory
