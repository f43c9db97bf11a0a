"""The columns of a chat row -> messages and tools in OpenAI's form. Knows OpenAI and ShareGPT; no chat template.

Tool calls become `tool_calls` with their arguments as an object, the form that chat templates take
(https://huggingface.co/docs/transformers/chat_extras). Data sets hold them in several: arguments as JSON text (OpenAI),
a call as JSON text (ShareGPT's `function_call`), the tools as JSON text (LLaMA-Factory) or as bare functions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heliostat.errors import DataError

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
# What a message may have beside its role and content, for templates that write it.
MORE = ("name", "tool_call_id")

Message = dict[str, Any]
"""`role` and `content` (text), and where they are given `tool_calls`, `name`, `tool_call_id`."""
Tool = dict[str, Any]
"""`{"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON Schema}}`."""


@dataclass(frozen=True)
class Dialogue:
    """What was said, and the tools that the assistant could call."""

    messages: list[Message]
    tools: list[Tool] | None = None

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's turns that answer something; one that opens the dialogue is context."""
        return [index for index, message in enumerate(self.messages) if index and message["role"] == "assistant"]

    @property
    def last_answer(self) -> int:
        """Index of the last assistant turn that answers something; 0 if there is none."""
        return max(self.answers, default=0)

    def texts(self) -> list[str]:
        """All that is said, tools first, without roles."""
        return [_json(tool) for tool in self.tools or ()] + [as_text(message) for message in self.messages]


def as_text(message: Message) -> str:
    """A message's content, and a line of JSON for each of its calls."""
    calls = [_json(call["function"]) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"]] * bool(message["content"] or not calls) + calls)


def parse_messages(values: Any, place: str, column: str) -> list[Message]:
    """OpenAI's `messages` (role, content, tool_calls) or ShareGPT's `conversations` (from, value).

    `place` is the row's `file:line`.

    Raises:
        DataError: it is not a list, or a message is malformed.
    """
    # Parquet and hub data may hold arrays that are sequences but not lists.
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise DataError(f"{place}: column `{column}` must be a list of messages")
    return [_message(value, f"{place}: message {number}") for number, value in enumerate(values, 1)]


def parse_tools(value: Any, place: str, column: str) -> list[Tool] | None:
    """The tools of a row: a list of OpenAI's tools or of bare functions, or that list as JSON text; None for no tools.

    Nulls are left out: Parquet gives every object the keys of all.

    Raises:
        DataError: it is something else, or a tool has no name.
    """
    found = _from_json(value, f"{place}: column `{column}`") if isinstance(value, str) and value.strip() else value
    if not found:
        return None
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise DataError(f"{place}: column `{column}` must be a list of tools, found a {type(found).__name__}")
    return [_tool(tool, f"{place}: column `{column}`: tool {number}") for number, tool in enumerate(found, 1)]


def _tool(value: Any, place: str) -> Tool:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f'{place}: must be {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}')
    wrapped = value if "function" in value else {"type": "function", "function": value}
    tool: Tool = _without_nulls(wrapped)
    return tool


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _message(message: Any, place: str) -> Message:
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
    calls = _calls(content if role == "function_call" else message.get("tool_calls"), place)
    if calls and (content is None or role == "function_call"):
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{place}: its content must be text, found a {type(content).__name__}")
    role = SHAREGPT_ROLES.get(role, role)
    if calls and role != "assistant":
        raise DataError(f"{place}: has tool calls, but its role is `{role}`; only the assistant calls tools")
    if role == "assistant" and not content.strip() and not calls:
        raise DataError(f"{place}: the assistant's message is empty; there is nothing to learn from")
    more = {key: message[key] for key in MORE if message.get(key) is not None}
    return {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **more}


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """OpenAI's tool calls, from those or from what ShareGPT writes: a call, or a list of them, as JSON text."""
    found = _from_json(value, place) if isinstance(value, str) else value
    calls = [found] if isinstance(found, Mapping) else found or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise DataError(f"{place}: its tool calls must be a list, found a {type(calls).__name__}")
    return [_call(call, f"{place}: tool call {number}") for number, call in enumerate(calls, 1)]


def _call(value: Any, place: str) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f'{place}: must be {{"function": {{"name": ..., "arguments": ...}}}}')
    given = function.get("arguments")
    arguments = _from_json(given, place) if isinstance(given, str) and given.strip() else given or {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"{place}: its arguments must be an object, found a {type(arguments).__name__}")
    named = {"id": value["id"]} if value.get("id") is not None else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _from_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not valid JSON: {error.msg} at column {error.colno}") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
