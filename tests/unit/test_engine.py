"""Many requests at once give what each gives alone, and nothing that one does reaches another."""

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from heliostat.errors import ModelError, ResourceError
from heliostat.models import base
from heliostat.serving.calls import Delta
from heliostat.serving.engine import Engine, EngineFailed, Overloaded
from heliostat.serving.sampling import InvalidRequest, SamplingParams
from heliostat.serving.text import Completion
from tests import tiny
from tests.tokens import alone, prompts

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
        with pytest.raises(InvalidRequest, match="length is 64 tokens"):
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


def texts(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def collected(
    engine: Engine, prompt: Sequence[int], params: SamplingParams, emitted: Sequence[int] = ()
) -> list[Delta]:
    return [delta async for delta in engine.generate(prompt, params, emitted)]


SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    ({"min_tokens": 25, "logit_bias": {0: 12.0}}, {"min_new_tokens": 25, "sequence_bias": [[[0], 12.0]]}),
    ({"logit_bias": {0: 8.0, 65: 5.0, 66: -100.0}}, {"sequence_bias": [[[0], 8.0], [[65], 5.0], [[66], -100.0]]}),
    (
        {"repetition_penalty": 1.2, "min_tokens": 9, "logit_bias": {0: 9.0}},
        {"repetition_penalty": 1.2, "min_new_tokens": 9, "sequence_bias": [[[0], 9.0]]},
    ),
]


@pytest.mark.parametrize("cache_tokens", [2048, 256], ids=["roomy", "too small for all at once"])
@pytest.mark.parametrize(("settings", "theirs"), SETTINGS, ids=lambda settings: "-".join(settings))
def test_settings_do_what_they_do_in_generate(
    loaded: Loaded, settings: dict[str, Any], theirs: dict[str, Any], cache_tokens: int
) -> None:
    given = [list(range(10, 60)) + prompt for prompt in prompts(4, 20, seed=1)] + prompts(10, 60, seed=2)
    expected = [alone(loaded.model, prompt, 40, **theirs) for prompt in given]
    plain = [alone(loaded.model, prompt, 40) for prompt in given]
    assert expected != plain

    async def test(engine: Engine) -> None:
        asked = [SamplingParams(40, **own) for own in (settings, {})]
        got = await asyncio.gather(*(tokens(engine, prompt, params) for prompt in given for params in asked))
        assert got[::2] == expected
        assert got[1::2] == plain

    run(loaded, test, cache_tokens=cache_tokens, max_batch_tokens=48)


def penalised(model: Any, prompt: list[int], limit: int, presence: float, frequency: float) -> list[int]:
    """Greedy tokens under OpenAI's penalties, one full forward pass at a time."""
    generated: list[int] = []
    while len(generated) < limit and 0 not in generated:
        with torch.no_grad():
            scores = model(torch.tensor([prompt + generated])).logits[0, -1]
        for token in set(generated):
            scores[token] -= presence + frequency * generated.count(token)
        generated.append(int(scores.argmax()))
    return generated


def test_presence_and_frequency_penalties_are_openais(loaded: Loaded) -> None:
    given = prompts(6, 40, seed=8)
    params = SamplingParams(30, presence_penalty=2.0, frequency_penalty=1.5)
    expected = [penalised(loaded.model, prompt, 30, 2.0, 1.5) for prompt in given]
    assert expected != [alone(loaded.model, prompt, 30) for prompt in given]

    async def test(engine: Engine) -> None:
        assert await asyncio.gather(*(tokens(engine, prompt, params) for prompt in given)) == expected

    for cache_tokens in (2048, 128):
        run(loaded, test, cache_tokens=cache_tokens)


def test_a_seed_gives_the_same_text_at_any_concurrency(loaded: Loaded) -> None:
    given = prompts(6, 40, seed=9)
    seeded = SamplingParams(30, temperature=1.2, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=7)
    hot = SamplingParams(30, temperature=1.2)
    alone_: list[list[int]] = []

    async def one_by_one(engine: Engine) -> None:
        alone_.extend([await tokens(engine, prompt, seeded) for prompt in given])
        assert alone_ != [await tokens(engine, prompt, replace(seeded, seed=8)) for prompt in given]

    async def together(engine: Engine) -> None:
        jobs = [tokens(engine, prompt, params) for prompt in given for params in (seeded, hot, SamplingParams(30))]
        assert (await asyncio.gather(*jobs))[::3] == alone_

    run(loaded, one_by_one)
    for cache_tokens in (2048, 160):
        run(loaded, together, cache_tokens=cache_tokens)


