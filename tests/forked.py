"""Run groups of training workers as forked processes on this machine, without Ray: `python -m tests.forked JOBS`.

JOBS is a pickle of jobs. The heavy imports are paid once, before the first fork.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from heliostat.training.spec import WorkerSpec
from heliostat.training.worker import Worker

# What to train, how many workers, and the step after whose checkpoint they all end in mid-run (None: the last).
Job = tuple[WorkerSpec, int] | tuple[WorkerSpec, int, int | None]


class GroupSession:
    """A worker's place in a group of forked processes."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int, store: str, until: int | None) -> None:
        self.rank = rank
        self.until = until
        self.world_size = world_size
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)})
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)

    def report(self, folder: Path, metrics: dict[str, float]) -> None:
        """Nothing waits for it; the process may end here."""
        if metrics["step"] == self.until:
            dist.barrier()
            os._exit(0)

    def asks_for_notices(self) -> bool:
        """Nobody gives notice."""
        return False

    def leaving(self) -> frozenset[str]:
        """Nothing leaves."""
        return frozenset()

    def move(self) -> None:
        """There is nowhere to go."""


def run(jobs: Sequence[Job]) -> None:
    """Run the jobs one after the other in a process of its own; each writes into its run folder."""
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        file.write(pickle.dumps(list(jobs)))
        file.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.forked", file.name],
            cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def _run_group(spec: WorkerSpec, world_size: int, until: int | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(spec, rank, world_size, f"{folder}/store", until) for rank in range(world_size)]
        for child in children:
            _, status = os.waitpid(child, 0)
            if status != 0:
                sys.exit(f"a worker of {spec.run_folder} ended with status {status}")


def _fork(spec: WorkerSpec, rank: int, world_size: int, store: str, until: int | None) -> int:
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    Worker(spec, GroupSession(rank, world_size, store, until)).run()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    for job in pickle.loads(Path(sys.argv[1]).read_bytes()):
        _run_group(*job)
