"""The OpenAI wire forms of answers: whole, or as the chunks of a stream. Knows nothing of engines or HTTP.

Forms: https://platform.openai.com/docs/api-reference (completions, chat, models, streaming).
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from heliostat.serving.calls import Delta, TokenLogprob

Tokens = Sequence[TokenLogprob]
PARTIAL = "\ufffd"
"""What stands for bytes that are no character by themselves."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request: each prompt counts once, each completion as far as it was generated."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        """The `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass
class Choice:
    """One choice as its deltas put it together."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities, where they are asked for."""
    completion_tokens: int = 0
    finish_reason: str | None = None
    probabilities: tuple[float, ...] = ()
    """A classifier's."""

    def add(self, delta: Delta) -> None:
        """Append what a step added."""
        self.text += delta.text
        self.tokens += delta.logprobs
        self.completion_tokens = delta.completion_tokens
        self.finish_reason = delta.finish_reason
        self.probabilities = delta.probabilities

    @property
    def mean_logprob(self) -> float:
        """Of its tokens: what `best_of` ranks by."""
        known = [token.logprob for token in self.tokens if token.logprob is not None]
        return sum(known) / len(known) if known else 0.0


class CompletionWire:
    """The answers of /v1/completions: whole, or as the chunks of a stream."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, *, logprobs: bool = False) -> None:
        """`logprobs`: whether the request asked for them; else they are null in the answer."""
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._common = {"id": self.id, "created": int(time.time()), "model": model}
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A finished choice."""
        return self._text(index, choice.text, choice.tokens, choice.finish_reason)

    def first_pieces(self, echo: Sequence[str], prompts: Sequence[Tokens], per_prompt: int) -> list[dict[str, Any]]:
        """The pieces that open a stream: each prompt, for each of its choices, where it is asked back."""
        pieces = []
        for number, text in enumerate(echo):
            tokens = prompts[number] if prompts else ()
            for index in range(number * per_prompt, (number + 1) * per_prompt):
                pieces.append(self._text(index, text, tokens, None))
        return pieces

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """What a chunk of the stream adds to a choice."""
        return self._text(index, delta.text, delta.logprobs, delta.finish_reason)

    def answer(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The whole answer."""
        return {**self._common, "object": self.whole, "choices": choices, "usage": usage.body()}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of the stream."""
        return {**self._common, "object": self.part, "choices": choices}

    def _text(self, index: int, text: str, tokens: Tokens, finish_reason: str | None) -> dict[str, Any]:
        logprobs = self._token_lists(index, tokens) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _token_lists(self, index: int, tokens: Tokens) -> dict[str, Any]:
        offset = self._offsets.get(index, 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        self._offsets[index] = offset
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.logprob is None else _by_text(token) for token in tokens],
            "text_offset": offsets,
        }


class ChatWire(CompletionWire):
    """The answers of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._content(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def first_pieces(self, echo: Sequence[str], prompts: Sequence[Tokens], per_prompt: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""}, (), None) for index in range(per_prompt)]

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        return self._delta(index, {"content": delta.text} if delta.text else {}, delta.logprobs, delta.finish_reason)

    def _delta(self, index: int, delta: dict[str, str], tokens: Tokens, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": self._content(tokens), "finish_reason": finish_reason}

    def _content(self, tokens: Tokens) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {
                **_token(token.text, token.logprob),
                "top_logprobs": [_token(text, logprob) for _, text, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class ClassificationWire(CompletionWire):
    """The answers of /classify, in vLLM's form; they are never streamed."""

    prefix, whole = "classify", "list"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        probabilities = list(choice.probabilities)
        return {"index": index, "label": choice.text, "probs": probabilities, "num_classes": len(probabilities)}

    def answer(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {**self._common, "object": self.whole, "data": choices, "usage": usage.body()}


def _by_text(token: TokenLogprob) -> dict[str, float | None]:
    """The likeliest tokens and the one that was picked. Of several with the same text, the likeliest counts."""
    found: dict[str, float | None] = {}
    for text, logprob in (*((text, logprob) for _, text, logprob in token.top), (token.text, token.logprob)):
        found.setdefault(text, logprob)
    return found


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    """The bytes are null where the token is no text by itself, but a part of a character."""
    return {"token": text, "logprob": logprob, "bytes": None if PARTIAL in text else list(text.encode())}
