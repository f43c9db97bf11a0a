"""A request on a real model: the messages that answer it, from the beginning or from where another replica stopped."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from heliostat.models import base
from heliostat.serving.calls import Accepted, Broken, Delta, Message, Refused, Resumed, TokenLogprob
from heliostat.serving.config import EndpointArgs
from heliostat.serving.generation import answer
from heliostat.serving.protocol import ChatCompletionRequest, CompletionRequest
from tests import tiny
from tests.service import Running, running

PROMPTS = ["hello", "the red cat goes to the house", "old", "the big dog goes to the river at 2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"), "gpt2")


@pytest.fixture(scope="module")
def tiny_model(weights: Path) -> base.InferenceModel:
    return base.load_for_inference(str(weights))


@pytest.fixture
def own(weights: Path) -> base.InferenceModel:
    """A model for one test alone, which may damage it."""
    return base.load_for_inference(str(weights))


@pytest.fixture(scope="module")
def service(tiny_model: base.InferenceModel) -> Iterator[Running]:
    with running(tiny_model) as found:
        yield found


class Answer:
    """The messages of an answer, put together."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = messages
        self.first = messages[0]
        self.deltas = [pair for message in messages if isinstance(message, list) for pair in message]

    @property
    def accepted(self) -> Accepted:
        assert isinstance(self.first, Accepted), self.first
        return self.first

    def of(self, index: int) -> list[Delta]:
        return [delta for number, delta in self.deltas if number == index]

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.of(index))

    def tokens(self, index: int = 0) -> list[int]:
        return [token for delta in self.of(index) for token in delta.token_ids]

    def logprobs(self, index: int = 0) -> list[TokenLogprob]:
        return [token for delta in self.of(index) for token in delta.logprobs]


def request_of(**body: Any) -> CompletionRequest | ChatCompletionRequest:
    kind = ChatCompletionRequest if "messages" in body else CompletionRequest
    return kind.model_validate({"model": "tiny", **body})


def ask(service: Running, resumed: Resumed | None = None, limit: int | None = None, **body: Any) -> Answer:
    async def work() -> list[Message]:
        messages = answer(service.served, request_of(**body), resumed or Resumed(), limit)
        return [message async for message in messages]

    return Answer(service.run(work()))


def refused(service: Running, **body: Any) -> Refused:
    (message,) = ask(service, **body).messages
    assert isinstance(message, Refused), message
    return message


