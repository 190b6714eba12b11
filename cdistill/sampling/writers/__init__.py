"""Writers: the forms in which samples are written, one class for each ``--format``."""

from cdistill.sampling.writers.base import Samples, Writer

__all__ = ["Samples", "Writer"]
