"""What a model is asked in a row, and what is right. Knows formats and prefixes; no model, no metric."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from heliostat.data import formats
from heliostat.data.config import DataConfig
from heliostat.data.formats import ChatTemplate
from heliostat.data.records import Row
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation.prefix import PromptPrefix

Pair = tuple[str, str]
"""A prompt and its answer, in the form that PromptPrefix has them."""


@dataclass(frozen=True)
class Question:
    """One row, as text."""

    prompt: str
    """The row's own prompt."""
    asked: str
    """The prompt with the prefix before it."""
    references: tuple[str, ...]
    """The right completions; the first is the one that is trained."""


def question_of(row: Row, data: DataConfig, template: ChatTemplate | None, prefix: PromptPrefix) -> Question:
    """The question of a row; `template` is needed for chats only.

    Raises:
        DataError, ModelError: as `formats.to_segments`.
    """
    prompt, _ = formats.prompt_of(row, data, template)
    return Question(prompt, _asked(row, prompt, data, template, prefix), formats.references_of(row, data, template))


def _asked(row: Row, prompt: str, data: DataConfig, template: ChatTemplate | None, prefix: PromptPrefix) -> str:
    if template is None:
        return prefix.text() + prompt
    if prefix == PromptPrefix():
        return prompt
    dialogue = formats.dialogue_of(row, data)
    asked = prefix.messages(dialogue.messages[: dialogue.last_answer])
    return template.render([dict(message) for message in asked], tools=dialogue.tools, generation_prompt=True)


def pair_of(row: Row, data: DataConfig) -> Pair:
    """The prompt and the reference of a row, in the form that PromptPrefix has them: without a chat's markup.

    Raises:
        DataError: the row is wrong, or is a chat whose last answer follows no user's message.
    """
    if data.format != "chat":
        return formats.prompt_of(row, data, None)
    dialogue = formats.dialogue_of(row, data)
    messages, last = dialogue.messages, dialogue.last_answer
    if "tool_calls" in messages[last]:
        raise DataError(f"{row.origin}: its last answer is a tool call, so it cannot be an example (few_shot)")
    if not last or messages[last - 1]["role"] != "user":
        raise DataError(f"{row.origin}: has no user's message with an answer, so it cannot be an example (few_shot)")
    return messages[last - 1]["content"], messages[last]["content"]


def few_shot(rows: Sequence[Row], data: DataConfig, count: int, seed: int) -> PromptPrefix:
    """`count` of the rows, drawn by the seed, as worked examples.

    Raises:
        ConfigError: there are fewer rows.
        DataError: as `pair_of`.
    """
    if len(rows) < count:
        raise ConfigError(f"evaluation.few_shot: {count} examples are more than the {len(rows)} training rows")
    drawn = random.Random(seed).sample(range(len(rows)), count)
    return PromptPrefix(few_shot=tuple(pair_of(rows[index], data) for index in drawn))
