"""What travels between a gateway and a replica. Plain data: knows neither HTTP, Ray, tokenizers nor models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability and the likeliest tokens in its place, best first: (id, text, logprob)."""

    token_id: int
    text: str
    logprob: float | None
    """None for the first token of a prompt, which nothing comes before."""
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a generation; `finish_reason` is set on the last one only."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    """Tokens generated so far, the end-of-sequence token included."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids`, if the request asks for them."""
    probabilities: tuple[float, ...] = ()
    """A classifier's, of each label; the text is then the likeliest one."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """Choice index -> tokens that another replica has given out already; `done` are the choices that are over."""

    token_ids: Mapping[int, Sequence[int]] = field(default_factory=dict)
    done: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Accepted:
    """First message of a replica: the request is being worked on."""

    prompt_tokens: int
    choices: int
    echo: tuple[str, ...] = ()
    """The prompts' texts, if they are asked back."""
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    """For each prompt, if asked for: its tokens."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Only message of a replica that does not work on the request."""

    status: int
    """HTTP's: 400 for a request that is wrong, 503 for one that may be sent again."""
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    """Seconds."""


@dataclass(frozen=True, slots=True)
class Broken:
    """Last message of a replica that cannot go on with a request; another replica can. Or of a router: none can."""

    reason: str
    status: int = 503
    """HTTP's, for an answer that has not begun."""
    code: str = "engine_failed"


Deltas = list[tuple[int, Delta]]
"""(index of the choice, what was added), as they came."""
Message = Accepted | Refused | Broken | Deltas
