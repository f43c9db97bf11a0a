"""`heliostat evaluate` end to end: a registered model is scored, beside a baseline, and the scores stay with it."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from rich.console import Console

from heliostat import cli
from heliostat import config as configuration
from heliostat.data import splits
from heliostat.errors import ConfigError, DataError, ModelError, RegistryError
from heliostat.evaluation import questions
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
    assert result["intervals"] == {"exact_match": [0.0, 0.0]}
    assert result["unscored"] == {}


@pytest.mark.parametrize(
    "way", [[], ["evaluation.scoring=likelihood", "evaluation.labels=[cat, house, river]"]], ids=["generated", "chosen"]
)
def test_few_shot_is_the_same_as_examples_in_the_prompts(home: Path, tmp_path: Path, way: list[str]) -> None:
    train = [{"prompt": text, "completion": " cat"} for text in tiny.TEXTS[50:56]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    file, asked = tmp_path / "config.yaml", config(home)
    file.write_text(configuration.dump(asked))

    def predicted(*overrides: str) -> list[str]:
        common = [f"data.train={tmp_path}/train.jsonl", "data.max_length=128", "--model", str(home / "bundle")]
        written = tmp_path / "predictions.jsonl"
        assert cli.main(["evaluate", str(file), *common, "--predictions", str(written), *way, *overrides]) == 0
        return [json.loads(line)["prediction"] for line in written.read_text().splitlines()]

    data = asked.data.model_copy(update={"train": f"{tmp_path}/train.jsonl"})
    examples = questions.few_shot(splits.load_splits(data, 0, ("train",))["train"], data, 3, asked.seed).text()
    rows = [json.loads(line) for line in (home / "test.jsonl").read_text().splitlines()]
    prompted = [json.dumps(row | {"prompt": examples + row["prompt"]}) + "\n" for row in rows]
    (tmp_path / "prompted.jsonl").write_text("".join(prompted))

    found = predicted("evaluation.few_shot=3")
    assert found == predicted(f"data.test={tmp_path}/prompted.jsonl")
    assert found != predicted()


def test_scores_say_what_they_were_measured_on(home: Path, registered: str) -> None:
    score(home)
    version = versions.get_version("tiny", registered)
    rows = splits.load_splits(config(home).data, 0, ("test",))["test"]
    digest = scoring.data_digest(rows, config(home).data)
    assert version.tags["eval_data.exact_match"] == version.tags["eval_data.loss"] == digest


def test_the_digest_of_the_data_is_that_of_what_is_asked(home: Path, tmp_path: Path) -> None:
    data = config(home).data
    (tmp_path / "moved.jsonl").write_text((home / "test.jsonl").read_text())
    moved = data.model_copy(update={"test": str(tmp_path / "moved.jsonl"), "train": "other", "packing": False})
    rows, same = (splits.load_splits(each, 0, ("test",))["test"] for each in (data, moved))
    digest = scoring.data_digest(rows, data)
    assert scoring.data_digest(same, moved) == digest
    assert scoring.data_digest(rows[1:], data) != digest
    assert scoring.data_digest(rows[::-1], data) != digest
    for change in ({"prompt_template": "{prompt} ->"}, {"max_length": 32}, {"columns": {"completion": "kind"}}):
        assert scoring.data_digest(rows, data.model_copy(update=change)) != digest


def logged_table(run_id: str) -> list[dict[str, Any]]:
    """The rows of the table as MLflow shows it."""
    stored = json.loads(Path(store.client().download_artifacts(run_id, scoring.PREDICTIONS)).read_text())
    return [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]


@pytest.mark.parametrize("is_registered", [True, False])
def test_each_evaluation_is_a_run_with_its_predictions(home: Path, registered: str, is_registered: bool) -> None:
    reference = f"models:/tiny/{registered}" if is_registered else str(home / "bundle")
    names = ["exact_match", "chrf"]
    results = [score(home, reference, metrics=names) for _ in range(2)]
    runs = [store.client().get_run(result["run_id"]) for result in results]
    assert runs[0].info.run_id != runs[1].info.run_id
    run, result = runs[1], results[1]
    assert (run.info.run_name, run.info.status) == ("evaluation", "FINISHED")
    assert run.data.metrics == {n: result[n] for n in ("loss", "perplexity", "token_accuracy", *names)}
    assert run.data.tags["heliostat.model"] == reference
    parent = versions.get_version("tiny", registered).run_id if is_registered else None
    assert run.data.tags.get("mlflow.parentRunId") == parent
    rows = logged_table(run.info.run_id)
    assert list(rows[0]) == ["prompt", "reference", "prediction", *names]
    assert [row["prompt"] for row in rows] == tiny.TEXTS[:5]
    assert [row["reference"] for row in rows] == [" house"] * 5
    assert sum(row["exact_match"] for row in rows) / 5 == result["exact_match"]
    assert all(0 <= row["chrf"] <= 100 for row in rows)
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "predictions.json", "type": "table"}]


def test_a_store_that_is_away_costs_no_score(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    printed = io.StringIO()
    result = scoring.score(config(home), str(home / "bundle"), Console(file=printed, width=300))
    assert result["run_id"] is None
    assert result["loss"] > 0
    assert (
        "the run evaluation cannot be created: the MLflow server at http://127.0.0.1:9 cannot be" in printed.getvalue()
    )


def test_a_judge_that_is_away_leaves_the_other_scores(home: Path, registered: str) -> None:
    judge = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "max_retries": 0}
    result = score(home, metrics=["judge", "exact_match"], judge=judge)
    assert "judge" not in result
    assert result["unscored"] == {"judge": 5}
    assert "judge            5 examples have no score" in scoring.table(result)
    assert "judge" not in versions.evaluation(versions.get_version("tiny", registered))
    assert [row["judge"] for row in logged_table(result["run_id"])] == [None] * 5


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
    file = tmp_path / "predictions.parquet"
    result = score(home, str(home / "bundle"), str(file), metrics=["exact_match", "chrf"])
    lines = pyarrow.parquet.read_table(file).to_pylist()
    assert [line["prompt"] for line in lines] == tiny.TEXTS[:5]
    logged = logged_table(result["run_id"])
    assert list(lines[0]) == list(logged[0])
    for line, row in zip(lines, logged, strict=True):
        assert line == {**row, "chrf": pytest.approx(row["chrf"], rel=1e-9)}, "MLflow writes ten digits"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
    with pytest.raises(ConfigError, match="unknown kind of file"):
        score(home, "./gone", str(tmp_path / "predictions.xlsx"))


def test_the_table_shows_every_score_beside_the_baselines(home: Path) -> None:
    result = score(home, str(home / "bundle"), baseline="base", group_by="kind")
    text = scoring.table(result)
    for name in ("loss", "perplexity", "token_accuracy", "exact_match"):
        (line,) = (line for line in text.splitlines() if line.split()[0] == name)
        assert line.split()[1] == f"{result[name]:.4f}"
        assert f"   base: {result['baseline'][name]:.4f}" in line
    assert "(n=3)" in text


def test_the_table_shows_intervals() -> None:
    scores = {"n": 3, "loss": 0.5, "exact_match": 0.987, "intervals": {"exact_match": [0.978, 0.9954]}, "unscored": {}}
    text = scoring.table({"model": "m", **scores, "groups": {}, "labels": {}, "baseline": {"model": "base", **scores}})
    assert text.splitlines() == [
        "m on 3 examples",
        "  loss             0.5000   base: 0.5000",
        "  exact_match      0.9870 [0.978, 0.995]   base: 0.9870 [0.978, 0.995]",
    ]


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


def test_a_bundle_decodes_by_its_own_settings_and_other_models_by_the_configuration(home: Path, tmp_path: Path) -> None:
    """Or an evaluation would not tell how the tuned model answers when it is served."""

    def texts(reference: str, **decoding: Any) -> list[str]:
        file = tmp_path / "predictions.jsonl"
        scoring.score(config(home), reference, Console(file=io.StringIO()), str(file), decoding)
        return [json.loads(line)["prediction"] for line in file.read_text().splitlines()]

    plain, bundled = str(home / "bundle-weights"), str(home / "bundle")
    assert texts(bundled) != texts(plain), "8 new tokens by the bundle, 4 by the configuration"
    assert texts(bundled, max_new_tokens=4) == texts(plain)
