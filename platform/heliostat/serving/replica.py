"""The deployment that runs a model: one version, loaded in each replica. Knows Ray Serve, not HTTP or what a model is.

The director imports this module too, so what models need is imported by the replica alone, when it starts. Ray finds
the types of its parameters by inspection, so this module must not postpone the evaluation of annotations.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from heliostat.serving import logs, vllm
from heliostat.serving.applications import REPLICA
from heliostat.serving.calls import Message, Resumed
from heliostat.serving.config import AutoscalingArgs, EndpointArgs
from heliostat.serving.metrics import RayRecorder, ReplicaMetrics
from heliostat.serving.routing import Request

if TYPE_CHECKING:
    from heliostat.serving.hosting import Hosted

_REPORT_S = 1.0
# A replica that is gone is soon replaced; one that computes is slow to answer, which does not mean that it is ill.
HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 60.0


class Replica:
    """One copy of a model, and what generates with it."""

    _model: "Hosted | None" = None
    _reporting: "asyncio.Task[None] | None" = None

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, reference: str, model_id: str, version: str, args: EndpointArgs, director: DeploymentHandle | None = None
    ) -> None:
        """Load the model and start what generates; the replica takes requests when this returns.

        `director` is told every moment whether that still runs.

        Raises:
            UserError: the model cannot be found, trusted, loaded or run; the message says why.
        """
        from heliostat.serving.hosting import Hosted

        logs.setup()
        self._model = await Hosted.load(reference, model_id, version, args)
        self._metrics = ReplicaMetrics(RayRecorder(), model_id, version)
        self._reporting = asyncio.create_task(self._report(director))

    async def answer(self, request: Request, resumed: Resumed, trace: Mapping[str, str]) -> AsyncGenerator[Message]:
        """See `Hosted.answer`."""
        async with aclosing(self._hosted().answer(request, resumed, trace)) as messages:
            async for message in messages:
                yield message

    async def about(self) -> dict[str, Any]:
        """See `hosting.about`."""
        return self._hosted().about()

    async def check(self) -> str | None:
        """See `Hosted.check`."""
        return await self._hosted().check()

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica when this raises several times in a row."""
        if not self._hosted().healthy:
            raise RuntimeError("a generation thread is down")

    def in_flight(self) -> int:
        """Generations that are waiting or running in this replica."""
        return self._hosted().in_flight

    async def _report(self, director: DeploymentHandle | None) -> None:
        context = serve.get_replica_context()
        while True:
            self._metrics.report(self._hosted().state())
            if director is not None:
                # Nobody waits for the answer: a director that is away for a while is told again.
                director.beat.remote(context.app_name, context.replica_id.unique_id, self._hosted().healthy)
            await asyncio.sleep(_REPORT_S)

    def _hosted(self) -> "Hosted":
        if self._model is None:
            raise RuntimeError("the model is not loaded")
        return self._model

    def __del__(self) -> None:
        if self._reporting is not None:
            self._reporting.cancel()  # a replica that ends is not ill
        if self._model is not None:
            self._model.close()


def application(
    reference: str,
    model_id: str,
    version: str,
    args: EndpointArgs,
    environment: Mapping[str, str],
    director: DeploymentHandle | None = None,
) -> Application:
    """The Serve application of one version. `environment`: variables of its processes; the rest is as in `Replica`."""
    deployment = serve.deployment(
        Replica,
        name=REPLICA,
        num_replicas=None if args.autoscaling else args.num_replicas,
        autoscaling_config=_scaling(args.autoscaling) if args.autoscaling else None,
        max_replicas_per_node=args.max_replicas_per_node,
        **_resources(args, environment),
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        max_constructor_retry_count=args.max_constructor_retry_count,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=args.drain_timeout_s,
        logging_config=logs.logging_config(),
    )
    return deployment.bind(reference, model_id, version, args, director)


def _scaling(scaling: AutoscalingArgs) -> dict[str, Any]:
    """At least one at first: a version that cannot be loaded is found out, even where none is kept running."""
    return {**scaling.model_dump(), "initial_replicas": max(1, scaling.min_replicas)}


def _resources(args: EndpointArgs, environment: Mapping[str, str]) -> dict[str, Any]:
    """Options of the deployment: what Ray reserves for a replica, and the variables of its processes."""
    if args.engine == "vllm":
        actor = {"num_cpus": args.num_cpus, "runtime_env": {"env_vars": {**environment, **vllm.ENVIRONMENT}}}
        return {"ray_actor_options": actor, **vllm.placement(args)}
    runtime_env = {"env_vars": dict(environment)}
    return {"ray_actor_options": {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus, "runtime_env": runtime_env}}
