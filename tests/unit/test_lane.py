"""The lane gives what `generate()` gives, many requests at once, and nothing that one does reaches another."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from heliostat.errors import ModelError
from heliostat.models import base
from heliostat.serving.engine import Engine, EngineFailed, Overloaded, token_ids
from heliostat.serving.lane import Lane
from heliostat.serving.sampling import DecodingDefaults, SamplingParams
from tests import tiny
from tests.tokens import prompts

Loaded = base.InferenceModel
BEAMS = {"num_beams": 4, "length_penalty": 0.3}


@pytest.fixture(scope="module", params=list(tiny.KEYS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return base.load_for_inference(str(tiny.write_model(tmp_path_factory.mktemp("model"), request.param)))


class Watched(Lane):
    """A lane whose batches are recorded, and wait until they may start."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batches: list[list[list[int]]] = []
        self.may_start = threading.Event()
        self.may_start.set()

    def _work(self, batch: list[Any]) -> None:
        self.may_start.wait(60)
        self.batches.append([request.prompt_ids for request in batch])
        super()._work(batch)


def run(loaded: Loaded, test: Callable[[Watched], Awaitable[None]], **sizes: int) -> None:
    """Run `test` with a started lane, and see that it leaves nothing behind."""

    async def body() -> None:
        lane = Watched(
            loaded.model,
            loaded.tokenizer,
            **{"max_sequences": 8, "max_batch_tokens": 4096, "max_queued_tokens": 10**6, **sizes},
        )
        await lane.start([SamplingParams(1, repetition_penalty=1.2)])
        try:
            await test(lane)
            assert lane.in_flight == 0
        finally:
            lane.may_start.set()
            lane.close()
        assert not lane.healthy

    before = threading.active_count()
    asyncio.run(body())
    # What to_thread leaves ends with its event loop.
    assert threading.active_count() <= before


async def tokens(lane: Lane | Engine, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    return [token async for delta in lane.generate(prompt, params) for token in delta.token_ids]


def alone(loaded: Loaded, prompt: Sequence[int], max_tokens: int, **settings: Any) -> list[int]:
    """What the model's own `generate` gives for this prompt alone, up to the end token."""
    ids = torch.tensor([list(prompt)])
    config = GenerationConfig(max_new_tokens=max_tokens, **settings)
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    new: list[int] = output[0, len(prompt) :].tolist()
    ends = token_ids(loaded.model.generation_config.eos_token_id)
    return new[: next((index + 1 for index, token in enumerate(new) if token in ends), len(new))]


def asked(limit: int, **settings: Any) -> SamplingParams:
    """The request that asks for what a generation config with `settings` says."""
    return DecodingDefaults.of(GenerationConfig(**settings)).params(limit)


def before_each_step(lane: Lane, call: Callable[[], Any]) -> None:
    """Have `call` called in the lane's thread before each of the model's steps."""
    forward = lane._model.forward

    def called(*args: Any, **kwargs: Any) -> Any:
        call()
        return forward(*args, **kwargs)

    lane._model.forward = called


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread is about to do; the limit only keeps a broken test from hanging."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "extra",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        BEAMS,
        {"num_beams": 3, "early_stopping": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"min_new_tokens": 12},
        {"suppress_tokens": list(range(0, 300, 3))},
        {"bad_words_ids": [[token] for token in range(40, 90)]},
    ],
    ids=lambda extra: "-".join(extra),
)
def test_a_batch_gives_each_request_what_generate_gives_it_alone(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    # Many end tokens, so that rows of a batch end at different times.
    ends = GenerationConfig(eos_token_id=list(range(0, 300, 37)), pad_token_id=1, bos_token_id=0)
    monkeypatch.setattr(loaded.model, "generation_config", ends)
    given = [*prompts(12, 50, seed=1), [0], [0, 0, 5]]
    expected = [alone(loaded, prompt, 24, **extra) for prompt in given]
    assert expected != [alone(loaded, prompt, 24) for prompt in given], "the setting changes something"

    async def test(lane: Watched) -> None:
        jobs = [tokens(lane, prompt, asked(24, **extra)) for prompt in given]
        assert await asyncio.gather(*jobs) == expected

    run(loaded, test)


@pytest.mark.parametrize(
    "extra",
    [{"min_p": 0.2}, {"typical_p": 0.5}, {"num_beams": 3}, {"repetition_penalty": 1.3}],
    ids=lambda e: "-".join(e),
)
def test_sampling_draws_what_generate_draws(loaded: Loaded, extra: dict[str, Any]) -> None:
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 60, "top_p": 0.98, **extra}
    params = asked(30, **settings)

    async def test(lane: Watched) -> None:
        for seed, prompt in enumerate(prompts(4, 30, seed=2)):
            torch.manual_seed(seed)
            got = await tokens(lane, prompt, params)
            torch.manual_seed(seed)
            assert got == alone(loaded, prompt, 30, **settings)

    run(loaded, test)


