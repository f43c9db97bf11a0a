"""The promotion log: one chain of entries for all, from which aliases, tags and artifacts follow."""

import json
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import list_artifacts, load_dict
from mlflow.exceptions import MlflowException

from heliostat.errors import RegistryError
from heliostat.registry import audit, store, versions
from heliostat.registry.audit import Entry, PromotionLog

pytestmark = pytest.mark.usefixtures("module_store")


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A model with the versions 1, 2 and 3."""
    store.client().create_registered_model(tmp_path.name)
    for version in ("1", "2", "3"):
        assert store.client().create_model_version(tmp_path.name, str(tmp_path / version)).version == int(version)
    return tmp_path.name


@pytest.fixture
def log(name: str) -> PromotionLog:
    return PromotionLog.open(name)


def promotion(previous: str | None, version: str, reason: str = "") -> Entry:
    return Entry("promote", previous, version, reason=reason)


def artifact(log: PromotionLog, number: int) -> dict[str, str]:
    uri = store.client().get_run(log.run_id).info.artifact_uri
    return dict(load_dict(f"{uri}/promotions/{number:06}.json"))


def test_entries_come_back_in_their_order(log: PromotionLog) -> None:
    for number in range(1, 13):
        history = log.read()
        assert len(history.entries) == number - 1
        assert log.append(history, promotion(history.champion, str(1 + number % 3), f"reason {number}"))
    history = log.read()
    assert [entry.reason for entry in history.entries] == [f"reason {number}" for number in range(1, 13)]
    assert [entry.previous for entry in history.entries[1:]] == [entry.version for entry in history.entries[:-1]]
    assert {entry.who for entry in history.entries} == {store.user()}
    assert len({entry.nonce for entry in history.entries}) == 12


def test_of_two_entries_for_one_place_the_second_is_refused(log: PromotionLog) -> None:
    history = log.read()
    assert log.append(history, promotion(None, "1"))
    assert not log.append(history, promotion(None, "2"))
    assert [entry.version for entry in log.read().entries] == ["1"]
    assert log.append(log.read(), promotion("1", "2"))


def test_an_entry_cannot_be_changed_by_others_either(log: PromotionLog) -> None:
    log.append(log.read(), promotion(None, "1"))
    with pytest.raises(MlflowException, match="not allowed"):
        store.client().log_param(log.run_id, "promotion.000001", "{}")


def test_everybody_opens_the_same_log(name: str) -> None:
    start, opened = threading.Barrier(6), []

    def open_log() -> None:
        start.wait()
        opened.append(PromotionLog.open(name).run_id)

    threads = [threading.Thread(target=open_log) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 6
    assert len(set(opened)) == 1
    named = [
        found.name for found in store.client().search_experiments(filter_string=f"name LIKE 'promotions of {name}%'")
    ]
    assert len(named) == 1, "those who came second removed theirs"


def test_a_log_that_was_half_made_is_nobodys(name: str) -> None:
    """Killed before the renaming: an experiment of another name, which nothing reads."""
    created = versions.created_at(name).isoformat(timespec="milliseconds")
    store.create_experiment(f"promotions of {name} since {created} (new, 0)")
    log = PromotionLog.open(name)
    assert log.append(log.read(), promotion(None, "1"))
    assert PromotionLog.open(name).read().champion == "1"


def test_a_model_made_anew_has_a_log_of_its_own(name: str, log: PromotionLog, tmp_path: Path) -> None:
    log.append(log.read(), promotion(None, "3"))
    store.client().delete_registered_model(name)
    store.client().create_registered_model(name)
    assert PromotionLog.open(name).read().champion is None


def test_a_deleted_log_is_named(name: str, log: PromotionLog) -> None:
    experiment = store.client().get_run(log.run_id).info.experiment_id
    store.client().delete_experiment(experiment)
    with pytest.raises(
        RegistryError, match=f"restore it with `mlflow experiments restore --experiment-id {experiment}`"
    ):
        PromotionLog.open(name)


def test_champions_from_before_the_log_are_its_beginning(
    name: str, log: PromotionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.set_alias(name, "previous_champion", "1")
    versions.set_alias(name, "champion", "2")
    before = log.read()
    assert before.entries == ()
    assert before.champions == ("1", "2")
    log.settle()
    assert log.read().entries == (), "looking writes nothing"
    assert log.append(before, promotion("2", "3"))
    assert not log.append(before, promotion("2", "1")), "the beginning is written once"
    after = log.read()
    assert [entry.kind for entry in after.entries] == ["adopt", "promote"]
    assert after.champions == ("1", "2", "3")
    monkeypatch.setattr(audit, "_IN_FLIGHT", timedelta(0))
    log.settle()
    assert [artifact(log, number)["kind"] for number in (1, 2)] == ["adopt", "promote"]
    assert "promoted_at" not in versions.get_version(name, "2").tags, "it was not promoted now"


def test_aliases_are_what_the_log_says(name: str, log: PromotionLog) -> None:
    assert log.append(log.read(), promotion(None, "1"))
    assert versions.aliases(name) == {}
    log.settle()
    assert versions.aliases(name) == {"champion": "1"}
    log.append(log.read(), promotion("1", "2"))
    log.append(log.read(), promotion("2", "3"))
    log.settle()
    assert versions.aliases(name) == {"champion": "3", "previous_champion": "2"}
    versions.set_alias(name, "champion", "1")
    log.settle()
    assert versions.aliases(name) == {"champion": "3", "previous_champion": "2"}
    log.append(log.read(), Entry("rollback", "3", "2"))
    log.append(log.read(), Entry("rollback", "2", "1"))
    log.settle()
    assert versions.aliases(name) == {"champion": "1"}


def test_a_deleted_version_has_no_alias_and_is_no_obstacle(name: str, log: PromotionLog) -> None:
    log.append(log.read(), promotion(None, "1"))
    log.append(log.read(), promotion("1", "2"))
    store.client().delete_model_version(name, "2")
    log.settle()
    assert versions.aliases(name) == {"previous_champion": "1"}


@pytest.mark.parametrize("overtaken", [True, False])
def test_the_newest_entry_wins_whoever_sets_the_alias_last(
    name: str, log: PromotionLog, overtaken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the alias is set to version 1, another process promotes version 2 and sets it first, or last."""
    log.append(log.read(), promotion(None, "1"))
    set_alias, calls = audit._set_alias, list[str | None]()

    def set_beside_another(client: MlflowClient, name: str, alias: str, version: str | None) -> None:
        calls.append(version)
        if len(calls) > 1 or not overtaken:
            set_alias(client, name, alias, version)
        if len(calls) == 1:
            log.append(log.read(), promotion("1", "2"))
            client.set_registered_model_alias(name, alias, "2")
            if overtaken:
                set_alias(client, name, alias, version)

    monkeypatch.setattr(audit, "_set_alias", set_beside_another)
    log.settle()
    assert versions.aliases(name)["champion"] == "2"
    assert calls == (["1", "2"] if overtaken else ["1"]), "what another one has set since is left to him"


