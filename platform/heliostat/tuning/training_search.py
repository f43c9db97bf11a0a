"""`heliostat tune-training`: search the values of training keys. Knows the order of things; trials train.

<storage path>/<name>-tune-0001/
    run.json        status, hash of the search
    search.json     MLflow's run
    trials.jsonl    the point of every trial, noted before it starts
    audit.json      and data.txt, token_lengths.png: as of a run; unless the trials' data differ, who then have them
    trials/         their run folders; losers keep their journal only
    results.json    what came out

The folder is all there is to a search: after a killed driver the same command hands out the noted points again, trials
that are over are read out from their journals, and the others go on from their checkpoints.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from ray import tune
from rich.console import Console

from heliostat import cluster, journal, state
from heliostat.config import dotted_keys, fingerprint
from heliostat.data import splits
from heliostat.errors import ConfigError, TrainingError
from heliostat.evaluation.config import LOWER_IS_BETTER, MetricName
from heliostat.experiment import ExperimentConfig
from heliostat.registry import tracking
from heliostat.training import auditing, mirror, runs, setup, trainer
from heliostat.training.config import TrainingConfig
from heliostat.training.runs import Run
from heliostat.tuning import search, space, training_report
from heliostat.tuning.search import Observer, Outcome
from heliostat.tuning.searcher import PointSearcher
from heliostat.tuning.space import Point, Space
from heliostat.tuning.training_report import Trial
from heliostat.tuning.training_trial import OVER, PROGRESS, TrainingTrial, TrialPlan, clear, with_values

WHERE = "tune_training"
NOTES = "trials.jsonl"
RESULTS = "results.json"
_SEARCHABLE = ("seed", "model.", "adapter.", "data.", "training.")
# What decides which rows there are and how they are tokenised.
_DATA = ("seed", "model.", "data.")
_FIXED = (
    "training.num_workers", "training.elastic_resize_monitor_interval_s", "training.use_gpu",
    "training.resources_per_worker", "training.max_failures",
)  # fmt: skip
_LOSSES = ("eval_loss", "eval_perplexity", "loss")
# A driver of several workers takes no CPU: two of them, waiting for their workers, would hold what these need.
_DRIVER = {"CPU": 0, "node:__internal_head__": 0.001}


def tune_training(config: ExperimentConfig, console: Console) -> dict[str, Any]:
    """Search, log to MLflow, and with `then: train` train and register the best.

    Returns {"best": point, "metric", "value", "trials": [...], "run_id", "folder", "table", "trained": result or None}.

    Raises:
        UserError: the space, the metric or the resources are wrong; nothing was started.
        TrainingError: every trial failed; the message holds the first one's error.
    """
    searched = parse(config)
    base, metric, mode = _trial_config(config)
    _check_settings(base, searched)
    _check_rows(base)
    mirror.refuse(config.storage_path)
    storage = mirror.folder_of(config.storage_path)
    with cluster.connected():
        concurrent = _concurrency(base)
        run = runs.open_run(storage, f"{config.name}-tune", _search_hash(config), config.resume)
        with runs.released(run, NOTES):
            console.print(f"{'going on with' if run.resumed else 'search'} {run.folder}", highlight=False)
            same_data = not any(parameter.key.startswith(_DATA) for parameter in searched.parameters)
            if same_data and run.status == "running":
                _audit(base, run, console)
            plan = _plan(base, metric, run, audited=same_data)
            if run.status == "running":
                with _ended_if_interrupted(plan.parent_run_id):
                    trials = _search(plan, searched, mode, concurrent, console)
                _conclude(plan, trials, mode, run)
            result: dict[str, Any] = json.loads((run.folder / RESULTS).read_text())
            trained = _then(config, plan, result, console)
            run.set_status("finished")
    return {**result, "trained": asdict(trained) if trained else None}


def parse(config: ExperimentConfig) -> Space:
    """The search space of the experiment.

    Raises:
        ConfigError: it is empty, names a key that does not exist or cannot be searched, or a distribution is wrong.
    """
    return space.parse(config.tune_training.space, WHERE, _searchable_keys())


def check(config: ExperimentConfig) -> None:
    """Refuse a search whose trials could not train, as far as can be said without the data.

    Raises:
        ConfigError: see `parse`; an override or a value of the space is not allowed, or there is no such metric.
    """
    base, _, _ = _trial_config(config)
    _check_settings(base, parse(config))


def _check_settings(base: ExperimentConfig, searched: Space) -> None:
    for key, value, point in searched.extremes():
        try:
            setup.check(with_values(base, point))
        except ConfigError as error:
            raise ConfigError(f"{WHERE}.space.{key}: {value!r} does not work: {error}") from None
    setup.check(base)
    if base.tune_training.searcher == "grid":
        searched.grid(WHERE)
    if base.tune_training.gpu_hours and not _gpus(base.training):
        raise ConfigError(f"{WHERE}.gpu_hours: the trials use no GPU; set time_budget_s instead")


def _check_rows(base: ExperimentConfig) -> None:
    """Refuse a search whose metric cannot be measured on the rows that there are."""
    rows = splits.load_splits(base.data, base.seed, ("train", "validation"))
    setup.check_best(base, rows)
    if "validation" not in rows:
        raise ConfigError(f"{WHERE} compares trials on validation rows; set data.validation or data.validation_size")


def _searchable_keys() -> list[str]:
    keys = list(dotted_keys(ExperimentConfig))
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    return [key for key in leaves if key.startswith(_SEARCHABLE) and key not in _FIXED]


def _trial_config(config: ExperimentConfig) -> tuple[ExperimentConfig, str, str]:
    """(the trials' configuration without the searched values, the journal's name of the metric, its mode)."""
    tuning = config.tune_training
    valid = _searchable_keys()
    overrides = dict(space.flatten(tuning.overrides, valid))
    space.check_keys(overrides, f"{WHERE}.overrides", valid)
    name = tuning.metric.removeprefix("eval_")
    if tuning.metric in _LOSSES:
        metric, best = tuning.metric, "min"
    elif name in get_args(MetricName):
        metric, best = f"eval_{name}", "min" if name in LOWER_IS_BETTER else "max"
        overrides["training.metric_for_best_model"] = name
    else:
        known = ", ".join((*_LOSSES, *get_args(MetricName)))
        raise ConfigError(f"{WHERE}.metric: trials do not report `{tuning.metric}`; they can report {known}")
    if config.training.num_workers == 1:
        # The loop runs in the trial's own process: a worker group for one costs many seconds a trial.
        overrides["training.num_workers"] = 0
    return with_values(config, overrides), metric, tuning.mode or best


def _search_hash(config: ExperimentConfig) -> str:
    """Equal for searches that have the same trials."""
    tuning = config.tune_training.model_dump(
        mode="json", exclude={"max_concurrent_trials", "time_budget_s", "gpu_hours", "then"}
    )
    return fingerprint([trainer.config_hash(config), tuning])


def _concurrency(config: ExperimentConfig) -> int:
    workers = max(1, config.training.max_workers)
    wanted = config.tune_training.max_concurrent_trials
    key = f"{WHERE}: training.num_workers={workers}"
    return search.concurrency(config.training.ray_resources(), wanted, key, workers)


def _audit(base: ExperimentConfig, run: Run, console: Console) -> None:
    """Audit the data once for all trials.

    Raises:
        AuditFailed: it is not fit to be trained on.
    """
    audited = auditing.audit_of(base)
    audited.save(run.folder)
    if not run.resumed:
        auditing.tell(audited.report, console)
    audited.report.check()


def _plan(base: ExperimentConfig, metric: str, run: Run, *, audited: bool) -> TrialPlan:
    """The search's MLflow run is made once, however often the search is gone on with."""
    notes = run.folder / "search.json"
    if not notes.exists():
        tuning = base.tune_training.model_dump(mode="json")
        run_id = tracking.start_run(base.experiment_name, run.name, {WHERE: tuning}, {"heliostat.search": "training"})
        runs.write_atomically(notes, json.dumps({"run_id": run_id}))
    places = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    environment = {**places, **cluster.TRAIN_ENVIRONMENT, "HELIOSTAT_HOME": str(state.folder())}
    run_id = json.loads(notes.read_text())["run_id"]
    return TrialPlan(base, metric, run.folder / "trials", run_id, environment, audited)


