"""Requests are read as OpenAI's clients write them; what is not honoured is refused by name, and nothing is quoted."""

import re
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

SECRET = "my secret prompt"


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
    ("suffix", SECRET),
    ("response_format", {"type": "json_object"}),
    ("tools", [{"type": "function"}]),
    ("store", True),
    ("reasoning_effort", "high"),
    ("modalities", ["audio"]),
]


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(("param", "value"), UNSUPPORTED)
def test_parameters_that_are_not_honoured_are_refused_by_name(make: Any, param: str, value: Any) -> None:
    error = refusal(make, **{param: value})
    assert (error.status, error.param, error.code) == (400, param, "unsupported_parameter")
    assert param in str(error)


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(
    ("param", "value"),
    [
        *[(param, None) for param, _ in UNSUPPORTED],
        *[(param, None) for param in ("seed", "logprobs", "temperature", "stop", "logit_bias", "n", "num_beams")],
        ("user", SECRET),
        ("metadata", {"a": "b"}),
        ("response_format", {"type": "text"}),
        ("tools", []),
        ("store", False),
        ("n", 1),
    ],
)
def test_values_that_ask_for_nothing_are_accepted(make: Any, param: str, value: Any) -> None:
    request = make(**{param: value})
    assert request.settings() == {}
    assert request.top_tokens is None
    assert request.candidates == 1


SETTINGS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "typical_p": 0.9,
    "presence_penalty": -2,
    "frequency_penalty": 1.5,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "logit_bias": {"5": -100, "7": 1.5},
    "seed": -1,
    "min_tokens": 2,
    "num_beams": 4,
    "length_penalty": 0.5,
    "early_stopping": True,
    "stop": "\n",
    "stop_token_ids": [3],
}


@pytest.mark.parametrize("make", [completion, chat])
def test_every_decoding_setting_reaches_the_model(make: Any) -> None:
    assert make(**SETTINGS).settings() == {**SETTINGS, "stop": ["\n"], "logit_bias": {5: -100, 7: 1.5}}


WRONG: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.1, "0.5", float("nan"), True, []],
    "top_p": [0, 1.1, "1", float("nan")],
    "top_k": [-1, 1.5, "5", 2**31],
    "min_p": [-0.1, 1.1],
    "typical_p": [0, 2],
    "presence_penalty": [-2.1, 2.1, "1", float("inf")],
    "frequency_penalty": [3, True],
    "repetition_penalty": [0, -1, float("nan")],
    "no_repeat_ngram_size": [-1, 1.5],
    "logit_bias": [{"5": 101}, {"x": 1}, {"-1": 1}, {"5": "1"}, {"5": None}, [1], {str(i): 1 for i in range(1025)}],
    "seed": [1.5, "1", 2**63, -(2**63) - 1, True],
    "min_tokens": [-1, 1.5],
    "num_beams": [0, 33, 1.5],
    "length_penalty": [float("inf"), "1"],
    "early_stopping": ["never", 1],
    "max_tokens": [-5, 1.5, "10", True, 2**31],
    "n": [0, MAX_N + 1, 1.5],
    "stop": ["", [""], ["a"] * 5, [1], {"a": 1}, "x" * 257],
    "stop_token_ids": [[-1], ["a"], 3, [0] * 65],
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


def test_how_many_tokens_are_generated() -> None:
    assert completion().token_limit(None, room=100) == 16
    assert completion().token_limit(40, room=100) == 40
    assert completion().token_limit(40, room=10) == 10
    assert completion(max_tokens=30).token_limit(40, room=10) == 30
    assert completion(max_tokens=0, echo=True).token_limit(40, room=10) == 0
    assert chat().token_limit(None, room=100) == 100
    assert chat().token_limit(40, room=100) == 40
    assert chat(max_tokens=5).token_limit(40, room=100) == 5
    assert chat(max_completion_tokens=5).token_limit(40, room=100) == 5
    # No room at all: the engine refuses the prompt for its length.
    assert chat().token_limit(None, room=-3) == 1
    assert refusal(chat, max_tokens=5, max_completion_tokens=6).param == "max_completion_tokens"
    assert refusal(chat, max_tokens=0).param == "max_tokens"
    assert refusal(completion, max_tokens=0).param == "max_tokens"


def test_log_probabilities() -> None:
    assert completion(logprobs=0).top_tokens == 0
    assert completion(logprobs=5).top_tokens == 5
    assert chat(logprobs=True).top_tokens == 0
    assert chat(logprobs=True, top_logprobs=7).top_tokens == 7
    assert chat(logprobs=False).top_tokens is None
    assert refusal(completion, logprobs=21).param == "logprobs"
    assert refusal(completion, logprobs=True).param == "logprobs"
    assert refusal(chat, logprobs=3).param == "logprobs"
    assert refusal(chat, top_logprobs=3).param == "top_logprobs"
    assert refusal(completion, top_logprobs=3).code == "unknown_parameter"


def test_candidates_are_at_least_those_asked_for() -> None:
    assert completion(n=3).candidates == 3
    assert completion(n=2, best_of=5).candidates == 5
    assert refusal(completion, n=3, best_of=2).param == "best_of"
    assert refusal(completion, best_of=2, stream=True).param == "best_of"
    assert refusal(chat, best_of=2).code == "unknown_parameter"


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
