"""Run the `heliostat` command as a user does: a process of its own, its result from the last line of stdout."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from heliostat import journal as metrics_file

_HERE = (sys.executable, "-m", "heliostat.cli")


def start(*arguments: str, program: Sequence[str] = _HERE) -> "subprocess.Popen[str]":
    """Start a command with --json."""
    command = [*program, *arguments, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy())


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Wait for success and return the result."""
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout + stderr
    assert "Traceback" not in stderr
    result: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return result


def run(*arguments: str) -> dict[str, Any]:
    """Run a command that must succeed."""
    return finish(start(*arguments))


@contextmanager
def endpoint(*arguments: str) -> Iterator[dict[str, Any]]:
    """`heliostat serve` with these arguments; inside, it is up as it says."""
    process = start("serve", *arguments)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        up: dict[str, Any] = json.loads(line)
        assert "url" in up, (up, process.communicate())
        yield up
    finally:
        process.terminate()
        process.communicate(timeout=120)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Wait until the condition holds, while the process lives."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def last_step(run_folder: Path) -> int:
    """The newest step in the journal of a run."""
    journal = run_folder / "metrics.jsonl"
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def journal(run_folder: Path, metric: str) -> dict[int, float]:
    """The values of one metric by step; a repeated step's last one."""
    rows, _ = metrics_file.read(run_folder / metrics_file.NAME)
    return {row["step"]: row["metrics"][metric] for row in rows if metric in row["metrics"]}


def processes_below(pid: int, name: str = "") -> list[psutil.Process]:
    """The living descendants of a process whose command line holds `name`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def still_alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended within three minutes: Ray's agents take one to notice that their node is gone."""
    return list(psutil.wait_procs(processes, timeout=180)[1])
