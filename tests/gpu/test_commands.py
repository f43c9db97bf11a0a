"""From training to the endpoint on one GPU: the same YAML, with `use_gpu` and `num_gpus`."""

import asyncio
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import serve

from benchmarks import faults
from heliostat.models import base
from heliostat.quickstart import schedules
from heliostat.serving import launch
from heliostat.serving.config import ServingConfig
from tests import load
from tests.long_model import write_long_bundle
from tests.ports import free_port
from tests.slow import command

CONFIG = str(Path(__file__).parents[2] / "jobs" / "examples" / "cron" / "train.yaml")


@pytest.fixture(scope="module")
def data(gpu: torch.device, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    schedules.write(folder)
    return [f"data.{split}={folder}/{split}.jsonl" for split in ("train", "validation", "test")]


@pytest.mark.parametrize(
    "settings",
    [
        ["training.deepspeed=zero2", "training.bf16=true"],
        ["training.deepspeed=zero3", "training.bf16=true", "training.gradient_checkpointing=true"],
        ["training.deepspeed=zero1", "training.fp16=true"],
    ],
    ids=["zero2 bf16", "zero3 bf16 checkpointing", "zero1 fp16"],
)
def test_training_lowers_the_loss(data: list[str], settings: list[str], tmp_path: Path) -> None:
    gpu = ["training.use_gpu=true", "training.num_workers=1", "training.per_device_train_batch_size=16"]
    steps = ["training.max_steps=60", "training.logging_steps=1", "evaluation.use_gpu=true"]
    result = command.run("train", CONFIG, *data, *gpu, *steps, *settings, f"storage_path={tmp_path}")
    losses = [*command.journal(tmp_path / "cron-0001", "loss").values()]
    assert losses[-1] < 0.6 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    assert result["version"] == "1"


@pytest.fixture(scope="module")
def folder(gpu: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_bundle(tmp_path_factory.mktemp("models") / "long")


@pytest.fixture(scope="module")
def url(gpu_cluster: Any, folder: Path) -> Iterator[str]:
    """Two replicas share the GPU."""
    settings = ServingConfig(num_gpus=0.5, num_replicas=2, num_cpus=1, cache_tokens=8192, port=free_port())
    running = launch.start(settings, str(folder))
    yield running.url
    running.stop()


def bodies(count: int, max_tokens: int) -> list[dict[str, Any]]:
    return [{"model": "long", "prompt": f"the red cat goes {n}", "max_tokens": max_tokens} for n in range(count)]


def test_answers_through_the_endpoint_equal_generate(url: str, folder: Path) -> None:
    asked = bodies(64, 48)
    ended = asyncio.run(load.each(url, asked, 16))
    loaded = base.load_for_inference(str(folder), device="cuda")
    for body, each in zip(asked, ended, strict=True):
        ids = loaded.tokenizer(body["prompt"], return_tensors="pt").to("cuda")
        new = loaded.model.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert each.text.rstrip("\ufffd") == loaded.tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd")


def test_streams_go_on_when_a_replica_is_killed(url: str) -> None:
    asked = bodies(8, 250)

    async def test() -> None:
        right = {each.prompt: each.text for each in await load.each(url, asked, 8)}
        async with load.clients(url, asked, 8) as running:
            await asyncio.sleep(1)
            os.kill(faults.replica_pids()[0], signal.SIGKILL)
            await faults.until(lambda: len(faults.replica_pids()) == 2 and faults.all_running(2))
        assert running.kinds().keys() == {"complete"}
        assert all(each.text == right[each.prompt] for each in running.ended)

    asyncio.run(test())
    assert serve.status().proxies
