"""One loaded model, with what a replica does with it. Knows models and the registry, neither HTTP nor Ray."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, Self

import torch

from heliostat.errors import GateRefused
from heliostat.models import base
from heliostat.registry import versions
from heliostat.serving import parity, tracing
from heliostat.serving.calls import Message, Resumed
from heliostat.serving.classifier import ServedClassifier
from heliostat.serving.classifier import answer as classify
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import EngineState
from heliostat.serving.generation import Served, answer
from heliostat.serving.protocol import AnyRequest

Answer = Callable[[AnyRequest, Resumed, int | None], AsyncGenerator[Message]]
"""Works on (request, what was given out, most prompt tokens); see generation.answer."""


class Running(Protocol):
    """A served model as its replica sees it; served.ServedModel says what each of these does."""

    @property
    def id(self) -> str: ...

    @property
    def healthy(self) -> bool: ...

    @property
    def in_flight(self) -> int: ...

    def state(self) -> EngineState: ...

    def close(self) -> None: ...


class Hosted:
    """A model that answers calls."""

    def __init__(
        self,
        served: Running,
        answering: Answer,
        facts: dict[str, Any],
        check: Callable[[], Awaitable[None]],
        version: str,
        args: EndpointArgs,
    ) -> None:
        """`facts`: see `about`. `check`: raises GateRefused where the model does not answer as it should. `version`:
        for traces.

        Raises:
            ConfigError: tracing is asked for and not installed.
        """
        self._served = served
        self._answer = answering
        self._facts = facts
        self._check = check
        self._version = version
        self._max_prompt_tokens = args.max_prompt_tokens
        self._tracing = tracing.start(args.tracing, "replica")

    @classmethod
    async def load(cls, reference: str, model_id: str, version: str, args: EndpointArgs) -> Self:
        """Fetch the model, load it and start what generates.

        Raises:
            UserError: it cannot be found, trusted, loaded or run; the message says why.
        """
        torch.set_num_threads(max(1, int(args.num_cpus)))
        resolved = await asyncio.to_thread(versions.resolve, reference)
        if args.engine == "vllm":
            from heliostat.serving.vllm_model import VllmModel  # which only those need who have vLLM

            source = await asyncio.to_thread(base.resolve, resolved.path)
            model = await VllmModel.start(source, model_id, args)
            return cls(model, partial(answer, model), about(model), model.try_out, version, args)
        device = "cuda" if args.num_gpus > 0 else "cpu"
        dtype = None if args.dtype == "auto" else args.dtype
        loaded = await asyncio.to_thread(base.load_for_inference, resolved.path, device=device, dtype=dtype)
        if loaded.task == "classification":
            found = ServedClassifier(loaded, model_id, args)
            return cls(found, partial(classify, found), found.about(), found.check, version, args)
        served, check = await parity.start(loaded, model_id, args)
        return cls(served, partial(answer, served), about(served), check, version, args)

    async def answer(self, request: AnyRequest, resumed: Resumed, trace: Mapping[str, str]) -> AsyncGenerator[Message]:
        """See `generation.answer`; `trace` is the W3C trace context of the caller."""
        span = self._tracing.generation(trace, self._served.id, self._version)
        tokens = 0
        problem: str | None = "cancelled"
        try:
            async with aclosing(self._answer(request, resumed, self._max_prompt_tokens)) as messages:
                async for message in messages:
                    if isinstance(message, list):
                        tokens += sum(len(delta.token_ids) for _, delta in message)
                    yield message
            problem = None
        finally:
            span.ended(tokens, problem)

    async def check(self) -> str | None:
        """Answer the check prompts; why the answers are not what they should be, if so.

        transformers' engine must give what `generate()` gives, a classifier in batches what it gives alone. vLLM, whose
        rounding is another, must only answer.
        """
        try:
            await self._check()
        except GateRefused as error:
            return str(error)
        return None

    def about(self) -> dict[str, Any]:
        """See `about`."""
        return self._facts

    def state(self) -> EngineState:
        """How the engine is doing."""
        return self._served.state()

    @property
    def healthy(self) -> bool:
        """Whether all generation threads are alive and take requests."""
        return self._served.healthy

    @property
    def in_flight(self) -> int:
        """Generations that are waiting or running."""
        return self._served.in_flight

    def close(self) -> None:
        """Stop what generates; requests in flight fail."""
        self._served.close()
        self._tracing.close()


def about(served: Served) -> dict[str, Any]:
    """What a route tells of a language model: chat, max_length and decoding, as in routing.Version."""
    found = served.defaults.in_force()
    decoding = {
        "defaults": {name: default.value for name, default in found.items()},
        "origin": {name: default.origin for name, default in found.items()},
        "greedy": found["temperature"].value == 0 and found["num_beams"].value == 1,
    }
    return {"chat": served.prompts.has_chat_template, "max_length": served.max_length, "decoding": decoding}
