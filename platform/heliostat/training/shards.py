"""DeepSpeed's part of a checkpoint: write, read, and cut anew for another number of workers. Knows no manifests.

Universal checkpoints: Lian et al. 2024, https://arxiv.org/abs/2406.18820.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

# File name -> what torch.save puts there.
Files = dict[str, Any]
_PROBE = 2**20


class _Collector(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Takes what DeepSpeed wants to write. A write that failed there would leave the other workers waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Files = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = state_dict


def collect(engine: Any, folder: Path, *, trained_only: bool, copy: bool) -> Files:
    """What this worker must write to `folder`. All workers must call it; `trained_only` leaves out frozen weights.

    With `copy`, the tensors are copies on the CPU, and training may go on before they are written.
    """
    plain, collector = engine.checkpoint_engine, _Collector()
    engine.checkpoint_engine = collector
    try:
        engine.save_checkpoint(
            str(folder.parent), tag=folder.name, exclude_frozen_parameters=trained_only, save_latest=False
        )
    finally:
        engine.checkpoint_engine = plain
    return _copied(collector.files, {}) if copy else collector.files


def _copied(value: Any, known: dict[Any, torch.Tensor]) -> Any:
    """The same with other tensors; what is one tensor in several places (tied weights) stays one."""
    if isinstance(value, torch.Tensor):
        same = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if same not in known:
            known[same] = value.detach().to("cpu", copy=True)
        return known[same]
    if isinstance(value, Mapping):
        return {key: _copied(each, known) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(each, known) for each in value)
    return value


def write(files: Files, folder: Path) -> None:
    """Write what `collect` gave.

    Raises:
        OSError, RuntimeError: a file cannot be written.
    """
    for name, content in files.items():
        try:
            torch.save(content, folder / name)
        except RuntimeError as error:
            # torch speaks of positions in the file, where the file system has a reason.
            _probe(folder)
            raise error


def _probe(folder: Path) -> None:
    """Write a little, for the file system's own error."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".") as file:
        file.write(bytes(_PROBE))


def load(engine: Any, folder: Path, *, trained_only: bool) -> None:
    """Read what was written by equally many workers."""
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
