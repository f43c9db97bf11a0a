"""HTTP byte by byte: a uvicorn server in a thread, raw requests to any server, and what they answer."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx2
import uvicorn
from starlette.types import ASGIApp


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until the condition holds; give up after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answers(url: str) -> bool:
    """Whether something healthy is there now; while a process is replaced, requests may wait for longer than this."""
    try:
        return bool(httpx2.get(url).status_code == 200)
    except httpx2.TransportError:
        return False


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The URL of the application behind uvicorn, as Ray Serve's proxy runs it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    """A connection to the server; `receive_buffer`: bytes that the client's side takes without being read."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def raw(url: str, request: str | bytes) -> bytes:
    """Send bytes, and read until the server closes the connection."""
    with closing(connect(url)) as connection:
        connection.sendall(request.encode("latin-1") if isinstance(request, str) else request)
        return read_all(connection)


def parsed(response: bytes) -> tuple[int, list[tuple[str, str]], Any]:
    """Status, headers with names in lower case, and the JSON object in the body (None: there is none)."""
    head, _, body = response.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    value = json.loads(body[body.index(b"{") : body.rindex(b"}") + 1]) if b"{" in body else None
    return int(status.split()[1]), headers, value
