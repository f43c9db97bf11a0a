"""LangChain's OpenAI models against the endpoint (the extra `heliostat[clients]`)."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.clients.conftest import MAX_LENGTH, Generated, Served

langchain_openai = pytest.importorskip("langchain_openai", reason="needs the extra: pip install heliostat[clients]")

MESSAGES: Any = [("system", "be brief"), ("user", "hello")]
AS_DICTS = [{"role": role, "content": content} for role, content in MESSAGES]
Chat = Callable[..., Any]


@pytest.fixture
def chat(endpoint: Served) -> Chat:
    """Makes a ChatOpenAI."""

    def make(**settings: Any) -> Any:
        common = {"base_url": endpoint.base_url, "api_key": endpoint.api_key, "max_retries": 0}
        return langchain_openai.ChatOpenAI(**common, **({"model": endpoint.model, "temperature": 0} | settings))

    return make


def test_models_are_listed(chat: Chat, endpoint: Served) -> None:
    assert endpoint.model in [model.id for model in chat().root_client.models.list()]


def test_invoke_with_its_usage(chat: Chat, chat_ids: Callable[[Any], list[int]], generated: Generated) -> None:
    ids = chat_ids(AS_DICTS)
    answer = chat(max_tokens=20).invoke(MESSAGES)
    assert answer.content.rstrip("\ufffd") == generated(ids, 20).rstrip("\ufffd")
    assert answer.response_metadata["finish_reason"] == "length"
    usage = answer.usage_metadata
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (len(ids), 20, len(ids) + 20)


def test_a_conversation_goes_on_with_the_answer_sent_back(chat: Chat) -> None:
    model = chat(max_tokens=8)
    answer = model.invoke(MESSAGES)
    assert model.invoke([*MESSAGES, answer, ("user", "and then?")]).usage_metadata["output_tokens"] == 8


def test_stream_with_its_usage(chat: Chat) -> None:
    model = chat(max_tokens=20, stream_usage=True)
    answer, chunks = model.invoke(MESSAGES), list(model.stream(MESSAGES))
    assert len(chunks) > 3
    assert "".join(chunk.content for chunk in chunks) == answer.content
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert len(usages) == 1
    assert usages[0] | {} == answer.usage_metadata | {}
    # Without usage asked for, there is none, and no error either.
    assert not any(chunk.usage_metadata for chunk in chat(max_tokens=3, stream_usage=False).stream(MESSAGES))


def test_batch_and_async_answer_as_invoke_does(chat: Chat) -> None:
    model = chat(max_tokens=12)
    prompts = [f"hello {number}" for number in range(6)]
    expected = [model.invoke(prompt).content for prompt in prompts]
    assert [answer.content for answer in model.batch(prompts)] == expected
    answers = asyncio.run(_asked(model, prompts))
    assert [answer.content for answer in answers] == expected


async def _asked(model: Any, prompts: list[str]) -> list[Any]:
    return list(await asyncio.gather(*map(model.ainvoke, prompts)))


def test_stop(chat: Chat) -> None:
    text = chat(max_tokens=40).invoke(MESSAGES).content
    stop = text[len(text) // 2 :][:3]
    cut = chat(max_tokens=40).invoke(MESSAGES, stop=[stop])
    assert cut.content == text[: text.index(stop)]
    assert cut.response_metadata["finish_reason"] == "stop"
    assert chat(max_tokens=40, stop_sequences=[stop]).invoke(MESSAGES).content == cut.content


def test_n_and_seed(chat: Chat) -> None:
    hello = pytest.importorskip("langchain_core.messages").HumanMessage("hello")
    several = chat(max_tokens=12, temperature=1, n=3).generate([[hello]])
    assert len({generation.text for generation in several.generations[0]}) == 3
    seeded = [chat(max_tokens=24, temperature=1, seed=7).invoke(MESSAGES).content for _ in "12"]
    assert seeded[0] == seeded[1]
    assert seeded[0] != chat(max_tokens=24, temperature=1, seed=8).invoke(MESSAGES).content


def test_logprobs(chat: Chat) -> None:
    answer = chat(max_tokens=5, logprobs=True, top_logprobs=2).invoke(MESSAGES)
    content = answer.response_metadata["logprobs"]["content"]
    assert len(content) == 5
    assert all(len(token["top_logprobs"]) == 2 for token in content)


def test_extensions_pass_through_extra_body(chat: Chat) -> None:
    greedy = chat(max_tokens=20).invoke(MESSAGES).content
    assert chat(max_tokens=20, temperature=2, extra_body={"top_k": 1}).invoke(MESSAGES).content == greedy


def test_completions(endpoint: Served, loaded: Any, generated: Generated) -> None:
    settings = {"model": endpoint.model, "base_url": endpoint.base_url, "api_key": endpoint.api_key}
    model = langchain_openai.OpenAI(**settings, temperature=0, max_tokens=20, max_retries=0)
    text = model.invoke("the big cat")
    assert text.rstrip("\ufffd") == generated(loaded.tokenizer("the big cat")["input_ids"], 20).rstrip("\ufffd")
    assert "".join(model.stream("the big cat")) == text
    assert model.batch(["the big cat", "the old dog"])[0] == text


def test_error_classes(chat: Chat) -> None:
    overflow = pytest.importorskip("langchain_core.exceptions").ContextOverflowError
    with pytest.raises(openai.NotFoundError):
        chat(model="other").invoke(MESSAGES)
    with pytest.raises(openai.BadRequestError):
        chat(temperature=3).invoke(MESSAGES)
    with pytest.raises(overflow):
        chat(max_tokens=MAX_LENGTH * 2).invoke(MESSAGES)
    with pytest.raises(overflow):
        chat(max_tokens=1).invoke("the big cat " * MAX_LENGTH)
