"""What the loss of a node does: `python -m benchmarks.nodes [train tune-training tune-decoding serve] [--json FILE]`.

A Ray head and two worker nodes are separate processes here, with token authentication on; the nodes' processes run in
folders of their own, and share storage as nodes of a cluster have to. Each scenario works through `heliostat submit`
(or `heliostat serve`, with clients that ask it), and one worker node is killed with SIGKILL in the middle, all its
processes at once. Prints what became of it.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from heliostat.quickstart import schedules
from tests import load
from tests.conftest import REPOSITORY
from tests.ports import free_port
from tests.ray_nodes import RayCluster, kill_tree
from tests.slow import command

Figures = dict[str, Any]
OVERRIDES = ["training.max_steps=60", "training.save_steps=10", "training.logging_steps=1", "data.test=null",
             "model.scratch.config={n_layer: 2, n_embd: 64, n_head: 2}"]  # fmt: skip
WORKER_CPUS = 2


class Nodes:
    """A head without CPUs for work, and two worker nodes with two each."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "shared"
        self.cluster = RayCluster(self.home, num_cpus=0)
        self.cluster.wait()
        self.workers = [self.add(), self.add()]

    def add(self) -> Any:
        """One more worker node."""
        return self.cluster.start(f"--address=127.0.0.1:{self.cluster.port}", cpus=WORKER_CPUS)

    def kill_one_that(self, does: Callable[[str], bool], patience: float = 300) -> str:
        """Kill the first worker node with a process whose title passes, once there is one; another joins in its place.

        Returns:
            The title.
        """
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            for index, node in enumerate(self.workers):
                titles = [" ".join(each.cmdline()) for each in _below(node.pid)]
                if found := next(filter(does, titles), None):
                    kill_tree(node)
                    self.workers[index] = self.add()
                    return found
            time.sleep(0.2)
        raise TimeoutError("no such process came up")


def _below(pid: int) -> Iterator[psutil.Process]:
    for process in psutil.Process(pid).children(recursive=True):
        try:
            process.cmdline()
        except psutil.Error:
            continue
        yield process


def submitted(nodes: Nodes, title: str, *arguments: str) -> Figures:
    """Run a job, kill the node with a process of that title when the job works, and tell how the job ended."""
    started = command.run("submit", *arguments, "--no-wait")
    job = started["job_id"]
    time_of_start = time.monotonic()
    killed = nodes.kill_one_that(lambda line: title in line)
    process = command.start("logs", job, "--follow")
    stdout, stderr = process.communicate()
    print(stderr, file=sys.stderr)
    result = json.loads(stdout.splitlines()[-1])
    return {
        "exit_code": process.returncode,
        "status": result["status"],
        "killed": killed,
        "seconds": round(time.monotonic() - time_of_start, 1),
        "model": result.get("model_uri"),
    }


def train(nodes: Nodes, config: list[str]) -> Figures:
    """Two workers."""
    return submitted(nodes, "RayTrainWorker", "train", *config, "training.num_workers=2")


def tune_training(nodes: Nodes, config: list[str]) -> Figures:
    """Trials of one worker each."""
    search = ["tune_training.space={training.learning_rate: [1.0e-3, 2.0e-3]}", "tune_training.num_samples=3"]
    return submitted(nodes, "ray::", "tune-training", *config, "training.num_workers=1", *search)


def tune_decoding(nodes: Nodes, config: list[str]) -> Figures:
    """Actors that generate."""
    small = ["tune_decoding.prompts=32", "tune_decoding.holdout_prompts=32", "tune_decoding.num_samples=6"]
    return submitted(nodes, "ray::", "tune-decoding", *config, *small)


def serve(nodes: Nodes, config: list[str]) -> Figures:
    """Two replicas on two nodes, asked by four clients all the while."""
    command.run("submit", "promote", "cron")
    port = free_port()
    settings = ["serving.num_replicas=2", "serving.num_cpus=1.5", f"serving.port={port}", "serving.gateways=1"]
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{nodes.cluster.port}"
    process = command.start("serve", "models:/cron@champion", *settings)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        asked = [{"model": "cron", "prompt": f"every day at {hour}:30\n", "max_tokens": 24} for hour in range(24)]
        return asyncio.run(_under_load(nodes, f"http://127.0.0.1:{port}/v1", asked))
    finally:
        process.terminate()
        process.communicate(timeout=120)


async def _under_load(nodes: Nodes, url: str, asked: list[dict[str, Any]]) -> Figures:
    async with load.clients(url, asked, 4) as running:
        while len(running.ended) < 20:
            await asyncio.sleep(0.2)
        killed = await asyncio.to_thread(nodes.kill_one_that, lambda line: "ReplicaActor" in line or "Replica" in line)
        before = len(running.ended)
        while len(running.ended) < before + 60:
            await asyncio.sleep(0.2)
    return {"requests": len(running.ended), **running.kinds(), "killed": killed}


SCENARIOS = {"train": train, "tune-training": tune_training, "tune-decoding": tune_decoding, "serve": serve}


@contextmanager
def prepared() -> Iterator[tuple[Nodes, list[str]]]:
    """The nodes, and a configuration with its data; this process is a client of the cluster."""
    with tempfile.TemporaryDirectory(prefix="heliostat-nodes-") as folder:
        data = Path(folder) / "data"
        schedules.write(data)
        nodes = Nodes(Path(folder))
        try:
            ray = {
                "RAY_ADDRESS": nodes.cluster.address,
                "RAY_AUTH_TOKEN": nodes.cluster.token,
                "RAY_AUTH_MODE": "token",
            }
            os.environ.update({**ray, "HELIOSTAT_HOME": str(nodes.home)})
            config = str(REPOSITORY / "jobs" / "examples" / "cron" / "train.yaml")
            rows = [f"data.{split}={data}/{split}.jsonl" for split in ("train", "validation")]
            yield nodes, [config, *rows, *OVERRIDES]
        finally:
            nodes.cluster.close()


def main() -> None:
    """Run the scenarios that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", help=f"{' '.join(SCENARIOS)}; default: all, in this order")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    figures = {}
    with prepared() as (nodes, config):
        for name in options.scenarios or SCENARIOS:
            figures[name] = SCENARIOS[name](nodes, config)
            print(f"{name}: {figures[name]}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
