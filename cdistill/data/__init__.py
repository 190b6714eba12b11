"""Data sources: arrays of samples with their labels; images are uint8 and come out in [-1, 1].

Read `source` (what a source is), `loading` (a name or a path becomes a source), `named` (the registered data sets),
`labels`, `arrays` (.npz), `cifar` (CIFAR-10's own archives), `memory` (images that fit in memory, and others).
"""

from cdistill.data.loading import load_source
from cdistill.data.source import Source

__all__ = ["Source", "load_source"]
