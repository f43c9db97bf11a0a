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
FORMAT_VERSION = 1
# Written beside the bundle by MLflow; loading never reads it.
_IGNORED = frozenset({MANIFEST, "MLmodel"})


def write(folder: Path, *, weights: Path, tokenizer: Any, generation_config: Any, manifest: dict[str, Any]) -> Path:
    """Assemble a bundle at `folder` from the files in `weights` (linked, not copied), whole or not at all.

    An older bundle at `folder` is replaced.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(weights, temporary, copy_function=_link)
    tokenizer.save_pretrained(temporary)
    generation_config.save_pretrained(temporary)
    hashes = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
    content = {"format_version": FORMAT_VERSION, **manifest, "files": hashes}
    (temporary / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    return folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
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
