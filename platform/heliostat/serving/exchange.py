"""One generation request at the gateway: its answer on the wire, counted, logged and traced. Knows no Ray.

Nothing that it logs or counts holds what a client wrote.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from heliostat.serving import logs
from heliostat.serving.answers import Choice, CompletionWire, Usage
from heliostat.serving.calls import Accepted, Broken, Deltas, Refused
from heliostat.serving.metrics import RequestMeter, rejection
from heliostat.serving.protocol import ApiError
from heliostat.serving.routing import Request, Router
from heliostat.serving.tracing import Attempt, RequestTrace

logger = logging.getLogger(__name__)
# Codes of errors that are neither the client's fault nor for lack of room.
_FAULTS = ("engine_failed", "internal_error")


@dataclass(frozen=True)
class Origin:
    """Where a request came from, as far as it may be logged."""

    request_id: str
    key: str | None
    """Name of the API key."""
    endpoint: str


@dataclass
class Exchange:
    """`begin`, then either `whole` or `events`, and after those `close`."""

    router: Router
    request: Request
    wire: CompletionWire
    origin: Origin
    meter: RequestMeter
    trace: RequestTrace
    _attempt: Attempt = field(init=False)
    _attempts: int = field(init=False, default=0)
    _version: str | None = field(init=False, default=None)
    _messages: AsyncGenerator[Accepted | Refused | Broken | Deltas] = field(init=False)
    _accepted: Accepted | None = field(init=False, default=None)
    _choices: list[Choice] = field(init=False, default_factory=list)
    _ended: bool = field(init=False, default=False)

    async def begin(self) -> None:
        """Find a replica that takes the request.

        Raises:
            ApiError: it is refused.
        """
        self._messages = self.router.generate(self.request, self)
        try:
            first = await anext(self._messages)
            if isinstance(first, Refused):
                raise ApiError(
                    first.status, first.message, param=first.param, code=first.code, retry_after=first.retry_after
                )
            if not isinstance(first, Accepted):
                raise unexpected()
        except BaseException as error:
            await self._end(error)
            raise
        self._accepted = first
        self._choices = [Choice() for _ in range(first.choices)]

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece.

        Raises:
            ApiError: generation failed.
        """
        problem: BaseException | None = None
        try:
            async for message in self._messages:
                if isinstance(message, Broken):
                    raise _broken(message)
                self._add(message)
            return self.wire.answer(self._best(), self._usage())
        except BaseException as error:
            problem = error
            raise
        finally:
            await self._end(problem)

    async def events(self) -> AsyncIterator[str]:
        """The server-sent events of the answer. A failure is an event of its own, and then there is no [DONE]."""
        problem: BaseException | None = None
        try:
            async for event in self._events():
                yield event
        except ApiError as error:
            problem = error
            yield _event(error.body())
        except Exception as error:
            problem = error
            logger.error("a stream failed: %s", logs.describe(error))
            yield _event(unexpected().body())
        except BaseException as error:  # the client is gone
            problem = error
            raise
        finally:
            await self._end(problem)

    async def close(self) -> None:
        """End an exchange whose events were not all read as one whose client is gone; any other has ended."""
        await self._end(asyncio.CancelledError())

    async def _events(self) -> AsyncGenerator[str]:
        include_usage = self.request.include_usage
        extra = {"usage": None} if include_usage else {}
        accepted = self._begun()
        for piece in self.wire.first_pieces(accepted.echo, accepted.prompt_logprobs, self.request.candidates):
            yield _event({**self.wire.chunk([piece]), **extra})
        async for message in self._messages:
            if isinstance(message, Broken):
                raise _broken(message)
            for index, delta in self._add(message):
                if delta.text or delta.finish_reason or delta.logprobs:
                    yield _event({**self.wire.chunk([self.wire.piece(index, delta)]), **extra})
        if include_usage:
            yield _event({**self.wire.chunk([]), "usage": self._usage().body()})
        yield "data: [DONE]\n\n"

    def asked(self, version: str) -> Mapping[str, str]:
        """See routing.Watch."""
        if self._attempts:
            self.meter.resumed()
        self._attempts += 1
        self._attempt = self.trace.attempt(self.meter.model, version)
        return self._attempt.carrier

    def taken(self, version: str) -> None:
        """See routing.Watch."""
        self._version = version
        self.meter.routed(version)

    def left(self, error: str | None) -> None:
        """See routing.Watch."""
        self._attempt.ended(error)

    def _add(self, message: Accepted | Refused | Deltas) -> Deltas:
        if not isinstance(message, list):
            raise unexpected()
        if count := sum(len(delta.token_ids) for _, delta in message):
            if self.meter.time_to_first_token is None:
                self.trace.first_token()
            self.meter.tokens(count)
        for index, delta in message:
            self._choices[index].add(delta)
        return message

    def _best(self) -> list[dict[str, Any]]:
        """The choices to give out: `n` of each prompt's candidates, the likeliest first where there are more."""
        wanted, made = self.request.n or 1, self.request.candidates
        found = []
        for first in range(0, len(self._choices), made):
            candidates = self._choices[first : first + made]
            if made > wanted:
                candidates = sorted(candidates, key=lambda choice: choice.mean_logprob, reverse=True)
            found += [self._with_prompt(first // made, choice) for choice in candidates[:wanted]]
        return [self.wire.choice(index, choice) for index, choice in enumerate(found)]

    def _with_prompt(self, number: int, choice: Choice) -> Choice:
        """The choice after its prompt, where that is asked back."""
        accepted = self._begun()
        if not accepted.echo:
            return choice
        tokens = [*accepted.prompt_logprobs[number], *choice.tokens] if accepted.prompt_logprobs else choice.tokens
        return Choice(accepted.echo[number] + choice.text, tokens, choice.completion_tokens, choice.finish_reason)

    def _usage(self) -> Usage:
        return Usage(self._begun().prompt_tokens, sum(choice.completion_tokens for choice in self._choices))

    def _begun(self) -> Accepted:
        if self._accepted is None:
            raise RuntimeError("the exchange has not begun")
        return self._accepted

    async def _end(self, problem: BaseException | None) -> None:
        """Free what the request holds, and record how it ended; only the first end counts."""
        if self._ended:
            return
        self._ended = True
        await self._messages.aclose()
        reasons = tuple(choice.finish_reason for choice in self._choices if choice.finish_reason)
        usage = self._usage() if self._accepted else Usage(0, 0)
        code = _code(problem)
        if code is None:
            self.meter.finished(usage.prompt_tokens, usage.completion_tokens, reasons)
            self.trace.finished(usage.prompt_tokens, usage.completion_tokens, reasons)
        else:
            self._count(problem)
            self.trace.failed(code)
        begun = self.request.stream and self._accepted is not None and not _is_gone(problem)
        logs.log_request(self._line(200 if begun else _status(problem), usage, reasons, code))

    def _count(self, problem: BaseException | None) -> None:
        if _is_gone(problem):
            self.meter.cancelled()
        elif self._accepted is None and isinstance(problem, ApiError) and problem.code not in _FAULTS:
            self.meter.rejected(rejection(problem.status))
        else:
            self.meter.failed()

    def _line(self, status: int, usage: Usage, reasons: tuple[str, ...], code: str | None) -> logs.RequestLine:
        first = self.meter.time_to_first_token
        return logs.RequestLine(
            request_id=self.origin.request_id,
            endpoint=self.origin.endpoint,
            status=status,
            duration_ms=round(self.meter.duration * 1000, 1),
            key=self.origin.key,
            model=self.meter.model,
            version=self._version,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            finish_reasons=reasons,
            ttft_ms=None if first is None else round(first * 1000, 1),
            resumed=max(0, self._attempts - 1) or None,
            trace_id=self.trace.trace_id,
            error=code,
        )


def _broken(message: Broken) -> ApiError:
    retry_after = 1 if message.status == 503 else None
    return ApiError(message.status, message.reason, code=message.code, retry_after=retry_after)


def unexpected() -> ApiError:
    """What a client is told of a fault of ours."""
    return ApiError(500, "an unexpected error happened; the server's log says more", code="internal_error")


def _is_gone(problem: BaseException | None) -> bool:
    """Whether the client went away."""
    return isinstance(problem, asyncio.CancelledError | GeneratorExit)


def _status(problem: BaseException | None) -> int:
    if problem is None:
        return 200
    if _is_gone(problem):
        return 499
    return problem.status if isinstance(problem, ApiError) else 500


def _code(problem: BaseException | None) -> str | None:
    if isinstance(problem, ApiError):
        return problem.code or problem.kind
    return None if problem is None else type(problem).__name__


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
