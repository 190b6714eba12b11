"""Data sources: arrays of samples with their labels; images are uint8 and come out in [-1, 1]."""

from cdistill.data.source import Source, load_source

__all__ = ["Source", "load_source"]
