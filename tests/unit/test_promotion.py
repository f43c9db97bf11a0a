"""The champion changes only through the gates, and every change leaves a record."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest

from heliostat import cli
from heliostat.errors import GateRefused, ModelError, RegistryError
from heliostat.registry import store, versions
from heliostat.registry.audit import PromotionLog
from heliostat.registry.config import Gate
from heliostat.registry.promotion import Comparison, Promotion, promote, rollback
from heliostat.serving.engine import Engine
from tests.bundles import write_bundle

pytestmark = pytest.mark.usefixtures("module_store")


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A model with the versions 1 and 2; 2 is the challenger."""
    model = tmp_path.name
    client = store.client()
    for version in ("1", "2"):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "weights").write_text(version)
        run_id = client.create_run(store.experiment_id("promotion")).info.run_id
        assert versions.register(run_id, folder, model, {}).version == version
    return model


def sound(folder: Path) -> None:
    """A check that every bundle of these tests passes."""
    assert (folder / "weights").exists()


def champions(model: str) -> tuple[str | None, str | None]:
    known = versions.aliases(model)
    return known.get("champion"), known.get("previous_champion")


def test_the_challenger_becomes_champion_and_the_record_says_so(name: str) -> None:
    first = promote(name, "1", verify=sound)
    assert (first.version, first.previous) == ("1", None)
    second = promote(name, verify=sound, reason="fewer errors")
    assert (second.version, second.previous) == ("2", "1")
    assert versions.aliases(name) == {"challenger": "2", "champion": "2", "previous_champion": "1"}
    tags = versions.get_version(name, "2").tags
    assert tags["promoted_from"] == "1"
    assert tags["promoted_by"] == store.user()
    assert tags["promotion_reason"] == "fewer errors"
    assert datetime.fromisoformat(tags["promoted_at"]).tzinfo is not None


def test_the_champion_itself_stays_as_it_is(name: str) -> None:
    promote(name, "1", verify=sound)
    promote(name, "2", verify=sound, reason="kept")
    again = promote(name, "2", verify=sound, reason="lost")
    assert again.previous == again.version == "2"
    assert versions.aliases(name)["previous_champion"] == "1"
    assert versions.get_version(name, "2").tags["promotion_reason"] == "kept"


def test_a_bundle_that_fails_its_check_is_refused(name: str) -> None:
    seen: list[str] = []

    def damaged(folder: Path) -> None:
        seen.append((folder / "weights").read_text())
        raise ModelError("weights: is damaged")

    with pytest.raises(GateRefused, match="not made champion: weights: is damaged") as refused:
        promote(name, verify=damaged)
    assert refused.value.exit_code == 3
    assert seen == ["2"]
    assert "champion" not in versions.aliases(name)


@pytest.mark.parametrize(
    ("first", "second", "mode", "tolerance", "passes"),
    [
        (0.8, 0.9, "max", 0.0, True),
        (0.8, 0.8, "max", 0.0, True),
        (0.8, 0.7, "max", 0.0, False),
        (0.8, 0.7, "max", 0.1, True),
        (0.8, 0.6, "max", 0.1, False),
        (2.0, 1.5, "min", 0.0, True),
        (2.0, 2.5, "min", 0.0, False),
        (2.0, 2.5, "min", 1.0, True),
    ],
)
def test_the_score_decides(
    name: str, first: float, second: float, mode: Literal["max", "min"], tolerance: float, passes: bool
) -> None:
    versions.set_alias(name, "champion", "1")
    versions.log_evaluation(name, "1", {"score": first, "other": 1.0})
    versions.log_evaluation(name, "2", {"score": second, "other": 2.0})
    gates = [Gate(metric="other"), Gate(metric="score", mode=mode, tolerance=tolerance)]
    if passes:
        promotion = promote(name, "2", verify=sound, gates=gates)
        assert promotion.scores == (Comparison("other", 2.0, 1.0), Comparison("score", second, first))
        assert versions.aliases(name)["champion"] == "2"
        entry = PromotionLog.open(name).read().entries[-1]
        assert entry.metrics == {"score": second, "other": 2.0}
        assert entry.previous_metrics == {"score": first, "other": 1.0}
        return
    with pytest.raises(GateRefused, match=f"score is {second:g}, the champion's .version 1. is {first:g}"):
        promote(name, "2", verify=sound, gates=gates)
    assert versions.aliases(name)["champion"] == "1"
    assert "promoted_at" not in versions.get_version(name, "2").tags
    assert PromotionLog.open(name).read().entries == ()


