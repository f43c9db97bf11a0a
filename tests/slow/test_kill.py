"""A worker or the driver killed with SIGKILL in mid-run: the finished weights are those of an unbroken run."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from heliostat.models import bundle
from heliostat.quickstart import schedules
from tests.slow import command

CONFIG = str(Path(__file__).parents[2] / "jobs" / "examples" / "cron" / "train.yaml")
KILL_AT = 60


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of 200 steps that saves every 20, too short to learn much and long enough to be hit."""
    folder = tmp_path_factory.mktemp("kill")
    schedules.write(folder)
    return [
        "train", CONFIG, f"data.train={folder}/train.jsonl", f"data.validation={folder}/validation.jsonl",
        "model.scratch.config={n_layer: 2, n_embd: 64, n_head: 2}", "training.max_steps=200", "training.save_steps=20",
        "training.eval_steps=100", "training.logging_steps=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights' hash of the run that nobody disturbs."""
    storage = tmp_path_factory.mktemp("unbroken")
    return weights_hash(command.run(*arguments, f"storage_path={storage}", "registry.register_model=false"))


def weights_hash(result: dict[str, Any]) -> str:
    """sha256 of the bundle's weights."""
    return str(bundle.read_manifest(Path(result["bundle"]))["files"]["model.safetensors"])


def start_until_step(arguments: list[str], storage: Path, step: int) -> "subprocess.Popen[str]":
    """Start the run and wait until it has logged `step`."""
    process = command.start(*arguments, f"storage_path={storage}", "registry.register_model=false")
    command.wait_for(lambda: command.last_step(storage / "cron-0001") >= step, process)
    return process


def test_killed_worker(arguments: list[str], unbroken: str, tmp_path: Path) -> None:
    process = start_until_step(arguments, tmp_path, KILL_AT)
    workers = command.processes_below(process.pid, "RayTrainWorker")
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    result = command.finish(process)
    assert restarts(tmp_path) == 1
    assert weights_hash(result) == unbroken


def test_killed_driver(arguments: list[str], unbroken: str, tmp_path: Path) -> None:
    process = start_until_step(arguments, tmp_path, KILL_AT)
    below = command.processes_below(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert command.still_alive(below) == []
    result = command.run(*arguments, f"storage_path={tmp_path}", "registry.register_model=false", "resume=must")
    assert restarts(tmp_path) == 1
    assert weights_hash(result) == unbroken


def restarts(storage: Path) -> int:
    """How often workers went on from a checkpoint, by the journal."""
    text = (storage / "cron-0001" / "metrics.jsonl").read_text()
    return text.count("progress.start") - 1
