"""One loaded model, with what a replica does with it. Knows models and the registry, neither HTTP nor Ray."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Self

import torch

from heliostat.errors import GateRefused
from heliostat.models.base import load_for_inference
from heliostat.registry import versions
from heliostat.serving import parity, tracing
from heliostat.serving.calls import Message, Resumed
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import EngineState
from heliostat.serving.generation import Request, answer
from heliostat.serving.served import ServedModel


class Hosted:
    """A model that answers calls."""

    def __init__(self, served: ServedModel, version: str, args: EndpointArgs) -> None:
        """`version`: for traces.

        Raises:
            ConfigError: tracing is asked for and not installed.
        """
        self._served = served
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
        device = "cuda" if args.num_gpus > 0 else "cpu"
        resolved = await asyncio.to_thread(versions.resolve, reference)
        loaded = await asyncio.to_thread(load_for_inference, resolved.path, device=device)
        return cls(await ServedModel.start(loaded, model_id, args), version, args)

    async def answer(self, request: Request, resumed: Resumed, trace: Mapping[str, str]) -> AsyncGenerator[Message]:
        """See `generation.answer`; `trace` is the W3C trace context of the caller."""
        span = self._tracing.generation(trace, self._served.id, self._version)
        tokens = 0
        problem: str | None = "cancelled"
        try:
            async with aclosing(answer(self._served, request, resumed, self._max_prompt_tokens)) as messages:
                async for message in messages:
                    if isinstance(message, list):
                        tokens += sum(len(delta.token_ids) for _, delta in message)
                    yield message
            problem = None
        finally:
            span.ended(tokens, problem)

    async def check(self) -> str | None:
        """Answer the check prompts with the engine and with `generate()`; why the two differ, if they do."""
        try:
            await parity.check_served(self._served)
        except GateRefused as error:
            return str(error)
        return None

    def about(self) -> dict[str, Any]:
        """See `about`."""
        return about(self._served)

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


def about(served: ServedModel) -> dict[str, Any]:
    """What a route tells of its model: chat, max_length and decoding, as in routing.Version."""
    found = served.defaults.in_force()
    decoding = {
        "defaults": {name: default.value for name, default in found.items()},
        "origin": {name: default.origin for name, default in found.items()},
        "greedy": found["temperature"].value == 0 and found["num_beams"].value == 1,
    }
    return {"chat": served.prompts.has_chat_template, "max_length": served.max_length, "decoding": decoding}
