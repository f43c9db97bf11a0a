"""The engine and the lane on a GPU give what `generate()` gives there."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from heliostat.models import base
from heliostat.serving import parity
from heliostat.serving.calls import Delta
from heliostat.serving.config import EndpointArgs
from heliostat.serving.sampling import SamplingParams
from heliostat.serving.served import ServedModel
from tests import tiny
from tests.tokens import alone, prompts

# Large enough that a GPU's kernels tile, small enough that no two logits are nearly alike.
KEYS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 512},
    "llama": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}


@pytest.fixture(scope="module", params=list(KEYS))
def loaded(request: pytest.FixtureRequest, gpu: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("model")
    tokenizer = tiny.tokenizer()
    config = AutoConfig.for_model(request.param, vocab_size=len(tokenizer), pad_token_id=1, **KEYS[request.param])
    config.initializer_range = 0.2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return base.load_for_inference(str(folder), device=str(gpu), dtype="float32")


async def tokens(deltas: AsyncGenerator[tuple[int, Delta]]) -> list[int]:
    return [token async for _, delta in deltas for token in delta.token_ids]


def run(loaded: Any, test: Any) -> None:
    """Run `test` with the model served, and see that it leaves nothing behind."""

    async def body() -> None:
        served = await ServedModel.start(loaded, "model", EndpointArgs(num_gpus=1))
        try:
            await test(served)
            assert served.in_flight == 0
            assert served.healthy
        finally:
            served.close()

    asyncio.run(body())


def test_64_prompts_at_concurrency_16_equal_generate(loaded: Any) -> None:
    given = prompts(64, 200)
    expected = [alone(loaded.model, prompt, 48) for prompt in given]

    async def test(served: ServedModel) -> None:
        turns = asyncio.Semaphore(16)

        async def one(prompt: list[int]) -> list[int]:
            async with turns:
                return await tokens(served.generate(prompt, SamplingParams(48)))

        assert await asyncio.gather(*map(one, given)) == expected

    run(loaded, test)


def test_penalties_and_beams_equal_generate(loaded: Any) -> None:
    given = prompts(4, 200)

    async def test(served: ServedModel) -> None:
        for prompt in given:
            penalised = await tokens(served.generate(prompt, SamplingParams(16, repetition_penalty=1.3)))
            assert penalised == alone(loaded.model, prompt, 16, repetition_penalty=1.3)
            beams = await tokens(served.generate(prompt, SamplingParams(16, extra={"num_beams": 3})))
            assert beams == alone(loaded.model, prompt, 16, num_beams=3)

    run(loaded, test)


def test_logprobs_are_those_of_the_model(loaded: Any) -> None:
    prompt = prompts(1, 200)[0]

    async def test(served: ServedModel) -> None:
        found = [delta async for _, delta in served.generate(prompt, SamplingParams(8, logprobs=2))]
        given = [entry for delta in found for entry in delta.logprobs or ()]
        ids = torch.tensor([[*prompt, *(entry.token_id for entry in given)]], device=loaded.model.device)
        with torch.inference_mode():
            rows = loaded.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for entry, row in zip(given, rows, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)

    run(loaded, test)


def test_a_seed_repeats_and_a_closed_stream_frees_its_slot(loaded: Any) -> None:
    params = SamplingParams(24, temperature=1.0, top_p=0.9, seed=7)
    prompt = prompts(2, 200)[1]

    async def test(served: ServedModel) -> None:
        first, second = await asyncio.gather(*(tokens(served.generate(prompt, params)) for _ in range(2)))
        assert first == second
        async with aclosing(served.generate(prompt, SamplingParams(200))) as deltas:
            await anext(deltas)

    run(loaded, test)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_the_engine_passes_the_check_of_new_versions(loaded: Any, dtype: str) -> None:
    half = base.load_for_inference(loaded.path, device="cuda", dtype=dtype)

    async def test(served: ServedModel) -> None:
        await parity.check_served(served, prompts(16, 200))

    run(half, test)
