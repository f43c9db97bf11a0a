"""A search with Ray Tune: trials are trainings, weak ones are stopped, what is over stays, failures are told."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heliostat import journal
from heliostat.errors import AuditFailed, ResourceError, TrainingError
from heliostat.experiment import ExperimentConfig
from heliostat.registry import store
from heliostat.training import runs
from heliostat.tuning import training_search
from heliostat.tuning.training_trial import with_values
from tests import tiny
from tests.slow import command

pytestmark = pytest.mark.usefixtures("ray_cluster", "module_store")
RATES = [3e-3, 1e-3, 1e-5, 1e-6]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> ExperimentConfig:
    """Four trials of ten steps on a tiny model; those with the small rates learn nothing."""
    folder = tmp_path_factory.mktemp("search")
    rows = [{"prompt": text, "completion": " " + text[:9]} for text in tiny.TEXTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ExperimentConfig.model_validate(
        {
            "name": "x",
            "storage_path": str(folder / "runs"),
            "model": {"model_name_or_path": str(tiny_bundle)},
            "data": {"train": str(folder / "rows.jsonl"), "format": "prompt_completion", "max_length": 64,
                     "validation_size": 6},
            "training": {"num_workers": 1, "max_steps": 10, "per_device_train_batch_size": 2, "warmup_ratio": 0},
            "generation": {"max_new_tokens": 8},
            "tune_training": {"space": {"training.learning_rate": RATES}, "searcher": "grid", "reduction_factor": 2,
                              "max_concurrent_trials": 1},
        }
    )  # fmt: skip


def searched(config: ExperimentConfig) -> dict[str, Any]:
    return training_search.tune_training(config, Console(quiet=True))


@pytest.fixture(scope="module")
def result(config: ExperimentConfig, home: Path) -> dict[str, Any]:
    """The finished search, and the model that its winner became."""
    os.environ["HELIOSTAT_HOME"] = str(home)
    return searched(with_values(config, {"tune_training.then": "train"}))


def test_the_best_rate_wins_and_weak_trials_are_stopped(result: dict[str, Any]) -> None:
    trials = result["trials"]
    assert [trial["point"]["training.learning_rate"] for trial in trials] == RATES, "the grid in its order"
    assert result["best"]["training.learning_rate"] in RATES[:2]
    assert result["value"] == min(trial["value"] for trial in trials)
    states = {trial["point"]["training.learning_rate"]: trial["state"] for trial in trials}
    assert states[3e-3] == "finished"
    assert states[1e-6] == "stopped"
    assert trials[3]["steps"] < 10, "it did not run to its end"
    assert "stopped at" in result["table"], "a trial goes on for a moment, until its verdict reaches it"


def test_each_trial_is_a_child_run_and_the_search_has_pictures(result: dict[str, Any], config: Any) -> None:
    client = store.client()
    experiment = store.experiment_id(config.name)
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{result['run_id']}'")
    assert len(children) == 4
    rates = {float(child.data.params["training.learning_rate"]) for child in children}
    assert rates == set(RATES)
    assert all("eval_loss" in child.data.metrics for child in children)
    parent = client.get_run(result["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best_eval_loss"] == pytest.approx(result["value"])
    assert float(parent.data.params["best.training.learning_rate"]) == result["best"]["training.learning_rate"]
    names = {artifact.path for artifact in client.list_artifacts(result["run_id"])}
    assert names >= {"trial_curves.png", "parallel_coordinates.png", "eval_loss_against_learning_rate.png",
                     "trials.json", "trials.txt"}  # fmt: skip


def test_losers_keep_their_journal_only_and_the_winner_is_registered_as_it_was_trained(result: dict[str, Any]) -> None:
    for trial in result["trials"]:
        (folder,) = (Path(result["folder"]) / "trials").glob(f"{trial['index']:04d}-*")
        assert (folder / journal.NAME).exists()
        best = trial["index"] == result["best_trial"]
        assert (folder / "audit.json").exists() == best, "the search audits for all; what is registered has its own"
        assert (folder / "weights").exists() == best
        if best:
            assert result["trained"]["run_folder"] == str(folder)
            assert result["trained"]["model_uri"].startswith("models:/x/")
            assert runs.facts(folder)["attempts"] == 2, "opened again to be registered, but its journal is the trial's"
            steps = [row["step"] for row in journal.read(folder / journal.NAME)[0] if "loss" in row["metrics"]]
            assert steps == list(range(1, 11)), "no step was trained twice"


def test_a_search_that_is_gone_on_with_reads_its_trials_out(result: dict[str, Any], config: ExperimentConfig) -> None:
    folder = Path(result["folder"])
    journals = {path: path.read_bytes() for path in folder.glob("trials/*/metrics.jsonl")}
    facts = {path: path.read_bytes() for path in folder.glob("trials/*/run.json")}
    # As if the driver had been killed just before the end.
    search = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**search, "status": "running"}))
    again = searched(config)
    assert {key: again[key] for key in ("folder", "best", "value")} == {
        key: result[key] for key in ("folder", "best", "value")
    }
    assert [trial["curve"] for trial in again["trials"]] == [trial["curve"] for trial in result["trials"]]
    assert {path: path.read_bytes() for path in folder.glob("trials/*/metrics.jsonl")} == journals
    assert {path: path.read_bytes() for path in folder.glob("trials/*/run.json")} == facts


def test_a_failing_trial_is_marked_and_the_others_go_on(config: ExperimentConfig) -> None:
    """With max_length 4 a sample is longer than a sequence may be."""
    result = searched(with_values(config, {"name": "failing", "tune_training.space": {"data.max_length": [4, 64]}}))
    first, second = result["trials"]
    assert not (Path(result["folder"]) / "audit.json").exists(), "the trials' data differ"
    assert list((Path(result["folder"]) / "trials").glob("0001-*/audit.json"))
    assert (first["state"], second["state"]) == ("failed", "finished")
    assert "its 17 tokens exceed data.max_length: 4" in first["error"]
    assert result["best"] == {"data.max_length": 64}


def test_unfit_data_ends_a_search_before_its_first_trial(config: ExperimentConfig) -> None:
    with pytest.raises(AuditFailed, match=r"test: 102 of 108 .* rows are in train too"):
        searched(with_values(config, {"name": "unfit", "data.test": config.data.train}))
    assert list(Path(str(config.storage_path)).glob("unfit*")) == []


def test_every_trial_failing_is_an_error_with_the_first_reason(config: ExperimentConfig) -> None:
    with pytest.raises(
        TrainingError, match=r"none of 2 trials came to a result; the first error: .* exceed data.max_length: 4 "
    ):
        searched(with_values(config, {"name": "hopeless", "tune_training.space": {"data.max_length": [4, 5]}}))


def test_a_budget_that_ends_before_anything_is_known_says_so(config: ExperimentConfig) -> None:
    with pytest.raises(TrainingError, match=r"the first error: the budget ended before any trial was evaluated"):
        searched(with_values(config, {"name": "hurry", "tune_training.time_budget_s": 0.1}))


def test_a_killed_trial_starts_again_and_goes_on(config: ExperimentConfig, tmp_path: Path) -> None:
    """The trial's process is ended by a signal in mid-training, as the memory monitor or a fault would."""
    flag = tmp_path / "killed"
    config = with_values(
        config,
        {"name": "killed", "training.max_steps": 40, "training.save_steps": 5,
         "tune_training.space": {"training.learning_rate": [1e-3]}},
    )  # fmt: skip
    folder = Path(str(config.storage_path)) / "killed-tune-0001" / "trials"

    def kill() -> None:
        while not any(len(journal.read(path)[0]) > 12 for path in folder.glob("*/metrics.jsonl")):
            time.sleep(0.1)
        for process in command.processes_below(os.getpid(), "Trainable"):
            process.send_signal(signal.SIGKILL)
        flag.touch()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = searched(config)
    thread.join(timeout=10)
    assert flag.exists()
    assert result["trials"][0]["state"] == "finished"
    (facts,) = (runs.facts(path) for path in folder.iterdir())
    assert facts["attempts"] == 2


