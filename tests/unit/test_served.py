"""Whatever is asked of a model goes to the thread that can do it, and comes back the same way."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from heliostat.errors import ModelError
from heliostat.models import base
from heliostat.serving.calls import Delta
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import EngineFailed
from heliostat.serving.sampling import InvalidRequest, SamplingParams
from heliostat.serving.served import ServedModel
from tests import tiny

Loaded = base.InferenceModel
SMALL = EndpointArgs(max_batch_tokens=48, cache_tokens=1024, max_ongoing_requests=8, max_queued_tokens=512)


@pytest.fixture(scope="module", params=list(tiny.KEYS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return base.load_for_inference(str(tiny.write_model(tmp_path_factory.mktemp("model"), request.param)))


def serve(loaded: Loaded, test: Callable[[ServedModel], Awaitable[None]]) -> None:
    async def body() -> None:
        served = await ServedModel.start(loaded, "tiny", SMALL)
        try:
            await test(served)
            assert served.in_flight == 0
        finally:
            served.close()
        assert not served.healthy

    asyncio.run(body())


async def completions(served: ServedModel, prompt: list[int], params: SamplingParams) -> list[list[Delta]]:
    found: list[list[Delta]] = [[] for _ in range(params.sequences)]
    async for number, delta in served.generate(prompt, params):
        found[number].append(delta)
    return found


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def generate(loaded: Loaded, prompt: list[int], **settings: Any) -> list[list[int]]:
    """What the model's own `generate` gives, each up to its end token."""
    ids = torch.tensor([prompt])
    config = GenerationConfig(max_new_tokens=20, **settings)
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    rows = [row[len(prompt) :].tolist() for row in output]
    return [row[: row.index(0) + 1] if 0 in row else row for row in rows]


def test_any_request_may_ask_for_what_only_generate_can_do(loaded: Loaded) -> None:
    prompt = [9, 8, 7, 30]
    beams = generate(loaded, prompt, num_beams=4, num_return_sequences=3)
    ngrams = generate(loaded, prompt, no_repeat_ngram_size=1)
    plain = generate(loaded, prompt)

    async def test(served: ServedModel) -> None:
        ask = served.defaults.params
        several = await completions(served, prompt, ask(20, num_beams=4, sequences=3))
        assert [tokens(deltas) for deltas in several] == beams
        assert all(deltas[-1].finish_reason for deltas in several)
        (best,) = await completions(served, prompt, ask(20, num_beams=4))
        assert tokens(best) == beams[0]
        (other,) = await completions(served, prompt, ask(20, no_repeat_ngram_size=1))
        assert tokens(other) == ngrams[0]
        (streamed,) = await completions(served, prompt, ask(20))
        assert tokens(streamed) == plain[0]
        assert len(streamed) > 1, "what the engine can do comes token by token"

    serve(loaded, test)


def test_both_go_on_behind_what_was_given_out(loaded: Loaded) -> None:
    prompt = [9, 8, 7, 30]

    async def test(served: ServedModel) -> None:
        for settings in ({}, {"no_repeat_ngram_size": 2}):
            params = served.defaults.params(20, **settings)
            (whole,) = await completions(served, prompt, params)
            given = tokens(whole)
            for cut in (0, 1, 7, len(given)):
                rest = [delta async for _, delta in served.generate(prompt, params, given[:cut])]
                assert tokens(rest) == given[cut:]
                assert rest[-1].completion_tokens == len(given)
                assert rest[-1].finish_reason == whole[-1].finish_reason

    serve(loaded, test)


def test_a_seed_gives_the_same_beams_whatever_else_is_going_on(loaded: Loaded) -> None:
    async def test(served: ServedModel) -> None:
        def ask(seed: int | None) -> Awaitable[list[list[Delta]]]:
            params = served.defaults.params(20, temperature=1.5, num_beams=2, seed=seed)
            return completions(served, [9, 8, 7], params)

        (alone,) = await ask(5)
        first, _, second, other, again = await asyncio.gather(ask(5), ask(None), ask(6), ask(None), ask(5))
        assert tokens(first[0]) == tokens(again[0]) == tokens(alone)
        assert tokens(second[0]) != tokens(alone) or tokens(other[0]) != tokens(alone)

    serve(loaded, test)


def test_scores_of_a_prompt_have_texts(loaded: Loaded) -> None:
    prompt = loaded.tokenizer("the red cat", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        expected = loaded.model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)

    async def test(served: ServedModel) -> None:
        first, *rest = await served.score(prompt, 2)
        assert first is None
        assert "".join(token.text for token in rest if token) == served.prompts.decode(prompt[1:])
        for position, token in enumerate(rest, 1):
            assert token is not None
            assert token.logprob == pytest.approx(expected[position - 1, prompt[position]].item(), abs=1e-4)
            assert [text for _, text, _ in token.top] == [
                loaded.tokenizer.decode([best]) for best in expected[position - 1].topk(2).indices
            ]
        scores = await asyncio.gather(*(served.score(prompt[:length], 2) for length in (1, 2, 3, 3, 2)))
        assert [len(found) for found in scores] == [1, 2, 3, 3, 2]
        whole = [5] * served.max_length
        assert len(await served.score(whole, 0)) == served.max_length
        for wrong in ([], [10**6], [*whole, 5]):
            with pytest.raises(InvalidRequest):
                await served.score(wrong, 0)

    serve(loaded, test)


def test_more_beams_than_there_is_memory_for_are_refused_unless_the_bundle_wants_them(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(served: ServedModel) -> None:
        with pytest.raises(InvalidRequest, match="over the limit of 1024 tokens") as caught:
            served.check([5] * 28, served.defaults.params(100, num_beams=10))
        assert caught.value.param == "num_beams"
        served.check([5] * 28, served.defaults.params(100, num_beams=8))

    async def taken(served: ServedModel) -> None:
        served.check([5] * 28, served.defaults.params(100))

    serve(loaded, refused)
    tuned = GenerationConfig(num_beams=10, eos_token_id=0, pad_token_id=1, bos_token_id=0)
    monkeypatch.setattr(loaded.model, "generation_config", tuned)
    serve(loaded, taken)


def test_the_state_counts_both(loaded: Loaded) -> None:
    async def test(served: ServedModel) -> None:
        assert (served.state().running, served.state().waiting) == (0, 0)
        slow = served.defaults.params(100, num_beams=4, logit_bias={0: -100})
        jobs = [asyncio.create_task(completions(served, [9], slow)) for _ in range(3)]
        jobs += [asyncio.create_task(completions(served, [9], SamplingParams(3)))]
        await asyncio.sleep(0)
        state = served.state()
        assert state.running + state.waiting == served.in_flight == 4
        await asyncio.gather(*jobs)
        assert (served.state().running, served.state().waiting) == (0, 0)

    serve(loaded, test)


def test_without_the_lane_the_model_is_not_healthy(loaded: Loaded) -> None:
    async def test(served: ServedModel) -> None:
        assert served.healthy
        served.lane.close()
        assert not served.healthy
        with pytest.raises(EngineFailed):
            await completions(served, [9], served.defaults.params(5, num_beams=2))

    serve(loaded, test)


def test_a_bundle_that_cannot_be_decoded_leaves_nothing_running(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = GenerationConfig(eos_token_id=0, pad_token_id=1, bad_words_ids="x")
    monkeypatch.setattr(loaded.model, "generation_config", wrong)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        serve(loaded, lambda _: asyncio.sleep(0))
