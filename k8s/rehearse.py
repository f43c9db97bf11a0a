"""Runs the manifests' own commands on this machine: `python -m k8s.rehearse`. Knows pods and volumes, no Kubernetes.

From the overlay cpu-dev, as rendered: the MLflow server, the example's data, Ray's nodes with the flags that KubeRay
gives them, each RayJob's entrypoint by `ray job submit`, and the RayService's endpoint. Claims, Secrets and mounted
files are folders; services are ports of 127.0.0.1. Only the trainings are shorter than in the cluster (`SHORT`).

With --database URI MLflow uses that PostgreSQL; without, a SQLite file. Ray runs with a token, as KubeRay sets it.
"""

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from heliostat import config
from heliostat.errors import HeliostatError
from k8s.validate import references, render
from k8s.validate.capacity import amounts
from k8s.validate.manifests import Manifest, RayClusterSpec, ray_cluster
from tests.ports import free_port

SHORT = {
    "model.scratch.config.n_layer": 1,
    "model.scratch.config.n_embd": 32,
    "data.max_train_samples": 400,
    "training.max_steps": 8,
    "tune_training.num_samples": 2,
    "tune_training.overrides": {"training.max_steps": 4},
    "tune_decoding.num_samples": 2,
    "tune_decoding.prompts": 16,
    "tune_decoding.holdout_prompts": 16,
}
_JOBS = ("train", "tune-training", "tune-decoding")
_WAIT_S = 180.0


