"""The driver of a training run: configuration in, registered bundle out. Knows the order of things, not the things."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat import config as configuration
from heliostat import journal, state, storage
from heliostat.data import prepare, splits
from heliostat.errors import ConfigError, HeliostatError
from heliostat.experiment import ExperimentConfig
from heliostat.registry import figures, tracking, versions
from heliostat.training import auditing, bundling, event_files, group, mirror, runs, setup, termination
from heliostat.training.checkpoint_scores import CheckpointScores
from heliostat.training.mirror import Mirror
from heliostat.training.runs import Run
from heliostat.training.setup import Plan, Source


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    run_id: str | None
    """MLflow's run; None if the server was away to the end."""
    run_folder: str
    bundle: str
    model_name: str | None
    version: str | None
    model_uri: str
    """models:/NAME/VERSION, or the bundle folder if the model was not registered."""
    metrics: dict[str, float]


def train(config: ExperimentConfig, console: Console, run: Run | None = None) -> TrainResult:
    """Train, or go on with an unfinished run of the same configuration; then register the bundle.

    `run` names the run to go on with, as a finished trial of a search; its lock is released at the end.

    Raises:
        UserError: the input is wrong; nothing is left behind.
        TrainingError: the workers failed; the same command goes on from the last checkpoint.
    """
    setup.check(config)
    run = run or _open(config)
    tell = partial(console.print, highlight=False, markup=False)
    with runs.released(run, journal.NAME), Mirror(run.folder, config.storage_path, tell) as mirrored:
        job = _prepare(config, run, console)
        console.print(f"{'going on with' if run.resumed else 'run'} {mirrored.place}", highlight=False)
        console.print(str(job.plan), highlight=False)
        with _tracked(config, job, {}) as tracker:
            _run_workers(config, job, console)
            bundle = bundling.write(config, run.folder, job.source, job.tokens["train"], job.lineage)
        result = _publish(config, job, bundle, tracker.finish(), mirrored.place)
        mirrored.sync()
        run.set_status("finished")
        mirrored.sync()
    return result


def _open(config: ExperimentConfig) -> Run:
    if config.storage_path and storage.is_remote(config.storage_path):
        mirror.fetch(config.storage_path, config.name, None if config.resume == "never" else config_hash(config))
    return runs.open_run(mirror.folder_of(config.storage_path), config.name, config_hash(config), config.resume)


def trial(
    config: ExperimentConfig, run: Run, console: Console, *, evaluations: int, tags: Mapping[str, str], audited: bool
) -> None:
    """Train as `train` does, without making a bundle: a trial of a search, with at least `evaluations` evaluations.

    `runs.tell_to_stop` ends it early. `tags` are those of its MLflow run. `audited`: its data was found to be fit.

    Raises:
        As `train`.
    """
    setup.check(config)
    with runs.released(run, journal.NAME):
        job = _prepare(config, run, console, evaluations, audited=audited)
        with _tracked(config, job, tags) as tracker:
            _run_workers(config, job, console)
        tracker.finish()


def config_hash(config: ExperimentConfig) -> str:
    """Equal for configurations that give the same weights, however they are stored, registered or served."""
    same = {"name", "seed", "model", "adapter", "data", "training"}
    without = {"data": {"audit", "preprocessing_num_workers"}, "training": {"report_to"}}
    return configuration.fingerprint(config.model_dump(mode="json", include=same, exclude=without))


@dataclass(frozen=True)
class _Job:
    """A run that is ready to train."""

    run: Run
    source: Source
    tokens: dict[str, Path]
    manifest: dict[str, Any]
    plan: Plan
    lineage: dict[str, Any]


def _prepare(
    config: ExperimentConfig, run: Run, console: Console, evaluations: int = 1, *, audited: bool = False
) -> _Job:
    rows = splits.load_splits(config.data, config.seed)
    setup.check_best(config, rows)
    source = setup.load_source(config, rows["train"], run.folder / "init")
    data = (rows, source.data(config.data), source.tokenizer, config.seed)
    look = None if audited else auditing.look(*data)
    prepared = look.prepared if look else prepare.prepare(*data, state.token_cache())
    _record_data(run, config, prepared.manifest)
    if look:
        look.save(run.folder)
        if not run.resumed:
            auditing.tell(look.report, console)
        look.report.check()
    plan = setup.plan(config, run, source, prepared.splits, evaluations)
    run.note(total_steps=plan.spec.total_steps)
    lineage = bundling.lineage(config_hash(config), prepared.manifest["data_sha256"], run.name)
    return _Job(run, source, prepared.splits, prepared.manifest, plan, lineage)


