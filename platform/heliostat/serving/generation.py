"""One request on one model: from a checked request to the messages that answer it. Knows neither HTTP nor Ray."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from heliostat.serving.admission import Overloaded
from heliostat.serving.calls import Accepted, Broken, Delta, Deltas, Message, Refused, Resumed, TokenLogprob
from heliostat.serving.engine import EngineFailed
from heliostat.serving.prompts import PromptEncoder
from heliostat.serving.protocol import AnyRequest, ChatCompletionRequest, ClassificationRequest, CompletionRequest
from heliostat.serving.sampling import DecodingDefaults, InvalidRequest, SamplingParams

Request = CompletionRequest | ChatCompletionRequest


class Served(Protocol):
    """A model that answers requests, whatever runs it; served.ServedModel says what each of these does."""

    @property
    def prompts(self) -> PromptEncoder: ...

    @property
    def defaults(self) -> DecodingDefaults: ...

    @property
    def max_length(self) -> int: ...

    def check_prompt(self, prompt_ids: Sequence[int]) -> None: ...

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None: ...

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, emitted: Sequence[int] = ()
    ) -> AsyncGenerator[tuple[int, Delta]]: ...

    async def score(self, prompt_ids: Sequence[int], top: int) -> list[TokenLogprob | None]: ...


@dataclass(frozen=True)
class Job:
    """One call of the model; its completions are the choices `first`, `first` + 1, ..."""

    prompt_ids: list[int]
    params: SamplingParams
    first: int


async def answer(
    served: Served, request: AnyRequest, resumed: Resumed, max_prompt_tokens: int | None = None
) -> AsyncGenerator[Message]:
    """Accepted, then lists of deltas until each choice has its last; or Refused alone; or Broken as the end.

    Closing it early gives all slots back. `resumed` says what was given out before: deltas hold only what comes after.
    """
    if isinstance(request, ClassificationRequest):
        message = "this model is a language model; use /v1/completions or /v1/chat/completions"
        yield Refused(400, message, "model", code="wrong_task")
        return
    try:
        prompts = await _encode(served, request, max_prompt_tokens)
        jobs = [] if request.max_tokens == 0 else _jobs(served, request, prompts)
        accepted = await _accepted(served, request, prompts)
        async with aclosing(_run(served, jobs, resumed)) as deltas:
            # With the first deltas in hand: what is refused for lack of room is refused, not begun.
            first = await anext(deltas, None) if jobs else _nothing(accepted)
            yield accepted
            if first is not None:
                yield first
            async for more in deltas:
                yield more
    except InvalidRequest as error:
        yield Refused(400, str(error), _own_name(request, error.param), error.code)
    except Overloaded as error:
        yield Refused(503, str(error), code="overloaded", retry_after=error.retry_after)
    except EngineFailed as error:
        yield Broken(str(error))


async def _encode(served: Served, request: Request, limit: int | None) -> list[list[int]]:
    if isinstance(request, ChatCompletionRequest):
        if not served.prompts.has_chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", "model")
        prompts = [await served.prompts.chat([message.as_template_input() for message in request.messages])]
    else:
        prompts = [p if isinstance(p, list) else await served.prompts.text(p) for p in request.prompt]
    for ids in prompts:
        served.check_prompt(ids)
        if limit is not None and len(ids) > limit:
            raise InvalidRequest(
                # OpenAI's sentence, by which clients know the error.
                f"Input tokens exceed the configured limit of {limit} tokens: the prompt has {len(ids)}",
                "prompt",
                code="context_length_exceeded",
            )
    return prompts


def _own_name(request: Request, param: str) -> str:
    """What a setting of the engine's is called in the request."""
    return "messages" if param == "prompt" and isinstance(request, ChatCompletionRequest) else param


