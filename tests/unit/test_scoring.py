"""`heliostat evaluate` end to end: a registered model is scored, beside a baseline, and the scores stay with it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heliostat.errors import DataError, ModelError, RegistryError
from heliostat.experiment import ExperimentConfig
from heliostat.registry import scoring, store, versions
from tests import tiny
from tests.bundles import write_bundle


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store with one registered bundle for the module: creating a database takes seconds."""
    folder = tmp_path_factory.mktemp("scoring")
    write_bundle(folder / "bundle", "llama")
    rows = [{"prompt": tiny.TEXTS[i], "completion": " house", "kind": "ab"[i % 2]} for i in range(5)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_HOME", str(home / "state"))


@pytest.fixture
def registered(home: Path) -> str:
    run = store.client().create_run(store.experiment_id("scoring"))
    return versions.register(run.info.run_id, home / "bundle", "tiny", {}).version


def config(home: Path, **evaluation: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "model": {"model_name_or_path": str(home / "bundle-weights")},
            "data": {"test": str(home / "test.jsonl"), "format": "prompt_completion", "max_length": 64},
            "generation": {"max_new_tokens": 4},
            "evaluation": {"batch_size": 2, **evaluation},
        }
    )


def score(
    home: Path, reference: str | None = None, predictions: str | None = None, **evaluation: Any
) -> dict[str, Any]:
    return scoring.score(config(home, **evaluation), reference, Console(file=io.StringIO()), predictions)


def test_scores_of_a_registered_model_are_recorded_on_its_version_and_run(home: Path, registered: str) -> None:
    result = score(home, baseline="base", group_by="kind")
    assert result["model"] == "models:/tiny@challenger"
    assert result["n"] == 5
    assert {name: group["n"] for name, group in result["groups"].items()} == {"a": 3, "b": 2}
    metrics = {"loss", "perplexity", "token_accuracy", "exact_match"}
    version = versions.get_version("tiny", registered)
    assert versions.evaluation(version) == {name: result[name] for name in metrics}
    assert version.run_id is not None
    logged = store.client().get_run(version.run_id).data.metrics
    assert logged == {f"eval.{name}": result[name] for name in metrics}
    beside = {name: result["baseline"][name] for name in metrics}
    assert beside == {name: result[name] for name in metrics}, "the bundle holds the weights of its base"
    assert json.loads(json.dumps(result)) == result


def test_a_folder_is_scored_and_recorded_nowhere(home: Path, registered: str) -> None:
    before = versions.get_version("tiny", registered).tags
    result = score(home, str(home / "bundle"))
    assert result["baseline"] is None
    assert result["loss"] > 0
    assert versions.get_version("tiny", registered).tags == before


def test_a_baseline_may_be_any_model(home: Path, registered: str, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", "gpt2")
    result = score(home, f"models:/tiny/{registered}", baseline=str(other))
    assert result["baseline"]["model"] == str(other)
    assert result["baseline"]["loss"] != result["loss"]
    assert versions.evaluation(versions.get_version("tiny", registered))["loss"] == result["loss"]


def test_predictions_are_written_in_the_order_of_the_rows(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "predictions.jsonl"
    score(home, str(home / "bundle"), str(file))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == tiny.TEXTS[:5]
    assert [line["reference"] for line in lines] == [" house"] * 5
    assert all(isinstance(line["prediction"], str) for line in lines)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_the_table_shows_every_score_beside_the_baselines(home: Path) -> None:
    result = score(home, str(home / "bundle"), baseline="base", group_by="kind")
    text = scoring.table(result)
    for name in ("loss", "perplexity", "token_accuracy", "exact_match"):
        (line,) = (line for line in text.splitlines() if line.split()[0] == name)
        assert line.split()[1] == f"{result[name]:.4f}"
        assert line.endswith(f"base: {result['baseline'][name]:.4f}")
    assert "(n=3)" in text


def test_what_is_missing_is_named(home: Path, registered: str) -> None:
    with pytest.raises(RegistryError, match="`tiny` has no alias `champion`"):
        score(home, "models:/tiny@champion")
    with pytest.raises(RegistryError, match="`tiny` has no version 99"):
        score(home, baseline="models:/tiny/99")
    with pytest.raises(ModelError, match="no such file or folder"):
        score(home, "./gone")
    without = config(home).model_copy(update={"data": config(home).data.model_copy(update={"test": None})})
    with pytest.raises(DataError, match="no file is given"):
        scoring.score(without, str(home / "bundle"), Console(file=io.StringIO()))
    only_train = {"test": None, "train": str(home / "test.jsonl"), "validation_size": 0}
    without = without.model_copy(update={"data": config(home).data.model_copy(update=only_train)})
    with pytest.raises(DataError, match=r"there is no test split; set data\.test to a file, or data\.test_size"):
        scoring.score(without, str(home / "bundle"), Console(file=io.StringIO()))
