"""Make a Ray job of a command, and hand it to the cluster. Knows nothing of following it."""

import argparse
import importlib.metadata
import json
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heliostat import cluster, experiment
from heliostat.command import Command, parser_of
from heliostat.config import Notice
from heliostat.errors import ConfigError
from heliostat.jobs.connection import NAME, VERB, Cluster
from heliostat.jobs.upload import Upload, of_config, readable
from heliostat.training import progress

VERBS = ("train", "tune-training", "tune-decoding", "evaluate", "promote")
# How `heliostat stop` ends a command: as Ctrl-C does here, with seconds for its MLflow run and workers to end.
# Ray's own way is SIGTERM, at which Ray's driver dies at once, and SIGKILL after 3 s.
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}
_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY)(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What is to run, and how."""

    command: Sequence[str]
    """A verb and its arguments, as `heliostat` takes them."""
    environment: Sequence[str] = ()
    """Of the job, as NAME (the value here) or NAME=VALUE."""
    mounted: Sequence[str] = ()
    """Folders that the cluster has at the same place."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """entrypoint_num_cpus and entrypoint_num_gpus, as Ray's submit_job takes them."""
    bar: bool = False
    """Whether somebody looks at a bar, for which the job must tell its progress often."""


@dataclass(frozen=True)
class Job:
    """A job that is ready to be sent."""

    verb: str
    name: str
    """The configuration's name, or the registered model's."""
    entrypoint: str
    environment: Mapping[str, str]
    upload: Upload
    resources: Mapping[str, float]


def prepare(request: Request, commands: Mapping[str, Command], notice: Notice) -> Job:
    """Check everything that can be checked here, and say through `notice` which files the job takes along.

    Raises:
        UserError: the command, the configuration, a file of it or a variable is wrong.
        ResourceError: the files are too large.
    """
    verb, options = _parse(request.command, commands)
    bar = {progress.LINES: "100"} if request.bar else {}
    environment = {**_STOP, **bar, **variables(request.environment)}
    upload = Upload([Path(os.path.abspath(Path(folder).expanduser())) for folder in request.mounted])
    name, arguments = _take_along(upload, options, request.command)
    package = cluster.package_to_ship()
    if package is not None:
        upload.package(package)
    _tell(upload, package, notice)
    # exec: what Ray stops is then the command itself, and no shell that waits for it.
    entrypoint = "exec python -m heliostat.cli " + shlex.join([*arguments, "--json"])
    return Job(verb, name, entrypoint, environment, upload, request.resources)


def send(to: Cluster, job: Job, notice: Notice) -> str:
    """Start the job; returns its id.

    Raises:
        ResourceError: the cluster went away.
    """
    if to.version != (here := importlib.metadata.version("ray")):
        notice(f"the cluster runs Ray {to.version}, and this machine has {here}")
    # Ray leaves out what a .gitignore names; there is none in this folder.
    with tempfile.TemporaryDirectory(prefix="heliostat-job-") as folder, to.errors():
        job.upload.write(Path(folder))
        submitted: str = to.client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=f"{job.name}-{job.verb}-{secrets.token_hex(4)}",
            runtime_env={"working_dir": folder, "env_vars": dict(job.environment)},
            metadata={VERB: job.verb, NAME: job.name},
            **job.resources,
        )
    return submitted


def variables(given: Sequence[str]) -> dict[str, str]:
    """The environment that NAME and NAME=VALUE ask for.

    Raises:
        ConfigError: NAME is not set here; or NAME=VALUE shows a secret to everybody who lists processes.
    """
    found = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env {name}: is no name of an environment variable")
        if separator and (_SECRET.search(name) or re.search(r"://[^/\s]*:[^/\s]*@", value)):
            raise ConfigError(
                f"--env {name}=...: looks like a secret, which others see in the list of processes; set {name} in the "
                f"environment and give --env {name}"
            )
        if not separator and name not in os.environ:
            raise ConfigError(f"--env {name}: is not set here; set it, or leave it to the cluster's own environment")
        found[name] = value if separator else os.environ[name]
    return found


def _parse(command: Sequence[str], commands: Mapping[str, Command]) -> tuple[str, argparse.Namespace]:
    verb = command[0] if command else None
    if verb not in VERBS:
        raise ConfigError(f"heliostat submit needs a command: {', '.join(VERBS)}; got {verb or 'none'}")
    options = parser_of(verb, commands[verb]).parse_intermixed_args(command[1:])
    if getattr(options, "predictions", None):
        raise ConfigError("--predictions writes to the job's folder, which is deleted; they are in the MLflow run too")
    return verb, options


def _take_along(upload: Upload, options: argparse.Namespace, command: Sequence[str]) -> tuple[str, list[str]]:
    """Take the files along; returns a name for the job, and its command with the paths as they are there."""
    target: str = vars(options).get("name") or ""
    named = vars(options).get("config") or (target if target.endswith((".yaml", ".yml")) else None)
    moved: dict[str, str] = {}
    keys: dict[str, Any] = {}
    name = target
    if named is not None:
        config = experiment.load(named, vars(options).get("overrides") or ())
        name = config.name
        moved[named] = upload.file(named)
        keys = of_config(upload, config)
    if model := vars(options).get("model"):
        moved[model] = upload.model(model)
    if keys and "overrides" not in options:
        raise ConfigError(
            f"{named}: {min(keys)} names a path outside of {upload.here}, which promote cannot be told of; "
            "start it in a folder above"
        )
    return name, [*(_replaced(argument, moved) for argument in command), *_overrides(keys)]


def _replaced(argument: str, moved: Mapping[str, str]) -> str:
    """The argument, or the value of its --flag=VALUE, where it is a path that is another in the job."""
    if argument.startswith("--") and "=" in argument:
        flag, _, value = argument.partition("=")
        return f"{flag}={moved.get(value, value)}"
    return moved.get(argument, argument)


def _overrides(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def _tell(upload: Upload, package: Path | None, notice: Notice) -> None:
    """Say what is sent."""
    sizes = upload.sizes()
    own = {place: size for place, size in sizes.items() if package is None or not place.startswith(f"{package.name}/")}
    for place, size in own.items():
        notice(f"sending {upload.files[place]} ({readable(size)})")
    if package is not None:
        notice(f"sending the library of this checkout ({readable(sum(sizes.values()) - sum(own.values()))})")
