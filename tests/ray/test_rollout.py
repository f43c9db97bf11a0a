"""The endpoint under faults, on a real cluster and under load: no request is lost, whatever happens behind it.

The scenarios are those of `python -m benchmarks.faults`, with fewer faults.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from ray import serve

from benchmarks import faults
from heliostat.registry import versions
from heliostat.serving import applications
from heliostat.serving.applications import APPLICATION, VERSIONS
from tests import load
from tests.long_model import register_long_bundle


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: Any) -> Iterator[None]:
    yield
    serve.shutdown()


def test_streams_survive_their_replicas() -> None:
    figures = faults.measure("kills", 2)
    assert figures["complete"] == figures["requests"] > 8
    assert figures["wrong text"] == 0
    assert figures["resumed"] > 0, "streams were under way when a replica was killed"


def test_an_alias_that_moves_under_load_costs_no_request() -> None:
    figures = faults.measure("moves", 2)
    assert figures["complete"] == figures["requests"] > 8
    assert figures["of neither version"] == 0


def test_a_broken_version_takes_no_traffic_and_says_why() -> None:
    figures = faults.measure("broken", 1)
    assert figures["complete"] == figures["requests"] > 8
    assert figures["old one serves"]
    assert "config.json: is damaged" in next(iter(figures["told"].values()))


def test_clients_that_leave_free_their_slots() -> None:
    assert faults.measure("disconnects", 20)["disconnects"] == 20


def test_a_canary_takes_its_share_and_then_over(tmp_path: Path) -> None:
    canary = {"percent": 50, "duration_s": 1, "min_requests": 5}

    async def body(url: str) -> None:
        asked = faults.bodies("canary", 20)
        before = await faults.answers(url, asked)
        async with load.clients(url, asked, 2) as running:
            versions.set_alias("canary", "champion", "2")
            await faults.until(lambda: bool(faults.card(url, "canary")["canary"]))
            assert faults.card(url, "canary@2")["status"] == "canary"
            await faults.until(partial(faults.serves, url, "canary", "2"))
        after = await faults.answers(url, asked)
        assert before != after
        assert running.kinds() == {"complete": len(running.ended)}
        assert all(each.text in (before[each.prompt], after[each.prompt]) for each in running.ended)

    for seed, alias in ((1, "champion"), (2, "challenger")):
        register_long_bundle(tmp_path / f"v{seed}", "canary", seed, alias=alias)
    with faults.endpoint("models:/canary@champion", canary=canary) as url:
        asyncio.run(body(url))


def test_a_canary_whose_requests_fail_goes_back(tmp_path: Path) -> None:
    """Its replica is killed again and again: the requests are answered by the old version, and it is rejected."""
    canary = {"percent": 90, "duration_s": 600, "min_requests": 1, "max_error_rate": 0}

    async def body(url: str) -> None:
        asked = faults.bodies("canary", 60)
        right = await faults.answers(url, asked)
        stable = set(faults.replica_pids())
        async with load.clients(url, asked, 4) as running:
            versions.set_alias("canary", "champion", "2")
            await faults.until(lambda: bool(faults.card(url, "canary")["canary"]))
            before = len(running.ended)
            await faults.until(lambda: len(running.ended) > before + 2)
            for pid in set(faults.replica_pids()) - stable:
                os.kill(pid, signal.SIGKILL)
            await faults.until(partial(faults.rejects, url, "canary", "2"))
        assert "requests failed while it was a canary" in faults.rejections(url, "canary")["2"]
        assert faults.serves(url, "canary", "1")
        assert running.of("lost") == []
        assert await faults.answers(url, asked) == right

    for seed, alias in ((1, "champion"), (2, "challenger")):
        register_long_bundle(tmp_path / f"v{seed}", "canary", seed, alias=alias)
    with faults.endpoint("models:/canary@champion", canary=canary) as url:
        asyncio.run(body(url))


def test_a_director_that_dies_finds_what_is_loaded_and_follows_on(tmp_path: Path) -> None:
    async def body(url: str) -> None:
        asked = faults.bodies("lasting", 40)
        async with load.clients(url, asked, 2) as running:
            replicas = faults.replica_pids()
            (director,) = faults.processes("ray::ServeReplica:heliostat:Director")
            os.kill(director, signal.SIGKILL)
            versions.set_alias("lasting", "champion", "2")
            await faults.until(partial(faults.serves, url, "lasting", "2"))
            assert set(replicas).isdisjoint(faults.replica_pids()) or len(faults.replica_pids()) > 1
        assert running.kinds() == {"complete": len(running.ended)}

    for seed, alias in ((1, "champion"), (2, "challenger")):
        register_long_bundle(tmp_path / f"v{seed}", "lasting", seed, alias=alias)
    with faults.endpoint("models:/lasting@champion") as url:
        asyncio.run(body(url))


def test_scaled_to_zero_a_request_brings_a_replica_up(tmp_path: Path) -> None:
    scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 1, "upscale_delay_s": 0}

    def replicas() -> int:
        found = applications.running(VERSIONS).values()
        return sum(sum(each.replica_states.values()) for app in found for each in app.deployments.values())

    async def body(url: str) -> None:
        asked = faults.bodies("sleepy", 5)[:1]
        right = await faults.answers(url, asked)
        await faults.until(lambda: replicas() == 0)
        assert httpx2.get(url.replace("/v1", "/health")).status_code == 200
        assert await faults.answers(url, asked) == right

    register_long_bundle(tmp_path / "v1", "sleepy", 1, alias="champion")
    with faults.endpoint("models:/sleepy@champion", autoscaling=scaling) as url:
        asyncio.run(body(url))


def test_several_models_behind_one_endpoint(tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("second", 2)):
        register_long_bundle(tmp_path / name, name, seed, alias="champion")
    more = [{"model": "models:/second@champion"}, {"model": "models:/second/1", "model_id": "third"}]
    with faults.endpoint("models:/first@champion", models=more) as url:
        ids = [each["id"] for each in httpx2.get(f"{url}/models").json()["data"]]
        assert ids == ["first", "second", "third", "first@1", "second@1", "third@1"]
        texts = {name: asyncio.run(faults.answers(url, faults.bodies(name, 20))) for name in ids}
    assert texts["second"] == texts["third"] == texts["second@1"] != texts["first"]
    assert APPLICATION not in serve.status().applications
