"""The HTTP API of one model: OpenAI's routes. Knows HTTP and a served model, not Ray."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from heliostat.serving.answers import ChatWire, CompletionWire, Usage, model_card
from heliostat.serving.engine import EngineFailed
from heliostat.serving.protocol import (
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    explain,
    model_not_found,
)
from heliostat.serving.sampling import InvalidRequest, SamplingParams
from heliostat.serving.served import ServedModel
from heliostat.serving.text import Delta

logger = logging.getLogger(__name__)
# Seconds after which a client may try again; the engine restarts within a fraction of that.
RETRY_AFTER = "1"


@dataclass(frozen=True)
class Job:
    """One completion to generate."""

    prompt_ids: list[int]
    params: SamplingParams


def create_app(served: ServedModel) -> FastAPI:
    """The application with all routes; errors come in OpenAI's form."""
    app = FastAPI(title="Heliostat", docs_url=None, redoc_url=None)
    created = int(time.time())

    def check_model(name: str) -> None:
        if name != served.id:
            raise model_not_found(name)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if served.healthy else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(served.id, created)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name)
        return model_card(served.id, created)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest) -> Response:
        check_model(request.model)
        prompts = [p if isinstance(p, list) else await served.prompts.text(p) for p in request.prompt]
        return await _respond(served, request, prompts, CompletionWire(served.id))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatCompletionRequest) -> Response:
        check_model(request.model)
        if not served.prompts.has_chat_template:
            raise ApiError(400, f"the model `{served.id}` has no chat template; use /v1/completions", param="model")
        prompt = await served.prompts.chat([message.as_template_input() for message in request.messages])
        return await _respond(served, request, [prompt], ChatWire(served.id))

    _install_error_handlers(app)
    return app


async def _respond(
    served: ServedModel,
    request: CompletionRequest | ChatCompletionRequest,
    prompts: Sequence[list[int]],
    wire: CompletionWire,
) -> Response:
    """Generate `n` completions of each prompt and answer, whole or as a stream."""
    jobs = []
    for ids in prompts:
        room = served.max_length - len(ids)
        params = request.sampling(served.defaults, request.token_limit(served.defaults, room))
        served.check(ids, params)
        jobs += [Job(ids, params)] * (request.n or 1)
    prompt_tokens = sum(map(len, prompts))
    deltas = generate_all(served, jobs)
    if not request.stream:
        return JSONResponse(await _whole(deltas, len(jobs), prompt_tokens, wire))
    # With the first delta in hand, an engine that fails at once is still answered with a proper status.
    first = await anext(deltas)
    events = _stream(first, deltas, len(jobs), prompt_tokens, wire, request.include_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def generate_all(served: ServedModel, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Delta]]:
    """Run all jobs at once; yields (index of the job, delta) as they come. The first error ends them all."""
    queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()

    async def run(index: int, job: Job) -> None:
        try:
            async with aclosing(served.generate(job.prompt_ids, job.params)) as deltas:
                async for delta in deltas:
                    queue.put_nowait((index, delta))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(run(index, job)) for index, job in enumerate(jobs)]
    try:
        unfinished = len(tasks)
        while unfinished:
            index, delta = await queue.get()
            if isinstance(delta, Exception):
                raise delta
            unfinished -= delta.finish_reason is not None
            yield index, delta
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _whole(
    deltas: AsyncIterator[tuple[int, Delta]], count: int, prompt_tokens: int, wire: CompletionWire
) -> dict[str, Any]:
    texts = [""] * count
    last: dict[int, Delta] = {}
    async for index, delta in deltas:
        texts[index] += delta.text
        last[index] = delta
    choices = [wire.choice(index, texts[index], last[index].finish_reason) for index in range(count)]
    return wire.answer(choices, _usage(prompt_tokens, last))


async def _stream(
    first: tuple[int, Delta],
    rest: AsyncGenerator[tuple[int, Delta]],
    count: int,
    prompt_tokens: int,
    wire: CompletionWire,
    include_usage: bool,
) -> AsyncIterator[str]:
    """The server-sent events of an answer. A failure is an event of its own, and then there is no [DONE]."""
    extra = {"usage": None} if include_usage else {}
    last: dict[int, Delta] = {}
    try:
        for piece in wire.first_pieces(count):
            yield _event({**wire.chunk([piece]), **extra})
        async with aclosing(_prepended(first, rest)) as deltas:
            async for index, delta in deltas:
                last[index] = delta
                if delta.text or delta.finish_reason:
                    yield _event({**wire.chunk([wire.piece(index, delta.text, delta.finish_reason)]), **extra})
        if include_usage:
            yield _event({**wire.chunk([]), "usage": _usage(prompt_tokens, last).body()})
        yield "data: [DONE]\n\n"
    except EngineFailed as error:
        yield _event(ApiError(503, str(error), code="engine_failed").body())
    except Exception:
        logger.exception("a stream failed")
        yield _event(_unexpected().body())


async def _prepended(
    first: tuple[int, Delta], rest: AsyncGenerator[tuple[int, Delta]]
) -> AsyncGenerator[tuple[int, Delta]]:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item


def _usage(prompt_tokens: int, last: dict[int, Delta]) -> Usage:
    return Usage(prompt_tokens, sum(delta.completion_tokens for delta in last.values()))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _unexpected() -> ApiError:
    return ApiError(500, "an unexpected error happened; the server's log says more", code="internal_error")


def _install_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return _error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return _error_response(explain(error.errors()))

    @app.exception_handler(InvalidRequest)
    async def invalid(_: Request, error: InvalidRequest) -> Response:
        return _error_response(ApiError(400, str(error), param=error.param, code=error.code))

    @app.exception_handler(EngineFailed)
    async def failed(_: Request, error: EngineFailed) -> Response:
        return _error_response(ApiError(503, str(error), code="engine_failed"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path[:100]}"
        return _error_response(ApiError(error.status_code, message))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return _error_response(_unexpected())


def _error_response(error: ApiError) -> Response:
    headers = {"Retry-After": RETRY_AFTER} if error.status == 503 else {}
    return JSONResponse(error.body(), error.status, headers)
