"""One model as the API sees it: two ways to generate, prompts, defaults. Knows neither HTTP nor Ray.

The effective settings of a request, the bundle's defaults under its own, decide who generates: the engine, or the lane
where the bundle asks for something that continuous batching cannot do.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Self

from heliostat.evaluation.prefix import PromptPrefix
from heliostat.models.base import InferenceModel
from heliostat.serving.calls import Delta
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import Engine
from heliostat.serving.lane import Lane
from heliostat.serving.prompts import PromptEncoder
from heliostat.serving.sampling import DecodingDefaults, SamplingParams


@dataclass(frozen=True)
class ServedModel:
    """A running engine, the lane beside it if the bundle needs one, and what the API needs to know of the model."""

    id: str
    engine: Engine
    lane: Lane | None
    prompts: PromptEncoder
    defaults: DecodingDefaults

    @classmethod
    async def start(cls, loaded: InferenceModel, model_id: str, args: EndpointArgs) -> Self:
        """Start what the model needs on the running event loop. Sizes are those of `args`.

        Raises:
            ModelError: the bundle asks for what cannot be decoded, or the model cannot be run.
            ResourceError: the engine's cache does not fit into memory.
        """
        defaults = DecodingDefaults.of(loaded.model.generation_config)
        engine = engine_of(loaded, args)
        lane = _lane(loaded, args) if defaults.extra else None
        await engine.start()
        if lane is not None:
            try:
                await lane.start(_trials(defaults))
            except BaseException:
                engine.close()
                raise
        prompts = PromptEncoder(loaded.tokenizer, engine.max_length, PromptPrefix.of(loaded.manifest))
        return cls(model_id, engine, lane, prompts, defaults)

    @property
    def healthy(self) -> bool:
        """Whether all generation threads are alive and take requests."""
        return self.engine.healthy and (self.lane is None or self.lane.healthy)

    @property
    def in_flight(self) -> int:
        """Generations that are waiting or running."""
        return self.engine.in_flight + (self.lane.in_flight if self.lane else 0)

    @property
    def max_length(self) -> int:
        """Tokens that prompt and completion of one request may have together."""
        return self.engine.max_length

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what could not be generated.

        Raises:
            InvalidRequest: see `Engine.check`; the same holds for the lane.
        """
        self.engine.check(prompt_ids, params)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[Delta]:
        """Generate from `prompt_ids` with `params`, which come from `defaults.params`; see `Engine.generate`.

        Raises:
            InvalidRequest: see `check`.
            EngineFailed: generation stopped before the last delta.
        """
        self.check(prompt_ids, params)
        return (self.lane if self.lane and params.extra else self.engine).generate(prompt_ids, params)

    def close(self) -> None:
        """Stop all threads; requests in flight fail."""
        self.prompts.close()
        if self.lane is not None:
            self.lane.close()
        self.engine.close()


def engine_of(loaded: InferenceModel, args: EndpointArgs) -> Engine:
    """The model's engine with the sizes of `args`, not started."""
    return Engine(
        loaded.model,
        loaded.tokenizer,
        max_batch_tokens=args.max_batch_tokens,
        cache_tokens=args.cache_tokens,
        max_batch_requests=args.max_ongoing_requests,
        max_queued_tokens=args.max_queued_tokens,
    )


def _lane(loaded: InferenceModel, args: EndpointArgs) -> Lane:
    rows, tokens = args.max_ongoing_requests, args.cache_tokens
    return Lane(loaded.model, loaded.tokenizer, max_sequences=rows, max_batch_tokens=tokens)


def _trials(defaults: DecodingDefaults) -> list[SamplingParams]:
    """The settings as the bundle has them, and as requests may change them: greedy, and sampled."""
    trials = [defaults.params(2, temperature=temperature) for temperature in (None, 0.0, 1.0)]
    return [params for params in trials if params.extra]
