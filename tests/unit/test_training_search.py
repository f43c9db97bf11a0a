"""What a training search refuses before anything starts, and what its trials have in common."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heliostat import experiment, state
from heliostat.data import splits
from heliostat.errors import ConfigError
from heliostat.evaluation import evaluator, metrics
from heliostat.evaluation.config import LOWER_IS_BETTER, EvaluationConfig
from heliostat.evaluation.evaluator import Local
from heliostat.experiment import ExperimentConfig
from heliostat.models import base
from heliostat.training import auditing, runs, trainer
from heliostat.tuning import training_search
from heliostat.tuning.reports import FINISHED
from heliostat.tuning.training_search import GpuHours
from heliostat.tuning.training_trial import TrainingTrial, TrialPlan, with_values
from tests import tiny

SPACE = {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}


def configured(folder: Path, model: Path, tuning: dict[str, Any], **sections: Any) -> ExperimentConfig:
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "completion": " x"}) + "\n" for text in tiny.TEXTS[:12]))
    return ExperimentConfig.model_validate(
        {
            "name": "x",
            "model": {"model_name_or_path": str(model)},
            "data": {"train": str(data), "format": "prompt_completion", "max_length": 64, "validation_size": 2},
            "training": {"num_workers": 0},
            "tune_training": {"space": SPACE, **tuning},
            **sections,
        }
    )


def refusal(config: ExperimentConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        training_search.tune_training(config, console=None)  # type: ignore[arg-type]  # nothing is shown
    assert not state.runs().exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"space": {}}, "tune_training.space is empty; name what to search"),
        ({"space": {"training.learning_rat": [1, 2]}}, "there is no key `training.learning_rat` that can be set here; "
         "did you mean `training.learning_rate`?"),
        ({"space": {"training.num_workers": [1, 2]}}, "no key `training.num_workers` that can be set"),
        ({"space": {"storage_path": ["a", "b"]}}, "no key `storage_path` that can be set"),
        ({"space": {"training.learning_rate": {"loguniform": [-1, 2]}}}, "loguniform needs low > 0"),
        ({"space": {"training.adam_beta1": [0.9, 1.5]}}, "tune_training.space.training.adam_beta1: 1.5 does not work: "
         "training.adam_beta1: Input should be less than 1"),
        ({"space": {"training.fp16": [True, False]}}, "training.fp16: True does not work: training.fp16 needs "
         "training.use_gpu=true"),
        ({"metric": "eval_accuarcy"}, "tune_training.metric: trials do not report `eval_accuarcy`; they can report "
         "eval_loss, "),
        ({"overrides": {"training.max_step": 3}}, "tune_training.overrides: there is no key `training.max_step` that "
         "can be set here; did you mean `training.max_steps`?"),
        ({"searcher": "grid"}, "tune_training.space.training.learning_rate: searcher grid needs lists of values, not "
         "loguniform"),
        ({"gpu_hours": 1}, "tune_training.gpu_hours: the trials use no GPU"),
    ],
)  # fmt: skip
def test_a_wrong_search_is_refused_before_it_starts(
    tmp_path: Path, tiny_bundle: Path, tuning: dict[str, Any], message: str
) -> None:
    assert message in refusal(configured(tmp_path, tiny_bundle, tuning))


def test_trials_need_validation_rows(tmp_path: Path, tiny_bundle: Path) -> None:
    config = configured(tmp_path, tiny_bundle, {})
    assert "compares trials on validation rows" in refusal(with_values(config, {"data.validation_size": 0}))


def test_population_based_training_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: x\nmodel: {model_name_or_path: y}\ndata: {train: z}\ntune_training: {scheduler: pbt}\n")
    with pytest.raises(ConfigError, match=r"c.yaml:4: .*population based training copies checkpoints between trials"):
        experiment.load(path)


def test_keys_of_a_space_are_not_taken_for_synonyms(tmp_path: Path) -> None:
    """`lr` in a column map or a space is the user's own name, not a flat key to be moved."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: x\nmodel: {model_name_or_path: y}\n"
        "data: {train: z, format: prompt_completion, columns: {prompt: dataset, completion: lr}}\n"
        "tune_training: {space: {training.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}}}\n"
    )
    config = experiment.load(path, ["tune_training.space.training.weight_decay=[0, 0.1]"])
    assert config.data.columns == {"prompt": "dataset", "completion": "lr"}
    assert [p.key for p in training_search.parse(config).parameters] == [
        "training.learning_rate", "training.weight_decay",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("eval_loss", ("eval_loss", "min")),
        ("exact_match", ("eval_exact_match", "max")),
        ("eval_rougeL", ("eval_rougeL", "max")),
        ("accuracy", ("eval_accuracy", "max")),
        ("repetition", ("eval_repetition", "min")),
    ],
)
def test_a_metric_brings_its_direction(tmp_path: Path, tiny_bundle: Path, metric: str, expected: Any) -> None:
    config = configured(tmp_path, tiny_bundle, {"metric": metric})
    base, name, mode = training_search._trial_config(config)
    assert (name, mode) == expected
    task = name.removeprefix("eval_")
    assert base.training.metric_for_best_model == ("eval_loss" if task == "loss" else task)
    assert training_search._trial_config(with_values(config, {"tune_training.mode": "max"}))[2] == "max"