def test_tags_and_artifacts_of_the_killed_are_made_up_for(
    name: str, log: PromotionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(log.read(), promotion(None, "1", "first"))
    log.append(log.read(), promotion("1", "2", "second"))
    log.append(log.read(), promotion("2", "1", "third"))
    log.settle()
    assert list_artifacts(run_id=log.run_id, tracking_uri=store.connect()) == [], "whoever wrote them may be about to"
    monkeypatch.setattr(audit, "_IN_FLIGHT", timedelta(0))
    log.settle()
    assert [artifact(log, number)["reason"] for number in (1, 2, 3)] == ["first", "second", "third"]
    assert artifact(log, 2)["previous"] == "1"
    first, second = (versions.get_version(name, version).tags for version in ("1", "2"))
    assert (first["promotion_reason"], first["promoted_from"]) == ("third", "2")
    assert (second["promotion_reason"], second["promoted_by"]) == ("second", store.user())
    store.client().set_model_version_tag(name, "1", "promotion_reason", "by hand")
    log.settle()
    assert versions.get_version(name, "1").tags["promotion_reason"] == "by hand", "what is there is not written again"


@pytest.mark.parametrize("character", ["x", "ä", '"', "\n", "😀"])
def test_a_long_reason_is_cut_to_what_mlflow_holds(log: PromotionLog, character: str) -> None:
    assert log.append(log.read(), promotion(None, "1", character * 7000)) == 1
    (entry,) = log.read().entries
    assert entry.reason == character * (len(entry.reason) - 1) + "…"
    assert 2500 < len(entry.reason) < 6000
    log.finish(1)
    assert artifact(log, 1)["reason"] == entry.reason


def test_a_record_that_cannot_fit_is_refused(log: PromotionLog) -> None:
    entry = Entry("promote", None, "1", reason="why", metrics={f"metric {number:0200}": 1.0 for number in range(40)})
    with pytest.raises(RegistryError, match="characters too long for MLflow; use fewer metrics"):
        log.append(log.read(), entry)
    assert log.read().entries == ()


def test_the_param_is_plain_json(log: PromotionLog) -> None:
    log.append(log.read(), promotion(None, "1", "a reason"))
    param = json.loads(store.client().get_run(log.run_id).data.params["promotion.000001"])
    assert (param["kind"], param["version"], param["reason"]) == ("promote", "1", "a reason")
    assert list_artifacts(run_id=log.run_id, tracking_uri=store.connect()) == []
