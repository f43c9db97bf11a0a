"""The deployment that runs a model: one version, loaded in each replica. Knows Ray Serve, not HTTP or the registry.

Ray finds the types of its parameters by inspection, so this module must not postpone the evaluation of annotations.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import torch
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from heliostat.errors import GateRefused
from heliostat.models.base import load_for_inference
from heliostat.registry import versions
from heliostat.serving import logs, parity, tracing
from heliostat.serving.applications import REPLICA
from heliostat.serving.calls import Message, Resumed
from heliostat.serving.config import EndpointArgs
from heliostat.serving.generation import Request, answer
from heliostat.serving.metrics import RayRecorder, ReplicaMetrics
from heliostat.serving.served import ServedModel

_REPORT_S = 1.0
# A replica that is gone is soon replaced; one that computes is slow to answer, which does not mean that it is ill.
HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 60.0


class Replica:
    """One copy of a model, and what generates with it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, reference: str, model_id: str, version: str, args: EndpointArgs, director: DeploymentHandle | None = None
    ) -> None:
        """Load the model and start what generates; the replica takes requests when this returns.

        `director` is told every moment whether that still runs.

        Raises:
            UserError: the model cannot be found, trusted, loaded or run; the message says why.
        """
        logs.setup()
        self._cleanup = contextlib.ExitStack()
        self._args = args
        self._tracing = tracing.start(args.tracing, "replica")
        self._cleanup.callback(self._tracing.close)
        torch.set_num_threads(max(1, int(args.num_cpus)))
        self._served = await _load(reference, model_id, args)
        self._cleanup.callback(self._served.close)
        self._labels = (model_id, version)
        self._metrics = ReplicaMetrics(RayRecorder(), *self._labels)
        self._reporting = asyncio.create_task(self._report(director))

    async def answer(self, request: Request, resumed: Resumed, trace: Mapping[str, str]) -> AsyncGenerator[Message]:
        """See `generation.answer`; `trace` is the W3C trace context of the caller."""
        span = self._tracing.generation(trace, *self._labels)
        tokens = 0
        problem: str | None = "cancelled"
        try:
            messages = answer(self._served, request, resumed, self._args.max_prompt_tokens)
            async with aclosing(messages):
                async for message in messages:
                    if isinstance(message, list):
                        tokens += sum(len(delta.token_ids) for _, delta in message)
                    yield message
            problem = None
        finally:
            span.ended(tokens, problem)

    async def about(self) -> dict[str, Any]:
        """See `about`."""
        return about(self._served)

    async def check(self) -> str | None:
        """Answer the check prompts with the engine and with `generate()`; why the two differ, if they do."""
        try:
            await parity.check_served(self._served)
        except GateRefused as error:
            return str(error)
        return None

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica when this raises several times in a row."""
        if not self._served.healthy:
            raise RuntimeError("a generation thread is down")

    def in_flight(self) -> int:
        """Generations that are waiting or running in this replica."""
        return self._served.in_flight

    async def _report(self, director: DeploymentHandle | None) -> None:
        context = serve.get_replica_context()
        while True:
            self._metrics.report(self._served.state())
            if director is not None:
                # Nobody waits for the answer: a director that is away for a while is told again.
                director.beat.remote(context.app_name, context.replica_id.unique_id, self._served.healthy)
            await asyncio.sleep(_REPORT_S)

    def __del__(self) -> None:
        self._cleanup.close()


def application(
    reference: str,
    model_id: str,
    version: str,
    args: EndpointArgs,
    environment: Mapping[str, str],
    director: DeploymentHandle | None = None,
) -> Application:
    """The Serve application of one version. `environment`: variables of its processes; the rest is as in `Replica`."""
    scaling = args.autoscaling
    deployment = serve.deployment(
        Replica,
        name=REPLICA,
        num_replicas=None if scaling else args.num_replicas,
        autoscaling_config=scaling.model_dump() if scaling else None,
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": args.num_gpus,
            "runtime_env": {"env_vars": dict(environment)},
        },
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        max_constructor_retry_count=args.max_constructor_retry_count,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=args.drain_timeout_s,
        logging_config=logs.logging_config(),
    )
    return deployment.bind(reference, model_id, version, args, director)


def about(served: ServedModel) -> dict[str, Any]:
    """What a route tells of its model: chat, max_length and decoding, as in routing.Version."""
    found = served.defaults.in_force()
    decoding = {
        "defaults": {name: default.value for name, default in found.items()},
        "origin": {name: default.origin for name, default in found.items()},
        "greedy": found["temperature"].value == 0 and found["num_beams"].value == 1,
    }
    return {"chat": served.prompts.has_chat_template, "max_length": served.max_length, "decoding": decoding}


async def _load(reference: str, model_id: str, args: EndpointArgs) -> ServedModel:
    device = "cuda" if args.num_gpus > 0 else "cpu"
    resolved = await asyncio.to_thread(versions.resolve, reference)
    loaded = await asyncio.to_thread(load_for_inference, resolved.path, device=device)
    return await ServedModel.start(loaded, model_id, args)
