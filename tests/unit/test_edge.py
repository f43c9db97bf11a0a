"""The middlewares at the edge: raw requests through uvicorn, and ASGI messages where the network is in the way."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from typing import Any

import httpx2
import pytest
from ray.serve._private.http_util import validate_http_proxy_callback_return
from ray.serve._private.utils import call_function_from_import_path
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat.serving import edge
from heliostat.serving.edge import (
    BodyLimit,
    NoSteering,
    ProxyErrors,
    Refusals,
    RequestId,
    SecurityHeaders,
    SlowReaders,
    bounded_send,
)
from heliostat.serving.protocol import ApiError
from tests.wire import connect, parsed, raw, read_all, served, until

MAX_BYTES = 1000
BODY_TIMEOUT_S = 1.0


async def _echo(request: Request) -> Response:
    """What the application sees of a request."""
    body = await request.body()
    received = [[name, value] for name, value in request.headers.items()]
    state = {key: value for key, value in request.scope.get("state", {}).items() if isinstance(value, str)}
    return JSONResponse({"bytes": len(body), "headers": received, "state": state})


async def _plain(request: Request) -> Response:
    return PlainTextResponse("replica#1 of /secret failed", int(request.path_params["status"]), {"Retry-After": "7"})


def application() -> ASGIApp:
    return Starlette(
        routes=[
            Route("/echo", _echo, methods=["GET", "POST", "PUT", "HEAD"]),
            Route("/", _echo),
            Route("/playground/app.js", lambda _: Response("x", headers={"Cache-Control": "no-cache"})),
            Route("/cached", lambda _: Response("x", headers={"Cache-Control": "public, max-age=9"})),
            Route("/plain/{status:int}", _plain),
        ]
    )


def guarded(app: ASGIApp) -> ASGIApp:
    limited = BodyLimit(app, MAX_BYTES, BODY_TIMEOUT_S)
    return RequestId(SecurityHeaders(Refusals(limited, lambda *_: None)))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(guarded(application())) as address:
        yield address


async def call(app: ASGIApp, *received: Message, path: str = "/echo", **scope: Any) -> list[Message]:
    """Run the application on one request; returns what it sends. Then, the client is gone."""
    messages = list(received) or [{"type": "http.request", "body": b"", "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    defaults = {"type": "http", "method": "GET", "path": path, "root_path": "", "query_string": b"", "headers": []}
    await app(defaults | scope, receive, send)
    return sent


def error_of(sent: list[Message]) -> tuple[int, str]:
    """Status and code of an error's whole response."""
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]


# Request ids


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        ("X-Request-Id: abc-DEF_123\r\n", "abc-DEF_123"),
        ("x-request-id:   spaced\r\n", "spaced"),
        (f"X-Request-Id: {'x' * 64}\r\n", "x" * 64),
        (f"X-Request-Id: {'x' * 65}\r\n", None),
        ("X-Request-Id: one\r\nX-Request-Id: one\r\n", None),
        ("X-Request-Id: one\r\nx-request-id: two\r\n", None),
        ("X-Request-Id: one, two\r\n", None),
        ("X-Request-Id: \r\n", None),
        ("X-Request-Id: a b\r\n", None),
        ("X-Request-Id: a\tb\r\n", None),
        ("X-Request-Id: <script>alert(1)</script>\r\n", None),
        ("X-Request-Id: {'level': 'ERROR'}\r\n", None),
        ("X-Request-Id: ../../etc/passwd\r\n", None),
        ("X-Request-Id: %0d%0aSet-Cookie:a=b\r\n", None),
        ("X-Request-Id: a\x1b[31m\r\n", None),
        ("X-Request-Id: \xe9\r\n", None),
        ("", None),
    ],
)
def test_every_response_has_one_harmless_id(url: str, lines: str, kept: str | None) -> None:
    response = raw(url, f"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n")
    status, headers, answer = parsed(response)
    returned = [value for name, value in headers if name == "x-request-id"]
    if answer is None:  # uvicorn itself refuses a control character
        assert status == 400
        assert "\x1b" in lines
        return
    assert status == 200
    assert returned == [answer["state"]["request_id"]]
    assert returned == [value for name, value in answer["headers"] if name == "x-request-id"]
    assert edge._REQUEST_ID.fullmatch(returned[0].encode())
    assert kept is None or returned == [kept]
    assert kept is not None or returned[0] not in lines


