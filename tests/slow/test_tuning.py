"""`heliostat tune-training` as a command: its driver killed in mid-search, and trials as large as the machine."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from heliostat import journal
from heliostat.quickstart import schedules
from heliostat.registry import store
from tests import readme
from tests.slow import command

TRIALS = 8


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The README's search with few rows."""
    folder = tmp_path_factory.mktemp("tuning")
    schedules.write(folder)
    data = [f"data.{split}={folder}/{split}.jsonl" for split in ("train", "validation", "test")]
    return [
        *readme.commands("Search")[0], *data, "data.max_train_samples=4000", f"tune_training.num_samples={TRIALS}",
        "tune_training.max_concurrent_trials=2",
    ]  # fmt: skip


def trials(search: Path) -> dict[str, dict[str, Any]]:
    """Facts of each trial by its folder's name, the bytes of its journal among them once it is over."""
    found = {}
    for folder in sorted((search / "trials").glob("*")):
        facts = json.loads((folder / "run.json").read_text())
        over = facts["status"] != "running"
        found[folder.name] = {**facts, "journal": (folder / journal.NAME).read_bytes() if over else None}
    return found


def test_a_killed_search_goes_on_without_training_anything_twice(arguments: list[str], tmp_path: Path) -> None:
    storage = f"storage_path={tmp_path}"
    search = tmp_path / "cron-tune-0001"
    process = command.start(*arguments, storage)
    command.wait_for(lambda: sum(bool(facts["journal"]) for facts in trials(search).values()) >= 3, process)
    trainings = command.processes_below(process.pid, "Trainable")
    assert len(trainings) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert command.still_alive(trainings) == []
    before = trials(search)
    assert 3 <= len(before) < TRIALS, "it was killed half-way"

    result = command.run(*arguments, storage)
    after = trials(search)
    assert len(after) == len(result["trials"]) == TRIALS
    assert before.keys() < after.keys(), "none was lost"
    over = {name for name, facts in before.items() if facts["journal"]}
    assert {name: after[name] for name in over} == {name: before[name] for name in over}, "none was trained again"
    states = [trial["state"] for trial in result["trials"]]
    assert states.count("stopped") >= 1
    assert states.count("finished") >= 1
    experiment = store.experiment_id("cron")
    children = store.client().search_runs([experiment], f"tags.`mlflow.parentRunId` = '{result['run_id']}'")
    assert len(children) == TRIALS, "one run in MLflow for each trial, whatever happened"
    artifacts = {artifact.path for artifact in store.client().list_artifacts(result["run_id"])}
    assert artifacts >= {"trial_curves.png", "parallel_coordinates.png", "eval_loss_against_learning_rate.png"}


def test_trials_of_as_many_workers_as_there_are_cpus_do_not_wait_for_each_other(
    arguments: list[str], tmp_path: Path
) -> None:
    """Two trials of two workers on two CPUs: their drivers must take none."""
    cpus = len(os.sched_getaffinity(0))
    result = command.run(
        *arguments, f"storage_path={tmp_path}", "tune_training.num_samples=2", "data.max_train_samples=600",
        f"training.num_workers={min(cpus, 4)}", "tune_training.scheduler=none",
    )  # fmt: skip
    assert [trial["state"] for trial in result["trials"]] == ["finished", "finished"]
