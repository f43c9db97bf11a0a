"""Workers and ports that are not there: code 2, one message, no run folder, and no Ray process left behind."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from heliostat import cli, state
from tests import tiny
from tests.bundles import write_bundle
from tests.ports import free_port

RAY_PROCESSES = {"raylet", "gcs_server"}


@pytest.fixture
def config(tmp_path: Path, tiny_bundle: Path) -> Path:
    """An experiment that would train with one worker."""
    rows = [{"prompt": text, "completion": " house"} for text in tiny.TEXTS[:12]]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "name": "x",
        "model": {"model_name_or_path": str(tiny_bundle)},
        "data": {"train": str(data), "format": "prompt_completion", "max_length": 64},
        "training": {"max_steps": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main([*arguments, "--json"]) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return str(json.loads(output.out)["error"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.num_workers=5"], "training.num_workers=5 needs 5 CPU, but the cluster has 4; lower "
         "training.num_workers, or join a larger cluster with RAY_ADDRESS"),
        (["training.num_workers=2", "training.resources_per_worker={CPU: 3}"], "training.num_workers=2 needs 6 CPU, "
         "but the cluster has 4"),
        (["training.use_gpu=true", "training.resources_per_worker={CPU: 1, GPU: 1000}"], "training.num_workers=1 needs "
         "1000 GPU, but the cluster has "),
        (["training.resources_per_worker={TPU: 1}"], "training.num_workers=1 needs 1 TPU, but the cluster has 0"),
    ],
)  # fmt: skip
def test_more_workers_than_the_cluster_can_ever_give(
    overrides: list[str], message: str, ray_cluster: Any, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(["train", str(config), *overrides], capsys).startswith(message)
    assert list(state.runs().iterdir()) == []
    assert ray_cluster.is_initialized(), "a cluster that was there before stays"


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield int(listening.getsockname()[1])


def test_more_gateways_than_nodes_for_them(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_bundle(tmp_path / "bundle")
    settings = [f"serving.port={free_port()}", "serving.gateways=2", "serving.max_replicas_per_node=1"]
    message = refused(["serve", str(made), *settings], capsys)
    assert message.startswith("serving.gateways=2: the cluster's nodes have room for 1, at most 1 on a node; lower")


def test_a_port_that_is_taken(
    taken_port: int, ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_bundle(tmp_path / "bundle")
    message = refused(["serve", str(made), f"serving.port={taken_port}"], capsys)
    assert message.startswith(f"port {taken_port} on 127.0.0.1 cannot be used (Address already in use); choose another")


def descendants(process: psutil.Process) -> set[psutil.Process]:
    try:
        return set(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture
def _left_by_a_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file by which Ray finds a cluster of this machine; that one was killed."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # sockets have short paths
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.mark.usefixtures("_left_by_a_cluster")
def test_a_refused_command_takes_its_own_cluster_down_with_it(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "heliostat.cli", "train", str(config), "training.num_workers=1000", "--json"]
    seen: dict[psutil.Process, str] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as driver:
        try:
            while driver.poll() is None:
                seen |= {process: name(process) for process in descendants(psutil.Process(driver.pid))}
                time.sleep(0.2)
            assert driver.stdout is not None
            assert driver.stderr is not None
            output, errors = driver.stdout.read(), driver.stderr.read()
            _, alive = psutil.wait_procs(list(seen), timeout=30)
        finally:
            for process in seen:
                if process.is_running():
                    process.kill()
    assert driver.returncode == 2, errors
    assert json.loads(output)["error"].startswith("training.num_workers=1000 needs 1000 CPU, but the cluster has ")
    assert "Traceback" not in errors
    assert set(seen.values()) >= RAY_PROCESSES, "a cluster was started for it"
    assert {name(process) for process in alive} == set()
    assert list(state.runs().iterdir()) == []
