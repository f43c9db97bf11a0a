"""SIGTERM to a training: it saves the step that it is at and ends, and goes on as if nothing had happened."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from heliostat import cli, journal, state
from heliostat.command import Command
from heliostat.models.files import sha256
from heliostat.registry import store
from heliostat.training import checkpoint, termination
from tests import tiny
from tests.slow import command


@pytest.fixture
def config(tmp_path: Path, tiny_bundle: Path) -> str:
    """40 steps with an evaluation after each, and no checkpoint but at the end."""
    rows = [{"prompt": text, "completion": text[::-1][:9]} for text in tiny.TEXTS[:10]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "cron",
        "model": {"model_name_or_path": str(tiny_bundle)},
        "data": {"format": "prompt_completion", "train": str(tmp_path / "train.jsonl"), "max_length": 64,
                 "packing": False, "validation_size": 2},
        "training": {"num_workers": 0, "max_steps": 40, "save_steps": 40, "eval_steps": 1, "logging_steps": 4,
                     "per_device_train_batch_size": 2, "load_best_model_at_end": False},
        "registry": {"register_model": False},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values))
    return str(path)


def weights_and_scores(result: dict[str, Any]) -> tuple[str, list[tuple[int, float]]]:
    """The weights' hash, and every validation loss, those that came twice too."""
    rows, _ = journal.read(Path(result["run_folder"]) / journal.NAME)
    scores = [(row["step"], row["metrics"]["eval_loss"]) for row in rows if "eval_loss" in row["metrics"]]
    return sha256(Path(result["bundle"]) / "model.safetensors"), scores


def test_a_terminated_training_has_saved_and_goes_on_as_if_nothing_had_happened(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*overrides: str) -> dict[str, Any]:
        assert cli.main(["train", config, *overrides, "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    folder = state.runs() / "cron-0001"
    process = command.start("train", config)
    command.wait_for(lambda: command.last_step(folder) >= 1, process)
    process.terminate()
    _, told = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, told
    (saved,) = checkpoint.newest_first(folder / "checkpoints")
    assert saved.step < 40, "it was in mid-run"
    assert f"ends as SIGTERM asks for, after step {saved.step}, which is saved" in " ".join(told.split())
    (run,) = store.client().search_runs([store.experiment_id("cron")])
    assert run.info.status == "KILLED"

    resumed = train()
    assert list(command.journal(folder, "progress.start")) == [0, saved.step]
    assert resumed["run_folder"] == str(folder)
    assert weights_and_scores(resumed) == weights_and_scores(train("name=unbroken"))


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    def work() -> None:
        with termination.pausing(file):
            assert not file.exists(), "one of an earlier driver says nothing"
            os.kill(os.getpid(), signal.SIGTERM)
            assert file.exists()
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")

    file, before = tmp_path / "pause", signal.getsignal(signal.SIGTERM)
    file.touch()
    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_trial_in_a_thread_is_left_alone(tmp_path: Path) -> None:
    def trial() -> None:
        with termination.ending(), termination.pausing(tmp_path / "pause"):
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[Any] = []
    thread = threading.Thread(target=trial)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_a_command_that_sigterm_ends_says_so_by_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> None:
        with termination.ending():
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(cli.COMMANDS, "try", Command("help", lambda parser: None, run, lambda result: "shown"))
    assert cli.main(["try"]) == 143
    assert capsys.readouterr().err == "terminated\n"