@contextlib.contextmanager
def _ended_if_interrupted(run_id: str) -> Iterator[None]:
    """A search that is left early does not look as if it went on; going on with it ends its run anew."""
    try:
        yield
    except BaseException:
        tracking.end_run(run_id, "KILLED")
        raise


def _search(plan: TrialPlan, searched: Space, mode: str, concurrent: int, console: Console) -> list[Trial]:
    tuning, training = plan.config.tune_training, plan.config.training
    notes = plan.folder.parent / NOTES
    known = [json.loads(line)["point"] for line in notes.read_text().splitlines()] if notes.exists() else []

    def note(index: int, point: Point) -> None:
        if index >= len(known):
            with notes.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"index": index, "point": point}) + "\n")

    searcher = PointSearcher(
        searched, tuning, where=WHERE, metric=plan.metric, mode=mode, seed=plan.config.seed, note=note, known=known
    )
    inline = training.num_workers == 0
    finished: list[Trial] = []
    outcomes = search.run(
        TrainingTrial,
        {"plan": plan},
        searcher,
        search.scheduler(
            tuning.scheduler,
            time_attr=PROGRESS,
            max_t=100,
            grace_period=100 * tuning.grace_period,
            reduction_factor=tuning.reduction_factor,
        ),
        resources=training.ray_resources() if inline else _DRIVER,
        concurrent=concurrent,
        time_budget_s=tuning.time_budget_s,
        # Of several workers Ray Train takes care itself.
        max_failures=training.max_failures if inline else 0,
        folder=plan.folder.parent,
        observer=Observer(
            console,
            searcher,
            describe=lambda outcome: _line(plan, outcome, mode),
            ended=lambda outcome: _keep_best(plan, outcome, finished, mode),
        ),
        stop=GpuHours(tuning.gpu_hours, _gpus(training)) if tuning.gpu_hours else None,
    )
    return [_trial(plan, outcome, mode) for outcome in outcomes]


