"""The `registry` and `promotion` sections: where runs and models are recorded, and what a champion must prove."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from heliostat.config import StrictModel


class RegistryConfig(StrictModel):
    """MLflow names. The server is MLFLOW_TRACKING_URI's; default: a sqlite file in the state folder."""

    experiment_name: str | None = None
    """Default: the config's name."""
    registered_model_name: str | None = None
    """Default: the config's name."""
    register_model: bool = True
    """Register the finished model as a new version with the alias `challenger`."""
    check_prompts: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, max_length=32)
    """Texts that a version answers before the endpoint lets it in. They become part of the bundle; default: a few of
    the endpoint's own."""


class Gate(StrictModel):
    """A recorded score that must not be worse than the champion's by more than the tolerance."""

    metric: str
    mode: Literal["max", "min"] = "max"
    tolerance: NonNegativeFloat = 0.0


class PromotionConfig(StrictModel):
    """What `heliostat promote` asks of a version beside an undamaged bundle."""

    gates: list[Gate] = Field(default_factory=list)
    no_regression: list[str] = Field(default_factory=list)
    """Metrics where higher is better that must not be worse than the champion's at all."""
    parity_prompts: NonNegativeInt = 0
    """Prompts on which the endpoint's engine must give the tokens of `generate()`."""
