"""Which version answers a request, and what happens when its replica does not survive it. Knows no HTTP and no models.

A gateway's view: a table of routes, which the director publishes (see rollout.py), and a way to call a version. A
request whose replica is lost goes to another one; tokens that were given out already go along, so that the stream
continues where it was.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from heliostat.serving.calls import Accepted, Broken, Deltas, Message, Refused, Resumed
from heliostat.serving.protocol import AnyRequest, model_not_found
from heliostat.tasks import Task

logger = logging.getLogger(__name__)

# A request is started this often in all; a replica lost for each is a model that does not run.
ATTEMPTS = 6
# Seconds before another attempt, doubled each time: a replica that dies takes a moment to be noticed.
PAUSE_S = 0.1
# How often a request that waits for its first message looks whether its version is still there.
LOOK_S = 0.5
RETRY_AFTER_S = 2.0

Request = AnyRequest


@dataclass(frozen=True)
class Version:
    """A version of a model that is loaded."""

    app: str
    """Name of its Serve application."""
    name: str | None
    """Its number in the registry, if it is there."""
    created: int
    """When it was loaded, in seconds since 1970."""
    chat: bool
    max_length: int
    decoding: Mapping[str, Any]
    """The settings in force: {"defaults": ..., "origin": ..., "greedy": ...}."""
    task: Task = "causal_lm"
    labels: tuple[str, ...] = ()
    """A classifier's, in the order of its probabilities."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    healthy: bool = True


@dataclass(frozen=True)
class Route:
    """What a model id stands for at the moment."""

    id: str
    reference: str
    stable: Version
    canary: Version | None = None
    percent: float = 0
    """Share of the requests that the canary gets."""
    loading: str | None = None
    """The version that is being loaded beside these."""
    rejected: tuple[tuple[str, str], ...] = ()
    """(version, reason) of those that were not let in, newest last."""


@dataclass(frozen=True)
class Table:
    """All routes; `generation` grows with each change."""

    generation: int = -1
    routes: Mapping[str, Route] = field(default_factory=dict)

    def find(self, model: str) -> tuple[Route, Version | None]:
        """The route of a model id, and the version if the id pins one (NAME@VERSION).

        Raises:
            ApiError: there is no such model here.
        """
        name, at, number = model.partition("@")
        route = self.routes.get(name)
        if route is None:
            raise model_not_found(model)
        if not at:
            return route, None
        for version in (route.stable, route.canary):
            if version is not None and version.name == number:
                return route, version
        raise model_not_found(model)

    def apps(self) -> set[str]:
        """The applications of the versions that get requests: a canary that does not work gets none."""
        stable = {route.stable.app for route in self.routes.values()}
        return stable | {route.canary.app for route in self.routes.values() if route.canary and route.canary.healthy}

    def ids(self) -> list[str]:
        """All ids that `find` takes: the plain ones, then the pinned ones."""
        pinned = [
            f"{route.id}@{version.name}"
            for route in self.routes.values()
            for version in (route.stable, route.canary)
            if version is not None and version.name is not None
        ]
        return [*self.routes, *pinned]


class Watch(Protocol):
    """Who is told how a request goes."""

    def asked(self, version: str) -> Mapping[str, str]:
        """A replica of the version is asked; again after one was lost. Returns the trace context to pass on to it."""

    def taken(self, version: str) -> None:
        """The replica works on it."""

    def left(self, error: str | None) -> None:
        """The replica has done its work; or why not."""


Call = Callable[[Version, Request, Resumed, Mapping[str, str]], AsyncGenerator[Message]]
"""Call a replica of the version with (request, what was given out, trace context)."""


class ReplicaLost(Exception):
    """The replica ended, or cannot be reached; another may answer."""


class Busy(Exception):
    """All replicas are busy, and as many requests wait as may."""


@dataclass
class _Progress:
    """What a request has given out."""

    choices: int | None = None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    refused: bool = False

    def add(self, deltas: Deltas) -> None:
        for index, delta in deltas:
            self.tokens.setdefault(index, []).extend(delta.token_ids)
            if delta.finish_reason:
                self.done.add(index)

    @property
    def over(self) -> bool:
        return self.refused or (self.choices is not None and len(self.done) == self.choices)

    def resumed(self) -> Resumed:
        return Resumed({index: tuple(ids) for index, ids in self.tokens.items()}, frozenset(self.done))


