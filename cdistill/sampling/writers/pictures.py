"""Single PNG files, and one picture of all."""

import os
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from cdistill.data.source import from_uint8
from cdistill.formats.png import encode_png
from cdistill.runtime.console import say
from cdistill.sampling.image_grids import save_grid
from cdistill.sampling.writers.base import Samples, Writer
from cdistill.storage.files import disk_full, replacing


class GridWriter(Writer):
    """One PNG to look at, row by row, small images enlarged."""

    suffix: ClassVar[str] = ".png"
    most: ClassVar[int] = 400

    def write(self, path: Path, samples: Samples) -> None:
        """See :class:`Writer`."""
        images = np.concatenate([batch.samples for batch in samples.read()])
        with replacing(path) as temporary:
            save_grid(temporary, from_uint8(torch.from_numpy(images)))


class FolderWriter(Writer):
    """``SEED.png``, six digits, in one folder: what EDM's generate.py writes, its fid.py and clean-fid read.

    Other files in the folder stay.
    """

    suffix: ClassVar[str] = ""

    def write(self, path: Path, samples: Samples) -> None:
        """See :class:`Writer`; where the folder is there already, its files are replaced one by one."""
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            with disk_full(path):
                temporary.mkdir(parents=True)
                for batch in samples.read():
                    for seed, image in zip(samples.seeds[batch.start :].tolist(), batch.samples, strict=False):
                        (temporary / f"{seed:06d}.png").write_bytes(encode_png(image))
                os.sync()
                _move(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Puts a folder in its place; into one that is there, file by file."""
    if not target.is_dir():
        source.rename(target)
        return
    kept = {file.name for file in os.scandir(target)} - {file.name for file in os.scandir(source)}
    if kept:
        say(f"{target}: {len(kept)} other files stay in it")
    for file in os.scandir(source):
        os.replace(file.path, target / file.name)
