"""What a writer is.

A third party writes a subclass, names it in the entry-point group ``cdistill.writers`` and has it as ``--format``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cdistill.errors import CdistillError
from cdistill.sampling.sample_store import Batch


@dataclass(frozen=True)
class Samples:
    """Samples in the order of their seeds, read when they are asked for.

    Attributes:
        seeds: The seed of each (n,), int64.
        shape: Of one sample, (C, H, W) or (d,).
        labelled: Whether they have classes.
        read: Yields all, some hundreds at a time.
    """

    seeds: NDArray[np.int64]
    shape: tuple[int, ...]
    labelled: bool
    read: Callable[[], Iterator[Batch]]


class Writer(ABC):
    """One form of files.

    The same samples make the same bytes, whenever and wherever they are written; memory does not grow with the images,
    and under the final name there is never a half file.

    Attributes:
        suffix: Of the file's name; "" for a folder.
        vectors: Whether samples that are no images can be written.
        most: The largest number of samples, 0 for any.
    """

    suffix: ClassVar[str]
    vectors: ClassVar[bool] = False
    most: ClassVar[int] = 0

    @abstractmethod
    def write(self, path: Path, samples: Samples) -> None:
        """Writes all samples.

        Raises:
            DiskFullError: They did not fit.
        """

    def check(self, name: str, shape: tuple[int, ...], count: int) -> None:
        """Raises CdistillError if this is no form for `count` samples of `shape`; `name` is its own."""
        if len(shape) != 3 and not self.vectors:
            raise CdistillError(f"--format {name}: this network draws vectors, not pictures; use --format npz")
        if self.most and count > self.most:
            raise CdistillError(
                f"--format {name}: got {count:,} seeds; at most {self.most} are looked at in one picture; "
                "use --format png, zip, npz or tar"
            )
