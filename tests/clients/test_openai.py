"""OpenAI's own client against the endpoint."""

from collections.abc import Callable
from typing import Any

import openai
import pytest

from heliostat.models import base
from tests.clients.conftest import MAX_LENGTH, Generated, Served

MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
ChatIds = Callable[[Any], list[int]]


@pytest.fixture(scope="module")
def client(endpoint: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0)


def whole(text: str) -> str:
    """Without half a character at the end, which `decode` shows as a replacement and the endpoint holds back."""
    return text.rstrip("\ufffd")


def test_models_are_listed(client: openai.OpenAI, endpoint: Served) -> None:
    assert endpoint.model in [model.id for model in client.models.list().data]
    assert client.models.retrieve(endpoint.model).object == "model"


def test_a_completion_is_what_generate_gives(
    client: openai.OpenAI, endpoint: Served, loaded: base.InferenceModel, generated: Generated
) -> None:
    ids = loaded.tokenizer("the big cat")["input_ids"]
    for prompt in ("the big cat", ids):
        answer = client.completions.create(model=endpoint.model, prompt=prompt, max_tokens=20, temperature=0)
        assert whole(answer.choices[0].text) == whole(generated(ids, 20))
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
        assert answer.usage.total_tokens == len(ids) + 20


def test_a_chat_is_what_generate_gives(
    client: openai.OpenAI, endpoint: Served, chat_ids: ChatIds, generated: Generated
) -> None:
    ids = chat_ids(MESSAGES)
    answer = client.chat.completions.create(model=endpoint.model, messages=MESSAGES, max_tokens=20, temperature=0)
    assert whole(answer.choices[0].message.content or "") == whole(generated(ids, 20))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)


def test_streams_say_the_same_with_the_same_usage(client: openai.OpenAI, endpoint: Served) -> None:
    options: Any = {"model": endpoint.model, "max_tokens": 20, "temperature": 0}
    stream: Any = {"stream": True, "stream_options": {"include_usage": True}}
    answer = client.completions.create(prompt="the old dog", **options)
    *chunks, last = client.completions.create(prompt="the old dog", **options, **stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert (last.choices, last.usage) == ([], answer.usage)
    chat = client.chat.completions.create(messages=MESSAGES, **options)
    *pieces, end = client.chat.completions.create(messages=MESSAGES, **options, **stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == chat.choices[0].message.content
    assert (end.choices, end.usage) == ([], chat.usage)
    assert pieces[-1].choices[0].finish_reason == "length"


def test_stop_strings_end_the_answer(client: openai.OpenAI, endpoint: Served) -> None:
    options: Any = {"model": endpoint.model, "prompt": "the big cat", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[len(text) // 2 :][:3]
    cut = client.completions.create(**options, stop=["never there", stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    chunks = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_n_gives_different_samples_and_counts_them_all(client: openai.OpenAI, endpoint: Served, stream: bool) -> None:
    options: Any = {"model": endpoint.model, "messages": MESSAGES, "max_tokens": 12, "temperature": 1, "n": 3}
    if stream:
        *chunks, last = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        texts = ["", "", ""]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        usage = last.usage
    else:
        answer = client.chat.completions.create(**options)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        texts = [choice.message.content or "" for choice in answer.choices]
        usage = answer.usage
    assert len(set(texts)) == 3
    assert usage is not None
    assert usage.completion_tokens == 36


def test_a_seed_repeats_what_was_sampled(client: openai.OpenAI, endpoint: Served) -> None:
    options: Any = {"model": endpoint.model, "max_tokens": 24, "temperature": 1}

    def texts(seed: int | None, n: int = 1) -> list[str]:
        answer = client.completions.create(prompt="the red man", seed=seed, n=n, **options)
        return [choice.text for choice in answer.choices]

    assert texts(7) == texts(7)
    assert texts(7) != texts(8)
    assert texts(7, n=2) == texts(7, n=2)
    assert len(set(texts(7, n=2))) == 2, "the choices of one seed differ"
    chat = [
        client.chat.completions.create(messages=MESSAGES, seed=7, **options).choices[0].message.content for _ in "12"
    ]
    assert chat[0] == chat[1]


def test_logprobs_come_with_their_tokens(client: openai.OpenAI, endpoint: Served) -> None:
    answer = client.completions.create(model=endpoint.model, prompt="the", max_tokens=5, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
    for own, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert own == max(top.values()), "greedy decoding takes the likeliest"
    chat = client.chat.completions.create(
        model=endpoint.model, messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content: Any = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert [len(token.top_logprobs) for token in content] == [3] * 5
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)


def test_an_echo_is_the_prompt_and_its_probabilities(
    client: openai.OpenAI, endpoint: Served, loaded: base.InferenceModel
) -> None:
    import torch

    ids = loaded.tokenizer("the big cat goes to")["input_ids"]
    answer = client.completions.create(model=endpoint.model, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == "the big cat goes to"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    first: Any = logprobs.token_logprobs[0]
    assert first is None
    with torch.no_grad():
        rows = torch.log_softmax(loaded.model(torch.tensor([ids])).logits[0], dim=-1)
    expected = [float(rows[place, token]) for place, token in enumerate(ids[1:])]
    assert logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_error_classes(client: openai.OpenAI, endpoint: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="hello")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=endpoint.model, messages=MESSAGES, temperature=3)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model=endpoint.model, prompt="hello", extra_body={"chat_template": "x"})
    assert unknown.value.code == "unknown_parameter"
    for prompt, limit in (("hello", MAX_LENGTH * 2), ([5] * (MAX_LENGTH + 1), 1)):
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model=endpoint.model, prompt=prompt, max_tokens=limit)
        assert long.value.code == "context_length_exceeded"