class Router:
    """Sends requests to versions, by the table that it is given."""

    def __init__(self, call: Call, *, timeout_s: float) -> None:
        """`timeout_s`: a request that takes longer ends."""
        self.table = Table()
        self._call = call
        self._timeout_s = timeout_s
        self._outcomes: Counter[tuple[str, Literal["ok", "failed"]]] = Counter()

    def take_outcomes(self) -> Counter[tuple[str, Literal["ok", "failed"]]]:
        """(app, how requests ended) -> how many since the last call."""
        taken, self._outcomes = self._outcomes, Counter()
        return taken

    async def generate(self, request: Request, watch: Watch) -> AsyncGenerator[Accepted | Refused | Broken | Deltas]:
        """Accepted and deltas until all choices are over; or Refused alone; or Broken where nothing helps.

        Raises:
            ApiError: there is no such model here.
        """
        self.table.find(request.model)
        progress = _Progress()
        deadline = time.monotonic() + self._timeout_s
        avoided: set[str] = set()
        version = self._choose(request.model, avoided)
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1))
                version = version if progress.tokens else self._choose(request.model, avoided)
            try:
                async with aclosing(self._attempt(version, request, progress, watch, deadline)) as messages:
                    async for message in messages:
                        yield message
                self._outcomes[version.app, "ok"] += 1
                return
            except ReplicaLost as error:
                self._outcomes[version.app, "failed"] += 1
                avoided.add(version.app)
                logger.warning("a request lost its replica of %s (%s); attempt %d", version.app, error, attempt + 1)
            except Busy:
                if progress.choices is None:
                    yield _busy()
                    return
            except TimeoutError:
                yield self._late(progress)
                return
        yield _given_up(progress)

    def _choose(self, model: str, avoided: set[str]) -> Version:
        """The pinned version, or the stable one or its canary by chance; a version that failed comes last."""
        route, pinned = self.table.find(model)
        if pinned is not None:
            return pinned
        canary = route.canary
        if canary is None or not canary.healthy or canary.app in avoided:
            return route.stable
        return canary if random.uniform(0, 100) < route.percent else route.stable

    async def _attempt(
        self, version: Version, request: Request, progress: _Progress, watch: Watch, deadline: float
    ) -> AsyncGenerator[Message]:
        """What a replica answers, as far as it was not given out before.

        Raises:
            ReplicaLost, Busy: it did not get to the end, or to the beginning.
            TimeoutError: the deadline came.
        """
        carrier = watch.asked(version.name or "")
        problem: str | None = "cancelled"
        try:
            async with aclosing(self._call(version, request, progress.resumed(), carrier)) as messages:
                async for message in self._until(deadline, version, messages):
                    if self._is_new(message, progress, version, watch):
                        yield message
            if not progress.over:
                raise ReplicaLost("its answer ended early")
            problem = None
        except Exception as error:
            problem = type(error).__name__
            raise
        finally:
            watch.left(problem)

    async def _until(
        self, deadline: float, version: Version, messages: AsyncGenerator[Message]
    ) -> AsyncGenerator[Message]:
        """The messages, as long as they come before the deadline.

        A version that is taken out may have had no replica left to answer at all, and Serve then waits for one for
        ever. So until the first message, the table is looked at; an answer that has begun is finished.
        """
        first = asyncio.ensure_future(anext(messages, None))
        try:
            while not first.done():
                if version.app not in self.table.apps():
                    raise ReplicaLost("the version was taken out")
                await asyncio.wait({first}, timeout=min(LOOK_S, max(0, deadline - time.monotonic())))
                if not first.done() and time.monotonic() >= deadline:
                    raise TimeoutError
            message = first.result()
        finally:
            await _ended(first)
        while message is not None:
            yield message
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                message = await anext(messages, None)

    def _is_new(self, message: Message, progress: _Progress, version: Version, watch: Watch) -> bool:
        """Note the message; whether it is to be passed on.

        Raises:
            ReplicaLost: it says that the replica does not go on.
        """
        if isinstance(message, Broken):
            raise ReplicaLost(message.reason)
        if isinstance(message, Refused):
            if progress.choices is not None:
                raise ReplicaLost("it has no room to continue")
            progress.refused = True
            return True
        if isinstance(message, Accepted):
            watch.taken(version.name or "")
            first, progress.choices = progress.choices is None, message.choices
            return first
        progress.add(message)
        return True

    def _late(self, progress: _Progress) -> Refused | Broken:
        message = f"the request took longer than {self._timeout_s:g} s"
        if progress.choices is not None:
            return Broken(message, 408, "timeout")
        return Refused(408, message, code="timeout")


async def _ended(task: "asyncio.Future[Any]") -> None:
    """End a task that may still run, and wait for that: a generator must not be closed while it is being read."""
    task.cancel()
    await asyncio.wait({task})


def _busy() -> Refused:
    message = "all replicas are busy; send the request again later"
    return Refused(503, message, code="overloaded", retry_after=RETRY_AFTER_S)


def _given_up(progress: _Progress) -> Refused | Broken:
    message = "the model's replicas are failing; send the request again later"
    if progress.choices is not None:
        return Broken(message)
    return Refused(503, message, code="engine_failed", retry_after=RETRY_AFTER_S)


def status_of(route: Route, pinned: Version | None) -> str:
    """`canary` for the id that pins one, `loading` while a new version comes, else `ready`."""
    if pinned is not None and pinned is route.canary:
        return "canary"
    return "loading" if route.loading and pinned is None else "ready"


def card(route: Route, pinned: Version | None) -> dict[str, Any]:
    """A model of /v1/models: OpenAI's fields, and under `heliostat` what else is known of it."""
    version = pinned or route.stable
    canary = {"version": route.canary.name, "percent": route.percent} if route.canary else None
    return {
        "id": f"{route.id}@{version.name}" if pinned else route.id,
        "object": "model",
        "created": version.created,
        "owned_by": "heliostat",
        "heliostat": {
            "reference": route.reference,
            "root": route.id,
            "version": version.name,
            "status": status_of(route, pinned),
            "task": version.task,
            "labels": list(version.labels),
            "chat": version.chat,
            "max_length": version.max_length,
            "metrics": dict(version.metrics),
            "tags": dict(version.tags),
            "canary": canary,
            "loading": route.loading,
            "rejected": [{"version": name, "reason": reason} for name, reason in route.rejected],
        },
    }
