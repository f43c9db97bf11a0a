"""Where a model's files are, and whether they may be trusted. Knows nothing of tensors.

A model reference is a local folder, a GGUF file, `package:NAME/FILE` (a file shipped by an installed Python package) or
a hub name. Registry URIs (models:/...) are turned into folders by `heliostat.registry` before they come here.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

from heliostat.errors import ModelError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})


def locate(reference: str) -> Path | str:
    """The local folder or file that `reference` names, or the hub name it must be.

    Raises:
        ModelError: a package or file that is not there.
    """
    if reference.startswith("package:"):
        return _package_file(reference)
    path = Path(reference).expanduser()
    if path.exists():
        return path.absolute()
    if _looks_like_path(reference):
        raise ModelError(f"model `{reference}`: no such file or folder")
    return reference


def _looks_like_path(reference: str) -> bool:
    return reference.startswith((".", "/", "~")) or reference.endswith(".gguf") or reference.count("/") > 1


def _package_file(reference: str) -> Path:
    package, _, file = reference.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model `{reference}`: the Python package `{package}` is not installed; `make install` brings the one "
            "that the examples use; or set model.model_name_or_path to a folder or hub name"
        )
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.exists():
        raise ModelError(f"model `{reference}`: the package `{package}` has no file `{file}`")
    return path


def refuse_unsafe(folder: Path) -> None:
    """Refuse a model folder that would run code when loaded.

    Raises:
        ModelError: a pickle file, or an `auto_map` (code shipped with the model), with the file's name.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLE_SUFFIXES:
            raise ModelError(
                f"{path}: pickled weights can run code when loaded and are refused; convert them to safetensors"
            )
        if path.suffix == ".json" and _has_auto_map(path):
            raise ModelError(f"{path}: has an `auto_map`, which loads code shipped with the model, and is refused")


def _has_auto_map(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: is not valid JSON ({error})") from error
    return isinstance(content, dict) and bool(content.get("auto_map"))


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: Path) -> str:
    """One digest over a folder's safetensors files, by name and content: the identity of a base model."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name}:{sha256(path)}\n".encode())
    return digest.hexdigest()


def link(source: str | Path, target: str | Path) -> None:
    """Make `target` the same file as `source`, or a copy of it where the file system has no hard links between them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
