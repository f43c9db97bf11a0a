"""What is told when the address is that of something else than a Ray cluster that lets us in. For those, see
slow/test_jobs.py."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from heliostat.errors import ResourceError
from heliostat.jobs.connection import Cluster


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """The address of a server that always says the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """Not in the tests' output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (404, "", "is not the dashboard of a Ray cluster"),
        (200, "<html>", "is not the dashboard of a Ray cluster"),
        (200, "{}", "is not the dashboard of a Ray cluster"),
        (500, "", "is not the dashboard of a Ray cluster"),
        (401, "Unauthorized", r"wants a token; set RAY_AUTH_MODE=token"),
        (403, "Forbidden", "does not take the token of RAY_AUTH_TOKEN;"),
        (200, json.dumps({"version": "4", "ray_version": "2.48.0"}), r"runs Ray 2\.48\.0; Heliostat needs 2\.60"),
        (200, json.dumps({"version": "4", "ray_version": "1.8.0"}), "is not the dashboard .*1.8.0 is running"),
    ],
)
def test_what_answers_is_told_apart(status: int, body: str, told: str) -> None:
    with answering(status, body) as address, pytest.raises(ResourceError, match=told) as refused:
        Cluster(address)
    assert address in str(refused.value)


def test_the_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at http://127\.0\.0\.1:1;"):
        Cluster(None)
    with answering(200, json.dumps({"version": "4", "ray_version": "2.60.0"})) as address:
        cluster = Cluster(address)
    assert (cluster.address, cluster.version) == (address, "2.60.0")
    with pytest.raises(ResourceError, match="no Ray cluster answers at"):
        cluster.job("it is gone")
