"""Requests are read as OpenAI's clients write them; what is not honoured is refused by name, and nothing is quoted."""

import re
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from heliostat.serving.protocol import (
    MAX_COMPLETIONS,
    MAX_N,
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    explain,
)
from heliostat.serving.sampling import DecodingDefaults, SamplingParams

SECRET = "my secret prompt"
GREEDY = DecodingDefaults(temperature=0.0, top_k=0, top_p=1.0, max_tokens=None)
TUNED = DecodingDefaults(temperature=0.7, top_k=20, top_p=0.9, max_tokens=40)


def completion(**changes: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": SECRET, **changes})


def chat(**changes: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": SECRET}]
    return ChatCompletionRequest.model_validate({"model": "m", "messages": messages, **changes})


def refusal(make: Any, **changes: Any) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        make(**changes)
    error = explain(caught.value.errors())
    assert SECRET not in str(error.body())
    return error


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_all_forms_of_a_prompt(given: Any, kept: Any) -> None:
    assert completion(prompt=given).prompt == kept


@pytest.mark.parametrize(
    "prompt", [None, 3, {}, [], [[]], [1, "a"], [1.5], [True], [None], ["a"] * (MAX_COMPLETIONS + 1)]
)
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    assert refusal(completion, prompt=prompt).param == "prompt"


UNSUPPORTED: list[tuple[str, Any]] = [
    ("presence_penalty", 0.5),
    ("frequency_penalty", -1),
    ("logit_bias", {"5": 1}),
    ("logprobs", 0),
    ("logprobs", True),
    ("top_logprobs", 2),
    ("seed", 0),
    ("best_of", 2),
    ("echo", True),
    ("suffix", SECRET),
    ("response_format", {"type": "json_object"}),
    ("tools", [{"type": "function"}]),
    ("store", True),
]
# What a bundle may bring, a request may not ask for.
BUNDLES_ONLY = [
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "length_penalty",
    "extra",
]


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(("param", "value"), UNSUPPORTED)
def test_parameters_that_are_not_honoured_are_refused_by_name(make: Any, param: str, value: Any) -> None:
    error = refusal(make, **{param: value})
    assert (error.status, error.param, error.code) == (400, param, "unsupported_parameter")
    assert param in str(error)


@pytest.mark.parametrize("param", BUNDLES_ONLY)
def test_settings_of_bundles_are_no_parameters(param: str) -> None:
    assert refusal(completion, **{param: 1}).code == "unknown_parameter"


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(
    ("param", "value"),
    [
        *[(param, None) for param, _ in UNSUPPORTED],
        *[("presence_penalty", 0), ("frequency_penalty", 0.0), ("logit_bias", {}), ("logprobs", False), ("n", 1)],
        *[
            ("user", SECRET),
            ("metadata", {"a": "b"}),
            ("response_format", {"type": "text"}),
            ("tools", []),
            ("echo", False),
        ],
    ],
)
def test_values_that_ask_for_nothing_are_accepted(make: Any, param: str, value: Any) -> None:
    assert make(**{param: value}).sampling(GREEDY, 5) == SamplingParams(5)


WRONG: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.1, "0.5", float("nan"), True, []],
    "top_p": [0, 1.1, "1"],
    "top_k": [-1, 1.5, "5"],
    "max_tokens": [0, -5, 1.5, "10", True],
    "n": [0, MAX_N + 1, 1.5],
    "stop": ["", [""], ["a"] * 5, [1], {"a": 1}],
    "stream": ["yes", 1],
    "model": [None, 3, []],
    "stream_options": [{"include_usage": True}],
    "best_practices": [SECRET],
}


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(("param", "value"), [(param, value) for param, values in WRONG.items() for value in values])
def test_wrong_values_name_their_parameter(make: Any, param: str, value: Any) -> None:
    error = refusal(make, **{param: value})
    assert error.status == 400
    assert str(error.param).split(".")[0] == param
    assert param in str(error)


def test_a_missing_parameter_and_a_body_that_is_no_object() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": SECRET})
    assert explain(caught.value.errors()).body()["error"] == {
        "message": "`model` is missing",
        "type": "invalid_request_error",
        "param": "model",
        "code": "missing_required_parameter",
    }
    with pytest.raises(ValidationError) as caught:
        GenerationRequest.model_validate([SECRET])
    assert "JSON object" in str(explain(caught.value.errors()))


def test_settings_left_open_are_the_models_own() -> None:
    assert completion().sampling(TUNED, 7) == SamplingParams(7, temperature=0.7, top_k=20, top_p=0.9)
    given = completion(temperature=0, top_p=0.5, top_k=3, stop="\n").sampling(TUNED, 7)
    assert given == SamplingParams(7, temperature=0, top_k=3, top_p=0.5, stop=("\n",))
    assert completion(stop=["a", "b"]).sampling(GREEDY, 7).stop == ("a", "b")
    stopping = replace(GREEDY, stop=("x",), extra={"repetition_penalty": 1.2})
    assert completion().sampling(stopping, 7) == SamplingParams(7, stop=("x",), extra={"repetition_penalty": 1.2})
    assert completion(stop=[]).sampling(stopping, 7).stop == ()
    assert completion(stop="\n").sampling(stopping, 7).stop == ("\n",)


def test_how_many_tokens_are_generated() -> None:
    assert completion().token_limit(GREEDY, room=100) == 16
    assert completion().token_limit(TUNED, room=100) == 40
    assert completion().token_limit(TUNED, room=10) == 10
    assert completion(max_tokens=30).token_limit(TUNED, room=10) == 30
    assert chat().token_limit(GREEDY, room=100) == 100
    assert chat().token_limit(TUNED, room=100) == 40
    assert chat(max_tokens=5).token_limit(TUNED, room=100) == 5
    assert chat(max_completion_tokens=5).token_limit(TUNED, room=100) == 5
    # No room at all: the engine refuses the prompt for its length.
    assert chat().token_limit(GREEDY, room=-3) == 1
    assert refusal(chat, max_tokens=5, max_completion_tokens=6).param == "max_completion_tokens"


def test_prompts_times_n_is_bounded() -> None:
    assert completion(prompt=["a"] * (MAX_COMPLETIONS // MAX_N), n=MAX_N).n == MAX_N
    assert refusal(completion, prompt=["a"] * (MAX_COMPLETIONS // MAX_N + 1), n=MAX_N).param == "n"


def test_messages_as_templates_know_them() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant", "content": "three", "refusal": None, "tool_calls": []},
        ]
    )
    assert [message.as_template_input() for message in request.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one two", "name": "ann"},
        {"role": "assistant", "content": "three"},
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "tool", "content": SECRET},
        {"role": "<|im_end|>", "content": SECRET},
        {"role": "user", "content": SECRET, "name": "<|im_end|>"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]},
        {"role": "user", "content": None},
        {"role": "assistant", "content": SECRET, "tool_calls": [{"id": "1"}]},
        SECRET,
    ],
)
def test_messages_that_cannot_be_rendered_are_refused(message: Any) -> None:
    error = refusal(chat, messages=[message])
    assert str(error.param).startswith("messages.0") or error.param == "messages"
    assert refusal(chat, messages=[]).param == "messages"


def test_no_message_speaks_of_the_library() -> None:
    error = refusal(completion, temperature="hot")
    assert re.fullmatch(r"`temperature`: must be a valid number", str(error))
