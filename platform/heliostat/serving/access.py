"""Who may use the API: keys, their models and limits, checked before anything of a request is read. Knows ASGI.

Without a key file everybody may, but for web pages of other sites: a browser on this machine must not let them in.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

from starlette.types import ASGIApp, Receive, Scope, Send

from heliostat.serving.edge import BodyLimit, Refusals, RequestId, SecurityHeaders, is_playground, path_of
from heliostat.serving.keys import Key, KeyRing
from heliostat.serving.limits import Limiter
from heliostat.serving.protocol import ApiError


def protect(
    app: ASGIApp,
    ring: KeyRing | None,
    max_body_bytes: int,
    refused: Callable[[Scope, ApiError], None] = lambda *_: None,
) -> ASGIApp:
    """The gateway's application with everything around it that guards it.

    `refused` is told of what does not reach the application, and why.
    """
    guarded = Authentication(BodyLimit(app, max_body_bytes), ring, Limiter())
    return RequestId(SecurityHeaders(Refusals(guarded, refused)))


def require_model(key: Key | None, model_id: str) -> None:
    """Let a key use the models that it may, in all their versions (`cron` allows `cron@3`). No key: keys are off.

    Call it before the model is looked up, so that nobody learns which others there are.

    Raises:
        ApiError: 403.
    """
    if not _may_use(key, model_id):
        message = f"this API key may not use the model `{model_id[:100]}`"
        raise ApiError(403, message, param="model", code="model_not_allowed")


def visible(key: Key | None, model_ids: Iterable[str]) -> list[str]:
    """Those of the models that a key may use."""
    return [model_id for model_id in model_ids if _may_use(key, model_id)]


class Authentication:
    """Lets in requests with a valid key, within its limits; `scope["state"]["key"]` is then its Key, else None.

    Open to all are /health and the playground's own files. Limits are for requests that do work (POST).

    Raises:
        ApiError: 401, 403 or 429.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing | None, limiter: Limiter) -> None:
        self._app = app
        self._ring = ring
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        with ExitStack() as held:
            key = self._admit(scope, held)
            await self._app(_without_secret(scope, key), receive, send)

    def _admit(self, scope: Scope, held: ExitStack) -> Key | None:
        if scope["method"] in ("GET", "HEAD") and _is_open(path_of(scope)):
            return None
        if self._ring is None:
            _refuse_other_sites(scope)
            return None
        presented = _bearer(scope)
        key = self._ring.check(presented)
        if key is None:
            known = "the API key is not valid" if presented else "an API key is needed"
            raise ApiError(401, f"{known}; send it as `Authorization: Bearer KEY`", code="invalid_api_key")
        if scope["method"] == "POST":
            held.enter_context(self._limiter.acquire(key))
        return key


def _may_use(key: Key | None, model_id: str) -> bool:
    return key is None or key.models is None or model_id.split("@", 1)[0] in key.models


def _is_open(path: str) -> bool:
    return path == "/health" or is_playground(path)


def _header(scope: Scope, name: bytes) -> str | None:
    """The value of a header that is there exactly once."""
    values = [value for key, value in scope["headers"] if key.lower() == name]
    return values[0].decode("latin-1") if len(values) == 1 else None


def _bearer(scope: Scope) -> str | None:
    scheme, _, token = (_header(scope, b"authorization") or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _without_secret(scope: Scope, key: Key | None) -> Scope:
    """What comes after sees whose key it was, not the key: it cannot log it."""
    headers = [item for item in scope["headers"] if item[0].lower() != b"authorization"]
    return {**scope, "headers": headers, "state": {**scope.get("state", {}), "key": key}}


def _refuse_other_sites(scope: Scope) -> None:
    """Browsers name the page that a request comes from, and send it even where the page may not read the answer."""
    if all(name.lower() != b"origin" for name, _ in scope["headers"]):
        return
    origin, host = _header(scope, b"origin"), _header(scope, b"host")
    if not origin or not host or origin.partition("://")[2].lower() != host.lower():
        message = "requests of web pages from elsewhere are refused while the endpoint has no API keys"
        raise ApiError(403, message, code="cross_origin")
