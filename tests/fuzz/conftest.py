"""The endpoint's application behind a real HTTP server in a thread, for requests that no client should send."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from heliostat.models import base
from heliostat.serving.config import EndpointArgs
from tests.service import SIZES, application

MAX_BODY_BYTES = 1 << 18


@pytest.fixture(scope="package")
def url(tiny_bundle: Path) -> Iterator[str]:
    """Where an endpoint with the model `tiny` (128 tokens long) listens."""
    args = EndpointArgs(**SIZES, max_body_bytes=MAX_BODY_BYTES)
    loaded = base.load_for_inference(str(tiny_bundle))
    started = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve(listening: socket.socket) -> None:
        async with application(loaded, args) as (_, app):
            config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
            servers.append(uvicorn.Server(config))
            started.set()
            await servers[0].serve([listening])

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=lambda: asyncio.run(serve(listening)))
        thread.start()
        try:
            assert started.wait(120)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            for server in servers:
                server.should_exit = True
            thread.join()
