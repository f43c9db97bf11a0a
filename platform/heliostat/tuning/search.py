"""Run trials with Ray Tune: how many at once, what they reached, which were stopped. Knows not what a trial does."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from ray.tune.result import AUTO_RESULT_KEYS
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from heliostat import cluster
from heliostat.errors import ResourceError
from heliostat.tuning.reports import ERROR, FINISHED
from heliostat.tuning.searcher import PointSearcher
from heliostat.tuning.space import Point

State = Literal["finished", "stopped", "failed"]
_TUNES_KEYS = frozenset({*AUTO_RESULT_KEYS, "config", "trial_id", "experiment_tag", "done", FINISHED, ERROR})

# Tune's own files beside the trials' would only repeat our journals; its snapshots are never restored from.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass
class Outcome:
    """A trial: its point, and what it reached."""

    index: int
    point: Point
    results: list[dict[str, Any]] = field(default_factory=list)
    """What the trial reported, in its order, without Tune's own keys."""
    state: State = "stopped"
    error: str | None = None
    seconds: float = 0.0


def scheduler(kind: str, *, time_attr: str, max_t: float, grace_period: float, reduction_factor: float) -> Any:
    """Tune's scheduler: asha (Li et al. 2020, arXiv:1810.05934), median (Golovin et al. 2017) or none."""
    if kind == "asha":
        return AsyncHyperBandScheduler(
            time_attr=time_attr, max_t=max_t, grace_period=grace_period, reduction_factor=reduction_factor
        )
    if kind == "median":
        return MedianStoppingRule(time_attr=time_attr, grace_period=grace_period, min_samples_required=2)
    return FIFOScheduler()


def concurrency(resources: Mapping[str, float], wanted: int | None, key: str, workers: int = 1) -> int:
    """How many trials fit into what is free now, at most `wanted`; each has `workers` that need `resources`.

    Trials beyond that would hold a part of what another needs, and wait for each other for ever.

    Raises:
        ResourceError: not one fits; told is what is free.
    """
    free = ray.available_resources()
    trial = {name: amount * workers for name, amount in resources.items() if amount > 0}
    fits = min((int(free.get(name, 0) / amount) for name, amount in trial.items()), default=1)
    fits = int(min(fits, cluster.room(resources) / workers))
    if fits < 1:
        there = ", ".join(f"{free.get(name, 0):g} {name}" for name in trial)
        raise ResourceError(
            f"{key}: one trial needs {cluster.shown(trial)}, but only {there} is free, or no node has room for a "
            "worker of it; lower what a trial needs, or join a larger cluster with RAY_ADDRESS"
        )
    return min(fits, wanted or fits)


def run(
    trainable: type[tune.Trainable],
    parameters: Mapping[str, Any],
    searcher: PointSearcher,
    scheduler: TrialScheduler,
    *,
    resources: Mapping[str, float],
    concurrent: int,
    time_budget_s: float | None,
    max_failures: int,
    folder: Path,
    observer: "Observer",
    stop: tune.Stopper | None = None,
) -> list[Outcome]:
    """Run the trials of the searcher; the actor of a finished trial is reused for the next.

    Args:
        trainable: gets `parameters` (through Ray's object store) and {"index", "point"} in its config.
        resources: of the trial's own actor.
        observer: is told as things happen.

    Returns:
        The trials in the order of their numbers.
    """
    os.environ.update(_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it logs a traceback for each failed trial
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, **parameters), dict(resources)),
        tune_config=TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            metric=searcher.metric,
            mode=searcher.mode,
            num_samples=-1,
            max_concurrent_trials=concurrent,
            time_budget_s=time_budget_s,
            reuse_actors=True,
            # Tune's own names hold the values of the point, which may be long texts.
            trial_dirname_creator=lambda trial: f"{trial.config['index']:04d}",
        ),
        run_config=RunConfig(
            name="tune",
            storage_path=str(folder),
            callbacks=[observer],
            failure_config=FailureConfig(max_failures=max_failures),
            # A trial that is started again finds its own files.
            checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            stop=stop,
            verbose=0,
        ),
    )
    with observer:
        tuner.fit()
    return [observer.outcomes[index] for index in sorted(observer.outcomes)]


class Observer(Callback):  # type: ignore[misc]  # Ray has no types
    """Collects the outcomes of the trials and shows the progress: a bar on a terminal, a line per trial elsewhere."""

    def __init__(
        self,
        console: Console,
        searcher: PointSearcher,
        *,
        describe: Callable[[Outcome], str],
        ended: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        """`describe` puts a trial into a line; `ended` is called when one is over."""
        self.outcomes: dict[int, Outcome] = {}
        self._searcher = searcher
        self._console = console
        self._describe = describe
        self._ended = ended
        self._started: dict[int, float] = {}
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} trials"),
            TextColumn("{task.fields[latest]}"), TimeElapsedColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune's snapshots are never restored."""
        return {}

    def __enter__(self) -> "Observer":
        self._bar.start()
        self._task = self._bar.add_task("searching", total=self._searcher.limit, latest="")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        """A trial starts, or starts again."""
        index = trial.config["index"]
        self._started[index] = time.monotonic()
        self.outcomes.setdefault(index, Outcome(index, trial.config["point"]))

    def on_trial_result(
        self, iteration: int, trials: Sequence[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """A trial reports."""
        report = {key: value for key, value in result.items() if key not in _TUNES_KEYS}
        self.outcomes[trial.config["index"]].results.append(report)

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        """A trial is over: its last report says that it finished or failed, or else it was stopped."""
        last = trial.last_result or {}
        state: State = "failed" if ERROR in last else "finished" if last.get(FINISHED) else "stopped"
        self._end(trial, state, last.get(ERROR))

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        """A trial failed for good."""
        self._end(trial, "failed", _last_line(trial))

    def _end(self, trial: Any, state: State, error: str | None) -> None:
        outcome = self.outcomes[trial.config["index"]]
        outcome.state, outcome.error = state, error
        outcome.seconds += time.monotonic() - self._started[outcome.index]
        self._ended(outcome)
        text = self._describe(outcome)
        self._bar.update(self._task, advance=1, total=self._searcher.limit, latest=text)
        if not self._console.is_terminal:
            self._console.print(text, highlight=False, markup=False)


def _last_line(trial: Any) -> str:
    """What killed the trial, in one line."""
    text = str(trial.get_error() or "").strip()
    return text.splitlines()[-1] if text else "the trial's process died"
