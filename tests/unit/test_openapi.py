"""The OpenAPI document: what it says of requests and answers is what the endpoint takes and gives."""

from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import ValidationError

from heliostat import __version__
from heliostat.models import base
from heliostat.serving.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from tests import tiny
from tests.service import Running, running

OPERATIONS = {
    "list_models": ("get", "/v1/models", "ModelList"),
    "get_model": ("get", "/v1/models/{name}", "Model"),
    "get_decoding": ("get", "/v1/decoding", "Decoding"),
    "create_completion": ("post", "/v1/completions", "Completion"),
    "create_chat_completion": ("post", "/v1/chat/completions", "ChatCompletion"),
    "classify": ("post", "/classify", "Classification"),
}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
REQUESTS: dict[str, type[GenerationRequest]] = {
    "CompletionRequest": CompletionRequest,
    "ChatCompletionRequest": ChatCompletionRequest,
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = base.load_for_inference(str(tiny.write_model(tmp_path_factory.mktemp("model"), "gpt2")))
    with running(model) as found:
        yield found


@pytest.fixture(scope="module")
def document(service: Running) -> Any:
    return service.get("/../openapi.json").json()


def validator(document: Any, name: str) -> jsonschema.Draft202012Validator:
    """Of one of the document's schemas, with all that they refer to."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return jsonschema.Draft202012Validator(schema)


def references(value: Any) -> Iterator[str]:
    """All that anything in the document refers to."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def test_every_route_is_there_with_its_answers(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    assert document["info"] == {"title": "Heliostat", "version": __version__}
    found = {
        operation["operationId"]: (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert found.keys() == OPERATIONS.keys()
    for name, (method, path, schema) in OPERATIONS.items():
        assert found[name][:2] == (method, path)
        responses = found[name][2]["responses"]
        assert "422" not in responses, "errors have OpenAI's statuses"
        assert {"200", "400", "401", "403", "404", "408", "413", "429", "503"} <= responses.keys()
        content = responses["200"]["content"]
        assert content["application/json"]["schema"]["$ref"].endswith(f"/{schema}")
        assert ("text/event-stream" in content) == name.startswith("create_")
        for status, response in responses.items():
            assert response["description"]
            if status != "200":
                assert response["content"]["application/json"]["schema"]["$ref"].endswith("/Error")


def test_the_document_holds_together(document: Any) -> None:
    for reference in set(references(document)):
        place = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    for name, schema in document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert "HTTPValidation" not in name
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{}, {"key": []}], "a key is needed where the endpoint has keys"


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("Completion", "/completions", {"prompt": "hello"}),
        ("Completion", "/completions", {"prompt": ["hello", "old"], "n": 2, "logprobs": 2, "echo": True}),
        ("Completion", "/completions", {"prompt": [5, 6], "max_tokens": 0, "echo": True}),
        ("ChatCompletion", "/chat/completions", CHAT),
        ("ChatCompletion", "/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}),
        ("Error", "/completions", {"prompt": "hello", "tools": [1]}),
        ("Error", "/completions", {"prompt": "hello", "model": "other"}),
        ("Error", "/completions", {}),
        ("Error", "/nowhere", {}),
    ],
)
def test_answers_are_as_described(service: Running, document: Any, name: str, path: str, body: Any) -> None:
    answer = service.post(path, **body)
    assert (answer.status_code == 200) == (name != "Error")
    validator(document, name).validate(answer.json())


def test_models_and_decoding_are_as_described(service: Running, document: Any) -> None:
    validator(document, "ModelList").validate(service.get("/models").json())
    validator(document, "Model").validate(service.get("/models/tiny").json())
    validator(document, "Decoding").validate(service.get("/decoding", params={"model": "tiny"}).json())


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("CompletionRequest", {"model": "m", "prompt": "hello"}),
        ("CompletionRequest", {"model": "m", "prompt": ["a", "b"], "stop": "x", "logit_bias": {"5": 1}}),
        ("CompletionRequest", {"model": "m", "prompt": [1, 2], "stop": ["x", "y"], "logprobs": 3, "n": None}),
        ("CompletionRequest", {"model": "m", "prompt": [[1], [2, 3]], "stream": True, "seed": -1}),
        ("ChatCompletionRequest", {"model": "m", **CHAT, "top_logprobs": 2, "logprobs": True}),
        ("ChatCompletionRequest", {"model": "m", "messages": [{"role": "system", "content": "a", "name": "b"}]}),
    ],
)
def test_requests_that_are_taken_are_described(document: Any, name: str, body: Any) -> None:
    REQUESTS[name].model_validate(body)
    validator(document, name).validate(body)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("CompletionRequest", {"model": "m"}),
        ("CompletionRequest", {"model": "m", "prompt": {}}),
        ("CompletionRequest", {"model": "m", "prompt": "a", "temperature": 3}),
        ("CompletionRequest", {"model": "m", "prompt": "a", "stop": ["a"] * 5}),
        ("CompletionRequest", {"model": "m", "prompt": "a", "unknown": 1}),
        ("ChatCompletionRequest", {"model": "m", "messages": []}),
        ("ChatCompletionRequest", {"model": "m", "messages": [{"role": "robot", "content": "a"}]}),
    ],
)
def test_requests_that_are_refused_are_described_as_wrong(document: Any, name: str, body: Any) -> None:
    with pytest.raises(ValidationError):
        REQUESTS[name].model_validate(body)
    assert not validator(document, name).is_valid(body)
