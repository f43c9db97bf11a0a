"""`heliostat tune-decoding`: which decoding settings a model should have. Nothing is trained.

Settings race on rows of the validation split (`decoding_trial`); the best is then compared with greedy decoding on
other rows of it, and replaces it only if the gain cannot be chance. What is chosen becomes a version of the model that
differs in its decoding settings alone.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from rich.console import Console

from heliostat import cluster
from heliostat import config as configuration
from heliostat.config import fingerprint
from heliostat.errors import HeliostatError
from heliostat.evaluation import bootstrap, metrics
from heliostat.evaluation.bootstrap import Term
from heliostat.evaluation.metrics import Floats
from heliostat.evaluation.prefix import KEY as PREFIX_KEY
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.experiment import ExperimentConfig
from heliostat.models import bundle
from heliostat.registry import tracking, versions
from heliostat.registry.versions import ModelVersion
from heliostat.training import mirror, runs
from heliostat.training.runs import Run, write_atomically
from heliostat.tuning import decoding_plan, decoding_report, search
from heliostat.tuning.decoding_plan import Plan
from heliostat.tuning.decoding_report import Comparison, Entry
from heliostat.tuning.decoding_settings import SECTION, Setting
from heliostat.tuning.decoding_trial import (
    PROMPTS,
    SCORE,
    SECONDS,
    STATISTICS,
    TOKENS,
    DecodingTrial,
    Generator,
    Measured,
)  # fmt: skip
from heliostat.tuning.reports import ERROR
from heliostat.tuning.search import Outcome
from heliostat.tuning.searcher import PointSearcher

# Smaller than any difference between two scores, even times the number of trials.
_TRIFLE = 1e-9
CONCURRENCY_KEY = "tune_decoding.resources_per_trial"


def tune_decoding(config: ExperimentConfig, reference: str | None, console: Console) -> dict[str, Any]:
    """Search decoding settings for `reference` (default: the config's challenger), and register what is chosen.

    Returns {"model", "version", "model_uri", "bundle", "settings", "kept_greedy", "metric", "score", "greedy_score",
    "gain", "interval", "trials", "stopped", "failed", "seconds", "run_id", "folder", "table", "verdict"}; "version" is
    None where no new one was registered, "bundle" where no new one was written. Score, greedy_score and gain are those
    on the held-out prompts, the score that of the chosen settings.

    Raises:
        UserError: the model, the data or the configuration is wrong.
        HeliostatError: no setting could be tried.
    """
    reference = reference or f"models:/{config.registered_model_name}@challenger"
    mirror.refuse(config.storage_path)
    made = decoding_plan.prepare(config, reference)
    for note in made.notes:
        console.print(note, highlight=False, markup=False)
    storage = mirror.folder_of(config.storage_path)
    run = runs.open_run(storage, f"{config.name}-decoding", fingerprint(config), "never")
    write_atomically(run.folder / "config.yaml", configuration.dump(config))
    parameters = {
        "model": reference,
        "seed": config.seed,
        "tune_decoding": config.tune_decoding.model_dump(mode="json"),
    }
    run_id = tracking.start_run(config.experiment_name, run.name, parameters, {"heliostat.kind": "decoding search"})
    try:
        result = _search(made, reference, run, run_id, console)
    except BaseException:
        tracking.end_run(run_id, "FAILED")
        raise
    finally:
        run.close()
    tracking.end_run(run_id)
    return result


def show(result: Mapping[str, Any]) -> str:
    """The result for people."""
    where = result["model_uri"] or result["bundle"]
    new = f"{where} has the chosen settings" if where else "the model has these settings already: no new version"
    return "\n".join([result["table"], result["verdict"], f"{json.dumps(result['settings'], ensure_ascii=False)}", new])


def race(plan: Plan, folder: Path, concurrent: int, console: Console) -> list[Outcome]:
    """Try the settings with Ray Tune; what cannot win any more is stopped early, but none of the fixed points.

    Args:
        folder: where Tune's files and the notes go.
        concurrent: trials at a time.

    Raises:
        HeliostatError: all trials failed, or greedy decoding did; with its reason.
    """
    section, metric, task = plan.config.tune_decoding, plan.metric, plan.task
    mode = "max" if metric.greater_is_better else "min"
    notes = folder / "trials.jsonl"
    searcher = PointSearcher(
        plan.space, section, where=SECTION, metric=SCORE, mode=mode, seed=plan.config.seed,
        note=lambda index, point: _append(notes, {"index": index, "point": point}), fixed=plan.fixed,
    )  # fmt: skip
    observer = search.Observer(console, searcher, describe=lambda outcome: decoding_report.line(_entry(plan, outcome)))
    scheduler = Race(
        len(plan.fixed), time_attr=PROMPTS, max_t=task.rungs[-1], grace_period=task.rungs[0],
        reduction_factor=section.reduction_factor,
    )  # fmt: skip
    outcomes = search.run(
        DecodingTrial, {"task": task, "rows": plan.rows}, searcher, scheduler, resources=section.resources_per_trial,
        concurrent=concurrent,
        time_budget_s=section.time_budget_s, max_failures=1, folder=folder, observer=observer,
    )  # fmt: skip
    _check(outcomes)
    return outcomes


class Race(AsyncHyperBandScheduler):  # type: ignore[misc]  # Ray has no types
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) that stops none of the first `exempt` trials:
    what all others are measured by must come to its end.
    """

    def __init__(self, exempt: int, **options: Any) -> None:
        super().__init__(**options)
        self._exempt = exempt

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        decision = super().on_trial_result(tune_controller, trial, self._ranked(trial, result))
        return TrialScheduler.CONTINUE if trial.config["index"] < self._exempt else str(decision)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial is over; one that failed has no score to measure others by."""
        if ERROR in result:
            self.on_trial_remove(tune_controller, trial)
        else:
            super().on_trial_complete(tune_controller, trial, self._ranked(trial, result))

    def _ranked(self, trial: Any, result: dict[str, Any]) -> dict[str, Any]:
        """The result with a score that is a trifle worse for later trials, as `select` prefers earlier ones.

        On few prompts many scores are equal, and none of those would be stopped.
        """
        trifle = _TRIFLE * trial.config["index"] * max(1.0, abs(result[SCORE]))
        return {**result, SCORE: result[SCORE] - self._metric_op * trifle}


def select(outcomes: Sequence[Outcome], constraints: Mapping[str, float], *, greater_is_better: bool) -> Outcome | None:
    """The best of those that saw all prompts and keep to the limits of tokens and seconds; of equals the earliest."""
    feasible = [
        outcome
        for outcome in outcomes
        if outcome.state == "finished" and all(outcome.results[-1][key] <= most for key, most in constraints.items())
    ]
    sign = 1 if greater_is_better else -1
    return max(feasible, key=lambda outcome: (sign * outcome.results[-1][SCORE], -outcome.index), default=None)


def compare(plan: Plan, winner: Setting | None, concurrent: int) -> Comparison:
    """The winner of the race (None: greedy itself) against greedy decoding on the held-out rows, on actors again.

    A winner that samples is measured with several seeds; its statistics are averaged for each prompt.
    """
    section, metric = plan.config.tune_decoding, plan.metric
    first_seed = plan.task.seed + len(plan.rows)  # the race used those before it
    jobs = [(plan.task.setting(plan.fixed[0]), first_seed)]
    if winner is not None:
        seeds = section.num_seeds if winner.generation.do_sample else 1
        jobs += [(winner, first_seed + number) for number in range(seeds)]
    greedy, *found = [measured.statistics for measured in _measure(plan, jobs, concurrent)]
    best: Floats = sum(found[1:], found[0]) / len(found) if found else greedy
    term = Term(1.0 if metric.greater_is_better else -1.0, metric, best, greedy)
    gain, interval = bootstrap.paired_gain([term], confidence=section.confidence, seed=plan.config.seed)
    score, greedy_score = (metrics.score(metric, statistics) for statistics in (best, greedy))
    return Comparison(metric.name, len(plan.holdout), score, greedy_score, gain, interval)


def _search(plan: Plan, reference: str, run: Run, run_id: str, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    section = plan.config.tune_decoding
    greater = plan.metric.greater_is_better
    with cluster.connected():
        resources, wanted = section.resources_per_trial, section.max_concurrent_trials
        concurrent = search.concurrency(resources, wanted, CONCURRENCY_KEY)
        outcomes = race(plan, run.folder, concurrent, console)
        best = select(outcomes, section.constraints, greater_is_better=greater)
        winner = plan.task.setting(best.point) if best and best.index else None
        comparison = compare(plan, winner, concurrent)
    kept_greedy = winner is None or not comparison.significant
    chosen = plan.task.setting(plan.fixed[0]) if kept_greedy else winner
    assert chosen is not None
    entries = [_entry(plan, outcome) for outcome in outcomes]
    name = decoding_report.label(entries[best.index]) if best and best.index else ""
    result: dict[str, Any] = {
        "model": reference,
        "settings": chosen.summary(),
        "kept_greedy": kept_greedy,
        "metric": comparison.metric,
        "score": comparison.greedy_score if kept_greedy else comparison.score,
        "greedy_score": comparison.greedy_score,
        "gain": comparison.gain,
        "interval": [comparison.interval.low, comparison.interval.high],
        "trials": len(outcomes),
        "stopped": sum(outcome.state == "stopped" for outcome in outcomes),
        "failed": sum(outcome.state == "failed" for outcome in outcomes),
        "run_id": run_id,
        "folder": str(run.folder),
        "verdict": decoding_report.verdict(comparison, name),
        "table": decoding_report.table(entries, greater),
    }
    write_atomically(
        run.folder / "results.json", json.dumps({**result, "entries": [e.row() for e in entries]}, indent=2)
    )
    _log(plan, run_id, result, comparison, entries, 0 if kept_greedy or best is None else best.index)
    result |= _publish(plan, run, run_id, chosen, result)
    run.set_status("finished")
    return result | {"seconds": time.monotonic() - started}


def _check(outcomes: Sequence[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed and len(failed) == len(outcomes):
        raise HeliostatError(f"all {len(failed)} settings failed; the first: {failed[0].error}")
    if failed and failed[0].index == 0:
        raise HeliostatError(f"greedy decoding failed, so there is nothing to compare with: {failed[0].error}")


def _measure(plan: Plan, jobs: Sequence[tuple[Setting, int]], concurrent: int) -> list[Measured]:
    """Measure (setting, seed) on the held-out rows, side by side where that fits."""
    options = cluster.actor_options(plan.config.tune_decoding.resources_per_trial)
    count = min(len(jobs), concurrent)
    task, rows = ray.put(plan.task), ray.put(plan.holdout)
    actors = [ray.remote(Generator).options(**options).remote(task) for _ in range(count)]
    try:
        results = [
            actors[number % count].measure.remote(setting, rows, seed) for number, (setting, seed) in enumerate(jobs)
        ]
        found: list[Measured] = ray.get(results)
    finally:
        for actor in actors:
            ray.kill(actor)
    return found


def _entry(plan: Plan, outcome: Outcome) -> Entry:
    """The trial for the report."""
    names = (decoding_report.GREEDY, decoding_report.OWN)
    name = names[outcome.index] if outcome.index < len(plan.fixed) else ""
    settings = plan.task.setting(outcome.point).summary()
    if not outcome.results or outcome.state == "failed":
        return Entry(outcome.index, name, settings, outcome.state, error=outcome.error)
    last = outcome.results[-1]
    confidence = plan.config.tune_decoding.confidence
    interval = bootstrap.interval(plan.metric, last[STATISTICS], confidence=confidence, seed=plan.config.seed)
    return Entry(
        outcome.index, name, settings, outcome.state, last[PROMPTS], last[SCORE], interval, last[TOKENS], last[SECONDS]
    )


def _append(path: Path, value: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def _log(
    plan: Plan, run_id: str, result: Mapping[str, Any], comparison: Comparison, entries: Sequence[Entry], chosen: int
) -> None:
    """Metrics, the table and the figures of the search to its MLflow run."""
    section, metric = plan.config.tune_decoding, plan.metric
    tracking.log_metrics(
        run_id,
        {
            "greedy_score": comparison.greedy_score,
            "winner_score": comparison.score,
            "gain": comparison.gain,
            "gain_low": comparison.interval.low,
            "gain_high": comparison.interval.high,
        },
    )
    tracking.log_table(run_id, "decoding_search.json", [entry.row() for entry in entries])
    tracking.log_text(run_id, "verdict.txt", result["verdict"])
    title = f"{plan.config.name}: decoding settings on {len(plan.rows)} prompts"
    greater = metric.greater_is_better
    scores = decoding_report.score_figure(entries, metric.name, greater_is_better=greater, chosen=chosen, title=title)
    tracking.log_figure(run_id, "decoding_scores", scores)
    for cost in ("tokens", "seconds"):
        limit = section.constraints.get(cost)
        figure = decoding_report.cost_figure(entries, metric.name, cost=cost, limit=limit, chosen=chosen, title=title)
        tracking.log_figure(run_id, f"decoding_{cost}", figure)


def _publish(plan: Plan, run: Run, run_id: str, chosen: Setting, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write and register the bundle with the chosen settings, unless the model has them already."""
    if chosen.same_as(plan.own):
        return {"version": None, "model_uri": None, "bundle": None}
    decoding = {
        "search": run.name, "run_id": run_id, "settings": result["settings"], "metric": result["metric"],
        "score": result["score"], "gain": result["gain"], "interval": result["interval"],
    }  # fmt: skip
    prefix = chosen.prefix.manifest() if chosen.prefix != PromptPrefix() else None
    made = bundle.derive(
        Path(plan.model.path),
        run.folder / "bundle",
        generation_config=chosen.generation_config(plan.generation_config),
        changes={"decoding": decoding, PREFIX_KEY: prefix},
    )
    version = _register(plan, run_id, made, result)
    found = (version.version, version.uri) if version else (None, None)
    return {"version": found[0], "model_uri": found[1], "bundle": str(made)}


def _register(plan: Plan, run_id: str, made: Path, result: Mapping[str, Any]) -> ModelVersion | None:
    name, parent = plan.model.name, plan.model.version
    if name is None or parent is None:
        return None
    tags = {
        "decoding": json.dumps(result["settings"], ensure_ascii=False),
        "decoding_parent": parent,
        "decoding_score": repr(result["score"]),
        "decoding_gain": repr(result["gain"]),
        "decoding_interval": json.dumps(result["interval"]),
        "metric": result["metric"],
    }
    return versions.register(run_id, made, name, tags, shares=versions.get_version(name, parent))
