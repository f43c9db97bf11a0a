"""The deployment that answers HTTP: it checks keys and requests, and passes them on to the replicas. Knows Ray Serve,
not models: it imports none of the libraries that models need.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from heliostat.serving import bind, logs
from heliostat.serving.api import Front, create_app, guarded
from heliostat.serving.applications import REPLICA
from heliostat.serving.calls import Message, Resumed
from heliostat.serving.config import EndpointArgs
from heliostat.serving.routing import Busy, ReplicaLost, Request, Router, Version

logger = logging.getLogger(__name__)

# Seconds until a director that is away is asked again.
RETRY_S = 0.5
# Streams that one gateway holds open at most; more wait in Serve's proxy.
MAX_CONNECTIONS = 2048


@serve.ingress()
class Gateway:
    """One process that answers HTTP for all models of an endpoint."""

    async def __init__(self, args: EndpointArgs, director: DeploymentHandle) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Learn the routes; the gateway takes requests when all models are loaded.

        Raises:
            ResourceError: Serve's proxies can be reached from other machines, and there are no keys.
        """
        logs.setup()
        bind.check_bind(await asyncio.to_thread(_host), args.api_keys, args.insecure)
        self._handles: dict[str, DeploymentHandle] = {}
        self._director = director
        self._name = serve.get_replica_context().replica_id.unique_id
        self._router = Router(self._call, timeout_s=args.request_timeout_s)
        self._front = Front.of(args)
        self._router.table = await director.table.remote(self._name, -1, {})
        self._following = asyncio.create_task(self._follow())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Ray Serve puts behind its proxy."""
        return guarded(create_app(self._router, self._front), self._front)

    async def _follow(self) -> None:
        """Keep the routes as they are at the director."""
        while True:
            self._handles = {app: handle for app, handle in self._handles.items() if app in self._router.table.apps()}
            outcomes = self._router.take_outcomes()
            try:
                self._router.table = await self._director.table.remote(
                    self._name, self._router.table.generation, outcomes
                )
            except (RayError, RayServeException) as error:
                logger.warning("the director cannot be asked (%s); the routes stay as they are", type(error).__name__)
                await asyncio.sleep(RETRY_S)

    async def _call(
        self, version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
    ) -> AsyncGenerator[Message]:
        """See routing.Call.

        Raises:
            ReplicaLost, Busy: see there.
        """
        response = self._handle(version.app).remote(request, resumed, trace)
        try:
            async for message in response:
                yield message
        except BackPressureError as error:
            raise Busy from error
        except (RayError, RayServeException) as error:
            raise ReplicaLost(type(error).__name__) from error
        finally:
            with contextlib.suppress(RayError, RayServeException):
                response.cancel()

    def _handle(self, app: str) -> DeploymentHandle:
        if app not in self._handles:
            handle = serve.get_deployment_handle(REPLICA, app)
            self._handles[app] = handle.options(method_name="answer", stream=True)
        return self._handles[app]


def _host() -> str:
    """Where Serve's proxies listen: whoever started Serve may have left that to its default, which is everywhere."""
    return str(_get_global_client().http_config.host)


def deployment(args: EndpointArgs) -> Any:
    """The gateways of an endpoint, to be bound to `args` and a director."""
    return serve.deployment(
        Gateway,
        name="Gateway",
        num_replicas=args.gateways,
        max_replicas_per_node=args.max_replicas_per_node,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_CONNECTIONS,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=args.drain_timeout_s,
        logging_config=logs.logging_config(),
    )