@pytest.mark.parametrize("ending", ["\r\n", "\n", "\r", "\r\n ", "\x00"])
def test_line_breaks_in_a_value_make_no_header(url: str, ending: str) -> None:
    request = f"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: a{ending}Evil: yes\r\n\r\n"
    status, headers, _ = parsed(raw(url, request))
    assert status in (200, 400)
    assert "evil" not in {name for name, _ in headers}
    assert all("evil" not in value.lower() for _, value in headers)


def test_an_id_of_the_application_or_of_serve_is_replaced() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"X-Request-ID", b"1"), (b"x-request-id", b"2"), (b"a", b"b")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    sent = asyncio.run(call(RequestId(app), headers=[(b"x-request-id", b"mine")]))
    assert sent[0]["headers"] == [(b"a", b"b"), (b"x-request-id", b"mine")]


# Bodies


def post(body: str, *lines: str) -> str:
    head = "".join(f"{line}\r\n" for line in lines)
    return f"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n{body}"


def chunked(*sizes: int) -> str:
    return "".join(f"{size:x}\r\n{'x' * size}\r\n" for size in sizes)


@pytest.mark.parametrize(
    ("request_text", "size"),
    [
        (post("", "Content-Length: 0"), 0),
        (post("hello", "Content-Length: 5"), 5),
        (post("x" * MAX_BYTES, f"Content-Length: {MAX_BYTES}"), MAX_BYTES),
        (post(chunked(400, 600) + "0\r\n\r\n", "Transfer-Encoding: chunked"), MAX_BYTES),
        (post("0\r\n\r\n", "Transfer-Encoding: chunked"), 0),
        (post(""), 0),
    ],
)
def test_bodies_within_the_limit_arrive(url: str, request_text: str, size: int) -> None:
    status, _, answer = parsed(raw(url, request_text))
    assert (status, answer["bytes"]) == (200, size)


@pytest.mark.parametrize(
    "request_text",
    [
        post("x" * 100, f"Content-Length: {MAX_BYTES + 1}"),
        post("", f"Content-Length: {2**63 - 1}"),
        post(chunked(600, 401), "Transfer-Encoding: chunked"),
        post(chunked(*[1] * (MAX_BYTES + 1)), "Transfer-Encoding: chunked"),
    ],
)
def test_longer_bodies_are_refused_and_not_read(url: str, request_text: str) -> None:
    """None of these is whole: the answer comes without the rest, and then the connection is closed."""
    status, headers, answer = parsed(raw(url, request_text))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert ("connection", "close") in headers
    assert len([name for name, _ in headers if name == "x-request-id"]) == 1


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: -1",),
        ("Content-Length: 1e3",),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        (f"Content-Length: {'9' * 5000}",),
    ],
)
def test_ambiguous_lengths_never_reach_the_application(url: str, lines: tuple[str, ...]) -> None:
    status, _, _ = parsed(raw(url, post("hello", *lines)))
    assert status in (400, 413)


@pytest.mark.parametrize(
    ("value", "length"), [(b"5", 5), (b"0005", 5), (b"9" * 5000, 10**18), (b"x", 0), (b"", 0), (b"-5", 0)]
)
def test_declared_lengths_of_any_form_are_numbers(value: bytes, length: int) -> None:
    found = edge._content_length({"headers": [(b"content-length", value)]})
    assert found == length if length < 10**18 else found >= length


@pytest.mark.parametrize(
    "request_text",
    [
        post("half", "Content-Length: 10"),
        post(chunked(5), "Transfer-Encoding: chunked"),
        post("", "Content-Length: 10", "Expect: 100-continue"),
    ],
)
def test_slow_bodies_are_cut_off(url: str, request_text: str) -> None:
    response = raw(url, request_text).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    status, headers, answer = parsed(response)
    assert (status, answer["error"]["code"]) == (408, "request_timeout")
    assert ("connection", "close") in headers


