"""The model bundle: the folder that training writes and serving reads. Knows nothing of tensors.

A Hugging Face folder (safetensors weights or a LoRA adapter, tokenizer, chat template, generation_config.json) with one
more file, `heliostat.json`: what the model is, where it comes from, and the sha256 of every other file.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from heliostat.errors import ModelError
from heliostat.models import files

MANIFEST = "heliostat.json"
GENERATION_CONFIG = "generation_config.json"
FORMAT_VERSION = 1
# Written beside the bundle by MLflow; loading never reads it.
_IGNORED = frozenset({MANIFEST, "MLmodel"})


def write(
    folder: Path, *, weights: Path, tokenizer: Any, generation_config: Any | None, manifest: dict[str, Any]
) -> Path:
    """Assemble a bundle at `folder` from the files in `weights` (linked, not copied), whole or not at all.

    An older bundle at `folder` is replaced. A model that generates nothing has no `generation_config`.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(weights, temporary, copy_function=_link_tensors)
    tokenizer.save_pretrained(temporary)
    if generation_config is not None:
        generation_config.save_pretrained(temporary)
    hashes = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
    return _finish(temporary, folder, {"format_version": FORMAT_VERSION, **manifest, "files": hashes})


def derive(source: Path, folder: Path, *, generation_config: dict[str, Any], changes: dict[str, Any]) -> Path:
    """The bundle at `source` with another generation_config.json, at `folder`; all other files are linked, not copied.

    `changes` go on top of the manifest, which keeps its lineage; a key whose new value is None is removed. An older
    bundle at `folder` is replaced.

    Raises:
        ModelError: `source` is not a bundle.
    """
    manifest = read_manifest(source)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in manifest["files"].keys() - {GENERATION_CONFIG}:
        files.link(str(source / name), str(temporary / name))
    changed = temporary / GENERATION_CONFIG
    changed.write_text(json.dumps(generation_config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    hashes = dict(sorted({**manifest["files"], GENERATION_CONFIG: files.sha256(changed)}.items()))
    kept = {key: value for key, value in {**manifest, **changes}.items() if value is not None or key not in changes}
    return _finish(temporary, folder, {**kept, "files": hashes})


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The content of the bundle's generation_config.json; empty if there is none.

    Raises:
        ModelError: it is damaged.
    """
    path = folder / GENERATION_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return content


def _finish(temporary: Path, folder: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest, and put the bundle in its place."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (temporary / MANIFEST).write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    return folder


def _link_tensors(source: str, target: str) -> None:
    """Small files are copied: what is saved over a linked one would change the source too."""
    if source.endswith(".safetensors"):
        files.link(source, target)
    else:
        shutil.copy2(source, target)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of the bundle at `folder`, after checking every file against it.

    Raises:
        ModelError: a file is missing, changed, not listed, or unsafe; the message names it.
    """
    manifest = read_manifest(folder)
    present = {path.name for path in folder.iterdir()} - _IGNORED
    for name in sorted(manifest["files"].keys() - present):
        raise ModelError(f"{folder / name}: is missing from the bundle; fetch or register the model again")
    for name in sorted(present - manifest["files"].keys()):
        raise ModelError(f"{folder / name}: does not belong to the bundle ({MANIFEST} does not list it); remove it")
    files.refuse_unsafe(folder)
    for name, digest in manifest["files"].items():
        if files.sha256(folder / name) != digest:
            raise ModelError(
                f"{folder / name}: is damaged (its sha256 is not the one in {MANIFEST}); fetch the model again"
            )
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of heliostat.json, not checked against the files.

    Raises:
        ModelError: it is missing or not a manifest.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ModelError(f"{folder}: is not a bundle (no {MANIFEST})")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, listed = manifest["format_version"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is damaged or not a bundle manifest ({error!r})") from error
    if version != FORMAT_VERSION or not isinstance(listed, dict) or not all(_plain_name(name) for name in listed):
        raise ModelError(f"{path}: format_version {version} is not {FORMAT_VERSION}, or its file list is not one")
    return dict(manifest)


def _plain_name(name: str) -> bool:
    return name == os.path.basename(name) and name not in ("", ".", "..")
