"""A real MLflow server for tests: a process of its own on a loopback port, through which all artifacts go too."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

# No job queue, no telemetry: neither is used here.
_QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@contextlib.contextmanager
def running(folder: Path, database: str | None = None, workers: int = 1) -> Iterator[str]:
    """The URI of a server that keeps artifacts in `folder`, and everything else in the database or a file there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", database or f"sqlite:///{folder}/server.db", "--workers", str(workers)]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env={**os.environ, **_QUIET}, start_new_session=True, stdout=log, stderr=log)
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Wait until the server answers; the limit only keeps a broken one from hanging the tests."""
    deadline = time.monotonic() + 180
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
