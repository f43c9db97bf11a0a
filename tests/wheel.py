"""The wheel of this checkout, in an environment of its own outside of it, with the dependencies from here."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.conftest import REPOSITORY

_PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def build(folder: Path) -> Path:
    """The wheel, built into the folder."""
    _run([*_PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPOSITORY)])
    (wheel,) = folder.glob("heliostat-*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Make a virtual environment that has the wheel; returns its programs' folder."""
    venv.create(folder)
    programs = folder / "bin"
    _run([*_PIP, "--python", str(programs / "python"), "install", "--no-deps", "--no-index", str(wheel)])
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # Python does not read such files of a folder that it learns of in this way: this checkout is not found through it.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return programs


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
