"""A preconditioning as another package would bring it."""

from torch import Tensor

from cdistill.preconditionings import Preconditioning


class Halved(Preconditioning):
    """f = (s/t)^2, g = 1 - (s/t)^2."""

    def f_and_g(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        f = (s / t) ** 2
        return f, 1 - f
