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
from tests import load
from tests.long_model import register_long_bundle


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: Any) -> Iterator[None]:
    yield
    serve.shutdown()


def test_streams_survive_their_replicas() -> None:
    figures = faults.measure("kills", 1)
    assert figures["complete"] == figures["requests"] > 8
    assert figures["wrong text"] == 0
    assert figures["resumed"] > 0, "streams were under way when a replica was killed"


def test_an_alias_moves_under_load_to_good_and_broken_versions_and_the_director_may_die(tmp_path: Path) -> None:
    async def body(url: str) -> None:
        figures = await faults.move(url, made, 1)
        assert figures["complete"] == figures["requests"] > 8
        assert figures["of neither version"] == 0
        figures = await faults.damage(url, made[0], tmp_path, 1)
        assert figures["complete"] == figures["requests"] > 8
        assert figures["old one serves"]
        assert "config.json: is damaged" in next(iter(figures["told"].values()))
        await director_dies(url)

    async def director_dies(url: str) -> None:
        """A new one finds what is loaded, and follows on."""
        async with load.clients(url, faults.bodies("moving", 40), 2) as running:
            (director,) = faults.processes("ray::ServeReplica:heliostat:Director")
            os.kill(director, signal.SIGKILL)
            versions.set_alias("moving", "champion", made[1].version)
            await faults.until(partial(faults.serves, url, "moving", made[1].version))
        assert running.kinds() == {"complete": len(running.ended)}

    made = [register_long_bundle(tmp_path / f"v{seed}", "moving", seed, alias="champion") for seed in (2, 1)]
    with faults.endpoint("models:/moving@champion") as url:
        asyncio.run(body(url))


def test_canaries_take_their_share_and_go_on_or_back(tmp_path: Path) -> None:
    """The first takes over. The second's replica is killed: its requests are answered by the old one, and it goes."""
    canary = {"percent": 60, "duration_s": 3, "min_requests": 10, "max_error_rate": 0}

    async def goes_on(url: str) -> None:
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

    def kill_canary(url: str, stable: set[int]) -> bool:
        """Until it is rejected; whether it is. A replica that is killed between two requests harms none."""
        if faults.card(url, "canary")["canary"]:
            for pid in set(faults.replica_pids()) - stable:
                os.kill(pid, signal.SIGKILL)
        return faults.rejects(url, "canary", "3")

    async def goes_back(url: str) -> None:
        asked = faults.bodies("canary", 200)
        right = await faults.answers(url, asked)
        await faults.until(lambda: len(faults.replica_pids()) == 1)
        stable = set(faults.replica_pids())
        async with load.clients(url, asked, 6) as running:
            versions.set_alias("canary", "champion", "3")
            await faults.until(partial(kill_canary, url, stable))
        assert "failed while it was a canary" in faults.rejections(url, "canary")["3"]
        assert faults.serves(url, "canary", "2")
        assert running.of("lost") == []
        assert await faults.answers(url, asked) == right

    for seed in (1, 2, 3):
        register_long_bundle(tmp_path / f"v{seed}", "canary", seed)
    versions.set_alias("canary", "champion", "1")
    with faults.endpoint("models:/canary@champion", canary=canary) as url:
        asyncio.run(goes_on(url))
        asyncio.run(goes_back(url))


def test_several_models_scaled_to_zero_come_up_when_they_are_asked_for(tmp_path: Path) -> None:
    scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 1, "upscale_delay_s": 0}
    for name, seed in (("first", 1), ("second", 2)):
        register_long_bundle(tmp_path / name, name, seed, alias="champion")
    more = [{"model": "models:/second@champion"}]
    with faults.endpoint("models:/first@champion", models=more, autoscaling=scaling) as url:
        ids = [each["id"] for each in httpx2.get(f"{url}/models").json()["data"]]
        assert ids == ["first", "second", "first@1", "second@1"]
        asyncio.run(faults.until(lambda: faults.replica_pids() == []))
        assert httpx2.get(url.replace("/v1", "/health")).status_code == 200
        texts = {name: asyncio.run(faults.answers(url, faults.bodies(name, 20)[:2])) for name in ids}
    assert texts["second"] == texts["second@1"] != texts["first"] == texts["first@1"]
