"""The `registry` section: where runs are recorded and under which name models are registered."""

from heliostat.config import StrictModel


class RegistryConfig(StrictModel):
    """MLflow names. The server is MLFLOW_TRACKING_URI's; default: a sqlite file in the state folder."""

    experiment_name: str | None = None
    """Default: the config's name."""
    registered_model_name: str | None = None
    """Default: the config's name."""
    register_model: bool = True
    """Register the finished model as a new version with the alias `challenger`."""
