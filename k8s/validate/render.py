"""Renders overlays as `kubectl apply -k` would. Knows kustomize's command line, not what is in the manifests."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from heliostat.errors import ConfigError
from k8s.validate.manifests import Manifest

FOLDER = Path(__file__).parents[1]
OVERLAYS = ("cpu-dev", "gpu-prod")
# Components that one may put around an overlay, and around which of its two folders.
OPTIONS = {"incremental-upgrade": "", "kueue": "jobs"}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def tool() -> list[str] | None:
    """The command that renders a folder: kubectl, or kustomize itself; None where neither is installed."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    return ["kustomize", "build"] if shutil.which("kustomize") else None


def installation(overlay: str, options: Sequence[str] = ()) -> list[Manifest]:
    """All objects of an overlay: what runs all the time, and the jobs; with the components named in `options`.

    Raises:
        ConfigError: kustomize is not there, or refuses the folder.
    """
    label = " + ".join([f"k8s/overlays/{overlay}", *options])
    found = []
    for part in ("", "jobs"):
        components = [FOLDER / "components" / name for name in options if OPTIONS[name] == part]
        found += _objects(rendered(FOLDER / "overlays" / overlay / part, components), label)
    return found


def _objects(text: str, label: str) -> list[Manifest]:
    return [Manifest(label, body) for body in yaml.load_all(text, Loader=_LOADER) if body]


def rendered(folder: Path, components: Sequence[Path]) -> str:
    """The folder's objects as YAML, with more components.

    Raises:
        ConfigError: kustomize is not there, or refuses the folder.
    """
    if not components:
        return _run(folder)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch).resolve()
        lines = {
            "resources": [os.path.relpath(folder, place)],
            "components": [os.path.relpath(component, place) for component in components],
        }
        (place / "kustomization.yaml").write_text(yaml.safe_dump(lines))
        return _run(place)


def _run(folder: Path) -> str:
    command = tool()
    if command is None:
        raise ConfigError("neither `kubectl` nor `kustomize` is installed; one of them renders the manifests")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{folder}: {done.stderr.strip()}")
    return done.stdout
