"""A registered bundle comes back byte for byte by alias and number; wrong references are told apart."""

import os
from pathlib import Path

import pytest
from mlflow.artifacts import download_artifacts

from heliostat.errors import RegistryError
from heliostat.registry import store, versions

pytestmark = pytest.mark.usefixtures("module_store")


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A model of its own for each test."""
    return tmp_path.name


@pytest.fixture
def run_id() -> str:
    return str(store.client().create_run(store.experiment_id("versions")).info.run_id)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(10_000))
    (folder / "heliostat.json").write_text('{"format_version": 1}')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bundle_comes_back_by_alias_and_by_number(run_id: str, bundle: Path, name: str) -> None:
    version = versions.register(run_id, bundle, name, {"data_hash": "abc"}, description="first")
    assert (version.name, version.version, version.run_id) == (name, "1", run_id)
    assert version.uri == f"models:/{name}/1"
    by_alias = versions.resolve(f"models:/{name}@challenger")
    assert by_alias == versions.resolve(version.uri)
    assert (by_alias.name, by_alias.version) == (name, "1")
    assert contents(Path(by_alias.path)) == contents(bundle), "exactly the files of the bundle, none of MLflow's"
    assert versions.get_version(name, "1").tags["data_hash"] == "abc"
    assert store.client().get_model_version(name, "1").description == "first"


def test_local_files_are_used_where_they_lie(run_id: str, bundle: Path, name: str, home: Path) -> None:
    versions.register(run_id, bundle, name, {})
    path = Path(versions.resolve(f"models:/{name}/1").path)
    assert path.is_relative_to(home / "artifacts")
    assert not (home / "downloads").exists()


def test_mlflow_itself_can_fetch_a_version(
    run_id: str, bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.register(run_id, bundle, name, {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.connect())
    assert contents(Path(download_artifacts(f"models:/{name}@challenger"))) == contents(bundle)


def test_registering_the_same_files_again_gives_the_same_version(run_id: str, bundle: Path, name: str) -> None:
    first = versions.register(run_id, bundle, name, {})
    again = versions.register(run_id, bundle, name, {}, alias="second")
    assert again.version == first.version
    assert versions.aliases(name) == {"challenger": "1", "second": "1"}


def test_other_files_of_the_same_run_leave_the_first_version_as_it_was(run_id: str, bundle: Path, name: str) -> None:
    versions.register(run_id, bundle, name, {})
    before = contents(bundle)
    (bundle / "generation_config.json").write_text("{}")
    second = versions.register(run_id, bundle, name, {})
    assert second.version == "2"
    assert contents(Path(versions.resolve(f"models:/{name}/1").path)) == before
    assert contents(Path(versions.resolve(f"models:/{name}@challenger").path)) == contents(bundle)


def test_other_references_come_back_unchanged() -> None:
    for reference in ("gpt2", "/models/x", "./models:/x", "package:name/file.gguf"):
        assert versions.resolve(reference) == versions.ResolvedModel(reference)


def test_missing_things_are_told_apart(run_id: str, bundle: Path, name: str) -> None:
    versions.register(run_id, bundle, name, {})
    with pytest.raises(RegistryError, match=f"no model `{name}x` .*did you mean `{name}`"):
        versions.resolve(f"models:/{name}x@champion")
    with pytest.raises(RegistryError, match=r"no model `zzzz` .*; models: .*test_"):
        versions.resolve("models:/zzzz@champion")
    with pytest.raises(RegistryError, match="has no alias `champion`; aliases: challenger"):
        versions.resolve(f"models:/{name}@champion")
    with pytest.raises(RegistryError, match="has no version 7; versions: 1"):
        versions.resolve(f"models:/{name}/7")
    with pytest.raises(RegistryError, match="has no version 7"):
        versions.set_alias(name, "champion", "7")


@pytest.mark.parametrize(
    "reference",
    [
        "models:/",
        "models:/name",
        "models:/name@",
        "models:/name/",
        "models:/name/latest",
        "models:/name/Production",
        "models:/name/0",
        "models:/name/-1",
        "models:/name@a@b",
        "models:/../x@champion",
        "models:/..@champion",
        "models:/../../etc/1",
        "models:/a\\b/1",
        "models:/ x/1",
        "models:/name@latest",
        "models:/name@v1",
        "models:/name@../x",
        "models://host/name@champion",
    ],
)
def test_malformed_references_are_refused(reference: str) -> None:
    with pytest.raises(RegistryError, match=r"not a model reference|not a model name|not an alias"):
        versions.resolve(reference)


@pytest.mark.parametrize("bad", ["", "..", "a/b", "a:b", ".hidden", "a@b", "x\n", "x" * 300])
def test_malformed_names_and_aliases_are_refused_before_anything_is_uploaded(
    bad: str, run_id: str, bundle: Path
) -> None:
    with pytest.raises(RegistryError, match="not a model name"):
        versions.register(run_id, bundle, bad, {})
    with pytest.raises(RegistryError, match="not an alias"):
        versions.register(run_id, bundle, "good", {}, alias=bad)
    assert store.client().list_artifacts(run_id) == []


def test_a_folder_that_is_not_there_is_named(run_id: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(RegistryError, match=r"gone: no such folder"):
        versions.register(run_id, tmp_path / "gone", name, {})


def test_files_of_another_machine_are_named(run_id: str, bundle: Path, name: str) -> None:
    versions.register(run_id, bundle, name, {})
    path = Path(versions.resolve(f"models:/{name}/1").path)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(RegistryError, match=f"its files are at {path}, which does not exist on this machine"):
        versions.resolve(f"models:/{name}/1")


def test_scores_are_recorded_on_version_and_run(run_id: str, bundle: Path, name: str) -> None:
    versions.register(run_id, bundle, name, {})
    versions.log_evaluation(name, "1", {"exact_match": 0.1 + 0.2, "loss": 1})
    assert versions.evaluation(versions.get_version(name, "1")) == {"exact_match": 0.1 + 0.2, "loss": 1.0}
    assert store.client().get_run(run_id).data.metrics["eval.exact_match"] == 0.1 + 0.2
    with pytest.raises(RegistryError, match=r"`loss` .* is nan"):
        versions.log_evaluation(name, "1", {"loss": float("nan")})


def test_scores_say_what_they_were_measured_on(run_id: str, bundle: Path, name: str) -> None:
    versions.register(run_id, bundle, name, {})
    versions.log_evaluation(name, "1", {"exact_match": 0.5, "loss": 2.0}, data="abc123")
    versions.log_evaluation(name, "1", {"loss": 1.0}, data="def456")
    recorded = versions.get_version(name, "1")
    assert versions.evaluation_data(recorded) == {"exact_match": "abc123", "loss": "def456"}
    assert versions.evaluation(recorded) == {"exact_match": 0.5, "loss": 1.0}


def test_aliases_move(run_id: str, bundle: Path, name: str) -> None:
    versions.register(run_id, bundle, name, {})
    (bundle / "more").write_text("more")
    versions.register(run_id, bundle, name, {})
    versions.set_alias(name, "champion", "1")
    assert versions.aliases(name) == {"challenger": "2", "champion": "1"}
    versions.set_alias(name, "champion", "2")
    assert versions.version_of_alias(name, "champion").version == "2"


def test_an_upload_that_fails_leaves_no_version_and_the_alias_where_it_was(
    run_id: str, bundle: Path, name: str
) -> None:
    versions.register(run_id, bundle, name, {})
    (bundle / "new").write_text("new")
    (bundle / "zz-dangling").symlink_to(bundle / "nowhere")
    with pytest.raises(RegistryError, match=f"cannot be registered as `{name}`: .*zz-dangling"):
        versions.register(run_id, bundle, name, {})
    assert versions.aliases(name) == {"challenger": "1"}
    (bundle / "zz-dangling").unlink()
    assert versions.register(run_id, bundle, name, {}).version == "2"
    assert contents(Path(versions.resolve(f"models:/{name}@challenger").path)) == contents(bundle)
