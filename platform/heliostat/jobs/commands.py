"""The commands for jobs on a Ray cluster: submit, status, logs, stop. Knows flags and output, and nothing of Ray."""

import argparse
import functools
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from heliostat.command import Command, Result, console

if TYPE_CHECKING:
    from heliostat.jobs.connection import Cluster


def table(commands: Mapping[str, Command]) -> dict[str, Command]:
    """The commands by name; `commands` are those that a job can be made of."""
    return {
        "submit": Command(
            "run a command as a job on a Ray cluster",
            _submit_arguments,
            functools.partial(_submit, commands),
            functools.partial(_show_result, commands),
            passes_on=True,
        ),
        "status": Command("tell how a job, or all of them, are doing", _status_arguments, _status, _show_status),
        "logs": Command(
            "show what a job has written, and follow it",
            _logs_arguments,
            _logs,
            functools.partial(_show_result, commands),
        ),
        "stop": Command("end a job", _job_arguments, _stop, _show_status),
    }


def _address_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="of the cluster's dashboard; default: RAY_ADDRESS, or http://127.0.0.1:8265")


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="its id")
    _address_argument(parser)


def _submit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "heliostat submit COMMAND [CONFIG] [key.sub=value ...] [options of the command] [--address URL] ..."
    parser.description = "Run train, tune-training, tune-decoding, evaluate or promote as a job on a Ray cluster."
    _address_argument(parser)
    parser.add_argument("--no-wait", action="store_true", help="do not wait for the end, and do not show the log")
    parser.add_argument(
        "--env",
        metavar="NAME",
        action="append",
        default=[],
        help="give the job this variable of the environment here, such as HF_TOKEN; or NAME=VALUE; may be repeated",
    )
    parser.add_argument(
        "--mounted",
        metavar="FOLDER",
        action="append",
        default=[],
        help="the cluster has this folder at the same place: its files are not sent; may be repeated",
    )
    parser.add_argument("--entrypoint-num-cpus", type=float, help="CPUs that Ray reserves for the command itself")
    parser.add_argument("--entrypoint-num-gpus", type=float, help="GPUs that Ray reserves for the command itself")


def _submit(commands: Mapping[str, Command], options: argparse.Namespace) -> Result:
    from heliostat.jobs import follow, submit

    terminal = console()
    resources = {
        name: value
        for name in ("entrypoint_num_cpus", "entrypoint_num_gpus")
        if (value := getattr(options, name)) is not None
    }
    bar = terminal.is_terminal and not options.no_wait
    request = submit.Request(options.rest, options.env, options.mounted, resources, bar)
    notice = functools.partial(terminal.print, markup=False, highlight=False)
    prepared = submit.prepare(request, commands, notice)
    cluster = _connect(options)
    job = submit.send(cluster, prepared, notice)
    if options.no_wait:
        return follow.facts(cluster, job)
    terminal.print(f"job {job}", highlight=False)
    return follow.follow(cluster, job, terminal)


def _show_result(commands: Mapping[str, Command], result: Result) -> str:
    if "logs" in result:
        return str(result["logs"])
    if result["status"] == "SUCCEEDED" and result["command"] in commands:
        return commands[result["command"]].show(result)
    return f"{_show_status(result)}\n`heliostat logs {result['job_id']} --follow` shows it"


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", nargs="?", help="its id; default: all jobs of Heliostat")
    _address_argument(parser)


def _status(options: argparse.Namespace) -> Result:
    from heliostat.jobs import follow

    cluster = _connect(options)
    if options.job:
        return follow.facts(cluster, options.job)
    return {"jobs": [follow.summary(details) for details in cluster.jobs()]}


def _show_status(result: Result) -> str:
    if "jobs" in result:
        return "\n".join(map(_line, result["jobs"])) or "no jobs"
    more = [f"{key} {result[key]}" for key in ("error", "run_id", "model_uri") if result.get(key)]
    return "\n".join([_line(result), *more])


def _line(job: dict[str, Any]) -> str:
    started = datetime.fromtimestamp(job["start_time"]).isoformat(" ", "seconds") if job["start_time"] else "-"
    code = "" if job["exit_code"] is None else f"  exit code {job['exit_code']}"
    return f"{job['job_id']:<40} {job['status']:<10} {started}{code}"


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    _job_arguments(parser)
    parser.add_argument(
        "--follow", action="store_true", help="go on to the job's end; then its result and exit code are the command's"
    )


def _logs(options: argparse.Namespace) -> Result:
    from heliostat.jobs import follow

    cluster = _connect(options)
    if options.follow:
        return follow.follow(cluster, options.job, console())
    return {"job_id": cluster.job(options.job).submission_id, "logs": cluster.logs(options.job).rstrip("\n")}


def _stop(options: argparse.Namespace) -> Result:
    from heliostat.jobs import follow

    cluster = _connect(options)
    cluster.job(options.job)
    with cluster.errors():
        stopped = cluster.client.stop_job(options.job)
    while not cluster.job(options.job).status.is_terminal():
        time.sleep(0.5)
    return {**follow.facts(cluster, options.job), "stopped": stopped}


def _connect(options: argparse.Namespace) -> "Cluster":
    from heliostat.jobs.connection import Cluster

    return Cluster(options.address)
