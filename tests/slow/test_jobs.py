"""From this machine to a cluster: jobs on a Ray head with token authentication, against `heliostat mlflow` with users
and passwords on PostgreSQL, whose artifacts are in S3. All of them are processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from heliostat import state
from heliostat.jobs import follow
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
data: {train: ../data/*.jsonl, format: prompt_completion, max_length: 64, validation_size: 40, test_size: 10}
training: {num_workers: 1, deepspeed: zero0, max_steps: 200, save_steps: 2, logging_steps: 1}
tune_training: {space: {training.learning_rate: [0.001, 0.002]}, num_samples: 2}
tune_decoding: {space: {temperature: [0.5]}, num_samples: 1, prompts: 4, holdout_prompts: 4, min_prompts: 4}
generation: {max_new_tokens: 4}
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


def forwarded() -> dict[str, str]:
    """What jobs need to reach the MLflow server."""
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_TRACKING_")}


def submit(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, result and what the user saw of `heliostat submit`."""
    process = command.start("submit", *arguments, *(flag for name in forwarded() for flag in ("--env", name)))
    stdout, stderr = process.communicate(timeout=400)
    return process.returncode, json.loads(stdout.splitlines()[-1]), stderr


def ray_job_submit(folder: Path, *words: str) -> dict[str, Any]:
    """The result of a command that Ray's own client makes a job of; it must succeed."""
    variables = json.dumps({"env_vars": forwarded()})
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--runtime-env-json", variables]
    line = [*ray, "--working-dir", ".", "--", "python", *words, "--json"]
    environment = os.environ | {"RAY_AUTH_MODE": "token"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return follow.result_of(done.stdout)


@pytest.fixture
def checkout(here: Path) -> Path:
    """What a checkout has for jobs, with the project's files in it."""
    for name in ("platform", "jobs"):
        shutil.copytree(REPOSITORY / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(here.parent / "data" / "rows.jsonl", here)
    (here / "config.yaml").write_text(CONFIG.replace("../data/*.jsonl", "rows.jsonl"))
    return here


def test_a_killed_job_is_gone_on_with_and_its_model_promoted_and_served(here: Path, cluster: RayHead) -> None:
    # Saving often makes it slow enough to be killed in the middle.
    _, started, _ = submit("train", "config.yaml", "--no-wait")
    job = started["job_id"]
    watcher = command.start("logs", job, "--follow")
    assert watcher.stderr is not None
    assert any("step " in line for line in watcher.stderr), "the log ended before it trained"
    watcher.send_signal(signal.SIGINT)
    assert f"the job goes on; `heliostat logs {job} --follow`" in watcher.communicate()[1]
    assert watcher.returncode == 130
    (driver,) = command.processes_below(cluster.pid, "heliostat.cli train config.yaml")
    driver.kill()
    watcher = command.start("logs", job, "--follow")
    assert f"the job {job} failed" in watcher.communicate()[1]
    assert watcher.returncode == 1
    (run,) = store.client().search_runs([store.experiment_id("sums")])

    code, result, shown = submit("train", "config.yaml", "--entrypoint-num-cpus", "0.1")
    assert code == 0, shown
    assert "going on with" in shown
    assert "step 200/200" in shown
    assert (result["run_id"], result["version"], result["status"]) == (run.info.run_id, "1", "SUCCEEDED")
    assert str(here) not in result["bundle"], "it was trained in the cluster's folder"
    assert versions.version_of_alias("sums", "challenger").version == "1"
    password = os.environ["MLFLOW_TRACKING_PASSWORD"]
    assert password not in shown + json.dumps(result)

    code, result, shown = submit("promote", "sums")
    assert (code, result["version"]) == (0, "1"), shown
    jobs = command.run("status")["jobs"]
    assert [(known["command"], known["status"]) for known in jobs] == [
        ("promote", "SUCCEEDED"), ("train", "SUCCEEDED"), ("train", "FAILED"),
    ]  # fmt: skip
    assert served("models:/sums@champion")["heliostat"]["version"] == "1"
    assert list((state.folder() / "downloads" / "sums").glob("*/model.safetensors")), "from S3 through the server"


def served(reference: str) -> dict[str, Any]:
    """What an endpoint on this machine tells of the model, once it has answered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        with command.endpoint(reference, f"serving.port={free_port()}", "serving.num_cpus=0.5") as up:
            body = {"model": up["model"], "prompt": "1 and one", "max_tokens": 4}
            answer = httpx2.post(f"{up['url']}/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] > 0
            return dict(httpx2.get(f"{up['url']}/models").json()["data"][0])


def test_a_search_is_stopped(here: Path) -> None:
    _, started, _ = submit("tune-training", "config.yaml", "--no-wait")
    wait_for_a_trial()
    stopped = command.run("stop", started["job_id"])
    assert (stopped["status"], stopped["stopped"]) == ("STOPPED", True)
    search = next(run for run in runs() if "heliostat.search" in run.data.tags)
    assert search.info.status == "KILLED", "its MLflow run was ended before the job was stopped"


def runs() -> list[Any]:
    """The experiment's runs in MLflow."""
    return list(store.client().search_runs([store.experiment_id("sums")]))


def wait_for_a_trial(seconds: float = 300) -> None:
    """Wait until a trial is in MLflow; the limit only keeps a broken search from hanging the tests."""
    deadline = time.monotonic() + seconds
    while not any("mlflow.parentRunId" in run.data.tags for run in runs()):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_what_is_wrong_is_told(here: Path, cluster: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, result, shown = submit("train", "config.yaml", "data.columns={prompt: nix}")
    assert (code, result["exit_code"], result["status"]) == (2, 2, "FAILED"), shown
    assert "nix" in result["error"]

    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray looks for a token when no variable gives one
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    problems = {"": "wants a token", "0" * 64: "does not take the token of RAY_AUTH_TOKEN"}
    for token, problem in problems.items():
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        assert problem in refusal("status")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "does not take the token of ~/.ray/auth_token" in refusal("status")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    assert "401" in refusal("promote", "sums")
    monkeypatch.setenv("RAY_ADDRESS", cluster.gcs)
    told = refusal("serve", "models:/sums@champion")
    assert f"the Ray cluster at {cluster.gcs} (RAY_ADDRESS) wants another token" in told


def refusal(*arguments: str) -> str:
    """What a command that must fail says."""
    process = command.start(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    return errors


@pytest.mark.skipif(not os.environ.get("HELIOSTAT_JOBS"), reason="takes minutes: HELIOSTAT_JOBS=1")
def test_every_command_is_a_job_through_both_doors(checkout: Path) -> None:
    wanted = {"train": "version", "tune-training": "best", "tune-decoding": "settings", "evaluate": "n",
              "promote": "version"}  # fmt: skip
    for verb, key in wanted.items():
        target = ["both"] if verb == "promote" else ["config.yaml", "training.max_steps=4", "name=both"]
        code, result, shown = submit(verb, *target)
        assert (code, result["status"], key in result) == (0, "SUCCEEDED", True), shown
        assert key in ray_job_submit(checkout, f"jobs/{verb.replace('-', '_')}.py", *target)
