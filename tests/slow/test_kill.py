"""Workers and drivers killed with SIGKILL at random moments: the finished weights are those of an unbroken run.

HELIOSTAT_KILLS=5 makes five runs of four killed workers and one killed driver each, instead of one run with one each.
"""

import os
import random
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from heliostat import journal
from heliostat.models import bundle
from heliostat.quickstart import schedules
from tests.slow import command

CONFIG = str(Path(__file__).parents[2] / "jobs" / "examples" / "cron" / "train.yaml")
RUNS = int(os.environ.get("HELIOSTAT_KILLS", "0"))
KILLS = ["worker"] * (4 if RUNS else 1) + ["driver"]
# Steps that a start trains before the next kill; most of them are trained again.
LONGEST_LIFE = 40


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of 240 steps that saves every 20, too short to learn much and long enough to be hit."""
    folder = tmp_path_factory.mktemp("kill")
    schedules.write(folder)
    return [
        "train", CONFIG, *(f"data.{split}={folder}/{split}.jsonl" for split in ("train", "validation", "test")),
        "model.scratch.config={n_layer: 2, n_embd: 64, n_head: 2}", "training.max_steps=240", "training.save_steps=20",
        "training.eval_steps=120", "training.logging_steps=1", "training.max_failures=-1",
        "registry.register_model=false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights' hash of the run that nobody disturbs."""
    storage = tmp_path_factory.mktemp("unbroken")
    return weights_hash(command.run(*arguments, f"storage_path={storage}"))


def weights_hash(result: dict[str, Any]) -> str:
    """sha256 of the bundle's weights, which are fp32."""
    return str(bundle.read_manifest(Path(result["bundle"]))["files"]["model.safetensors"])


def starts(run: Path) -> list[int]:
    """The steps from which workers went on."""
    return [row["step"] for row in journal.read(run / journal.NAME)[0] if "progress.start" in row["metrics"]]


def has_lived(run: Path, start: int, steps: int) -> bool:
    """Whether the start of that number, or a later one, has logged so many steps."""
    rows, _ = journal.read(run / journal.NAME)
    began = [index for index, row in enumerate(rows) if "progress.start" in row["metrics"]]
    return len(began) >= start and sum("loss" in row["metrics"] for row in rows[began[-1] :]) >= steps


def kill(victim: str, process: "subprocess.Popen[str]", chance: random.Random) -> None:
    """Kill one of the workers, or the driver, with whom all that it started must end."""
    if victim == "worker":
        workers = command.processes_below(process.pid, "RayTrainWorker")
        assert len(workers) == 2
        chance.choice(workers).send_signal(signal.SIGKILL)
        return
    below = command.processes_below(process.pid)
    process.kill()
    process.communicate()
    assert command.still_alive(below) == []


@pytest.mark.parametrize("number", range(max(1, RUNS)))
def test_random_kills_change_nothing(number: int, arguments: list[str], unbroken: str, tmp_path: Path) -> None:
    chance, run = random.Random(number), tmp_path / "cron-0001"
    victims = chance.sample(KILLS, len(KILLS))
    arguments = [*arguments, f"storage_path={tmp_path}"]
    process = command.start(*arguments)
    for kills, victim in enumerate(victims, start=1):
        command.wait_for(partial(has_lived, run, kills, chance.randint(1, LONGEST_LIFE)), process)
        kill(victim, process, chance)
        if victim == "driver":
            process = command.start(*arguments, "resume=must")
    result = command.finish(process)
    print(f"run {number}: killed {', '.join(victims)}; went on from {starts(run)[1:]}")
    assert len(starts(run)) == len(victims) + 1
    assert weights_hash(result) == unbroken
