"""One model as the API sees it: two ways to generate, prompts, defaults. Knows neither HTTP nor Ray.

The effective settings of a request, the bundle's defaults under its own, decide who generates: the engine, or the lane
where they ask for something that continuous batching cannot do.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Self

import torch

from heliostat.evaluation.completion import encode_prompt
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.models.base import InferenceModel
from heliostat.serving.calls import Delta, TokenLogprob
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import Engine, EngineState
from heliostat.serving.lane import Lane
from heliostat.serving.prompts import PromptEncoder
from heliostat.serving.sampling import DecodingDefaults, InvalidRequest, SamplingParams
from heliostat.serving.text import TokenTexts

CHECK_PROMPTS = "check_prompts"
"""Key of a bundle's manifest: texts that a new version answers before it takes requests (see parity.py)."""
TEXTS = (
    "Hello, how are you today?",
    "Once upon a time there was",
    "The capital of France is",
    "1, 2, 3, 4,",
    "def add(a, b):\n    return",
    "Dear Sir or Madam,",
    "Every Monday at nine o'clock",
    "Das ist ein kurzer Satz.",
)
"""What stands for them where a bundle names none."""


def check_prompts(loaded: InferenceModel) -> list[list[int]]:
    """The token ids of the texts that a model is checked with."""
    return [encode_prompt(loaded, text) for text in (loaded.manifest or {}).get(CHECK_PROMPTS) or TEXTS]


@dataclass(frozen=True)
class ServedModel:
    """A running engine, the lane beside it, and what the API needs to know of the model."""

    id: str
    engine: Engine
    lane: Lane
    prompts: PromptEncoder
    defaults: DecodingDefaults
    texts: TokenTexts
    check_prompts: list[list[int]]
    """Token ids."""
    cache_tokens: int
    dtype: torch.dtype

    @classmethod
    async def start(cls, loaded: InferenceModel, model_id: str, args: EndpointArgs) -> Self:
        """Start what the model needs on the running event loop. Sizes are those of `args`.

        Raises:
            ModelError: the bundle asks for what cannot be decoded, or the model cannot be run.
            ResourceError: the engine's cache does not fit into memory.
        """
        defaults = DecodingDefaults.of(loaded.model.generation_config)
        engine, beside = _engine(loaded, args), lane(loaded, args)
        await engine.start()
        try:
            await beside.start(trials(defaults))
        except BaseException:
            engine.close()
            raise
        return cls(
            id=model_id,
            engine=engine,
            lane=beside,
            prompts=PromptEncoder(loaded.tokenizer, engine.max_length, PromptPrefix.of(loaded.manifest)),
            defaults=defaults,
            texts=TokenTexts(loaded.tokenizer),
            check_prompts=check_prompts(loaded),
            cache_tokens=args.cache_tokens,
            dtype=loaded.model.dtype,
        )

    @property
    def healthy(self) -> bool:
        """Whether all generation threads are alive and take requests."""
        return self.engine.healthy and self.lane.healthy

    @property
    def in_flight(self) -> int:
        """Generations that are waiting or running."""
        return self.engine.in_flight + self.lane.in_flight

    @property
    def max_length(self) -> int:
        """Tokens that prompt and completion of one request may have together."""
        return self.engine.max_length

    def state(self) -> EngineState:
        """How the two are doing; the cache is the engine's."""
        state, running = self.engine.state(), self.lane.running
        waiting = self.lane.in_flight - running
        return replace(state, running=state.running + running, waiting=state.waiting + waiting)

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Refuse what the model cannot read; see `Engine.check_prompt`."""
        self.engine.check_prompt(prompt_ids)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what could not be generated.

        Raises:
            InvalidRequest: see `Engine.check`, the same holds for the lane; or the beams, more than the bundle's own,
                do not fit into as many tokens as the cache has.
        """
        self.engine.check(prompt_ids, params)
        beams = params.extra.get("num_beams", 1)
        tokens = beams * (len(prompt_ids) + params.max_tokens)
        if beams > self.defaults.extra.get("num_beams", 1) and tokens > self.cache_tokens:
            raise InvalidRequest(
                f"{beams} beams of {len(prompt_ids)} tokens and {params.max_tokens} more are over the limit of "
                f"{self.cache_tokens} tokens; lower `num_beams` or `max_tokens`",
                "num_beams",
            )

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, emitted: Sequence[int] = ()
    ) -> AsyncGenerator[tuple[int, Delta]]:
        """Generate from `prompt_ids` with `params`, which come from `defaults.params`; see `Engine.generate`.

        Yields the number of the completion, 0 to `params.sequences` - 1, and what was added to it. `emitted` belongs to
        the only one: several come whole, or not at all.

        Raises:
            InvalidRequest: see `check`.
            Overloaded: too much waits; nothing was begun.
            EngineFailed: generation stopped before the last delta.
        """
        self.check(prompt_ids, params)
        if params.sequences > 1:
            for number, delta in enumerate(await self.lane.generate_many(prompt_ids, params)):
                yield number, delta
            return
        runner = self.lane if params.extra else self.engine
        async with aclosing(runner.generate(prompt_ids, params, emitted)) as deltas:
            async for delta in deltas:
                yield 0, delta

    async def score(self, prompt_ids: Sequence[int], top: int) -> list[TokenLogprob | None]:
        """Log-probabilities of the prompt's own tokens, with the `top` likeliest in each place; None for the first.

        Raises:
            InvalidRequest: see `check_prompt`.
            Overloaded: too much waits.
            EngineFailed: the lane is down, or it failed on this prompt.
        """
        self.check_prompt(prompt_ids)
        records = await self.lane.score(prompt_ids, top)
        return [record and self.texts.logprob(record) for record in records]

    def close(self) -> None:
        """Stop all threads; requests in flight fail."""
        self.prompts.close()
        self.lane.close()
        self.engine.close()


def _engine(loaded: InferenceModel, args: EndpointArgs) -> Engine:
    return Engine(
        loaded.model,
        loaded.tokenizer,
        max_batch_tokens=args.max_batch_tokens,
        cache_tokens=args.cache_tokens,
        max_batch_requests=args.max_ongoing_requests,
        max_queued_tokens=args.max_queued_tokens,
    )


def lane(loaded: InferenceModel, args: EndpointArgs) -> Lane:
    """The lane of a model, not started."""
    return Lane(
        loaded.model,
        loaded.tokenizer,
        max_sequences=args.max_ongoing_requests,
        max_batch_tokens=args.cache_tokens,
        max_queued_tokens=args.max_queued_tokens,
    )


def trials(defaults: DecodingDefaults) -> list[SamplingParams]:
    """The settings as the bundle has them, and as requests may change them: greedy, and sampled."""
    trials = [defaults.params(2, temperature=temperature) for temperature in (None, 0.0, 1.0)]
    return [params for params in trials if params.extra]
