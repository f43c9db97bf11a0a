"""A row -> the text of one training document, in parts that are learned or not. Knows formats and chat templates;
nothing of files or token ids.

The last segment of every document is what the model is to write (the completion), the segments before it are the
prompt. Training, evaluation and generation all build the prompt here, so they see the same text.
"""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import ConfigError, DataError, ModelError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The ChatML template (https://huggingface.co/docs/transformers/chat_templating), without a default system prompt."""

# The prompts of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca#data-release).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

CLOZE_PROMPT = "{passage}\n\n{query}\n\n@placeholder:"
"""In no language: what stands for the gap is named, and then said."""

OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}

Message = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """A part of a document, and whether its tokens carry loss."""

    text: str
    learn: bool


class ChatTemplate:
    """The tokenizer's own chat template.

    Raises:
        ModelError: the tokenizer has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.chat_template is None:
            raise ModelError("the tokenizer has no chat template; set model.chat_template: chatml (or a Jinja file)")
        self._tokenizer = tokenizer
        source = tokenizer.get_chat_template()
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        ends = {tokenizer.bos_token, tokenizer.eos_token}
        self.control_tokens = tuple(token for token in special if token in source or token in ends)
        """The special tokens by which the template marks turns."""

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The dialogue as text; with `generation_prompt`, up to where the assistant's next turn begins.

        Raises:
            DataError: the template refuses the messages (a role it does not know, an order it does not allow).
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        return text


def chat_template(tokenizer: Any, config: DataConfig) -> ChatTemplate | None:
    """What `to_segments` and `prompt_of` need beside the row: the tokenizer's template, for `format: chat`.

    Raises:
        ModelError: the format is chat and the tokenizer has no template.
    """
    return ChatTemplate(tokenizer) if config.format == "chat" else None


def to_segments(row: Row, config: DataConfig, chat: ChatTemplate | None) -> list[Segment]:
    """The document of a row. `chat` is needed for `format: chat` only.

    text: one learned segment. prompt_completion, alpaca: prompt, learned completion. cloze: passage and query, learned
    first answer. classification: text, learned label. seq2seq: source, learned target. chat: every assistant turn that
    answers something is learned, up to and with its end token; what follows the last one is left out. With
    `train_on_inputs` everything is learned.

    Raises:
        DataError: a column is missing, empty or of a wrong type, or the messages are malformed; names row and column.
        ModelError: the chat template renders earlier turns differently once more follow, so no mask can be derived.
    """
    if config.format == "text":
        return [Segment(_filled(field_text(row, config, "text"), row, "text"), learn=True)]
    if config.format == "chat":
        segments = _chat_segments(row, config, chat)
    else:
        prompt, completion = _prompt_and_completion(row, config)
        segments = [Segment(prompt, learn=False), Segment(completion, learn=True)]
    return [Segment(segment.text, segment.learn or config.train_on_inputs) for segment in segments if segment.text]


def prompt_of(row: Row, config: DataConfig, chat: ChatTemplate | None) -> tuple[str, str]:
    """(prompt, reference completion) for generation.

    The prompt is exactly what training saw before the row's last learned segment, the generation prompt of a chat
    template included. The reference is without end tokens. A `text` document has an empty prompt.

    Raises:
        DataError, ModelError: as `to_segments`.
    """
    if config.format != "chat":
        *prompt, completion = to_segments(row, config, chat)
        return "".join(segment.text for segment in prompt), completion.text
    segments = _chat_segments(row, config, chat)
    return "".join(segment.text for segment in segments[:-1]), reference_of(row, config)


def label_of(row: Row, config: DataConfig) -> str:
    """The label of a row of `format: classification`, without white space around it.

    Raises:
        DataError: it is missing, empty, or none of `data.labels`.
    """
    label = _filled(field_text(row, config, "label").strip(), row, "label")
    if config.labels is not None and label not in config.labels:
        known = ", ".join(f"`{name}`" for name in config.labels[:10])
        raise DataError(f"{row.origin}: the label `{label}` is none of {known}; correct it, or set data.labels")
    return label


def label_names(rows: Sequence[Row], config: DataConfig) -> tuple[str, ...]:
    """The labels of `format: classification`, in the order of their numbers; none for other formats.

    They are `data.labels`, or what occurs in the rows, sorted.

    Raises:
        DataError: a row is wrong, or there are fewer than two labels.
    """
    if config.task != "classification":
        return ()
    if config.labels:
        return tuple(config.labels)
    found = sorted({label_of(row, config) for row in rows})
    if len(found) < 2:
        raise DataError(f"data.train: all rows have the label `{found[0]}`; a classifier needs at least two labels")
    return tuple(found)


def reference_of(row: Row, config: DataConfig) -> str:
    """The reference completion of `prompt_of`, for which no chat template is needed.

    Raises:
        DataError: as `to_segments`.
    """
    if config.format != "chat":
        return prompt_of(row, config, None)[1]
    messages = parse_messages(row, config)
    return str(messages[last_answer(messages)]["content"])


def references_of(row: Row, config: DataConfig) -> tuple[str, ...]:
    """All right completions, that of `reference_of` first: several in `format: cloze`.

    Raises:
        DataError: as `to_segments`.
    """
    if config.format == "cloze":
        return tuple(f" {answer}" for answer in row.fields["answers"])
    return (reference_of(row, config),)


def candidates_of(row: Row, config: DataConfig) -> tuple[str, ...] | None:
    """The completions that the row itself offers to choose from; None where it does not (all formats but `cloze`)."""
    return tuple(f" {entity}" for entity in row.fields["candidates"]) if config.format == "cloze" else None


def field_text(row: Row, config: DataConfig, field: str) -> str:
    """The value of a format's field (through `data.columns`), as text; numbers are written out.

    Raises:
        DataError: the column is missing, or holds neither text nor a number.
    """
    value = _value(row, config, field)
    if not isinstance(value, str | int | float):
        kind = "nothing (null)" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{row.origin}: column `{config.columns.get(field, field)}` holds {kind}; text is needed")
    return str(value)


def _value(row: Row, config: DataConfig, field: str) -> Any:
    column = config.columns.get(field, field)
    if column not in row.fields:
        found = ", ".join(row.fields)
        raise DataError(
            f"{row.origin}: has no column `{column}` (found: {found}); map it with data.columns: {{{field}: COLUMN}}, "
            "or name the columns of a file without a header line with data.column_names"
        )
    return row.fields[column]


def _filled(text: str, row: Row, what: str) -> str:
    if not text.strip():
        raise DataError(f"{row.origin}: the {what} is empty; there is nothing to learn from")
    return text


def _prompt_and_completion(row: Row, config: DataConfig) -> tuple[str, str]:
    if config.format == "alpaca":
        return _alpaca_prompt(row, config), _filled(field_text(row, config, "output"), row, "output")
    if config.format == "classification":
        field = "prompt" if config.prompt_template else "text"
        text = _from_template(row, config, field, "prompt_template", config.prompt_template)
        return _filled(text, row, "text"), label_of(row, config)
    if config.format == "cloze":
        prompt = _from_template(row, config, "prompt", "prompt_template", config.prompt_template or CLOZE_PROMPT)
        return prompt, references_of(row, config)[0]
    asked, wanted = ("source", "target") if config.format == "seq2seq" else ("prompt", "completion")
    prompt = _from_template(row, config, asked, "prompt_template", config.prompt_template)
    completion = _from_template(row, config, wanted, "completion_template", config.completion_template)
    return _filled(prompt, row, asked) if asked == "source" else prompt, _filled(completion, row, wanted)


def _alpaca_prompt(row: Row, config: DataConfig) -> str:
    instruction = field_text(row, config, "instruction")
    # `input` may be absent, null or empty.
    given = row.fields.get(config.columns.get("input", "input")) or ""
    if given:
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=field_text(row, config, "input"))
    return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


class _ColumnFormatter(string.Formatter):
    """`str.format` over the columns of a row: names are columns, never attributes or positions."""

    def __init__(self, row: Row, config: DataConfig) -> None:
        self._row, self._config = row, config

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        text = field_text(self._row, self._config, field_name)
        return text, field_name


def _from_template(row: Row, config: DataConfig, field: str, key: str, template: str | None) -> str:
    if template is None:
        return field_text(row, config, field)
    try:
        return _ColumnFormatter(row, config).vformat(template, (), {})
    except ValueError as error:
        raise ConfigError(f"data.{key}: {error}; write {{column}} for a column, {{{{ and }}}} for braces") from error


def parse_messages(row: Row, config: DataConfig) -> list[Message]:
    """The dialogue of a row as role/content messages.

    Reads OpenAI `messages` (role, content) and ShareGPT `conversations` (from, value), where a function call is an
    assistant turn whose content is the call's JSON.

    Raises:
        DataError: the column is missing, not a list, or a message is malformed.
    """
    field = "messages"
    if config.columns.get(field, field) not in row.fields and "conversations" in row.fields:
        field = "conversations"
    messages = _value(row, config, field)
    # Parquet and hub data may hold arrays that are sequences but not lists.
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{row.origin}: column `{config.columns.get(field, field)}` must be a list of messages")
    return [_parse_message(message, f"{row.origin}: message {number}") for number, message in enumerate(messages, 1)]


def _parse_message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{place}: must be an object with `role` and `content`, found a {type(message).__name__}")
    if "role" in message:
        role, content, known = message["role"], message.get("content"), dict.fromkeys(OPENAI_ROLES)
    elif "from" in message:
        role, content, known = message["from"], message.get("value"), dict.fromkeys(SHAREGPT_ROLES)
    else:
        raise DataError(
            f"{place}: has neither `role` and `content` nor `from` and `value` (found: {', '.join(message)})"
        )
    if not isinstance(role, str) or role not in known:
        raise DataError(f"{place}: unknown role `{role}`; known: {', '.join(known)}")
    if content is None and isinstance(message.get("tool_calls"), list):
        content = "\n".join(_tool_call(call) for call in message["tool_calls"])
    if not isinstance(content, str):
        raise DataError(f"{place}: its content must be text, found a {type(content).__name__}")
    role = SHAREGPT_ROLES.get(role, role)
    if role == "assistant" and not content.strip():
        raise DataError(f"{place}: the assistant's message is empty; there is nothing to learn from")
    return {"role": role, "content": content}


def _tool_call(call: Any) -> str:
    """An OpenAI tool call as JSON text, as ShareGPT writes function calls."""
    function = call["function"] if isinstance(call, dict) and "function" in call else call
    return json.dumps(function, ensure_ascii=False)


def last_answer(messages: Sequence[Message]) -> int:
    """Index of the last assistant turn that answers something; 0 if there is none."""
    return max(_answers(messages), default=0)


def _answers(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant turns that answer something; one that opens the dialogue is context."""
    return [index for index, message in enumerate(messages) if index and message["role"] == "assistant"]


