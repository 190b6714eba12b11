"""Samples as metrics see them: quantised images, their features, their distances to the teacher."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.evaluation.features import FeatureNetwork, Pixels
from cdistill.runtime import signals as stopping
from cdistill.runtime.console import progress

_AT_ONCE = 64  # images that a feature network sees; fixed, because the number alone changes the last bits


@dataclass(frozen=True)
class SampleSet:
    """Samples of a list of seeds, in its order.

    Attributes:
        samples: uint8 images (n, C, H, W), quantised as they would be stored, or float64 vectors (n, d).
        errors: Mean square distance of each to the end of the teacher's trajectory from the same noise (n,), float64,
            before quantisation; None without a teacher.
        accelerator: Shares the work of feature networks among its processes.
    """

    samples: Tensor
    errors: Tensor | None = None
    accelerator: Accelerator | None = None
    _found: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def features(self, network: FeatureNetwork) -> Tensor:
        """Returns the features (n, d), float32 on the CPU, of all samples; computed once."""
        if network.name not in self._found:
            self._found[network.name] = extract(network, self.samples, self.accelerator)
        return self._found[network.name]


def extract(network: FeatureNetwork, samples: Tensor, accelerator: Accelerator | None = None) -> Tensor:
    """Returns what `network` makes of all samples (n, d), float32 on the CPU, with a progress bar.

    Every process takes its turn at blocks of a fixed size, and returns everything.

    Raises:
        StoppedError: A signal came.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    starts = range(0, len(samples), _AT_ONCE)
    found: Tensor | None = None
    shown = (
        nullcontext(_silent)
        if isinstance(network, Pixels)
        else progress(len(samples), f"features ({network.name})", "img")
    )
    with shown as advance:
        for number, start in enumerate(starts):
            stopping.check("evaluation")
            part = samples[start : start + _AT_ONCE]
            if found is None or number % world == rank:
                features = network(part).float().cpu()
            if found is None:
                found = torch.zeros(len(samples), features.shape[1])
            if number % world == rank:
                found[start : start + len(part)] = features
            advance(len(part), "")
    if found is None:
        raise ValueError("no samples")
    if accelerator is not None and world > 1:
        found = accelerator.reduce(found.to(accelerator.device), "sum").cpu()
    return found


def _silent(count: int, note: str) -> None:
    """Shows no progress of what takes no time."""
