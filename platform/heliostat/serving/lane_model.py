"""One model that only `generate()` can run, behind the interface of served.ServedModel. Knows neither HTTP nor Ray.

Continuous batching has no place for virtual tokens (prefix and prompt tuning) or for an encoder, so all requests go
through the lane: batched, and each answered in one piece.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Self

from heliostat.errors import GateRefused
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.models.base import InferenceModel
from heliostat.serving.bounds import Bounds, positions
from heliostat.serving.calls import Delta, TokenLogprob
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import EngineFailed, EngineState
from heliostat.serving.lane import Lane
from heliostat.serving.prompts import PromptEncoder
from heliostat.serving.sampling import DecodingDefaults, InvalidRequest, SamplingParams
from heliostat.serving.served import check_prompts, lane, trials
from heliostat.serving.text import TokenTexts

_TRIAL_TOKENS = 8


@dataclass(frozen=True)
class LaneModel:
    """A running lane, and what the API needs to know of its model."""

    id: str
    lane: Lane
    prompts: PromptEncoder
    defaults: DecodingDefaults
    texts: TokenTexts
    bounds: Bounds
    check_prompts: list[list[int]]
    """Token ids."""
    is_encoder_decoder: bool

    @classmethod
    async def start(cls, loaded: InferenceModel, model_id: str, args: EndpointArgs) -> Self:
        """Start the lane on the running event loop. Sizes are those of `args`.

        Raises:
            ModelError: the bundle asks for what cannot be decoded, or the model cannot be run.
        """
        model = loaded.model
        defaults = DecodingDefaults.of(model.generation_config)
        length = min(positions(model.config), args.cache_tokens)
        started = lane(loaded, args)
        await started.start(trials(defaults))
        return cls(
            id=model_id,
            lane=started,
            prompts=PromptEncoder(
                loaded.tokenizer, length, PromptPrefix.of(loaded.manifest), whole=model.config.is_encoder_decoder
            ),
            defaults=defaults,
            texts=TokenTexts(loaded.tokenizer),
            bounds=Bounds(model.get_input_embeddings().weight.shape[0], length),
            check_prompts=check_prompts(loaded),
            is_encoder_decoder=model.config.is_encoder_decoder,
        )

    @property
    def healthy(self) -> bool:
        """Whether the lane's thread is alive and takes requests."""
        return self.lane.healthy

    @property
    def in_flight(self) -> int:
        """Generations that are waiting or running."""
        return self.lane.in_flight

    @property
    def max_length(self) -> int:
        """Tokens that prompt and completion of one request may have together."""
        return self.bounds.max_length

    def state(self) -> EngineState:
        """How many generations there are; there is no cache between requests."""
        running = self.lane.running
        return EngineState(running, self.lane.in_flight - running, 0.0, 0, 0, 0)

    async def try_out(self, prompts: Sequence[Sequence[int]] | None = None) -> None:
        """Answer each prompt (token ids; default: the check prompts). Nothing is compared: the lane is `generate()`.

        Raises:
            GateRefused: it cannot.
        """
        try:
            for prompt in self.check_prompts if prompts is None else prompts:
                async for _ in self.generate(prompt[: self.max_length - _TRIAL_TOKENS], SamplingParams(_TRIAL_TOKENS)):
                    pass
        except (EngineFailed, InvalidRequest) as error:
            raise GateRefused(f"{self.id}: the model does not answer a check prompt: {error}") from error

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Refuse what the model cannot read; see `Bounds.check_prompt`."""
        self.bounds.check_prompt(prompt_ids)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what could not be generated.

        Raises:
            InvalidRequest: see `Bounds.check`; or the lane does not have a setting.
        """
        self.bounds.check(prompt_ids, params)
        for name, asked in (
            ("logprobs", params.logprobs is not None),
            ("presence_penalty", params.presence_penalty != 0),
            ("frequency_penalty", params.frequency_penalty != 0),
        ):
            if asked:
                raise InvalidRequest(
                    f"`{name}` cannot be had of this model, which continuous batching cannot run",
                    name,
                    "unsupported_parameter",
                )

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, emitted: Sequence[int] = ()
    ) -> AsyncGenerator[tuple[int, Delta]]:
        """See `ServedModel.generate`; each completion is one delta."""
        self.check(prompt_ids, params)
        if params.sequences > 1:
            for number, delta in enumerate(await self.lane.generate_many(prompt_ids, params)):
                yield number, delta
            return
        async for delta in self.lane.generate(prompt_ids, params, emitted):
            yield 0, delta

    async def score(self, prompt_ids: Sequence[int], top: int) -> list[TokenLogprob | None]:
        """See `ServedModel.score`.

        Raises:
            InvalidRequest: it has an encoder, which predicts nothing.
        """
        self.check_prompt(prompt_ids)
        if self.is_encoder_decoder:
            raise InvalidRequest("this model has an encoder, which gives prompts no log-probabilities", "logprobs")
        records = await self.lane.score(prompt_ids, top)
        return [record and self.texts.logprob(record) for record in records]

    def close(self) -> None:
        """Stop all threads; requests in flight fail."""
        self.prompts.close()
        self.lane.close()
