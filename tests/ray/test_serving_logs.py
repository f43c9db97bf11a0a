"""What a Ray Serve replica that is set up for it writes into its log files, and what not."""

import asyncio
import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from heliostat.serving import logs
from heliostat.serving.logs import RequestLine, log_request

CANARY = "canary-90ab said the client"


class Noisy:
    """A deployment that fails in all the ways there are."""

    def __init__(self) -> None:
        logs.setup()

    async def answer(self, prompt: str) -> None:
        log_request(RequestLine(request_id="mine-1", endpoint="/v1/completions", status=200, duration_ms=1.0))
        logging.getLogger("heliostat.serving.test").info("told")
        task = asyncio.create_task(self._fail(prompt))
        await asyncio.wait([task])
        del task
        gc.collect()
        await self._fail(prompt)

    async def _fail(self, prompt: str) -> None:
        raise ValueError(prompt)


@pytest.fixture
def failed(ray_cluster: Any) -> Iterator[None]:
    """The deployment has been asked once."""
    serve.start(http_options={"location": "NoServer"}, logging_config=logs.logging_config())
    deployment = serve.deployment(Noisy, ray_actor_options={"num_cpus": 0.1}, logging_config=logs.logging_config())
    handle = serve.run(deployment.bind(), name="noisy", route_prefix=None)
    with pytest.raises(ValueError, match=CANARY):
        handle.answer.remote(CANARY).result()
    yield
    serve.shutdown()


def test_a_replica_writes_json_lines_without_what_clients_wrote(failed: None) -> None:
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert [path for path, content in written.items() if CANARY.encode() in content] == []
    (file,) = folder.glob("serve/replica_noisy_Noisy_*.log")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    (request,) = [line for line in lines if line.get("event") == "request"]
    assert request["request_id"] == "mine-1"
    assert [line["levelname"] for line in lines if line["message"] == "told"] == ["INFO"]
    described = [line["exc_text"].splitlines() for line in lines if "exc_text" in line]
    # The lost task's error, which asyncio logs, and the request's, which Serve logs.
    assert len(described) == 2
    for text in described:
        assert text[0] == "ValueError: (message withheld)"
        assert text[-1].endswith(" in _fail")
