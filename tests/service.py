"""The HTTP application in front of a real model, in this process: the gateway's code and the replica's, without Ray."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx2
import openai
import uvicorn
from starlette.types import ASGIApp

from heliostat.models.base import InferenceModel
from heliostat.serving.api import Front, create_app, guarded
from heliostat.serving.calls import Message, Resumed
from heliostat.serving.classifier import ServedClassifier
from heliostat.serving.classifier import answer as classify
from heliostat.serving.config import EndpointArgs
from heliostat.serving.generation import answer
from heliostat.serving.hosting import about
from heliostat.serving.routing import Request, Route, Router, Table, Version
from heliostat.serving.served import ServedModel

T = TypeVar("T")
SIZES = {"max_batch_tokens": 64, "cache_tokens": 4096, "max_ongoing_requests": 8}


def router_of(served: ServedModel | ServedClassifier, args: EndpointArgs, number: str | None = None) -> Router:
    """A router whose only version is `served`."""
    answering: Any
    if isinstance(served, ServedClassifier):
        answering, facts = partial(classify, served), served.about()
    else:
        answering, facts = partial(answer, served), about(served)

    async def call(
        version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
    ) -> AsyncGenerator[Message]:
        async with aclosing(answering(request, resumed, args.max_prompt_tokens)) as messages:
            async for message in messages:
                yield message

    router = Router(call, timeout_s=args.request_timeout_s)
    version = Version("app", number, 0, **facts)
    router.table = Table(0, {served.id: Route(served.id, "models:/tiny@champion", version)})
    return router


@asynccontextmanager
async def application(
    loaded: InferenceModel, args: EndpointArgs | None = None, front: Front | None = None
) -> AsyncIterator[tuple[Any, ASGIApp]]:
    """A served model named `tiny`, and its application; `front` is that of `args` where none is given."""
    args = args or EndpointArgs(**SIZES)
    served: ServedModel | ServedClassifier
    if loaded.task == "classification":
        served = ServedClassifier(loaded, "tiny", args)
    else:
        served = await ServedModel.start(loaded, "tiny", args)
    try:
        front = front or Front.of(args)
        yield served, guarded(create_app(router_of(served, args), front), front)
    finally:
        served.close()


@asynccontextmanager
async def service(
    loaded: InferenceModel, args: EndpointArgs | None = None, front: Front | None = None
) -> AsyncIterator[tuple[Any, httpx2.AsyncClient]]:
    """The same, and a client that talks to it without a network."""
    async with application(loaded, args, front) as (served, app), connected(app) as client:
        yield served, client


def connected(app: ASGIApp) -> httpx2.AsyncClient:
    """A client of the application; it does not see what the application raises, only what it answers."""
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://endpoint/v1")


@dataclass(frozen=True)
class Running:
    """A service on an event loop of its own, which stands still between the calls: one for many tests."""

    runner: asyncio.Runner
    served: Any
    """A ServedModel or a ServedClassifier."""
    http: httpx2.AsyncClient

    @property
    def client(self) -> openai.AsyncOpenAI:
        """OpenAI's own client."""
        url = str(self.http.base_url)
        return openai.AsyncOpenAI(api_key="none", base_url=url, http_client=self.http, max_retries=0)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What comes of the work, which has to leave no generation behind."""
        found = self.runner.run(work)
        assert self.served.in_flight == 0
        return found

    def post(self, path: str, **body: Any) -> httpx2.Response:
        """The answer to one request, for `tiny` unless it names another model."""
        return self.run(self.http.post(path, json={"model": "tiny", **body}))

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """The answer to a GET."""
        return self.run(self.http.get(path, **options))


@contextmanager
def running(loaded: InferenceModel, args: EndpointArgs | None = None, front: Front | None = None) -> Iterator[Running]:
    """See Running."""
    with asyncio.Runner() as runner:
        open_service = service(loaded, args, front)
        served, http = runner.run(open_service.__aenter__())
        try:
            yield Running(runner, served, http)
        finally:
            runner.run(open_service.__aexit__(None, None, None))


@contextmanager
def listening(loaded: InferenceModel, args: EndpointArgs | None = None) -> Iterator[str]:
    """The application behind a real HTTP server in a thread, at this address."""
    started = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve(listener: socket.socket) -> None:
        async with application(loaded, args) as (_, app):
            servers.append(uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)))
            started.set()
            await servers[0].serve([listener])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(serve(listener)))
        thread.start()
        try:
            assert started.wait(120)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for server in servers:
                server.should_exit = True
            thread.join()


def events(response: httpx2.Response) -> list[Any]:
    """The events of a stream, each parsed; the last is "[DONE]" if it ended well."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    parts = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]