def test_what_the_engine_can_do_holds_here_too(loaded: Loaded) -> None:
    params = SamplingParams(
        24,
        repetition_penalty=1.2,
        min_tokens=9,
        logit_bias={0: 6.0, 65: 3.0},
        stop_token_ids=(40, 41, 42),
        extra={"no_repeat_ngram_size": 2},
    )
    theirs = {
        "repetition_penalty": 1.2,
        "min_new_tokens": 9,
        "sequence_bias": [[[0], 6.0], [[65], 3.0]],
        "eos_token_id": [0, 40, 41, 42],
        "no_repeat_ngram_size": 2,
    }
    given = prompts(8, 30, seed=9)
    whole = [alone(loaded, prompt, 24, **theirs) for prompt in given]
    expected = [new[: next((i + 1 for i, token in enumerate(new) if token in (0, 40, 41, 42)), 24)] for new in whole]

    async def test(lane: Watched) -> None:
        assert await asyncio.gather(*(tokens(lane, prompt, params) for prompt in given)) == expected

    run(loaded, test)


def test_a_seeded_request_is_alone_in_its_batch_and_leaves_the_generator_as_it_was(loaded: Loaded) -> None:
    seeded = SamplingParams(12, temperature=1.5, seed=3, extra={"typical_p": 0.9})

    async def test(lane: Watched) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        lane.may_start.clear()
        jobs = [asyncio.create_task(tokens(lane, [9, 8], seeded)) for _ in range(3)]
        await until(lambda: lane.in_flight == 3)
        lane.may_start.set()
        first, *others = await asyncio.gather(*jobs)
        assert others == [first, first]
        assert [len(batch) for batch in lane.batches] == [1, 1, 1]
        assert torch.equal(torch.get_rng_state(), before)

    run(loaded, test)


def test_a_vanishing_temperature_is_greedy_not_an_error(loaded: Loaded) -> None:
    async def test(lane: Watched) -> None:
        cold = SamplingParams(12, temperature=1e-300, extra={"typical_p": 0.99})
        assert await tokens(lane, [9, 8], cold) == alone(loaded, [9, 8], 12)

    run(loaded, test)


