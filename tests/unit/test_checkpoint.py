"""A checkpoint counts only if it is whole: a missing, changed or foreign file makes the one before it the newest."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.training import checkpoint
from heliostat.training.checkpoint import Checkpoint

WORLD = 2
FILES = [
    "deepspeed/mp_rank_00_model_states.pt",
    "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "manifest_0.json",
    "manifest_1.json",
    "state.json",
]


def write(new: Checkpoint, rank: int, content: bytes) -> None:
    """Write a worker's part, with the files of a DeepSpeed engine of ZeRO-2."""
    new.begin(rank)
    if rank == 0:
        (new.shards / "mp_rank_00_model_states.pt").write_bytes(content * 100)
    (new.shards / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(content * 50 + bytes([rank]))
    new.finish(rank, {"step": new.step})


def save(root: Path, step: int, workers: int = WORLD, attempt: str = "attempt-01") -> Checkpoint:
    made = checkpoint.at(root, attempt, step, workers)
    for rank in reversed(range(workers)):
        write(made, rank, b"step %d" % step)
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two whole checkpoints of two workers."""
    save(tmp_path, 5)
    save(tmp_path, 10)
    return tmp_path


def names(root: Path) -> list[str]:
    return sorted(f"{folder.parent.name}/{folder.name}" for folder in root.glob("*/*step_*"))


def newest(root: Path) -> tuple[int | None, list[str]]:
    """The step of the newest whole checkpoint, and what was told on the way."""
    told: list[str] = []
    found = checkpoint.newest_whole(root, told.append)
    return found.step if found else None, told


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "shortened": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "joined by another": lambda path: path.with_suffix(".old").write_bytes(b""),
}


def test_a_whole_checkpoint_has_these_files_and_counts(root: Path) -> None:
    last = checkpoint.at(root, "attempt-01", 10, WORLD)
    assert sorted(str(path.relative_to(last.folder)) for path in last.folder.rglob("*") if path.is_file()) == FILES
    assert (last.step, last.workers, last.state(), last.faults()) == (10, 2, {"step": 10}, [])
    assert newest(root) == (10, [])


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("file", FILES)
def test_any_damage_is_told_and_the_one_before_is_used(file: str, damage: str, root: Path) -> None:
    last = checkpoint.at(root, "attempt-01", 10, WORLD)
    DAMAGES[damage](last.folder / file)
    half_written = file.startswith("manifest") and damage == "deleted"
    step, (told,) = newest(root)
    assert step == 5
    assert told.startswith("the checkpoint of step 10 is not whole and was ")
    aside = root / "attempt-01" / "damaged_step_000010-w2"
    assert aside.exists() != half_written, "nothing is learned from what a kill left behind"
    if aside.exists():
        assert f"set aside as {aside}" in told
        reasons = (aside / "damage.txt").read_text()
        assert reasons.splitlines()[0] in told
        assert Path(file).stem in reasons or file.startswith("manifest")
    assert newest(root) == (5, []), "what was set aside does not come back"
    DAMAGES[damage](root / "attempt-01" / "step_000005-w2" / file)
    assert newest(root)[0] is None


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_workers_find_together_what_one_finds_alone(damage: str, root: Path) -> None:
    last = checkpoint.at(root, "attempt-01", 10, WORLD)
    for file in FILES[:3]:
        DAMAGES[damage](last.folder / file)
    for workers in (2, 3, 9):
        parts = [last.faults(rank, workers) for rank in range(workers)]
        assert sorted({fault for part in parts for fault in part}) == sorted(last.faults()) != []


def test_files_of_network_file_systems_do_not_count(root: Path) -> None:
    (root / "attempt-01" / "step_000010-w2" / "deepspeed" / ".nfs000000012").touch()
    assert newest(root) == (10, [])


def test_every_file_is_in_exactly_one_manifest(root: Path) -> None:
    """Each worker vouches for what it wrote: two that hashed a file while the other writes it would disagree."""
    folder = root / "attempt-01" / "step_000010-w2"
    manifests = [json.loads((folder / f"manifest_{rank}.json").read_text()) for rank in range(WORLD)]
    assert set(manifests[1]) == {"deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt"}
    assert set(manifests[0]) | set(manifests[1]) == {name for name in FILES if not name.startswith("manifest")}
    assert not set(manifests[0]) & set(manifests[1])


def test_a_worker_that_is_killed_while_saving_leaves_no_whole_checkpoint(root: Path) -> None:
    last = checkpoint.at(root, "attempt-01", 10, WORLD)
    shutil.rmtree(last.folder)
    write(last, 0, b"x")
    assert not last.is_finished
    write(last, 1, b"x")
    assert newest(root) == (10, [])


@pytest.mark.parametrize("rank", [0, 1])
def test_saving_over_an_older_one_never_counts_half_way(rank: int, root: Path) -> None:
    """A repeated step (after a restart from an earlier one) writes into the folder that is there."""
    checkpoint.at(root, "attempt-01", 10, WORLD).begin(rank)
    assert newest(root)[0] == 5


def test_the_newest_is_by_step_and_then_by_time_whoever_wrote_it(root: Path) -> None:
    first = save(root, 15, attempt="attempt-02")
    save(root, 12, workers=4)
    assert newest(root)[0] == 15
    again = save(root, 15, workers=3, attempt="attempt-10")
    os.utime(again.folder, (first.folder.stat().st_mtime + 1,) * 2)
    assert checkpoint.newest_whole(root, print) == again
    (root / "attempt-02" / "step_99-w2.tmp").mkdir()
    (root / "attempt-02" / "step_xyz").mkdir()
    assert [(found.step, found.workers) for found in checkpoint.newest_first(root)] == [
        (15, 3), (15, 2), (12, 4), (10, 2), (5, 2),
    ]  # fmt: skip
    assert newest(root / "nowhere") == (None, [])


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    assert newest(tmp_path) == (1_000_000, [])


def test_pruning_keeps_the_newest(root: Path) -> None:
    save(root, 7, attempt="attempt-02")
    checkpoint.prune(root, keep=2, attempt="attempt-02")
    assert names(root) == ["attempt-01/step_000010-w2", "attempt-02/step_000007-w2"]
    checkpoint.prune(root, keep=5, attempt="attempt-02")
    assert len(names(root)) == 2
    checkpoint.prune(root / "nowhere", keep=1, attempt="attempt-02")


def test_what_was_never_finished_is_pruned_before_what_was(root: Path) -> None:
    """A kill while saving step 15 leaves its folder; it must not push out what the restarted run saves at step 12."""
    (save(root, 15).folder / "manifest_1.json").unlink()
    save(root, 12, attempt="attempt-02")
    checkpoint.prune(root, keep=2, attempt="attempt-02")
    assert names(root) == ["attempt-01/step_000010-w2", "attempt-02/step_000012-w2"]


def test_what_other_workers_began_to_write_is_not_pruned(root: Path) -> None:
    checkpoint.at(root, "attempt-01", 15, 2).begin(rank=1)
    checkpoint.prune(root, keep=1, attempt="attempt-01")
    assert names(root) == ["attempt-01/step_000010-w2", "attempt-01/step_000015-w2"]
