"""Zip archives as data sets, tar archives as WebDataset reads them. Every time stamp is the format's first."""

import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar

from cdistill.formats.png import encode_png
from cdistill.sampling.writers.base import Samples, Writer
from cdistill.storage.files import replacing

_READABLE = 0o644


class ZipWriter(Writer):
    """``00000/img00000000.png`` and so on, stored, and ``dataset.json``: what EDM's dataset_tool.py makes.

    The numbers are positions in the list of seeds. `load_source` reads it, as ``--data FILE.zip``. The archive's own
    directory is in memory until the end: 0.4 kB an image.
    """

    suffix: ClassVar[str] = ".zip"

    def write(self, path: Path, samples: Samples) -> None:
        """See :class:`Writer`."""
        labels: list[int] = []
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for batch in samples.read():
                for place, image in enumerate(batch.samples, batch.start):
                    archive.writestr(_member(_name(place)), encode_png(image))
                if batch.labels is not None:
                    labels += batch.labels.tolist()
            with archive.open(_member("dataset.json"), "w", force_zip64=True) as file:
                for text in _label_file(labels):
                    file.write(text.encode())


class TarWriter(Writer):
    """``SEED.png``, ``SEED.cls`` (the class, if there are any) for each seed, in their order: a WebDataset shard.

    Seeds have ten digits, so that names sort as numbers do.
    """

    suffix: ClassVar[str] = ".tar"

    def write(self, path: Path, samples: Samples) -> None:
        """See :class:`Writer`."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            for batch in samples.read():
                for k, image in enumerate(batch.samples):
                    name = f"{int(samples.seeds[batch.start + k]):010d}"
                    _add(file, f"{name}.png", encode_png(image))
                    if batch.labels is not None:
                        _add(file, f"{name}.cls", str(int(batch.labels[k])).encode())
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.write(bytes(-file.tell() % tarfile.RECORDSIZE))


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, _READABLE << 16  # Unix, wherever we are
    return info


def _name(place: int) -> str:
    return f"{place // 1000:05d}/img{place:08d}.png"


def _label_file(labels: list[int]) -> Iterator[str]:
    """Yields ``{"labels": [[name, class], ...]}``, or null without classes."""
    if not labels:
        yield '{"labels": null}'
        return
    yield '{"labels": ['
    for place, label in enumerate(labels):
        yield (", " if place else "") + json.dumps([_name(place), label])
    yield "]}"


def _add(file: BinaryIO, name: str, content: bytes) -> None:
    """Adds a member; `tarfile` itself would keep every header in memory, and make each one from nothing."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % len(content)
    header[148:154] = b"%06o" % (_SUM + sum(header[: len(name)]) + sum(header[124:135]))
    file.write(bytes(header) + content + bytes(-len(content) % tarfile.BLOCKSIZE))


def _template() -> tuple[bytes, int]:
    """Returns the header of an empty file without a name, and the sum of its bytes but for those of the size."""
    info = tarfile.TarInfo("")
    info.mode = _READABLE
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header, int(header[148:154], 8) - sum(header[124:135])


_HEADER, _SUM = _template()
