"""DeepSpeed's part of a checkpoint: write, read, and cut anew for another number of workers. Knows no folder layout.

Universal checkpoints: Lian et al. 2024, https://arxiv.org/abs/2406.18820.
"""

import argparse
import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE = 2**20


class _Patient:
    """DeepSpeed's writer of files; an error waits until all workers are through, as they wait for each other."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def makedirs(self, *arguments: Any, **options: Any) -> None:
        try:
            self._writer.makedirs(*arguments, **options)
        except OSError as error:
            self.error = self.error or error

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self._writer.save(state_dict, path)
        except OSError as error:
            self.error = self.error or error
        except RuntimeError as error:
            self.error = self.error or _want_of_room(Path(path).parent) or error


def _want_of_room(folder: Path) -> OSError | None:
    """The error that the file system gives to whoever writes on; torch's writer speaks of positions instead."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".") as file:
            file.write(bytes(_PROBE))
    except OSError as error:
        return error
    return None


def save(engine: Any, folder: Path, *, trained_only: bool) -> None:
    """Write this worker's shards to `folder`. All workers must call it; `trained_only` leaves out frozen weights.

    Raises:
        OSError, RuntimeError: a file could not be written; the other workers come to their end nevertheless.
    """
    plain, patient = engine.checkpoint_engine, _Patient(engine.checkpoint_engine)
    engine.checkpoint_engine = patient
    try:
        engine.save_checkpoint(
            str(folder.parent), tag=folder.name, exclude_frozen_parameters=trained_only, save_latest=False
        )
    finally:
        engine.checkpoint_engine = plain
    if patient.error:
        raise patient.error


def load(engine: Any, folder: Path, *, trained_only: bool) -> None:
    """Read what `save` wrote with equally many workers."""
    engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=not trained_only)


def load_converted(engine: Any, folder: Path, *, trained_only: bool) -> None:
    """Read what `convert` made, into an engine that was built as universal.

    For ZeRO-3, DeepSpeed 0.19.8 gives all groups the settings of the first, and all parameters one and the same counter
    of steps, which then counts each step many times. Both are put right here.
    """
    optimizer = engine.optimizer.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    load(engine, folder, trained_only=trained_only)
    for group, own, rate in zip(optimizer.param_groups, settings, engine.lr_scheduler.get_last_lr(), strict=True):
        group.update({**own, "lr": rate})
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"]).clone()


def convert(source: Path, target: Path) -> None:
    """Put the shards of `source` together into `target`, parameter by parameter, for any number of workers."""
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        # No processes of its own: this runs in a thread of a worker that holds a model.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # What it wants to know of pipelines and tensor parallelism, which there is none of.
        inject_missing_state=True,
    )
    ds_to_universal.main(arguments)


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed for want of room, or for a quota or limit; safetensors tells so in words only."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    return any(os.strerror(number) in str(error) for number in _DISK_FULL)
