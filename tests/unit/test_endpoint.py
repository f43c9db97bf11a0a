"""What of an endpoint's settings is refused before anything starts, and what Ray Serve is told of them."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from heliostat.errors import ConfigError
from heliostat.serving import replica
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


def test_a_queue_that_ray_serve_does_not_take_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_queued_requests"):
        EndpointArgs(max_queued_requests=0)
