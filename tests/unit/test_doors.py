"""jobs/*.py are the commands of the same names, with the library of the checkout that they lie in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from heliostat.jobs.submit import VERBS
from tests.conftest import REPOSITORY

DOORS = sorted((REPOSITORY / "jobs").glob("*.py"))


def run(door: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As `ray job submit` runs it: from the folder above, with no PYTHONPATH of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, f"jobs/{door.name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=door.parents[1])


def test_there_is_one_for_each_command_that_can_be_submitted() -> None:
    assert {door.stem.replace("_", "-") for door in DOORS} == set(VERBS)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: str(door.name))
def test_a_door_is_the_command_of_its_name(door: Path) -> None:
    done = run(door, "--help")
    assert done.stdout.startswith(f"usage: heliostat {door.stem.replace('_', '-')} ")


def test_the_library_is_that_of_the_checkout_and_files_beside_the_door_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    door = Path(shutil.copy(REPOSITORY / "jobs" / "train.py", tmp_path / "jobs"))
    (tmp_path / "jobs" / "json.py").write_text("raise SystemExit('the wrong json')")
    library = tmp_path / "platform" / "heliostat"
    library.mkdir(parents=True)
    (library / "__init__.py").touch()
    (library / "cli.py").write_text("import json\ndef main(arguments):\n    print(arguments)\n    return 3\n")
    done = run(door, "x.yaml")
    assert (done.stdout, done.returncode) == ("['train', 'x.yaml']\n", 3), done.stderr
