"""Save checkpoints, one at a time, in a thread if asked to. Knows a worker's session, not its training loop."""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from heliostat.training import agreement, checkpoint, shards
from heliostat.training.checkpoint import Checkpoint


class Group(Protocol):
    """A worker's place among its peers."""

    rank: int
    world_size: int

    def report(self, folder: Path, metrics: dict[str, float]) -> None:
        """Called by all workers once the checkpoint in `folder` is written."""


class Saver:
    """Writes this worker's part of each checkpoint. All workers must call its methods together."""

    def __init__(
        self, root: Path, attempt: str, group: Group, *, keep: int, trained_only: bool, background: bool
    ) -> None:
        self._root = root
        self._attempt = attempt
        self._group = group
        self._keep = keep
        self._trained_only = trained_only
        self._background = background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Checkpoint, Future[None], dict[str, float]] | None = None

    def save(self, engine: Any, state: dict[str, Any], metrics: dict[str, float], *, at_once: bool = False) -> None:
        """Save the engine and `state`, which has the `step`. In the background, unless it must be whole `at_once`.

        Raises:
            As `settle`, of this checkpoint or of the one before it.
        """
        self.settle()
        group = self._group
        new = checkpoint.at(self._root, self._attempt, state["step"], group.world_size)
        with agreement.failing_alike(new.folder):
            new.begin(group.rank)
        files = shards.collect(engine, new.shards, trained_only=self._trained_only, copy=self._background)
        written = self._thread.submit(_write, new, files, group.rank, dict(state))
        self._pending = new, written, metrics
        if at_once or not self._background:
            self.settle()

    def settle(self) -> None:
        """Wait until the last checkpoint is written, by all workers; then delete the oldest.

        Raises:
            ResourceError: a disk is full; the half-written checkpoint is removed.
            OSError: another error of writing.
        """
        if self._pending is None:
            return
        (new, written, metrics), self._pending = self._pending, None
        try:
            with agreement.failing_alike(new.folder):
                written.result()
        except Exception:
            shutil.rmtree(new.folder, ignore_errors=True)
            raise
        if self._group.rank == 0:
            checkpoint.prune(self._root, self._keep, self._attempt)
        self._group.report(new.folder, metrics)

    @property
    def has_failed(self) -> bool:
        """Whether this worker's last write failed, which `settle` will tell all of."""
        return self._pending is not None and self._pending[1].done() and self._pending[1].exception() is not None


def _write(new: Checkpoint, files: shards.Files, rank: int, state: dict[str, Any]) -> None:
    shards.write(files, new.shards)
    new.finish(rank, state)
