"""The OpenAPI document of the endpoint: FastAPI's, with the answers that are really given. Knows no models.

FastAPI derives the requests from the models in protocol.py. It cannot know that errors have OpenAI's form, that none
has status 422, or what streams look like.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from heliostat import __version__

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "additionalProperties": {"type": "integer", "minimum": 0},
}
_CARD = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "heliostat": {"type": "object"},
    },
}
_LISTING = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
    },
}
_DECODING = {
    "type": "object",
    "required": ["model", "version", "defaults", "origin", "greedy"],
    "properties": {
        "model": {"type": "string"},
        "version": {"type": ["string", "null"]},
        "defaults": {"type": "object"},
        "origin": {"type": "object", "additionalProperties": {"type": "string"}},
        "greedy": {"type": "boolean"},
    },
}


def _answer(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """An answer of `kind` (its `object`), whose choices hold `content`."""
    choice = {
        "type": "object",
        "required": ["index", "finish_reason", "logprobs", *content],
        "properties": {
            "index": {"type": "integer"},
            "finish_reason": {"enum": ["stop", "length"]},
            "logprobs": {"type": ["object", "null"]},
            **content,
        },
    }
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": choice},
            "usage": {"$ref": "#/components/schemas/Usage"},
        },
    }


_CLASSIFICATION = {
    "type": "object",
    "required": ["id", "object", "created", "model", "data", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "list"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "label", "probs", "num_classes"],
                "properties": {
                    "index": {"type": "integer"},
                    "label": {"type": "string"},
                    "probs": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}},
                    "num_classes": {"type": "integer"},
                },
            },
        },
        "usage": {"$ref": "#/components/schemas/Usage"},
    },
}
_SCHEMAS = {
    "Error": _ERROR,
    "Usage": _USAGE,
    "Model": _CARD,
    "ModelList": _LISTING,
    "Decoding": _DECODING,
    "Completion": _answer("text_completion", {"text": {"type": "string"}}),
    "ChatCompletion": _answer("chat.completion", {"message": {"type": "object"}}),
    "Classification": _CLASSIFICATION,
}
_ANSWERS = {
    "list_models": "ModelList",
    "get_model": "Model",
    "get_decoding": "Decoding",
    "create_completion": "Completion",
    "create_chat_completion": "ChatCompletion",
    "classify": "Classification",
}
_ERRORS = {
    "400": "the request is wrong",
    "401": "an API key is needed, or this one is not valid",
    "403": "the key may not use the model",
    "404": "there is no such model",
    "408": "the request took too long",
    "413": "the body is too long",
    "429": "the key is at one of its limits; see Retry-After",
    "503": "all replicas are busy or failing; see Retry-After",
}


def describe(app: FastAPI) -> None:
    """Make `app.openapi()` tell what is true of its routes; each needs an `operation_id` of those above."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to change the document


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title="Heliostat", version=__version__, routes=app.routes, openapi_version="3.1.0")
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas.update(_SCHEMAS)
    found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    found["security"] = [{}, {"key": []}]
    for methods in found["paths"].values():
        for operation in methods.values():
            operation["responses"] = _responses(operation["operationId"])
    return found


def _responses(operation: str) -> dict[str, Any]:
    schema = {"schema": {"$ref": f"#/components/schemas/{_ANSWERS[operation]}"}}
    content: dict[str, Any] = {"application/json": schema}
    if operation.startswith("create_"):
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    errors = {status: {"description": text, "content": error} for status, text in _ERRORS.items()}
    return {"200": {"description": "the answer", "content": content}, **errors}
