"""What of an endpoint's settings is refused before anything starts, and what Ray Serve and the director are told."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from heliostat.errors import ConfigError
from heliostat.serving import gateway, replica
from heliostat.serving.config import AutoscalingArgs, EndpointArgs
from heliostat.serving.endpoint import application, build


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("models:/cron@champion", {"model": "models:/cron@challenger"}, True),
        ("models:/cron@champion", {"model": "models:/cron/3"}, True),
        ("models:/cron@champion", {"model": "models:/cron@challenger", "model_id": "next"}, False),
        ("models:/cron@champion", {"model": "models:/sql@champion", "model_id": "cron"}, True),
        ("a/model", {"model": "b/model"}, True),
        ("a/model", {"model": "b/other"}, False),
    ],
)
def test_two_models_of_the_same_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: Any, same: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a/model", "b/model", "b/other"):
        (tmp_path / folder).mkdir(parents=True)
    args = EndpointArgs(model=first, models=[second])
    if not same:
        application(args, {})
        return
    with pytest.raises(ConfigError, match=r"same name.*model_id"):
        build(args)


@pytest.mark.parametrize(("least", "first"), [(0, 1), (1, 1), (2, 2)])
def test_a_version_that_may_scale_to_none_is_loaded_once(least: int, first: int) -> None:
    """Else nothing would tell that it cannot be loaded."""
    scaling = AutoscalingArgs(min_replicas=least, max_replicas=2)
    assert replica._scaling(scaling) == {**scaling.model_dump(), "initial_replicas": first}


def test_each_on_a_node_of_its_own_holds_for_replicas_and_gateways() -> None:
    args = EndpointArgs(model="m", num_replicas=2, gateways=3, max_replicas_per_node=1)
    made = replica.application("m", "m", "1", args, {})._bound_deployment
    assert [each._replica_config.max_replicas_per_node for each in (made, gateway.deployment(args))] == [1, 1]


def test_a_queue_that_ray_serve_does_not_take_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_queued_requests"):
        EndpointArgs(max_queued_requests=0)


def test_a_replica_that_ends_does_not_tell_that_it_is_ill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve calls `__del__` on the event loop, which goes on for a moment: the version would seem to be down."""
    told: list[bool] = []
    model = SimpleNamespace(healthy=True, state=lambda: None)
    model.close = lambda: setattr(model, "healthy", False)
    beat = SimpleNamespace(remote=lambda app, replica, works: told.append(works))
    context = SimpleNamespace(app_name="app", replica_id=SimpleNamespace(unique_id="1"))
    monkeypatch.setattr(replica, "_REPORT_S", 0.001)
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)

    async def end() -> None:
        ending: Any = object.__new__(replica.Replica)
        ending._model, ending._metrics = model, SimpleNamespace(report=lambda state: None)
        ending._reporting = asyncio.create_task(ending._report(SimpleNamespace(beat=beat)))
        while not told:
            await asyncio.sleep(0.001)
        ending.__del__()
        await asyncio.sleep(0.05)

    asyncio.run(end())
    assert set(told) == {True}
