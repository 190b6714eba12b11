"""The state of a training as named tensors: moving averages and the optimiser."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def update_ema(average: nn.Module, live: nn.Module, rate: float) -> None:
    """Moves `average` towards `live`: mu <- rate mu + (1 - rate) theta, all at once (Zheng et al. 2025, Eq. 28)."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - rate)


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Returns the optimiser's moments and counters as ``parameter.key`` -> tensor."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{names[parameter]}.{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`optimizer_tensors` returned, laid out as the parameters; step counters stay on the CPU."""
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for name, tensor in tensors.items():
        owner, key = name.rsplit(".", 1)
        parameter = parameters[owner]
        moment = key != "step"
        optimizer.state[parameter][key] = torch.empty_like(parameter.data).copy_(tensor) if moment else tensor.clone()
