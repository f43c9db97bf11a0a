"""How much one API key may ask for: requests a minute, and requests at once. Knows no HTTP.

Limits count in each gateway process for itself: with `gateways: 2` a key may reach twice its limits.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from heliostat.serving.keys import Key
from heliostat.serving.protocol import ApiError

WINDOW_S = 60.0
# When a slot becomes free is not known; this is what a client is told to wait for one.
BUSY_RETRY_S = 1.0


@dataclass
class _Usage:
    running: int = 0
    started: deque[float] = field(default_factory=deque)
    """When the requests of the last minute were let in, oldest first; kept only for keys with a rate limit."""


class Limiter:
    """Counts what each key uses, by its name. For one event loop: it is not safe to call from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, _Usage] = {}

    @contextlib.contextmanager
    def acquire(self, key: Key) -> Iterator[None]:
        """One request: it runs while the context is entered, however it ends. What is refused is not counted.

        A minute is any 60 seconds (a sliding window), so no burst at the turn of a minute gets twice the rate.

        Raises:
            ApiError: 429 with `retry_after`, if the key is at one of its limits.
        """
        usage = self._usage.setdefault(key.name, _Usage())
        if key.max_concurrent is not None and usage.running >= key.max_concurrent:
            raise _refusal(key, f"{key.max_concurrent} requests at once", BUSY_RETRY_S)
        if key.requests_per_minute is not None:
            self._count(key, key.requests_per_minute, usage.started)
        usage.running += 1
        try:
            yield
        finally:
            usage.running -= 1

    def running(self, name: str) -> int:
        """Requests of a key that run now."""
        return self._usage[name].running if name in self._usage else 0

    def _count(self, key: Key, limit: int, started: deque[float]) -> None:
        now = self._clock()
        while started and started[0] <= now - WINDOW_S:
            started.popleft()
        if len(started) >= limit:
            # A limit that was lowered may need several of the old ones to pass.
            raise _refusal(key, f"{limit} requests a minute", started[len(started) - limit] + WINDOW_S - now)
        started.append(now)


def _refusal(key: Key, limit: str, retry_after: float) -> ApiError:
    message = f"the API key `{key.name}` is at its limit of {limit}; try again in {retry_after:.1f} s"
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=retry_after)