def test_scores_on_other_data_are_not_compared(name: str) -> None:
    versions.set_alias(name, "champion", "1")
    versions.log_evaluation(name, "1", {"score": 0.1}, data="old")
    versions.log_evaluation(name, "2", {"score": 0.9}, data="new")
    with pytest.raises(GateRefused, match=f"`heliostat evaluate a.yaml --model models:/{name}/1`"):
        promote(name, verify=sound, gates=[Gate(metric="score")], config="a.yaml")
    assert versions.aliases(name)["champion"] == "1"
    versions.log_evaluation(name, "1", {"score": 0.2}, data="new")
    assert promote(name, verify=sound, gates=[Gate(metric="score")]).scores == (Comparison("score", 0.9, 0.2),)


def test_a_score_that_is_not_recorded_refuses(name: str) -> None:
    versions.set_alias(name, "champion", "1")
    versions.log_evaluation(name, "2", {"score": 1.0})
    with pytest.raises(GateRefused, match=f"models:/{name}/1 has no score `score`"):
        promote(name, verify=sound, gates=[Gate(metric="score")])
    with pytest.raises(GateRefused, match=r"has no score `bleu` .recorded: score."):
        promote(name, verify=sound, gates=[Gate(metric="bleu")])


def test_without_a_champion_a_recorded_score_is_enough(name: str) -> None:
    versions.log_evaluation(name, "2", {"score": 0.1})
    promotion = promote(name, verify=sound, gates=[Gate(metric="score")])
    assert promotion == Promotion(name, "2", None, (Comparison("score", 0.1, None),))


def test_what_is_not_there_is_a_registry_error(name: str) -> None:
    with pytest.raises(RegistryError, match="has no version 9"):
        promote(name, "9", verify=sound)
    with pytest.raises(RegistryError, match="no model `nobody`"):
        promote("nobody", verify=sound)
    store.client().delete_registered_model_alias(name, "challenger")
    with pytest.raises(RegistryError, match="has no alias `challenger`"):
        promote(name, verify=sound)


def test_a_rollback_goes_back_through_the_champions(name: str) -> None:
    for version in ("1", "2", "1"):
        promote(name, version, verify=sound)
    assert champions(name) == ("1", "2")
    assert rollback(name, "slow", verify=sound) == Promotion(name, "2", "1")
    assert champions(name) == ("2", "1")
    assert versions.get_version(name, "2").tags["promotion_reason"] == "slow"
    promote(name, "1", verify=sound)
    for expected in (("2", "1"), ("1", None)):
        rollback(name, verify=sound)
        assert champions(name) == expected
    with pytest.raises(GateRefused, match="version 1 is its first champion"):
        rollback(name, verify=sound)
    assert champions(name) == ("1", None)
    kinds = [entry.kind for entry in PromotionLog.open(name).read().entries]
    assert kinds == ["promote"] * 3 + ["rollback", "promote", "rollback", "rollback"]


def test_nothing_to_go_back_to_is_told(name: str) -> None:
    with pytest.raises(GateRefused, match="it has no champion"):
        rollback(name, verify=sound)
    with pytest.raises(RegistryError, match="no model `nobody`"):
        rollback("nobody", verify=sound)


def test_a_rollback_to_a_damaged_or_deleted_version_changes_nothing(name: str) -> None:
    promote(name, "1", verify=sound)
    promote(name, "2", verify=sound)

    def damaged(folder: Path) -> None:
        raise ModelError(f"{(folder / 'weights').read_text()} is damaged")

    with pytest.raises(GateRefused, match="not made champion: 1 is damaged"):
        rollback(name, verify=damaged)
    assert champions(name) == ("2", "1")
    store.client().delete_model_version(name, "1")
    with pytest.raises(RegistryError, match="version 1, was deleted; promote another one"):
        rollback(name, verify=sound)
    assert champions(name) == ("2", None)
    assert len(PromotionLog.open(name).read().entries) == 2


def test_a_rollback_of_a_champion_that_changed_meanwhile_is_refused(name: str) -> None:
    promote(name, "1", verify=sound)
    promote(name, "2", verify=sound)

    def somebody_promotes(folder: Path) -> None:
        promote(name, "1", verify=sound)

    with pytest.raises(GateRefused, match="its champion was version 2, and became version 1 meanwhile"):
        rollback(name, verify=somebody_promotes)
    assert champions(name) == ("1", "2")


def test_the_gates_are_asked_again_when_the_champion_changed_meanwhile(name: str) -> None:
    versions.log_evaluation(name, "1", {"score": 0.9})
    versions.log_evaluation(name, "2", {"score": 0.5})

    def somebody_promotes(folder: Path) -> None:
        promote(name, "1", verify=sound)

    with pytest.raises(GateRefused, match=r"score is 0.5, the champion's .version 1. is 0.9"):
        promote(name, "2", verify=somebody_promotes, gates=[Gate(metric="score")])
    assert champions(name) == ("1", None)


