"""What the endpoint promises under faults, measured: `python -m benchmarks.faults SCENARIO ... [--json FILE]`.

Each scenario starts an endpoint on a tiny random model, puts it under load by real HTTP clients, does the harm, and
prints how the requests ended. A request is lost when it was accepted and ends neither whole nor with an explicit error.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
from ray import serve

from heliostat import cluster
from heliostat.registry import versions
from heliostat.registry.versions import ModelVersion
from heliostat.serving import applications, launch
from heliostat.serving.applications import VERSIONS
from heliostat.serving.config import ServingConfig
from tests import load
from tests.long_model import register_long_bundle, write_long_bundle
from tests.ports import free_port

PROMPTS = ["the red cat", "the big dog", "old", "the man goes to", "river", "at 2", "house", "market o'clock"]
Figures = dict[str, Any]


def bodies(model: str, max_tokens: int) -> list[dict[str, Any]]:
    """Greedy requests: each has one right answer."""
    return [{"model": model, "prompt": prompt, "max_tokens": max_tokens} for prompt in PROMPTS]


@contextlib.contextmanager
def endpoint(reference: str, **settings: Any) -> Iterator[str]:
    """The URL of a running endpoint."""
    sizes = {"num_cpus": 0.5, "cache_tokens": 8192, "max_queued_tokens": 16384, "port": free_port(), "poll_s": 0.5}
    running = launch.start(ServingConfig(**(sizes | settings)), reference)
    try:
        yield running.url
    finally:
        running.stop()


async def answers(url: str, asked: list[dict[str, Any]]) -> dict[str, str]:
    """Prompt -> its undisturbed answer."""
    async with httpx2.AsyncClient(timeout=120) as http:
        ended = [await load.ask(http, url, body) for body in asked]
    assert all(each.kind == "complete" for each in ended), ended
    return {each.prompt: each.text for each in ended}


def processes(title: str) -> list[int]:
    """Processes below this one, Ray's among them, whose title begins so."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process.pid)
    return found


def replica_pids() -> list[int]:
    """Processes of the replicas that run a model."""
    return processes(f"ray::ServeReplica:{VERSIONS}")


def all_running(count: int) -> bool:
    """Whether each version has `count` replicas that take requests."""
    found = applications.running(f"{VERSIONS}_").values()
    states = [deployment.replica_states for each in found for deployment in each.deployments.values()]
    return all(state.get("RUNNING", 0) == count and sum(state.values()) == count for state in states)


async def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for the condition; give up with an error after so many seconds."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.1)


async def counted(url: str, name: str) -> float:
    """The sum of a counter over all its labels, as /metrics tells it."""
    async with httpx2.AsyncClient() as http:
        text = (await http.get(url.replace("/v1", "/metrics"))).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"heliostat_{name}"))


async def kills(folder: Path, rounds: int) -> Figures:
    """SIGKILL of one of two replicas, again and again."""
    with endpoint(str(write_long_bundle(folder / "model")), num_replicas=2) as url:
        asked = bodies("model", 200)
        right = await answers(url, asked)
        async with load.clients(url, asked, 8) as running:
            for _ in range(rounds):
                await asyncio.sleep(random.uniform(0.5, 2))
                killed = random.choice(replica_pids())
                os.kill(killed, signal.SIGKILL)
                await until(lambda: len(replica_pids()) == 2 and all_running(2))
        wrong = sum(each.text != right[each.prompt] for each in running.of("complete"))
        await asyncio.sleep(12)  # Ray's agents collect metrics every 10 s
        resumed = await counted(url, "requests_resumed_total")
    return {"kills": rounds, "requests": len(running.ended), **running.kinds(), "wrong text": wrong, "resumed": resumed}


async def moves(folder: Path, rounds: int) -> Figures:
    """The alias moves between two versions under load."""
    made = [register_long_bundle(folder / f"v{seed}", "moving", seed, alias="champion") for seed in (2, 1)]
    with endpoint("models:/moving@champion") as url:
        return await move(url, made, rounds)


async def move(url: str, made: Sequence[ModelVersion], rounds: int) -> Figures:
    """The scenario at a running endpoint, which serves the last of the versions."""
    name = made[0].name
    asked = bodies(name, 100)
    texts: dict[str, set[str]] = {prompt: {text} for prompt, text in (await answers(url, asked)).items()}
    async with load.clients(url, asked, 4) as running:
        for _, version in zip(range(rounds), itertools.cycle(made), strict=False):
            versions.set_alias(name, "champion", version.version)
            await until(partial(serves, url, name, version.version))
            for prompt, text in (await answers(url, asked)).items():
                texts[prompt].add(text)
    strange = sum(each.text not in texts[each.prompt] for each in running.of("complete"))
    return {"moves": rounds, "requests": len(running.ended), **running.kinds(), "of neither version": strange}


async def broken(folder: Path, rounds: int) -> Figures:
    """The alias moves to a damaged version."""
    good = register_long_bundle(folder / "good", "breaking", 1, alias="champion")
    with endpoint("models:/breaking@champion") as url:
        return await damage(url, good, folder, rounds)


