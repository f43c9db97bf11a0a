"""The driver of a training run: configuration in, registered bundle out. Knows the order of things, not the things."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat import cluster, journal, state
from heliostat import config as configuration
from heliostat.data import audit, prepare, splits
from heliostat.data.packing import PackedDataset
from heliostat.data.tokens import TokenDataset
from heliostat.errors import ConfigError, HeliostatError, TrainingError, UserError
from heliostat.experiment import ExperimentConfig
from heliostat.registry import figures, tracking, versions
from heliostat.training import bundling, checkpoint, runs, setup
from heliostat.training.config import TrainingConfig
from heliostat.training.progress import ProgressBar
from heliostat.training.runs import Run
from heliostat.training.spec import WorkerSpec


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


def train(config: ExperimentConfig, console: Console) -> TrainResult:
    """Train, or go on with an unfinished run of the same configuration; then register the bundle.

    Raises:
        UserError: the input is wrong; nothing is left behind.
        TrainingError: the workers failed; the same command goes on from the last checkpoint.
    """
    setup.check(config)
    storage = Path(config.storage_path) if config.storage_path else state.runs()
    run = runs.open_run(storage.absolute(), config.name, _config_hash(config), config.resume)
    try:
        return _train(config, run, console)
    except UserError:
        if not (run.folder / journal.NAME).exists():
            # The tracker's thread may still be writing there.
            shutil.rmtree(run.folder, ignore_errors=True)
        raise
    finally:
        run.close()


def _config_hash(config: ExperimentConfig) -> str:
    """Equal for configurations that give the same weights, however they are stored, registered or served."""
    same = {"name", "seed", "model", "adapter", "data", "training"}
    return configuration.fingerprint(config.model_dump(mode="json", include=same))


def _train(config: ExperimentConfig, run: Run, console: Console) -> TrainResult:
    rows = splits.load_splits(config.data, config.seed, ("train", "validation"))
    source = setup.load_source(config, rows["train"], run.folder / "init")
    prepared = prepare.prepare(rows, config.data, source.tokenizer, config.seed, state.token_cache())
    _record_data(run, config, prepared, source.tokenizer)
    plan = setup.plan(config, run, source, prepared.splits)
    console.print(f"{'going on with' if run.resumed else 'run'} {run.folder}", highlight=False)
    console.print(str(plan), highlight=False)
    tracker = _tracker(config, run, prepared.manifest)
    with _workers_place(run, config.training):
        tracker.start()
        try:
            if run.status == "running":
                _run_workers(plan.spec, console)
                run.set_status("trained")
            lineage = bundling.lineage(_config_hash(config), prepared.manifest["data_sha256"], run.name)
            bundle = bundling.write(config, run.folder, source, prepared.splits["train"], lineage)
        except BaseException as error:
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", patience=5)
            raise
    return _publish(config, run, bundle, tracker.finish(), prepared.manifest, lineage)


@contextlib.contextmanager
def _workers_place(run: Run, training: TrainingConfig) -> Iterator[None]:
    """Connected to a Ray cluster that has room for the workers, if any are to run there."""
    if training.num_workers == 0 or run.status != "running":
        yield
        return
    with cluster.connected():
        cluster.require(training.ray_resources(), training.num_workers, "training.num_workers")
        yield


def _record_data(run: Run, config: ExperimentConfig, prepared: prepare.Prepared, tokenizer: Any) -> None:
    """Write config.yaml, data.json and data.txt; a resumed run must find the data as it was."""
    before = run.folder / "data.json"
    if before.exists() and json.loads(before.read_text())["cache_key"] != prepared.manifest["cache_key"]:
        raise ConfigError(f"the data changed since {run.folder} was started; resume=never starts a new run")
    (run.folder / "config.yaml").write_text(configuration.dump(config), encoding="utf-8")
    summaries = [
        audit.summary(
            PackedDataset(TokenDataset.open(path), config.data.max_length, packing=config.data.packing), tokenizer
        )
        for path in prepared.splits.values()
    ]
    (run.folder / "data.txt").write_text("\n\n".join(summaries), encoding="utf-8")
    runs.write_atomically(before, json.dumps(prepared.manifest, indent=2))


def _tracker(config: ExperimentConfig, run: Run, manifest: dict[str, Any]) -> tracking.Tracker:
    tags = {"data_sha256": manifest["data_sha256"], "config_hash": _config_hash(config)}
    return tracking.Tracker(run.folder, config.experiment_name, run.name, config.model_dump(mode="json"), tags)


def _run_workers(spec: WorkerSpec, console: Console) -> None:
    with ProgressBar(Path(spec.run_folder) / journal.NAME, spec.total_steps, console):
        if spec.training.num_workers == 0:
            from heliostat.training.worker import LocalSession, Worker

            with LocalSession(spec.checkpoints, spec.training.save_total_limit) as session:
                Worker(spec, session).run()
        else:
            _run_on_ray(spec)
    checkpoint.prune(spec.checkpoints, spec.training.save_total_limit)


def _run_on_ray(spec: WorkerSpec) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from heliostat.training import ray_worker

    training = spec.training
    trainer = TorchTrainer(
        ray_worker.train,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=training.use_gpu,
            resources_per_worker=training.ray_resources(),
        ),
        run_config=RunConfig(
            name=spec.attempt,
            storage_path=str(spec.checkpoints),
            # Only failures to start count for the controller; without a limit it would try for ever.
            failure_config=FailureConfig(max_failures=training.max_failures, controller_failure_limit=5),
            checkpoint_config=CheckpointConfig(num_to_keep=training.save_total_limit),
        ),
    )
    outcome = _fit(trainer)
    if "error" in outcome:
        raise outcome["error"]


def _fit(trainer: Any) -> dict[str, Any]:
    from ray.train import TrainingFailedError

    try:
        return dict(trainer.fit().return_value)
    except TrainingFailedError as error:
        raise TrainingError(
            f"training failed: {_first_cause(error)}; the same command goes on from the last checkpoint"
        ) from error


def _first_cause(error: Exception) -> str:
    """The first worker's own exception, in one line, out of what Ray wraps around it."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank = min(failures)
    lines = str(failures[rank]).strip().splitlines() or [repr(failures[rank])]
    return f"worker {rank}: {lines[-1]}"


def _publish(
    config: ExperimentConfig,
    run: Run,
    bundle: Path,
    run_id: str | None,
    manifest: dict[str, Any],
    lineage: dict[str, Any],
) -> TrainResult:
    """Log what belongs to the finished run and register the bundle."""
    metrics = bundling.final_metrics(run.folder / journal.NAME)
    if run_id is None:
        raise HeliostatError(
            f"the model is trained ({bundle}), but MLflow does not answer, so it is not registered; "
            "give the same command again once it does"
        )
    rows, _ = journal.read(run.folder / journal.NAME)
    tracking.log_figure(run_id, "loss_curves.png", figures.loss_curves(rows, run.name))
    tracking.log_artifacts_of_run(
        run_id, {name: run.folder / name for name in ("config.yaml", "data.json", "data.txt")}
    )
    tracking.log_dataset(run_id, manifest)
    name = config.registered_model_name if config.registry.register_model else None
    version = versions.register(run_id, bundle, name, _version_tags(config, metrics, lineage)) if name else None
    run.set_status("finished")
    return TrainResult(
        run_id=run_id,
        run_folder=str(run.folder),
        bundle=str(bundle),
        model_name=name,
        version=version.version if version else None,
        model_uri=version.uri if version else str(bundle),
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