def _keep_best(plan: TrialPlan, outcome: Outcome, finished: list[Trial], mode: str) -> None:
    """Of the trials that finished so far, only the best keeps its weights."""
    if outcome.state == "finished":
        finished.append(_trial(plan, outcome, mode))
        best = _best(finished, mode)
        for trial in finished:
            clear(plan.run_folder(trial.index, trial.point), keep_weights=trial is best)


class GpuHours(tune.Stopper):  # type: ignore[misc]  # Ray has no types
    """Ends the search when its trials have used up the budget."""

    def __init__(self, budget: float, gpus: float) -> None:
        """`gpus` of one trial."""
        self._seconds = budget * 3600 / gpus
        self._used: dict[str, float] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Note what the trial has used; it may go on."""
        self._used[trial_id] = result["seconds"]
        return False

    def stop_all(self) -> bool:
        """Whether the budget is used up."""
        return sum(self._used.values()) >= self._seconds


def _gpus(training: TrainingConfig) -> float:
    """GPUs of one trial."""
    return float(max(1, training.max_workers) * training.ray_resources().get("GPU", 0))


def _trial(plan: TrialPlan, outcome: Outcome, mode: str) -> Trial:
    """What the trial's folder tells: Tune has seen only a part where a search was gone on with."""
    folder = plan.run_folder(outcome.index, outcome.point)
    facts, rows = runs.facts(folder), plan.rows(folder)
    values = [row["metrics"][plan.metric] for row in rows]
    ended = {"trained": "finished", "finished": "finished", "stopped": "stopped"}
    return Trial(
        index=outcome.index,
        point=outcome.point,
        state=ended.get(facts.get("status", ""), outcome.state),  # type: ignore[arg-type]
        value=(min(values) if mode == "min" else max(values)) if values else math.nan,
        curve=tuple((100 * row["step"] / facts["total_steps"], row["metrics"][plan.metric]) for row in rows),
        steps=rows[-1]["step"] if rows else 0,
        seconds=_seconds(folder),
        error=outcome.error,
    )


def _seconds(folder: Path) -> float:
    rows, _ = journal.read(folder / journal.NAME)
    return rows[-1]["time"] - rows[0]["time"] if rows else 0.0


