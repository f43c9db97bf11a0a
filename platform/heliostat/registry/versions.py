"""Model versions: a folder registered under a name, found again by alias or number. Of its content it knows
only the manifest, and that for shared files alone.

A version's source is a plain artifact folder of its run, without an MLmodel file: MLflow would write a metadata file of
its own into such a folder whenever it is downloaded, and a bundle holds exactly the files of its manifest.
"""

import difflib
import functools
import glob
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.time import get_current_time_millis
from mlflow.utils.uri import append_to_uri_path, is_local_uri

from heliostat import cache, storage
from heliostat.config import fingerprint
from heliostat.errors import RegistryError
from heliostat.models import files, remote
from heliostat.models.bundle import read_manifest
from heliostat.registry import store

ARTIFACT_PATH = "model"
DIGEST_TAG = "heliostat.bundle_sha256"
SHARED_TAG = "heliostat.shared_files"
# Smaller files are not worth leaving out.
SHARED_BYTES = 1 << 20
EVALUATION_PREFIX = "eval."
EVALUATION_DATA_PREFIX = "eval_data."

# MLflow refuses `/` and `:` in names and aliases other than [\w-]. A name is also a folder's name here, and `@` parts
# it from the alias.
_NAME = re.compile(r"[^\s./:@\\\x00-\x1f][^/:@\\\x00-\x1f]{0,199}")
_ALIAS = re.compile(r"[\w-]{1,255}", re.ASCII)
_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[1-9][0-9]{0,9}))")


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model."""

    name: str
    version: str
    run_id: str | None
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """models:/NAME/VERSION."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class ResolvedModel:
    """What a model reference stands for."""

    path: str
    """A folder on this machine; or the reference itself where it is none of the registry's."""
    name: str | None = None
    version: str | None = None


def register(
    run_id: str,
    bundle: Path,
    name: str,
    tags: Mapping[str, str],
    alias: str = "challenger",
    description: str | None = None,
    shares: ModelVersion | None = None,
) -> ModelVersion:
    """Upload the bundle to the run and make it a new version of the model `name`, which is created if there is none.

    The alias moves last, when everything is in place. Registering the same files for the same run again (after a crash,
    say) gives the version that is already there.

    Args:
        shares: a version with some of the same large files, by the manifests of both bundles. These are not uploaded
            again. Where artifacts are folders of this machine they are linked, and the new version is as complete as
            any. Elsewhere the tag `heliostat.shared_files` says where they are, and `resolve` puts the folder together;
            MLflow by itself downloads only the others, and deleting the artifacts of `shares` breaks the new version.

    Raises:
        RegistryError: a malformed name or alias, no such folder, or the store failed.
        ModelError: with `shares`, one of the two is no bundle.
    """
    check_name(name)
    check_alias(alias)
    if not bundle.is_dir():
        raise RegistryError(f"{bundle}: no such folder, so it cannot be registered as `{name}`")
    with store.failures(f"{bundle} cannot be registered as `{name}`"):
        client = store.client()
        digest = _digest(bundle)
        version = _registered(client, run_id, name, digest)
        if version is None:
            path = _artifact_path(client, run_id, digest)
            source = str(append_to_uri_path(client.get_run(run_id).info.artifact_uri, path))
            shared = _shared_files(bundle, source, shares) if shares else None
            _upload(client, run_id, bundle, path, shared)
            tags = {**tags, **_place(shared, source), DIGEST_TAG: digest}
            version = _create(client, run_id, source, name, tags, description)
        client.set_registered_model_alias(name, alias, version.version)
    return version


def resolve(reference: str) -> ResolvedModel:
    """The folder of models:/NAME@ALIAS, models:/NAME/VERSION or a URI; any other reference comes back unchanged.

    Files on this machine's disks are used where they lie; others are downloaded once, whole or not at all; see
    `heliostat.cache`.

    Raises:
        RegistryError: the reference is malformed, its model, alias or version does not exist, or the store failed.
        ModelError: the bundle is damaged, or there is nothing at the URI.
        StorageError, ResourceError: it cannot be fetched.
    """
    version = look_up(reference)
    if version is None:
        return ResolvedModel(str(remote.fetch(reference)) if storage.is_remote(reference) else reference)
    with store.failures(f"{version.uri} cannot be fetched"):
        path = _fetch(version, str(store.client().get_model_version_download_uri(version.name, version.version)))
    return ResolvedModel(str(path), version.name, version.version)