def test_the_bundles_own_settings_are_not_added_to_those_of_a_request(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate()` fills what is left open from the model's generation config; the request has been merged before."""
    expected = alone(loaded, [5, 6, 7], 20, repetition_penalty=1.4)
    tuned = GenerationConfig(repetition_penalty=1.9, num_beams=3, stop_strings=["a"], top_k=2, eos_token_id=0)
    monkeypatch.setattr(loaded.model, "generation_config", tuned)

    async def test(lane: Watched) -> None:
        assert await tokens(lane, [5, 6, 7], SamplingParams(20, repetition_penalty=1.4)) == expected
        assert loaded.model.generation_config is tuned

    run(loaded, test)


def test_batches_are_of_one_kind_and_within_their_bounds(loaded: Loaded) -> None:
    kinds = [
        SamplingParams(6, extra=BEAMS),
        SamplingParams(6, repetition_penalty=1.2),
        SamplingParams(5, repetition_penalty=1.2),
        SamplingParams(6, stop=("x",), repetition_penalty=1.2),
    ]
    # The first token of a prompt is its kind.
    jobs = [(kind, [10 + kind] * length) for length in range(1, 11) for kind in range(len(kinds))]

    async def test(lane: Watched) -> None:
        lane.may_start.clear()
        first = asyncio.create_task(tokens(lane, [99], kinds[1]))
        await until(lambda: bool(lane._running))
        rest = [asyncio.create_task(tokens(lane, prompt, kinds[kind])) for kind, prompt in jobs]
        await until(lambda: lane.in_flight == len(jobs) + 1 == len(lane._waiting) + 1)
        lane.may_start.set()
        await asyncio.gather(first, *rest)
        batches = lane.batches[1:]
        assert sorted(prompt for batch in batches for prompt in batch) == sorted(prompt for _, prompt in jobs)
        assert all(len({prompt[0] for prompt in batch}) == 1 for batch in batches)
        sizes = [(batch[0][0] - 10, len(batch), max(map(len, batch))) for batch in batches]
        assert max(size for kind, size, _ in sizes if kind == 0) == 2, "8 rows are 2 requests of 4 beams"
        assert max(size for kind, size, _ in sizes if kind == 1) > 2
        assert all(size <= 8 for _, size, _ in sizes)
        assert all(size * (longest + 6) <= 70 for kind, size, longest in sizes if kind == 1)

    run(loaded, test, max_batch_tokens=70)


def test_a_request_larger_than_a_batch_may_be_is_served_alone(loaded: Loaded) -> None:
    async def test(lane: Watched) -> None:
        params = SamplingParams(20, extra={"num_beams": 5})
        given = prompts(3, 40, seed=3)
        got = await asyncio.gather(*(tokens(lane, prompt, params) for prompt in given))
        assert got == [alone(loaded, prompt, 20, num_beams=5) for prompt in given]
        assert [len(batch) for batch in lane.batches] == [1, 1, 1]

    run(loaded, test, max_sequences=2, max_batch_tokens=10)


@pytest.mark.parametrize("extra", [{"repetition_penalty": 1.2}, BEAMS], ids=["penalty", "beams"])
def test_deltas_count_and_say_why_they_end(loaded: Loaded, extra: dict[str, Any]) -> None:
    async def whole(lane: Lane, prompt: list[int], params: SamplingParams) -> Any:
        (delta,) = [delta async for delta in lane.generate(prompt, params)]
        return delta

    async def test(lane: Watched) -> None:
        stopped = 0
        for prompt in prompts(5, 20, seed=4):
            delta = await whole(lane, prompt, asked(40, **extra))
            expected = alone(loaded, prompt, 40, **extra)
            assert delta.token_ids == tuple(expected)
            assert (delta.prompt_tokens, delta.completion_tokens) == (len(prompt), len(expected))
            assert delta.finish_reason == ("length" if len(expected) == 40 and expected[-1] != 0 else "stop")
            stop = delta.text[len(delta.text) // 2 :][:2]
            cut = await whole(lane, prompt, replace(asked(40, **extra), stop=(stop, "never there")))
            if extra is BEAMS:  # a stop string ends a beam, so another may win
                assert stop not in cut.text
            else:
                assert cut.text == delta.text[: delta.text.index(stop)]
                assert cut.completion_tokens < delta.completion_tokens
            stopped += cut.finish_reason == "stop"
        assert stopped >= 4

    run(loaded, test)


def test_a_stop_string_ends_generation_and_not_only_its_text(loaded: Loaded) -> None:
    steps: list[int] = []

    async def test(lane: Watched) -> None:
        before_each_step(lane, lambda: steps.append(1))
        params = SamplingParams(60, repetition_penalty=1.2)
        (whole,) = [delta async for delta in lane.generate([9, 8], params)]
        assert len(steps) == whole.completion_tokens
        steps.clear()
        stop = whole.text[3:6]
        stopping = SamplingParams(60, stop=(stop,), repetition_penalty=1.2)
        (cut,) = [delta async for delta in lane.generate([9, 8], stopping)]
        assert len(steps) == cut.completion_tokens < whole.completion_tokens

    run(loaded, test)


def test_a_stop_string_that_begins_in_the_prompt_is_none(loaded: Loaded) -> None:
    async def test(lane: Watched) -> None:
        params = SamplingParams(20, repetition_penalty=1.2)
        prompt = loaded.tokenizer("the red", add_special_tokens=False)["input_ids"]
        (whole,) = [delta async for delta in lane.generate(prompt, params)]
        spanning = "red" + whole.text[:2]
        assert spanning not in whole.text
        stopping = SamplingParams(20, stop=(spanning,), repetition_penalty=1.2)
        assert [delta async for delta in lane.generate(prompt, stopping)] == [whole]

    run(loaded, test)


def test_a_request_whose_client_left_is_not_generated_for(loaded: Loaded) -> None:
    params = SamplingParams(10, extra=BEAMS)

    async def test(lane: Watched) -> None:
        lane.may_start.clear()
        first = asyncio.create_task(tokens(lane, [99], params))
        await until(lambda: bool(lane._running))
        jobs = [asyncio.create_task(tokens(lane, [index], params)) for index in range(10, 20)]
        await until(lambda: len(lane._waiting) == 10)
        for job in jobs[::2]:
            job.cancel()
        await asyncio.gather(*jobs[::2], return_exceptions=True)
        assert lane.in_flight == 6
        lane.may_start.set()
        assert await asyncio.gather(*jobs[1::2]) == [alone(loaded, [i], 10, **BEAMS) for i in range(11, 20, 2)]
        await first
        assert sorted(prompt for batch in lane.batches for [prompt] in batch) == [*range(11, 20, 2), 99]

    run(loaded, test)


@pytest.mark.parametrize("extra", [{"repetition_penalty": 1.2}, BEAMS], ids=["penalty", "beams"])
def test_a_batch_that_nobody_waits_for_ends(loaded: Loaded, extra: dict[str, Any]) -> None:
    steps: list[int] = []
    go_on = threading.Event()

    async def test(lane: Watched) -> None:
        def step() -> None:
            steps.append(1)
            assert len(steps) <= 2 or go_on.wait(60)

        before_each_step(lane, step)
        never_ends = {**extra, "suppress_tokens": [0]}
        jobs = [asyncio.create_task(tokens(lane, [i], asked(100, **never_ends))) for i in (10, 11)]
        await until(lambda: len(steps) == 3)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        assert lane.in_flight == 0
        go_on.set()
        assert await tokens(lane, [7], asked(1, **extra)) == alone(loaded, [7], 1, **extra)
        assert len(steps) <= 5

    run(loaded, test)


def test_a_request_that_fails_fails_alone(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(12, repetition_penalty=1.3)
    poison = 333
    given = [[5, 6, poison], *prompts(6, 30, seed=5)]
    expected = [alone(loaded, prompt, 12, repetition_penalty=1.3) for prompt in given[1:]]
    assert not any(poison in answer for answer in expected)

    async def test(lane: Watched) -> None:
        forward = lane._model.forward

        def failing(*args: Any, **kwargs: Any) -> Any:
            if (kwargs["input_ids"] == poison).any():
                raise RuntimeError("bad token in my secret prompt")
            return forward(*args, **kwargs)

        lane._model.forward = failing
        got = await asyncio.gather(*(tokens(lane, prompt, params) for prompt in given), return_exceptions=True)
        assert isinstance(got[0], EngineFailed)
        assert got[1:] == expected
        assert lane.healthy

    run(loaded, test)
    assert "secret" not in caplog.text


def test_when_the_model_no_longer_runs_all_fail_and_the_lane_says_so(loaded: Loaded) -> None:
    params = SamplingParams(12, repetition_penalty=1.3)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("device error")

    async def test(lane: Watched) -> None:
        lane._model.forward = broken
        jobs = [tokens(lane, prompt, params) for prompt in prompts(20, 30)]
        got = await asyncio.gather(*jobs, return_exceptions=True)
        assert all(isinstance(result, EngineFailed) for result in got)
        await until(lambda: not lane.healthy)
        with pytest.raises(EngineFailed):
            await tokens(lane, [5], params)

    run(loaded, test)


def test_closing_fails_what_is_in_flight(loaded: Loaded) -> None:
    params = SamplingParams(100, repetition_penalty=1.2, extra={"suppress_tokens": [0]})

    async def test(lane: Watched) -> None:
        stepping = threading.Event()
        before_each_step(lane, stepping.set)
        jobs = [asyncio.create_task(tokens(lane, [10 + index], params)) for index in range(12)]
        await asyncio.to_thread(stepping.wait)
        lane.close()
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert all(isinstance(result, EngineFailed) for result in results)
        with pytest.raises(EngineFailed):
            await tokens(lane, [5], params)

    run(loaded, test)


def test_only_so_much_may_wait(loaded: Loaded) -> None:
    params = SamplingParams(4)

    async def test(lane: Watched) -> None:
        lane.may_start.clear()
        # 100 tokens fit at once, and 12 may wait: the first, and two of 6.
        first = asyncio.create_task(tokens(lane, [99] * 96, params))
        await until(lambda: bool(lane._running))
        jobs = [asyncio.create_task(tokens(lane, [index, 9], params)) for index in range(10, 15)]
        await until(lambda: sum(job.done() for job in jobs) == 3)
        lane.may_start.set()
        results = await asyncio.gather(first, *jobs, return_exceptions=True)
        assert [type(result) for result in results] == [list] * 3 + [Overloaded] * 3
        assert len(await tokens(lane, [5] * 100, params)) == 4, "alone, any is taken"

    run(loaded, test, max_batch_tokens=100, max_queued_tokens=12)


@pytest.mark.parametrize("extra", [{"bad_words_ids": "x"}, {"exponential_decay_length_penalty": "never"}])
def test_settings_that_generate_refuses_are_found_at_the_start(loaded: Loaded, extra: dict[str, Any]) -> None:
    lane = Lane(loaded.model, loaded.tokenizer, max_sequences=4, max_batch_tokens=100, max_queued_tokens=100)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        asyncio.run(lane.start([SamplingParams(1, extra=extra)]))
    assert not lane.healthy
    lane.close()


def test_the_engine_at_work_changes_nothing_and_the_weights_are_shared(loaded: Loaded) -> None:
    """Both threads run forward passes of one model at the same time."""
    given = prompts(8, 40, seed=7)
    params = SamplingParams(24, repetition_penalty=1.3)
    expected = [alone(loaded, prompt, 24, repetition_penalty=1.3) for prompt in given]
    greedy = [alone(loaded, prompt, 24) for prompt in given]

    async def test(lane: Watched) -> None:
        own = {parameter.data_ptr() for parameter in lane._model.parameters()}
        assert own == {parameter.data_ptr() for parameter in loaded.model.parameters()}
        engine = Engine(
            loaded.model,
            loaded.tokenizer,
            max_batch_tokens=64,
            cache_tokens=2048,
            max_batch_requests=8,
            max_queued_tokens=10**6,
        )
        await engine.start()
        try:
            for _ in range(3):
                jobs = [tokens(runner, prompt, ask) for prompt in given for runner, ask in both(lane, engine)]
                got = await asyncio.gather(*jobs)
                assert got[::2] == expected
                assert got[1::2] == greedy
        finally:
            engine.close()

    def both(lane: Lane, engine: Engine) -> list[tuple[Any, SamplingParams]]:
        return [(lane, params), (engine, SamplingParams(24))]

    run(loaded, test)
