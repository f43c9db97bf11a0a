"""The OpenAI wire forms of requests and errors, checked strictly. Knows nothing of engines or Ray.

A parameter that is not honoured is refused by its name, unless its value asks for nothing. No message quotes a prompt.
Forms: https://platform.openai.com/docs/api-reference (completions, chat, models, streaming, errors).
"""

import json
import math
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from heliostat.errors import HeliostatError
from heliostat.serving.sampling import MAX_BEAMS, MAX_LOGIT_BIASES, MAX_LOGPROBS

MAX_N = 16
# Completions of one request: its prompts times `n` or `best_of`.
MAX_COMPLETIONS = 128
DEFAULT_MAX_TOKENS = 16
Prompt = str | list[int]

# Parameters of OpenAI's that are not honoured, and the values (beside null) that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_INT32 = 2**31 - 1
# The names that an error may repeat, and places in lists.
_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
# JSON objects have text keys only: OpenAI's token ids are numbers in quotes.
TokenId = Annotated[int, Field(ge=0, le=_INT32, strict=False)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
_PROMPT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_COMPLETIONS},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
            "minItems": 1,
            "maxItems": MAX_COMPLETIONS,
        },
    ]
}
_STOP_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": 256},
        {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 256}, "maxItems": 4},
        {"type": "null"},
    ]
}
# Labels for the caller's own bookkeeping: they change nothing about the answer.
_IGNORED = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user"})
_EMPTY_IN_ANSWERS = frozenset({"annotations", "audio", "function_call", "name", "refusal", "tool_calls"})


class ApiError(HeliostatError):
    """An error with its HTTP status, in OpenAI's form. `retry_after`: seconds after which a client may try again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """OpenAI's `type` of the error."""
        return _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The JSON body: {"error": {message, type, param, code}}."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, at least one, where there is a time to wait."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What completions and chat completions have in common.

    What OpenAI does not have is named as other open servers (vLLM) and transformers name it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=0, le=_INT32)
    min_tokens: int | None = Field(None, ge=0, le=_INT32)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=_INT32)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    typical_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=_INT32)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        None, max_length=MAX_LOGIT_BIASES
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    num_beams: int | None = Field(None, ge=1, le=MAX_BEAMS)
    length_penalty: float | None = Field(None, ge=-10, le=10, allow_inf_nan=False)
    early_stopping: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    stop: Annotated[list[StopString] | None, Field(max_length=4), WithJsonSchema(_STOP_SCHEMA)] = None
    stop_token_ids: list[Annotated[int, Field(ge=0, le=_INT32)]] | None = Field(None, max_length=64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        _check_body(values)
        for name in sorted(_UNSUPPORTED.keys() & values.keys()):
            if not _asks_for_nothing(values[name], _UNSUPPORTED[name]):
                raise PydanticCustomError("unsupported_parameter", "`{param}` is not supported here", {"param": name})
        dropped = _UNSUPPORTED.keys() | _IGNORED
        return {name: value for name, value in values.items() if name not in dropped}

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_value", "`stream_options` needs `stream: true`", {"param": "stream_options"}
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def candidates(self) -> int:
        """Completions to generate for each prompt."""
        return self.n or 1

    def settings(self) -> dict[str, Any]:
        """The decoding settings that the request brings itself, by the names of SamplingParams and transformers."""
        return self.model_dump(include=_SETTINGS, exclude_none=True)


_SETTINGS = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "logit_bias",
    "seed",
    "min_tokens",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "stop",
    "stop_token_ids",
}


