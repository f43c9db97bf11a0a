"""ASGI middlewares between the network and the API: what a client may send, and how it is answered. Knows no models.

They stand in two places. `proxy_middlewares` wraps Ray Serve's HTTP proxy, where Serve itself acts on headers of the
client, reads whole bodies into memory and waits for slow readers. `heliostat.serving.access.protect` wraps the gateway.
"""

import asyncio
import json
import logging
import os
import re
import uuid
from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat.serving.protocol import ApiError

logger = logging.getLogger(__name__)
# Names what Ray Serve calls when an HTTP proxy starts. In the environment of Serve's controller
# (`serve.start(controller_options=)`) it reaches the proxies, which the controller starts; where something else starts
# Serve (KubeRay, `serve deploy`), the nodes need it in their environment. See docs/security.md.
PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "heliostat.serving.edge:proxy_middlewares"}
# The proxy does not know `max_body_bytes`; this is the most that setting may allow.
PROXY_MAX_BODY_BYTES = 32 << 20
# The whole body must be here this long after its request's headers.
BODY_TIMEOUT_S = 30.0
# A client that takes nothing of its answer for so long is cut off.
SEND_TIMEOUT_S = 60.0
# Ray Serve acts on these, in either spelling (ray/serve/_private: constants.py, http_util.py, proxy.py). The variable
# is Serve's own, and names the header for sticky sessions.
_STEERING = {
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve-multiplexed-model-id",
    os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().replace("_", "-"),
}
_STEERING_PREFIX = "x-serve-"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_DISCONNECT: Message = {"type": "http.disconnect"}
_SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    # For the playground: it holds a key, so nothing but its own files may run in it or frame it. Those after the first
    # do not fall back to default-src: https://www.w3.org/TR/CSP3/#directive-default-src
    b"content-security-policy": b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def proxy_middlewares() -> list[Middleware]:
    """What Ray Serve puts around its HTTP proxy; the last is the outermost.

    The form is that of ray.serve._private.http_util.validate_http_proxy_callback_return: Starlette's `Middleware`s.
    """
    return [
        Middleware(NoSteering),
        Middleware(BodyLimit, max_bytes=PROXY_MAX_BODY_BYTES),
        Middleware(ProxyErrors),
        Middleware(RequestId),
        Middleware(SlowReaders),
    ]


def path_of(scope: Scope) -> str:
    """The path below the application's prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def send_error(send: Send, error: ApiError) -> None:
    """A whole response in OpenAI's form of errors, with the headers that every response has."""
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store", **error.headers()}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):  # what is left of the body is not read, so the connection is of no more use
        headers["Connection"] = "close"
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": _secured(encoded)})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})


class Refusals:
    """Answers with the ApiErrors that the middlewares inside raise, and tells `noted` of the request and the error."""

    def __init__(self, app: ASGIApp, noted: Callable[[Scope, ApiError], None]) -> None:
        self._app = app
        self._noted = noted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except ApiError as error:
            self._noted(scope, error)
            await send_error(send, error)


class NoSteering:
    """Keeps clients from steering Ray Serve: its headers go, and WebSockets and its list of routes are refused.

    Around the proxy only: in the gateway, Serve has acted on the headers already.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            if path_of(scope) == "/-/routes":
                raise ApiError(404, "Not Found")
            scope = {**scope, "headers": [item for item in scope["headers"] if not _steers(item[0])]}
        await self._app(scope, receive, send)


class RequestId:
    """Gives every request one id: the client's own if it is harmless, else a new one.

    It is in the request's headers, in `scope["state"]["request_id"]`, and once in the response's headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _with_id(message.get("headers", ()), request_id)}
            await send(message)

        state = {**scope.get("state", {}), "request_id": request_id.decode()}
        await self._app(
            {**scope, "headers": _with_id(scope["headers"], request_id), "state": state}, receive, send_with_id
        )


class SecurityHeaders:
    """Adds what tells browsers to be careful. Answers are kept by no cache, but for the files of the playground."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if not is_playground(path_of(scope)):
                    headers = [(name, value) for name, value in headers if name.lower() != b"cache-control"]
                    headers.append((b"cache-control", b"no-store"))
                message = {**message, "headers": _secured(headers)}
            await send(message)

        await self._app(scope, receive, send_secured if scope["type"] == "http" else send)


class BodyLimit:
    """Refuses bodies that are too long or too slow, and does not read the rest of them.

    GET and HEAD have no body here, whatever the client sends.

    Raises:
        ApiError: 413 or 408.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, _without_body(receive), send)
            return
        if _content_length(scope) > self._max_bytes:
            raise _too_long(self._max_bytes)
        body = _Body(receive, send, self._max_bytes, self._timeout_s)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.error is None:
                raise
        if body.error is not None and not body.answered:
            raise body.error


