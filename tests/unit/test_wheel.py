"""What `pip install` of a wheel gives: everything that the library reads, and the command, far from the checkout."""

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from heliostat import __version__
from tests import wheel
from tests.conftest import REPOSITORY

LIBRARY = REPOSITORY / "platform" / "heliostat"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.install(built, tmp_path_factory.mktemp("environment"))


def output(folder: Path, *command: str) -> str:
    """What a program says that is started in the folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_has_every_file_of_the_library_and_no_other(built: Path) -> None:
    files = {path for path in LIBRARY.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    names = {str(path.relative_to(LIBRARY.parent)) for path in files}
    assert {"heliostat/py.typed", "heliostat/quickstart/train.yaml", "heliostat/serving/playground/index.html"} <= names
    packed = set(zipfile.ZipFile(built).namelist())
    assert {name for name in packed if ".dist-info/" not in name} == names


def test_the_command_works_far_from_the_checkout(programs: Path, tmp_path: Path) -> None:
    where = "import heliostat, importlib.metadata as m; print(heliostat.__file__, m.version('heliostat'))"
    file, version = output(tmp_path, str(programs / "python"), "-c", where).split()
    assert Path(file).is_relative_to(programs.parent)
    assert version == __version__
    heliostat = str(programs / "heliostat")
    assert output(tmp_path, heliostat, "--version").split()[-1] == __version__
    assert "tune_decoding" in json.loads(output(tmp_path, heliostat, "schema"))["properties"]
    assert json.loads(output(tmp_path, heliostat, "doctor", "--json").splitlines()[-1])
