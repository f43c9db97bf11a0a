"""A command goes on with the run it should, starts a new one otherwise, and never shares one with another process."""

import json
import multiprocessing
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from heliostat.errors import ConfigError, ResourceError
from heliostat.training import runs
from heliostat.training.runs import Run


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def opened(storage: Path, config_hash: str = "a", resume: Any = "auto", name: str = "cron") -> Run:
    return runs.open_run(storage, name, config_hash, resume)


def closed(storage: Path, config_hash: str = "a", resume: Any = "auto", name: str = "cron", **facts: Any) -> Run:
    run = opened(storage, config_hash, resume, name)
    if facts:
        run.set_status(facts["status"])
    run.close()
    return run


def test_a_first_run_gets_number_one(storage: Path) -> None:
    run = closed(storage)
    assert run.folder == storage / "cron-0001"
    assert (run.name, run.attempt, run.resumed, run.status) == ("cron-0001", "attempt-01", False, "running")
    facts = json.loads((run.folder / "run.json").read_text())
    assert facts["config_hash"] == "a"


def test_auto_goes_on_with_the_unfinished_run_of_the_same_configuration(storage: Path) -> None:
    first = closed(storage)
    for attempt in range(2, 12):
        again = closed(storage)
        assert again.folder == first.folder
        assert again.attempt == f"attempt-{attempt:02d}"
        assert again.resumed


@pytest.mark.parametrize("status", ["running", "trained"])
def test_a_run_that_is_not_finished_is_gone_on_with_in_its_status(status: str, storage: Path) -> None:
    first = closed(storage, status=status)
    again = closed(storage)
    assert (again.folder, again.status) == (first.folder, status)


def test_a_finished_run_is_never_touched_again(storage: Path) -> None:
    first = closed(storage, status="finished")
    before = (first.folder / "run.json").read_text()
    assert closed(storage).name == "cron-0002"
    assert (first.folder / "run.json").read_text() == before


def test_another_configuration_starts_another_run_and_the_first_can_still_be_gone_on_with(storage: Path) -> None:
    closed(storage, "a")
    assert closed(storage, "b").name == "cron-0002"
    assert closed(storage, "a").name == "cron-0001"
    assert closed(storage, "b").name == "cron-0002"


def test_of_several_unfinished_runs_the_newest_is_gone_on_with(storage: Path) -> None:
    closed(storage)
    closed(storage, resume="never")
    assert closed(storage).name == "cron-0002"


def test_never_starts_a_new_run(storage: Path) -> None:
    assert [closed(storage, resume="never").name for _ in range(3)] == ["cron-0001", "cron-0002", "cron-0003"]
    assert not closed(storage, resume="never").resumed


def test_must_refuses_to_start_one(storage: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume=must: .*runs has no unfinished run `cron` with this configuration"):
        opened(storage, resume="must")
    assert not storage.exists(), "nothing was made"
    closed(storage, "b")
    closed(storage, "a", status="finished")
    with pytest.raises(ConfigError, match="resume=must"):
        opened(storage, "a", resume="must")
    assert closed(storage, "b", resume="must").resumed


def test_runs_of_other_names_do_not_count(storage: Path) -> None:
    closed(storage, name="cron-big")
    closed(storage, name="cron-0001")
    closed(storage, name="cro")
    assert closed(storage).name == "cron-0001", "cron-0001-0001 and cron-big-0001 are runs of other names"
    assert closed(storage).resumed


def test_a_folder_without_facts_is_left_alone(storage: Path) -> None:
    """What a kill between making the folder and writing run.json leaves, or a folder of someone else."""
    (storage / "cron-0007").mkdir(parents=True)
    (storage / "cron-0008").mkdir()
    (storage / "cron-0008" / "run.json").write_text("{")
    assert closed(storage).name == "cron-0009"
    assert (storage / "cron-0008" / "run.json").read_text() == "{"


def test_a_run_that_is_open_is_refused_to_a_second_process(storage: Path) -> None:
    run = opened(storage)
    code = textwrap.dedent(f"""
        from pathlib import Path
        from heliostat.errors import ResourceError
        from heliostat.training import runs
        try:
            runs.open_run(Path({str(storage)!r}), "cron", "a", "auto")
        except ResourceError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{run.folder} is being worked on by another process; wait for it, or use resume=nev")
    assert json.loads((run.folder / "run.json").read_text())["attempts"] == 1, "the refused process changed nothing"
    run.close()
    assert closed(storage).attempt == "attempt-02"


def test_a_run_that_is_open_is_refused_to_the_same_process_too(storage: Path) -> None:
    run = opened(storage)
    with pytest.raises(ResourceError, match="is being worked on"):
        opened(storage)
    assert closed(storage, resume="never").name == "cron-0002"
    run.close()


@pytest.fixture
def killed(storage: Path) -> Path:
    """The folder of a run whose process ended without closing it."""
    process = multiprocessing.get_context("fork").Process(target=opened, args=(storage,))
    process.start()
    process.join()
    return storage / "cron-0001"


def test_the_lock_of_a_process_that_is_gone_is_gone(storage: Path, killed: Path) -> None:
    assert (killed / "lock").exists()
    assert closed(storage).folder == killed


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"storage_path: .*file/cron-0001 cannot be created: Not a directory"):
        opened(tmp_path / "file")


def test_small_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    link = tmp_path / "link"
    link.hardlink_to(path)
    runs.write_atomically(path, "new ✓")
    assert path.read_text(encoding="utf-8") == "new ✓"
    assert link.read_text() == "old", "the old file is not written into"
    assert {found.name for found in tmp_path.iterdir()} == {"x.json", "link"}
