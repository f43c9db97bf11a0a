"""One trial of a training search: a whole training run, seen through its journals. Knows no searcher.

The training runs in a thread, as a Ray Train run of its own if it has several workers, else right here. Each evaluation
in its journal is a report to Ray Tune. The run folder is all there is to a trial: one that was interrupted goes on from
its last checkpoint, and of one that is over the journal is read out again.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray import tune
from rich.console import Console

from heliostat import journal
from heliostat.config import fingerprint, set_key
from heliostat.errors import ConfigError, HeliostatError
from heliostat.experiment import ExperimentConfig
from heliostat.training import runs, trainer
from heliostat.training.checkpoint_scores import SCORES
from heliostat.training.runs import Run
from heliostat.tuning.reports import ERROR, FINISHED
from heliostat.tuning.space import Point

PROGRESS = "progress"
"""Percent of the trial's steps; what schedulers compare trials at."""
OVER = ("trained", "finished")
"""Status of a trial that ran to its end, and of one whose model was registered then."""
_POLL_S = 0.1


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search have in common."""

    config: ExperimentConfig
    """The experiment with the trials' own settings, but without the searched ones."""
    metric: str
    folder: Path
    """Parent of the trials' run folders."""
    parent_run_id: str
    environment: Mapping[str, str]
    """Variables of the driver that say where things are."""
    audited: bool
    """Whether the search has audited the data, which is the same for all trials then."""

    def configure(self, point: Point) -> ExperimentConfig:
        """The configuration of the trial at `point`.

        Raises:
            ConfigError: a value is not allowed.
        """
        return with_values(self.config, point)

    def run_folder(self, index: int, point: Point) -> Path:
        """The trial's folder."""
        return self.folder / f"{index:04d}-{fingerprint(point)[:8]}"

    def rows(self, run_folder: Path) -> list[dict[str, Any]]:
        """The journal rows with the metric so far, step 0 (before training) left out, each step once."""
        found = [row for name in (journal.NAME, SCORES) for row in journal.read(run_folder / name)[0]]
        by_step = {row["step"]: row for row in found if row["step"] > 0 and self.metric in row["metrics"]}
        return [by_step[step] for step in sorted(by_step)]


def with_values(config: ExperimentConfig, values: Mapping[str, Any]) -> ExperimentConfig:
    """The configuration with other values of some dotted keys, validated.

    Raises:
        ConfigError: a value is not allowed; says which keys and why.
    """
    changed = config.model_dump()
    for key, value in values.items():
        set_key(changed, key, value, f"{key}={value}")
    try:
        return ExperimentConfig.model_validate(changed)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in detail["loc"]) or ", ".join(values)
        raise ConfigError(
            f"{where}: {detail['msg'].removeprefix('Value error, ')} (given: {detail['input']})"
        ) from None


def clear(run_folder: Path, *, keep_weights: bool) -> None:
    """Delete what a trial that is over needs no more: all but its journal and, if kept, its weights."""
    for name in ("checkpoints", "exports", *(() if keep_weights else ("weights", "init"))):
        shutil.rmtree(run_folder / name, ignore_errors=True)


class TrainingTrial(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """Ray Tune's view of a trial; its actor is reused for one trial after another."""

    def setup(self, config: dict[str, Any], plan: TrialPlan) -> None:
        """Called once in an actor's life, with its first trial."""
        os.environ.update(plan.environment)
        self._plan = plan
        self._run: Run | None = None
        self._thread: threading.Thread | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The actor gets its next trial."""
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation, or the end."""
        return next(self._reports)

    def cleanup(self) -> None:
        """The trial is stopped, and the actor ends."""
        self._end()

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._error: str | None = None
        index, point = config["index"], config["point"]
        folder = self._plan.run_folder(index, point)
        self._run = self._thread = None
        if runs.facts(folder).get("status") not in (*OVER, "stopped"):
            configured = self._plan.configure(point)
            self._run = runs.open_folder(folder, trainer.config_hash(configured))
            self._thread = threading.Thread(target=self._train, args=(configured, self._run), name="trial", daemon=True)
            self._thread.start()
        self._reports = self._follow(folder)

    def _end(self) -> None:
        """Stop the training if it still goes on."""
        if self._run is not None and self._goes_on():
            self._run.tell_to_stop()
            self._join()
            # Or else it came to its end in the meantime.
            if self._run.status == "stopped":
                clear(self._run.folder, keep_weights=False)

    def _goes_on(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _train(self, config: ExperimentConfig, run: Run) -> None:
        tune_config = self._plan.config.tune_training
        evaluations = max(1, round(1 / tune_config.grace_period))
        tags = {"mlflow.parentRunId": self._plan.parent_run_id, "heliostat.trial": run.name}
        try:
            console = Console(quiet=True)
            trainer.trial(config, run, console, evaluations=evaluations, tags=tags, audited=self._plan.audited)
        except HeliostatError as error:
            self._error = str(error)
        except BaseException as error:
            self._error = f"{type(error).__name__}: {error}"

    def _follow(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Reports, the last one with FINISHED or ERROR."""
        reported, latest = 0, {self._plan.metric: float("nan"), PROGRESS: 0.0, "step": 0, "seconds": 0.0}
        while True:
            over = not self._goes_on()
            for row in self._plan.rows(folder):
                if row["step"] > reported:
                    reported = row["step"]
                    latest = self._report(folder, row)
                    if latest[PROGRESS] < 100:
                        yield latest
            if over or latest[PROGRESS] >= 100:
                break
            time.sleep(_POLL_S)
        self._join()
        yield {**latest, "done": True, **({ERROR: self._error} if self._error else {FINISHED: True})}

    def _report(self, folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
        total = runs.facts(folder)["total_steps"]
        return {
            self._plan.metric: row["metrics"][self._plan.metric],
            PROGRESS: min(100.0, 100 * row["step"] / total),
            "step": row["step"],
            "seconds": row["time"] - journal.read(folder / journal.NAME, limit=1)[0][0]["time"],
        }
