"""The HTTP application in front of a real model, in this process: the gateway's code and the replica's, without Ray."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx2
from starlette.types import ASGIApp

from heliostat.models.base import InferenceModel
from heliostat.serving.api import Front, create_app, guarded
from heliostat.serving.calls import Message, Resumed
from heliostat.serving.config import EndpointArgs
from heliostat.serving.generation import Request, answer
from heliostat.serving.replica import about
from heliostat.serving.routing import Route, Router, Table, Version
from heliostat.serving.served import ServedModel

SIZES = {"max_batch_tokens": 64, "cache_tokens": 4096, "max_ongoing_requests": 8}


def router_of(served: ServedModel, args: EndpointArgs, number: str | None = None) -> Router:
    """A router whose only version is `served`."""

    async def call(
        version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
    ) -> AsyncGenerator[Message]:
        async for message in answer(served, request, resumed, args.max_prompt_tokens):
            yield message

    router = Router(call, timeout_s=args.request_timeout_s)
    version = Version("app", number, 0, **about(served))
    router.table = Table(0, {served.id: Route(served.id, "models:/tiny@champion", version)})
    return router


@asynccontextmanager
async def application(
    loaded: InferenceModel, args: EndpointArgs | None = None
) -> AsyncIterator[tuple[ServedModel, ASGIApp]]:
    """A served model named `tiny`, and its application."""
    args = args or EndpointArgs(**SIZES)
    served = await ServedModel.start(loaded, "tiny", args)
    try:
        front = Front.of(args)
        yield served, guarded(create_app(router_of(served, args), front), front)
    finally:
        served.close()


@asynccontextmanager
async def service(
    loaded: InferenceModel, args: EndpointArgs | None = None
) -> AsyncIterator[tuple[ServedModel, httpx2.AsyncClient]]:
    """The same, and a client that talks to it without a network."""
    async with application(loaded, args) as (served, app):
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://endpoint/v1") as client:
            yield served, client
