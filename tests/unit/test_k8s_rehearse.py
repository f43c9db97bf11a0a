"""What k8s.rehearse makes of the manifests; `python -m k8s.rehearse` runs all of them, and takes minutes."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from heliostat import experiment
from heliostat.errors import HeliostatError
from k8s import rehearse
from k8s.rehearse import Machine
from k8s.validate import render
from k8s.validate.manifests import Manifest, pods

pytestmark = pytest.mark.skipif(render.tool() is None, reason="neither kubectl nor kustomize is installed")


@pytest.fixture(scope="module")
def dev() -> list[Manifest]:
    return render.installation("cpu-dev")


@pytest.fixture
def machine(dev: list[Manifest], tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, list(rehearse.shortened(dev, tmp_path / "claim-data")), "postgresql://u@127.0.0.1/db")
    yield made
    made.stop()


def test_no_variable_of_a_pod_names_a_place_in_the_cluster(machine: Machine, dev: list[Manifest]) -> None:
    seen = set()
    for manifest in dev:
        for pod in pods(manifest):
            for container in (one for _, one in pod.containers() if "heliostat" in one["image"] and "env" in one):
                environment = machine.environment(pod.spec, container)
                given = {variable["name"] for variable in container["env"]}
                assert given <= environment.keys()
                values = [environment[name] for name in given]
                assert not [value for value in values if "mlflow:5000" in value or value.startswith("/state")]
                seen |= given
    assert {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_TRACKING_PASSWORD", "HELIOSTAT_HOME"} <= seen


def test_an_entrypoint_reads_the_experiment_that_is_mounted(machine: Machine, tmp_path: Path) -> None:
    job = machine.get("RayJob", "train")
    (pod, head, *_) = pods(job)
    assert not pod.is_ray
    mounts = machine.mounts(head.spec, head.spec["containers"][0])
    words = [machine.here(word, mounts) for word in shlex.split(job.spec["entrypoint"])]
    config = experiment.load(words[2])
    assert config.training.max_steps == rehearse.SHORT["training.max_steps"]
    assert config.data.train == str(tmp_path / "claim-data" / "cron" / "train.jsonl")


def test_the_data_job_writes_into_the_claim(machine: Machine, tmp_path: Path) -> None:
    rehearse.example_data(machine)
    assert {path.name for path in (tmp_path / "claim-data" / "cron").iterdir()} >= {"train.jsonl", "test.jsonl"}


def test_a_command_that_fails_is_told_with_its_output(machine: Machine) -> None:
    with pytest.raises(HeliostatError, match="exit code 3:\nwhy"):
        machine.run("a test", ["bash", "-c", "echo why >&2; exit 3"], {"PATH": "/bin:/usr/bin"})
