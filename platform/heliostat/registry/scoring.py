"""`heliostat evaluate`: score a model beside a baseline, and record the scores on its registered version."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from heliostat.data import splits
from heliostat.data.records import Row
from heliostat.errors import DataError
from heliostat.evaluation import evaluator
from heliostat.evaluation.evaluator import Scores
from heliostat.experiment import ExperimentConfig
from heliostat.models import base
from heliostat.models.base import InferenceModel
from heliostat.registry import versions


def score(
    config: ExperimentConfig, reference: str | None, console: Console, predictions: str | None = None
) -> dict[str, Any]:
    """Score `reference` (default: the config's challenger) on the config's test split.

    Returns {"model", "n", every metric by name, "groups", "baseline": the same of the baseline or None}. `predictions`
    names a file that gets one JSON line for each row.

    Raises:
        UserError: the model, the data or the configuration is wrong.
    """
    reference = reference or f"models:/{config.registered_model_name}@challenger"
    rows = _test_rows(config)
    resolved = versions.resolve(reference)
    loaded = base.load_for_inference(resolved.path)
    scores = _evaluate(config, loaded, rows, console, reference)
    baseline = _baseline(config, loaded)
    result = {"model": reference, **_flat(scores), "baseline": None}
    if baseline is not None:
        result["baseline"] = {
            "model": config.evaluation.baseline,
            **_flat(_evaluate(config, baseline, rows, console, "baseline")),
        }
    if predictions:
        _write_predictions(Path(predictions), scores)
    if resolved.name and resolved.version:
        versions.log_evaluation(resolved.name, resolved.version, scores.metrics)
    return result


def table(result: dict[str, Any]) -> str:
    """The scores as lines of text, the baseline's beside them."""
    baseline = result["baseline"] or {}
    lines = [f"{result['model']} on {result['n']} examples"]
    for name, value in _metrics(result).items():
        beside = f"   {baseline['model']}: {baseline[name]:.4f}" if name in baseline else ""
        lines.append(f"  {name:<16} {value:.4f}{beside}")
    lines += [f"  {group:<24} {s['exact_match']:.3f}  (n={s['n']})" for group, s in result["groups"].items()]
    return "\n".join(lines)


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if isinstance(value, float)}


def _flat(scores: Scores) -> dict[str, Any]:
    return {"n": scores.n, **scores.metrics, "groups": scores.groups}


def _test_rows(config: ExperimentConfig) -> list[Row]:
    rows = splits.load_splits(config.data, config.seed, ("test",)).get("test")
    if rows is None:
        raise DataError("there is no test split; set data.test to a file, or data.test_size to a part of data.train")
    return rows


def _evaluate(config: ExperimentConfig, loaded: InferenceModel, rows: list[Row], console: Console, what: str) -> Scores:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"evaluating {what}", total=len(rows))
        return evaluator.evaluate(
            evaluator.Local(loaded),
            rows,
            config.data,
            config.generation,
            config.evaluation,
            advance=lambda done: bar.advance(task, done),
        )


def _baseline(config: ExperimentConfig, loaded: InferenceModel) -> InferenceModel | None:
    """The baseline model, reading chats by the evaluated model's template."""
    reference = config.evaluation.baseline
    if reference is None:
        return None
    if reference == "base" and config.model.scratch:
        return base.load_untrained(loaded.path, seed=config.seed)
    if reference == "base":
        reference = str(config.model.model_name_or_path)
    baseline = base.load_for_inference(versions.resolve(reference).path)
    baseline.tokenizer.chat_template = loaded.tokenizer.chat_template
    return baseline


def _write_predictions(path: Path, scores: Scores) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for example in scores.examples:
            line = {"prompt": example.prompt, "reference": example.reference, "prediction": example.prediction}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.rename(temporary, path)
