"""Models at URIs load as those in folders do; damaged ones never become copies."""

import shutil
from pathlib import Path

import pytest

from heliostat import state
from heliostat.errors import ModelError
from heliostat.models import base, bundle, remote
from heliostat.registry import versions
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
