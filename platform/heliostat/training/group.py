"""Start the workers of a run, on Ray or in this process, and wait for them. Knows no data, models or registry."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat import cluster, journal
from heliostat.errors import TrainingError
from heliostat.training import termination
from heliostat.training.config import TrainingConfig
from heliostat.training.progress import ProgressBar
from heliostat.training.spec import WorkerSpec


@contextlib.contextmanager
def place(training: TrainingConfig) -> Iterator[None]:
    """Connected to a Ray cluster that has room for the workers, if they are to run there.

    Raises:
        ResourceError: the cluster is too small.
    """
    if training.num_workers == 0:
        yield
        return
    with cluster.connected():
        cluster.require(training.ray_resources(), training.min_workers, "training.num_workers")
        yield


def run(spec: WorkerSpec, console: Console) -> None:
    """Train to the end, with a progress bar on the console.

    Raises:
        TrainingError: the workers failed more often than training.max_failures.
        SystemExit: SIGTERM came; the workers have saved.
    """
    bar = ProgressBar(Path(spec.run_folder) / journal.NAME, spec.total_steps, console)
    with termination.pausing(spec.pause_file), bar:
        if spec.training.num_workers == 0:
            _run_here(spec)
        else:
            _run_on_ray(spec)


def _run_here(spec: WorkerSpec) -> None:
    from heliostat.training.worker import LocalSession, Worker

    with LocalSession() as session:
        Worker(spec, session).run()


def _run_on_ray(spec: WorkerSpec) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from heliostat.training import ray_worker

    training = spec.training
    trainer = TorchTrainer(
        ray_worker.train,
        train_loop_config={"spec": spec},
        torch_config=ray_worker.GroupConfig(),
        scaling_config=ScalingConfig(
            num_workers=training.num_workers,
            elastic_resize_monitor_interval_s=training.elastic_resize_monitor_interval_s,
            use_gpu=training.use_gpu,
            resources_per_worker=training.ray_resources(),
        ),
        run_config=RunConfig(
            name=spec.attempt,
            storage_path=str(spec.checkpoints),
            # Only failures to start count for the controller; without a limit it would try for ever.
            failure_config=FailureConfig(max_failures=training.max_failures, controller_failure_limit=5),
        ),
    )
    outcome = _fit(trainer)
    if "error" in outcome:
        raise outcome["error"]


def _fit(trainer: Any) -> dict[str, Any]:
    from ray.train import TrainingFailedError

    try:
        return dict(trainer.fit().return_value)
    except TrainingFailedError as error:
        raise TrainingError(
            f"training failed: {_first_cause(error)}; the same command goes on from the last checkpoint"
        ) from error


def _first_cause(error: Exception) -> str:
    """The first worker's own exception, in one line, out of what Ray wraps around it."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank = min(failures)
    lines = str(failures[rank]).strip().splitlines() or [repr(failures[rank])]
    return f"worker {rank}: {lines[-1]}"
