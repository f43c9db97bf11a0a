"""The cache's size in bytes is that of the cache."""

from pathlib import Path

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


def test_a_cache_that_does_not_fit_is_refused_with_its_size() -> None:
    config = AutoConfig.for_model("gpt2", **tiny.KEYS["gpt2"])
    memory.check_cache(config, 1024, torch.device("cpu"), torch.float32)
    with pytest.raises(ResourceError, match=rf"cache_tokens=10{'0' * 11} needs {2 * 2 * 32 * 4}0+ bytes .* \d+ are"):
        memory.check_cache(config, 10**12, torch.device("cpu"), torch.float32)
