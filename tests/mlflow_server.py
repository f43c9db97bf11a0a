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


class Server:
    """A server that keeps artifacts in `folder`, and everything else in the database or a file there.

    It can be killed and started again.
    """

    def __init__(self, folder: Path, database: str | None = None, workers: int = 1) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self._store = ["--backend-store-uri", database or f"sqlite:///{folder}/server.db", "--workers", str(workers)]

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += [*self._store, "--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **_QUIET}, start_new_session=True, stdout=log, stderr=log
            )

    def wait(self, seconds: float = 120) -> None:
        """Wait until the server answers; the limit only keeps a broken one from hanging the tests."""
        deadline = time.monotonic() + seconds
        while not self._answers():
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
            return bool(answer.status == 200)
        return False


@contextlib.contextmanager
def running(folder: Path, database: str | None = None, workers: int = 1) -> Iterator[str]:
    """The URI of a server that answers, until the end of the block."""
    server = Server(folder, database, workers)
    server.start()
    try:
        server.wait(180)
        yield server.uri
    finally:
        server.kill()
