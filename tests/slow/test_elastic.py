"""Workers that come and go with the machines of a Ray cluster: the losses are those of a run that nobody disturbs."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from heliostat import journal
from heliostat.training import checkpoint
from tests import ports, tiny
from tests.slow import command

# Shorter than on a real cluster, where nothing waits for them.
INTERVALS = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
pytestmark = pytest.mark.skipif(
    not os.environ.get("HELIOSTAT_ELASTIC"),
    reason="wants the machine for itself, for three minutes: HELIOSTAT_ELASTIC=1",
)
DRAIN_S = "30"


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without room for workers, in a folder of its own: in Ray's, other commands would find and join it."""
    for name, value in INTERVALS.items():
        monkeypatch.setenv(name, value)
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": ports.free_port(), "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Six rows a step, in pairs: 3 workers take one pair each, 2 workers two, of which one may be empty."""
    tiny.write_model(tmp_path / "model", "llama")
    rows = [{"prompt": text, "completion": text[::-1][:9]} for text in tiny.TEXTS]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "elastic",
        "storage_path": str(tmp_path),
        "model": {"model_name_or_path": str(tmp_path / "model")},
        "data": {"format": "prompt_completion", "train": str(tmp_path / "train.jsonl"), "max_length": 64},
        "training": {"num_workers": [2, 3], "per_device_train_batch_size": 2, "max_steps": 100_000, "save_steps": 10,
                     "learning_rate": 1e-5, "lr_scheduler_type": "constant", "warmup_ratio": 0, "max_failures": 1,
                     "elastic_resize_monitor_interval_s": 5},
        "registry": {"register_model": False},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    return tmp_path / "config.yaml"


def rows(run: Path) -> list[dict[str, Any]]:
    return journal.read(run / journal.NAME)[0]


def went_on(run: Path, number: int) -> bool:
    """Whether the start of that number has trained a few steps."""
    since = [index for index, row in enumerate(rows(run)) if "progress.start" in row["metrics"]][number - 1 : number]
    return bool(since) and sum("loss" in row["metrics"] for row in rows(run)[since[0] :]) > 12


def drain(cluster: Cluster, node_id: str) -> None:
    """What a cloud's notice is turned into before it takes a machine away."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    ray = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address]
    subprocess.run([*ray, "--node-id", node_id, *reason, "--deadline-remaining-seconds", DRAIN_S], check=True)


def checkpointed_by(run: Path) -> int:
    """The number of workers that wrote the newest checkpoint."""
    newest = max(run.glob("checkpoints/attempt-01/step_*"), key=lambda folder: folder.stat().st_mtime)
    return int(newest.name.rpartition("-w")[2])


def test_a_run_shrinks_and_grows_with_the_cluster(config: Path, machines: Cluster) -> None:
    run = config.parent / "elastic-0001"
    nodes = [machines.add_node(num_cpus=1) for _ in range(3)]
    process = command.start("train", str(config))
    command.wait_for(lambda: went_on(run, 1), process)
    machines.remove_node(nodes[0], allow_graceful=False)
    command.wait_for(lambda: went_on(run, 2), process)
    assert checkpointed_by(run) == 2
    machines.add_node(num_cpus=1)
    command.wait_for(lambda: went_on(run, 3), process)
    assert checkpointed_by(run) == 3

    drain(machines, nodes[1].node_id)
    command.wait_for(lambda: any("note" in row for row in rows(run)), process)
    (note,) = [row["note"] for row in rows(run) if "note" in row]
    match = re.fullmatch(rf"machine {nodes[1].node_id} is about to leave; saving after step (\d+)", note)
    assert match
    saved = checkpoint.at(run / "checkpoints", "attempt-01", int(match[1]), 3)
    command.wait_for(lambda: saved.is_finished, process)
    os.kill(process.pid, signal.SIGINT)
    process.communicate()

    losses = command.journal(run, "loss")
    alone = command.run(
        "train", str(config), f"training.max_steps={max(losses)}", "training.save_steps=1000000",
        "training.num_workers=0", "training.per_device_train_batch_size=6", f"storage_path={config.parent / 'alone'}",
    )  # fmt: skip
    assert losses == pytest.approx(command.journal(Path(alone["run_folder"]), "loss"), rel=1e-5)