def prompts_as_list(value: Any) -> list[Any]:
    """One prompt or several, texts or lists of token ids, as a list.

    Raises:
        PydanticCustomError: it is neither.
    """
    prompts = [value] if isinstance(value, str) or _is_token_list(value) else value
    if not isinstance(prompts, list) or not all(isinstance(p, str) or _is_token_list(p) for p in prompts):
        raise PydanticCustomError(
            "invalid_prompt", "must be a string, a list of strings, a list of token ids, or a list of such lists"
        )
    if not 1 <= len(prompts) <= MAX_COMPLETIONS:
        raise PydanticCustomError("invalid_prompt", f"must be 1 to {MAX_COMPLETIONS} prompts")
    return prompts


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt` is kept as a list of texts and token lists, whatever form it came in."""

    prompt: Annotated[list[Prompt], WithJsonSchema(_PROMPT_SCHEMA)]
    echo: bool | None = None
    """Give the prompt back before the completion; with `logprobs`, its tokens' probabilities too."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_N)

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts_as_list(cls, value: Any) -> Any:
        return prompts_as_list(value)

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        if len(self.prompt) * self.candidates > MAX_COMPLETIONS:
            raise PydanticCustomError(
                "invalid_value", f"prompts times `n` may be at most {MAX_COMPLETIONS}", {"param": "n"}
            )
        return self

    @model_validator(mode="after")
    def _best_of_fits(self) -> Self:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise PydanticCustomError("invalid_value", "`best_of` must be at least `n`", {"param": "best_of"})
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise PydanticCustomError("invalid_value", "`best_of` above `n` cannot be streamed", {"param": "best_of"})
        return self

    @model_validator(mode="after")
    def _generates_something(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("invalid_value", "`max_tokens` 0 needs `echo`", {"param": "max_tokens"})
        return self

    @property
    def candidates(self) -> int:
        return self.best_of or self.n or 1

    @property
    def top_tokens(self) -> int | None:
        """Alternatives to give for each token; None: no probabilities at all."""
        return self.logprobs

    def token_limit(self, default: int | None, room: int) -> int:
        """Tokens to generate at most: as asked, else the model's own default or OpenAI's 16, within the `room` left."""
        if self.max_tokens is not None:
            return self.max_tokens
        return max(1, min(default or DEFAULT_MAX_TOKENS, room))


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. Roles and names are of fixed form, since templates write them beside control tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: Any) -> Any:
        """Clients send answers back as they got them, with fields that hold nothing."""
        if not isinstance(values, dict):
            return values
        return {
            name: value for name, value in values.items() if name not in _EMPTY_IN_ANSWERS or value not in (None, [])
        }

    def as_template_input(self) -> dict[str, str]:
        """The form that chat templates know: one text, and `system` for OpenAI's newer `developer`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=_INT32)
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "invalid_value",
                "`max_tokens` and `max_completion_tokens` differ; give one",
                {"param": "max_completion_tokens"},
            )
        return self

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError(
                "invalid_value", "`top_logprobs` needs `logprobs: true`", {"param": "top_logprobs"}
            )
        return self

    @property
    def top_tokens(self) -> int | None:
        """Alternatives to give for each token; None: no probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def token_limit(self, default: int | None, room: int) -> int:
        """Tokens to generate at most: as asked, else the model's own default within the `room` left, else all of it."""
        asked = self.max_completion_tokens or self.max_tokens
        return asked or max(1, min(default or room, room))


class ClassificationRequest(BaseModel):
    """POST /classify, in vLLM's form. `input` is kept as a list of texts and token lists, whatever form it came in."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input: Annotated[list[Prompt], WithJsonSchema(_PROMPT_SCHEMA)]
    # What an exchange asks of any request.
    stream: ClassVar[bool] = False
    include_usage: ClassVar[bool] = False
    n: ClassVar[int] = 1
    candidates: ClassVar[int] = 1

    @model_validator(mode="before")
    @classmethod
    def _drop_bookkeeping(cls, values: Any) -> Any:
        _check_body(values)
        return {name: value for name, value in values.items() if name not in _IGNORED}

    @field_validator("input", mode="before")
    @classmethod
    def _texts_as_list(cls, value: Any) -> Any:
        return prompts_as_list(value)


AnyRequest = CompletionRequest | ChatCompletionRequest | ClassificationRequest


def _check_body(values: Any) -> None:
    """Refuse what is no object, and what JSON can hold but no text: tokenizers and UTF-8 answers would fail on it."""
    if not isinstance(values, dict):
        raise PydanticCustomError("not_an_object", "the body must be a JSON object")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        message = "the body has half a surrogate pair, which is no character"
        raise PydanticCustomError("not_unicode", message) from error
    except RecursionError as error:  # the parser had a little more of the stack left
        raise PydanticCustomError("nested", "the body is nested too deep") from error


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether `value` is null or neutral. The types count: `logprobs: 0` asks for something, `false` does not."""
    return value is None or any(value == off and type(value) is type(off) for off in neutral)


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def explain(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's validation errors as an error of the API, without the value that was wrong."""
    error = errors[0]
    context = error.get("ctx", {})
    param = context.get("param") or _named(error["loc"])
    if error["type"] == "json_invalid":
        return invalid_json()
    if error["type"] == "extra_forbidden":
        message = f"unknown parameter `{param}`" if param else "unknown parameter"
        return ApiError(400, message, param=param, code="unknown_parameter")
    if error["type"] == "missing":
        name = param or "body"
        return ApiError(400, f"`{name}` is missing", param=param, code="missing_required_parameter")
    message = re.sub(r"^Input should", "must", error["msg"])
    code = "unsupported_parameter" if error["type"] == "unsupported_parameter" else "invalid_value"
    text = message if param is None or "param" in context else f"`{param}`: {message}"
    return ApiError(400, text, param=param, code=code)


def _named(place: Sequence[str | int]) -> str | None:
    """The parameter at pydantic's `place`, as far as it has a parameter's form: what has not is a client's text."""
    # Before this mark stands the key itself, which is wrong.
    names = place[:-2] if place and place[-1] == "[key]" else place
    parts = [str(name) for name in names if name not in ("body", "query", "path")]
    return ".".join(takewhile(_NAME.fullmatch, parts)) or None


def invalid_json() -> ApiError:
    """The answer to a body that cannot be parsed."""
    return ApiError(400, "the body is not valid JSON", code="invalid_json")


def model_not_found(name: str) -> ApiError:
    """The answer to a request for a model that is not served here."""
    shown = name[:100]
    return ApiError(404, f"the model `{shown}` does not exist; see /v1/models", param="model", code="model_not_found")