async def damage(url: str, good: ModelVersion, folder: Path, rounds: int) -> Figures:
    """The scenario at a running endpoint, which serves `good`."""
    name = good.name
    async with load.clients(url, bodies(name, 100), 4) as running:
        for number in range(rounds):
            bad = register_long_bundle(folder / f"bad{number}", name, 5 + number)
            config = Path(versions.resolve(bad.uri).path) / "config.json"
            config.write_text(config.read_text() + " ")
            versions.set_alias(name, "champion", bad.version)
            await until(partial(rejects, url, name, bad.version))
    still = serves(url, name, good.version)
    told = rejections(url, name)
    return {"moves": rounds, "requests": len(running.ended), **running.kinds(), "old one serves": still, "told": told}


def card(url: str, model: str) -> dict[str, Any]:
    """What /v1/models/{id} tells beside OpenAI's fields."""
    found: dict[str, Any] = httpx2.get(f"{url}/models/{model}").json()["heliostat"]
    return found


def serves(url: str, model: str, version: str) -> bool:
    """Whether this version answers."""
    return bool(card(url, model)["version"] == version)


def rejects(url: str, model: str, version: str) -> bool:
    """Whether this version was not let in."""
    return version in rejections(url, model)


def rejections(url: str, model: str) -> dict[str, str]:
    """Version -> why it was not let in."""
    return {each["version"]: each["reason"] for each in card(url, model)["rejected"]}


async def overload(folder: Path, seconds: int) -> Figures:
    """Five times the requests a second that the endpoint was measured to answer, whether they are answered or not."""
    room = 8
    model = write_long_bundle(folder / "model", width=256, layers=6)
    with endpoint(str(model), num_cpus=1, max_ongoing_requests=room, max_queued_requests=room) as url:
        asked = bodies("model", 60)
        await answers(url, asked)
        started = time.monotonic()
        async with load.clients(url, asked, room) as usual:
            await asyncio.sleep(max(10, seconds / 4))
        peak = len(usual.of("complete")) / (time.monotonic() - started)
        started = time.monotonic()
        over = await load.arrivals(url, asked, 5 * peak, seconds)
        goodput = len(over.of("complete")) / (time.monotonic() - started)
    refused = over.of("refused")
    silent = [each for each in refused if each.status not in (429, 503) or not each.retry_after]
    slowest = sorted(each.seconds for each in refused)[int(len(refused) * 0.99)] if refused else 0.0
    return {
        "seconds": seconds,
        "requests a second": round(5 * peak, 1),
        **over.kinds(),
        "refused without 429/503 and Retry-After": len(silent),
        "p99 of refusals, s": round(slowest, 3),
        "goodput / peak": round(goodput / peak, 3),
    }


async def disconnects(folder: Path, count: int) -> Figures:
    """Clients that go away in the middle of their streams."""
    with endpoint(str(write_long_bundle(folder / "model")), max_ongoing_requests=64) as url:
        body = {"model": "model", "prompt": "the red cat", "max_tokens": 480, "stream": True}
        handle = serve.get_deployment_handle("Replica", next(iter(applications.running(f"{VERSIONS}_"))))

        async def leave(http: httpx2.AsyncClient) -> None:
            async with http.stream("POST", f"{url}/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    return

        slowest = 0.0
        for _ in range(0, count, 20):
            async with httpx2.AsyncClient(timeout=60) as http:
                await asyncio.gather(*(leave(http) for _ in range(20)))
            left = time.monotonic()
            while await handle.in_flight.remote():
                await asyncio.sleep(0.02)
            slowest = max(slowest, time.monotonic() - left)
    return {"disconnects": count, "slowest until all slots were free, s": round(slowest, 2)}


SCENARIOS: dict[str, tuple[Callable[[Path, int], Awaitable[Figures]], int]] = {
    "kills": (kills, 20),
    "moves": (moves, 5),
    "broken": (broken, 1),
    "overload": (overload, 120),
    "disconnects": (disconnects, 200),
}


def measure(name: str, size: int | None = None) -> Figures:
    """Run a scenario; Ray must be connected. `size`: its number of faults, or its seconds."""
    scenario, usual = SCENARIOS[name]

    async def run(folder: Path) -> Figures:
        return await scenario(folder, size or usual)

    with tempfile.TemporaryDirectory(prefix="heliostat-faults-") as folder:
        return asyncio.run(run(Path(folder)))


def main() -> None:
    """Run the scenarios, print their figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.split("\n")[0])
    parser.add_argument("scenarios", nargs="+", choices=[*SCENARIOS, "all"], metavar="SCENARIO", help="%(choices)s")
    parser.add_argument("--size", type=int, help="number of faults, or seconds; default: each scenario's own")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    names = list(SCENARIOS) if "all" in options.scenarios else options.scenarios
    figures = {}
    with tempfile.TemporaryDirectory(prefix="heliostat-faults-") as home:
        os.environ["HELIOSTAT_HOME"] = home
        with cluster.connected():
            for name in names:
                figures[name] = measure(name, options.size)
                print(name, json.dumps(figures[name], indent=2), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