def test_each_choice_has_its_own_last_delta(service: Running) -> None:
    found = ask(service, prompt=PROMPTS, n=2, max_tokens=5)
    assert (found.accepted.choices, found.accepted.echo, found.accepted.prompt_logprobs) == (8, (), ())
    ids = [service.served.prompts._encode(text) for text in PROMPTS]
    assert found.accepted.prompt_tokens == sum(map(len, ids))
    for index in range(8):
        *others, last = found.of(index)
        assert last.finish_reason in ("stop", "length")
        assert all(delta.finish_reason is None for delta in others)
        assert last.completion_tokens == len(found.tokens(index)) <= 5
        assert last.prompt_tokens == len(ids[index // 2])
        assert found.text(index) == found.text(index // 2 * 2), "greedy"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stop": "o'"},
        {"temperature": 1.2, "seed": 11},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.3},
        {"min_tokens": 12, "logit_bias": {"0": 5}},
        {"logprobs": 2},
        {"no_repeat_ngram_size": 2},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("cut", [1, 6, 15])
def test_an_answer_goes_on_where_another_replica_stopped(service: Running, settings: Any, cut: int) -> None:
    body = {"prompt": PROMPTS[1], "max_tokens": 16, **settings}
    whole = ask(service, **body)
    given = whole.tokens()[:cut]
    said = "".join(delta.text for delta in whole.of(0)[:cut])
    rest = ask(service, Resumed({0: given}), **body)
    assert rest.tokens() == whole.tokens()[cut:]
    assert rest.of(0)[-1].finish_reason == whole.of(0)[-1].finish_reason
    assert rest.of(0)[-1].completion_tokens == whole.of(0)[-1].completion_tokens
    assert rest.accepted.prompt_tokens == whole.accepted.prompt_tokens
    assert [token.token_id for token in rest.logprobs()] == ([*rest.tokens()] if "logprobs" in settings else [])
    if len(whole.of(0)) > 1:  # the lane gives a completion in one piece
        assert said + rest.text() == whole.text()


def test_choices_that_are_over_are_not_generated_again(service: Running) -> None:
    body: dict[str, Any] = {"prompt": PROMPTS[:2], "max_tokens": 8}
    whole = ask(service, **body)
    rest = ask(service, Resumed({0: whole.tokens(0), 1: whole.tokens(1)[:3]}, frozenset({0})), **body)
    assert rest.of(0) == []
    assert rest.tokens(1) == whole.tokens(1)[3:]
    done = ask(service, Resumed({0: whole.tokens(0), 1: whole.tokens(1)}, frozenset({0, 1})), **body)
    assert [type(message) for message in done.messages] == [Accepted]


def test_a_seed_gives_each_choice_its_own_and_the_same_again(service: Running) -> None:
    body: dict[str, Any] = {"prompt": PROMPTS[:2], "n": 3, "seed": 2**63 - 2, "temperature": 1.5, "max_tokens": 12}
    found = [ask(service, **body) for _ in range(2)]
    tokens = [[each.tokens(index) for index in range(6)] for each in found]
    assert tokens[0] == tokens[1]
    assert len({tuple(ids) for ids in tokens[0][:3]}) == 3
    second = ask(service, **{**body, "prompt": PROMPTS[0], "n": 1, "seed": 2**63 - 1})
    assert second.tokens() == tokens[0][1], "the second choice has the seed that follows"
    third = ask(service, **{**body, "prompt": PROMPTS[0], "n": 1, "seed": -(2**63)})
    assert third.tokens() == tokens[0][2], "which starts again at the smallest"


def test_the_beams_of_one_search_are_its_choices(service: Running, tiny_model: base.InferenceModel) -> None:
    found = ask(service, prompt=PROMPTS[:2], n=3, num_beams=4, max_tokens=8)
    for number, prompt in enumerate(PROMPTS[:2]):
        inputs = tiny_model.tokenizer(prompt, return_tensors="pt")
        expected = tiny_model.model.generate(
            **inputs, num_beams=4, num_return_sequences=3, max_new_tokens=8, do_sample=False
        )
        for index, row in enumerate(expected[:, inputs["input_ids"].shape[1] :].tolist()):
            tokens = found.tokens(number * 3 + index)
            assert tokens == row[: len(tokens)]
            assert set(row[len(tokens) :]) <= {tiny_model.tokenizer.pad_token_id}


def test_best_of_asks_for_the_probabilities_that_it_ranks_by(service: Running) -> None:
    found = ask(service, prompt="hello", best_of=3, temperature=1.5, seed=1, max_tokens=6)
    assert found.accepted.choices == 3
    assert all(len(found.logprobs(index)) == len(found.tokens(index)) for index in range(3))
    assert all(token.top == () for index in range(3) for token in found.logprobs(index))
    plain = ask(service, prompt="hello", best_of=3, n=3, temperature=1.5, seed=1, max_tokens=6)
    assert [plain.logprobs(index) for index in range(3)] == [[], [], []]
    assert [plain.tokens(index) for index in range(3)] == [found.tokens(index) for index in range(3)]


def test_best_of_beams_are_the_best_beams(service: Running) -> None:
    both = ask(service, prompt="hello", n=3, num_beams=3, max_tokens=6)
    best = ask(service, prompt="hello", n=1, best_of=3, num_beams=3, max_tokens=6)
    assert [best.tokens(index) for index in range(3)] == [both.tokens(index) for index in range(3)]


def test_best_of_what_has_no_probabilities_is_refused_by_its_name(service: Running) -> None:
    found = refused(service, prompt="hello", best_of=2, no_repeat_ngram_size=2)
    assert (found.status, found.param) == (400, "best_of")
    assert "no_repeat_ngram_size" in found.message


def test_an_echo_has_the_prompts_and_their_scores(service: Running, tiny_model: base.InferenceModel) -> None:
    found = ask(service, prompt=PROMPTS, echo=True, logprobs=2, max_tokens=3)
    assert found.accepted.echo == tuple(PROMPTS)
    for prompt, row in zip(PROMPTS, found.accepted.prompt_logprobs, strict=True):
        ids = tiny_model.tokenizer(prompt, return_tensors="pt")["input_ids"]
        scores = tiny_model.model(ids).logits[0].float().log_softmax(-1)
        assert [token.token_id for token in row] == ids[0].tolist()
        assert "".join(token.text for token in row) == prompt
        assert row[0].logprob is None
        assert row[0].top == ()
        for position, token in enumerate(row[1:]):
            assert token.logprob == pytest.approx(scores[position, token.token_id].item(), abs=1e-4)
            assert [each for each, _, _ in token.top] == scores[position].topk(2).indices.tolist()
    silent = ask(service, prompt=PROMPTS, echo=True, max_tokens=3)
    assert (silent.accepted.echo, silent.accepted.prompt_logprobs) == (tuple(PROMPTS), ())


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_request_for_no_token_gives_its_prompts_back(service: Running, logprobs: int | None) -> None:
    found = ask(service, prompt=PROMPTS[:2], n=2, echo=True, max_tokens=0, logprobs=logprobs)
    assert found.accepted.echo == tuple(PROMPTS[:2])
    assert len(found.accepted.prompt_logprobs) == (0 if logprobs is None else 2)
    assert [index for index, _ in found.deltas] == [0, 1, 2, 3]
    assert all(delta.finish_reason == "length" and not delta.completion_tokens for _, delta in found.deltas)


@pytest.mark.parametrize("prompt", [[10**30], [400_000], [5] * 300, ""], ids=["huge", "no token", "long", "empty"])
@pytest.mark.parametrize("changes", [{}, {"echo": True, "max_tokens": 0}, {"echo": True, "logprobs": 1}])
def test_prompts_that_cannot_be_read_are_refused_however_they_are_used(
    service: Running, prompt: Any, changes: Any
) -> None:
    found = refused(service, prompt=prompt, **changes)
    assert (found.status, found.param) == (400, "prompt")


def test_the_endpoints_own_limit_of_prompts(service: Running) -> None:
    assert ask(service, limit=3, prompt=[5, 6, 7], max_tokens=1).accepted.prompt_tokens == 3
    long = ask(service, limit=3, prompt=[[5], [5, 6, 7, 8]], max_tokens=1).first
    assert long == Refused(
        400,
        "Input tokens exceed the configured limit of 3 tokens: the prompt has 4",
        "prompt",
        "context_length_exceeded",
    )
    chat = ask(service, limit=3, messages=[{"role": "user", "content": "hello"}]).first
    assert isinstance(chat, Refused)
    assert (chat.param, chat.code) == ("messages", "context_length_exceeded")


def test_a_chat_that_is_too_long_is_refused_by_the_name_of_its_field(service: Running) -> None:
    found = refused(service, messages=[{"role": "user", "content": "x " * 120}])
    assert (found.status, found.param, found.code) == (400, "messages", "context_length_exceeded")


def test_settings_that_cannot_be_had_are_refused_by_their_name(service: Running) -> None:
    for body, param in (
        ({"max_tokens": 5000}, "max_tokens"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [999999]}, "stop_token_ids"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"n": 3, "num_beams": 2}, "n"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs"),
    ):
        found = refused(service, prompt="hello", **body)
        assert (found.status, found.param) == (400, param)


def test_one_wrong_prompt_of_many_means_that_none_is_begun(service: Running) -> None:
    found = refused(service, prompt=[*PROMPTS, ""], max_tokens=100)
    assert found.param == "prompt"


def test_without_a_chat_template_there_is_no_chat(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.served.prompts._tokenizer, "chat_template", None)
    found = refused(service, messages=[{"role": "user", "content": "hello"}])
    assert (found.status, found.param) == (400, "model")
    assert "/v1/completions" in found.message


def test_a_chat_without_a_limit_may_fill_the_context(service: Running) -> None:
    messages = [{"role": "user", "content": "hello"}]
    found = ask(service, messages=messages, min_tokens=100)
    room = service.served.max_length - found.accepted.prompt_tokens
    assert len(found.tokens()) <= room
    assert found.of(0)[-1].finish_reason == "stop" or len(found.tokens()) == room
    assert len(found.tokens()) >= 100


def test_closing_an_answer_early_frees_all_its_slots(service: Running) -> None:
    async def work(messages: AsyncGenerator[Message]) -> None:
        async with aclosing(messages):
            async for message in messages:
                if isinstance(message, list):
                    assert service.served.in_flight == 4
                    break

    body: dict[str, Any] = {"prompt": "hello", "n": 4, "max_tokens": 100, "min_tokens": 100}
    service.run(work(answer(service.served, request_of(**body), Resumed())))


def test_a_queue_that_is_full_refuses_and_says_when_to_come_back(own: base.InferenceModel) -> None:
    args = EndpointArgs(max_batch_tokens=64, cache_tokens=128, max_ongoing_requests=1, max_queued_tokens=130)
    with running(own, args) as small:

        async def work() -> None:
            def asked(**body: Any) -> AsyncGenerator[Message]:
                return answer(small.served, request_of(**body), Resumed())

            first, second = (asked(prompt="hello", max_tokens=100, min_tokens=100) for _ in "12")
            await anext(first)
            waits = asyncio.ensure_future(anext(second))
            while small.served.in_flight < 2:
                await asyncio.sleep(0)
            for body in ({"max_tokens": 100}, {"max_tokens": 60, "n": 2}):
                refusal = await anext(asked(prompt="hello", **body))
                assert isinstance(refusal, Refused)
                assert (refusal.status, refusal.code) == (503, "overloaded")
                assert (refusal.retry_after or 0) >= 1
            await first.aclose()
            assert isinstance(await waits, Accepted)
            await second.aclose()

        small.run(work())


def test_a_lane_that_is_down_breaks_the_answer(own: base.InferenceModel) -> None:
    with running(own) as broken:
        broken.served.lane.close()
        assert isinstance(ask(broken, prompt="hello", num_beams=2).first, Broken)
        assert isinstance(ask(broken, prompt=PROMPTS, echo=True, logprobs=1).first, Broken)
        assert ask(broken, prompt="hello").accepted, "the engine is not"


def test_a_failing_model_breaks_the_answer_after_what_was_given_out(
    own: base.InferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = own.model.forward
    left = iter(range(5))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise RuntimeError("device error")
        return forward(*args, **kwargs)

    with running(own) as service:
        monkeypatch.setattr(own.model, "forward", failing)
        found = ask(service, prompt="hello", max_tokens=40, min_tokens=40)
        assert found.accepted
        assert isinstance(found.messages[-1], Broken)
        assert len(found.tokens()) == 5
        monkeypatch.setattr(own.model, "forward", forward)
