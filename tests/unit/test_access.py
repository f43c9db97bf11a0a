"""Who gets in: keys of all kinds to all paths, the models of a key, its limits, and pages of other sites."""

import asyncio
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat.serving import keys
from heliostat.serving.access import Authentication, protect, require_model, visible
from heliostat.serving.edge import Refusals
from heliostat.serving.keys import Key, KeyRing
from heliostat.serving.limits import Limiter
from heliostat.serving.protocol import ApiError
from tests.wire import parsed, raw, served


@dataclass
class Application:
    """Answers every path, and keeps what it was given."""

    scope: Scope | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.scope = scope
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"in"})


@dataclass(frozen=True)
class Tenants:
    """Keys of one endpoint, and one of another."""

    ring: KeyRing
    alice: str
    bob: str
    revoked: str
    foreign: str


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    folder = tmp_path_factory.mktemp("keys")
    alice, bob = (keys.add(folder / "keys.json", name) for name in ("alice", "bob"))
    revoked = keys.add(folder / "keys.json", "revoked")
    keys.revoke(folder / "keys.json", "revoked")
    foreign = keys.add(folder / "other.json", "alice")
    return Tenants(KeyRing(folder / "keys.json"), alice, bob, revoked, foreign)


def request(app: ASGIApp, method: str, path: str, headers: list[tuple[bytes, bytes]]) -> httpx2.Response:
    async def send() -> httpx2.Response:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


# {alice} and so on stand for the keys. A header may come twice.
GOOD = [
    [b"Bearer {alice}"],
    [b"bearer {alice}"],
    [b"BEARER  {bob} "],
]
BAD = [
    [],
    [b""],
    [b"Bearer"],
    [b"Bearer "],
    [b"Bearer wrong"],
    [b"Bearer hsk_"],
    [b"Bearer {revoked}"],
    [b"Bearer {foreign}"],
    [b"Bearer {alice}x"],
    [b"Bearer {alice} {alice}"],
    [b"Bearer {alice},{bob}"],
    [b"Bearer {alice}", b"Bearer {alice}"],
    [b"Bearer wrong", b"Bearer {alice}"],
    [b"{alice}"],
    [b"Basic {alice}"],
    [b"Basic YWxpY2U6"],
    [b"Token {alice}"],
    [b"Bearer\t{alice}"],
    [b"Bearer:{alice}"],
    [b"Bearer \xe9\xff"],
    [b"Bearer \xf0\x9f\x94\x91"],
    [b"Bearer " + b"x" * 60_000],
    [b"Bearer *"],
    [b"Bearer null"],
    [b"Bearer none"],
    [b"Bearer ' OR 1=1 --"],
]
CLOSED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/cron"),
    ("GET", "/v1/decoding?model=cron"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
]
OPEN = [("GET", "/"), ("HEAD", "/"), ("GET", "/health"), ("GET", "/playground/app.js")]
# Nothing beside the open paths is open, however similar.
SIMILAR = [
    ("POST", "/"),
    ("POST", "/health"),
    ("DELETE", "/playground/app.js"),
    ("OPTIONS", "/"),
    ("GET", "/health/"),
    ("GET", "/Health"),
    ("GET", "/healthz"),
    ("GET", "/playground"),
    ("GET", "/playgrounds/x"),
    ("GET", "/PLAYGROUND/x"),
    ("GET", "/nowhere"),
    ("GET", "/v1/models?api_key={alice}"),
    ("GET", "/v1/models?key={alice}&token={alice}&access_token={alice}&authorization=Bearer%20{alice}"),
]
CASES = [
    *((method, path, values, 200) for (method, path), values in itertools.product(CLOSED, GOOD)),
    *((method, path, values, 401) for (method, path), values in itertools.product(CLOSED, BAD)),
    *((method, path, values, 200) for (method, path), values in itertools.product(OPEN, [*BAD[:4], *GOOD])),
    *((method, path, [], 401) for method, path in SIMILAR),
]


