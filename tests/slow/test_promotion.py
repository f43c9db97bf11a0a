"""Many processes promote at once, and one is killed in the middle: the champion is always one, the log has no gap."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from mlflow.artifacts import list_artifacts, load_dict

from heliostat.errors import GateRefused
from heliostat.registry import audit, store, versions
from heliostat.registry.audit import Entry, History, PromotionLog
from heliostat.registry.config import Gate
from heliostat.registry.promotion import promote, rollback
from tests import mlflow_server, postgres

pytestmark = pytest.mark.slow

PROCESSES = 8
PROMOTIONS = 10
# Forked from a process that has the imports done, and no connection open.
PROCESS = multiprocessing.get_context("forkserver")
PROCESS.set_forkserver_preload(["heliostat.registry.promotion"])


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres.running() as uri:
        yield uri


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server.running(tmp_path_factory.mktemp("server"), database, workers=2) as uri:
        yield uri


@pytest.fixture(params=["sqlite", "server on PostgreSQL"])
def environment(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables that lead to the store."""
    values = {"HELIOSTAT_HOME": str(home)}
    if request.param != "sqlite":
        values["MLFLOW_TRACKING_URI"] = request.getfixturevalue("server")
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


def register(model: str, count: int, folder: Path) -> list[str]:
    """Versions that differ in one file."""
    run_id = store.client().create_run(store.experiment_id("promotions")).info.run_id
    made = []
    for number in range(1, count + 1):
        bundle = folder / str(number)
        bundle.mkdir()
        (bundle / "weights").write_text(str(number))
        made.append(versions.register(run_id, bundle, model, {}).version)
    return made


def sound(folder: Path) -> None:
    assert (folder / "weights").exists()


def promote_in_turn(environment: dict[str, str], model: str, own: list[str], start: Barrier) -> None:
    """The body of a process: nobody else promotes these versions, so each promotion is a change."""
    os.environ.update(environment)
    start.wait()
    for turn in range(PROMOTIONS):
        version = own[turn % len(own)]
        made = promote(model, version, verify=sound, reason=f"turn {turn}")
        assert made.version == version
        assert made.previous != version


def promote_and_die(environment: dict[str, str], model: str, version: str) -> None:
    """The body of a process: killed when the entry is in the log, before anything follows from it."""
    os.environ.update(environment)
    append = PromotionLog.append

    def append_and_die(log: PromotionLog, history: History, entry: Entry) -> int | None:
        assert append(log, history, entry)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(PromotionLog, "append", append_and_die)  # noqa: B010
    promote(model, version, verify=sound)


def artifacts(log: PromotionLog) -> list[dict[str, Any]]:
    run = store.client().get_run(log.run_id)
    files = list_artifacts(run_id=log.run_id, artifact_path="promotions", tracking_uri=store.connect())
    assert [file.path for file in files] == [f"promotions/{number:06}.json" for number in range(1, len(files) + 1)]
    return [dict(load_dict(f"{run.info.artifact_uri}/{file.path}")) for file in files]


def test_many_processes_promote_one_alias(environment: dict[str, str], tmp_path: Path) -> None:
    made = register("contended", 2 * PROCESSES, tmp_path)
    start = PROCESS.Barrier(PROCESSES)
    shares = [made[2 * index : 2 * index + 2] for index in range(PROCESSES)]
    running = [PROCESS.Process(target=promote_in_turn, args=(environment, "contended", own, start)) for own in shares]
    for process in running:
        process.start()
    seen: set[str] = set()
    polls = 0
    while any(process.is_alive() for process in running):
        if "champion" in versions.aliases("contended"):
            seen.add(versions.version_of_alias("contended", "champion").version)
            polls += 1
        else:
            assert not seen, "the alias was there before"
        time.sleep(0.05)  # the processes need the cores more
    assert [process.exitcode for process in running] == [0] * PROCESSES
    assert len(seen) > 2
    assert polls > PROMOTIONS
    assert seen <= set(made)
    log = PromotionLog.open("contended")
    entries = log.read().entries
    assert len(entries) == PROCESSES * PROMOTIONS
    assert [entry.previous for entry in entries] == [None, *(entry.version for entry in entries[:-1])]
    for own in shares:
        reasons = [entry.reason for entry in entries if entry.version in own]
        assert reasons == [f"turn {turn}" for turn in range(PROMOTIONS)], "none lost, none doubled, in their order"
    current = versions.aliases("contended")
    assert (current["champion"], current["previous_champion"]) == (entries[-1].version, entries[-2].version)
    assert [artifact["nonce"] for artifact in artifacts(log)] == [entry.nonce for entry in entries]


@pytest.mark.parametrize("repair", ["promote", "refused", "rollback"])
def test_a_process_killed_between_log_and_alias_is_made_up_for(
    environment: dict[str, str], repair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_IN_FLIGHT", timedelta(0))
    model = f"killed-{repair}"
    first, second, third = register(model, 3, tmp_path)
    promote(model, first, verify=sound)
    process = PROCESS.Process(target=promote_and_die, args=(environment, model, second))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert versions.aliases(model)["champion"] == first, "killed before the alias moved"
    log = PromotionLog.open(model)
    assert [entry.version for entry in log.read().entries] == [first, second]
    assert len(artifacts(log)) == 1

    if repair == "promote":
        assert promote(model, third, verify=sound).previous == second
        expected: tuple[str, str | None] = (third, second)
    elif repair == "refused":
        with pytest.raises(GateRefused, match="has no score"):
            promote(model, third, verify=sound, gates=[Gate(metric="missing")])
        expected = (second, first)
    else:
        assert rollback(model, verify=sound).version == first
        expected = (first, None)
    current = versions.aliases(model)
    assert (current["champion"], current.get("previous_champion")) == expected
    assert [entry["version"] for entry in artifacts(log)][:2] == [first, second]
    assert versions.get_version(model, second).tags["promoted_from"] == first
