"""Models at URIs load as those in folders do; damaged ones never become copies."""

import json
import shutil
from pathlib import Path

import pytest

from heliostat import state
from heliostat.errors import ModelError
from heliostat.models import base, bundle, files, remote
from heliostat.registry import versions
from heliostat.serving.config import EndpointArgs, ModelArgs
from heliostat.serving.rollout import Target
from tests.bundles import write_bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("remote") / "bundle")


@pytest.fixture
def stored(made: Path, tmp_path: Path) -> Path:
    """The bundle in a place of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "bucket" / "bundle"))


def test_a_bundle_comes_as_it_is_and_once(stored: Path) -> None:
    first = Path(versions.resolve(stored.as_uri()).path)
    assert first.is_relative_to(state.downloads())
    assert bundle.verify(first) == bundle.verify(stored)
    assert base.resolve(f"{stored.as_uri()}/") == str(first)


def test_a_bundle_that_changes_is_fetched_again(stored: Path) -> None:
    first = remote.fetch(stored.as_uri())
    manifest = bundle.read_manifest(stored)
    bundle.derive(stored, stored.with_name("new"), generation_config={"do_sample": True}, changes={})
    shutil.rmtree(stored)
    stored.with_name("new").rename(stored)
    second = remote.fetch(stored.as_uri())
    assert bundle.verify(second) != manifest == bundle.verify(first)


def test_a_damaged_file_is_named_at_its_uri_and_nothing_is_kept(stored: Path) -> None:
    weights = stored / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match=rf"^{stored.as_uri()}/model.safetensors: is damaged"):
        versions.resolve(stored.as_uri())
    assert not list(state.downloads().glob("file/*"))
    weights.write_bytes(content)
    versions.resolve(stored.as_uri())


def test_a_single_file_keeps_its_name(stored: Path) -> None:
    fetched = remote.fetch(f"{stored.as_uri()}/config.json")
    assert (fetched.name, fetched.read_bytes()) == ("config.json", (stored / "config.json").read_bytes())


@pytest.mark.parametrize(("name", "told"), [("nix", "no such file or folder"), ("bundle/*", "is not a file below")])
def test_what_is_no_model_is_refused(stored: Path, name: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        remote.fetch(f"{stored.parent.as_uri()}/{name}")


def test_an_endpoint_leaves_the_copy_to_its_replicas(stored: Path) -> None:
    uri = stored.as_uri()
    target = Target.of(ModelArgs(model=uri), EndpointArgs())
    assert (target.id, target.reference, target.version) == ("bundle", uri, None)
    assert not state.downloads().exists()
    with pytest.raises(ModelError, match="no such file or folder"):
        Target.of(ModelArgs(model=f"{uri}s"), EndpointArgs())


def test_an_adapter_finds_its_base_at_the_uri_it_was_trained_on(stored: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/a/copy/that/was/removed"}')
    known = {"reference": stored.as_uri(), "sha256": files.weights_sha256(stored)}
    (adapter / bundle.MANIFEST).write_text(json.dumps({"format_version": 1, "files": {}, "base": known}))
    assert base.base_of(adapter) == str(remote.fetch(stored.as_uri()))
