"""Runs that are kept at a URI: worked on in the state folder, and copied to the URI as they grow. Knows no tensors.

After each new checkpoint the driver copies what changed, in a thread, while training goes on. A checkpoint's manifests
go last, so that it counts at the URI, too, once it is whole. Whoever goes on with the run, on this machine or another,
fetches it first and checks the checkpoint as on any disk.
"""

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from heliostat import journal, state, storage
from heliostat.config import fingerprint
from heliostat.errors import ConfigError, StorageError, UserError
from heliostat.models import files
from heliostat.training import checkpoint, runs

_POLL_S = 0.5
_CHECKPOINTS = "checkpoints"
_TRIES = 10
_LEFT_OUT = shutil.ignore_patterns(".*", "*.tmp", "lock", "merged", _CHECKPOINTS)
# Of a run that is over or another configuration's: it only keeps its number from being given again.
_STUB = {"status": "elsewhere", "config_hash": None, "attempts": 0}


def folder_of(storage_path: str | None) -> Path:
    """Where runs with that storage_path are worked on: the path itself, or a folder of the state folder."""
    if storage_path is None:
        return state.runs()
    if not storage.is_remote(storage_path):
        return Path(storage_path).absolute()
    return state.folder() / "mirrored" / fingerprint(storage_path.rstrip("/"))


def refuse(storage_path: str | None) -> None:
    """Raises:
    ConfigError: it is a URI, for a command that keeps no run there.
    """
    if storage_path is not None and storage.is_remote(storage_path):
        raise ConfigError(f"storage_path: {storage_path} is for `train`; searches need a folder, on a disk or NFS")


def fetch(storage_path: str, name: str, config_hash: str | None) -> None:
    """Bring those unfinished runs of this name and configuration here that are further at the URI than here.

    Of the others, and of all without a configuration, only the numbers are noted.

    Raises:
        StorageError, ResourceError: the URI cannot be reached, or a disk is full.
    """
    pattern = f"{storage_path.rstrip('/')}/{name}-[0-9][0-9][0-9][0-9]/run.json"
    for found in storage.find(pattern):
        uri = found.uri.removesuffix("/run.json")
        folder = folder_of(storage_path) / uri.rpartition("/")[2]
        there = _facts(uri)
        if runs.is_unfinished(there, config_hash):
            _fetch(uri, folder, there)
        elif not folder.exists():
            folder.mkdir(parents=True)
            runs.write_atomically(folder / "run.json", json.dumps(_STUB))


def fetch_run(uri: str) -> Path:
    """The folder, here, of the run at the URI.

    Raises:
        ConfigError: there is none.
        StorageError, ResourceError: the URI cannot be reached, or a disk is full.
    """
    uri = uri.rstrip("/")
    if not storage.find(f"{uri}/config.yaml"):
        raise ConfigError(f"{uri} is no run folder (with a config.yaml)")
    parent, _, name = uri.rpartition("/")
    folder = folder_of(parent) / name
    _fetch(uri, folder, _facts(uri))
    return folder


def _fetch(uri: str, folder: Path, there: dict[str, Any]) -> None:
    if there.get("attempts", 0) <= runs.facts(folder).get("attempts", 0):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        whole = Path(temporary) / folder.name
        storage.download({file: whole / file.uri.removeprefix(f"{uri}/") for file in storage.find(uri)})
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(whole, folder)


def _facts(uri: str) -> dict[str, Any]:
    """What run.json at the URI says."""
    with tempfile.TemporaryDirectory() as folder:
        storage.download({file: Path(folder) / file.name for file in storage.find(f"{uri}/run.json")})
        return runs.facts(Path(folder))


