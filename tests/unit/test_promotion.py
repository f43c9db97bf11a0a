"""The champion changes only through the gates, and every change leaves a record."""

from datetime import datetime
from pathlib import Path

import pytest

from heliostat.errors import GateRefused, ModelError, RegistryError
from heliostat.registry import store, versions
from heliostat.registry.promotion import promote

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

    with pytest.raises(GateRefused, match="not promoted: weights: is damaged") as refused:
        promote(name, verify=damaged)
    assert refused.value.exit_code == 3
    assert seen == ["2"]
    assert "champion" not in versions.aliases(name)


@pytest.mark.parametrize(
    ("first", "second", "greater_is_better", "tolerance", "passes"),
    [
        (0.8, 0.9, True, 0.0, True),
        (0.8, 0.8, True, 0.0, True),
        (0.8, 0.7, True, 0.0, False),
        (0.8, 0.7, True, 0.1, True),
        (0.8, 0.6, True, 0.1, False),
        (2.0, 1.5, False, 0.0, True),
        (2.0, 2.5, False, 0.0, False),
        (2.0, 2.5, False, 1.0, True),
    ],
)
def test_the_score_decides(
    name: str, first: float, second: float, greater_is_better: bool, tolerance: float, passes: bool
) -> None:
    versions.set_alias(name, "champion", "1")
    versions.log_evaluation(name, "1", {"score": first})
    versions.log_evaluation(name, "2", {"score": second})
    if passes:
        promotion = promote(
            name, "2", verify=sound, metric="score", greater_is_better=greater_is_better, tolerance=tolerance
        )
        assert (promotion.score, promotion.previous_score) == (second, first)
        assert versions.aliases(name)["champion"] == "2"
        return
    with pytest.raises(GateRefused, match=f"score is {second:g}, the champion's .version 1. is {first:g}"):
        promote(name, "2", verify=sound, metric="score", greater_is_better=greater_is_better, tolerance=tolerance)
    assert versions.aliases(name)["champion"] == "1"
    assert "promoted_at" not in versions.get_version(name, "2").tags


def test_a_score_that_is_not_recorded_refuses(name: str) -> None:
    versions.set_alias(name, "champion", "1")
    versions.log_evaluation(name, "2", {"score": 1.0})
    with pytest.raises(GateRefused, match=f"models:/{name}/1 has no score `score`"):
        promote(name, verify=sound, metric="score")
    with pytest.raises(GateRefused, match=r"has no score `bleu` .recorded: score."):
        promote(name, verify=sound, metric="bleu")


def test_without_a_champion_a_recorded_score_is_enough(name: str) -> None:
    versions.log_evaluation(name, "2", {"score": 0.1})
    promotion = promote(name, verify=sound, metric="score")
    assert (promotion.version, promotion.score, promotion.previous_score) == ("2", 0.1, None)


def test_what_is_not_there_is_a_registry_error(name: str) -> None:
    with pytest.raises(RegistryError, match="has no version 9"):
        promote(name, "9", verify=sound)
    with pytest.raises(RegistryError, match="no model `nobody`"):
        promote("nobody", verify=sound)
    store.client().delete_registered_model_alias(name, "challenger")
    with pytest.raises(RegistryError, match="has no alias `challenger`"):
        promote(name, verify=sound)