def _jobs(served: Served, request: Request, prompts: Sequence[list[int]]) -> list[Job]:
    """The calls of the model: `candidates` for each prompt, all beams of a prompt in one."""
    found = []
    for number, ids in enumerate(prompts):
        limit = request.token_limit(served.defaults.max_tokens, served.max_length - len(ids))
        params = served.defaults.params(limit, **request.settings(), logprobs=request.top_tokens)
        first = number * request.candidates
        if request.candidates > 1 and params.temperature == 0 and params.extra.get("num_beams", 1) > 1:
            # Beams of one search differ, and the best come first; the same search twice would give the same.
            found.append(Job(ids, replace(params, sequences=request.candidates), first))
            continue
        params = _ranked(params) if request.candidates > (request.n or 1) else params
        for candidate in range(request.candidates):
            found.append(Job(ids, params, first + candidate))
            params = params if params.seed is None else replace(params, seed=_following(params.seed))
    for job in found:
        served.check(job.prompt_ids, job.params)
    return found


def _ranked(params: SamplingParams) -> SamplingParams:
    """The settings, with the log-probabilities that `best_of` ranks by."""
    if params.extra:
        raise InvalidRequest(f"`best_of` above `n` cannot be had together with `{min(params.extra)}`", "best_of")
    return params if params.logprobs is not None else replace(params, logprobs=0)


def _following(seed: int) -> int:
    """The seed of the next choice, within 64 bits."""
    return seed + 1 if seed < 2**63 - 1 else -(2**63)


async def _accepted(served: Served, request: Request, prompts: Sequence[list[int]]) -> Accepted:
    tokens = sum(map(len, prompts))
    choices = len(prompts) * request.candidates
    if not isinstance(request, CompletionRequest) or not request.echo:
        return Accepted(tokens, choices)
    texts = tuple(served.prompts.decode(ids) for ids in prompts)
    if request.logprobs is None:
        return Accepted(tokens, choices, texts)
    scored = await _score(served, prompts, request.logprobs)
    rows = tuple(_with_first(served, ids, row) for ids, row in zip(prompts, scored, strict=True))
    return Accepted(tokens, choices, texts, rows)


async def _score(served: Served, prompts: Sequence[list[int]], top: int) -> list[list[TokenLogprob | None]]:
    """All at once, so that they share batches. The first error ends them all."""
    tasks = [asyncio.create_task(served.score(ids, top)) for ids in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _with_first(served: Served, ids: Sequence[int], row: Sequence[TokenLogprob | None]) -> tuple[TokenLogprob, ...]:
    first = TokenLogprob(ids[0], served.prompts.decode(ids[:1]), None)
    return tuple(token or first for token in row)


async def _run(served: Served, jobs: Sequence[Job], resumed: Resumed) -> AsyncGenerator[Deltas]:
    """All jobs at once; yields what has come of any of them. The first error ends them all."""
    arrived: asyncio.Queue[Deltas | Exception] = asyncio.Queue()

    async def run(job: Job) -> None:
        try:
            emitted = resumed.token_ids.get(job.first, ())
            async with aclosing(served.generate(job.prompt_ids, job.params, emitted)) as deltas:
                async for number, delta in deltas:
                    arrived.put_nowait([(job.first + number, delta)])
        except Exception as error:
            arrived.put_nowait(error)

    wanted = [job for job in jobs if job.first not in resumed.done]
    tasks = [asyncio.create_task(run(job)) for job in wanted]
    try:
        unfinished = sum(job.params.sequences for job in wanted)
        while unfinished:
            deltas = _joined(await arrived.get(), arrived)
            unfinished -= sum(delta.finish_reason is not None for _, delta in deltas)
            yield deltas
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _nothing(accepted: Accepted) -> Deltas:
    """The end of all choices of a request that wants no token, only its prompts back."""
    return [(index, Delta("", (), accepted.prompt_tokens, 0, "length")) for index in range(accepted.choices)]


def _joined(first: Deltas | Exception, arrived: "asyncio.Queue[Deltas | Exception]") -> Deltas:
    """What has arrived by now, in one message: a message costs more than a delta.

    Raises:
        Exception: what a job raised.
    """
    found: Deltas = []
    item = first
    while True:
        if isinstance(item, Exception):
            raise item
        found += item
        if arrived.empty():
            return found
        item = arrived.get_nowait()
