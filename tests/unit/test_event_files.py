"""TensorBoard reads from the event files what is in the journal, once, however often the driver died."""

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from heliostat import journal
from heliostat.errors import ConfigError
from heliostat.training import event_files
from heliostat.training.config import Reporter, TrainingConfig

BOTH: list[Reporter] = ["mlflow", "tensorboard"]


def append(folder: Path, steps: range) -> None:
    """Rows whose values follow from the step; an evaluation every third."""
    for step in steps:
        evaluation = {"eval_loss": 2 / (step + 1)} if step % 3 == 0 else {}
        journal.append(folder / journal.NAME, step, {"loss": 1 / (step + 1), "learning_rate": 1e-4, **evaluation})


def events(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Tag -> (step, value, time) as TensorBoard reads them, by step: files of the same second have no order."""
    read = EventAccumulator(str(folder / event_files.FOLDER), size_guidance={"scalars": 0}).Reload()
    return {
        tag: sorted((event.step, event.value, event.wall_time) for event in read.Scalars(tag))
        for tag in read.Tags()["scalars"]
    }


def journaled(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """The same from the journal: the first time that a step is there counts."""
    found: dict[str, dict[int, tuple[int, float, float]]] = {}
    for row in journal.read(folder / journal.NAME)[0]:
        for name, value in row["metrics"].items():
            event = (row["step"], float(np.float32(value)), row["time"])
            found.setdefault(event_files.tag(name), {}).setdefault(row["step"], event)
    return {tag: list(values.values()) for tag, values in found.items()}


def test_events_are_those_of_the_journal_with_its_times(tmp_path: Path) -> None:
    append(tmp_path, range(1, 10))
    with event_files.following(BOTH, tmp_path):
        append(tmp_path, range(10, 20))
    assert events(tmp_path) == journaled(tmp_path)
    assert events(tmp_path).keys() == {"train/loss", "train/learning_rate", "eval/loss"}
    assert [step for step, _, _ in events(tmp_path)["train/loss"]] == list(range(1, 20))


def test_a_run_that_goes_on_repeats_no_step(tmp_path: Path) -> None:
    for steps in (range(1, 10), range(5, 15), range(13, 20)):
        with event_files.following(BOTH, tmp_path):
            append(tmp_path, steps)
    assert len(list((tmp_path / event_files.FOLDER).iterdir())) == 3
    assert [step for step, _, _ in events(tmp_path)["train/loss"]] == list(range(1, 20))
    assert events(tmp_path) == journaled(tmp_path)


def test_a_killed_driver_costs_nothing(tmp_path: Path) -> None:
    """It dies with events written, in the middle of a record; what it had not written comes from the journal."""
    append(tmp_path, range(1, 10))
    program = f"""
        import pathlib, time
        from heliostat.training import event_files
        event_files._INTERVAL_S = 0.1
        with event_files.following(["mlflow", "tensorboard"], pathlib.Path({str(tmp_path)!r})):
            print("following", flush=True)
            time.sleep(100)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        folder = tmp_path / event_files.FOLDER
        while not (folder.exists() and events(tmp_path).get("eval/loss", [(0, 0, 0)])[-1][0] == 9):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    (file,) = folder.iterdir()
    os.truncate(file, file.stat().st_size - 7)
    append(tmp_path, range(8, 20))
    with event_files.following(BOTH, tmp_path):
        pass
    assert [step for step, _, _ in events(tmp_path)["train/loss"]] == list(range(1, 20))
    assert events(tmp_path) == journaled(tmp_path)


def test_files_that_cannot_be_written_do_not_end_the_training(tmp_path: Path) -> None:
    append(tmp_path, range(1, 4))
    (tmp_path / event_files.FOLDER).write_text("a file where the folder should be")
    notices: list[str] = []
    with event_files.following(BOTH, tmp_path, notices.append):
        pass
    (notice,) = notices
    assert notice.endswith(f"the metrics are in {tmp_path / journal.NAME}")


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    append(tmp_path, range(1, 4))
    with event_files.following(["mlflow"], tmp_path):
        pass
    assert not (tmp_path / event_files.FOLDER).exists()


@pytest.mark.parametrize(
    ("given", "read"), [("all", BOTH), ("mlflow", ["mlflow"]), (BOTH, BOTH), (["tensorboard", "mlflow"], BOTH[::-1])]
)
def test_report_to_is_a_name_or_a_list(given: Any, read: list[str]) -> None:
    assert TrainingConfig(report_to=given).report_to == read


@pytest.mark.parametrize(
    ("given", "message"), [("tensorboard", "registered in MLflow; write"), ("wandb", "'mlflow' or 'tensorboard'")]
)
def test_what_cannot_be_reported_to_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingConfig(report_to=given)


def test_a_missing_package_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    event_files.check(BOTH)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    event_files.check(["mlflow"])
    with pytest.raises(ConfigError, match=r"pip install 'heliostat\[tensorboard\]'"):
        event_files.check(BOTH)