def test_a_byte_now_and_then_does_not_help(url: str) -> None:
    with closing(connect(url)) as connection:
        connection.sendall(post("", "Content-Length: 1000").encode())
        connection.settimeout(BODY_TIMEOUT_S / 10)
        response, sent = b"", 0
        while b"\r\n\r\n" not in response:
            try:
                response += connection.recv(4096)
            except TimeoutError:
                sent += connection.send(b"x")
                assert sent < 1000
    assert response.startswith(b"HTTP/1.1 408")


def test_a_body_that_is_here_has_all_the_time() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"all"
        assert (await asyncio.wait_for(receive(), 10))["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 204})

    async def late_disconnect() -> None:
        messages = [{"type": "http.request", "body": b"all"}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.sleep(0.2)
            return {"type": "http.disconnect"}

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "headers": []}
        await BodyLimit(slow, MAX_BYTES, timeout_s=0.05)(scope, receive, send)
        assert sent[0]["status"] == 204

    asyncio.run(late_disconnect())


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_bodies_of_get_are_not_there(url: str, method: str) -> None:
    request = f"{method} /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 5000\r\n\r\n{'x' * 5000}"
    status, _, answer = parsed(raw(url, request))
    assert status == 200
    assert method == "HEAD" or answer["bytes"] == 0


def test_an_application_that_fails_for_want_of_the_body_is_not_blamed() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            assert message["type"] == "http.request"
        raise RuntimeError("no body")

    pieces: list[Message] = [{"type": "http.request", "body": b"x" * 600, "more_body": True}] * 2
    with pytest.raises(ApiError) as refused:
        asyncio.run(call(BodyLimit(app, MAX_BYTES), *pieces, method="POST"))
    assert refused.value.status == 413
    with pytest.raises(RuntimeError):
        asyncio.run(call(BodyLimit(app, MAX_BYTES), method="POST"))


def test_an_answer_that_has_begun_goes_on() -> None:
    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"done"})

    pieces: list[Message] = [{"type": "http.request", "body": b"x" * 600, "more_body": True}] * 2
    sent = asyncio.run(call(BodyLimit(early, MAX_BYTES), *pieces, method="POST"))
    assert [message.get("body") for message in sent] == [None, b"done"]


# Headers of responses


@pytest.mark.parametrize(
    ("path", "cache"),
    [("/echo", "no-store"), ("/cached", "no-store"), ("/missing", "no-store"), ("/playground/app.js", "no-cache")],
)
def test_responses_tell_browsers_to_be_careful(url: str, path: str, cache: str) -> None:
    headers = httpx2.get(url + path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers.get_list("cache-control") == [cache]
    assert not [name for name in headers if name.startswith("access-control-")]


def test_an_application_may_be_stricter_and_is_not_contradicted() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"Content-Security-Policy", b"default-src 'none'")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    (start,) = asyncio.run(call(SecurityHeaders(app)))
    policies = [value for name, value in start["headers"] if name.lower() == b"content-security-policy"]
    assert policies == [b"default-src 'none'"]


def test_refusals_are_told_of() -> None:
    told: list[tuple[str, ApiError]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ApiError(429, "enough", code="rate_limit_exceeded", retry_after=2.5)

    def note(scope: Scope, error: ApiError) -> None:
        told.append((scope["path"], error))

    sent = asyncio.run(call(Refusals(app, note), path="/p/v1/x", root_path="/p"))
    assert error_of(sent) == (429, "rate_limit_exceeded")
    assert dict(sent[0]["headers"])[b"retry-after"] == b"3"
    assert [(path, error.code) for path, error in told] == [("/p/v1/x", "rate_limit_exceeded")]


# Around Ray Serve's proxy


def test_ray_serve_takes_the_middlewares_from_their_import_path() -> None:
    (path,) = edge.PROXY_ENVIRONMENT.values()
    made = validate_http_proxy_callback_return(call_function_from_import_path(path))
    assert [item.cls for item in made] == [NoSteering, BodyLimit, ProxyErrors, RequestId, SlowReaders]


@pytest.mark.parametrize("form", [str.lower, str.upper, str.title, lambda name: name.replace("-", "_")])
@pytest.mark.parametrize(
    "name",
    [
        "x-request-timeout-seconds",
        "x-request-disconnect-disabled",
        "serve-multiplexed-model-id",
        "x-session-id",
        "x-serve-router-target",
    ],
)
def test_headers_that_steer_serve_are_gone_in_any_spelling(name: str, form: Callable[[str], str]) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])

    headers = [(form(name).encode(), b"1"), (b"x-session", b"2"), (form(name).encode(), b"3")]
    asyncio.run(call(NoSteering(app), headers=headers))
    assert seen == [(b"x-session", b"2")]


