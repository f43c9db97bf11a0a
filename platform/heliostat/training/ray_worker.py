"""A training worker under Ray Train (V2): the bridge from its context to `heliostat.training.worker`."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import TorchConfig

from heliostat import hosts
from heliostat.errors import HeliostatError
from heliostat.training.spec import WorkerSpec

_POLL_S = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))


class RaySession:
    """This worker's place in the Ray Train worker group."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._looked = time.monotonic()

    def report(self, folder: Path, metrics: dict[str, float]) -> None:
        """Tell Ray of a checkpoint that already lies in its storage: nothing is copied."""
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=folder.name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def asks_for_notices(self) -> bool:
        """Every few seconds: Ray itself looks for draining nodes no more often."""
        due = time.monotonic() - self._looked >= _POLL_S
        if due:
            self._looked = time.monotonic()
        return due

    def leaving(self) -> frozenset[str]:
        """Ray's ids of nodes that are being drained (`ray drain-node`, autoscalers)."""
        info = ray.train.get_preemption_info()
        return frozenset(info.preempted_node_ids) if info else frozenset()

    def move(self) -> None:
        """Wait for Ray to end all workers, at the deadline of the drain, and to start them where they may stay.

        More steps would be lost. And a worker whose peer vanishes in mid-step fails, which Ray would count as a failure
        of its own.
        """
        threading.Event().wait()


class GroupConfig(TorchConfig):  # type: ignore[misc]  # Ray is not typed
    """Ray's settings of the process group, with workers that find each other across machines."""

    @property
    def backend_cls(self) -> type:
        """What sets the group up."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


def _name_interface() -> None:
    """Have gloo listen where Ray's other nodes reach this one.

    By itself it listens at the address of the host's name, which on many machines is a loopback one.
    """
    address = ray.util.get_node_ip_address()
    names = [name for name, found in psutil.net_if_addrs().items() if address in (each.address for each in found)]
    if names and not hosts.is_loopback(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def train(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's `train_loop_per_worker`. Returns {"error": ...} for what a restart of the workers would not mend."""
    # The driver imports this module too, and has no use for DeepSpeed.
    from heliostat.training.worker import Worker

    spec: WorkerSpec = loop_config["spec"]
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", 1))))
    try:
        return {"progress": vars(Worker(spec, RaySession()).run())}
    except HeliostatError as error:
        return {"error": error}
