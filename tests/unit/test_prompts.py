"""Prompts become the ids that training saw, and texts again."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from heliostat.serving.prompts import PromptEncoder
from heliostat.serving.sampling import InvalidRequest
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def run(tokenizer: Any, test: Callable[[PromptEncoder], Awaitable[None]]) -> None:
    encoder = PromptEncoder(tokenizer, max_length=64)
    try:
        asyncio.run(test(encoder))  # type: ignore[arg-type]
    finally:
        encoder.close()


def test_texts_come_back_as_they_were(tokenizer: Any) -> None:
    async def test(encoder: PromptEncoder) -> None:
        for text in ("the red cat", " leading space", "naïve 日本語\n\n", "<|endoftext|> is text"):
            assert encoder.decode(await encoder.text(text)) == text

    run(tokenizer, test)


def test_special_tokens_are_decoded_by_their_names(tokenizer: Any) -> None:
    async def test(encoder: PromptEncoder) -> None:
        assert encoder.decode([tokenizer.eos_token_id]) == "<|endoftext|>"
        text = encoder.decode(await encoder.chat([{"role": "user", "content": "hello"}]))
        assert "<|im_start|>user\nhello<|im_end|>" in text

    run(tokenizer, test)


def test_prompts_are_encoded_and_decoded_at_once_without_harm(tokenizer: Any) -> None:
    async def test(encoder: PromptEncoder) -> None:
        texts = [f"the red cat {number} goes" for number in range(200)]
        jobs = [asyncio.create_task(encoder.text(text)) for text in texts]
        for _ in range(200):
            encoder.decode([40, 41, 42])
            await asyncio.sleep(0)
        assert [encoder.decode(ids) for ids in await asyncio.gather(*jobs)] == texts

    run(tokenizer, test)


def test_a_text_longer_than_any_the_model_takes_is_refused_unread(tokenizer: Any) -> None:
    async def test(encoder: PromptEncoder) -> None:
        with pytest.raises(InvalidRequest, match="longer") as caught:
            await encoder.text("x" * 10**6)
        assert caught.value.code == "context_length_exceeded"

    run(tokenizer, test)
