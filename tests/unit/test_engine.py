"""Many requests at once give what each gives alone, and nothing that one does reaches another."""

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import torch

from heliostat.errors import ModelError, ResourceError
from heliostat.models import base
from heliostat.serving.engine import Engine, EngineFailed
from heliostat.serving.sampling import InvalidRequest, SamplingParams
from tests import tiny

POSITIONS = 128
Loaded = base.InferenceModel


@pytest.fixture(scope="module", params=list(tiny.KEYS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return base.load_for_inference(str(tiny.write_model(tmp_path_factory.mktemp("model"), request.param)))


def sized(loaded: Loaded, **sizes: int) -> Engine:
    options = {"max_batch_tokens": 64, "cache_tokens": 2048, "max_batch_requests": 8, "max_queued_tokens": 10**6}
    return Engine(loaded.model, loaded.tokenizer, **{**options, **sizes})


def run(loaded: Loaded, test: Callable[[Engine], Awaitable[None]], **sizes: int) -> None:
    """Run `test` with a started engine, and see that it leaves nothing behind."""

    async def body() -> None:
        engine = sized(loaded, **sizes)
        await engine.start()
        try:
            await test(engine)
            assert engine.in_flight == 0
        finally:
            engine.close()
        assert not engine.healthy

    before = threading.active_count()
    asyncio.run(body())
    assert threading.active_count() <= before


async def tokens(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    return [token async for delta in engine.generate(prompt, params) for token in delta.token_ids]


def alone(model: Any, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What the model's own greedy `generate` gives."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 260) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("cache_tokens", [2048, 256], ids=["roomy", "too small for all at once"])
def test_greedy_output_equals_generate_token_for_token(loaded: Loaded, cache_tokens: int) -> None:
    # 24 requests, 8 in a batch, prompts longer than one pass: split prompts, shared beginnings, eviction.
    given = [list(range(10, 60)) + prompt for prompt in prompts(6, 20, seed=1)] + prompts(18, 70, seed=2)
    limits = [1 + 7 * index % 48 for index in range(len(given))]
    expected = [alone(loaded.model, prompt, limit) for prompt, limit in zip(given, limits, strict=True)]

    async def test(engine: Engine) -> None:
        jobs = zip(given, limits, strict=True)
        got = await asyncio.gather(*(tokens(engine, prompt, SamplingParams(limit)) for prompt, limit in jobs))
        assert got == expected

    run(loaded, test, cache_tokens=cache_tokens, max_batch_tokens=48)


def test_greedy_requests_are_not_disturbed_by_sampled_ones(loaded: Loaded) -> None:
    given = prompts(8, 40, seed=3)
    hot = SamplingParams(20, temperature=1.5, top_k=40, top_p=0.95)

    async def test(engine: Engine) -> None:
        jobs = [tokens(engine, prompt, params) for prompt in given for params in (SamplingParams(20), hot)]
        got = await asyncio.gather(*jobs)
        assert got[::2] == [alone(loaded.model, prompt, 20) for prompt in given]
        assert got[1::2] != got[::2]

    run(loaded, test)


def test_deltas_count_and_say_why_they_end(loaded: Loaded) -> None:
    async def test(engine: Engine) -> None:
        prompt = prompts(1, 20)[0]
        deltas = [delta async for delta in engine.generate(prompt, SamplingParams(12))]
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason in ("stop", "length")
        assert deltas[-1].completion_tokens == sum(len(delta.token_ids) for delta in deltas)
        assert {delta.prompt_tokens for delta in deltas} == {len(prompt)}

    run(loaded, test)


def test_a_stop_string_ends_the_request_before_its_limit(loaded: Loaded) -> None:
    async def test(engine: Engine) -> None:
        for prompt in prompts(5, 20, seed=4):
            whole = [delta async for delta in engine.generate(prompt, SamplingParams(60))]
            text = "".join(delta.text for delta in whole)
            stop = text[len(text) // 2 :][:3]
            parts = [delta async for delta in engine.generate(prompt, SamplingParams(60, stop=(stop,)))]
            assert "".join(delta.text for delta in parts) == text[: text.index(stop)]
            assert parts[-1].finish_reason == "stop"
            assert parts[-1].completion_tokens < whole[-1].completion_tokens

    run(loaded, test)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread is about to do; the limit only keeps a broken test from hanging."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def busy(engine: Engine) -> int:
    """Requests that the generation loop itself still knows of."""
    scheduler = engine._manager.batch_processor.scheduler  # type: ignore[union-attr]
    return len(scheduler.active_requests) + len(scheduler.waiting_requests)


def test_cancelled_requests_give_back_slot_and_cache(loaded: Loaded) -> None:
    async def test(engine: Engine) -> None:
        async def start_and_leave(prompt: list[int], deltas: int) -> None:
            stream = engine.generate(prompt, SamplingParams(60))
            for _ in range(deltas):
                await anext(stream, None)
            await stream.aclose()

        given = prompts(40, 50, seed=5)
        await asyncio.gather(*(start_and_leave(prompt, index % 4) for index, prompt in enumerate(given)))
        waiting = [asyncio.create_task(tokens(engine, prompt, SamplingParams(60))) for prompt in given]
        await asyncio.sleep(0)
        assert engine.in_flight == len(given)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until(lambda: busy(engine) == 0)
        cache = engine._manager.batch_processor.cache  # type: ignore[union-attr]
        assert not any(allocator.block_table for allocator in cache.cache_allocators.values())
        assert await tokens(engine, given[0], SamplingParams(30)) == alone(loaded.model, given[0], 30)

    run(loaded, test)


def test_cancellations_while_the_cache_overflows_hold_up_nobody(loaded: Loaded) -> None:
    async def test(engine: Engine) -> None:
        rng = random.Random(1)

        async def one(prompt: list[int], leave_after: int | None) -> None:
            stream = engine.generate(prompt, SamplingParams(rng.randrange(1, 128 - len(prompt))))
            count = 0
            async for delta in stream:
                count += len(delta.token_ids)
                if leave_after is not None and count > leave_after:
                    break
            await stream.aclose()

        common = list(range(10, 75))
        given = [common[: rng.choice([0, 33, 64])] + prompt for prompt in prompts(60, 40, seed=6)]
        leaving = [rng.choice([None, None, 0, 1, 3]) for _ in given]
        jobs = [one(prompt, leave_after) for prompt, leave_after in zip(given, leaving, strict=True)]
        await asyncio.wait_for(asyncio.gather(*jobs), timeout=120)

    for cache_tokens in (128, 160, 192):
        run(loaded, test, cache_tokens=cache_tokens, max_batch_requests=4)


def test_a_failing_step_fails_its_requests_and_the_engine_comes_back(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = loaded.model.forward
    broken = threading.Event()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if broken.is_set():
            raise RuntimeError("device error")
        return forward(*args, **kwargs)

    async def test(engine: Engine) -> None:
        monkeypatch.setattr(loaded.model, "forward", failing)
        for _ in range(3):
            jobs = [asyncio.create_task(tokens(engine, prompt, SamplingParams(60))) for prompt in prompts(12, 30)]
            await until(lambda: busy(engine) > 0)
            broken.set()
            results = await asyncio.gather(*jobs, return_exceptions=True)
            assert any(isinstance(result, EngineFailed) for result in results)
            assert all(isinstance(result, EngineFailed | list) for result in results)
            broken.clear()
            await until(lambda: engine.healthy)
        prompt = prompts(1, 30)[0]
        assert await tokens(engine, prompt, SamplingParams(20)) == alone(loaded.model, prompt, 20)

    run(loaded, test)


def test_closing_fails_what_is_in_flight(loaded: Loaded) -> None:
    async def test(engine: Engine) -> None:
        jobs = [asyncio.create_task(tokens(engine, prompt, SamplingParams(60))) for prompt in prompts(12, 30)]
        await asyncio.sleep(0)
        engine.close()
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert all(isinstance(result, EngineFailed) for result in results)
        with pytest.raises(EngineFailed):
            await tokens(engine, [5], SamplingParams(1))

    run(loaded, test)


def test_requests_that_would_break_a_step_are_refused_and_the_others_go_on(loaded: Loaded) -> None:
    vocabulary = loaded.model.config.vocab_size
    refused: list[tuple[list[Any], int, str]] = [
        ([], 5, "prompt"),
        ([vocabulary], 5, "prompt"),
        ([-1], 5, "prompt"),
        ([True], 5, "prompt"),
        ([1.0], 5, "prompt"),
        ([5] * POSITIONS, 1, "prompt"),
        ([5] * 100, POSITIONS - 99, "max_tokens"),
    ]

    async def test(engine: Engine) -> None:
        prompt = prompts(1, 30)[0]
        others = asyncio.create_task(tokens(engine, prompt, SamplingParams(40)))
        for ids, limit, param in refused:
            with pytest.raises(InvalidRequest) as caught:
                await tokens(engine, ids, SamplingParams(limit))
            assert caught.value.param == param
        # The borders themselves: the whole context, every vocabulary entry, the largest and smallest settings.
        assert len(await tokens(engine, [5] * (POSITIONS - 1), SamplingParams(1))) == 1
        assert len(await tokens(engine, [vocabulary - 1], SamplingParams(1, temperature=2.0, top_k=10**9))) == 1
        assert len(await tokens(engine, [0], SamplingParams(1, temperature=1e-9, top_p=1e-9))) == 1
        assert await others == alone(loaded.model, prompt, 40)

    run(loaded, test)


def test_a_request_longer_than_the_cache_is_refused(loaded: Loaded) -> None:
    async def test(engine: Engine) -> None:
        assert engine.max_length < POSITIONS
        with pytest.raises(InvalidRequest, match="at most"):
            await tokens(engine, [5], SamplingParams(engine.max_length))
        assert len(await tokens(engine, [5], SamplingParams(engine.max_length - 1))) >= 1

    run(loaded, test, cache_tokens=64)


def test_sizes_that_cannot_be_are_named(loaded: Loaded) -> None:
    with pytest.raises(ResourceError, match=r"serving\.cache_tokens"):
        sized(loaded, cache_tokens=8)

    async def huge() -> None:
        engine = sized(loaded, cache_tokens=10**12)
        await engine.start()

    with pytest.raises(ResourceError, match=r"serving\.cache_tokens"):
        asyncio.run(huge())


def test_a_model_that_cannot_run_is_found_at_the_start(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(loaded.model, "forward", broken)
    engine = sized(loaded, cache_tokens=2048)
    with pytest.raises(ModelError, match="no kernel"):
        asyncio.run(engine.start())
