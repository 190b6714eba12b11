"""NumPy archives."""

import io
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from cdistill.sampling.writers.base import Samples, Writer
from cdistill.storage.files import replacing


class ArrayWriter(Writer):
    """One .npz: ``arr_0`` for images, ``samples`` for vectors, ``seeds``, and ``labels`` if there are any.

    ``arr_0`` is uint8 (n, H, W, C), which ADM's evaluator.py wants and `load_source` reads, as ``--data FILE.npz``;
    ``samples`` is float64 (n, d).
    """

    suffix: ClassVar[str] = ".npz"
    vectors: ClassVar[bool] = True

    def write(self, path: Path, samples: Samples) -> None:
        """See :class:`Writer`."""
        count, images = len(samples.seeds), len(samples.shape) == 3
        labels = np.zeros(count if samples.labelled else 0, np.int64)
        shape = (*samples.shape[1:], samples.shape[0]) if images else samples.shape
        dtype = np.uint8 if images else np.float64
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open(_member("arr_0" if images else "samples"), "w", force_zip64=True) as file:
                file.write(_header((count, *shape), dtype))
                for batch in samples.read():
                    file.write((batch.samples.transpose(0, 2, 3, 1) if images else batch.samples).tobytes())
                    if batch.labels is not None:
                        labels[batch.start : batch.start + len(batch.labels)] = batch.labels
            for name, array in {"seeds": samples.seeds, "labels": labels}.items():
                if name == "seeds" or samples.labelled:
                    archive.writestr(_member(name), _header(array.shape, array.dtype) + array.tobytes())


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"{name}.npy")


def _header(shape: tuple[int, ...], dtype: DTypeLike) -> bytes:
    buffer = io.BytesIO()
    described = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(buffer, described)
    return buffer.getvalue()
