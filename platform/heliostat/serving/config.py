"""The `serving` section: what `heliostat serve` serves, and where. Knows values, not what is done with them."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from heliostat.config import StrictModel


class ModelArgs(StrictModel):
    """One model of an endpoint that serves several."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, a bundle folder or its URI, a hub name. An alias is followed."""
    model_id: str | None = Field(None, pattern=r"^[^@\s]{1,200}$")
    """Name of the model in the OpenAI API; default: the registered name, or the folder's."""


class AutoscalingArgs(StrictModel):
    """How the replicas of a model follow the load. Names and meanings are Ray Serve's."""

    min_replicas: NonNegativeInt = 1
    """0: nothing runs while nobody asks; the first request then waits until the model is loaded."""
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 8
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}")
        return self


class CanaryArgs(StrictModel):
    """How a new version takes over when the alias moves."""

    percent: float = Field(0, ge=0, lt=100)
    """Share of the requests that the new version gets at first; 0: it takes all at once when it is ready."""
    duration_s: PositiveFloat = 60
    min_requests: NonNegativeInt = 20
    """It stays a canary until it has answered so many, too."""
    max_error_rate: float = Field(0.02, ge=0, le=1)
    """Above this share of failed requests, traffic goes back to the old version, and the new one is rejected."""


class EndpointArgs(StrictModel):
    """What one endpoint runs: the `args:` of a Ray Serve config. Names are Ray Serve's for Ray Serve things."""

    model: str | None = None
    """models:/NAME@ALIAS, models:/NAME/VERSION, a bundle folder or its URI, a hub name; default: the champion."""
    model_id: str | None = Field(None, pattern=r"^[^@\s]{1,200}$")
    """Name of the model in the OpenAI API; default: the registered name, or the folder's."""
    models: list[ModelArgs] = Field(default_factory=list)
    """More models behind the same endpoint."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: transformers' continuous batching, or vLLM (the extra `heliostat[vllm]`; see docs/vllm.md)."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """vLLM's own engine arguments, as ray.serve.llm takes them; only with `engine: vllm`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights, cache and arithmetic; auto: float32 on CPUs, the stored one on GPUs."""

    num_replicas: PositiveInt = 1
    """Replicas of each model; `autoscaling` replaces it."""
    max_replicas_per_node: PositiveInt | None = None
    """Replicas of one version, and gateways, that one node may have; default: any number. 1: each on a node of its own,
    and what has no node of its own waits for one."""
    autoscaling: AutoscalingArgs | None = None
    num_cpus: float = Field(1, gt=0)
    """CPUs that Ray reserves for one replica."""
    num_gpus: float = Field(0, ge=0)
    max_constructor_retry_count: PositiveInt = 1
    """Attempts to load the model before a version counts as broken; more on a cluster with a shaky network."""
    max_ongoing_requests: PositiveInt = 32
    """Requests that one replica works on at once."""
    max_queued_requests: PositiveInt = 64
    """Requests that wait in each gateway while all replicas are busy; more are refused with 503."""
    max_batch_tokens: PositiveInt = 256
    """Tokens of one forward pass of the engine (prefill and decode together)."""
    cache_tokens: PositiveInt = 16384
    """Tokens of all requests together that the KV cache holds."""
    max_queued_tokens: PositiveInt = 131072
    """Tokens (prompts and what they ask for) that may wait in one replica; more are refused with 503."""

    poll_s: PositiveFloat = 5
    """How often the registry is asked where the alias points."""
    startup_timeout_s: PositiveFloat = 1800
    """A version that is not loaded by then, for want of room in the cluster perhaps, is given up."""
    canary: CanaryArgs = CanaryArgs()
    request_timeout_s: PositiveFloat = 600
    """A request that takes longer ends with an error."""
    drain_timeout_s: PositiveFloat = 600
    """What a replica works on gets this long to finish when it is stopped or its version replaced."""

    gateways: PositiveInt = 1
    """Processes that answer HTTP: they check keys and requests, and pass on to the replicas."""
    api_keys: str | None = None
    """File of API keys (`heliostat keys add FILE NAME`); without, everybody who reaches the endpoint may use it."""
    insecure: bool = False
    """Listen on any host without API keys: everybody who reaches it may use it."""
    max_body_bytes: int = Field(4 << 20, ge=1, le=32 << 20)
    max_prompt_tokens: PositiveInt | None = None
    """Longer prompts are refused, even where the model could take them."""
    playground: bool = True
    """Serve the page at `/`."""
    tracing: bool = False
    """Send OpenTelemetry traces; where to is said by the standard variables OTEL_EXPORTER_OTLP_ENDPOINT and so on."""

    @model_validator(mode="after")
    def _settings_of_the_engine(self) -> Self:
        if self.engine == "vllm" and self.max_replicas_per_node:
            raise ValueError("`max_replicas_per_node` is of `engine: transformers`; vLLM's are placed by GPUs")
        if self.engine == "transformers" and self.engine_kwargs:
            raise ValueError("`engine_kwargs` are vLLM's; they need `engine: vllm`")
        for name in ("max_batch_tokens", "cache_tokens"):
            if self.engine == "vllm" and getattr(self, name) != EndpointArgs.model_fields[name].default:
                raise ValueError(
                    f"`{name}` is of `engine: transformers`; vLLM has max_num_batched_tokens and "
                    "gpu_memory_utilization among its `engine_kwargs`"
                )
        return self

    def all_models(self) -> list[ModelArgs]:
        """`model` and `models` together."""
        first = [ModelArgs(model=self.model, model_id=self.model_id)] if self.model else []
        return [*first, *self.models]


class ServingConfig(EndpointArgs):
    """The endpoint, and the address at which this machine serves it."""

    host: str = "127.0.0.1"
    """Other than this machine itself only with `api_keys`, or with `insecure`."""
    port: int = Field(8000, ge=1, le=65535)
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    @model_validator(mode="after")
    def _whole_certificate(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("give both `ssl_certfile` and `ssl_keyfile`, or neither")
        return self
