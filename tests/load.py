"""Closed-loop clients of an endpoint: each sends one request after the other, and takes down how each ended."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2


@dataclass(frozen=True)
class Ended:
    """How one request ended, as its client saw it."""

    prompt: str
    kind: str
    """complete, refused (4xx, 5xx with an error in OpenAI's form), error event, or lost (none of these)."""
    text: str
    status: int
    seconds: float
    retry_after: str | None = None
    detail: str = ""


@dataclass
class Load:
    """Requests that ended so far."""

    ended: list[Ended] = field(default_factory=list)

    def kinds(self) -> dict[str, int]:
        """How many ended how."""
        return dict(Counter(each.kind for each in self.ended))

    def of(self, kind: str) -> list[Ended]:
        """Those that ended so."""
        return [each for each in self.ended if each.kind == kind]


async def ask(http: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> Ended:
    """One streamed completion."""
    started = time.monotonic()
    text, finish, done = "", None, False
    status, retry_after, detail = 0, None, ""
    try:
        async with http.stream("POST", f"{url}/completions", json={**body, "stream": True}) as response:
            status, retry_after = response.status_code, response.headers.get("retry-after")
            if status != 200:
                error = json.loads(await response.aread())["error"]
                return Ended(
                    body["prompt"], "refused", "", status, time.monotonic() - started, retry_after, error["code"]
                )
            async for event in _events(response):
                if event == "[DONE]":
                    done = True
                    continue
                data = json.loads(event)
                if "error" in data:
                    seconds = time.monotonic() - started
                    return Ended(body["prompt"], "error event", text, status, seconds, None, data["error"]["message"])
                for choice in data["choices"]:
                    text += choice["text"]
                    finish = choice["finish_reason"] or finish
    except (httpx2.HTTPError, ValueError, KeyError) as error:
        detail = f"{type(error).__name__}: {error}"
    kind = "complete" if done and finish else "lost"
    return Ended(body["prompt"], kind, text, status, time.monotonic() - started, retry_after, detail)


async def _events(response: httpx2.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


@asynccontextmanager
async def clients(
    url: str, bodies: Sequence[dict[str, Any]], count: int, headers: dict[str, str] | None = None
) -> AsyncIterator[Load]:
    """`count` clients ask for `bodies` in turns while the context is entered; then each finishes what it has begun."""
    load = Load()
    stopping = asyncio.Event()
    limits = httpx2.Limits(max_connections=count, max_keepalive_connections=count)

    async def client(http: httpx2.AsyncClient, number: int) -> None:
        turn = number
        while not stopping.is_set():
            ended = await ask(http, url, bodies[turn % len(bodies)])
            load.ended.append(ended)
            turn += 1
            if ended.kind == "refused":
                await asyncio.sleep(float(ended.retry_after or 1))

    async with httpx2.AsyncClient(timeout=120, limits=limits, headers=headers) as http:
        tasks = [asyncio.create_task(client(http, number)) for number in range(count)]
        try:
            yield load
        finally:
            stopping.set()
            await asyncio.gather(*tasks)


async def each(url: str, bodies: Sequence[dict[str, Any]], count: int) -> list[Ended]:
    """How each of the requests ended, `count` at a time."""
    turns = asyncio.Semaphore(count)

    async def one(http: httpx2.AsyncClient, body: dict[str, Any]) -> Ended:
        async with turns:
            return await ask(http, url, body)

    async with httpx2.AsyncClient(timeout=120) as http:
        return await asyncio.gather(*(one(http, body) for body in bodies))


async def arrivals(url: str, bodies: Sequence[dict[str, Any]], rate: float, seconds: float) -> Load:
    """`rate` requests a second for so many seconds, whatever becomes of them; returns when all have ended."""
    load = Load()
    tasks = []

    async def one(http: httpx2.AsyncClient, number: int) -> None:
        load.ended.append(await ask(http, url, bodies[number % len(bodies)]))

    async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=None)) as http:
        for number in range(int(rate * seconds)):
            tasks.append(asyncio.create_task(one(http, number)))
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*tasks)
    return load
