"""Section of a recipe about the estimation of l and s."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from cdistill.registry import ESTIMATORS
from cdistill.settings import Positive, Section, Seed


def _known_estimator(name: str) -> str:
    """Checks the name of an estimator; "auto" passes."""
    return name if name == "auto" else ESTIMATORS.check(name)


class EstimationSection(Section):
    """How l and s are estimated (Zheng et al. 2025, Appendix B.1); "auto" is what suits the teacher or the device."""

    estimator: Annotated[str, AfterValidator(_known_estimator)] = Field(
        default="auto",
        description="autodiff (the paper's), forward (half its cost for the same errors), or auto: by teacher.",
    )
    grid: Literal["log-uniform", "rho"] = Field(
        default="log-uniform", description="Spacing of the noise levels: log-uniform or rho (EDM's)."
    )
    timesteps: int = Field(
        default=120,
        ge=3,
        le=10_000,
        description="Noise levels; fewer than 24 add an error that the error bars do not show.",
    )
    samples: int = Field(
        default=4096,
        ge=4,
        le=10**9,
        multiple_of=2,
        description="Samples at each noise level, even; with a target error, at most.",
    )
    seed: Seed = Field(default=0, description="Seed of the order of the data, the noise and the probes.")
    target_error: Positive | None = Field(
        default=None,
        description="Stop a noise level once the standard errors of l and s are this small; never by default.",
    )
    precision: Literal["auto", "fp32", "fp16"] = Field(
        default="auto",
        description="fp32, fp16 (from t = 0.01 on), or auto: fp16 for forward on a GPU, otherwise fp32.",
    )
    form: Literal["analytic", "least-squares"] = Field(
        default="analytic",
        description="analytic: l and s alone; least-squares: f and g themselves, too, along trajectories.",
    )
    fit_trajectories: int = Field(
        default=512, ge=32, le=10**6, description="Of least-squares: trajectories that f and g are fitted to."
    )

    @model_validator(mode="before")
    @classmethod
    def _of_version_0_1(cls, values: Any) -> Any:
        """Drops what recipes of version 0.1 wrote for no smoothing."""
        if isinstance(values, dict) and "smoothing" in values:
            if values["smoothing"] != "none":
                raise ValueError("smoothing: went with version 0.2, since it gained nothing; leave it out")
            values = {key: value for key, value in values.items() if key != "smoothing"}
        return values
