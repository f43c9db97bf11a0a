"""`heliostat evaluate`: score a model beside a baseline, and record the scores on its registered version."""

import hashlib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import GenerationConfig

from heliostat.config import fingerprint
from heliostat.data import splits
from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import DataError, RegistryError
from heliostat.evaluation import actors, evaluator, questions
from heliostat.evaluation import predictions as prediction_files
from heliostat.evaluation.config import GenerationSettings
from heliostat.evaluation.evaluator import Decoding, Runner, Scores, Source
from heliostat.evaluation.metrics import Example
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.experiment import ExperimentConfig
from heliostat.models import bundle
from heliostat.registry import figures, tracking, versions
from heliostat.registry.versions import ResolvedModel

PREDICTIONS = "predictions.json"
"""The artifact of an evaluation's run: a table that MLflow shows."""


def score(
    config: ExperimentConfig,
    reference: str | None,
    console: Console,
    predictions: str | None = None,
    decoding: Mapping[str, Any] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """Score `reference` (default: the config's challenger) on the config's test split.

    A bundle decodes as it would when served, by its own settings, with those of `decoding` on top; any other model by
    the config's `generation` section.

    Each call is an MLflow run named `evaluation` with the scores and the predictions, below the run of the version.
    `predictions` names a .jsonl, .csv or .parquet file that gets the predictions too.

    Returns {"model", "n", every metric by name, "intervals": {metric: [low, high]}, "unscored": {metric: rows without a
    score}, "groups", "labels": {label: {"precision", "recall", "f1", "n"}} of a classifier, "run_id", "baseline": the
    same of the baseline or None}.

    Raises:
        UserError: the model, the data or the configuration is wrong.
    """
    if predictions:
        prediction_files.check(Path(predictions))
    reference = reference or f"models:/{config.registered_model_name}@challenger"
    rows = _test_rows(config)
    prefix = _few_shot(config)
    resolved = versions.resolve(reference)
    baseline = _baseline(config, resolved)
    with actors.connection(config.evaluation):
        with actors.runner(Source(resolved.path), config.evaluation) as runner:
            settings: Decoding = _decoding(config, resolved.path, decoding)
            scores = _evaluate(config, runner, rows, settings, prefix, console, reference)
            chat_template = runner.chat_template
        result = {"model": reference, **_flat(scores), "baseline": None}
        if baseline is not None:
            # It reads chats by the evaluated model's template.
            source = Source(baseline.path, baseline.untrained_seed, chat_template)
            with actors.runner(source, config.evaluation) as runner:
                trained = baseline.untrained_seed is None
                settings = _decoding(config, baseline.path, decoding) if trained else config.generation
                beside = _flat(_evaluate(config, runner, rows, settings, prefix, console, "baseline"))
            result["baseline"] = {"model": config.evaluation.baseline, **beside}
    if predictions:
        prediction_files.write(Path(predictions), list(_predictions(scores)))
    if resolved.name and resolved.version:
        versions.log_evaluation(resolved.name, resolved.version, scores.metrics, data=_digest(rows, config))
    return result | {"run_id": _log_run(config, reference, resolved, scores, console)}


def table(result: dict[str, Any]) -> str:
    """The scores as lines of text, each with its interval, the baseline's beside them."""
    baseline = result["baseline"] or {}
    lines = [f"{result['model']} on {result['n']} examples"]
    for name in _metrics(result):
        beside = f"   {baseline['model']}: {_cell(baseline, name)}" if name in baseline else ""
        lines.append(f"  {name:<16} {_cell(result, name)}{beside}")
    lines += [f"  {name:<16} {count} examples have no score" for name, count in result["unscored"].items()]
    lines += [f"  {group:<24} {s['exact_match']:.3f}  (n={s['n']})" for group, s in result["groups"].items()]
    lines += [
        f"  {label:<24} precision {s['precision']:.3f}  recall {s['recall']:.3f}  f1 {s['f1']:.3f}  (n={s['n']})"
        for label, s in result["labels"].items()
    ]
    return "\n".join(lines)


def data_digest(rows: Sequence[Row], data: DataConfig) -> str:
    """A hash of what scores are measured on: the rows, and how they become prompts and references.

    Scores of two models may be compared where it is equal. Files' names, other splits and decoding are no part of it.
    """
    read_as = data.model_dump(
        include={"format", "columns", "prompt_template", "completion_template", "train_on_inputs", "max_length"}
        | {"excess_length_strategy"}
    )
    return fingerprint([read_as, [hashlib.sha256(row.content()).hexdigest() for row in rows]])


def _digest(rows: Sequence[Row], config: ExperimentConfig) -> str:
    """`data_digest`, and how answers were asked for where it is not by generation from the prompt alone."""
    asked = config.evaluation.model_dump(include={"scoring", "length_normalization", "few_shot"}, exclude_defaults=True)
    digest = data_digest(rows, config.data)
    return fingerprint([digest, asked]) if asked else digest


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if isinstance(value, float)}