class Mirror:
    """Copies a run folder to a URI, in a thread until the end of its `with` block. Without a URI it does nothing."""

    def __init__(self, folder: Path, storage_path: str | None, tell: Callable[[str], object]) -> None:
        remote = storage_path is not None and storage.is_remote(storage_path)
        self.place = f"{str(storage_path).rstrip('/')}/{folder.name}" if remote else str(folder)
        """Where the run is kept: the URI, or the folder itself."""
        self._folder = folder
        self._remote = remote
        self._tell = tell
        self._copied: dict[str, tuple[int, int]] = {}
        self._seen: set[str] = set()
        self._one_at_a_time = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        if self._remote:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._remote:
            self._thread.join()

    def sync(self) -> None:
        """Make the URI like the folder.

        Raises:
            StorageError: it cannot be reached or written; what is there still counts, or can be copied again.
        """
        if not self._remote:
            return
        self._seen = self._finished()
        with self._one_at_a_time, _snapshot(self._folder) as taken:
            here = {str(path.relative_to(taken)): path for path in taken.rglob("*") if path.is_file()}
            there = {file.uri.removeprefix(f"{self.place}/"): file.size for file in storage.find(self.place)}
            new = [name for name, path in here.items() if self._is_new(name, path, there)]
            # What a checkpoint needs first, then the checkpoint, then what makes it count.
            for rank in range(3):
                storage.upload({here[name]: f"{self.place}/{name}" for name in new if _rank(name) == rank})
            gone = sorted(there.keys() - here.keys(), key=_rank, reverse=True)
            storage.delete(f"{self.place}/{name}" for name in gone)
            self._copied = {name: _state(path) for name, path in here.items()}

    def _is_new(self, name: str, path: Path, there: dict[str, int]) -> bool:
        if _rank(name) > 0:  # never changes
            return there.get(name) != path.stat().st_size
        return name not in there or self._copied.get(name) != _state(path)

    def _follow(self) -> None:
        over = False
        while not over:
            # Once more at the end: a training that is told to end saves before it does.
            over = self._end.wait(_POLL_S)
            self._copy_new_checkpoints()

    def _copy_new_checkpoints(self) -> None:
        if self._finished() == self._seen or not (self._folder / journal.NAME).exists():
            return
        try:
            self.sync()
        except (UserError, OSError) as error:
            self._tell(f"the checkpoint is not copied, which the next one will try again: {error}")

    def _finished(self) -> set[str]:
        return {str(each.folder) for each in _finished(self._folder)}


def _rank(name: str) -> int:
    """The place of a file in the order of copying."""
    if not name.startswith(f"{_CHECKPOINTS}/"):
        return 0
    return 2 if Path(name).name.startswith("manifest_") else 1


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _finished(folder: Path) -> list[checkpoint.Checkpoint]:
    with contextlib.suppress(FileNotFoundError):  # one was pruned meanwhile: the next look will tell
        return [each for each in checkpoint.newest_first(folder / _CHECKPOINTS) if each.is_finished]
    return []


@contextlib.contextmanager
def _snapshot(folder: Path) -> Iterator[Path]:
    """The run folder's files as they are now, by hard links, with finished checkpoints only.

    The weights are not older than the checkpoints, which rely on them: those are looked at first.
    """
    for _ in range(_TRIES):
        with tempfile.TemporaryDirectory(prefix=".mirror-", dir=folder) as temporary:
            target = Path(temporary) / folder.name
            try:
                before = _weights(folder)
                for each in _finished(folder):
                    place = each.folder.relative_to(folder)
                    _link_all(each.folder, target / place, shutil.ignore_patterns(".*"))
                _link_all(folder, target, _LEFT_OUT)
                changed = before != _weights(folder)
            except (shutil.Error, FileNotFoundError):  # pruned or replaced meanwhile
                changed = True
            if not changed:
                yield target
                return
    raise StorageError(f"{folder}: changes faster than its files can be listed")


def _link_all(folder: Path, target: Path, left_out: Callable[[Any, list[str]], set[str]]) -> None:
    shutil.copytree(folder, target, copy_function=files.link, ignore=left_out, dirs_exist_ok=True)


def _weights(folder: Path) -> int | None:
    """Another value once the exported weights were replaced."""
    try:
        return (folder / "weights").stat().st_ino
    except FileNotFoundError:
        return None
