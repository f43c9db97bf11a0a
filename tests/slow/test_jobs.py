"""From this machine to a cluster: jobs on a Ray head with token authentication, against `heliostat mlflow` with users
and passwords on PostgreSQL, whose artifacts are in S3. All of them are processes of their own."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heliostat.registry import store, versions
from tests import postgres, s3
from tests.conftest import REPOSITORY
from tests.ports import free_port
from tests.ray_head import RayHead
from tests.slow import command

pytestmark = pytest.mark.slow

CONFIG = """\
name: sums
model:
  scratch: {model_type: gpt2, vocab_size: 300, config: {n_layer: 1, n_embd: 16, n_head: 2}}
data: {train: ../data/*.jsonl, format: prompt_completion, max_length: 64}
training: {num_workers: 1, deepspeed: zero0, max_steps: 400, save_steps: 2, logging_steps: 1}
"""


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of clients of an MLflow server that wants a password."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    with postgres.running() as database, s3.running(folder) as aws, pytest.MonkeyPatch.context() as patch:
        for name, value in {**aws, "HELIOSTAT_HOME": str(folder), "PYTHONPATH": pythonpath()}.items():
            patch.setenv(name, value)
        process = command.start(
            "mlflow", "--auth", "--backend-store-uri", database, "--artifacts-destination", f"s3://{s3.BUCKET}/runs",
            "--port", str(port),
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()
            told = json.loads(line)
            password = Path(told["password_file"]).read_text()
            yield {
                "MLFLOW_TRACKING_URI": told["url"],
                "MLFLOW_TRACKING_USERNAME": told["username"],
                "MLFLOW_TRACKING_PASSWORD": password,
            }
        finally:
            process.terminate()
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A cluster that knows nothing of this checkout but what jobs bring along."""
    head = RayHead(tmp_path_factory.mktemp("cluster"))
    try:
        head.wait()
        yield head
    finally:
        head.close()


@pytest.fixture
def here(tmp_path: Path, mlflow: dict[str, str], cluster: RayHead, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, and what leads from here to the cluster and the registry."""
    project = tmp_path / "project"
    (tmp_path / "data").mkdir()
    project.mkdir()
    rows = [{"prompt": f"{number} and one", "completion": f" {number + 1}"} for number in range(200)]
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(project)
    ray = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_TOKEN": cluster.token, "PYTHONPATH": pythonpath()}
    for name, value in {**mlflow, **ray}.items():
        monkeypatch.setenv(name, value)
    return project


def pythonpath() -> str:
    """For commands outside of the checkout."""
    return f"{REPOSITORY}/platform:{REPOSITORY}"


def submit(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, result and what the user saw of `heliostat submit`."""
    forwarded = [flag for name in os.environ if name.startswith("MLFLOW_TRACKING_") for flag in ("--env", name)]
    process = command.start("submit", *arguments, *forwarded)
    stdout, stderr = process.communicate(timeout=400)
    return process.returncode, json.loads(stdout.splitlines()[-1]), stderr


def test_a_job_is_stopped_gone_on_with_and_its_model_promoted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Saving often makes it slow enough to be stopped in the middle.
    _, started, _ = submit("train", "config.yaml", "--no-wait")
    job = started["job_id"]
    watcher = command.start("logs", job, "--follow")
    assert watcher.stderr is not None
    assert any("step " in line for line in watcher.stderr), "the log ended before it trained"
    watcher.send_signal(signal.SIGINT)
    assert f"the job goes on; `heliostat logs {job} --follow`" in watcher.communicate()[1]
    assert watcher.returncode == 130
    stopped = command.run("stop", job)
    assert (stopped["status"], stopped["stopped"]) == ("STOPPED", True)
    (run,) = store.client().search_runs([store.experiment_id("sums")])

    code, result, shown = submit("train", "config.yaml", "--entrypoint-num-cpus", "0.1")
    assert code == 0, shown
    assert "going on with" in shown
    assert "step 400/400" in shown
    assert (result["run_id"], result["version"], result["status"]) == (run.info.run_id, "1", "SUCCEEDED")
    assert str(here) not in result["bundle"], "it was trained in the cluster's folder"
    assert versions.version_of_alias("sums", "challenger").version == "1"
    password = os.environ["MLFLOW_TRACKING_PASSWORD"]
    assert password not in shown + json.dumps(result)

    code, result, shown = submit("promote", "sums")
    assert (code, result["version"]) == (0, "1"), shown
    resolved = versions.resolve("models:/sums@champion")
    assert (Path(resolved.path) / "model.safetensors").exists(), "it came from S3 through the server"
    jobs = command.run("status")["jobs"]
    assert [(known["command"], known["status"]) for known in jobs] == [
        ("promote", "SUCCEEDED"), ("train", "SUCCEEDED"), ("train", "STOPPED"),
    ]  # fmt: skip

    code, result, shown = submit("train", "config.yaml", "data.columns={prompt: nix}")
    assert (code, result["exit_code"], result["status"]) == (2, 2, "FAILED"), shown
    assert "nix" in result["error"]

    for token, told in (("", "wants a token"), ("0" * 64, "does not take the token")):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        process = command.start("status")
        assert told in process.communicate()[1]
        assert process.returncode == 2
    assert run.info.status == "KILLED", "its MLflow run was ended before the job was stopped"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    assert "401" in command.start("promote", "sums").communicate()[1]
