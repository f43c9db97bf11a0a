"""Routing: which version answers, and what becomes of a request whose replica does not survive it."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest

from heliostat.serving import routing
from heliostat.serving.calls import Accepted, Broken, Delta, Message, Refused, Resumed
from heliostat.serving.protocol import ApiError, CompletionRequest
from heliostat.serving.routing import Busy, ReplicaLost, Request, Route, Router, Table, Version, card

WORDS = ["a ", "b ", "c ", "d "]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PAUSE_S", 0.001)


def version(name: str, **changes: Any) -> Version:
    return Version(**{"app": f"app-{name}", "name": name, "created": 7, "chat": True, "max_length": 64,
                      "decoding": {}, **changes})  # fmt: skip


class Watched:
    """What the router tells of a request."""

    def __init__(self) -> None:
        self.attempts: list[str] = []
        self.versions: list[str] = []
        self.ends: list[str | None] = []

    @property
    def resumptions(self) -> int:
        return len(self.attempts) - 1

    def asked(self, version: str) -> Mapping[str, str]:
        self.attempts.append(version)
        return {"attempt": str(len(self.attempts))}

    def taken(self, version: str) -> None:
        self.versions.append(version)

    def left(self, error: str | None) -> None:
        self.ends.append(error)
        assert len(self.ends) == len(self.attempts)


def delta(index: int, position: int) -> tuple[int, Delta]:
    """The token at `position` of a choice."""
    last = position == len(WORDS) - 1
    return index, Delta(WORDS[position], (position,), 3, position + 1, "stop" if last else None)


class Replicas:
    """Answers with WORDS for each choice, from where it is resumed; loses its replica where it is told to."""

    def __init__(self, choices: int = 1, losses: Mapping[int, int] | None = None, error: type[Exception] = ReplicaLost):
        self.choices = choices
        self.losses = losses or {}
        """Number of the call -> tokens that it gives out before its replica is lost."""
        self.error = error
        self.calls: list[tuple[str, Resumed]] = []

    async def __call__(
        self, version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
    ) -> AsyncGenerator[Message]:
        self.calls.append((version.app, resumed))
        left = self.losses.get(len(self.calls) - 1)
        yield Accepted(3, self.choices)
        for position in range(len(WORDS)):
            for index in range(self.choices):
                if index in resumed.done or position < len(resumed.token_ids.get(index, ())):
                    continue
                if left == 0:
                    raise self.error("lost")
                left = None if left is None else left - 1
                yield [delta(index, position)]


def router(call: routing.Call, route: Route | None = None, timeout_s: float = 60) -> Router:
    made = Router(call, timeout_s=timeout_s)
    made.table = Table(0, {"cron": route or Route("cron", "models:/cron@champion", version("3"))})
    return made


async def collected(made: Router, model: str = "cron") -> tuple[list[Any], Watched]:
    watched = Watched()
    request = CompletionRequest.model_validate({"model": model, "prompt": "x"})
    return [message async for message in made.generate(request, watched)], watched


def run(made: Router, model: str = "cron") -> tuple[list[Any], Watched]:
    return asyncio.run(collected(made, model))


def texts(messages: list[Any], choices: int) -> list[str]:
    found = [""] * choices
    for message in messages:
        if isinstance(message, list):
            for index, each in message:
                found[index] += each.text
    return found


@pytest.mark.parametrize("lost_after", range(len(WORDS) * 2))
def test_a_stream_goes_on_where_it_was_wherever_its_replica_is_lost(lost_after: int) -> None:
    replicas = Replicas(choices=2, losses={0: lost_after})
    messages, watched = run(router(replicas))
    assert texts(messages, 2) == ["a b c d "] * 2
    assert sum(isinstance(message, Accepted) for message in messages) == 1
    assert watched.resumptions == 1
    assert watched.ends == ["ReplicaLost", None]
    given_out = sum(len(ids) for ids in replicas.calls[1][1].token_ids.values())
    assert given_out == lost_after
    assert replicas.calls[1][1].done == frozenset({0} if lost_after == 7 else ())


def test_a_model_that_never_runs_ends_with_a_refusal_or_in_the_middle_with_broken() -> None:
    messages, _ = run(router(Replicas(losses=dict.fromkeys(range(99), 0))))
    assert [type(message) for message in messages] == [Accepted, Broken]

    async def dead(*_: Any) -> AsyncGenerator[Message]:
        raise ReplicaLost("dead")
        yield Accepted(0, 0)

    messages, watched = run(router(dead))
    assert [(message.status, message.code) for message in messages] == [(503, "engine_failed")]
    assert messages[0].retry_after > 0
    assert watched.resumptions == routing.ATTEMPTS - 1


def test_an_answer_that_ends_early_is_not_taken_for_a_whole_one() -> None:
    calls = Counter[str]()

    async def call(
        version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
    ) -> AsyncGenerator[Message]:
        calls["all"] += 1
        yield Accepted(3, 1)
        yield [delta(0, len(resumed.token_ids.get(0, ())))]

    messages, _ = run(router(call))
    assert texts(messages, 1) == ["a b c d "]
    assert calls["all"] == len(WORDS)


def test_refusals_are_passed_on_and_busy_replicas_refuse_with_a_time_to_wait() -> None:
    async def refuse(*_: Any) -> AsyncGenerator[Message]:
        yield Refused(400, "too long", "prompt", "context_length_exceeded")

    messages, watched = run(router(refuse))
    assert messages == [Refused(400, "too long", "prompt", "context_length_exceeded")]
    assert watched.versions == []

    async def busy(*_: Any) -> AsyncGenerator[Message]:
        raise Busy
        yield Accepted(0, 0)

    messages, _ = run(router(busy))
    assert [(message.status, message.code, message.retry_after) for message in messages] == [
        (503, "overloaded", routing.RETRY_AFTER_S)
    ]


def test_a_stream_that_meets_full_replicas_on_its_way_waits_for_room() -> None:
    calls = Counter[str]()

    async def call(
        version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
    ) -> AsyncGenerator[Message]:
        calls["all"] += 1
        if calls["all"] == 2:
            raise Busy
        if calls["all"] == 3:
            yield Refused(503, "full", code="overloaded")
            return
        yield Accepted(3, 1)
        for position in range(len(resumed.token_ids.get(0, ())), len(WORDS)):
            yield [delta(0, position)]
            if calls["all"] == 1:
                raise ReplicaLost("lost")

    messages, _ = run(router(call))
    assert texts(messages, 1) == ["a b c d "]


def test_a_request_that_takes_too_long_ends() -> None:
    async def slow(*_: Any) -> AsyncGenerator[Message]:
        await asyncio.Event().wait()
        yield Accepted(0, 0)

    messages, _ = run(router(slow, timeout_s=0.01))
    assert [(message.status, message.code) for message in messages] == [(408, "timeout")]

    async def stuck(*_: Any) -> AsyncGenerator[Message]:
        yield Accepted(3, 1)
        await asyncio.Event().wait()

    messages, _ = run(router(stuck, timeout_s=0.01))
    assert messages == [Accepted(3, 1), Broken("the request took longer than 0.01 s", 408, "timeout")]


def test_a_request_that_waits_for_a_version_that_is_taken_out_goes_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "LOOK_S", 0.001)
    route = Route("cron", "models:/cron@champion", version("3"), canary=version("4"), percent=100)
    asked: list[str] = []

    async def call(
        version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
    ) -> AsyncGenerator[Message]:
        asked.append(version.app)
        if version.name == "4":
            made.table = Table(1, {"cron": Route("cron", "models:/cron@champion", route.stable)})
            await asyncio.Event().wait()
        async for message in Replicas()(version, request, resumed, trace):
            yield message

    made = router(call, route)
    messages, watched = run(made)
    assert texts(messages, 1) == ["a b c d "]
    assert asked == ["app-4", "app-3"]
    assert watched.ends == ["ReplicaLost", None]


def test_an_answer_that_has_begun_is_finished_by_a_version_that_is_taken_out() -> None:
    async def call(
        version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
    ) -> AsyncGenerator[Message]:
        async for message in Replicas()(version, request, resumed, trace):
            yield message
            made.table = Table(1, {"cron": Route("cron", "models:/cron@champion", version_of_now)})

    version_of_now = version("4")
    made = router(call)
    messages, watched = run(made)
    assert texts(messages, 1) == ["a b c d "]
    assert watched.attempts == ["3"]


def test_plain_ids_share_the_traffic_with_the_canary_and_pinned_ids_do_not() -> None:
    route = Route("cron", "models:/cron@champion", version("3"), canary=version("4"), percent=30)
    replicas = Replicas()
    made = router(replicas, route)

    async def many() -> None:
        for _ in range(300):
            await collected(made)

    asyncio.run(many())
    share = Counter(app for app, _ in replicas.calls)
    assert 45 <= share["app-4"] <= 140  # 300 x 30% is 90; five standard deviations are 40
    for name in ("3", "4"):
        replicas.calls.clear()
        run(made, f"cron@{name}")
        assert [app for app, _ in replicas.calls] == [f"app-{name}"]


def test_a_canary_that_does_not_work_gets_no_requests() -> None:
    route = Route("cron", "models:/cron@champion", version("3"), canary=version("4", healthy=False), percent=100)
    replicas = Replicas()
    run(router(replicas, route))
    assert [app for app, _ in replicas.calls] == ["app-3"]


def test_what_fails_in_the_canary_is_answered_by_the_stable_version() -> None:
    route = Route("cron", "models:/cron@champion", version("3"), canary=version("4"), percent=100)
    calls: list[str] = []

    async def call(
        version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
    ) -> AsyncGenerator[Message]:
        calls.append(version.app)
        if version.name == "4":
            yield Broken("no")
            return
        async for message in Replicas()(version, request, resumed, trace):
            yield message

    made = router(call, route)
    messages, watched = run(made)
    assert texts(messages, 1) == ["a b c d "]
    assert calls == ["app-4", "app-3"]
    assert watched.versions == ["3"]
    assert made.take_outcomes() == {("app-4", "failed"): 1, ("app-3", "ok"): 1}
    assert made.take_outcomes() == {}


def test_unknown_models_and_versions_are_not_found() -> None:
    made = router(Replicas())
    for name in ("other", "cron@9", "cron@", "@3", ""):
        if name == "cron@":
            continue
        with pytest.raises(ApiError) as error:
            run(made, name)
        assert (error.value.status, error.value.code) == (404, "model_not_found")


def test_closing_a_stream_early_closes_the_call() -> None:
    closed = asyncio.Event()

    async def call(*_: Any) -> AsyncGenerator[Message]:
        try:
            yield Accepted(3, 1)
            yield [delta(0, 0)]
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def body() -> None:
        request = CompletionRequest.model_validate({"model": "cron", "prompt": "x"})
        stream = router(call).generate(request, Watched())
        async for message in stream:
            if isinstance(message, list):
                break
        await stream.aclose()
        assert closed.is_set()

    asyncio.run(body())


def test_cards_tell_of_the_version_and_of_what_was_rejected() -> None:
    route = Route(
        "cron", "models:/cron@champion", version("3", metrics={"exact_match": 0.9}), version("4"), 10,
        rejected=(("5", "damaged"),),
    )  # fmt: skip
    table = Table(0, {"cron": route})
    assert table.ids() == ["cron", "cron@3", "cron@4"]
    shown = card(*table.find("cron"))
    assert (shown["id"], shown["object"], shown["created"]) == ("cron", "model", 7)
    assert shown["heliostat"]["metrics"] == {"exact_match": 0.9}
    assert shown["heliostat"]["canary"] == {"version": "4", "percent": 10}
    assert shown["heliostat"]["rejected"] == [{"version": "5", "reason": "damaged"}]
    assert card(*table.find("cron@4"))["heliostat"]["status"] == "canary"
    assert card(*table.find("cron@3"))["heliostat"]["status"] == "ready"
