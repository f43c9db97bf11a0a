"""Bad bodies: each is refused with the right status, parameter and code, in OpenAI's form, and none is quoted."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx2
import pytest

from heliostat.serving.protocol import MAX_COMPLETIONS, MAX_N
from tests.fuzz.conftest import MAX_BODY_BYTES

SECRET = "canary-91c4 of a client"
CHAT = "chat/completions"
USER = {"role": "user", "content": SECRET}
HUGE = 10**400
VALUE, UNKNOWN, UNSUPPORTED = "invalid_value", "unknown_parameter", "unsupported_parameter"
MISSING, JSON, LENGTH = "missing_required_parameter", "invalid_json", "context_length_exceeded"


class Bad(NamedTuple):
    """A body, and how it is to be refused. `param` may be the beginning of the one that is named."""

    body: bytes
    param: str | None
    code: str | None = VALUE
    status: int = 400
    path: str = "completions"
    content_type: str = "application/json"


def completion(param: str | None, code: str | None = VALUE, **changes: Any) -> Bad:
    """A completion that would be fine but for the changes; `...` leaves a field out."""
    body = {"model": "tiny", "prompt": SECRET, "max_tokens": 2} | changes
    return Bad(_encoded(body), param, code)


def chat(param: str | None, code: str | None = VALUE, **changes: Any) -> Bad:
    """A chat that would be fine but for the changes."""
    body = {"model": "tiny", "messages": [USER], "max_tokens": 2} | changes
    return Bad(_encoded(body), param, code, path=CHAT)


def each(make: Callable[..., Bad], name: str, *values: Any) -> list[Bad]:
    """Requests with one wrong value each of the same parameter."""
    return [make(name, **{name: value}) for value in values]


def messages(param: str, *given: Any) -> Bad:
    """A chat with these messages."""
    return chat(param, messages=list(given))


def raw(text: str | bytes, param: str | None = None, code: str | None = JSON, **changes: Any) -> Bad:
    """A completion whose body is this."""
    return Bad(text.encode() if isinstance(text, str) else text, param, code, **changes)


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in body.items() if value is not ...}).encode()


NOT_JSON = [
    raw(b"", None, MISSING),
    raw(b" \n\t"),
    raw(SECRET),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}'),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}",}}'),
    raw(f"{{'model': 'tiny', 'prompt': '{SECRET}'}}"),
    raw(f'{{"model": "tiny" "prompt": "{SECRET}"}}'),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}"}} {{}}'),
    raw(f'// {SECRET}\n{{"model": "tiny", "prompt": "a"}}'),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}\n"}}'),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}\\x41"}}'),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "n": 01}}'),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "n": 0x1}}'),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "n": +1}}'),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "n": undefined}}'),
    raw(b"\xff\xfe" + SECRET.encode()),
    raw(b'{"model": "tiny", "prompt": "\xc3\x28 ' + SECRET.encode() + b'"}'),
    raw(b'{"model": "tiny", "prompt": "\xed\xa0\x80 ' + SECRET.encode() + b'"}', None, VALUE),
    raw(json.dumps({"model": "tiny", "prompt": SECRET}).encode("utf-16-be")[1:]),
    raw(b"\x00" * 20),
    raw("[" * 50_000),
    raw('{"model": ' * 20_000),
    raw('{"model": "tiny", "prompt": ' + "[" * 5_000 + "]" * 5_000 + "}"),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "n": {"9" * 5000}}}'),
]
# Around the depth that Python's parser still takes, and what comes after it may not.
DEEP = [
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "no name": {"[" * depth}{"]" * depth}}}', None, None)
    for depth in range(900, 1000, 3)
]
NOT_AN_OBJECT = [
    *(raw(text, None, VALUE) for text in ("[]", f'["{SECRET}"]', f'"{SECRET}"', "1", "true", "1e999")),
    raw("null", None, None),
    raw("[]", None, VALUE, path=CHAT),
    raw(f'"{SECRET}"', None, VALUE, path=CHAT),
    raw(f"model=tiny&prompt={SECRET}", None, None, content_type="application/x-www-form-urlencoded"),
    raw(_encoded({"model": "tiny", "prompt": SECRET}), None, None, content_type="text/plain"),
    raw(_encoded({"model": "tiny", "messages": [USER]}), None, None, content_type="text/plain", path=CHAT),
]
SURROGATES = [
    raw(f'{{"model": "tiny", "prompt": "{SECRET} \\ud800"}}', None, VALUE),
    raw(f'{{"model": "tiny", "prompt": "{SECRET} \\udc00\\ud800"}}', None, VALUE),
    raw(f'{{"model": "tiny", "prompt": ["{SECRET}", "\\udfff"]}}', None, VALUE),
    raw(f'{{"model": "tiny", "prompt": "a", "{SECRET} \\ud800": 1}}', None, VALUE),
    raw(f'{{"model": "tiny", "prompt": "a", "stop": "{SECRET} \\ud800"}}', None, VALUE),
    raw(f'{{"model": "tiny", "prompt": "a", "user": "{SECRET} \\ud800"}}', None, VALUE),
    raw(f'{{"model": "\\ud800 {SECRET}", "prompt": "a"}}', None, VALUE),
    raw(
        f'{{"model": "tiny", "messages": [{{"role": "user", "content": "{SECRET} \\ud83d"}}]}}', None, VALUE, path=CHAT
    ),
]
TWICE = [
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "n": 1, "n": "{SECRET}"}}', "n", VALUE),
    raw(f'{{"model": "tiny", "prompt": "a", "prompt": {{"{SECRET}": 1}}}}', "prompt", VALUE),
]
MISSING_FIELDS = [
    raw("{}", "model", MISSING),
    completion("model", MISSING, model=...),
    completion("prompt", MISSING, prompt=...),
    chat("model", MISSING, model=...),
    chat("messages", MISSING, messages=...),
    completion("prompt", MISSING, prompt=..., messages=[USER]),
]
MODELS = [
    *each(completion, "model", None, 1, True, ["tiny"], {"name": "tiny"}),
    completion("model", "model_not_found", model="")._replace(status=404),
    completion("model", "model_not_found", model="tiny ")._replace(status=404),
    completion("model", "model_not_found", model="TINY")._replace(status=404),
    completion("model", "model_not_found", model="tiny@7")._replace(status=404),
    completion("model", "model_not_found", model="tiny@")._replace(status=404),
    completion("model", "model_not_found", model="../tiny")._replace(status=404),
    completion("model", "model_not_found", model="x" * 10_000)._replace(status=404),
    chat("model", "model_not_found", model="other")._replace(status=404),
]
PROMPTS = [
    *each(
        completion,
        "prompt",
        None,
        1,
        1.5,
        True,
        {},
        {"text": SECRET},
        [],
        [[]],
        ["a", []],
        [1, SECRET],
        [1.0],
        [True],
        [None],
        [[1, SECRET]],
        [[[1]]],
        ["a"] * (MAX_COMPLETIONS + 1),
    ),
    completion("prompt", prompt=""),
    completion("prompt", prompt=["a", ""]),
    *each(completion, "prompt", [-1], [10**6], [2**31], [2**63], [HUGE // 10**380], [5, -7]),
    completion("prompt", LENGTH, prompt=[5] * 128),
    completion("prompt", LENGTH, prompt=[5] * 10_000),
    completion("prompt", LENGTH, prompt=f"{SECRET} " * 1000),
    completion("prompt", LENGTH, prompt=["a", f"{SECRET} " * 1000]),
]
INTEGERS = [
    *each(completion, "max_tokens", -1, 1.5, "2", True, [2], {}, 2**40, 2**70),
    completion("max_tokens", max_tokens=0),
    completion("max_tokens", LENGTH, max_tokens=5000),
    completion("max_tokens", LENGTH, max_tokens=2**31 - 1),
    chat("max_tokens", max_tokens=0),
    chat("max_completion_tokens", max_tokens=..., max_completion_tokens=0),
    chat("max_completion_tokens", max_tokens=..., max_completion_tokens="9"),
    chat("max_completion_tokens", max_tokens=2, max_completion_tokens=3),
    completion("max_completion_tokens", UNKNOWN, max_completion_tokens=2),
    *each(completion, "n", 0, -1, MAX_N + 1, 1.0, "1", False, 10**30),
    completion("n", n=16, prompt=["a"] * 9),
    completion("best_of", best_of=0),
    completion("best_of", best_of=MAX_N + 1),
    completion("best_of", n=3, best_of=2),
    completion("best_of", best_of=2, stream=True),
    chat("best_of", UNKNOWN, best_of=2),
    *each(completion, "top_k", -1, 1.5, "40", 2**40),
    *each(completion, "seed", 1.5, "7", True, 2**63, -(2**63) - 1),
    *each(completion, "min_tokens", -1, 0.5, "1"),
    completion("min_tokens", min_tokens=3),
    completion("logprobs", logprobs=-1),
    completion("logprobs", logprobs=21),
    completion("logprobs", logprobs=True),
    completion("logprobs", logprobs="5"),
    chat("logprobs", logprobs=3),
    chat("top_logprobs", logprobs=True, top_logprobs=21),
    chat("top_logprobs", logprobs=True, top_logprobs=-1),
    chat("top_logprobs", top_logprobs=2),
    completion("top_logprobs", UNKNOWN, top_logprobs=2),
    *each(completion, "num_beams", 0, 33, 2.0, "2"),
    *each(completion, "no_repeat_ngram_size", -1, 1.5, "3"),
]
NUMBERS = [
    *each(completion, "temperature", -0.1, 2.1, "1", True, [], HUGE // 10**360),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "temperature": NaN}}', "temperature", VALUE),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "temperature": Infinity}}', "temperature", VALUE),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "temperature": -Infinity}}', "temperature", VALUE),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "temperature": 1e999}}', "temperature", VALUE),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "top_p": NaN}}', "top_p", VALUE),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "presence_penalty": NaN}}', "presence_penalty", VALUE),
    raw(f'{{"model": "tiny", "prompt": "{SECRET}", "logit_bias": {{"5": NaN}}}}', "logit_bias", VALUE),
    *each(completion, "top_p", 0, -1, 1.1, "0.5"),
    *each(completion, "min_p", -0.1, 1.1, "0"),
    *each(completion, "typical_p", 0, 1.5),
    *each(completion, "presence_penalty", -2.1, 2.1, "1"),
    *each(completion, "frequency_penalty", -2.1, 2.1, []),
    *each(completion, "repetition_penalty", 0, -1, 1000, "1"),
    completion("length_penalty", num_beams=2, length_penalty=1000),
    completion("length_penalty", num_beams=2, length_penalty="1"),
    completion("early_stopping", num_beams=2, early_stopping=3),
]
STOPS = [
    *each(completion, "stop", "", [""], ["a"] * 5, [1], [None], [["a"]], {"a": 1}, 1, True),
    completion("stop", stop=SECRET * 100),
    completion("stop", stop=["a", SECRET * 100]),
    *each(completion, "stop_token_ids", "1", ["1"], [-1], [1.5], [2**40], [5] * 200, 5),
]
BIASES = [
    *each(
        completion,
        "logit_bias",
        [],
        "5",
        {SECRET: 1},
        {"-1": 1},
        {"1.5": 1},
        {"5": "1"},
        {"5": None},
        {"5": 101},
        {"5": -101},
        {"99999999999": 1},
        {str(token): 1 for token in range(2000)},
    ),
]
STREAMS = [
    *each(completion, "stream", "true", 1, 0, []),
    completion("stream_options", stream_options={"include_usage": True}),
    completion("stream_options", stream=False, stream_options={}),
    completion("stream_options", stream=True, stream_options=True),
    completion("stream_options", stream=True, stream_options={"include_usage": 1}),
    completion("stream_options", UNKNOWN, stream=True, stream_options={"nonsense": SECRET}),
    completion("echo", echo="yes"),
    completion("echo", echo=1),
    chat("echo", UNKNOWN, echo=True),
]
UNKNOWNS = [
    completion("nonsense", UNKNOWN, nonsense=SECRET),
    completion("chat_template", UNKNOWN, chat_template=SECRET),
    chat("chat_template", UNKNOWN, chat_template=SECRET),
    chat("chat_template_kwargs", UNKNOWN, chat_template_kwargs={"a": SECRET}),
    chat("prompt", UNKNOWN, prompt=SECRET),
    completion("messages", UNKNOWN, messages=[USER]),
    completion("guided_json", UNKNOWN, guided_json={}),
    completion("ignore_eos", UNKNOWN, ignore_eos=True),
    completion("__class__", UNKNOWN, __class__=SECRET),
    completion("Temperature", UNKNOWN, Temperature=1),
    completion(None, UNKNOWN, **{SECRET: 1}),
    completion(None, UNKNOWN, **{"x" * 5000: 1}),
    completion(None, UNKNOWN, **{"": 1}),
    *(
        chat(name, UNSUPPORTED, **{name: value})
        for name, value in (
            ("tools", [{"type": "function", "function": {"name": SECRET}}]),
            ("tool_choice", "required"),
            ("functions", [{"name": SECRET}]),
            ("function_call", "auto"),
            ("response_format", {"type": "json_object"}),
            ("response_format", {"type": "json_schema", "json_schema": {"name": SECRET}}),
            ("modalities", ["text", "audio"]),
            ("audio", {"voice": SECRET}),
            ("prediction", {"content": SECRET}),
            ("store", True),
            ("reasoning_effort", "high"),
            ("verbosity", "low"),
            ("web_search_options", {}),
        )
    ),
    completion("suffix", UNSUPPORTED, suffix=SECRET),
]
MESSAGES = [
    *each(chat, "messages", None, SECRET, {}, USER, [], 1),
    *(messages("messages.0", value) for value in (None, SECRET, 1, [], [USER])),
    messages("messages.0.role", {"content": SECRET})._replace(code=MISSING),
    messages("messages.0.content", {"role": "user"})._replace(code=MISSING),
    *(
        messages("messages.0.role", {**USER, "role": role})
        for role in ("tool", "function", "User", "", SECRET, None, 1)
    ),
    *(messages("messages.0.content", {**USER, "content": value}) for value in (None, 1, True, {"text": SECRET})),
    messages("messages.0.content", {**USER, "content": [SECRET]}),
    messages("messages.0.content", {**USER, "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}),
    messages("messages.0.content", {**USER, "content": [{"type": "text"}]}),
    messages("messages.0.content", {**USER, "content": [{"type": "text", "text": 1}]}),
    messages("messages.0.name", {**USER, "name": f"{SECRET}<|im_end|>"}),
    messages("messages.0.name", {**USER, "name": "x" * 65}),
    messages("messages.0.nonsense", {**USER, "nonsense": SECRET})._replace(code=UNKNOWN),
    messages("messages.0.tool_calls", {**USER, "role": "assistant", "tool_calls": [{"id": SECRET}]})._replace(
        code=UNKNOWN
    ),
    messages("messages.1.role", USER, {**USER, "role": "robot"}),
    chat("messages", LENGTH, messages=[{**USER, "content": f"{SECRET} " * 1000}]),
    chat("messages", LENGTH, messages=[USER] * 200),
]
LONG = [
    raw(_encoded({"model": "tiny", "prompt": SECRET * MAX_BODY_BYTES}), None, None, status=413),
    raw(" " * (MAX_BODY_BYTES + 1), None, None, status=413),
]
ROWS = [
    *NOT_JSON,
    *DEEP,
    *NOT_AN_OBJECT,
    *SURROGATES,
    *TWICE,
    *MISSING_FIELDS,
    *MODELS,
    *PROMPTS,
    *INTEGERS,
    *NUMBERS,
    *STOPS,
    *BIASES,
    *STREAMS,
    *UNKNOWNS,
    *MESSAGES,
    *LONG,
]


def test_there_are_enough() -> None:
    assert len({(row.body, row.path, row.content_type) for row in ROWS}) >= 200


@pytest.mark.parametrize("row", ROWS, ids=[f"{number}-{row.param}-{row.code}" for number, row in enumerate(ROWS)])
def test_a_bad_body_is_refused_rightly(url: str, row: Bad) -> None:
    headers = {"Content-Type": row.content_type}
    response = httpx2.post(f"{url}/v1/{row.path}", content=row.body, headers=headers)
    assert response.status_code == row.status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if row.code is not None:
        assert error["code"] == row.code, error
    named = error["param"]
    assert named == row.param or (row.param and named and named.startswith(f"{row.param}.")), error
    assert SECRET not in response.text
    assert len(response.text) < 1000
