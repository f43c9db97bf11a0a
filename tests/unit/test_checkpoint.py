"""A checkpoint counts only if it is whole: a missing, shortened or changed file makes the one before it the newest."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.training import checkpoint

WORLD = 2
FILES = [
    "deepspeed/mp_rank_00_model_states.pt",
    "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "rng_0.pt",
    "rng_1.pt",
    "state.json",
    "manifest_0.json",
    "manifest_1.json",
]


class Engine:
    """Writes and reads the files that a DeepSpeed engine of ZeRO-2 does, by their names."""

    def __init__(self, rank: int, content: bytes = b"weights") -> None:
        self.rank = rank
        self.content = content
        self.loaded: bytes | None = None

    def save_checkpoint(self, folder: str, tag: str, **options: Any) -> None:
        assert options == {"exclude_frozen_parameters": False, "save_latest": False}
        place = Path(folder) / tag
        place.mkdir(exist_ok=True)
        if self.rank == 0:
            (place / "mp_rank_00_model_states.pt").write_bytes(self.content * 100)
        shard = f"zero_pp_rank_{self.rank}_mp_rank_00_optim_states.pt"
        (place / shard).write_bytes(self.content * 50 + bytes([self.rank]))

    def load_checkpoint(self, folder: str, tag: str, **options: Any) -> None:
        assert options == {"load_module_strict": True}
        self.loaded = (Path(folder) / tag / "mp_rank_00_model_states.pt").read_bytes()


def save(root: Path, step: int, world_size: int = WORLD, attempt: str = "attempt-01") -> Path:
    folder = root / attempt / checkpoint.name(step, world_size)
    for rank in reversed(range(world_size)):
        engine = Engine(rank, b"step %d" % step)
        checkpoint.save(engine, folder, {"step": step}, rank=rank, trained_only=False)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two whole checkpoints of two workers."""
    save(tmp_path, 5)
    save(tmp_path, 10)
    return tmp_path


def names(root: Path) -> list[str]:
    return sorted(f"{folder.parent.name}/{folder.name}" for folder in root.glob("*/step_*"))


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "shortened": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def test_a_whole_checkpoint_has_these_files_and_counts(root: Path) -> None:
    newest = checkpoint.newest(root, WORLD)
    assert newest == root / "attempt-01" / "step_000010-w2"
    assert sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()) == sorted(FILES)
    assert checkpoint.is_whole(newest, WORLD)


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("file", FILES)
def test_any_damage_to_any_file_makes_the_one_before_the_newest(file: str, damage: str, root: Path) -> None:
    last = root / "attempt-01" / "step_000010-w2"
    DAMAGES[damage](last / file)
    assert not checkpoint.is_whole(last, WORLD)
    assert checkpoint.newest(root, WORLD) == root / "attempt-01" / "step_000005-w2"
    DAMAGES[damage](root / "attempt-01" / "step_000005-w2" / file)
    assert checkpoint.newest(root, WORLD) is None


def test_every_file_is_in_exactly_one_manifest(root: Path) -> None:
    """Each worker vouches for what it wrote: two that hashed a file while the other writes it would disagree."""
    folder = root / "attempt-01" / "step_000010-w2"
    manifests = [json.loads((folder / f"manifest_{rank}.json").read_text()) for rank in range(WORLD)]
    assert set(manifests[1]) == {"rng_1.pt", "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt"}
    assert set(manifests[0]) | set(manifests[1]) == {name for name in FILES if not name.startswith("manifest")}
    assert not set(manifests[0]) & set(manifests[1])


def test_a_worker_that_is_killed_while_saving_leaves_no_whole_checkpoint(root: Path) -> None:
    folder = root / "attempt-01" / "step_000010-w2"
    shutil.rmtree(folder)
    checkpoint.save(Engine(0), folder, {"step": 10}, rank=0, trained_only=False)
    assert checkpoint.newest(root, WORLD) == root / "attempt-01" / "step_000005-w2"
    checkpoint.save(Engine(1), folder, {"step": 10}, rank=1, trained_only=False)
    assert checkpoint.newest(root, WORLD) == folder


class EngineThatFails(Engine):
    def save_checkpoint(self, folder: str, tag: str, **options: Any) -> None:
        super().save_checkpoint(folder, tag, **options)
        raise OSError("No space left on device")


@pytest.mark.parametrize("rank", [0, 1])
def test_saving_over_an_older_one_never_counts_half_way(rank: int, root: Path) -> None:
    """A repeated step (after a restart from an earlier one) writes into the folder that is there."""
    folder = root / "attempt-01" / "step_000010-w2"
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(EngineThatFails(rank, b"new"), folder, {"step": 10}, rank=rank, trained_only=False)
    assert checkpoint.newest(root, WORLD) == root / "attempt-01" / "step_000005-w2"


def test_checkpoints_of_other_numbers_of_workers_are_left_alone(root: Path) -> None:
    save(root, 20, world_size=1)
    save(root, 30, world_size=4)
    assert checkpoint.newest(root, 2) == root / "attempt-01" / "step_000010-w2"
    assert checkpoint.newest(root, 1) == root / "attempt-01" / "step_000020-w1"
    assert checkpoint.newest(root, 3) is None
    assert checkpoint.newest(root / "nowhere", 1) is None


def test_the_newest_step_of_all_attempts_wins_and_the_later_attempt_of_equals(root: Path) -> None:
    first = save(root, 15, attempt="attempt-02")
    assert checkpoint.newest(root, WORLD) == first
    again = save(root, 15, attempt="attempt-10")
    os.utime(again, (first.stat().st_mtime + 1,) * 2)
    assert checkpoint.newest(root, WORLD) == again
    (root / "attempt-02" / "step_99-w2.tmp").mkdir()
    (root / "attempt-02" / "step_xyz").mkdir()
    assert checkpoint.newest(root, WORLD) == again


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    larger = save(tmp_path, 1_000_000)
    assert checkpoint.newest(tmp_path, WORLD) == larger


def test_random_state_and_progress_come_back(tmp_path: Path) -> None:
    torch.manual_seed(7)
    torch.rand(3)
    folder = save(tmp_path, 4, world_size=1)
    expected = torch.rand(5)
    torch.manual_seed(8)
    engine = Engine(0)
    assert checkpoint.load(engine, folder, rank=0, trained_only=False) == {"step": 4}
    assert torch.equal(torch.rand(5), expected)
    assert engine.loaded == b"step 4" * 100


def test_pruning_keeps_the_newest(root: Path) -> None:
    save(root, 7, attempt="attempt-02")
    checkpoint.prune(root, keep=2)
    assert names(root) == ["attempt-01/step_000010-w2", "attempt-02/step_000007-w2"]
    checkpoint.prune(root, keep=5)
    assert len(names(root)) == 2
    checkpoint.prune(root, keep=1)
    assert names(root) == ["attempt-01/step_000010-w2"]
    checkpoint.prune(root / "nowhere", keep=1)


def test_pruning_keeps_the_newest_step_beyond_six_digits(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["attempt-01/step_1000000-w2"]


def test_what_was_never_finished_is_pruned_before_what_was(root: Path) -> None:
    """A kill while saving step 15 leaves its folder; it must not push out what the restarted run saves at step 12."""
    (save(root, 15) / "manifest_1.json").unlink()
    restarted = save(root, 12, attempt="attempt-02")
    checkpoint.prune(root, keep=1)
    assert names(root) == ["attempt-02/step_000012-w2"]
    assert checkpoint.newest(root, WORLD) == restarted
