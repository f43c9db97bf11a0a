"""Which requests may wait for a place in the cache, and when there may be room again. Knows sizes in tokens, no models.

transformers' own queue has no bound that holds: the loop moves what waits there to a dictionary at every step.
"""

import time
from collections import deque
from collections.abc import Hashable

from heliostat.errors import HeliostatError

# Seconds: a client that is told to come back comes within these.
_SOONEST, _LATEST = 1.0, 30.0
_REMEMBERED = 64


class Overloaded(HeliostatError):
    """So much waits already that a request is not taken. `retry_after`: seconds after which there may be room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("too many requests are waiting; send the request again later")
        self.retry_after = retry_after


class Admission:
    """The requests that are there, oldest first: as many as fit are being worked on, the others wait."""

    def __init__(self, max_tokens: int, max_requests: int, max_queued_tokens: int) -> None:
        """`max_tokens` and `max_requests` fit at once; `max_queued_tokens` may wait."""
        self._max_tokens = max_tokens
        self._max_requests = max_requests
        self._max_queued = max_queued_tokens
        self._sizes: dict[Hashable, int] = {}
        self._left: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)

    def enter(self, request: Hashable, size: int) -> None:
        """Take a request of `size` tokens, prompt and completion. Where nothing waits, any is taken.

        Raises:
            Overloaded: too much waits.
        """
        waiting = self.waiting_tokens()
        if waiting and waiting + size > self._max_queued:
            raise Overloaded(self._wait(waiting + size - self._max_queued))
        self._sizes[request] = size

    def leave(self, request: Hashable) -> None:
        """The request is over; may be called twice."""
        size = self._sizes.pop(request, None)
        if size is not None:
            self._left.append((time.monotonic(), size))

    def waiting_tokens(self) -> int:
        """Tokens of the requests for which there is no room now."""
        free = self._max_tokens
        waiting = 0
        for place, size in enumerate(self._sizes.values()):
            free -= size
            if free < 0 or place >= self._max_requests:
                waiting += size
        return waiting

    def _wait(self, tokens: int) -> float:
        """Seconds until requests of so many tokens are over, at the pace of those that were last."""
        if len(self._left) < 2:
            return _SOONEST
        seconds = time.monotonic() - self._left[0][0]
        gone = sum(size for _, size in self._left)
        return min(max(tokens * seconds / gone, _SOONEST), _LATEST)
