"""Section of a recipe about the estimation of l and s."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cdistill.registry import ESTIMATORS
from cdistill.settings import Positive, Section, known

SMOOTHED = 5  # points that a smoothing spline needs


def _known_estimator(name: str) -> str:
    """Checks the name of an estimator; "auto" passes."""
    return name if name == "auto" else known(ESTIMATORS)(name)


class EstimationSection(Section):
    """How l and s are estimated (Zheng et al. 2025, Appendix B.1); "auto" is what suits the teacher or the device.

    With `target_error`, a noise level stops as soon as the standard errors of l and s are that small, and `samples` is
    the most that it may take.
    """

    estimator: Annotated[str, AfterValidator(_known_estimator)] = "auto"
    grid: Literal["log-uniform", "rho"] = "log-uniform"
    timesteps: Annotated[int, Field(ge=3)] = 120
    samples: Annotated[int, Field(ge=4, multiple_of=2)] = 4096
    seed: Annotated[int, Field(ge=0)] = 0
    target_error: Positive | None = None
    smoothing: Literal["none", "spline"] = "none"
    precision: Literal["auto", "fp32", "fp16"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> "EstimationSection":
        if self.smoothing != "none" and self.timesteps < SMOOTHED:
            raise ValueError(f"smoothing: needs {SMOOTHED} timesteps or more, got {self.timesteps}")
        return self
