"""Run folders: where a run keeps everything, and which one a command goes on with. Knows nothing of training itself.

<storage path>/<name>-0001/
    run.json        status (running, trained, finished; stopped), config hash, attempts
    config.yaml     the resolved configuration
    data.json       files with hashes, counts
    audit.json      what the audit found; data.txt: the same for people, with which tokens are learned;
                    token_lengths.png
    tensorboard/    event files, with training.report_to: [mlflow, tensorboard]
    init/           tokenizer and config of a model from scratch
    metrics.jsonl   every metric of every logged step
    checkpoints/    see heliostat.training.checkpoint
    weights/        exported weights of the best step so far; become the bundle
    bundle/         the finished model
    stop            made to end the run early; see `Run.tell_to_stop`
    pause           made to end the workers once they have saved; see heliostat.training.termination
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from heliostat.errors import ConfigError, ResourceError, UserError
from heliostat.training.spec import STOP

Status = Literal["running", "trained", "finished", "stopped"]
UNFINISHED: tuple[Status, ...] = ("running", "trained")


@dataclass(frozen=True)
class Run:
    """An open run folder, locked against a second driver until this process ends."""

    folder: Path
    attempt: str
    lock: int

    @property
    def name(self) -> str:
        """Name of the run: its folder's."""
        return self.folder.name

    @property
    def status(self) -> Status:
        """How far the run has come."""
        return facts(self.folder)["status"]  # type: ignore[no-any-return]

    @property
    def resumed(self) -> bool:
        """Whether an earlier driver worked on this run."""
        return self.attempt != "attempt-01"

    def tell_to_stop(self) -> None:
        """End the training at its next logged step; nothing more is written, and the run will not be gone on with."""
        (self.folder / STOP).touch()

    @property
    def told_to_stop(self) -> bool:
        """Whether `tell_to_stop` was called."""
        return (self.folder / STOP).exists()

    def set_status(self, status: Status) -> None:
        """Note how far the run has come."""
        self.note(status=status)

    def note(self, **values: Any) -> None:
        """Add to what `facts` tells of the run."""
        _write(self.folder, {**facts(self.folder), **values})

    def close(self) -> None:
        """Release the lock."""
        os.close(self.lock)


def open_run(storage: Path, name: str, config_hash: str, resume: Literal["auto", "never", "must"]) -> Run:
    """The unfinished run of the same name and configuration to go on with, or a new one.

    Raises:
        ConfigError: `resume=must`, and there is none.
        ResourceError: another process is working on it.
    """
    existing = sorted(storage.glob(f"{name}-[0-9][0-9][0-9][0-9]"))
    if resume != "never":
        for folder in reversed(existing):
            if is_unfinished(facts(folder), config_hash):
                return _reopen(folder)
    if resume == "must":
        raise ConfigError(f"resume=must: {storage} has no unfinished run `{name}` with this configuration")
    return _create(storage, name, config_hash, after=existing)


def is_unfinished(facts: Mapping[str, Any], config_hash: str | None) -> bool:
    """Whether a run with these facts is one of this configuration to go on with."""
    return facts.get("config_hash") == config_hash and facts.get("status") in UNFINISHED


def open_folder(folder: Path, config_hash: str) -> Run:
    """The run in this very folder, which is made if there is none.

    Raises:
        ResourceError: another process is working on it.
    """
    return _reopen(folder) if facts(folder).get("config_hash") == config_hash else _start(folder, config_hash)


def reopen(folder: Path) -> Run:
    """The unfinished run in this folder, whatever its configuration.

    Raises:
        ConfigError: run.json cannot be read, or the run is over.
        ResourceError: another process is working on it.
    """
    status = facts(folder).get("status")
    if status not in UNFINISHED:
        reason = f"is {status}; there is nothing to go on with" if status else "has no readable run.json; try --repair"
        raise ConfigError(f"{folder} {reason}")
    return _reopen(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else works on the run inside.

    Raises:
        ResourceError: another process is working on it.
    """
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def released(run: Run, started: str) -> Iterator[None]:
    """Releases the run's lock at the end. After a UserError nothing is left of a run without the file `started`."""
    try:
        yield
    except UserError:
        if not (run.folder / started).exists():
            # The tracker's thread may still be writing there.
            shutil.rmtree(run.folder, ignore_errors=True)
        raise
    finally:
        run.close()


def _reopen(folder: Path) -> Run:
    lock = _lock(folder)
    known = facts(folder)
    attempts = int(known["attempts"]) + 1
    _write(folder, {**known, "attempts": attempts})
    return Run(folder, f"attempt-{attempts:02d}", lock)


def _create(storage: Path, name: str, config_hash: str, after: list[Path]) -> Run:
    number = int(after[-1].name[-4:]) + 1 if after else 1
    folder = storage / f"{name}-{number:04d}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return _create(storage, name, config_hash, [folder])
    except OSError as error:
        raise ResourceError(f"storage_path: {folder} cannot be created: {error.strerror}") from error
    return _start(folder, config_hash)


def _start(folder: Path, config_hash: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    write(folder, config_hash, attempts=1)
    return Run(folder, "attempt-01", lock)


def write(folder: Path, config_hash: str, attempts: int) -> None:
    """Make the run.json of a run that is not finished."""
    _write(folder, {"status": "running", "config_hash": config_hash, "attempts": attempts, "created": time.time()})


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ResourceError(
            f"{folder} is being worked on by another process; wait for it, or use resume=never for a run of its own"
        ) from None
    return descriptor


def facts(folder: Path) -> dict[str, Any]:
    """What run.json says of the run in this folder; empty if there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def _write(folder: Path, facts: dict[str, Any]) -> None:
    write_atomically(folder / "run.json", json.dumps(facts, indent=2))


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.rename(temporary, path)
