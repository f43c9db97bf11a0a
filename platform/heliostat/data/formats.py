"""A row -> the text of one training document, in parts that are learned or not. Knows formats and chat templates;
nothing of files or token ids.

The last segment of every document is what the model is to write (the completion), the segments before it are the
prompt. Training, evaluation and generation all build the prompt here, so they see the same text.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from heliostat.data.config import DataConfig
from heliostat.data.dialogue import Dialogue, Message, Tool, as_text, parse_messages, parse_tools
from heliostat.data.records import Row
from heliostat.errors import ConfigError, DataError, ModelError

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ 'You can call these functions:\n<tools>\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '</tools>\nTo call one, write a JSON object of its name and arguments in <tool_call></tool_call>.' }}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% if message['content'] or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n' + call['function'] | tojson + '\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The ChatML template (https://huggingface.co/docs/transformers/chat_templating), without a default system prompt.

Tools and calls have the tags of Hermes (https://github.com/NousResearch/Hermes-Function-Calling), which many servers
parse.
"""

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
        # A model may have another template for dialogues with tools.
        source = tokenizer.get_chat_template() + tokenizer.get_chat_template(tools=[])
        self.special_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        ends = {tokenizer.bos_token, tokenizer.eos_token}
        self.control_tokens = tuple(token for token in self.special_tokens if token in source or token in ends)
        """The special tokens by which the template marks turns."""
        self._writes_calls = "tool_calls" in source

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None, generation_prompt: bool = False
    ) -> str:
        """The dialogue as text; with `generation_prompt`, up to where the assistant's next turn begins.

        For a template that knows no tool calls they are JSON in the message's content.

        Raises:
            DataError: the template refuses the messages (a role it does not know, an order it does not allow).
        """
        known = messages if self._writes_calls else [_with_calls_in_content(message) for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(known), tools=tools, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        return text


def _with_calls_in_content(message: Message) -> Message:
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": as_text(message)}


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
    return "".join(segment.text for segment in segments[:-1]), reference_of(row, config, chat)


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


def reference_of(row: Row, config: DataConfig, chat: ChatTemplate | None = None) -> str:
    """The reference completion of `prompt_of`.

    A tool call is written as the chat template writes it, special tokens aside, as predictions are; without the
    template, as JSON.

    Raises:
        DataError, ModelError: as `to_segments`.
    """
    if config.format != "chat":
        return prompt_of(row, config, None)[1]
    dialogue = dialogue_of(row, config)
    answer = dialogue.messages[dialogue.last_answer]
    if chat is None or "tool_calls" not in answer:
        return as_text(answer)
    text = _chat_segments(row, config, chat)[-1].text
    for token in chat.special_tokens:
        text = text.replace(token, "")
    return text.strip()


def calls_tools(row: Row, config: DataConfig) -> bool:
    """Whether the last answer of the row is, or has, a tool call.

    Raises:
        DataError: as `dialogue_of`.
    """
    if config.format != "chat":
        return False
    dialogue = dialogue_of(row, config)
    return "tool_calls" in dialogue.messages[dialogue.last_answer]


def references_of(row: Row, config: DataConfig, chat: ChatTemplate | None = None) -> tuple[str, ...]:
    """All right completions, that of `reference_of` first: several in `format: cloze`.

    Raises:
        DataError, ModelError: as `to_segments`.
    """
    if config.format == "cloze":
        return tuple(f" {answer}" for answer in row.fields["answers"])
    return (reference_of(row, config, chat),)


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


def dialogue_of(row: Row, config: DataConfig) -> Dialogue:
    """The messages and tools of a row of `format: chat`; the fields are `messages` or `conversations`, and `tools`.

    Raises:
        DataError: the messages' column is missing, or one of the two is malformed.
    """
    field = "messages"
    if config.columns.get(field, field) not in row.fields and "conversations" in row.fields:
        field = "conversations"
    messages = parse_messages(_value(row, config, field), row.origin, config.columns.get(field, field))
    tools = _value(row, config, "tools") if "tools" in config.columns else row.fields.get("tools")
    return Dialogue(messages, parse_tools(tools, row.origin, config.columns.get("tools", "tools")))


def _chat_segments(row: Row, config: DataConfig, chat: ChatTemplate | None) -> list[Segment]:
    if chat is None:
        raise ModelError("format: chat needs a chat template; set model.chat_template: chatml (or a Jinja file)")
    dialogue = dialogue_of(row, config)
    if not dialogue.answers:
        raise DataError(f"{row.origin}: has no assistant message that answers another; there is nothing to learn from")
    try:
        _refuse_control_tokens(dialogue, chat)
        _refuse_what_is_not_written(dialogue, chat)
        return _diff_renderings(dialogue, chat, row.origin)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from error


def _refuse_control_tokens(dialogue: Dialogue, chat: ChatTemplate) -> None:
    tools = len(dialogue.tools or ())
    for number, text in enumerate(dialogue.texts(), 1):
        found = [token for token in chat.control_tokens if token in text]
        if found:
            place = f"tool {number}" if number <= tools else f"message {number - tools}"
            raise DataError(
                f"{place} contains the control token {found[0]}, which would forge a turn; remove it from the text"
            )


def _refuse_what_is_not_written(dialogue: Dialogue, chat: ChatTemplate) -> None:
    """A template may leave out in silence what it does not know: tools, and what they answer."""
    messages, tools = dialogue.messages[: dialogue.last_answer + 1], dialogue.tools
    way_out = "set model.chat_template: chatml (or a Jinja file that writes it)"
    if tools and chat.render(messages, tools=tools) == chat.render(messages):
        raise DataError(f"the chat template leaves out the row's tools; {way_out}, or remove the column")
    for index, message in enumerate(messages):
        if message["role"] == "tool" and chat.render(messages[: index + 1], tools=tools) == chat.render(
            messages[:index], tools=tools
        ):
            raise DataError(f"the chat template leaves out message {index + 1}, a tool's answer; {way_out}")


def _diff_renderings(dialogue: Dialogue, chat: ChatTemplate, origin: str) -> list[Segment]:
    """Where each answer lies in the rendered dialogue, found by rendering the dialogue up to and after it."""
    messages, tools = dialogue.messages, dialogue.tools
    full = chat.render(messages[: dialogue.last_answer + 1], tools=tools)
    segments = []
    position = 0
    for index in dialogue.answers:
        before = chat.render(messages[:index], tools=tools, generation_prompt=True)
        after = chat.render(messages[: index + 1], tools=tools)
        if not (after.startswith(before) and full.startswith(after) and len(after) > len(before) >= position):
            raise ModelError(
                f"the chat template does not render message {index + 1} of {origin} as an addition to the text before "
                "it, so it is unknown which tokens to learn; set model.chat_template: chatml (or a Jinja file)"
            )
        answer = _without_trailing_space(after[len(before) :], chat)
        for call in messages[index].get("tool_calls", ()):
            if call["function"]["name"] not in answer:
                raise DataError(
                    f"the chat template leaves out a tool call of message {index + 1} ({call['function']['name']}); "
                    "set model.chat_template: chatml (or a Jinja file that writes it)"
                )
        segments += [Segment(full[position : len(before)], learn=False), Segment(answer, learn=True)]
        position = len(before) + len(answer)
    return segments


def _without_trailing_space(answer: str, chat: ChatTemplate) -> str:
    """Generation ends with the end token: white space that the template puts after it is never generated."""
    stripped = answer.rstrip()
    return stripped if stripped.endswith(chat.control_tokens) else answer
