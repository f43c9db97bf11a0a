"""The `serving` section: what `heliostat serve` serves, and where."""

from pydantic import Field, PositiveInt

from heliostat.config import StrictModel


class EndpointArgs(StrictModel):
    """What one endpoint runs: the `args:` of a Ray Serve config. Names are Ray Serve's for Ray Serve things."""

    model: str | None = None
    """models:/NAME@ALIAS, models:/NAME/VERSION, a bundle folder or a hub name; default: the config's own champion."""
    model_id: str | None = None
    """Name of the model in the OpenAI API; default: the registered name, or the folder's."""
    num_replicas: PositiveInt = 1
    num_cpus: float = Field(1, gt=0)
    """CPUs that Ray reserves for one replica."""
    num_gpus: float = Field(0, ge=0)
    max_constructor_retry_count: PositiveInt = 1
    """Attempts to load the model before the deployment counts as failed; more on a cluster with a shaky network."""
    max_ongoing_requests: PositiveInt = 32
    """Requests that one replica works on at once; more wait in Ray Serve."""
    max_batch_tokens: PositiveInt = 256
    """Tokens of one forward pass of the engine (prefill and decode together)."""
    cache_tokens: PositiveInt = 16384
    """Tokens of all requests together that the KV cache holds."""


class ServingConfig(EndpointArgs):
    """The endpoint, and the address at which this machine serves it."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
