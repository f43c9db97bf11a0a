"""The endpoint's engine is compared with `generate`: equal for sound bundles, refused where the engine goes wrong."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from heliostat.data.config import DataConfig
from heliostat.errors import ConfigError, GateRefused, ModelError
from heliostat.experiment import ExperimentConfig
from heliostat.models import base
from heliostat.models.config import ModelConfig
from heliostat.serving import parity
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import Engine
from heliostat.serving.sampling import SamplingParams
from heliostat.serving.served import TEXTS, ServedModel
from tests import tiny
from tests.bundles import write_bundle

SMALL = EndpointArgs(max_batch_tokens=48, cache_tokens=1024, max_ongoing_requests=8)


@pytest.fixture(scope="module", params=list(tiny.KEYS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("parity") / request.param, request.param)


def prompts(count: int) -> list[list[int]]:
    """Short ones, and some that are longer than the model."""
    rng = random.Random(0)
    return [[rng.randrange(2, 260) for _ in range(rng.choice([1, 7, 40, 300]))] for _ in range(count)]


def test_a_sound_bundle_passes(folder: Path) -> None:
    parity.check(folder, prompts(10), SMALL)


def test_sampling_settings_do_not_disturb_the_comparison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = base.load_for_inference

    def load_hot(reference: str) -> base.InferenceModel:
        loaded = load(reference)
        loaded.model.generation_config = GenerationConfig(
            do_sample=True, top_k=5, eos_token_id=0, pad_token_id=1, bos_token_id=0, stop_strings=["e"]
        )
        return loaded

    monkeypatch.setattr(base, "load_for_inference", load_hot)
    parity.check(folder, prompts(4), SMALL)


@pytest.fixture
def wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's model takes every token for the first one; that of `generate` is sound."""
    start = Engine.start

    async def start_disturbed(engine: Engine) -> None:
        forward = engine._model.forward

        def wrong(*args: Any, position_ids: torch.Tensor, **kwargs: Any) -> Any:
            return forward(*args, position_ids=torch.zeros_like(position_ids), **kwargs)

        engine._model.forward = wrong
        await start(engine)

    monkeypatch.setattr(Engine, "start", start_disturbed)


@pytest.mark.usefixtures("wrong_positions")
def test_an_engine_that_goes_wrong_is_refused(folder: Path) -> None:
    with pytest.raises(GateRefused, match=rf"{folder}: .* prompt 1 of 3 differs after \d+ equal tokens of \d+"):
        parity.check(folder, [prompt for prompt in prompts(20) if len(prompt) > 5][:3], SMALL)


def serve(folder: Path, test: Callable[[ServedModel], Awaitable[None]], dtype: str = "float32") -> None:
    async def body() -> None:
        served = await ServedModel.start(base.load_for_inference(str(folder), dtype=dtype), "tiny", SMALL)
        try:
            await test(served)
        finally:
            served.close()

    asyncio.run(body())


def test_a_running_model_is_checked_with_its_own_prompts_while_it_works(folder: Path, tmp_path: Path) -> None:
    async def test(served: ServedModel) -> None:
        busy = served.generate([7, 8, 9], SamplingParams(90))
        await anext(busy)
        await parity.check_served(served)
        await busy.aclose()
        texts = [served.prompts.decode(ids) for ids in served.check_prompts]
        assert texts == expected

    expected = list(TEXTS)
    serve(folder, test)
    expected = ["the red cat", "at 3 o'clock"]
    serve(write_bundle(tmp_path / "own", check_prompts=expected), test)


@pytest.mark.usefixtures("wrong_positions")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_running_model_that_goes_wrong_is_refused(folder: Path, dtype: str) -> None:
    async def test(served: ServedModel) -> None:
        with pytest.raises(GateRefused, match=r"tiny: .* of 8 differs"):
            await parity.check_served(served)
        assert served.healthy

    serve(folder, test, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_in_16_bits_may_tokens_of_nearly_the_same_score_change_places(folder: Path, dtype: str) -> None:
    given = [[token] for token in range(2, 42)]

    async def test() -> None:
        exact, rounded = (base.load_for_inference(str(folder), dtype=dtype) for _ in range(2))
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in rounded.model.parameters():
                weight.mul_(1 + 2e-3 * torch.randn_like(weight))
        served, other = [await ServedModel.start(loaded, "tiny", SMALL) for loaded in (exact, rounded)]
        try:
            await parity.check_served(replace(served, engine=other.engine), given)
        finally:
            served.close()
            other.close()

    if dtype == "bfloat16":
        asyncio.run(test())
    else:
        with pytest.raises(GateRefused, match=r"of 40 differs"):
            asyncio.run(test())


def test_what_the_endpoint_cannot_decode_is_told(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ModelError, match=r"config.json: is damaged"):
        parity.check(folder, prompts(1), SMALL)
    with pytest.raises(ModelError, match=r"raise serving.cache_tokens"):
        parity.check(write_bundle(tmp_path / "sound"), prompts(1), EndpointArgs(cache_tokens=32))


def config(folder: Path, test: Path | None) -> ExperimentConfig:
    data = DataConfig(train=str(folder / "train.jsonl"), test=str(test) if test else None, format="prompt_completion")
    return ExperimentConfig(name="parity", model=ModelConfig(model_name_or_path="unused"), data=data)


def test_prompts_are_those_of_the_test_rows(folder: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("".join(f'{{"prompt": "the {word}", "completion": "x"}}\n' for word in ("cat", "dog", "man")))
    tokenizer = base.load_tokenizer(str(folder))
    taken = parity.prompts_for(folder, 2, config(tmp_path, test))
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in taken] == ["the cat", "the dog"]
    assert len(parity.prompts_for(folder, 50, config(tmp_path, test))) == 3
    parity.check(folder, taken, SMALL)


def test_without_test_rows_there_are_a_few_texts(folder: Path) -> None:
    taken = parity.prompts_for(folder, 8)
    assert len({tuple(ids) for ids in taken}) == 8
    assert all(taken)
    with pytest.raises(ConfigError, match=r"promotion.parity_prompts: 9, .* only 8"):
        parity.prompts_for(folder, 9)