def test_a_generation_goes_on_wherever_it_was_cut(loaded: Loaded) -> None:
    cases = [
        SamplingParams(24),
        SamplingParams(24, repetition_penalty=1.3, frequency_penalty=0.4, min_tokens=12, logit_bias={0: 4.0}),
        SamplingParams(24, temperature=1.3, top_k=80, presence_penalty=0.5, seed=11, logprobs=2),
    ]

    async def test(engine: Engine) -> None:
        async def check(prompt: list[int], params: SamplingParams) -> None:
            whole = await collected(engine, prompt, params)
            given = [token for delta in whole for token in delta.token_ids]
            for cut in range(len(given) + 1):
                first = Completion(loaded.tokenizer, prompt, params, frozenset({0})).extend(given[:cut])
                rest = await collected(engine, prompt, params, given[:cut])
                assert first.text + texts(rest) == texts(whole), cut
                assert [token for delta in rest for token in delta.token_ids] == given[cut:]
                last = rest[-1]
                assert (last.completion_tokens, last.prompt_tokens) == (len(given), len(prompt))
                assert last.finish_reason == whole[-1].finish_reason
                assert sum(len(delta.logprobs) for delta in rest) == (len(given) - cut) * (params.logprobs is not None)

        given = prompts(2, 30, seed=10)
        await asyncio.gather(*(check(prompt, params) for prompt in given for params in cases))
        plain = texts(await collected(engine, given[0], cases[0]))
        stop = plain[len(plain) // 2 :][:4]
        await check(given[0], replace(cases[0], stop=(stop, "never there")))

    run(loaded, test)


def test_logprobs_are_those_of_a_plain_forward_pass(loaded: Loaded) -> None:
    given = prompts(6, 40, seed=12)
    cases = [
        SamplingParams(20, logprobs=3),
        SamplingParams(20, logprobs=0, temperature=1.4, top_k=50, repetition_penalty=1.2),
        SamplingParams(20),
    ]

    answers: list[list[Delta]] = []

    async def test(engine: Engine) -> None:
        jobs = (collected(engine, prompt, params) for prompt in given for params in cases)
        answers.extend(await asyncio.gather(*jobs))

    for cache_tokens in (2048, 160):
        run(loaded, test, cache_tokens=cache_tokens)
    asked = [(prompt, params) for prompt in given for params in cases] * 2
    for (prompt, params), deltas in zip(asked, answers, strict=True):
        new = [token for delta in deltas for token in delta.token_ids]
        found = [each for delta in deltas for each in delta.logprobs]
        if params.logprobs is None:
            assert found == []
            continue
        with torch.inference_mode():
            scores = loaded.model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert [each.token_id for each in found] == new
        expected = scores.gather(1, torch.tensor(new)[:, None])[:, 0].tolist()
        assert [each.logprob for each in found] == pytest.approx(expected, abs=1e-4)
        for each, row in zip(found, scores, strict=True):
            values = row.topk(params.logprobs).values.tolist()
            assert [value for _, _, value in each.top] == pytest.approx(values, abs=1e-4)
            assert all(text == loaded.tokenizer.decode([token]) for token, text, _ in each.top)


def test_stop_tokens_end_a_completion_as_end_tokens_do(loaded: Loaded) -> None:
    async def test(engine: Engine) -> None:
        for prompt in prompts(5, 20, seed=13):
            whole = await collected(engine, prompt, SamplingParams(40))
            new = [token for delta in whole for token in delta.token_ids]
            stop = new[len(new) // 2]
            until_stop = new[: new.index(stop) + 1]
            cut = await collected(engine, prompt, SamplingParams(40, stop_token_ids=(stop, 308)))
            assert [token for delta in cut for token in delta.token_ids] == until_stop
            assert cut[-1].finish_reason == "stop"
            shorter = Completion(loaded.tokenizer, prompt, SamplingParams(40), frozenset()).extend(until_stop[:-1])
            assert texts(cut).startswith(shorter.text)
            params = SamplingParams(40, stop_token_ids=(stop,), min_tokens=len(until_stop))
            assert stop not in (await tokens(engine, prompt, params))[: len(until_stop) - 1]

    run(loaded, test)


def test_ids_that_are_no_tokens_are_refused_in_settings_too(loaded: Loaded) -> None:
    vocabulary = loaded.model.config.vocab_size

    async def test(engine: Engine) -> None:
        for name, value in (("logit_bias", {vocabulary: 1.0}), ("stop_token_ids", (vocabulary,))):
            settings: dict[str, Any] = {name: value}
            with pytest.raises(InvalidRequest) as caught:
                await tokens(engine, [5], SamplingParams(3, **settings))
            assert caught.value.param == name
        with pytest.raises(InvalidRequest):
            await collected(engine, [5], SamplingParams(3), emitted=[vocabulary])

    run(loaded, test)


def test_a_request_whose_scores_are_broken_hurts_no_other(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = loaded.model.forward
    poison = 308

    def breaking(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        last = kwargs["input_ids"][0, kwargs["logits_to_keep"]]
        output.logits[0, last == poison] = torch.nan
        return output

    async def test(engine: Engine) -> None:
        given = prompts(6, 30, seed=14)
        expected = [alone(loaded.model, prompt, 20) for prompt in given]
        assert not any(poison in answer for answer in expected)
        monkeypatch.setattr(loaded.model, "forward", breaking)
        broken = SamplingParams(4, temperature=1.0, top_p=0.9, logprobs=2, presence_penalty=1.0)
        jobs = [tokens(engine, prompt, SamplingParams(20)) for prompt in given]
        bad = [tokens(engine, [5, poison], params) for params in (broken, SamplingParams(4))]
        got = await asyncio.gather(*jobs, *bad)
        assert got[: len(given)] == expected
        assert all(1 <= len(new) <= 4 for new in got[len(given) :])
        assert engine.state().restarts == 0

    run(loaded, test)


def test_what_waits_is_bounded_and_the_rest_is_sent_away_before_it_begins(loaded: Loaded) -> None:
    async def test(engine: Engine) -> None:
        # 4 requests of 64 tokens fit, 2 more may wait.
        jobs = [asyncio.create_task(tokens(engine, [5] * 30, SamplingParams(34))) for _ in range(10)]
        await asyncio.sleep(0)
        assert engine.in_flight == 6
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert results[:6] == [alone(loaded.model, [5] * 30, 34)] * 6
        assert all(isinstance(result, Overloaded) and result.retry_after >= 1 for result in results[6:])
        assert len(await tokens(engine, [5] * 30, SamplingParams(1))) == 1

    run(loaded, test, cache_tokens=256, max_queued_tokens=128)


def test_the_state_says_what_runs_what_waits_and_what_is_in_the_cache(loaded: Loaded) -> None:
    async def test(engine: Engine) -> None:
        idle = engine.state()
        assert (idle.running, idle.waiting, idle.restarts) == (0, 0, 0)
        assert idle.cache_usage == 0
        held = threading.Event()
        forward = engine._model.forward

        def waiting(*args: Any, **kwargs: Any) -> Any:
            assert held.wait(60)
            return forward(*args, **kwargs)

        engine._model.forward = waiting
        common = list(range(10, 75))
        jobs = [asyncio.create_task(tokens(engine, [*common, i], SamplingParams(20))) for i in range(12)]
        await until(lambda: engine.state().running == 1 and engine.state().cache_usage > 0)
        assert engine.state().waiting == 11, "the first prompt fills the pass"
        held.set()
        await asyncio.gather(*jobs)
        del engine._model.forward
        done = engine.state()
        assert (done.running, done.waiting) == (0, 0)
        assert done.cache_usage == 0, "what is kept for prompts to come is free"
        # Two whole blocks of 32 tokens are shared; at least those that came after the first had gone found them.
        assert done.prefix_queries - idle.prefix_queries == 12 * 66
        assert done.prefix_hits >= 4 * 64
        assert done.prefix_hits % 64 == 0

    run(loaded, test, max_batch_requests=4)


def test_health_is_red_until_a_new_loop_runs(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = loaded.model.forward
    may_restart = threading.Event()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("device error")

    async def test(engine: Engine) -> None:
        renew = engine._new_manager

        def slowly() -> Any:
            assert may_restart.wait(60)
            return renew()

        engine._new_manager = slowly  # type: ignore[method-assign]
        await tokens(engine, list(range(10, 75)), SamplingParams(1))
        before = engine.state()
        monkeypatch.setattr(loaded.model, "forward", broken)
        with pytest.raises(EngineFailed):
            await tokens(engine, [5], SamplingParams(5))
        await until(lambda: not engine.healthy)
        with pytest.raises(EngineFailed):
            await tokens(engine, [5], SamplingParams(5))
        assert not engine.healthy
        monkeypatch.setattr(loaded.model, "forward", forward)
        may_restart.set()
        await until(lambda: engine.healthy)
        assert len(await tokens(engine, [5], SamplingParams(1))) == 1
        after = engine.state()
        assert after.restarts == before.restarts + 1
        assert after.prefix_queries > before.prefix_queries, "counts go on"

    run(loaded, test)


def test_an_event_loop_that_is_gone_does_not_end_the_generation_loop(loaded: Loaded) -> None:
    async def test(engine: Engine) -> None:
        gone = asyncio.new_event_loop()
        gone.close()
        here = engine._event_loop
        job = asyncio.create_task(tokens(engine, [5], SamplingParams(8)))
        engine._event_loop = gone
        await asyncio.sleep(0)
        await until(lambda: busy(engine) == 0 and engine._manager.input_queue.empty())  # type: ignore[union-attr]
        engine._event_loop = here
        assert engine.healthy
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        assert len(await tokens(engine, [5], SamplingParams(1))) == 1

    run(loaded, test)
