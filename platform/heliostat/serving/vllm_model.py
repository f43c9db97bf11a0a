"""One model in vLLM, behind the same interface as served.ServedModel. Knows `ray.serve.llm`, neither HTTP nor routes.

vLLM turns tokens into tokens and no more: prompts are encoded and completions decoded, cut at stop strings and ended
here, so that a request means the same in both engines, and one that lost its replica goes on in another.
"""

import asyncio
import json
import logging
import sys
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from transformers import GenerationConfig

from heliostat.errors import ConfigError, GateRefused, HeliostatError, ModelError
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.models import base, bundle
from heliostat.models.base import InferenceModel
from heliostat.serving import vllm
from heliostat.serving.admission import Admission
from heliostat.serving.bounds import Bounds, positions
from heliostat.serving.calls import Delta, TokenLogprob
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import EngineFailed, EngineState, token_ids
from heliostat.serving.prompts import PromptEncoder
from heliostat.serving.sampler import Record
from heliostat.serving.sampling import DecodingDefaults, InvalidRequest, SamplingParams
from heliostat.serving.served import check_prompts
from heliostat.serving.text import Completion, TokenTexts

logger = logging.getLogger(__name__)
_HEALTH_S = 1.0
_TRIAL_TOKENS = 8
# How vLLM names a token in its log-probabilities when asked for ids.
_TOKEN = "token_id:"