def _line(plan: TrialPlan, outcome: Outcome, mode: str) -> str:
    trial = _trial(plan, outcome, mode)
    point = "  ".join(f"{key}={training_report.shown(value)}" for key, value in trial.point.items())
    return f"trial {trial.index}  {point}  {plan.metric} {trial.value:.4f}  {training_report.ended(trial)}"


def _conclude(plan: TrialPlan, trials: list[Trial], mode: str, run: Run) -> None:
    """Choose the best trial, delete what losers left, log everything; the results are in the search's folder then.

    Raises:
        TrainingError: there is nothing to choose from.
    """
    best = _best(trials, mode)
    if best is None:
        tracking.end_run(plan.parent_run_id, "FAILED")
        errors = [trial.error for trial in trials if trial.error] or ["the budget ended before any trial was evaluated"]
        raise TrainingError(f"none of {len(trials)} trials came to a result; the first error: {errors[0]}")
    for trial in trials:
        clear(plan.run_folder(trial.index, trial.point), keep_weights=trial is best)
    table = training_report.table(trials, best, plan.metric)
    _log(plan, trials, best, table)
    result = {
        "best": best.point,
        "best_trial": best.index,
        "metric": plan.metric,
        "value": best.value,
        "trials": [asdict(trial) for trial in trials],
        "run_id": plan.parent_run_id,
        "folder": str(run.folder),
        "table": table,
    }
    runs.write_atomically(run.folder / RESULTS, json.dumps(result, indent=2))
    run.set_status("trained")


def _best(trials: list[Trial], mode: str) -> Trial | None:
    """Of the trials that were not stopped, if there are any: what a stopped one reached early says little."""
    usable = [trial for trial in trials if not math.isnan(trial.value) and trial.state != "failed"]
    finished = [trial for trial in usable if trial.state == "finished"] or usable
    sign = 1 if mode == "min" else -1
    return min(finished, key=lambda trial: sign * trial.value, default=None)


def _log(plan: TrialPlan, trials: list[Trial], best: Trial, table: str) -> None:
    run_id, metric = plan.parent_run_id, plan.metric
    keys = list(dict.fromkeys(key for trial in trials for key in trial.point))
    figures = {
        "trial_curves": training_report.curves(trials, best, metric),
        "parallel_coordinates": training_report.parallel_coordinates(trials, best, metric),
        **{f"{metric}_against_{key.rpartition('.')[2]}": training_report.against(trials, best, metric, key)
           for key in keys},
    }  # fmt: skip
    for name, figure in figures.items():
        tracking.log_figure(run_id, name, figure)
    tracking.log_text(run_id, "trials.txt", table)
    tracking.log_table(run_id, "trials.json", [_flat(trial, keys, metric) for trial in trials])
    tracking.log_params(run_id, {"best": best.point})
    counts = {
        f"trials_{state}": float(sum(t.state == state for t in trials)) for state in ("finished", "stopped", "failed")
    }
    tracking.log_metrics(run_id, {f"best_{metric}": best.value, **counts, "steps": float(sum(t.steps for t in trials))})
    tracking.end_run(run_id)


def _flat(trial: Trial, keys: list[str], metric: str) -> dict[str, Any]:
    values = {key: trial.point.get(key) for key in keys}
    return {"trial": trial.index, **values, metric: trial.value, "ended": training_report.ended(trial),
            "steps": trial.steps, "seconds": round(trial.seconds, 1)}  # fmt: skip


def _then(
    config: ExperimentConfig, plan: TrialPlan, result: Mapping[str, Any], console: Console
) -> trainer.TrainResult | None:
    """Train with the best values in full; a trial that already did so is registered as it is."""
    if config.tune_training.then != "train":
        return None
    best = result["best"]
    folder = plan.run_folder(result["best_trial"], best)
    complete = not config.tune_training.overrides and runs.facts(folder)["status"] in OVER
    if complete:
        chosen = plan.configure(best)
        return trainer.train(chosen, console, runs.open_folder(folder, trainer.config_hash(chosen)))
    return trainer.train(with_values(config, best), console)