def test_web_sockets_are_refused() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    assert asyncio.run(call(NoSteering(app), type="websocket")) == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    ("status", "code", "retry_after"),
    [
        (404, "not_found", None),
        (408, "request_timeout", None),
        (429, "overloaded", "7"),
        (500, "internal_error", None),
        (503, "overloaded", "7"),
    ],
)
def test_plain_text_of_the_proxy_becomes_an_error(status: int, code: str, retry_after: str | None) -> None:
    with served(RequestId(ProxyErrors(application()))) as address:
        response = httpx2.get(f"{address}/plain/{status}")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text
    assert "replica" not in response.text


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """What Serve's proxy sends for a replica that died with a request: nothing."""


async def _raising(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("secret")


@pytest.mark.parametrize("app", [_nothing, _raising])
def test_no_answer_of_the_proxy_is_an_error(app: ASGIApp) -> None:
    sent = asyncio.run(call(ProxyErrors(app)))
    assert error_of(sent) == (503, "overloaded")
    assert b"secret" not in sent[1]["body"]
    assert dict(sent[0]["headers"])[b"retry-after"] == b"1"


def broken_off(kind: bytes) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"data: {", "more_body": True})

    return app


def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    *_, last = asyncio.run(call(ProxyErrors(broken_off(b"text/event-stream; charset=utf-8"))))
    assert not last.get("more_body", False)
    event = last["body"].decode().strip()
    assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error"


def test_another_answer_that_breaks_off_is_seen_to_be_broken() -> None:
    with served(ProxyErrors(broken_off(b"application/json"))) as address, pytest.raises(httpx2.RemoteProtocolError):
        httpx2.get(f"{address}/echo")


def test_what_is_whole_is_left_as_it_is() -> None:
    async def stream() -> Any:
        yield "data: 1\n\n"
        yield "data: [DONE]\n\n"

    app = Starlette(routes=[Route("/echo", lambda _: StreamingResponse(stream(), media_type="text/event-stream"))])
    with served(RequestId(ProxyErrors(app))) as address:
        assert httpx2.get(f"{address}/echo").text == "data: 1\n\ndata: [DONE]\n\n"


# Slow readers


def endless(ended: list[str]) -> ASGIApp:
    """Sends until the client is gone, as Serve's proxy does: it looks for that between messages."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnect(receive))
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            await asyncio.sleep(0)
        ended.append("disconnected")

    return app


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def test_a_client_that_does_not_read_is_cut_off() -> None:
    """uvicorn's `send` does block: without a limit this application would never end."""
    ended: list[str] = []
    app = SlowReaders(ProxyErrors(endless(ended)), timeout_s=0.5)
    with served(app) as address, closing(connect(address, receive_buffer=4096)) as connection:
        connection.sendall(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: bool(ended))
        assert not read_all(connection).endswith(b"0\r\n\r\n")


def test_messages_after_the_cut_are_dropped() -> None:
    async def scenario() -> None:
        passed: list[Message] = []
        blocked = asyncio.Event()

        async def send(message: Message) -> None:
            if message["body"] == b"blocks":
                await blocked.wait()
            passed.append(message)

        gone = asyncio.Event()
        bounded: Callable[[Message], Awaitable[None]] = bounded_send(send, 0.05, gone)
        await bounded({"body": b"first"})
        assert not gone.is_set()
        await bounded({"body": b"blocks"})
        assert gone.is_set()
        blocked.set()
        await bounded({"body": b"late"})
        assert passed == [{"body": b"first"}]

    asyncio.run(scenario())
