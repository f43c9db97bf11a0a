"""Copies of remote files on this machine: made once, whole or not at all, and shared by its processes.

    <folder>/<group>/<name>/          a copy
    <folder>/.locks/<group>/<name>    locked shared by every process that uses the copy, and alone by the one that makes
                                      or removes it; holds its size in bytes; changed at each use

The kernel gives a dead process's locks back, so nothing is left to clean up after a kill. With HELIOSTAT_CACHE_SIZE
copies that nobody uses are removed to make room for a new one, the longest unused first.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from heliostat import state
from heliostat.config import fingerprint
from heliostat.errors import ConfigError, ResourceError
from heliostat.storage import RemoteFile, download

LIMIT = "HELIOSTAT_CACHE_SIZE"
_LOCKS = ".locks"
_kept: set[Path] = set()


@dataclass(frozen=True)
class Entry:
    """What is to be copied. The name must be another one for other content."""

    group: str
    name: str
    measure: Callable[[], int]
    """Bytes; asked for only where there is no copy yet."""

    @property
    def folder(self) -> Path:
        """Where the copy is."""
        return state.downloads() / self.group / self.name


@contextlib.contextmanager
def using(entry: Entry, fill: Callable[[Path], object]) -> Iterator[Path]:
    """The folder of the copy, which stays at least until the end of the block. If there is none, `fill` makes it.

    Processes that want the same one wait for each other. What `fill` raises leaves nothing behind.

    Raises:
        ResourceError: there is no room.
        ConfigError: HELIOSTAT_CACHE_SIZE is no size.
    """
    lock = _take(entry, fill)
    try:
        yield entry.folder
    finally:
        os.close(lock)


def keep(entry: Entry, fill: Callable[[Path], object]) -> Path:
    """As `using`, until this process ends.

    Raises:
        As `using`.
    """
    if entry.folder not in _kept or not entry.folder.is_dir():
        _take(entry, fill)  # never closed
        _kept.add(entry.folder)
    return entry.folder


@contextlib.contextmanager
def here(file: Path | RemoteFile) -> Iterator[Path]:
    """A file that this machine's programs can open, at least until the end of the block.

    Raises:
        StorageError: it cannot be fetched.
        As `using`.
    """
    if isinstance(file, Path):
        yield file
        return
    with using(entry_of([file]), _fetching(file)) as folder:
        yield folder / file.name


def kept_here(file: Path | RemoteFile) -> Path:
    """As `here`, until this process ends.

    Raises:
        As `here`.
    """
    if isinstance(file, Path):
        return file
    return keep(entry_of([file]), _fetching(file)) / file.name


def _fetching(file: RemoteFile) -> Callable[[Path], object]:
    return lambda folder: download({file: folder / file.name})


def entry_of(files: list[RemoteFile]) -> Entry:
    """The entry of these files: another one once any of them changes."""
    scheme, _, path = files[0].uri.partition("://")
    known = fingerprint([[file.uri, file.size, file.mtime_ns] for file in files])
    return Entry(scheme, f"{Path(path).name[:100]}-{known}", lambda: sum(file.size for file in files))


def _take(entry: Entry, fill: Callable[[Path], object]) -> int:
    """A descriptor that holds the shared lock of the copy."""
    folder = entry.folder
    for parent in (folder.parent, _lock_of(folder).parent):
        parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if folder.is_dir():
                os.utime(lock)
                return lock
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():  # else another process made it
                _make(entry, lock, fill)
            # Changing a lock gives it up for a moment, in which the copy may be removed: look again.
    except BaseException:
        os.close(lock)
        raise


def _make(entry: Entry, lock: int, fill: Callable[[Path], object]) -> None:
    size = entry.measure()
    partial = _partial(entry.folder)
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(size).encode(), 0)
        _make_room(entry.folder, size)
        fill(partial)
        os.rename(partial, entry.folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _make_room(new: Path, size: int) -> None:
    """Remove copies that nobody uses until all, the new one too, are within the limit.

    Raises:
        ResourceError: that is not enough, or the disk is too full.
    """
    limit = _limit()
    if limit is not None:
        with _alone():
            sizes = _sizes()
            for folder in sorted(sizes, key=lambda each: _lock_of(each).stat().st_mtime_ns):
                if sum(sizes.values()) > limit and _removed(folder):
                    del sizes[folder]
        if sum(sizes.values()) > limit:
            raise ResourceError(
                f"{new}: {LIMIT} is {limit} bytes, and with this copy's {size} there would be "
                f"{sum(sizes.values())} in use; raise it"
            )
    if (free := shutil.disk_usage(new.parent).free) < size:
        raise ResourceError(
            f"{new}: no room for {size} bytes, {free} are free there; make room, or set HELIOSTAT_CACHE "
            f"to a folder on a larger disk (and {LIMIT}, to have old copies removed)"
        )


def _sizes() -> dict[Path, int]:
    """Folder -> bytes of all copies, and of those that are being made."""
    locks = (state.downloads() / _LOCKS).glob("*/*")
    folders = [state.downloads() / lock.parent.name / lock.name for lock in locks]
    return {
        folder: int(_lock_of(folder).read_text() or 0)
        for folder in folders
        if folder.is_dir() or _partial(folder).is_dir()
    }


def _removed(folder: Path) -> bool:
    """Remove the copy, unless it is in use or being made."""
    with _lock_of(folder).open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        for each in (folder, _partial(folder)):
            shutil.rmtree(each, ignore_errors=True)
    return True


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Nobody else makes room inside."""
    with (state.downloads() / _LOCKS / "room").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _limit() -> int | None:
    given = os.environ.get(LIMIT)
    if not given:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(given))
    except ValidationError:
        raise ConfigError(f"{LIMIT}: `{given}` is no size; write one such as 200GB") from None


def _lock_of(folder: Path) -> Path:
    return state.downloads() / _LOCKS / folder.parent.name / folder.name


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")