class Machine:
    """This machine in the place of a cluster: one folder for all volumes, one port for each service."""

    def __init__(self, folder: Path, manifests: Sequence[Manifest], database: str | None) -> None:
        self.folder = folder
        self._objects = {(manifest.kind, manifest.name): manifest for manifest in manifests}
        self._processes: list[subprocess.Popen[bytes]] = []
        self.mlflow = f"127.0.0.1:{free_port()}"
        self.serve_port = free_port()
        self._token = secrets.token_hex(16)
        self._secrets = self._made_up(database or f"sqlite:///{folder}/mlflow.db")

    def get(self, kind: str, name: str) -> Manifest:
        """An object of the overlay."""
        return self._objects[kind, name]

    def _made_up(self, database: str) -> dict[str, dict[str, str]]:
        """Values for all Secrets."""
        made = {name: {key: secrets.token_hex(16) for key in keys} for name, keys in references.external().items()}
        users = f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}\nadmin_username = admin\n"
        made["mlflow-server"] |= {"backend-store-uri": database, "basic_auth.ini": users}
        made["mlflow-client"] = {"username": "admin", "password": made["mlflow-server"]["admin-password"]}
        made["api-keys"] = {}  # `heliostat keys add` writes the file
        return made

    def mounts(self, pod: dict[str, Any], container: dict[str, Any]) -> dict[str, Path]:
        """Where each mounted folder of the container is here, filled as the kubelet would."""
        volumes = {volume["name"]: volume for volume in pod.get("volumes") or []}
        return {mount["mountPath"]: self._volume(volumes[mount["name"]]) for mount in container["volumeMounts"]}

    def _volume(self, volume: dict[str, Any]) -> Path:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        place = self.folder / (f"claim-{claim}" if claim else f"volume-{volume['name']}")
        place.mkdir(exist_ok=True)
        files: dict[str, str] = {}
        if "configMap" in volume:
            files = self.get("ConfigMap", volume["configMap"]["name"]).body["data"]
        if "secret" in volume:
            values = self._secrets[volume["secret"]["secretName"]]
            files = {key: values[key] for key in (item["key"] for item in volume["secret"].get("items") or [])}
        for name, text in files.items():
            if not (place / name).exists():
                (place / name).write_text(text, encoding="utf-8")
        return place

    def here(self, text: str, mounts: dict[str, Path]) -> str:
        """A word of a manifest, with paths of mounted folders and addresses of services as they are here."""
        text = text.replace("mlflow:5000", self.mlflow)
        for path in sorted(mounts, key=len, reverse=True):
            if text == path or text.startswith(f"{path}/"):
                return str(mounts[path]) + text.removeprefix(path)
        return text

    def environment(self, pod: dict[str, Any], container: dict[str, Any]) -> dict[str, str]:
        """The container's variables, and what the image and KubeRay add."""
        mounts = self.mounts(pod, container)
        given = {variable["name"]: self._value(variable, mounts) for variable in container.get("env") or []}
        image = {name: os.environ[name] for name in ("PYTHONPATH", "LANG") if name in os.environ}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {
            **image,
            "PATH": path,
            "HOME": str(mounts.get("/home/ray", self.folder)),
            "RAY_TMPDIR": str(mounts.get("/tmp", self.folder)),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            **given,
        }

    def _value(self, variable: dict[str, Any], mounts: dict[str, Path]) -> str:
        if "valueFrom" in variable:
            reference = variable["valueFrom"]["secretKeyRef"]
            return self._secrets[reference["name"]][reference["key"]]
        return self.here(variable["value"], mounts)

    def start(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start a process that runs until `stop`, with its output in a file."""
        print(f"+ {shlex.join(command)}", file=sys.stderr)
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        self._processes.append(process)

    def run(self, name: str, command: Sequence[str], environment: dict[str, str], tries: int = 1) -> str:
        """Run a command to its end, and return what it wrote.

        Raises:
            HeliostatError: it failed, at each try.
        """
        print(f"+ {shlex.join(command)}", file=sys.stderr)
        for attempt in range(tries):
            time.sleep(2 if attempt else 0)
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, cwd=self.folder, check=False
            )
            if done.returncode == 0:
                return done.stdout
        raise HeliostatError(
            f"{name} ended with exit code {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )

    def stop(self) -> None:
        """End the processes that were started, in the reverse order, with their children."""
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self._processes.clear()


def mlflow(machine: Machine) -> None:
    """Start the server as its Deployment says, and wait until its probe is content."""
    pod = machine.get("Deployment", "mlflow").spec["template"]["spec"]
    container = pod["containers"][0]
    host, port = machine.mlflow.split(":")
    words = [{"0.0.0.0": host, "5000": port}.get(word, word) for word in container["command"]]
    machine.start("mlflow", words, machine.environment(pod, container))
    probe = container["startupProbe"]["httpGet"]["path"]
    _wait(f"http://{machine.mlflow}{probe}")


def example_data(machine: Machine) -> None:
    """Run the Job that writes the data."""
    pod = machine.get("Job", "example-data").spec["template"]["spec"]
    container = pod["containers"][0]
    mounts = machine.mounts(pod, container)
    words = [machine.here(word, mounts) for word in container["command"]]
    machine.run("example-data", words, machine.environment(pod, container))


class RayNodes:
    """A head and a worker, started as KubeRay starts the containers of a cluster."""

    def __init__(self, machine: Machine, cluster: RayClusterSpec) -> None:
        self._machine = machine
        self.pod = cluster.head["template"]["spec"]
        self.container = self.pod["containers"][0]
        self.mounts = machine.mounts(self.pod, self.container)
        self.environment = machine.environment(self.pod, self.container)
        gcs, dashboard = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        # Two nodes on one machine: ports of their own, which pods have anyway.
        head = {"head": "", "port": gcs, "dashboard-port": dashboard, "node-ip-address": "127.0.0.1"}
        head |= {"ray-client-server-port": free_port()}
        params = {**cluster.head.get("rayStartParams", {}), **head, "dashboard-host": "127.0.0.1"}
        self._start("head", params, self.environment)
        for group in cluster.workers:
            pod = group["template"]["spec"]
            params = {"address": f"127.0.0.1:{gcs}", "num-cpus": int(amounts(group)[0])}
            params |= {**group.get("rayStartParams", {}), "node-ip-address": "127.0.0.1"}
            self._start("worker", params, machine.environment(pod, pod["containers"][0]))

    def _start(self, name: str, params: dict[str, Any], environment: dict[str, str]) -> None:
        """Start a node, and wait until what KubeRay's probe asks is content."""
        agent = free_port()
        params = {"block": "", "metrics-export-port": free_port(), "dashboard-agent-listen-port": agent, **params}
        params |= {"dashboard-agent-grpc-port": free_port(), "runtime-env-agent-port": free_port()}
        flags = [f"--{key}={value}" if value != "" else f"--{key}" for key, value in params.items()]
        self._machine.start(name, ["ray", "start", *flags], environment)
        _wait(f"http://127.0.0.1:{agent}/api/healthz")

    def submit(self, job: Manifest) -> dict[str, Any]:
        """Run a RayJob's entrypoint as the submitter's pod does, and return what its last line says."""
        words = [self._machine.here(word, self.mounts) for word in shlex.split(job.spec["entrypoint"])]
        command = ["ray", "job", "submit", "--address", self.dashboard, "--", *words]
        written = self._machine.run(job.name, command, self.environment)
        return dict(json.loads(next(line for line in reversed(written.splitlines()) if line.startswith("{"))))


def endpoint(machine: Machine, nodes: RayNodes, service: Manifest) -> str:
    """Deploy the Serve config, and ask: without a key, and with one. Returns the answer's text."""
    keys = nodes.mounts["/etc/heliostat/keys"] / "keys.json"
    key = machine.run("keys", ["heliostat", "keys", "add", str(keys), "me"], nodes.environment).split()[0]
    settings = yaml.safe_load(service.spec["serveConfigV2"])
    settings["http_options"] = {"host": "127.0.0.1", "port": machine.serve_port}
    args = settings["applications"][0]["args"]
    args["api_keys"] = machine.here(args["api_keys"], nodes.mounts)
    file = machine.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(settings))
    machine.run("serve", ["serve", "deploy", str(file), "--address", nodes.dashboard], nodes.environment, tries=5)
    url = f"http://127.0.0.1:{machine.serve_port}"
    _wait(f"{url}/-/healthz")  # what KubeRay's probe of the workers asks
    _wait(f"{url}/health")
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(f"{url}/v1/models")
        raise HeliostatError("the endpoint answers without a key")
    body = json.dumps({"model": "cron", "prompt": "every day at noon\n", "max_tokens": 8}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def _wait(url: str) -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise HeliostatError(f"{url} did not answer within {_WAIT_S:g} s")


def shortened(manifests: Sequence[Manifest], data: Path) -> Iterator[Manifest]:
    """The objects, with an experiment that takes seconds and has the claim `data` in a folder."""
    for manifest in manifests:
        if manifest.kind == "ConfigMap" and manifest.name == "experiment":
            values = yaml.safe_load(manifest.body["data"]["experiment.yaml"].replace(" /data/", f" {data}/"))
            for key, value in SHORT.items():
                config.set_key(values, key, value, key)
            yield Manifest(manifest.source, manifest.body | {"data": {"experiment.yaml": yaml.safe_dump(values)}})
        else:
            yield manifest


def rehearse(folder: Path, database: str | None) -> dict[str, Any]:
    """Run everything below the folder, and return what each command said."""
    said: dict[str, Any] = {}
    machine = Machine(folder, list(shortened(render.installation("cpu-dev"), folder / "claim-data")), database)
    try:
        mlflow(machine)
        example_data(machine)
        interactive = ray_cluster(machine.get("RayJob", "train"))
        assert interactive is not None
        nodes = RayNodes(machine, interactive)
        for name in _JOBS:
            said[name] = nodes.submit(machine.get("RayJob", name))
        machine.run("promote", ["heliostat", "promote", "cron"], nodes.environment)
        machine.stop()

        mlflow(machine)
        service = machine.get("RayService", "heliostat")
        serving = ray_cluster(service)
        assert serving is not None
        said["endpoint"] = endpoint(machine, RayNodes(machine, serving), service)
    finally:
        machine.stop()
    return said


def main() -> int:
    """Rehearse in a temporary folder, which stays only if something fails."""
    parser = argparse.ArgumentParser(prog="python -m k8s.rehearse", description="run the manifests' commands here")
    parser.add_argument("--database", metavar="URI", help="an empty PostgreSQL database for MLflow")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="heliostat-"))
    try:
        said = rehearse(folder, options.database)
    except HeliostatError as error:
        print(f"error: {error}\n(logs are in {folder})", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(json.dumps(said, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
