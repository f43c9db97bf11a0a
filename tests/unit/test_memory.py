"""The cache's size in bytes is that of the cache; limits of control groups count, those above too."""

from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig

from heliostat.errors import ResourceError
from heliostat.models import base
from heliostat.serving import memory
from heliostat.serving.engine import Engine
from tests import tiny


@pytest.mark.parametrize("model_type", list(tiny.KEYS))
def test_the_bytes_are_those_that_the_engine_allocates(model_type: str, tmp_path: Path) -> None:
    loaded = base.load_for_inference(str(tiny.write_model(tmp_path, model_type)))
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_batch_tokens=64,
        cache_tokens=2048,
        max_batch_requests=8,
        max_queued_tokens=1,
    )
    cache = engine._new_manager().batch_processor.cache
    assert memory.cache_bytes(loaded.model.config, 2048, torch.float32) == cache.num_sectors * cache.bytes_per_sector


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_limits_of_version_2_count_those_above_too(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="0::/pod/container")
    pod, container = tmp_path / "sys/fs/cgroup/pod", tmp_path / "sys/fs/cgroup/pod/container"
    write(container, memory__max="max", memory__current="700", memory__stat="anon 600\ninactive_file 100")
    assert memory.available_bytes(tmp_path) > 10**6
    write(pod, memory__max="1000", memory__current="900", memory__stat="anon 600\ninactive_file 250")
    assert memory.available_bytes(tmp_path) == 350
    write(container, memory__max="750")
    assert memory.available_bytes(tmp_path) == 150


def test_limits_of_version_1_count(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="11:cpu:/a\n5:memory:/not/seen/from/inside\n1:name=systemd:/b")
    root = tmp_path / "sys/fs/cgroup/memory"
    write(root, memory__limit_in_bytes="5000", memory__usage_in_bytes="4800", memory__stat="inactive_file 300")
    assert memory.available_bytes(tmp_path) == 500


def test_without_limits_it_is_the_machines_memory(tmp_path: Path) -> None:
    assert 0 < memory.available_bytes(tmp_path) <= psutil.virtual_memory().total


def test_a_cache_that_does_not_fit_is_refused_with_its_size() -> None:
    config = AutoConfig.for_model("gpt2", **tiny.KEYS["gpt2"])
    memory.check_cache(config, 1024, torch.device("cpu"), torch.float32)
    with pytest.raises(ResourceError, match=rf"cache_tokens=10{'0' * 11} needs {2 * 2 * 32 * 4}0+ bytes .* \d+ are"):
        memory.check_cache(config, 10**12, torch.device("cpu"), torch.float32)
