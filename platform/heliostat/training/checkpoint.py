"""Training checkpoints on a shared file system: written by all workers, whole or not used. Knows nothing of Ray.

    <run folder>/checkpoints/<attempt>/step_000120-w2/
        deepspeed/            model, optimizer and scheduler, sharded by DeepSpeed
        rng_<rank>.pt         random state of a worker
        state.json            step, best validation loss, ...
        manifest_<rank>.json  size and sha256 of every file that the worker wrote; written last

A checkpoint counts only when the manifests of all workers are there and every file is as they say. The newest such one
is where a restarted worker or driver goes on, so a kill at any moment, or a damaged file, costs at most the steps since
the one before.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from heliostat.models.files import sha256

_TAG = "deepspeed"
_NAME = re.compile(r"step_(\d+)-w(\d+)")


def name(step: int, world_size: int) -> str:
    """The folder name of the checkpoint after `step` optimizer steps of `world_size` workers."""
    return f"step_{step:06d}-w{world_size}"


def save(engine: Any, folder: Path, state: dict[str, Any], *, rank: int, trained_only: bool) -> None:
    """Write this worker's part. All workers must call it; `trained_only` leaves out frozen weights."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / f"manifest_{rank}.json"
    manifest.unlink(missing_ok=True)
    engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=trained_only, save_latest=False)
    torch.save(_random_state(), folder / f"rng_{rank}.pt")
    if rank == 0:
        (folder / "state.json").write_text(json.dumps(state))
    _write_manifest(folder, manifest, _own_files(folder, rank))


def load(engine: Any, folder: Path, *, rank: int, trained_only: bool) -> dict[str, Any]:
    """Restore this worker from a checkpoint of equally many workers; returns its state.json."""
    engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not trained_only)
    _restore_random_state(torch.load(folder / f"rng_{rank}.pt", weights_only=True))
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def newest(root: Path, world_size: int) -> Path | None:
    """The newest whole checkpoint below `root` that `world_size` workers can go on from."""
    fitting = [folder for folder, workers in reversed(_oldest_first(root)) if workers == world_size]
    return next((folder for folder in fitting if is_whole(folder, world_size)), None)


def is_whole(folder: Path, world_size: int) -> bool:
    """Whether every worker finished writing and every file is as written."""
    try:
        manifests = [json.loads((folder / f"manifest_{rank}.json").read_text()) for rank in range(world_size)]
        return all(_matches(folder / file, *facts) for files in manifests for file, facts in files.items())
    except (OSError, ValueError):
        return False


def prune(root: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints below `root`; those that were never finished go first."""
    found = sorted(_oldest_first(root), key=lambda checkpoint: _is_finished(*checkpoint))
    for folder, _ in found[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def _oldest_first(root: Path) -> list[tuple[Path, int]]:
    """(folder, number of workers) of the checkpoints below `root`, by step and then by time."""
    named = [(folder, match) for folder in root.glob("*/step_*") if (match := _NAME.fullmatch(folder.name))]
    named.sort(key=lambda found: (int(found[1][1]), found[0].stat().st_mtime))
    return [(folder, int(match[2])) for folder, match in named]


def _is_finished(folder: Path, world_size: int) -> bool:
    return all((folder / f"manifest_{rank}.json").exists() for rank in range(world_size))


def _matches(path: Path, size: int, digest: str) -> bool:
    return path.stat().st_size == size and sha256(path) == digest


def _own_files(folder: Path, rank: int) -> list[Path]:
    """Files of this worker by DeepSpeed's naming: a rank's own shards carry its number, the rest is rank 0's."""
    return [path for path in folder.rglob("*") if path.is_file() and _writer(path.name) == rank]


def _writer(file: str) -> int | None:
    if file.startswith("manifest_"):
        return None
    match = re.search(r"zero_pp_rank_(\d+)_", file) or re.fullmatch(r"rng_(\d+)\.pt", file)
    return int(match[1]) if match else 0


def _write_manifest(folder: Path, manifest: Path, paths: list[Path]) -> None:
    facts = {str(path.relative_to(folder)): [path.stat().st_size, sha256(path)] for path in sorted(paths)}
    temporary = manifest.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts))
    os.rename(temporary, manifest)


def _random_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