def test_directions_are_those_of_the_metrics() -> None:
    names = ["exact_match", "token_f1", "bleu", "chrf", "rougeL", "distinct_1", "repetition", "numeric_match"]
    lower = {metric.name for metric in metrics.build(names) if not metric.greater_is_better}
    assert lower == LOWER_IS_BETTER


def test_overrides_are_for_trials_only(tmp_path: Path, tiny_bundle: Path) -> None:
    config = configured(tmp_path, tiny_bundle, {"overrides": {"training": {"max_steps": 3}, "data.max_length": 32}})
    base, _, _ = training_search._trial_config(config)
    assert (base.training.max_steps, base.data.max_length) == (3, 32)
    assert (config.training.max_steps, config.data.max_length) == (None, 64)


def test_a_single_worker_trains_in_the_trials_own_process(tmp_path: Path, tiny_bundle: Path) -> None:
    config = configured(tmp_path, tiny_bundle, {}, training={"num_workers": 1})
    assert training_search._trial_config(config)[0].training.num_workers == 0


def test_the_budget_does_not_make_another_search(tmp_path: Path, tiny_bundle: Path) -> None:
    config = configured(tmp_path, tiny_bundle, {})
    same = with_values(config, {"tune_training.time_budget_s": 60.0, "tune_training.then": "train"})
    other = with_values(config, {"tune_training.num_samples": 3})
    hashes = [training_search._search_hash(c) for c in (config, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_gpu_hours_are_counted_over_all_trials() -> None:
    budget = GpuHours(budget=1.0, gpus=4)
    assert budget("a", {"seconds": 500.0}) is False
    assert budget("b", {"seconds": 300.0}) is False
    assert not budget.stop_all()
    budget("b", {"seconds": 400.0})
    assert budget.stop_all(), "900 s on 4 GPUs are an hour"


def test_a_trial_reads_both_of_its_journals(tmp_path: Path, tiny_bundle: Path) -> None:
    """The training's own and that of the task scores; step 0 is no result, a repeated step counts once."""
    plan = TrialPlan(configured(tmp_path, tiny_bundle, {}), "eval_exact_match", tmp_path, "", {}, audited=False)
    write = {"metrics.jsonl": [(0, {"eval_exact_match": 0.9}), (5, {"loss": 1.0})],
             "scores.jsonl": [(10, {"eval_exact_match": 0.2}), (5, {"eval_exact_match": 0.1}),
                              (5, {"eval_exact_match": 0.1})]}  # fmt: skip
    for name, rows in write.items():
        lines = [json.dumps({"step": step, "time": 0, "metrics": values}) + "\n" for step, values in rows]
        (tmp_path / name).write_text("".join(lines))
    found = [(row["step"], row["metrics"]["eval_exact_match"]) for row in plan.rows(tmp_path)]
    assert found == [(5, 0.1), (10, 0.2)]


def test_a_trial_of_a_classifier_reports_its_macro_f1_on_data_that_the_search_has_audited(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    rows = [{"text": text, "label": text.split()[2]} for text in tiny.TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "format": "classification", "max_length": 64, "validation_size": 24}
    training = {"num_workers": 1, "max_steps": 8, "eval_steps": 4, "per_device_train_batch_size": 8}
    config = configured(tmp_path, tiny_bundle, {"metric": "macro_f1"}, data=data, training=training,
                        registry={"register_model": False})  # fmt: skip
    trials, metric, _ = training_search._trial_config(config)
    plan = TrialPlan(trials, metric, tmp_path / "trials", "", {}, audited=True)
    point = {"training.learning_rate": 3e-3}
    trial = TrainingTrial.__new__(TrainingTrial)  # as Ray's actor has it, without Ray
    trial.setup({"index": 0, "point": point}, plan)
    reports = [trial.step()]
    while not reports[-1].get("done"):
        reports.append(trial.step())
    assert [report["step"] for report in reports] == [4, 8]
    assert reports[-1].get(FINISHED), reports[-1]
    folder = plan.run_folder(0, point)
    assert not any((folder / name).exists() for name in auditing.FILES)

    winner = plan.configure(point)
    run = runs.open_folder(folder, trainer.config_hash(winner))
    bundle = trainer.train(winner, Console(quiet=True), run).bundle
    assert all((folder / name).exists() for name in auditing.FILES), "what becomes a model has its own"
    validation = splits.load_splits(winner.data, winner.seed, ("validation",))["validation"]
    scored = EvaluationConfig(metrics=["macro_f1"])
    found = evaluator.evaluate(Local(base.load_for_inference(bundle)), validation, winner.data, None, scored)
    assert found.metrics["macro_f1"] == pytest.approx(max(report[metric] for report in reports))


def test_values_are_set_in_sections_that_are_not_there_yet(tmp_path: Path, tiny_bundle: Path) -> None:
    config = configured(tmp_path, tiny_bundle, {})
    changed = with_values(config, {"evaluation.judge.base_url": "http://x", "evaluation.judge.model": "m"})
    assert changed.evaluation.judge is not None
    assert changed.evaluation.judge.base_url == "http://x"
    with pytest.raises(ConfigError, match=r"training.warmup_ratio: Input should be less than or equal to 1 .*given: 2"):
        with_values(config, {"training.warmup_ratio": 2})
    assert math.isclose(with_values(config, {"training.learning_rate": 1e-3}).training.learning_rate, 1e-3)
