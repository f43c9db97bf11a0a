"""The commands that README.md and docs/serving.md give for the endpoint, as they stand there but for ports."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    process = command.start("serve", *arguments, f"serving.port={port}", "serving.num_cpus=0.5")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        assert json.loads(line)["model"] == "cron"
        yield
    finally:
        process.terminate()
        process.communicate(timeout=120)


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
    with endpoint(shlex.split(lines[serves[1]])[2:], port):
        for line in lines[serves[1] + 1 :]:
            assert answers_rightly(line, run(line, port)), line
            assert httpx2.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401


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
