"""A model is hosted with the numbers that the settings ask for, and proves itself in them."""

import asyncio
from pathlib import Path
from typing import Literal

import pytest
import torch

from heliostat.serving.calls import Resumed
from heliostat.serving.config import EndpointArgs
from heliostat.serving.hosting import Hosted
from heliostat.serving.protocol import CompletionRequest
from heliostat.serving.served import ServedModel
from tests.bundles import write_bundle


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_dtype_is_that_of_the_settings(
    dtype: Literal["auto", "float32", "bfloat16", "float16"], expected: torch.dtype, tmp_path: Path
) -> None:
    folder = write_bundle(tmp_path / "bundle", "llama")
    request = CompletionRequest.model_validate({"model": "m", "prompt": "the red cat", "max_tokens": 6})

    async def test() -> None:
        hosted = await Hosted.load(str(folder), "m", "1", EndpointArgs(dtype=dtype, cache_tokens=1024))
        try:
            assert isinstance(hosted._served, ServedModel)
            assert hosted._served.dtype == expected
            assert await hosted.check() is None
            messages = [message async for message in hosted.answer(request, Resumed(), {})]
            tokens = [len(delta.token_ids) for part in messages if isinstance(part, list) for _, delta in part]
            assert 1 <= sum(tokens) <= 6
        finally:
            hosted.close()

    asyncio.run(test())
