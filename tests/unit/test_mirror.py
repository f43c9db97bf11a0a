"""A run at a URI can be gone on with on a machine that has nothing of it, whenever the copying ended."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from heliostat import journal, storage
from heliostat.errors import ConfigError, StorageError
from heliostat.training import checkpoint, mirror, runs
from heliostat.training.mirror import Mirror
from heliostat.training.runs import Run

HASH = "abc"


@pytest.fixture
def place(tmp_path: Path) -> str:
    return (tmp_path / "bucket" / "runs").as_uri()


def opened(place: str, config_hash: str | None = HASH) -> Run:
    mirror.fetch(place, "cron", config_hash)
    return runs.open_run(mirror.folder_of(place), "cron", HASH, "auto" if config_hash else "never")


def begun(place: str) -> Run:
    run = opened(place)
    (run.folder / "config.yaml").write_text("name: cron")
    (run.folder / "lock.tmp").write_text("not for others")
    export(run, b"first")
    journal.append(run.folder / journal.NAME, 5, {"loss": 1.0})
    save(run, 5)
    return run


def export(run: Run, content: bytes) -> None:
    """Replace the weights as training does."""
    new = run.folder / "weights.tmp"
    new.mkdir()
    (new / "model.safetensors").write_bytes(content)
    shutil.rmtree(run.folder / "weights", ignore_errors=True)
    new.rename(run.folder / "weights")


def save(run: Run, step: int) -> None:
    made = checkpoint.at(run.folder / "checkpoints", run.attempt, step, 1)
    made.begin(0)
    (made.shards / "states.pt").write_bytes(b"%d" % step * 100)
    made.finish(0, {"step": step})


def sync(run: Run, place: str) -> None:
    Mirror(run.folder, place, pytest.fail).sync()


def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the test is on another machine."""
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path / "another" / "state"))


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in ("lock", "lock.tmp", "run.json")}


def newest(run: Run) -> int | None:
    found = checkpoint.newest_whole(run.folder / "checkpoints", pytest.fail)
    return found.step if found else None


def test_another_machine_goes_on_with_the_same_files(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(place)
    save(run, 10)
    sync(run, place)
    before = contents(run.folder)
    elsewhere(tmp_path, monkeypatch)
    again = opened(place)
    assert again.folder != run.folder
    assert (again.name, again.attempt, newest(again)) == ("cron-0001", "attempt-02", 10)
    assert contents(again.folder) == before
    assert mirror.fetch_run(f"{place}/cron-0001/") == again.folder, "what is further here stays"


def test_copying_that_ends_early_leaves_the_checkpoint_before(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(place)
    sync(run, place)
    save(run, 10)
    upload = storage.upload

    def interrupted(files: dict[Path, str]) -> None:
        if any("manifest" in uri for uri in files.values()):
            raise StorageError("the network is gone")
        upload(files)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", interrupted)
        with pytest.raises(StorageError):
            sync(run, place)
    elsewhere(tmp_path, monkeypatch)
    again = opened(place)
    steps = [each.step for each in checkpoint.newest_first(again.folder / "checkpoints") if each.is_finished]
    assert steps == [5]


def test_a_thread_copies_each_new_checkpoint(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_POLL_S", 0.01)
    synced: list[str] = []
    plain = Mirror.sync
    run = begun(place)
    with Mirror(run.folder, place, synced.append) as mirrored:

        def sync(self: Mirror) -> None:
            plain(self)
            synced.append("yes")
            mirrored._end.set()

        monkeypatch.setattr(Mirror, "sync", sync)
        mirrored._thread.join(60)
    assert synced == ["yes"]
    assert storage.find(f"{place}/cron-0001/checkpoints/*/step_000005-w1/manifest_0.json")


def test_failures_of_the_thread_are_told_and_end_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_POLL_S", 0.01)
    told: list[str] = []
    run = begun(place)

    def tell(text: str) -> None:
        told.append(text)
        mirrored._end.set()

    def refused(files: Any) -> None:
        raise StorageError("s3://x: access is refused")

    monkeypatch.setattr(storage, "upload", refused)
    with Mirror(run.folder, place, tell) as mirrored:
        mirrored._thread.join(60)
    (text,) = told
    assert "is not copied" in text
    assert "access is refused" in text


def test_what_is_deleted_here_is_deleted_there(place: str) -> None:
    run = begun(place)
    sync(run, place)
    for step in (10, 15):
        save(run, step)
    checkpoint.prune(run.folder / "checkpoints", 2, attempt="attempt-01")
    export(run, b"second")
    sync(run, place)
    there = {file.uri.removeprefix(f"{place}/cron-0001/") for file in storage.find(f"{place}/cron-0001")}
    assert there == contents(run.folder).keys() | {"run.json"}
    assert not any("step_000005" in name for name in there)


def test_a_run_that_went_on_elsewhere_replaces_the_older_files_here(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(place)
    sync(run, place)
    run.close()
    with monkeypatch.context() as patch:
        elsewhere(tmp_path, patch)
        other = opened(place)
        save(other, 20)
        sync(other, place)
        other.close()
    again = opened(place)
    assert (again.folder, again.attempt, newest(again)) == (run.folder, "attempt-03", 20)


@pytest.mark.parametrize(("status", "config_hash"), [("finished", HASH), ("running", None)])
def test_numbers_are_never_given_twice(
    place: str, status: Any, config_hash: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(place)
    run.set_status(status)
    sync(run, place)
    with monkeypatch.context() as patch:
        elsewhere(tmp_path, patch)
        assert opened(place, config_hash).name == "cron-0002"
        first = mirror.folder_of(place) / "cron-0001"
        assert [path.name for path in first.iterdir()] == ["run.json"], "noted only"
        mirror.fetch(place, "cron", HASH)
        assert (first / "checkpoints").exists() == (status == "running"), "fetched once it is wanted"


def test_paths_are_no_uris(tmp_path: Path) -> None:
    assert mirror.folder_of(str(tmp_path)) == tmp_path
    mirror.refuse(str(tmp_path))
    with Mirror(tmp_path, str(tmp_path.parent), pytest.fail) as mirrored:
        mirrored.sync()
        assert mirrored.place == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="searches need a folder"):
        mirror.refuse(place)
    with pytest.raises(ConfigError, match="is no run folder"):
        mirror.fetch_run(f"{place}/cron-0007")


def test_a_damaged_checkpoint_at_the_uri_is_found(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(place)
    save(run, 10)
    sync(run, place)
    (damaged,) = Path(place.removeprefix("file://")).rglob("*/step_000010-w1/deepspeed/states.pt")
    damaged.write_bytes(damaged.read_bytes()[::-1])
    elsewhere(tmp_path, monkeypatch)
    again, told = opened(place), list[str]()
    found = checkpoint.newest_whole(again.folder / "checkpoints", told.append)
    assert found is not None
    assert found.step == 5
    assert "its content changed since it was written" in told[0]
    assert json.loads((again.folder / "run.json").read_text())["attempts"] == 2