def test_a_search_that_can_never_start_says_what_is_free(config: ExperimentConfig) -> None:
    impossible = with_values(config, {"name": "big", "training.num_workers": 50})
    with pytest.raises(
        ResourceError, match=r"training.num_workers=50: one trial needs 50 CPU, but only \d+ CPU is free"
    ):
        searched(impossible)
    assert list(Path(str(config.storage_path)).glob("big-tune*")) == []


def test_trials_of_several_workers_choose_by_answers_under_zero3(config: ExperimentConfig) -> None:
    """Two workers a trial; the weights of each evaluation are scored beside the training and the best one is kept."""
    config = with_values(
        config,
        {"name": "zero3", "training.num_workers": 2, "training.per_device_train_batch_size": 1,
         "training.deepspeed": "zero3", "tune_training.metric": "token_f1", "tune_training.then": "train",
         "tune_training.space": {"training.learning_rate": [3e-3]}},
    )  # fmt: skip
    result = searched(config)
    (trial,) = result["trials"]
    assert trial["state"] == "finished"
    assert result["metric"] == "eval_token_f1"
    assert [percent for percent, _ in trial["curve"]] == [20, 40, 60, 80, 100]
    assert result["value"] == max(value for _, value in trial["curve"])
    assert result["trained"]["metrics"]["eval_token_f1"] == trial["curve"][-1][1]
    assert not (Path(result["trained"]["run_folder"]) / "exports").exists()
