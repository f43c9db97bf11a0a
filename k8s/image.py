"""k8s/Dockerfile, read: which steps a device's image has, and, with --run, the same steps without Docker.

    python -m k8s.image --device cpu              # list the steps
    python -m k8s.image --device cpu --run DIR    # run them in DIR: a virtual environment for the image's Python

The folders of the image are folders below DIR/root. What changes the system is told and left out. Afterwards the
programs that the manifests start must be there and answer. Takes some minutes, and some GB.
"""

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from heliostat.errors import ConfigError

FILE = Path(__file__).with_name("Dockerfile")
CONTEXT = FILE.parents[1]
# What this machine's user may not do, or does otherwise, when it is not building an image.
_LEFT_OUT = ("apt-get", "groupadd", "useradd")
_NOT_HERE = ("PYTHONPATH", "VIRTUAL_ENV", "HELIOSTAT_HOME")
_ANSWERS = (
    "heliostat --version",
    "ray --version",
    "mlflow --version",
    "python -c 'import serve.app, boto3, psycopg2, flask_wtf'",
)


@dataclass(frozen=True)
class Step:
    """One instruction of the Dockerfile, with its variables put in, but for those of a RUN."""

    instruction: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"line {self.line}: {self.instruction} {self.text}"


def steps(device: str, text: str | None = None, arguments: Mapping[str, str] | None = None) -> list[Step]:
    """The instructions that make the last stage, in order, from the first stage that it is built on.

    Raises:
        ConfigError: the last stage is built on one that does not exist.
    """
    given = {"DEVICE": device, **(arguments or {})}
    stages: dict[str, tuple[str, list[Step]]] = {}
    before, name = dict[str, str](), ""
    for step in _instructions(FILE.read_text(encoding="utf-8") if text is None else text):
        if step.instruction == "ARG" and not name:
            key, _, default = step.text.partition("=")
            before[key] = given.get(key, default)
        elif step.instruction == "FROM":
            parent, _, name = _filled(step.text, before).partition(" AS ")
            stages[name] = (parent, [step])
        else:
            stages[name][1].append(step)
    return [step for stage in _lineage(stages, name) for step in stages[stage][1]]


def _lineage(stages: Mapping[str, tuple[str, list[Step]]], last: str) -> list[str]:
    found = [last]
    while (parent := stages[found[0]][0]) in stages:
        found.insert(0, parent)
    if ":" not in parent:
        raise ConfigError(f"{FILE}: the stage `{found[0]}` is built on `{parent}`, which is neither a stage nor a tag")
    return found


def _instructions(text: str) -> Iterator[Step]:
    """Instructions with their continuation lines joined; comments go."""
    whole, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        first = first or number
        whole += line.removesuffix("\\").strip() + " "
        if not line.endswith("\\"):
            instruction, _, rest = whole.strip().partition(" ")
            yield Step(instruction, rest.strip(), first)
            whole, first = "", 0


def _filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: values.get(match[1], ""), text)


def ignored(path: str, rules: list[str]) -> bool:
    """Whether .dockerignore keeps a path of the context from the builder; the last rule that fits counts."""
    verdict = False
    for rule in rules:
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        heads = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
        names = parts if rule.startswith("**/") else heads
        if any(fnmatch.fnmatch(name, pattern) for name in names):
            verdict = not rule.startswith("!")
    return verdict


def ignore_rules() -> list[str]:
    """The lines of .dockerignore."""
    lines = (CONTEXT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


class Build:
    """Runs steps below a folder: files in `root`, Python in `python`."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.python = folder / "python"
        self.environment = {key: value for key, value in os.environ.items() if key not in _NOT_HERE}
        self._workdir = "/"
        self._rules = ignore_rules()

    def prepare(self) -> None:
        """Make the virtual environment."""
        venv.create(self.python, with_pip=True, clear=True)
        self.root.mkdir(parents=True, exist_ok=True)
        self.environment["PATH"] = f"{self.python / 'bin'}:{self.environment['PATH']}"

    def do(self, step: Step) -> bool:
        """Do the step; False: it was left out.

        Raises:
            ConfigError: it failed.
        """
        if step.instruction == "RUN":
            return self._run(step)
        if step.instruction == "COPY":
            self._copy(step)
        elif step.instruction == "WORKDIR":
            self._workdir = step.text
            self.inside(".").mkdir(parents=True, exist_ok=True)
        elif step.instruction == "ENV":
            for word in shlex.split(step.text):
                key, _, value = word.partition("=")
                self.environment[key] = str(self.inside(value)) if value.startswith("/") else value
        else:
            return False
        return True

    def inside(self, path: str) -> Path:
        """Where a path of the image is here."""
        return self.root / Path(self._workdir, path).relative_to("/")

    def run(self, command: str) -> None:
        """Run a shell command as in the image.

        Raises:
            ConfigError: it failed.
        """
        done = subprocess.run(["bash", "-c", command], cwd=self.inside("."), env=self.environment, check=False)
        if done.returncode:
            raise ConfigError(f"`{command}` ended with exit code {done.returncode}")

    def _run(self, step: Step) -> bool:
        if step.text.startswith(_LEFT_OUT):
            return False
        self.run(step.text)
        return True

    def _copy(self, step: Step) -> None:
        *sources, target = step.text.split()
        for source in sources:
            self._copy_one(CONTEXT / source, self.inside(target) / (source if target.endswith("/") else ""))

    def _copy_one(self, source: Path, target: Path) -> None:
        for file in [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file()):
            if ignored(str(file.relative_to(CONTEXT)), self._rules):
                if source.is_file():
                    raise ConfigError(f"{FILE}: COPY {source.name}: .dockerignore keeps it from the builder")
                continue
            place = target / file.relative_to(source) if source.is_dir() else target
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def main() -> int:
    """List or run the steps, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m k8s.image", description="the steps of k8s/Dockerfile")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--run", metavar="DIR", type=Path, help="run them here, in a new virtual environment in DIR")
    options = parser.parse_args()
    try:
        if options.run:
            python = _run(options.device, Build(options.run.absolute()))
            print(json.dumps({"device": options.device, "python": str(python)}))
        else:
            print("\n".join(str(step) for step in steps(options.device)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(device: str, build: Build) -> Path:
    build.prepare()
    for step in steps(device):
        print(step, file=sys.stderr)
        if not build.do(step) and step.instruction == "RUN":
            print("  left out: it changes the system", file=sys.stderr)
    for command in _ANSWERS:
        build.run(command)
    return build.python / "bin" / "python"


if __name__ == "__main__":
    sys.exit(main())