@dataclass
class VllmModel:
    """A running vLLM engine, and what the API needs to know of its model."""

    id: str
    prompts: PromptEncoder
    defaults: DecodingDefaults
    texts: TokenTexts
    tokenizer: Any
    bounds: Bounds
    ends: frozenset[int]
    check_prompts: list[list[int]]
    admission: Admission
    server: Any
    """A ray.serve.llm.LLMServer that runs."""
    healthy: bool = True
    in_flight: int = 0
    _watching: "asyncio.Task[None] | None" = field(default=None, repr=False)

    @classmethod
    async def start(cls, source: str, model_id: str, args: EndpointArgs) -> Self:
        """Load the resolved model `source` into vLLM; it takes requests when this returns.

        Raises:
            ConfigError: vLLM is not installed, or does not know one of `engine_kwargs`.
            ModelError: the model cannot be run by vLLM, or decodes by default as vLLM cannot.
        """
        loaded, config, generation = await asyncio.to_thread(_read, source)
        defaults = DecodingDefaults.of(generation)
        if defaults.extra:
            raise ModelError(f"generation_config.json: {_not_here(min(defaults.extra))}; remove it there")
        length = int(args.engine_kwargs.get("max_model_len", positions(config)))
        stored = "float32" if args.num_gpus == 0 else str(config.dtype or "auto").removeprefix("torch.")
        kind = stored if args.dtype == "auto" else args.dtype
        started = cls(
            id=model_id,
            prompts=PromptEncoder(loaded.tokenizer, length, PromptPrefix.of(loaded.manifest)),
            defaults=defaults,
            texts=TokenTexts(loaded.tokenizer),
            tokenizer=loaded.tokenizer,
            bounds=Bounds(config.get_text_config().vocab_size, length),
            ends=token_ids(generation.eos_token_id),
            check_prompts=check_prompts(loaded),
            admission=Admission(sys.maxsize, args.max_ongoing_requests, args.max_queued_tokens),
            server=await _start(vllm.settings(source, model_id, length, kind, args)),
        )
        started._watching = asyncio.create_task(started._watch())
        return started

    @property
    def max_length(self) -> int:
        """Tokens that prompt and completion of one request may have together."""
        return self.bounds.max_length

    def state(self) -> EngineState:
        """How many generations there are; vLLM reports the rest itself, as metrics named ray_vllm_*."""
        return EngineState(self.in_flight, 0, 0.0, 0, 0, 0)

    async def try_out(self) -> None:
        """Answer the check prompts. Nothing is compared: vLLM's rounding is not that of `generate()`.

        Raises:
            GateRefused: it cannot.
        """
        try:
            for prompt in self.check_prompts:
                async for _ in self.generate(prompt[: self.max_length - _TRIAL_TOKENS], SamplingParams(_TRIAL_TOKENS)):
                    pass
        except (EngineFailed, InvalidRequest) as error:
            raise GateRefused(f"{self.id}: vLLM does not answer a check prompt: {error}") from error

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Refuse what the model cannot read; see `Bounds.check_prompt`."""
        self.bounds.check_prompt(prompt_ids)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what could not be generated.

        Raises:
            InvalidRequest: see `Bounds.check`; or vLLM does not have a setting.
        """
        self.bounds.check(prompt_ids, params)
        if params.extra:
            name = min(params.extra)
            raise InvalidRequest(_not_here(name), name, code="unsupported_parameter")

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, emitted: Sequence[int] = ()
    ) -> AsyncGenerator[tuple[int, Delta]]:
        """See `ServedModel.generate`. Presence and frequency penalties do not count `emitted`, which vLLM reads as
        prompt; and a seed begins anew after it.
        """
        self.check(prompt_ids, params)
        whole = [*prompt_ids, *emitted]
        self.check_prompt(whole)
        completion = Completion(self.tokenizer, prompt_ids, params, self.ends.union(params.stop_token_ids), emitted)
        if completion.finish_reason is not None:
            yield 0, completion.extend(())
            return
        request = self._request(whole, params, len(emitted))
        self.admission.enter(request["request_id"], len(prompt_ids) + params.max_tokens)
        self.in_flight += 1
        try:
            async with aclosing(self._choices(request)) as choices:
                async for choice in choices:
                    yield 0, completion.extend(choice["token_ids"], self._logprobs(choice, params.logprobs))
                    if completion.finish_reason is not None:
                        return
            raise EngineFailed("vLLM ended a completion early")
        finally:
            self.in_flight -= 1
            self.admission.leave(request["request_id"])

    async def score(self, prompt_ids: Sequence[int], top: int) -> list[TokenLogprob | None]:
        """See `ServedModel.score`. vLLM scores with room for one more token only."""
        self.check_prompt(prompt_ids)
        request = {"prompt": list(prompt_ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        async with aclosing(self._answers(request)) as answers:
            answer = await anext(answers)
        rows = answer.choices[0].prompt_logprobs
        return [
            row and self._named(token, row[token].logprob, {other: found.logprob for other, found in row.items()}, top)
            for token, row in zip(prompt_ids, rows, strict=True)
        ]

    def close(self) -> None:
        """End vLLM's processes; requests in flight fail."""
        if self._watching is not None:
            self._watching.cancel()
        self.prompts.close()
        # They end with the object that holds them.
        self.server = None
        self.healthy = False

    def _request(self, ids: list[int], params: SamplingParams, skipped: int) -> dict[str, Any]:
        """The fields of vLLM's CompletionRequest. Stop strings are not among them: see the module."""
        return {
            # Ray Serve's own, the default, is the same for all choices of a request.
            "request_id": uuid.uuid4().hex,
            "prompt": ids,
            "stream": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "max_tokens": params.max_tokens - skipped,
            "min_tokens": max(0, params.min_tokens - skipped),
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "logit_bias": {str(token): bias for token, bias in params.logit_bias.items()} or None,
            "seed": params.seed,
            # Else the tokenizer's end token is one too, whatever the bundle says.
            "ignore_eos": True,
            "stop_token_ids": sorted(self.ends.union(params.stop_token_ids)),
            "logprobs": params.logprobs,
        }

    async def _choices(self, request: Mapping[str, Any]) -> AsyncGenerator[Any]:
        """The only choice of each chunk of vLLM's stream of server-sent events."""
        async with aclosing(self._answers(request)) as answers:
            async for event in answers:
                data = event.removeprefix("data: ").strip()
                if data == "[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise EngineFailed(f"vLLM failed while it worked on the request ({chunk['error'].get('type')})")
                yield chunk["choices"][0]

    async def _answers(self, request: Mapping[str, Any]) -> AsyncGenerator[Any]:
        """What the engine answers: events of a stream, or the whole.

        Raises:
            InvalidRequest: vLLM refuses the request.
            EngineFailed: it cannot work on it.
        """
        from ray.serve.llm.openai_api_models import CompletionRequest, ErrorResponse

        if self.server is None:
            raise EngineFailed("vLLM is stopped")
        try:
            async with aclosing(self.server.engine.completions(CompletionRequest(model=self.id, **request))) as answers:
                async for answer in answers:
                    if isinstance(answer, ErrorResponse):
                        raise _refused(answer.error)
                    yield answer
        except HeliostatError:
            raise
        except Exception as error:
            raise EngineFailed(f"vLLM cannot work on the request ({type(error).__name__})") from error

    def _logprobs(self, choice: Mapping[str, Any], top: int | None) -> list[TokenLogprob]:
        if top is None:
            return []
        found = choice["logprobs"]
        steps = zip(choice["token_ids"], found["token_logprobs"], found["top_logprobs"], strict=True)
        return [
            self._named(token, logprob, {int(name.removeprefix(_TOKEN)): value for name, value in likely.items()}, top)
            for token, logprob, likely in steps
        ]

    def _named(self, token: int, logprob: float, likely: Mapping[int, float], top: int) -> TokenLogprob:
        """`likely` has the token itself too, also where it is not among the `top` likeliest."""
        best = sorted(likely.items(), key=lambda pair: -pair[1])[:top]
        return self.texts.logprob(Record(token, logprob, tuple(best)))

    async def _watch(self) -> None:
        """Notice when vLLM's processes are gone: Ray Serve then replaces the replica."""
        while self.healthy:
            await asyncio.sleep(_HEALTH_S)
            try:
                await self.server.check_health()
            except Exception as error:
                logger.error("vLLM is down (%s)", type(error).__name__)
                self.healthy = False


def _read(source: str) -> tuple[InferenceModel, Any, Any]:
    """What there is to know of a model without its weights: its tokenizer, its config, its generation config.

    Raises:
        ModelError: it is an adapter, or cannot be read.
    """
    folder = Path(source)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{source}: is an adapter, and engine: vllm serves whole models; merge it: heliostat merge MODEL FOLDER"
        )
    if base.task_of(source) == "classification":
        raise ModelError(f"{source}: is a classifier; set serving.engine: transformers for it")
    manifest = bundle.read_manifest(folder) if (folder / bundle.MANIFEST).exists() else None
    config = base.load_config(source)
    has_own = (folder / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(source) if has_own else GenerationConfig.from_model_config(config)
    return InferenceModel(None, base.load_tokenizer(source), manifest, source), config, generation


async def _start(settings: Mapping[str, Any]) -> Any:
    """A running LLMServer.

    Raises:
        ConfigError, ModelError: see `VllmModel.start`.
    """
    try:
        from ray.serve.llm import LLMConfig, LLMServer
    except ImportError as error:
        raise ConfigError(f"serving.engine: vllm cannot be imported ({error}); install heliostat[vllm]") from error
    try:
        config = LLMConfig(**settings)
        config.get_engine_config()
    except ValueError as error:
        raise ConfigError(f"serving.engine_kwargs: {_short(error)}") from error
    try:
        server = LLMServer.sync_init(config)
        await server.start()
    except Exception as error:
        raise ModelError(f"vLLM cannot run the model ({_short(error)}); the log of its replica says more") from error
    return server


def _refused(error: Any) -> HeliostatError:
    if error.code == 400:
        return InvalidRequest(f"vLLM does not take this request: {error.message}", error.param or "prompt")
    return EngineFailed(f"vLLM cannot work on the request ({error.type})")


def _not_here(name: str) -> str:
    return f"`{name}` cannot be had with engine: vllm"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