def _chat_segments(row: Row, config: DataConfig, chat: ChatTemplate | None) -> list[Segment]:
    if chat is None:
        raise ModelError("format: chat needs a chat template; set model.chat_template: chatml (or a Jinja file)")
    messages = parse_messages(row, config)
    answers = _answers(messages)
    if not answers:
        raise DataError(f"{row.origin}: has no assistant message that answers another; there is nothing to learn from")
    _refuse_control_tokens(row, messages, chat)
    try:
        return _diff_renderings(messages, answers, chat, row.origin)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from error


def _refuse_control_tokens(row: Row, messages: Sequence[Message], chat: ChatTemplate) -> None:
    for number, message in enumerate(messages, 1):
        found = [token for token in chat.control_tokens if token in message["content"]]
        if found:
            raise DataError(
                f"{row.origin}: message {number} contains the control token {found[0]}, which would forge a turn; "
                "remove it from the text"
            )


def _diff_renderings(messages: list[Message], answers: list[int], chat: ChatTemplate, origin: str) -> list[Segment]:
    """Where each answer lies in the rendered dialogue, found by rendering the dialogue up to and after it."""
    full = chat.render(messages[: answers[-1] + 1])
    segments = []
    position = 0
    for index in answers:
        before = chat.render(messages[:index], generation_prompt=True)
        after = chat.render(messages[: index + 1])
        if not (after.startswith(before) and full.startswith(after) and len(after) > len(before) >= position):
            raise ModelError(
                f"the chat template does not render message {index + 1} of {origin} as an addition to the text before "
                "it, so it is unknown which tokens to learn; set model.chat_template: chatml (or a Jinja file)"
            )
        answer = _without_trailing_space(after[len(before) :], chat)
        segments += [Segment(full[position : len(before)], learn=False), Segment(answer, learn=True)]
        position = len(before) + len(answer)
    return segments


def _without_trailing_space(answer: str, chat: ChatTemplate) -> str:
    """Generation ends with the end token: white space that the template puts after it is never generated."""
    stripped = answer.rstrip()
    return stripped if stripped.endswith(chat.control_tokens) else answer
