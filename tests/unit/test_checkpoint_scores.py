"""The final model is the checkpoint that answers best, wherever its validation loss is; nothing else is left of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heliostat import journal
from heliostat.data import splits
from heliostat.errors import ConfigError
from heliostat.evaluation import evaluator, metrics
from heliostat.experiment import ExperimentConfig
from heliostat.models import base
from heliostat.training import trainer
from heliostat.training.checkpoint_scores import EXPORTS, SCORES
from tests import tiny


def configured(folder: Path, model: Path, **training: Any) -> ExperimentConfig:
    rows = [{"prompt": text, "completion": " " + text[4:11]} for text in tiny.TEXTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ExperimentConfig.model_validate(
        {
            "name": "x",
            "model": {"model_name_or_path": str(model)},
            "data": {"train": str(folder / "rows.jsonl"), "format": "prompt_completion", "max_length": 64,
                     "validation_size": 10},
            "training": {"num_workers": 0, "max_steps": 24, "eval_steps": 6, "per_device_train_batch_size": 4,
                         "learning_rate": 5e-3, "metric_for_best_model": "token_f1", **training},
            "generation": {"max_new_tokens": 8},
            "registry": {"register_model": False},
        }
    )  # fmt: skip


def test_the_best_answers_win(tmp_path: Path, tiny_bundle: Path) -> None:
    config = configured(tmp_path, tiny_bundle)
    result = trainer.train(config, Console(quiet=True))
    run = Path(result.run_folder)
    rows, _ = journal.read(run / SCORES)
    scores = {row["step"]: row["metrics"]["eval_token_f1"] for row in rows}
    assert list(scores) == [6, 12, 18, 24], "every evaluation was scored"
    assert max(scores.values()) > min(scores.values()), "there was something to choose"

    loaded = base.load_for_inference(result.bundle)
    validation = splits.load_splits(config.data, config.seed, ("validation",))["validation"]
    examples = evaluator.predict(loaded, validation, config.data, config.generation, batch_size=16)
    (metric,) = metrics.build(["token_f1"])
    assert metrics.score(metric, metric.statistics(examples)) == max(scores.values())

    logged = {row["step"]: row["metrics"].get("eval_token_f1") for row in journal.read(run / journal.NAME)[0]}
    assert {step: logged[step] for step in scores} == scores, "the run's journal, which MLflow follows, has them too"
    assert not (run / EXPORTS).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_size": 0}, "training.metric_for_best_model=token_f1 needs validation rows; set data.validation"),
        ({"format": "text", "columns": {"text": "prompt"}}, "compares answers, which `format: text` has none of"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    tmp_path: Path, tiny_bundle: Path, change: dict[str, Any], message: str
) -> None:
    config = configured(tmp_path, tiny_bundle)
    changed = config.model_copy(update={"data": config.data.model_copy(update=change)})
    with pytest.raises(ConfigError, match=message):
        trainer.train(changed, Console(quiet=True))
