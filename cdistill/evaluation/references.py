"""stub"""
from pathlib import Path
from accelerate import Accelerator
from torch import Tensor
from cdistill.data import Source
from cdistill.evaluation.features import FeatureNetwork
from cdistill.evaluation.frechet import streamed_moments


class Reference:
    """stub."""

    def __init__(self, source: Source | None, stats: Path | None = None, accelerator: Accelerator | None = None) -> None:
        self.source, self.stats = source, stats
        self._m: dict[str, tuple[Tensor, Tensor]] = {}

    def moments(self, network: FeatureNetwork) -> tuple[Tensor, Tensor]:
        """stub."""
        if network.name not in self._m:
            self._m[network.name] = streamed_moments(network(part) for part in self.source.chunks(4096))
        return self._m[network.name]

    def digest(self) -> str:
        """stub."""
        return self.source.digest
