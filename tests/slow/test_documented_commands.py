"""The commands that README.md and docs/serving.md give for the endpoint, as they stand there but for ports."""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest

from tests import readme
from tests.conftest import REPOSITORY
from tests.long_model import register_long_bundle
from tests.ports import free_port
from tests.slow import command

URL = "http://127.0.0.1:8000"


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A champion named `cron` in the registry, and the commands of this environment."""
    register_long_bundle(tmp_path / "model", "cron", 1, alias="champion")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@contextmanager
def endpoint(arguments: list[str], port: int) -> Iterator[None]:
    """`heliostat serve` with these arguments."""
    with command.endpoint(*arguments, f"serving.port={port}", "serving.num_cpus=0.5") as up:
        assert up["model"] == "cron"
        yield


@contextmanager
def collector() -> Iterator[tuple[str, threading.Event]]:
    """The address of a server for OpenTelemetry's spans, and whether it was sent any."""
    spans = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            if self.path == "/v1/traces":
                spans.set()

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """Not in the tests' output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", spans
        finally:
            server.shutdown()


def run(line: str, port: int) -> str:
    """What a command prints."""
    line = line.replace(URL, f"http://127.0.0.1:{port}").replace("curl ", "curl --silent --show-error --fail ", 1)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    return done.stdout


def answers_rightly(line: str, output: str) -> bool:
    """Whether it is what the command asks for."""
    if '"stream": true' in line:
        return output.endswith("data: [DONE]\n\n") and output.count("data: ") > 2
    return "error" not in json.loads(output)


def test_the_readme_serves_asks_and_makes_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    port = free_port()
    lines = readme.shell(readme.section("The endpoint"))
    serves = [number for number, line in enumerate(lines) if line.startswith("heliostat serve ")]
    key = next(number for number, line in enumerate(lines) if line.startswith("heliostat keys "))
    assert serves[0] == 0 < key < serves[1] < len(lines) - 1

    with endpoint(shlex.split(lines[0])[2:], port):
        for line in lines[1:key]:
            assert answers_rightly(line, run(line, port)), line
    monkeypatch.setenv("KEY", run(lines[key], port).splitlines()[0])
    tracing = readme.shell(readme.section("Traces", readme.document("observability.md")))[-1].split()
    assert tracing[1:3] == ["heliostat", "serve"]
    with collector() as (url, spans):
        monkeypatch.setenv(tracing[0].partition("=")[0], url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # ms until spans are sent
        asked = [f'{line} -H "Authorization: Bearer $KEY"' for line in lines[1:key] if '"stream": true' in line]
        arguments = [*shlex.split(lines[serves[1]])[2:], tracing[-1]]
        serve_with_keys(arguments, [*lines[serves[1] + 1 :], *asked], port)
        assert spans.wait(120), f"nothing was sent to {url}"


def serve_with_keys(arguments: list[str], lines: list[str], port: int) -> None:
    """Ask an endpoint that wants the key in $KEY, also for its metrics."""
    (metrics,) = readme.shell(readme.section("Metrics", readme.document("observability.md")))
    with endpoint(arguments, port):
        for line in lines:
            assert answers_rightly(line, run(line, port)), line
        assert httpx2.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
        assert "heliostat_" in run(metrics, port)


def test_the_guide_serves_an_experiment_and_a_serve_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in readme.shell(readme.section("Start", readme.document("serving.md"))) if "serve" in line]
    _, experiment, config = (shlex.split(line, comments=True) for line in lines)
    monkeypatch.chdir(REPOSITORY)
    with endpoint(experiment[2:], free_port()):
        pass

    assert config == ["serve", "run", "serve/local.yaml"]
    port = free_port()
    file = tmp_path / "local.yaml"
    file.write_text(Path(config[-1]).read_text().replace("port: 8000", f"port: {port}"))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen([*config[:-1], str(file)], stdout=output, stderr=subprocess.STDOUT)
        try:
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, (tmp_path / "output").read_text()
                time.sleep(0.5)
            assert httpx2.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"] == "cron"
            routes = httpx2.get(f"http://127.0.0.1:{port}/-/routes")
            assert (routes.status_code, routes.json()["error"]["message"]) == (404, "Not Found"), "the proxy is guarded"
        finally:
            process.terminate()
            process.wait(timeout=120)


def answers(url: str) -> bool:
    """Whether something healthy is there."""
    try:
        return bool(httpx2.get(url, timeout=10).status_code == 200)
    except httpx2.TransportError:
        return False
