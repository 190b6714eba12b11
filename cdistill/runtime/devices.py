"""What a device can do: take tensors without waiting, compile networks."""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from cdistill.errors import RecipeError
from cdistill.runtime.console import say


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Moves a tensor to the device without waiting for it: to a GPU from memory that the system leaves in its place."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


# With and without a gradient to weights or input, training or not, one sample or many: a training with the GAN loss has
# 7 of them, and with more than torch's limit of 8 a network would run uncompiled.
_FORMS = 32


@cache
def compiles(wanted: bool | Literal["auto"], kind: str) -> bool:
    """Whether networks are compiled on a kind of device: where it is asked for; with "auto" on a GPU with a compiler.

    With "auto" a network that cannot be compiled runs as it is, and torch logs why. ``TORCH_COMPILE_DISABLE=1`` in
    the environment compiles nothing. Compiled networks have the dropout masks of uncompiled ones, since the two
    networks of an objective share masks.

    Raises:
        RecipeError: It is asked for, and there is no compiler that works.
    """
    if not wanted or (wanted == "auto" and kind != "cuda"):
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=kind))
    except Exception as error:  # compilers have errors of many classes
        reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]
        if wanted != "auto":
            raise RecipeError(f"training.compile: nothing can be compiled here ({reason}); leave it out") from error
        say(f"networks run uncompiled, slower: nothing can be compiled here ({reason})")
        return False
    if wanted == "auto":
        torch._dynamo.config.suppress_errors = True
    torch._inductor.config.fallback_random = True
    torch._dynamo.config.recompile_limit = _FORMS
    return True
