"""The manifests' commands, read by the programs that they start: flags, experiments, searches, room for workers."""

import contextlib
import importlib.util
import io
import math
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from heliostat import cli, experiment
from heliostat.command import parser_of
from heliostat.errors import ConfigError
from heliostat.experiment import ExperimentConfig
from k8s.validate.capacity import amounts
from k8s.validate.manifests import Manifest, Problem, pods, ray_cluster
from k8s.validate.render import FOLDER


@dataclass(frozen=True)
class Command:
    """A command line of a manifest."""

    owner: Manifest
    place: str
    words: list[str]

    def problem(self, message: str) -> Problem:
        return self.owner.problem(self.place, f"`{shlex.join(self.words)}`: {message}")


def commands(manifest: Manifest) -> Iterator[Command]:
    """Those that run this project's programs."""
    if manifest.kind == "RayJob" and manifest.spec.get("entrypoint"):
        yield Command(manifest, "spec.entrypoint", shlex.split(manifest.spec["entrypoint"]))
    for pod in pods(manifest):
        for place, container in pod.containers():
            words = [*(container.get("command") or []), *(container.get("args") or [])]
            if words and "heliostat" in container.get("image", ""):
                yield Command(manifest, f"{place}.command", [str(word) for word in words])


def check(manifests: Sequence[Manifest]) -> Iterator[Problem]:
    """Commands of an installation that would end at once."""
    for manifest in manifests:
        for command in commands(manifest):
            program, *arguments = command.words
            if program == "heliostat":
                yield from _heliostat(command, arguments, manifests)
            elif program == "mlflow":
                yield from _mlflow(command, arguments)
            elif program == "python":
                yield from _python(command, arguments)
            else:
                yield command.problem(f"`{program}` is none of heliostat, mlflow, python")


def _heliostat(command: Command, arguments: list[str], manifests: Sequence[Manifest]) -> Iterator[Problem]:
    verb, *rest = arguments or [""]
    if verb not in cli.COMMANDS:
        yield command.problem(f"there is no command `{verb}`")
        return
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options = parser_of(verb, cli.COMMANDS[verb]).parse_intermixed_args(rest)
    except SystemExit:
        yield command.problem(complaint.getvalue().strip().splitlines()[-1])
        return
    if "config" not in options:
        return
    try:
        config = _experiment(options.config, options.overrides, manifests)
        _as_the_command_would(verb, config)
    except ConfigError as error:
        yield command.problem(str(error))
        return
    yield from _room(command, config)


def _experiment(path: str, overrides: Sequence[str], manifests: Sequence[Manifest]) -> ExperimentConfig:
    """The experiment in the ConfigMap that is mounted at the path's folder.

    Raises:
        ConfigError: there is none, or it is wrong.
    """
    folder, _, name = path.rpartition("/")
    if folder != "/config":
        raise ConfigError(f"{path} is not in /config, where the ConfigMap `experiment` is mounted")
    maps = {manifest.name: manifest.body.get("data", {}) for manifest in manifests if manifest.kind == "ConfigMap"}
    text = maps.get("experiment", {}).get(name)
    if text is None:
        raise ConfigError(f"the ConfigMap `experiment` has no `{name}`")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / name
        file.write_text(text, encoding="utf-8")
        return experiment.load(file, overrides)


def _as_the_command_would(verb: str, config: ExperimentConfig) -> None:
    """What a command looks at before it reads data and asks the cluster.

    Raises:
        ConfigError: settings contradict each other, or a search has keys, values or metrics that do not exist.
    """
    from heliostat.training import setup
    from heliostat.tuning import decoding_plan, training_search

    if verb == "train":
        setup.check(config)
    elif verb == "tune-training":
        training_search.check(config)
    elif verb == "tune-decoding":
        decoding_plan.check(config)


def _room(command: Command, config: ExperimentConfig) -> Iterator[Problem]:
    """Ray's own refusal comes when the pods are there; a worker that fits nowhere waits for ever."""
    cluster = ray_cluster(command.owner)
    if cluster is None:
        return
    training = config.training
    each = training.resources_per_worker or {"CPU": 1, "GPU": 1 if training.use_gpu else 0}
    room = 0.0
    for group in cluster.workers:
        cpus, gpus = amounts(group)
        fits = [there // each[name] for name, there in (("CPU", cpus), ("GPU", gpus)) if each.get(name)]
        most = group.get("maxReplicas" if cluster.spec.get("enableInTreeAutoscaling") else "replicas", 0)
        room += min(fits, default=math.inf) * most if most else 0
    if room < training.min_workers:
        yield command.problem(
            f"training.num_workers={training.num_workers} with {each} each; the cluster has room for {room:g} at most"
        )


def _mlflow(command: Command, arguments: list[str]) -> Iterator[Problem]:
    import click
    from mlflow.cli import cli as mlflow

    verb, *rest = arguments or [""]
    try:
        mlflow.commands[verb].make_context(verb, rest, resilient_parsing=False)
    except KeyError:
        yield command.problem(f"mlflow has no command `{verb}`")
    except click.ClickException as error:
        yield command.problem(error.format_message())


def _python(command: Command, arguments: list[str]) -> Iterator[Problem]:
    if arguments[:1] == ["-m"]:
        if importlib.util.find_spec(arguments[1]) is None:
            yield command.problem(f"there is no module {arguments[1]}")
    elif not (FOLDER.parent / arguments[0]).is_file():
        yield command.problem(f"there is no file {arguments[0]} in the image")
