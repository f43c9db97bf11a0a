"""The OpenAI wire forms of answers: whole, or as the chunks of a stream. Knows nothing of engines or HTTP.

Forms: https://platform.openai.com/docs/api-reference (completions, chat, models, streaming).
"""

import time
import uuid
from typing import Any


class Usage:
    """Tokens of one request: each prompt counts once, each completion as far as it was generated."""

    def __init__(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens

    def body(self) -> dict[str, int]:
        """The `usage` object."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class CompletionWire:
    """The answers of /v1/completions: whole, or as the chunks of a stream."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._common = {"id": self.id, "created": int(time.time()), "model": model}

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A finished choice."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def first_pieces(self, count: int) -> list[dict[str, Any]]:
        """The pieces that open a stream of `count` choices."""
        return []

    def piece(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """What a chunk of the stream adds to a choice."""
        return self.choice(index, text, finish_reason)

    def answer(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The whole answer."""
        return {**self._common, "object": self.whole, "choices": choices, "usage": usage.body()}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of the stream."""
        return {**self._common, "object": self.part, "choices": choices}


class ChatWire(CompletionWire):
    """The answers of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def first_pieces(self, count: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""}, None) for index in range(count)]

    def piece(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return self._delta(index, {"content": text} if text else {}, finish_reason)

    def _delta(self, index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def model_card(model_id: str, created: int) -> dict[str, Any]:
    """A model of /v1/models."""
    return {"id": model_id, "object": "model", "created": created, "owned_by": "heliostat"}