def _cell(result: dict[str, Any], name: str) -> str:
    low_high = result["intervals"].get(name)
    return f"{result[name]:.4f}" + (f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else "")


def _flat(scores: Scores) -> dict[str, Any]:
    intervals = {name: [interval.low, interval.high] for name, interval in scores.intervals.items()}
    return {
        "n": scores.n,
        **scores.metrics,
        "intervals": intervals,
        "unscored": scores.unscored,
        "groups": scores.groups,
        "labels": scores.confusion.per_label() if scores.confusion else {},
    }


def _test_rows(config: ExperimentConfig) -> list[Row]:
    rows = splits.load_splits(config.data, config.seed, ("test",)).get("test")
    if rows is None:
        raise DataError("there is no test split; set data.test to a file, or data.test_size to a part of data.train")
    return list(rows)


def _few_shot(config: ExperimentConfig) -> PromptPrefix | None:
    """The worked examples that the config asks for; None is the bundle's own prefix."""
    count = config.evaluation.few_shot
    if not count:
        return None
    rows = splits.load_splits(config.data, config.seed, ("train",)).get("train", [])
    return questions.few_shot(rows, config.data, count, config.seed)


def _decoding(config: ExperimentConfig, path: str, changes: Mapping[str, Any]) -> GenerationConfig | GenerationSettings:
    """How the model at `path` decodes."""
    if not all((Path(path) / name).exists() for name in (bundle.MANIFEST, bundle.GENERATION_CONFIG)):
        return config.generation
    return GenerationConfig.from_dict({**GenerationConfig.from_pretrained(path).to_dict(), **changes})


def _evaluate(
    config: ExperimentConfig,
    runner: Runner,
    rows: list[Row],
    decoding: Decoding,
    prefix: PromptPrefix | None,
    console: Console,
    what: str,
) -> Scores:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"evaluating {what}", total=len(rows))
        return evaluator.evaluate(
            runner,
            rows,
            config.data,
            decoding,
            config.evaluation,
            prefix=prefix,
            advance=lambda done: bar.advance(task, done),
        )


def _baseline(config: ExperimentConfig, evaluated: ResolvedModel) -> Source | None:
    reference = config.evaluation.baseline
    if reference is None:
        return None
    if reference == "base" and config.model.scratch:
        return Source(evaluated.path, untrained_seed=config.seed)
    if reference == "base":
        reference = str(config.model.model_name_or_path)
    return Source(versions.resolve(reference).path)


def _log_run(
    config: ExperimentConfig, reference: str, resolved: ResolvedModel, scores: Scores, console: Console
) -> str | None:
    """The id of the new run; None if the store takes none, which costs the user no score."""
    try:
        return _create_run(config, reference, resolved, scores)
    except RegistryError as error:
        console.print(str(error), markup=False, highlight=False)
        return None


def _create_run(config: ExperimentConfig, reference: str, resolved: ResolvedModel, scores: Scores) -> str:
    tags = {"heliostat.model": reference}
    if resolved.name and resolved.version:
        version = versions.get_version(resolved.name, resolved.version)
        tags = {"heliostat.model": version.uri, "mlflow.parentRunId": version.run_id or ""}
    run_id = tracking.start_run(config.experiment_name, "evaluation", {}, tags)
    tracking.log_metrics(run_id, scores.metrics)
    tracking.log_table(run_id, PREDICTIONS, list(_predictions(scores)))
    if scores.confusion:
        figure = figures.confusion_matrix(scores.confusion.labels, scores.confusion.counts, reference)
        tracking.log_figure(run_id, "confusion_matrix", figure)
    tracking.end_run(run_id)
    return run_id


def _predictions(scores: Scores) -> Iterator[dict[str, Any]]:
    for index, example in enumerate(scores.examples):
        marks = {name: values[index] for name, values in scores.per_example.items()}
        yield {
            "prompt": example.prompt,
            "reference": example.reference,
            "prediction": example.prediction,
            **_probabilities(example),
            **{name: None if math.isnan(mark) else mark for name, mark in marks.items()},
        }


def _probabilities(example: Example) -> dict[str, dict[str, float]]:
    return {"probabilities": dict(example.probabilities)} if example.probabilities else {}
