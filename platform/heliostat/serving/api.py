"""The HTTP API: OpenAI's routes, and a few more. Knows HTTP and a router, neither Ray nor models."""

import logging
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from heliostat.serving import access, logs, metrics, openapi, pages, tracing
from heliostat.serving.answers import ChatWire, ClassificationWire, CompletionWire
from heliostat.serving.config import EndpointArgs
from heliostat.serving.edge import path_of
from heliostat.serving.exchange import Exchange, Origin, unexpected
from heliostat.serving.keys import Key, KeyRing
from heliostat.serving.protocol import (
    AnyRequest,
    ApiError,
    ChatCompletionRequest,
    ClassificationRequest,
    CompletionRequest,
    explain,
    invalid_json,
)
from heliostat.serving.routing import Router, card
from heliostat.serving.tracing import Tracing

logger = logging.getLogger(__name__)
_ENDPOINTS: dict[str, metrics.Endpoint] = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/classify": "classify",
}
_OPERATIONS: dict[metrics.Endpoint, tracing.Operation] = {
    "completions": "text_completion",
    "chat": "chat",
    "classify": "classify",
}


@dataclass(frozen=True)
class Front:
    """What stands between HTTP and the router."""

    keys: KeyRing | None
    metrics: metrics.GatewayMetrics
    tracing: Tracing
    max_body_bytes: int
    playground: bool

    @classmethod
    def of(cls, args: EndpointArgs) -> "Front":
        """As the endpoint's settings have it.

        Raises:
            ConfigError: the file of keys cannot be read, or tracing is asked for and not installed.
        """
        return cls(
            keys=KeyRing(args.api_keys) if args.api_keys else None,
            metrics=metrics.GatewayMetrics(metrics.RayRecorder()),
            tracing=tracing.start(args.tracing, "gateway"),
            max_body_bytes=args.max_body_bytes,
            playground=args.playground,
        )

    def refused(self, scope: Scope, error: ApiError) -> None:
        """Count and log a request for generation that was refused before any model was asked."""
        path = path_of(scope)
        if path not in _ENDPOINTS:
            return
        self.metrics.request(None, _ENDPOINTS[path]).rejected(metrics.rejection(error.status))
        state = scope["state"]
        key: Key | None = state.get("key")
        line = logs.RequestLine(
            request_id=state["request_id"],
            endpoint=path,
            status=error.status,
            key=key.name if key else None,
            error=error.code or error.kind,
        )
        logs.log_request(line)


def create_app(router: Router, front: Front) -> FastAPI:
    """The application with all routes; errors come in OpenAI's form. It relies on what `guarded` puts around it."""
    app = FastAPI(title="Heliostat", docs_url=None, redoc_url=None)
    openapi.describe(app)
    _add_models(app, router)
    _add_generation(app, router, front)
    if front.playground:
        pages.add_playground(app)

    @app.get("/health", include_in_schema=False)
    async def health() -> Response:
        routes = router.table.routes.values()
        return Response(status_code=200 if routes and all(route.stable.healthy for route in routes) else 503)

    @app.get("/metrics", include_in_schema=False)
    async def exposition() -> Response:
        return Response(await metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _install_error_handlers(app, front)
    return app


def guarded(app: FastAPI, front: Front) -> ASGIApp:
    """The application behind what checks keys, limits and bodies."""
    return access.protect(app, front.keys, front.max_body_bytes, front.refused)


def _add_models(app: FastAPI, router: Router) -> None:
    def cards(key: Key | None) -> list[dict[str, Any]]:
        return [card(*router.table.find(name)) for name in access.visible(key, router.table.ids())]

    @app.get("/v1/models", operation_id="list_models")
    async def models(http: Request) -> dict[str, Any]:
        return {"object": "list", "data": cards(http.state.key)}

    @app.get("/v1/models/{name:path}", operation_id="get_model")
    async def model(name: str, http: Request) -> dict[str, Any]:
        access.require_model(http.state.key, name)
        return card(*router.table.find(name))

    @app.get("/v1/decoding", operation_id="get_decoding")
    async def decoding(model: str, http: Request) -> dict[str, Any]:
        """The decoding settings that hold where a request leaves them open, and where each comes from."""
        access.require_model(http.state.key, model)
        route, pinned = router.table.find(model)
        version = pinned or route.stable
        return {"model": model, "version": version.name, **version.decoding}


def _add_generation(app: FastAPI, router: Router, front: Front) -> None:
    async def respond(http: Request, request: AnyRequest, wire: CompletionWire, kind: metrics.Endpoint) -> Response:
        key: Key | None = http.state.key
        try:
            access.require_model(key, request.model)
            route, _ = router.table.find(request.model)
        except ApiError as error:
            front.refused(http.scope, error)
            raise
        origin = Origin(http.state.request_id, key.name if key else None, http.url.path)
        meter = front.metrics.request(route.id, kind)
        trace = front.tracing.request(_OPERATIONS[kind], route.id, http.headers.get("traceparent"))
        exchange = Exchange(router, request, wire, origin, meter, trace)
        await exchange.begin()
        if request.stream:
            return _Stream(exchange)
        return JSONResponse(await exchange.whole())

    @app.post("/v1/completions", operation_id="create_completion", response_model=None)
    async def completions(request: CompletionRequest, http: Request) -> Response:
        wire = CompletionWire(request.model, logprobs=request.logprobs is not None)
        return await respond(http, request, wire, "completions")

    @app.post("/v1/chat/completions", operation_id="create_chat_completion", response_model=None)
    async def chat(request: ChatCompletionRequest, http: Request) -> Response:
        wire = ChatWire(request.model, logprobs=bool(request.logprobs))
        return await respond(http, request, wire, "chat")

    @app.post("/classify", operation_id="classify", response_model=None)
    async def classify(request: ClassificationRequest, http: Request) -> Response:
        return await respond(http, request, ClassificationWire(request.model), "classify")


class _Stream(StreamingResponse):
    """The events of an exchange, which is over when the response is: also where no event was taken."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange.events(), media_type="text/event-stream")
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. A client that takes none and goes away leaves their generator where it is."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._exchange.close()


def _install_error_handlers(app: FastAPI, front: Front) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return _error_response(error)

    def refuse(http: Request, problem: ApiError) -> Response:
        front.refused(http.scope, problem)
        return _error_response(problem)

    @app.exception_handler(RequestValidationError)
    async def malformed(http: Request, error: RequestValidationError) -> Response:
        return refuse(http, explain(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        # FastAPI's, of a body that is no text, too deep, or with too long a number. Other causes: the client is gone.
        if isinstance(error.__cause__, ValueError | RecursionError):
            return refuse(http, invalid_json())
        response = _error_response(ApiError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        logger.error("a request failed: %s", logs.describe(error))
        return _error_response(unexpected())


def _error_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers())