def look_up(reference: str) -> ModelVersion | None:
    """The version that models:/NAME@ALIAS or models:/NAME/VERSION stands for now; None for any other reference.

    Raises:
        RegistryError: the reference is malformed, its model, alias or version does not exist, or the store failed.
    """
    if not reference.startswith("models:"):
        return None
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise RegistryError(f"`{reference}` is not a model reference; write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match["name"], match["alias"], match["version"]
    return get_version(name, number) if number else version_of_alias(name, alias)


def is_alias(reference: str) -> bool:
    """Whether it is models:/NAME@ALIAS, which can come to stand for another version."""
    match = _REFERENCE.fullmatch(reference)
    return match is not None and match["alias"] is not None


def get_version(name: str, version: str) -> ModelVersion:
    """The version of the model.

    Raises:
        RegistryError: there is no such model or version (the existing ones are named), or the store failed.
    """
    check_name(name)
    found = find_version(name, version)
    if found is not None:
        return found
    aliases(name)  # a clear error for a model that does not exist
    with store.failures(f"version {version} of `{name}` cannot be read"):
        present = store.client().search_model_versions(f"name = '{name}'")
    known = sorted((int(each.version) for each in present), reverse=True)
    raise RegistryError(f"`{name}` has no version {version}; versions: {_listing([str(number) for number in known])}")


def find_version(name: str, version: str) -> ModelVersion | None:
    """The version of the model; None if there is none, or no more.

    Raises:
        RegistryError: the store failed.
    """
    with store.failures(f"version {version} of `{name}` cannot be read"):
        client = store.client()
        try:
            return _model_version(store.attempt(lambda: client.get_model_version(name, version)))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
    return None


def version_of_alias(name: str, alias: str) -> ModelVersion:
    """The version that the alias points to.

    Raises:
        RegistryError: there is no such model or alias (the existing ones are named), or the store failed.
    """
    check_alias(alias)
    known = aliases(name)
    if alias not in known:
        raise RegistryError(f"`{name}` has no alias `{alias}`; aliases: {_listing(sorted(known))}")
    return get_version(name, known[alias])


def aliases(name: str) -> dict[str, str]:
    """Alias -> version of the model.

    Raises:
        RegistryError: there is no such model (the nearest ones are named), or the store failed.
    """
    return {alias: str(version) for alias, version in _registered_model(name).aliases.items()}


def created_at(name: str) -> datetime:
    """When the model was created, in UTC.

    Raises:
        RegistryError: there is no such model (the nearest ones are named), or the store failed.
    """
    return datetime.fromtimestamp(_registered_model(name).creation_timestamp / 1000, UTC)


def set_alias(name: str, alias: str, version: str) -> None:
    """Point the alias to the version.

    Raises:
        RegistryError: a malformed alias, there is no such version, or the store failed.
    """
    check_alias(alias)
    get_version(name, version)
    with store.failures(f"the alias `{alias}` of `{name}` cannot be set"):
        store.attempt(lambda: store.client().set_registered_model_alias(name, alias, version))


def set_tags(name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set tags of the version.

    Raises:
        RegistryError: there is no such version, or the store failed.
    """
    with store.failures(f"version {version} of `{name}` cannot be tagged"):
        client = store.client()
        for key, value in tags.items():
            store.attempt(functools.partial(client.set_model_version_tag, name, version, key, value))


def log_evaluation(name: str, version: str, metrics: Mapping[str, float], *, data: str = "") -> None:
    """Record scores of the version: as its tags `eval.METRIC`, which promotion compares, and as metrics of its run.

    Args:
        data: what the scores were measured on, such as a hash of the rows; kept as the tags `eval_data.METRIC`.
            Promotion compares two scores only where this is the same.

    Raises:
        RegistryError: a score is not finite, there is no such version, or the store failed.
    """
    for metric, value in metrics.items():
        if not math.isfinite(value):
            raise RegistryError(f"the score `{metric}` of `{name}` version {version} is {value}; it is not recorded")
    run_id = get_version(name, version).run_id
    scores = {f"{EVALUATION_PREFIX}{metric}": float(value) for metric, value in metrics.items()}
    sources = {f"{EVALUATION_DATA_PREFIX}{metric}": data for metric in metrics}
    set_tags(name, version, {**{key: repr(value) for key, value in scores.items()}, **sources})
    if run_id is not None:
        now = get_current_time_millis()
        with store.failures(f"the scores of {name} version {version} cannot be logged to its run"):
            batch = [Metric(key, value, now, 0) for key, value in scores.items()]
            store.client().log_batch(run_id, metrics=batch, synchronous=True)


def evaluation(version: ModelVersion) -> dict[str, float]:
    """The scores that `log_evaluation` recorded."""
    scores = {key: value for key, value in version.tags.items() if key.startswith(EVALUATION_PREFIX)}
    return {key.removeprefix(EVALUATION_PREFIX): float(value) for key, value in scores.items()}


def evaluation_data(version: ModelVersion) -> dict[str, str]:
    """Metric -> the `data` that `log_evaluation` was told with its score."""
    sources = {key: value for key, value in version.tags.items() if key.startswith(EVALUATION_DATA_PREFIX)}
    return {key.removeprefix(EVALUATION_DATA_PREFIX): value for key, value in sources.items()}


def check_name(name: str) -> None:
    """Raises:
    RegistryError: the name could not be a registered model's, or not safely a folder's.
    """
    if not _NAME.fullmatch(name) or name != name.strip():
        raise RegistryError(f"{name!r} is not a model name: no `/ : @ \\`, no dot at the start, at most 200 characters")


def check_alias(alias: str) -> None:
    """Raises:
    RegistryError: MLflow would refuse the alias.
    """
    if not _ALIAS.fullmatch(alias) or alias.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", alias):
        raise RegistryError(
            f"{alias!r} is not an alias: letters, digits, `_` and `-`; not `latest`, not `v1`, `v2`, ..."
        )


def _registered_model(name: str) -> Any:
    check_name(name)
    with store.failures(f"the model `{name}` cannot be read"):
        client = store.client()
        try:
            return store.attempt(lambda: client.get_registered_model(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        known = [found.name for found in client.search_registered_models(max_results=1000)]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"models: {_listing(sorted(known))}"
    raise RegistryError(f"no model `{name}` in the registry at {store.shown(store.connect())}; {hint}")


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10]) or "none"
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"


def _model_version(found: Any) -> ModelVersion:
    return ModelVersion(found.name, str(found.version), found.run_id or None, dict(found.tags))


def _registered(client: MlflowClient, run_id: str, name: str, digest: str) -> ModelVersion | None:
    """The version that holds these files and came from this run."""
    for found in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if found.tags.get(DIGEST_TAG) == digest:
            return _model_version(found)
    return None


def _artifact_path(client: MlflowClient, run_id: str, digest: str) -> str:
    """Where in the run the bundle goes: beside earlier ones and never into them."""
    taken = bool(client.list_artifacts(run_id, ARTIFACT_PATH))
    return f"{ARTIFACT_PATH}-{digest[:8]}" if taken else ARTIFACT_PATH


@dataclass(frozen=True)
class _SharedFiles:
    """Files that another version has already."""

    owner: ModelVersion
    source: str
    """Where the owner's artifacts are."""
    folder: Path
    """The owner's complete bundle on this machine."""
    names: tuple[str, ...]


def _shared_files(new: Path, target: str, owner: ModelVersion) -> _SharedFiles | None:
    """Those of the bundle `new`, which goes to `target`; None: there are none, or they cannot be shared."""
    source = str(store.client().get_model_version_download_uri(owner.name, owner.version))
    if _is_local(source) and not _is_local(target):
        return None  # nobody else could read them there
    folder = _fetch(owner, source)
    ours, theirs = (read_manifest(place)["files"] for place in (new, folder))
    same = sorted(name for name in ours.keys() & theirs.keys() if ours[name] == theirs[name])
    names = tuple(name for name in same if (new / name).stat().st_size >= SHARED_BYTES)
    return _SharedFiles(owner, source, folder, names) if names else None


def _upload(client: MlflowClient, run_id: str, new: Path, path: str, shared: _SharedFiles | None) -> None:
    if shared is None:
        client.log_artifacts(run_id, str(new), path)
        return
    with tempfile.TemporaryDirectory(prefix=f".{new.name}-", dir=new.parent) as temporary:
        rest = Path(temporary) / "rest"
        shutil.copytree(
            new, rest, copy_function=files.link, ignore=shutil.ignore_patterns(*map(glob.escape, shared.names))
        )
        client.log_artifacts(run_id, str(rest), path)


def _place(shared: _SharedFiles | None, target: str) -> dict[str, str]:
    """Link the shared files into the folder `target`; where it is none, the tag that stands for them."""
    if shared is None:
        return {}
    if not _is_local(target):
        owner = shared.owner
        whose = {"name": owner.name, "version": owner.version, "run_id": owner.run_id, "source": shared.source}
        return {SHARED_TAG: json.dumps({**whose, "files": shared.names, "shares": owner.tags.get(SHARED_TAG)})}
    for name in shared.names:
        linked = Path(local_file_uri_to_path(target)) / name
        linked.unlink(missing_ok=True)  # left by a registration that was killed
        files.link(shared.folder / name, linked)
    return {}


def _is_local(uri: str) -> bool:
    return bool(is_local_uri(uri, is_tracking_or_registry_uri=False))


def _create(
    client: MlflowClient, run_id: str, source: str, name: str, tags: Mapping[str, str], description: str | None
) -> ModelVersion:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return _model_version(client.create_model_version(name, source, run_id, tags=dict(tags), description=description))


def _digest(folder: Path) -> str:
    """A hash of the names and contents of all files in the folder."""
    whole = hashlib.sha256()
    for path in sorted(found for found in folder.rglob("*") if found.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{content}  {path.relative_to(folder).as_posix()}\n".encode())
    return whole.hexdigest()


def _fetch(version: ModelVersion, source: str) -> Path:
    if _is_local(source):
        path = Path(local_file_uri_to_path(source))
        if not path.is_dir():
            raise RegistryError(f"{version.uri}: its files are at {path}, which does not exist on this machine")
        return path
    # The version's number alone is no key: another server, or a model made anew, has a version of that number too.
    key = fingerprint([store.shown(store.connect()), source, version.run_id])[:8]
    # Files are never shared with what the copy holds already, so a version's own size is what it takes.
    entry = cache.Entry(version.name, f"{version.version}-{key}", lambda: _size(source))
    return cache.keep(entry, lambda folder: _download(version, source, folder))


def _size(source: str) -> int:
    """Bytes of all artifacts at and below `source`."""
    found = list_artifacts(artifact_uri=source, tracking_uri=store.connect())
    below = [_size(append_to_uri_path(source, Path(each.path).name)) for each in found if each.is_dir]
    return sum(below, sum(each.file_size or 0 for each in found))


def _download(version: ModelVersion, source: str, folder: Path) -> None:
    shared = _shared_paths(version)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        downloaded = Path(download_artifacts(source, dst_path=temporary, tracking_uri=store.connect()))
        if not downloaded.is_dir() or not any(downloaded.iterdir()):
            raise RegistryError(f"{store.shown(source)}: holds no files; register the model again")
        for path in downloaded.iterdir():
            path.rename(folder / path.name)
    for path in shared:
        files.link(path, folder / path.name)
    remote.check(folder, version.uri)


def _shared_paths(version: ModelVersion) -> list[Path]:
    """The files that the version shares with another one, whose folder is fetched for them."""
    tag = version.tags.get(SHARED_TAG)
    if tag is None:
        return []
    owner = json.loads(tag)
    tags = {SHARED_TAG: owner["shares"]} if owner["shares"] else {}
    # All of it is in the tag: the owner's version may have been deleted from the registry, and its files not.
    folder = _fetch(ModelVersion(owner["name"], owner["version"], owner["run_id"], tags), owner["source"])
    return [folder / name for name in owner["files"]]
