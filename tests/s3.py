"""A real S3 server for tests: moto's, a process of its own on a loopback port, that keeps everything in memory."""

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.ports import free_port

BUCKET = "heliostat"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """The environment with which clients of S3 reach it, until the end of the block; it has an empty `BUCKET`."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", url.rsplit(":", 1)[1]]
    with (folder / "s3.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _make_bucket(url, process, folder / "s3.log")
        keys = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "tester", "AWS_DEFAULT_REGION": "us-east-1"}
        yield {"MLFLOW_S3_ENDPOINT_URL": url, "AWS_ENDPOINT_URL": url, **keys}
    finally:
        process.kill()
        process.wait()


def _make_bucket(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until it answers; the limit only keeps a broken one from hanging the tests."""
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=10).close()
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