def _record_data(run: Run, config: ExperimentConfig, manifest: Mapping[str, Any]) -> None:
    """Write config.yaml and data.json; a resumed run must find the data as it was."""
    before = run.folder / "data.json"
    if before.exists() and json.loads(before.read_text())["cache_key"] != manifest["cache_key"]:
        raise ConfigError(f"the data changed since {run.folder} was started; resume=never starts a new run")
    (run.folder / "config.yaml").write_text(configuration.dump(config), encoding="utf-8")
    runs.write_atomically(before, json.dumps(manifest, indent=2))


@contextlib.contextmanager
def _tracked(config: ExperimentConfig, job: _Job, tags: Mapping[str, str]) -> Iterator[tracking.Tracker]:
    """An MLflow run that follows the journal, and is ended here if the work inside fails."""
    facts = {"data_sha256": job.manifest["data_sha256"], "config_hash": config_hash(config), **tags}
    params = config.model_dump(mode="json", exclude={"tune_training", "tune_decoding"})
    tracker = tracking.Tracker(job.run.folder, config.experiment_name, job.run.name, params, facts)
    with group.place(config.training) if job.run.status == "running" else contextlib.nullcontext():
        tracker.start()
        try:
            with termination.ending(), event_files.following(config.training.report_to, job.run.folder):
                yield tracker
        except BaseException as error:
            # Ray Train makes a SystemExit of Ctrl-C, and `termination` one of SIGTERM.
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            tracker.finish("KILLED" if stopped else "FAILED", patience=5)
            raise


def _run_workers(config: ExperimentConfig, job: _Job, console: Console) -> None:
    if job.run.status != "running":
        return
    if config.training.chosen_by_task:
        with CheckpointScores(config, job.run.folder, job.source, job.tokens["train"], job.lineage) as scores:
            group.run(job.plan.spec, console)
        if not job.run.told_to_stop:
            scores.choose()
    else:
        group.run(job.plan.spec, console)
    job.run.set_status("stopped" if job.run.told_to_stop else "trained")


def _publish(config: ExperimentConfig, job: _Job, bundle: Path, run_id: str | None, place: str) -> TrainResult:
    """Log what belongs to the finished run, which is kept at `place`, and register the bundle."""
    run = job.run
    metrics = bundling.final_metrics(run.folder)
    if run_id is None:
        raise HeliostatError(
            f"the model is trained ({bundle}), but MLflow does not answer, so it is not registered; "
            "give the same command again once it does"
        )
    rows, _ = journal.read(run.folder / journal.NAME)
    tracking.log_figure(run_id, "loss_curves", figures.loss_curves(rows, run.name))
    tracking.log_artifacts_of_run(
        run_id, {name: run.folder / name for name in ("config.yaml", "data.json", *auditing.FILES)}
    )
    tracking.log_dataset(run_id, job.manifest)
    name = config.registered_model_name if config.registry.register_model else None
    version = versions.register(run_id, bundle, name, _version_tags(config, metrics, job.lineage)) if name else None
    kept = f"{place}/{bundle.name}"
    return TrainResult(
        run_id=run_id,
        run_folder=place,
        bundle=kept,
        model_name=name,
        version=version.version if version else None,
        model_uri=version.uri if version else kept,
        metrics=metrics,
    )


def _version_tags(config: ExperimentConfig, metrics: dict[str, float], lineage: dict[str, Any]) -> dict[str, str]:
    facts = {
        **{key: lineage[key] for key in ("run", "config_hash", "data_hash", "git_commit")},
        "base_model": config.model.model_name_or_path,
        "base_revision": config.model.revision,
        "method": config.adapter.method,
        "decoding": configuration.fingerprint(config.generation),
        **{
            f"metric.{name}": f"{metrics[name]:.6g}"
            for name in ("loss", "eval_loss", "eval_perplexity")
            if name in metrics
        },
    }
    return {key: str(value) for key, value in facts.items() if value is not None}
