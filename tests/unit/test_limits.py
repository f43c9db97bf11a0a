"""Limits of a key: any minute holds no more requests than allowed, and slots come back however a request ends."""

import asyncio
import random
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from heliostat.serving.keys import Key
from heliostat.serving.limits import WINDOW_S, Limiter
from heliostat.serving.protocol import ApiError


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def key(name: str = "alice", **limits: Any) -> Key:
    return Key(name=name, sha256="0" * 64, created=datetime.now(UTC), **limits)


def refused(limiter: Limiter, of: Key) -> ApiError | None:
    try:
        with limiter.acquire(of):
            return None
    except ApiError as error:
        return error


def test_no_minute_holds_more_than_the_rate(clock: Clock) -> None:
    """Whenever requests come: a sliding window has no turn of the minute."""
    limiter, limited, draws = Limiter(clock), key(requests_per_minute=10), random.Random(0)
    let_in: list[float] = []
    for _ in range(2000):
        clock.now += draws.choice([0.0, 0.1, 1.0, 7.0])
        error = refused(limiter, limited)
        if error is None:
            let_in.append(clock.now)
        else:
            assert error.retry_after is not None
            assert 0 < error.retry_after <= WINDOW_S
    assert len(let_in) > 100
    assert all(later - earlier >= WINDOW_S for earlier, later in zip(let_in, let_in[10:], strict=False))


def test_a_client_that_waits_as_told_gets_in(clock: Clock) -> None:
    limiter, limited = Limiter(clock), key(requests_per_minute=3)
    for pause in (0.0, 5.0, 5.0):
        clock.now += pause
        assert refused(limiter, limited) is None
    error = refused(limiter, limited)
    assert error is not None
    assert (error.status, error.code, error.retry_after) == (429, "rate_limit_exceeded", 50.0)
    assert error.headers() == {"Retry-After": "50"}
    clock.now += 49.9
    assert refused(limiter, limited) is not None
    clock.now += 0.2
    assert refused(limiter, limited) is None
    assert refused(limiter, limited) is not None


def test_a_lowered_rate_counts_at_once(clock: Clock) -> None:
    limiter = Limiter(clock)
    for _ in range(10):
        assert refused(limiter, key(requests_per_minute=10)) is None
        clock.now += 1
    error = refused(limiter, key(requests_per_minute=4))
    assert error is not None
    assert error.retry_after is not None
    clock.now += error.retry_after
    assert refused(limiter, key(requests_per_minute=4)) is None


def test_requests_at_once(clock: Clock) -> None:
    limiter, limited = Limiter(clock), key(max_concurrent=2)
    with limiter.acquire(limited):
        with limiter.acquire(limited):
            error = refused(limiter, limited)
            assert error is not None
            assert (error.status, error.code) == (429, "rate_limit_exceeded")
            assert "`alice`" in str(error)
            assert refused(limiter, key("bob", max_concurrent=1)) is None
        assert refused(limiter, limited) is None
    assert limiter.running("alice") == 0


def test_what_is_refused_is_not_counted(clock: Clock) -> None:
    limiter, limited = Limiter(clock), key(requests_per_minute=2, max_concurrent=1)
    with limiter.acquire(limited):
        for _ in range(20):
            assert refused(limiter, limited) is not None
    assert refused(limiter, limited) is None


def test_a_key_without_limits_has_none(clock: Clock) -> None:
    limiter = Limiter(clock)
    with ExitStack() as held:
        for _ in range(1000):
            held.enter_context(limiter.acquire(key()))
        assert limiter.running("alice") == 1000
    assert limiter.running("alice") == 0


def test_slots_come_back_however_a_request_ends(clock: Clock) -> None:
    limiter, limited = Limiter(clock), key(max_concurrent=50)
    outcomes = random.Random(1).choices(["done", "failed", "cancelled"], k=500)

    async def one(outcome: str) -> None:
        with limiter.acquire(limited):
            await asyncio.sleep(0)
            if outcome == "failed":
                raise RuntimeError
            if outcome == "cancelled":
                await asyncio.Event().wait()

    async def everything() -> None:
        for start in range(0, len(outcomes), 50):
            tasks = {asyncio.create_task(one(outcome)): outcome for outcome in outcomes[start : start + 50]}
            await asyncio.sleep(0)
            assert limiter.running("alice") == 50
            for task, outcome in tasks.items():
                if outcome == "cancelled":
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert limiter.running("alice") == 0

    asyncio.run(everything())
