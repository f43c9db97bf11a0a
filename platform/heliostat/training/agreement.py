"""What the workers of a group do alike: go on from the same checkpoint, and fail when one of them cannot read or write.

Knows torch's process group, and of checkpoints only whether they are whole. All workers must call each function.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from heliostat.errors import DISK_FULL, ResourceError
from heliostat.training import checkpoint
from heliostat.training.checkpoint import Checkpoint

_DISK_FULL = (*DISK_FULL, errno.EFBIG)


def all_have(folders: Iterable[Path]) -> None:
    """Nobody starts unless all see the folders.

    Raises:
        ResourceError: one is not on the machine of some worker.
    """
    missing = next((str(folder) for folder in folders if not folder.is_dir()), None)
    for rank, (host, name) in enumerate(_gather((socket.gethostname(), missing))):
        if name is not None:
            raise ResourceError(
                f"worker {rank} on {host} has no {name}: storage_path and HELIOSTAT_HOME must be folders that all "
                "machines share"
            )


def newest_whole(root: Path, tell: Callable[[str], object]) -> Checkpoint | None:
    """The newest whole checkpoint below `root`; each worker checks a part of the files.

    Those that are not whole are set aside; worker 0's `tell` hears of each.
    """
    rank = dist.get_rank()
    found = [checkpoint.newest_first(root) if rank == 0 else []]
    dist.broadcast_object_list(found)
    for candidate in found[0]:
        parts = _gather(candidate.faults(rank, dist.get_world_size()))
        faults = list(dict.fromkeys(fault for part in parts for fault in part))
        if not faults:
            return candidate
        if rank == 0:
            tell(checkpoint.set_aside(candidate, faults))
    return None


@contextlib.contextmanager
def failing_alike(folder: Path) -> Iterator[None]:
    """What cannot be written inside fails on all workers: one that failed alone would leave the others waiting.

    Raises:
        ResourceError: a disk is full, or a quota used up; starting again would not mend it.
        OSError: another error of writing to `folder`.
    """
    error = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as caught:
        error = caught
    told = None if error is None else (str(error).partition("\n")[0], _is_disk_full(error))
    errors = [(rank, found) for rank, found in enumerate(_gather(told)) if found]
    if not errors:
        return
    rank, (text, disk_full) = next((each for each in errors if each[1][1]), errors[0])
    if disk_full:
        raise ResourceError(
            f"no room to write {folder} (worker {rank}: {text}); the checkpoints before it are untouched. Make room "
            "there, or lower training.save_total_limit, and go on with `heliostat resume` and the run's folder"
        )
    raise OSError(f"worker {rank} cannot write {folder}: {text}") from error


def _is_disk_full(error: Exception) -> bool:
    """Whether a write failed for want of room, or for a quota or limit; safetensors tells so in words only."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    return any(os.strerror(number) in str(error) for number in _DISK_FULL)


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
