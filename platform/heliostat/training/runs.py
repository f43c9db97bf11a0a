"""Run folders: where a run keeps everything, and which one a command goes on with. Knows nothing of training itself.

<storage path>/<name>-0001/
    run.json        status (running, trained, finished), config hash, attempts
    config.yaml     the resolved configuration
    data.json       files with hashes, counts; data.txt: which tokens are learned
    init/           tokenizer and config of a model from scratch
    metrics.jsonl   every metric of every logged step
    checkpoints/    see heliostat.training.checkpoint
    weights/        exported weights of the best step so far; become the bundle
    bundle/         the finished model
"""

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from heliostat.errors import ConfigError, ResourceError

Status = Literal["running", "trained", "finished"]


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
        return _read(self.folder)["status"]  # type: ignore[no-any-return]

    @property
    def resumed(self) -> bool:
        """Whether an earlier driver worked on this run."""
        return self.attempt != "attempt-01"

    def set_status(self, status: Status) -> None:
        """Note how far the run has come."""
        _write(self.folder, {**_read(self.folder), "status": status})

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
            facts = _read(folder)
            if facts.get("config_hash") == config_hash and facts.get("status") != "finished":
                return _reopen(folder, facts)
    if resume == "must":
        raise ConfigError(f"resume=must: {storage} has no unfinished run `{name}` with this configuration")
    return _create(storage, name, config_hash, after=existing)


def _reopen(folder: Path, facts: dict[str, Any]) -> Run:
    lock = _lock(folder)
    attempts = int(facts["attempts"]) + 1
    _write(folder, {**facts, "attempts": attempts})
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
    lock = _lock(folder)
    _write(folder, {"status": "running", "config_hash": config_hash, "attempts": 1, "created": time.time()})
    return Run(folder, "attempt-01", lock)


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


def _read(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts


def _write(folder: Path, facts: dict[str, Any]) -> None:
    write_atomically(folder / "run.json", json.dumps(facts, indent=2))


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.rename(temporary, path)
