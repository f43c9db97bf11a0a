"""Checkpoint folders on a shared file system: written by all workers, whole or not used. Knows no tensors and no Ray.

    <run folder>/checkpoints/<attempt>/
        step_000120-w2/           after 120 steps, by 2 workers
            deepspeed/            model, optimizer and scheduler, sharded by DeepSpeed
            state.json            step, best validation loss, ...
            manifest_<rank>.json  size and hash of every file that the worker wrote; written last
        damaged_step_000100-w2/   set aside, with the reasons in damage.txt

A checkpoint counts only when the manifests of all workers are there, every file is as they say, and there is no other
file. The newest such one is where a restarted worker or driver goes on, so a kill at any moment, or a damaged file,
costs at most the steps since the one before.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

_SHARDS = "deepspeed"
_STATE = "state.json"
_DAMAGED = "damaged_"
_REASONS = "damage.txt"
_NAME = re.compile(r"step_(\d+)-w(\d+)")
_CHUNK = 2**22


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, whole or not."""

    folder: Path

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(_match(self.folder)[1])

    @property
    def workers(self) -> int:
        """The number of workers that wrote it."""
        return int(_match(self.folder)[2])

    @property
    def shards(self) -> Path:
        """DeepSpeed's part."""
        return self.folder / _SHARDS

    @property
    def is_finished(self) -> bool:
        """Whether every worker finished writing."""
        return all(self._manifest(rank).exists() for rank in range(self.workers))

    def state(self) -> dict[str, Any]:
        """What rank 0's `finish` was given."""
        state: dict[str, Any] = json.loads((self.folder / _STATE).read_text())
        return state

    def begin(self, rank: int) -> None:
        """Make room for this worker's part; what it wrote there before no longer counts."""
        self.shards.mkdir(parents=True, exist_ok=True)
        self._manifest(rank).unlink(missing_ok=True)

    def finish(self, rank: int, state: dict[str, Any]) -> None:
        """This worker's shards are written; rank 0 adds `state`."""
        if rank == 0:
            (self.folder / _STATE).write_text(json.dumps(state))
        self._write_manifest(rank)

    def faults(self, part: int = 0, parts: int = 1) -> list[str]:
        """What is wrong with every `parts`-th file from number `part` on; nothing if the checkpoint is whole.

        Workers share the files out among them. Without part and parts, all files are looked at.
        """
        if not self.is_finished:
            return ["half-written: not every worker finished"]
        try:
            manifests = [json.loads(self._manifest(rank).read_text()) for rank in range(self.workers)]
            expected = {file: facts for manifest in manifests for file, facts in manifest.items()}
        except (OSError, ValueError, AttributeError) as error:
            return [f"a manifest cannot be read: {error}"]
        faults = {file: self._fault(file, expected[file]) for file in sorted(expected)[part::parts]}
        extra = {str(path.relative_to(self.folder)) for path in self._files()} - expected.keys()
        faults.update(dict.fromkeys(sorted(extra), "is not in any manifest"))
        return [f"{file}: {fault}" for file, fault in faults.items() if fault]

    def set_aside(self, faults: list[str]) -> Path | None:
        """Rename a damaged checkpoint, so that it is never taken for a whole one; delete a half-written one.

        Returns the folder in which it still is, with `faults` in its damage.txt.
        """
        if not self.is_finished:
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        aside = self.folder.with_name(_DAMAGED + self.folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self.folder, aside)
        (aside / _REASONS).write_text("\n".join(faults) + "\n", encoding="utf-8")
        return aside

    def _manifest(self, rank: int) -> Path:
        return self.folder / f"manifest_{rank}.json"

    def _files(self) -> list[Path]:
        """All files that manifests tell of. Hidden ones are left out: network file systems put some there."""
        manifests = {self._manifest(rank) for rank in range(self.workers)}
        found = [path for path in self.folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        return [path for path in found if path not in manifests]

    def _fault(self, file: str, facts: Any) -> str | None:
        try:
            size, digest = facts
            found = (self.folder / file).stat().st_size
            if found != size:
                return f"has {found} bytes instead of {size}"
            return None if _digest(self.folder / file) == digest else "its content changed since it was written"
        except FileNotFoundError:
            return "is missing"
        except (OSError, ValueError, TypeError) as error:
            return f"cannot be checked: {error}"

    def _write_manifest(self, rank: int) -> None:
        """Each worker vouches for what it wrote: another one may still be writing its own."""
        paths = sorted(path for path in self._files() if _writer(path.name) == rank)
        facts = {str(path.relative_to(self.folder)): [path.stat().st_size, _digest(path)] for path in paths}
        temporary = self.folder / f".manifest_{rank}.json"
        temporary.write_text(json.dumps(facts))
        os.rename(temporary, self._manifest(rank))


def at(root: Path, attempt: str, step: int, workers: int) -> Checkpoint:
    """The checkpoint of that attempt after `step` optimizer steps of `workers` workers, written or to be written."""
    return Checkpoint(root / attempt / f"step_{step:06d}-w{workers}")


def newest_first(root: Path) -> list[Checkpoint]:
    """All checkpoints below `root`, by step and then by time."""
    found = [Checkpoint(folder) for folder in root.glob("*/step_*") if _NAME.fullmatch(folder.name)]
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.folder.stat().st_mtime), reverse=True)


def newest_whole(root: Path, tell: Callable[[str], object]) -> Checkpoint | None:
    """The newest whole checkpoint below `root`; those that are not whole are set aside, and `tell` hears of each."""
    for checkpoint in newest_first(root):
        faults = checkpoint.faults()
        if not faults:
            return checkpoint
        tell(set_aside(checkpoint, faults))
    return None


def set_aside(checkpoint: Checkpoint, faults: list[str]) -> str:
    """Set the checkpoint aside; the sentence that tells the user."""
    where = checkpoint.set_aside(faults)
    kept = f"set aside as {where}" if where else "removed"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"the checkpoint of step {checkpoint.step} is not whole and was {kept}: {faults[0]}{more}"


def prune(root: Path, keep: int, attempt: str) -> None:
    """Delete all but the `keep` newest checkpoints below `root`; those that were never finished go first.

    An unfinished one of `attempt`, the one that is running, stays: other workers may be writing the next already.
    """
    found = [each for each in newest_first(root) if each.is_finished or each.folder.parent.name != attempt]
    for checkpoint in sorted(found, key=lambda each: not each.is_finished)[keep:]:
        shutil.rmtree(checkpoint.folder, ignore_errors=True)


def _match(folder: Path) -> re.Match[str]:
    match = _NAME.fullmatch(folder.name)
    assert match
    return match


def _digest(path: Path) -> str:
    """XXH3 with 128 bits, for damage and not for malice: several times as fast as sha256."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _writer(file: str) -> int:
    """The worker that wrote a file: by DeepSpeed's naming, its own shards carry its number; the rest is rank 0's."""
    match = re.search(r"zero_pp_rank_(\d+)_", file)
    return int(match[1]) if match else 0
