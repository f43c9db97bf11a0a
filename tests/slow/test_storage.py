"""Data, run, model registry and bundle in S3, on a real server: a killed run goes on on a machine that has nothing."""

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from mlflow import MlflowClient
from rich.console import Console

from heliostat import experiment, state, storage
from heliostat.errors import DataError, HeliostatError, StorageError, UserError
from heliostat.evaluation import completion
from heliostat.models import base, bundle
from heliostat.registry import versions
from heliostat.training import trainer
from heliostat.training.trainer import TrainResult
from tests import s3
from tests.ports import free_port
from tests.slow import command

pytestmark = pytest.mark.slow

CONFIG = f"""\
name: sums
model:
  scratch: {{model_type: gpt2, vocab_size: 300, config: {{n_layer: 1, n_embd: 16, n_head: 2}}}}
data: {{train: "s3://{s3.BUCKET}/data/*.jsonl", format: prompt_completion, max_length: 64}}
training: {{num_workers: 0, deepspeed: zero0, max_steps: 60, save_steps: 2, eval_steps: 10, logging_steps: 1}}
"""
RUNS = f"s3://{s3.BUCKET}/runs"
PROMPT = "5 and one"


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with data, to whose bucket MLflow's artifacts go too; its address."""
    with s3.running(tmp_path) as environment:
        database = f"sqlite:///{tmp_path}/mlflow.db"
        for name, value in {**environment, "MLFLOW_TRACKING_URI": database}.items():
            monkeypatch.setenv(name, value)
        storage._filesystem.cache_clear()  # of another test's server
        rows = [{"prompt": f"{number} and one", "completion": f" {number + 1}"} for number in range(200)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "config.yaml").write_text(CONFIG)
        storage.upload({tmp_path / "rows.jsonl": f"s3://{s3.BUCKET}/data/rows.jsonl"})
        MlflowClient(database).create_experiment("sums", artifact_location=f"s3://{s3.BUCKET}/mlflow")
        yield environment["AWS_ENDPOINT_URL"]
    storage._filesystem.cache_clear()


def train(folder: Path, *overrides: str) -> TrainResult:
    return trainer.train(experiment.load(folder / "config.yaml", overrides), Console(quiet=True))


def weights_hash(reference: str) -> str:
    return str(bundle.read_manifest(Path(versions.resolve(reference).path))["files"]["model.safetensors"])


def served(reference: str) -> str:
    """What an endpoint completes the prompt with."""
    with command.endpoint(reference, f"serving.port={free_port()}", "serving.num_cpus=0.5") as up:
        body = {"model": up["model"], "prompt": PROMPT, "max_tokens": 8}
        return str(httpx2.post(f"{up['url']}/completions", json=body, timeout=60).json()["choices"][0]["text"])


def denied(endpoint: str) -> None:
    """From here on the server checks keys, and knows none."""
    request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
    urllib.request.urlopen(request, timeout=60).close()


def test_a_run_outlives_its_machine(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = command.start("train", str(tmp_path / "config.yaml"), f"storage_path={RUNS}")
    copied = f"{RUNS}/sums-0001/checkpoints/attempt-01/*/manifest_0.json"
    command.wait_for(lambda: bool(storage.find(copied)), process)
    process.kill()
    process.communicate()
    shutil.rmtree(state.folder())

    resumed = train(tmp_path, f"storage_path={RUNS}", "resume=must")
    assert resumed.run_folder == f"{RUNS}/sums-0001"
    unbroken = train(tmp_path, f"storage_path={tmp_path}/runs", "registry.register_model=false")
    assert weights_hash(resumed.bundle) == weights_hash(unbroken.bundle) == weights_hash(resumed.model_uri)

    shutil.rmtree(state.folder())  # another machine
    expected = completion.complete(base.load_for_inference(unbroken.bundle), [PROMPT], {"max_new_tokens": 8})
    assert (
        command.run("generate", resumed.bundle, "--prompt", PROMPT, "generation.max_new_tokens=8")["outputs"]
        == expected
    )
    assert served(resumed.bundle) == expected[0]
    steps = {file.uri.split("/")[-2] for file in storage.find(f"{RUNS}/sums-0001/checkpoints/*/*/state.json")}
    assert steps == {"step_000058-w1", "step_000060-w1"}, "older checkpoints are deleted there, too"
    _errors_are_told(endpoint, tmp_path, monkeypatch)


def _errors_are_told(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(error: type[UserError], told: str, *overrides: str) -> None:
        with pytest.raises(error, match=told) as raised:
            train(folder, *overrides)
        assert isinstance(raised.value, HeliostatError)
        assert raised.value.exit_code == 2

    refused(StorageError, "s3://nix/.*there is no such bucket", "data.train=s3://nix/*.jsonl")
    refused(StorageError, "s3://nix/.*there is no such bucket", "storage_path=s3://nix/runs")
    refused(DataError, "nix.jsonl: no such file", f"data.train=s3://{s3.BUCKET}/nix.jsonl")
    denied(endpoint)
    refused(StorageError, "access is refused; look at AWS_ACCESS_KEY_ID")
    refused(StorageError, "access is refused; look at AWS_ACCESS_KEY_ID", f"storage_path={RUNS}/more")
    monkeypatch.setitem(os.environ, "AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage._filesystem.cache_clear()
    refused(StorageError, "the server cannot be reached; look at the network and at AWS_ENDPOINT_URL")