def test_a_deleted_champion_blocks_nobody(name: str) -> None:
    promote(name, "1", verify=sound)
    store.client().delete_model_version(name, "1")
    versions.log_evaluation(name, "2", {"score": 0.5})
    assert promote(name, "2", verify=sound, gates=[Gate(metric="score")]).previous == "1"
    assert champions(name) == ("2", None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("promoted") / "bundle")


@pytest.fixture
def config(bundle: Path, tmp_path: Path) -> str:
    """An experiment with gates, whose model has the versions 1 and 2 and the scores of 1."""
    for _ in range(2):
        run_id = store.client().create_run(store.experiment_id("promotion")).info.run_id
        versions.register(run_id, bundle, tmp_path.name, {})
    versions.log_evaluation(tmp_path.name, "1", {"exact_match": 0.8, "rouge_l": 0.5, "loss": 2.0}, data="test")
    rows = "".join(f'{{"prompt": "the {word}", "completion": "x"}}\n' for word in ("cat", "dog", "man"))
    (tmp_path / "test.jsonl").write_text(rows)
    path = tmp_path / "config.yaml"
    path.write_text(f"""
name: promotion
model: {{model_name_or_path: "{bundle}"}}
data: {{train: "{tmp_path}/test.jsonl", test: "{tmp_path}/test.jsonl", format: prompt_completion}}
registry: {{registered_model_name: "{tmp_path.name}"}}
promotion:
  gates: [{{metric: exact_match, tolerance: 0.1}}, {{metric: loss, mode: min}}]
  no_regression: [rouge_l]
  parity_prompts: 2
""")
    return str(path)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON result."""
    code = cli.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_experiment_gives_name_and_gates(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = tmp_path.name
    code, result = command(capsys, "promote", config, "--version", "1", "--reason", "first")
    assert (code, result["version"], result["previous"]) == (0, "1", None)
    versions.log_evaluation(name, "2", {"exact_match": 0.75, "rouge_l": 0.4, "loss": 1.0}, data="test")
    code, result = command(capsys, "promote", config)
    assert code == 3
    assert "its rouge_l is 0.4" in result["error"]
    versions.log_evaluation(name, "2", {"rouge_l": 0.5}, data="test")
    code, result = command(capsys, "promote", config, "--metric", "loss", "--lower-is-better")
    assert (code, result["version"], result["previous"]) == (0, "2", "1")
    assert {"metric": "exact_match", "score": 0.75, "previous_score": 0.8} in result["scores"]
    assert champions(name) == ("2", "1")


def test_a_name_takes_the_gates_of_a_config_too(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions.set_alias(tmp_path.name, "champion", "1")
    code, result = command(capsys, "promote", tmp_path.name, "--config", config)
    assert code == 3
    assert f"`heliostat evaluate {config} --model models:/{tmp_path.name}/2`" in result["error"]
    assert command(capsys, "promote", tmp_path.name)[0] == 0, "without the config there is no gate"


def test_an_engine_that_decodes_wrongly_is_never_champion(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Engine.start

    async def start_wrong(engine: Engine) -> None:
        engine._eos = frozenset(range(300))  # ends every answer at once
        await start(engine)

    monkeypatch.setattr(Engine, "start", start_wrong)
    code, result = command(capsys, "promote", config, "--version", "1")
    assert code == 3
    assert "does not give what `generate()` gives" in result["error"]
    assert champions(tmp_path.name) == (None, None)


def test_a_damaged_bundle_is_never_champion(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(versions.resolve(f"models:/{tmp_path.name}/1").path) / "config.json"
    file.write_text(file.read_text() + " ")
    code, result = command(capsys, "promote", config, "--version", "1")
    assert code == 3
    assert "config.json: is damaged" in result["error"]
    assert champions(tmp_path.name) == (None, None)


def test_the_command_rolls_back(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = tmp_path.name
    for version in ("1", "2"):
        assert command(capsys, "promote", name, "--version", version)[0] == 0
    assert command(capsys, "rollback", config, "--reason", "too slow") == (
        0, {"name": name, "version": "1", "previous": "2", "scores": []},
    )  # fmt: skip
    assert champions(name) == ("1", None)
    assert PromotionLog.open(name).read().entries[-1].reason == "too slow"
    code, result = command(capsys, "rollback", name)
    assert (code, result["exit_code"]) == (3, 3)
    assert "version 1 is its first champion" in result["error"]
    assert command(capsys, "rollback", "nobody")[0] == 2


@pytest.mark.parametrize("tolerance", ["-1", "nan", "x"])
def test_a_tolerance_is_a_number_of_at_least_0(tolerance: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["promote", "name", "--metric", "loss", f"--tolerance={tolerance}"])
    assert ended.value.code == 2
    assert "--tolerance" in capsys.readouterr().err