class _Body:
    """One request's body on its way. When it breaks a limit, the application sees the client go away."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int, timeout_s: float) -> None:
        self.error: ApiError | None = None
        self.answered = False
        self._receive = receive
        self._send = send
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        if self.error is None:
            try:
                async with asyncio.timeout_at(self._deadline):
                    return self._counted(await self._receive())
            except TimeoutError:
                message = f"the body did not arrive within {self._timeout_s:g} s"
                self.error = ApiError(408, message, code="request_timeout")
            except ApiError as error:
                self.error = error
        return _DISCONNECT

    async def send(self, message: Message) -> None:
        """What the application answers after the body was cut off is dropped: it could only be about that."""
        if self.error is None or self.answered:
            self.answered = True
            await self._send(message)

    def _counted(self, message: Message) -> Message:
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _too_long(self._max_bytes)
        self._complete = not message.get("more_body", False)
        return message


class ProxyErrors:
    """Turns what Ray Serve's proxy says in plain text, or not at all, into OpenAI's form of errors; ApiErrors too.

    A gateway that dies leaves its requests without an answer, and its streams without an end that a client can see:
    those get a 503, and an error as their last event.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response = _Response(send)
        try:
            await self._app(scope, receive, response.send)
        except ApiError as error:
            response.replaced = error
        except Exception:
            logger.exception("the proxy failed")
        await response.finish()


class _Response:
    """One response of the proxy on its way."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.replaced: ApiError | None = None
        """What to answer instead."""
        self._started = self._complete = self._is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            kind = headers.get(b"content-type", b"")
            if message["status"] >= 400 and kind.startswith(b"text/plain"):
                self.replaced = _proxy_error(message["status"], headers.get(b"retry-after"))
                return
            self._started = True
            self._is_stream = kind.startswith(b"text/event-stream")
        if self.replaced is None:
            self._complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)

    async def finish(self) -> None:
        """Answer what is unanswered; a broken answer that is no stream is left to be seen as broken."""
        if not self._started:
            await send_error(self._send, self.replaced or _proxy_error(503))
        elif self._is_stream and not self._complete:
            event = f"\n\ndata: {json.dumps(_proxy_error(503).body())}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode()})


class SlowReaders:
    """Cuts off clients that take nothing of their answer for `timeout_s`.

    Around the proxy, the only place where that is felt: Serve's replicas hand over what they write without waiting.
    """

    def __init__(self, app: ASGIApp, timeout_s: float = SEND_TIMEOUT_S) -> None:
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gone = asyncio.Event()
        await self._app(scope, _until(gone, receive), bounded_send(send, self._timeout_s, gone))


def bounded_send(send: Send, timeout_s: float, gone: asyncio.Event) -> Send:
    """`send`, but one that blocks for longer than `timeout_s` sets `gone`; from then on messages are dropped.

    uvicorn's `send` blocks while more than 64 KiB wait to be written. Raising here would not do: Ray Serve's proxy
    would leave its request behind, and the replica would work on. It acts on a disconnect, which `gone` is to cause.
    """

    async def bounded(message: Message) -> None:
        if gone.is_set():
            return
        try:
            async with asyncio.timeout(timeout_s):
                await send(message)
        except TimeoutError:
            gone.set()

    return bounded


def is_playground(path: str) -> bool:
    """Whether the path is of the page, which is static and open to all."""
    return path == "/" or path.startswith("/playground/")


def _steers(header: bytes) -> bool:
    name = header.decode("latin-1").lower().replace("_", "-")
    return name in _STEERING or name.startswith(_STEERING_PREFIX)


def _request_id(scope: Scope) -> bytes:
    given = [value for name, value in scope["headers"] if name.lower() == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return bytes(given[0])
    return uuid.uuid4().hex.encode()


def _with_id(headers: list[tuple[bytes, bytes]], request_id: bytes) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in headers if name.lower() != b"x-request-id"]
    return [*others, (b"x-request-id", request_id)]


def _secured(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    present = {name.lower() for name, _ in headers}
    return [*headers, *((name, value) for name, value in _SECURITY_HEADERS.items() if name not in present)]


def _content_length(scope: Scope) -> int:
    """As declared; 0 where nothing, or nothing that is a number, is declared: then the chunks are counted."""
    declared = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
    # 19 digits are more than any limit, and thousands of them more than Python converts.
    return max((int(value.lstrip(b"0")[:19] or b"0") for value in declared if value.isdigit()), default=0)


def _without_body(receive: Receive) -> Receive:
    told = False

    async def receive_end() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": b"", "more_body": False}
        while (message := await receive())["type"] == "http.request":
            continue
        return message

    return receive_end


def _until(gone: asyncio.Event, receive: Receive) -> Receive:
    """`receive`, which tells of a disconnect as soon as `gone` is set."""

    async def receive_or_gone() -> Message:
        message, end = asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait((message, end), return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else _DISCONNECT
        finally:
            message.cancel()
            end.cancel()

    return receive_or_gone


def _too_long(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is longer than {max_bytes} bytes", code="body_too_large")


def _proxy_error(status: int, retry_after: bytes | None = None) -> ApiError:
    """In words of our own: the proxy's quote paths and names of replicas."""
    if status == 404:
        return ApiError(404, "nothing is served here (yet)", code="not_found")
    if status == 408:
        return ApiError(408, "the request took longer than the endpoint allows", code="request_timeout")
    if status in (429, 503):
        seconds = float(retry_after) if retry_after and retry_after.isdigit() else 1.0
        message = "the endpoint could not take the request or finish it; try again"
        return ApiError(status, message, code="overloaded", retry_after=seconds)
    return ApiError(status, "an unexpected error happened; the server's log says more", code="internal_error")
