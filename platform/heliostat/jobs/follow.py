"""Show a job's log as it grows, its progress as a bar, and read its result out of it. Knows nothing of uploads."""

import asyncio
import json
from typing import Any

from rich.console import Console
from rich.progress import Progress

from heliostat.errors import HeliostatError, JobFailed
from heliostat.jobs.connection import NAME, VERB, Cluster
from heliostat.training import progress

# Tries in a row to get a log that broke off, and the seconds between them.
_TRIES = 10
_PAUSE_S = 1.0


class Log:
    """Lines as they come: told from the result, which is the last that is a JSON object, and from lines of progress."""

    def __init__(self, console: Console, bar: Progress) -> None:
        self._console = console
        self._bar = bar
        self._task: Any = None
        self._rest = ""
        self._held: str | None = None
        self.length = 0
        """Characters taken so far."""

    def take(self, text: str) -> None:
        """More of the log."""
        self.length += len(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    def _line(self, line: str) -> None:
        if result_in(line) is not None:
            line, self._held = self._held or "", line
        step = progress.parse(line)
        if step and self._console.is_terminal:
            self._advance(*step)
        elif line and not line.startswith("Running entrypoint for job "):
            self._console.print(line, markup=False, highlight=False)

    def _advance(self, step: int, total: int, numbers: str) -> None:
        if self._task is None:
            self._task = self._bar.add_task("training", total=total, numbers="")
        self._bar.update(self._task, completed=step, total=total, numbers=numbers)


def follow(cluster: Cluster, job: str, console: Console) -> dict[str, Any]:
    """Show the log until the job has ended; returns its facts and result (see `facts`).

    Raises:
        ConfigError: there is no such job.
        JobFailed: the job failed or was stopped; with the exit code of its command.
        ResourceError: the cluster went away.
        KeyboardInterrupt: Ctrl-C; the job goes on, and the console says how to come back.
    """
    cluster.job(job)
    try:
        with progress.bar_on(console) as bar:
            asyncio.run(_tail(cluster, job, Log(console, bar)))
    except KeyboardInterrupt:
        console.print(
            f"\nthe job goes on; `heliostat logs {job} --follow` comes back to it, `heliostat stop {job}` ends it",
            highlight=False, markup=False,
        )  # fmt: skip
        raise
    return outcome(facts(cluster, job))


def outcome(known: dict[str, Any]) -> dict[str, Any]:
    """The facts of a job that is over, if it went well.

    Raises:
        JobFailed: it did not.
    """
    if known["status"] == "SUCCEEDED":
        return known
    job = known["job_id"]
    code = max(known["exit_code"] or 1, 1)  # of a command that was killed, Ray has the negative signal
    if known["status"] == "STOPPED":
        raise JobFailed(f"the job {job} was stopped", code, known)
    reason = known.get("error") or known["message"]
    raise JobFailed(f"the job {job} failed: {reason}", code, known)


def facts(cluster: Cluster, job: str) -> dict[str, Any]:
    """{"job_id", "status", "command", "config", "exit_code", "start_time", "end_time" (Unix, s), "message"}, and of a
    job that is over the result of its command.

    Raises:
        ConfigError: there is no such job.
    """
    details = cluster.job(job)
    found = result_of(cluster.logs(job)) if details.status.is_terminal() else {}
    return {**found, **summary(details)}


def summary(details: Any) -> dict[str, Any]:
    """What the cluster itself tells of a job."""
    metadata = details.metadata or {}
    return {
        "job_id": details.submission_id,
        "status": details.status.value,
        "command": metadata.get(VERB),
        "config": metadata.get(NAME),
        "exit_code": details.driver_exit_code,
        "start_time": details.start_time and details.start_time / 1000,
        "end_time": details.end_time and details.end_time / 1000,
        "message": (details.message or "").split("\n")[0],
    }


def result_of(log: str) -> dict[str, Any]:
    """The result that the job's command printed; empty if it printed none."""
    found = (result_in(line) for line in reversed(log.splitlines()))
    return next((result for result in found if result is not None), {})


def result_in(line: str) -> dict[str, Any] | None:
    """The JSON object that the line is, if it is one."""
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


async def _tail(cluster: Cluster, job: str, log: Log) -> None:
    """The log to its end; a connection that breaks is made again, and what was shown is not shown again."""
    failed = 0
    while True:
        before = log.length
        try:
            await _read_once(cluster, job, log)
            if cluster.job(job).status.is_terminal():
                return log.take("\n")  # ends a line that a crash has left open
            failed = 0
        except (HeliostatError, RuntimeError, OSError):
            failed = 1 if log.length > before else failed + 1
            if failed == _TRIES:
                raise
        await asyncio.sleep(_PAUSE_S)


async def _read_once(cluster: Cluster, job: str, log: Log) -> None:
    """Every reading begins at the log's start."""
    seen = log.length
    with cluster.errors():
        async for text in cluster.client.tail_job_logs(job):
            log.take(text[seen:])
            seen = max(0, seen - len(text))
