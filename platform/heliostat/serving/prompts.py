"""Texts and chats to token ids, as training saw them. Knows tokenizers, not models or HTTP."""

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2

from heliostat.data.tokens import leading_bos, text_ids
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.serving.sampling import InvalidRequest


class PromptEncoder:
    """Encodes prompts in a thread of its own, so that a long one holds up no other request.

    One thread and an own copy of the tokenizer, because encoding changes settings inside it.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, prefix: PromptPrefix | None = None, *, whole: bool = False
    ) -> None:
        """`prefix` comes before every prompt (see `text` and `chat`).

        `whole`: prompts are whole texts, which an encoder reads, with all special tokens that the tokenizer gives them.

        `max_length`: prompts that must have more tokens are refused before any work is done on them.
        """
        self._prefix = prefix or PromptPrefix()
        self._tokenizer = copy.deepcopy(tokenizer)
        self._decoder = tokenizer
        self._whole = whole
        self._leading = [] if whole else leading_bos(tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._max_characters = max_length * max(len(token) for token in tokenizer.get_vocab())

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can chat at all."""
        return self._tokenizer.chat_template is not None

    async def text(self, text: str) -> list[int]:
        """The ids of a plain text, after the token that the tokenizer begins every text with, if any, and the prefix.

        Names of special tokens inside the text are text, as they are in training.

        Raises:
            InvalidRequest: the text is longer than any the model takes.
        """
        whole = self._prefix.text() + text
        self._check_length([whole], "prompt")
        return self._leading + await self._run(lambda: self._encode(whole))

    async def whole(self, text: str) -> list[int]:
        """The ids of a text for a classifier, with whatever special tokens the tokenizer puts around it.

        Raises:
            InvalidRequest: see `text`.
        """
        self._check_length([text], "input")
        return await self._run(lambda: text_ids(self._tokenizer, [text])[0])

    async def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, rendered by the model's chat template, up to where the answer begins.

        The prefix's system prompt comes before conversations without one of their own; its worked examples only before
        a first question, because a longer conversation is its own example.

        Control tokens count only where the template itself writes them: inside messages their names are text.

        Raises:
            InvalidRequest: the template refuses the conversation, or it is longer than any the model takes.
        """
        whole = self._prefix.messages(messages)
        self._check_length([message["content"] for message in whole], "messages")
        try:
            return await self._run(lambda: self._render(whole))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            # The template's own message may quote the conversation.
            roles = ", ".join(message["role"] for message in messages[:10])
            raise InvalidRequest(
                f"the model's chat template does not take these messages (roles: {roles})", "messages"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt's tokens, special ones by their names."""
        text: str = self._decoder.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=self._whole, split_special_tokens=True)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
        )
        return ids

    def _check_length(self, texts: Sequence[str], param: str) -> None:
        if sum(map(len, texts)) > self._max_characters:
            raise InvalidRequest(
                "the prompt is longer than this model's context", param, code="context_length_exceeded"
            )

    async def _run(self, encode: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode)
