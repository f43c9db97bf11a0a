"""A copy is made once, whole or not at all, by however many processes; the limit never costs one that is in use."""

import multiprocessing
import os
from pathlib import Path

import pytest

from heliostat import cache, state
from heliostat.cache import Entry
from heliostat.errors import ConfigError, ResourceError


def put(name: str, size: int = 10) -> Path:
    """A copy that nobody uses afterwards."""
    with cache.using(Entry("g", name, lambda: size), lambda folder: (folder / "file").write_text(name)) as folder:
        return folder


def present() -> set[str]:
    return {path.name for path in (state.downloads() / "g").iterdir()}


def test_many_processes_make_one_copy(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def fill(folder: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        (folder / "half").write_text("x")
        os.sched_yield()
        (folder / "half").rename(folder / "whole")

    def ask() -> None:
        folder = cache.keep(Entry("g", "n", lambda: 1), fill)
        assert [path.name for path in folder.iterdir()] == ["whole"]

    processes = [multiprocessing.get_context("fork").Process(target=ask) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert log.read_text() == "made\n"


def test_a_copy_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ResourceError("no")

    with pytest.raises(ResourceError):
        cache.keep(Entry("g", "n", lambda: 1), fail)
    assert present() == set()
    assert (put("n") / "file").read_text() == "n", "the next one is made"


def test_what_is_there_is_not_measured_again() -> None:
    entry = Entry("g", "n", lambda: pytest.fail("it was measured"))
    with pytest.raises(pytest.fail.Exception), cache.using(entry, lambda folder: None):
        pass
    folder = put("n")
    assert cache.keep(entry, lambda folder: pytest.fail("it was made")) == folder


def test_what_a_killed_process_left_is_made_anew() -> None:
    folder = put("n")
    folder.rename(folder.with_name(".n.part"))
    (folder.with_name(".n.part") / "half").write_text("x")
    assert [path.name for path in put("n").iterdir()] == ["file"]


def test_the_longest_unused_copies_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        put(name)
    put("a")
    monkeypatch.setenv(cache.LIMIT, "30B")
    put("d", 15)
    assert present() == {"a", "d"}, "b and c were used longest ago"


def test_what_is_in_use_is_never_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.LIMIT, "30B")
    with cache.using(Entry("g", "old", lambda: 10), lambda folder: None):
        cache.keep(Entry("g", "kept", lambda: 10), lambda folder: None)
        put("new")
        put("newer")
        assert present() == {"old", "kept", "newer"}
        with pytest.raises(ResourceError, match=r"HELIOSTAT_CACHE_SIZE is 30 bytes, .*20 there would be 40 in use"):
            put("large", 20)
    put("large", 20)
    assert present() == {"kept", "large"}


def test_what_the_disk_has_no_room_for_is_not_begun() -> None:
    with pytest.raises(ResourceError, match="HELIOSTAT_CACHE to a folder on a larger disk"):
        cache.keep(Entry("g", "n", lambda: 2**60), lambda folder: pytest.fail("it was begun"))
    assert present() == set()


def test_the_limit_must_be_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.LIMIT, "much")
    with pytest.raises(ConfigError, match="HELIOSTAT_CACHE_SIZE: `much` is no size"):
        put("n")


def test_the_folder_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_CACHE", str(tmp_path / "fast"))
    assert put("n") == tmp_path / "fast" / "g" / "n"
