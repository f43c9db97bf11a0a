"""Requests of mixed lengths, clients that read their streams, and what these tell. Knows OpenAI's wire format only.

A fixed list is worked off by so many clients: each takes the next request when its last one has ended.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

PROMPT_TOKENS = (16, 256)
OUTPUT_TOKENS = (16, 128)


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Stream:
    """One answer, as its client saw it; times in seconds since the request was sent."""

    tokens: int
    """Tokens of the completion, as the server counts them."""
    first: float
    """When its first text came."""
    last: float
    error: str = ""

    @property
    def per_token(self) -> float | None:
        """Seconds between tokens after the first; None of fewer than two."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class Round:
    """A list of requests, worked off."""

    streams: list[Stream]
    seconds: float
    cpu_seconds: float = 0.0
    """CPU time of all processes of the server."""

    @property
    def tokens(self) -> int:
        """Tokens given out."""
        return sum(stream.tokens for stream in self.streams)


def words(tokenizer: Any) -> list[str]:
    """Words that are one token each behind a space, in alphabetical order."""
    found = (token[1:] for token in tokenizer.get_vocab() if token.startswith("\u0120"))
    return sorted(word for word in found if word.isascii() and word.isalpha() and word.islower() and len(word) > 2)


def requests(vocabulary: Sequence[str], count: int, seed: int) -> list[Ask]:
    """`count` requests whose lengths are spread evenly over their ranges; no two begin alike."""
    chance = random.Random(seed)
    prompts, outputs = spread(*PROMPT_TOKENS, count), spread(*OUTPUT_TOKENS, count)
    chance.shuffle(prompts)
    chance.shuffle(outputs)
    texts = ["".join(f" {word}" for word in chance.choices(vocabulary, k=length)) for length in prompts]
    return [Ask(text, limit) for text, limit in zip(texts, outputs, strict=True)]


def spread(low: int, high: int, count: int) -> list[int]:
    """`count` numbers in the middles of equal parts of the range."""
    return [round(low + (high - low) * (i + 0.5) / count) for i in range(count)]


async def work_off(asks: Sequence[Ask], clients: int, ask: Callable[[Ask], Awaitable[Stream]]) -> Round:
    """Have `clients` clients work off the list with `ask`."""
    waiting = iter(asks)
    ended: list[Stream] = []

    async def client() -> None:
        for each in waiting:
            ended.append(await ask(each))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Round(ended, time.perf_counter() - started)


async def over_http(url: str, model: str, asks: Sequence[Ask], clients: int) -> Round:
    """The list at an endpoint."""
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(timeout=300, limits=limits) as http:
        return await work_off(asks, clients, lambda each: read(http, url, body(model, each)))


def body(model: str, ask: Ask) -> dict[str, Any]:
    """A greedy streamed request. Both servers know these fields; the peer counts tokens without being asked to."""
    return {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def read(http: httpx2.AsyncClient, url: str, content: dict[str, Any]) -> Stream:
    """Send a request and read its stream to the end; what is not a whole answer is an error."""
    started = time.perf_counter()
    first, tokens, error = 0.0, 0, ""
    try:
        async with http.stream("POST", f"{url}/completions", json=content) as response:
            if response.status_code != 200:
                error = f"HTTP {response.status_code}"
            async for line in response.aiter_lines():
                event = _event(line)
                error = error or str(event.get("error") or "")
                if not first and any(choice["text"] for choice in event.get("choices", ())):
                    first = time.perf_counter() - started
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except (httpx2.HTTPError, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    last = time.perf_counter() - started
    return Stream(tokens, first or last, last, error or ("" if tokens else "no usage"))


def _event(line: str) -> dict[str, Any]:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return {}
    found: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return found


def figures(rounds: Sequence[Round]) -> dict[str, float]:
    """What the rounds at one server come to: medians of the rounds' speeds, quantiles over all their streams."""
    streams = [stream for each in rounds for stream in each.streams]
    whole = [stream for stream in streams if not stream.error]
    gaps = [stream.per_token for stream in whole if stream.per_token is not None]
    return {
        "tokens_per_second": statistics.median(each.tokens / each.seconds for each in rounds),
        "cpu_ms_per_token": 1000 * statistics.median(each.cpu_seconds / max(1, each.tokens) for each in rounds),
        "ttft_p50_ms": 1000 * quantile([stream.first for stream in whole], 0.5),
        "tpot_p50_ms": 1000 * quantile(gaps, 0.5),
        "tpot_p99_ms": 1000 * quantile(gaps, 0.99),
        "tokens": sum(each.tokens for each in rounds),
        "errors": len(streams) - len(whole),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of them is not above; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
