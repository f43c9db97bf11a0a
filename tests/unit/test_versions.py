"""A registered bundle comes back byte for byte by alias and number; wrong references are told apart."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.artifacts import download_artifacts

from heliostat.errors import ModelError, RegistryError
from heliostat.models import bundle as bundles
from heliostat.models import files
from heliostat.registry import store, versions
from tests import mlflow_server

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server's URI and the folder that holds its artifacts."""
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server.running(folder) as uri:
        yield uri, folder / "artifacts"


@pytest.fixture
def on_server(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The test's store is the server, and its downloads are its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server[0])
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path / "downloading"))
    return server[1]


def new_run() -> str:
    return str(store.client().create_run(store.experiment_id("shared")).info.run_id)


def write_bundle(folder: Path, **contents: bytes) -> Path:
    """A bundle as far as its manifest goes; the files are called NAME.safetensors."""
    folder.mkdir()
    for name, content in contents.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    hashes = {path.name: files.sha256(path) for path in folder.iterdir()}
    (folder / bundles.MANIFEST).write_text(json.dumps({"format_version": 1, "files": hashes}))
    return folder


LARGE = os.urandom(versions.SHARED_BYTES)
OTHER = os.urandom(versions.SHARED_BYTES)


def stored(folder: Path) -> int:
    """Bytes on disk below the folder, a file with several names counted once."""
    found = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return sum(found.values())


def register_three(tmp_path: Path, name: str) -> list[Path]:
    """Version 2 shares the weights of 1; version 3 shares them by way of 2, and one more large file of 2 itself."""
    first = write_bundle(tmp_path / "first", weights=LARGE, settings=b"1")
    second = write_bundle(tmp_path / "second", weights=LARGE, extra=OTHER, settings=b"2")
    third = write_bundle(tmp_path / "third", weights=LARGE, extra=OTHER, settings=b"3")
    version = versions.register(new_run(), first, name, {})
    version = versions.register(new_run(), second, name, {}, shares=version)
    version = versions.register(new_run(), third, name, {}, shares=versions.get_version(name, "2"))
    assert version.version == "3"
    return [first, second, third]


def test_shared_files_are_linked_in_a_folder_of_artifacts(tmp_path: Path, name: str, home: Path) -> None:
    before = stored(home / "artifacts")
    given = register_three(tmp_path, name)
    assert stored(home / "artifacts") - before < 2 * versions.SHARED_BYTES + 10_000
    folders = [Path(versions.resolve(f"models:/{name}/{number}").path) for number in (1, 2, 3)]
    assert [contents(folder) for folder in folders] == [contents(folder) for folder in given]
    assert len({(folder / "weights.safetensors").stat().st_ino for folder in folders}) == 1
    assert not any(versions.SHARED_TAG in versions.get_version(name, number).tags for number in "123")
    shutil.rmtree(folders[0])
    assert contents(folders[2]) == contents(given[2]), "a complete bundle, whatever becomes of the others"


def test_shared_files_are_not_sent_to_a_server_again(tmp_path: Path, name: str, on_server: Path) -> None:
    before = stored(on_server)
    given = register_three(tmp_path, name)
    assert stored(on_server) - before < 2 * versions.SHARED_BYTES + 10_000
    shutil.rmtree(tmp_path / "downloading")  # another machine
    third = Path(versions.resolve(f"models:/{name}/3").path)
    assert contents(third) == contents(given[2])
    folders = [Path(versions.resolve(f"models:/{name}/{number}").path) for number in (1, 2, 3)]
    assert [contents(folder) for folder in folders] == [contents(folder) for folder in given]
    assert len({(folder / "weights.safetensors").stat().st_ino for folder in folders}) == 1, "downloaded once"
    assert stored(tmp_path / "downloading") < 2 * versions.SHARED_BYTES + 10_000
    assert sorted(path.name for path in third.parent.iterdir()) == sorted(folder.name for folder in folders)


def test_a_version_outlives_the_registry_entry_it_shares_with(tmp_path: Path, name: str, on_server: Path) -> None:
    given = register_three(tmp_path, name)
    store.client().delete_model_version(name, "1")
    store.client().delete_model_version(name, "2")
    shutil.rmtree(tmp_path / "downloading")
    assert contents(Path(versions.resolve(f"models:/{name}/3").path)) == contents(given[2])


def test_a_version_whose_shared_files_are_gone_is_a_clear_error(tmp_path: Path, name: str, on_server: Path) -> None:
    register_three(tmp_path, name)
    run_id = versions.get_version(name, "1").run_id
    (found,) = on_server.rglob(f"{run_id}/artifacts/model")
    shutil.rmtree(found)
    shutil.rmtree(tmp_path / "downloading")
    with pytest.raises(RegistryError, match=run_id):
        versions.resolve(f"models:/{name}/3")


def test_nothing_is_shared_with_a_version_of_other_files(tmp_path: Path, name: str, on_server: Path) -> None:
    first = write_bundle(tmp_path / "first", weights=LARGE, settings=b"same")
    second = write_bundle(tmp_path / "second", weights=OTHER, settings=b"same")
    version = versions.register(new_run(), first, name, {})
    version = versions.register(new_run(), second, name, {}, shares=version)
    assert versions.SHARED_TAG not in version.tags
    assert contents(Path(versions.resolve(version.uri).path)) == contents(second)


def test_only_bundles_share(run_id: str, bundle: Path, tmp_path: Path, name: str) -> None:
    version = versions.register(run_id, bundle, name, {})
    with pytest.raises(ModelError, match=r"heliostat.json: is damaged or not a bundle manifest"):
        versions.register(run_id, write_bundle(tmp_path / "b", weights=LARGE), name, {}, shares=version)
    assert versions.aliases(name) == {"challenger": "1"}


@pytest.mark.parametrize(
    ("reference", "is_one"),
    [
        ("models:/cron@champion", True),
        ("models:/cron/3", False),
        ("gpt2", False),
        ("/a@b", False),
        ("models:/@x", False),
    ],
)
def test_only_aliases_move(reference: str, is_one: bool) -> None:
    assert versions.is_alias(reference) == is_one
