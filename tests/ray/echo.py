"""A Ray Serve application and a patient-less proxy, for tests of what stands between clients and an application."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from heliostat.serving import edge

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
SEND_TIMEOUT_S = 2.0
BODY_TIMEOUT_S = 2.0


def hasty_middlewares() -> list[Middleware]:
    """`edge.proxy_middlewares` with short times."""
    patience: dict[Any, dict[str, float]] = {
        edge.SlowReaders: {"timeout_s": SEND_TIMEOUT_S},
        edge.BodyLimit: {"timeout_s": BODY_TIMEOUT_S},
    }
    made = edge.proxy_middlewares()
    for item in made:
        item.kwargs.update(patience.get(item.cls, {}))
    return made


@serve.ingress()
class Echo:
    """Answers with what it was sent (/echo; /slow: after half a second), or streams without end (/stream).

    It notes in a folder what becomes of its streams.
    """

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    def __serve_build_asgi_app__(self) -> Any:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._answer(scope, receive, send)

        return app

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await send({"type": f"{(await receive())['type']}.complete"})
            await receive()
        elif scope["path"] == "/stream":
            await self._stream(send)
        else:
            body = await _whole(receive)
            await asyncio.sleep(0.5 if scope["path"] == "/slow" else 0)
            received = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]]
            answer = {"headers": received, "bytes": len(body), "pid": os.getpid()}
            await send(_start(b"application/json"))
            await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def _stream(self, send: Send) -> None:
        (self._notes / "running").touch()
        try:
            await send(_start(b"text/event-stream"))
            while True:
                event = b"data: " + b"x" * 50_000 + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": True})
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            (self._notes / "cancelled").touch()
            raise


def application(notes: Path) -> Application:
    """The application, to run."""
    return serve.deployment(Echo, max_ongoing_requests=20, health_check_period_s=1).bind(notes)


def _start(kind: bytes) -> dict[str, Any]:
    headers = [(b"content-type", kind), (b"x-request-id", b"of-the-application")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


async def _whole(receive: Receive) -> bytes:
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            break
    return body
