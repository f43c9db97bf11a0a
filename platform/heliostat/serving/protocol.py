"""The OpenAI wire forms of requests and errors, checked strictly. Knows nothing of engines or Ray.

A parameter that is not honoured is refused by its name, unless its value asks for nothing. No message quotes a prompt.
Forms: https://platform.openai.com/docs/api-reference (completions, chat, models, streaming, errors).
"""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from heliostat.errors import HeliostatError
from heliostat.serving.sampling import DecodingDefaults, SamplingParams

MAX_N = 16
# Completions of one request: its prompts times `n`.
MAX_COMPLETIONS = 128
DEFAULT_MAX_TOKENS = 16
Prompt = str | list[int]

# Parameters of OpenAI's that are not honoured, and the values (beside null) that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "seed": (),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# Labels for the caller's own bookkeeping: they change nothing about the answer.
_IGNORED = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user"})
_EMPTY_IN_ANSWERS = frozenset({"annotations", "audio", "function_call", "name", "refusal", "tool_calls"})


class ApiError(HeliostatError):
    """An error with its HTTP status, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON body: {"error": {message, type, param, code}}."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What completions and chat completions have in common. `top_k` is an extension, as other open servers have it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=MAX_N)
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=4)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise PydanticCustomError("not_an_object", "the body must be a JSON object")
        if not _is_unicode(values):
            raise PydanticCustomError("not_unicode", "the body has half a surrogate pair, which is no character")
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

    def sampling(self, defaults: DecodingDefaults, max_tokens: int) -> SamplingParams:
        """The settings asked for; what is left open comes from `defaults`. `stop: []` asks for no stop strings."""
        return defaults.params(
            max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, stop=self.stop
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt` is kept as a list of texts and token lists, whatever form it came in."""

    prompt: list[Prompt]

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts_as_list(cls, value: Any) -> Any:
        prompts = [value] if isinstance(value, str) or _is_token_list(value) else value
        if not isinstance(prompts, list) or not all(isinstance(p, str) or _is_token_list(p) for p in prompts):
            raise PydanticCustomError(
                "invalid_prompt", "must be a string, a list of strings, a list of token ids, or a list of such lists"
            )
        if not 1 <= len(prompts) <= MAX_COMPLETIONS:
            raise PydanticCustomError("invalid_prompt", f"must be 1 to {MAX_COMPLETIONS} prompts")
        return prompts

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        if len(self.prompt) * (self.n or 1) > MAX_COMPLETIONS:
            raise PydanticCustomError(
                "invalid_value", f"prompts times `n` may be at most {MAX_COMPLETIONS}", {"param": "n"}
            )
        return self

    def token_limit(self, defaults: DecodingDefaults, room: int) -> int:
        """Tokens to generate at most: as asked, else the model's own default or OpenAI's 16, within the `room` left."""
        return self.max_tokens or max(1, min(defaults.max_tokens or DEFAULT_MAX_TOKENS, room))


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
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "invalid_value",
                "`max_tokens` and `max_completion_tokens` differ; give one",
                {"param": "max_completion_tokens"},
            )
        return self

    def token_limit(self, defaults: DecodingDefaults, room: int) -> int:
        """Tokens to generate at most: as asked, else the model's own default within the `room` left, else all of it."""
        asked = self.max_completion_tokens or self.max_tokens
        return asked or max(1, min(defaults.max_tokens or room, room))


def _is_unicode(values: dict[str, Any]) -> bool:
    """JSON can hold what no text can; tokenizers and UTF-8 answers would fail on it."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether `value` is null or neutral. The types count: `logprobs: 0` asks for something, `false` does not."""
    return value is None or any(value == off and type(value) is type(off) for off in neutral)


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def explain(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's validation errors as an error of the API, without the value that was wrong."""
    error = errors[0]
    place = [str(part) for part in error["loc"] if part != "body"]
    param = error.get("ctx", {}).get("param") or ".".join(place) or None
    if error["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter `{param}`", param=param, code="unknown_parameter")
    if error["type"] == "missing":
        name = param or "body"
        return ApiError(400, f"`{name}` is missing", param=param, code="missing_required_parameter")
    message = re.sub(r"^Input should", "must", error["msg"])
    code = "unsupported_parameter" if error["type"] == "unsupported_parameter" else "invalid_value"
    text = message if "ctx" in error and "param" in error["ctx"] else f"`{param}`: {message}"
    return ApiError(400, text if param else message, param=param, code=code)


def model_not_found(name: str) -> ApiError:
    """The answer to a request for a model that is not served here."""
    shown = name[:100]
    return ApiError(404, f"the model `{shown}` does not exist; see /v1/models", param="model", code="model_not_found")