def filled(text: str, tenants: Tenants) -> str:
    for name in ("alice", "bob", "revoked", "foreign"):
        text = text.replace(f"{{{name}}}", getattr(tenants, name))
    return text


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize(("method", "path", "values", "status"), CASES)
def test_only_valid_keys_get_in(tenants: Tenants, method: str, path: str, values: list[bytes], status: int) -> None:
    told: list[int] = []
    app = protect(Application(), tenants.ring, 1000, lambda _, error: told.append(error.status))
    written = [(b"Authorization", filled(value.decode("latin-1"), tenants).encode("latin-1")) for value in values]
    response = request(app, method, filled(path, tenants), written)
    assert response.status_code == status
    assert told == ([401] if status == 401 else [])
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        for secret in (tenants.alice, tenants.bob, tenants.revoked, tenants.foreign):
            assert secret not in response.text


def test_raw_requests_get_in_no_other_way(tenants: Tenants) -> None:
    """Line folding, and names with spaces, as other servers might read them."""
    with served(protect(Application(), tenants.ring, 1000)) as url:
        tricks = [
            f"Authorization : Bearer {tenants.alice}",
            f"Authorization: Bearer\r\n {tenants.alice}",
            f"X: y\n\nAuthorization: Bearer {tenants.alice}",
            f"X-Authorization: Bearer {tenants.alice}",
            f"Cookie: Authorization=Bearer {tenants.alice}",
            f"Proxy-Authorization: Bearer {tenants.alice}",
        ]
        for trick in tricks:
            status, _, _ = parsed(
                raw(url, f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{trick}\r\n\r\n")
            )
            assert status in (400, 401), trick
        # The server decodes the path once; the middlewares never again.
        for path in ("//health", "/v1/../health", "/%2568ealth"):
            response = raw(url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert response.startswith(b"HTTP/1.1 401"), path
        for path in ("/playground/%2e%2e/v1/models", "/playground/..%2fv1/models", "/%68ealth"):
            response = raw(url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert response.startswith(b"HTTP/1.1 200")


def test_the_application_sees_whose_key_it_is_and_not_the_key(tenants: Tenants) -> None:
    application = Application()
    app = protect(application, tenants.ring, 1000)
    request(app, "GET", "/v1/models", [(b"Authorization", f"Bearer {tenants.bob}".encode())])
    assert application.scope is not None
    assert application.scope["state"]["key"].name == "bob"
    assert application.scope["state"]["request_id"]
    assert tenants.bob not in repr(application.scope)
    request(app, "GET", "/", [(b"Authorization", f"Bearer {tenants.bob}".encode())])
    assert application.scope["state"]["key"] is None
    assert tenants.bob not in repr(application.scope)


def test_a_path_below_a_prefix_is_judged_without_it(tenants: Tenants) -> None:
    async def status(path: str) -> int:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "GET", "path": path, "root_path": "/prefix", "headers": []}
        await protect(Application(), tenants.ring, 1000)(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(status("/prefix/health")) == 200
    assert asyncio.run(status("/prefix/v1/models")) == 401


def test_web_sockets_do_not_get_in(tenants: Tenants) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/", "root_path": "", "headers": []}

    async def knock() -> None:
        await protect(Application(), tenants.ring, 1000)(scope, receive, send)

    asyncio.run(knock())
    assert sent == [{"type": "websocket.close", "code": 1008}]


# Models


def key(**values: Any) -> Key:
    return Key.model_validate({"name": "a", "sha256": "0" * 64, "created": "2026-01-01T00:00:00Z", **values})


@pytest.mark.parametrize(
    ("allowed", "model", "may"),
    [
        (None, "anything", True),
        (["cron"], "cron", True),
        (["cron"], "cron@3", True),
        (["cron"], "cron@", True),
        (["org/cron"], "org/cron@12", True),
        (["cron"], "cron2", False),
        (["cron"], "cro", False),
        (["cron"], "Cron", False),
        (["cron"], "other@cron", False),
        (["cron"], "@cron", False),
        (["cron"], " cron", False),
        (["cron"], "", False),
        (["cron"], "org/cron", False),
        (["cron", "chat"], "chat@1", True),
    ],
)
def test_models_of_a_key(allowed: list[str] | None, model: str, may: bool) -> None:
    holder = key(models=allowed)
    assert visible(holder, [model]) == ([model] if may else [])
    require_model(None, model)
    if may:
        require_model(holder, model)
        return
    with pytest.raises(ApiError) as refused:
        require_model(holder, model)
    assert (refused.value.status, refused.value.code, refused.value.param) == (403, "model_not_allowed", "model")


def test_without_keys_all_models_are_visible() -> None:
    assert visible(None, ["a", "b@1"]) == ["a", "b@1"]


# Limits


@pytest.fixture
def limited(tmp_path: Path) -> tuple[KeyRing, list[tuple[bytes, bytes]]]:
    secret = keys.add(tmp_path / "keys.json", "alice", requests_per_minute=3, max_concurrent=1)
    return KeyRing(tmp_path / "keys.json"), [(b"Authorization", f"Bearer {secret}".encode())]


def test_only_work_is_limited(limited: tuple[KeyRing, list[tuple[bytes, bytes]]]) -> None:
    ring, header = limited
    app = protect(Application(), ring, 1000)
    statuses = [request(app, "GET", "/v1/models", header).status_code for _ in range(5)]
    statuses += [request(app, "POST", "/v1/completions", header).status_code for _ in range(4)]
    assert statuses == [200] * 8 + [429]
    refused = request(app, "POST", "/v1/completions", header)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60


@pytest.mark.parametrize("ending", ["done", "failed", "cancelled"])
def test_a_stream_gives_its_slot_back_however_it_ends(
    limited: tuple[KeyRing, list[tuple[bytes, bytes]]], ending: str
) -> None:
    ring, header = limited
    limiter = Limiter()

    async def scenario() -> None:
        started, over = asyncio.Event(), asyncio.Event()

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200})
            started.set()
            await over.wait()
            if ending == "failed":
                raise RuntimeError

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(name.lower(), value) for name, value in header]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        app = Refusals(Authentication(stream, ring, limiter), lambda *_: None)
        running = asyncio.create_task(app(scope, receive, send))
        await started.wait()
        await app(scope, receive, send)
        assert [message["status"] for message in sent if "status" in message] == [200, 429]
        assert limiter.running("alice") == 1
        over.set() if ending != "cancelled" else running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert limiter.running("alice") == 0

    asyncio.run(scenario())


# Pages of other sites, while there are no keys


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        (b"http://endpoint", 200),
        (b"HTTP://ENDPOINT", 200),
        (b"https://endpoint", 200),
        (b"http://evil.example", 403),
        (b"http://endpoint.evil.example", 403),
        (b"http://endpoint:81", 403),
        (b"chrome-extension://abc", 403),
        (b"null", 403),
        (b"", 403),
        (b"http://[::1", 403),
        (b"\xff", 403),
    ],
)
def test_other_sites_pages_are_refused_without_keys(tenants: Tenants, origin: bytes | None, status: int) -> None:
    headers = [] if origin is None else [(b"Origin", origin)]
    app = protect(Application(), None, 1000)
    response = request(app, "POST", "/v1/completions", headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers
    if status == 403:
        assert response.json()["error"]["code"] == "cross_origin"
        assert request(app, "GET", "/health", headers).status_code == 200
        twice = request(app, "POST", "/v1/completions", [*headers, (b"Origin", b"http://endpoint")])
        assert twice.status_code == 403
    authorised = [*headers, (b"Authorization", f"Bearer {tenants.alice}".encode())]
    assert request(protect(Application(), tenants.ring, 1000), "POST", "/v1/completions", authorised).status_code == 200
