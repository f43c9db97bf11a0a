"""LiteLLM against the endpoint (the extra `heliostat[clients]`)."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.clients.conftest import MAX_LENGTH, Generated, Served

litellm = pytest.importorskip("litellm", reason="needs the extra: pip install heliostat[clients]")

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
LONG = [{"role": "user", "content": "the big cat " * MAX_LENGTH}]
# What LiteLLM calls servers like this one: OpenAI's own, one that speaks as OpenAI does, and vLLM's.
PROVIDERS = ["openai", "hosted_vllm"]
Ask = Callable[..., Any]


@pytest.fixture(params=PROVIDERS)
def chat(endpoint: Served, request: pytest.FixtureRequest) -> Ask:
    """Calls `litellm.completion`, which is a chat."""

    def ask(**changes: Any) -> Any:
        common = {"api_base": endpoint.base_url, "api_key": endpoint.api_key, "num_retries": 0, "max_retries": 0}
        values = {"model": f"{request.param}/{endpoint.model}", "messages": MESSAGES, "temperature": 0, **changes}
        return litellm.completion(**common, **values)

    return ask


@pytest.fixture
def complete(endpoint: Served) -> Ask:
    """Calls `litellm.text_completion`."""

    def ask(**changes: Any) -> Any:
        common = {"api_base": endpoint.base_url, "api_key": endpoint.api_key, "num_retries": 0, "max_retries": 0}
        values = {"model": f"text-completion-openai/{endpoint.model}", "temperature": 0, "max_tokens": 20, **changes}
        return litellm.text_completion(**common, **values)

    return ask


def test_models_are_listed(endpoint: Served) -> None:
    params = litellm.types.router.LiteLLM_Params(
        model=f"openai/{endpoint.model}", api_base=endpoint.base_url.removesuffix("/v1"), api_key=endpoint.api_key
    )
    listed = litellm.get_valid_models(check_provider_endpoint=True, custom_llm_provider="openai", litellm_params=params)
    assert f"openai/{endpoint.model}" in listed or endpoint.model in listed


def test_a_chat_with_its_usage(chat: Ask, chat_ids: Callable[[Any], list[int]], generated: Generated) -> None:
    ids = chat_ids(MESSAGES)
    answer = chat(max_tokens=20)
    assert answer.choices[0].message.content.rstrip("\ufffd") == generated(ids, 20).rstrip("\ufffd")
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)


def test_a_completion_with_its_usage(complete: Ask, loaded: Any, generated: Generated) -> None:
    ids = loaded.tokenizer("the big cat")["input_ids"]
    for prompt in ("the big cat", ids):
        answer = complete(prompt=prompt)
        assert answer.choices[0].text.rstrip("\ufffd") == generated(ids, 20).rstrip("\ufffd")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
    chunks = list(complete(prompt="the big cat", stream=True))
    assert "".join(chunk.choices[0].text or "" for chunk in chunks if chunk.choices) == answer.choices[0].text


def test_a_stream_with_its_usage(chat: Ask) -> None:
    whole = chat(max_tokens=20)
    chunks = list(chat(max_tokens=20, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    usages = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert len(usages) == 1
    found, wanted = usages[0], whole.usage
    assert (found.prompt_tokens, found.completion_tokens) == (wanted.prompt_tokens, wanted.completion_tokens)


def test_stop_n_and_seed(chat: Ask) -> None:
    text = chat(max_tokens=40).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    cut = chat(max_tokens=40, stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(stop)], "stop")
    several = chat(max_tokens=12, temperature=1, n=3)
    assert len({choice.message.content for choice in several.choices}) == 3
    seeded = [chat(max_tokens=24, temperature=1, seed=7).choices[0].message.content for _ in "12"]
    assert seeded[0] == seeded[1]
    assert seeded[0] != chat(max_tokens=24, temperature=1, seed=8).choices[0].message.content


def test_error_classes(chat: Ask, endpoint: Served) -> None:
    with pytest.raises(litellm.NotFoundError):
        chat(model="openai/other")
    with pytest.raises(litellm.BadRequestError) as refused:
        chat(temperature=3)
    assert not isinstance(refused.value, litellm.ContextWindowExceededError)
    with pytest.raises(litellm.ContextWindowExceededError):
        chat(max_tokens=MAX_LENGTH * 2)
    with pytest.raises(litellm.ContextWindowExceededError):
        chat(messages=LONG, max_tokens=1)
