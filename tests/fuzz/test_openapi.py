"""Requests that schemathesis makes up from the endpoint's own OpenAPI document (the extra `heliostat[clients]`)."""

import json
from collections.abc import Callable
from typing import Any

import pytest

jsonschema = pytest.importorskip("jsonschema")
schemathesis = pytest.importorskip("schemathesis", reason="needs the extra: pip install heliostat[clients]")
hypothesis = pytest.importorskip("hypothesis", reason="needs the extra: pip install heliostat[clients]")

# Operation -> requests of each mode; 2,000 and more in all.
REQUESTS = {
    "create_completion": 550,
    "create_chat_completion": 450,
    "get_model": 40,
    "get_decoding": 40,
    "list_models": 1,
}
# By the document, or not. Any text is a model's name by the document, and the list takes nothing.
MODES = ["positive", "negative"]
ALWAYS_RIGHT = ["get_model", "list_models"]
CASES = [
    (operation, mode) for operation in REQUESTS for mode in MODES if mode == "positive" or operation not in ALWAYS_RIGHT
]
# Of a stream, the tool reads 20 events where nothing else is said.
WHOLE_STREAM = 10**6
# What is wrong by the document must be refused, too; that is checked here, since schemathesis' own check takes values
# for wrong that are not, where a schema has alternatives.
CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]


@pytest.fixture(scope="module")
def schema(url: str) -> Any:
    """The document, as schemathesis reads it."""
    found = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found.config.max_stream_events = WHOLE_STREAM
    return found


def asking(cases: Any, count: int, ask: Callable[[Any], None]) -> None:
    """Let `ask` send `count` of the cases; half of those that name a model name the one that there is."""

    settings = hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def run(case: Any, known: bool) -> None:
        if known and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        ask(case)

    hypothesis.seed(20)(settings(hypothesis.given(case=cases, known=hypothesis.strategies.booleans())(run)))()


def check_stream(response: Any) -> None:
    """Events of JSON, the last but [DONE] being no error."""
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        assert set(json.loads(event.removeprefix("data: "))) >= {"id", "object", "created", "model", "choices"}


def check_error(response: Any) -> None:
    """It has OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)


def test_there_are_enough_requests() -> None:
    assert sum(REQUESTS[operation] for operation, _ in CASES) >= 2000


@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_no_request_fails_the_server_and_every_answer_is_as_documented(schema: Any, operation: str, mode: str) -> None:
    found = schema.find_operation_by_id(operation)
    checks = [getattr(schemathesis.checks, name) for name in CHECKS]
    document = schema.raw_schema
    statuses: list[int] = []

    def ask(case: Any) -> None:
        response = case.call()
        statuses.append(response.status_code)
        streamed = response.headers["content-type"][0].startswith("text/event-stream")
        case.validate_response(response, checks=checks[:-1] if streamed else checks)
        if response.status_code >= 400:
            check_error(response)
        elif streamed:
            check_stream(response)
        if response.status_code < 400 and operation.startswith("create_"):
            wanted = found.definition.raw["requestBody"]["content"]["application/json"]["schema"]
            body = json.loads(response.request.body)
            jsonschema.Draft202012Validator({**wanted, "components": document["components"]}).validate(body)

    asking(found.as_strategy(generation_mode=schemathesis.GenerationMode(mode)), REQUESTS[operation], ask)
    assert len(statuses) >= REQUESTS[operation], "all were sent"
    assert operation == "list_models" or any(status >= 400 for status in statuses)
    assert mode == "negative" or operation.startswith("get_") or 200 in statuses
