"""What the endpoint's processes log, through Ray Serve's own formatter, and what they keep to themselves."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ray._common.formatters import JSONFormatter
from ray.serve._private.logging_utils import ServeLogAttributeRemovalFilter

from heliostat import config
from heliostat.errors import ConfigError, HeliostatError, UserError
from heliostat.serving import logs
from heliostat.serving.config import EndpointArgs
from heliostat.serving.logs import RequestLine, log_request

CANARY = "canary-51c9 said the client"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Serve's logger writes JSON here, and so does everything else after `setup`."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JSONFormatter())
    handler.addFilter(ServeLogAttributeRemovalFilter())
    serve, root = logging.getLogger("ray.serve"), logging.getLogger()
    before = (serve.handlers[:], root.handlers[:], serve.level)
    serve.handlers[:] = [handler]
    serve.setLevel(logging.INFO)
    logs.setup()
    handler.setLevel(logging.INFO)
    yield text
    serve.handlers[:], root.handlers[:] = before[:2]
    serve.setLevel(before[2])


def parsed(text: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.getvalue().splitlines()]


def test_a_request_is_one_line_of_json(lines: io.StringIO) -> None:
    before = datetime.now(UTC)
    line = RequestLine(
        request_id="r-1",
        endpoint="/v1/chat/completions",
        status=200,
        duration_ms=512.5,
        key="team",
        model="cron",
        version="3",
        prompt_tokens=7,
        completion_tokens=5,
        finish_reasons=("stop", "length"),
        ttft_ms=20.25,
        resumed=0,
    )
    log_request(line)
    (logged,) = parsed(lines)
    assert (
        logged.items() >= {"levelname": "INFO", "message": "request", "event": "request", "request_id": "r-1"}.items()
    )
    assert (
        logged.items() >= {"status": 200, "duration_ms": 512.5, "key": "team", "model": "cron", "version": "3"}.items()
    )
    assert logged.items() >= {"prompt_tokens": 7, "completion_tokens": 5, "ttft_ms": 20.25, "resumed": 0}.items()
    assert logged["finish_reasons"] == ["stop", "length"]
    assert before.replace(microsecond=0) <= datetime.fromisoformat(str(logged["time"])) <= datetime.now(UTC)
    assert {"error", "skip_context_filter"}.isdisjoint(logged)


def test_what_is_not_known_is_left_out(lines: io.StringIO) -> None:
    log_request(RequestLine(request_id="r", endpoint="/v1/completions", status=401, duration_ms=1.0, error="no_key"))
    (logged,) = parsed(lines)
    assert logged["error"] == "no_key"
    assert {"key", "model", "version", "prompt_tokens", "completion_tokens", "ttft_ms"}.isdisjoint(logged)


def test_a_line_cannot_be_forged(lines: io.StringIO) -> None:
    forged = 'x"}\n{"event": "request"'
    log_request(RequestLine(request_id=forged, endpoint="/v1/completions", status=200, duration_ms=1.0))
    (logged,) = parsed(lines)
    assert logged["request_id"] == forged


def fail_on(text: str) -> None:
    try:
        raise KeyError(text)
    except KeyError as error:
        raise ValueError(f"bad {text}") from error


@pytest.mark.parametrize("name", ["ray.serve", "heliostat.serving.api", "asyncio", "uvicorn.error"])
def test_tracebacks_hold_types_and_places_but_no_messages(lines: io.StringIO, name: str) -> None:
    try:
        fail_on(CANARY)
    except ValueError:
        logging.getLogger(name).exception("it failed")
    (logged,) = parsed(lines)
    assert logged["message"] == "it failed"
    assert CANARY not in lines.getvalue()
    text = str(logged["exc_text"]).splitlines()
    assert text[0] == "ValueError: (message withheld)"
    assert f"{__file__}:" in text[1]
    assert text[1].endswith(" in fail_on")
    assert text[2:4] == ["caused by", "KeyError: (message withheld)"]


def test_a_log_message_does_not_quote_the_error_either(lines: io.StringIO) -> None:
    try:
        fail_on(CANARY)
    except ValueError as error:
        logging.getLogger("heliostat").exception("%s, in full %r, by %r, 100 %%", error, error, error.__cause__)
    (logged,) = parsed(lines)
    assert logged["message"] == "(message withheld), in full ValueError, by KeyError, 100 %"


def test_every_error_of_a_group_is_described() -> None:
    group = ExceptionGroup(CANARY, [ValueError(CANARY), ExceptionGroup(CANARY, [KeyError(CANARY)])])
    described = logs.describe(group)
    assert CANARY not in described
    assert [line for line in described.splitlines() if line.endswith("(message withheld)")] == [
        "ExceptionGroup: (message withheld)",
        "ValueError: (message withheld)",
        "ExceptionGroup: (message withheld)",
        "KeyError: (message withheld)",
    ]


def test_frames_of_ours_are_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as failed:
        config.load(EndpointArgs, tmp_path / "nowhere.yaml")
    described = logs.describe(failed.value)
    assert "nowhere.yaml" in described.splitlines()[0], "the message is about the operator's own input"
    assert "heliostat/config.py:" in described


@pytest.mark.parametrize("kind", [HeliostatError, UserError, type("FromARequest", (ConfigError,), {})])
def test_only_errors_about_the_operators_input_keep_their_message(kind: type[Exception]) -> None:
    assert logs.describe(kind(CANARY)) == f"{kind.__name__}: (message withheld)"
    assert logs.describe(ConfigError("model is missing")) == "ConfigError: model is missing"


def test_the_console_gets_warnings_only() -> None:
    console, serve, root = io.StringIO(), logging.getLogger("ray.serve"), logging.getLogger()
    before = (serve.handlers[:], root.handlers[:])
    serve.handlers[:] = [logging.StreamHandler(console)]
    try:
        logs.setup()
        logs.setup()
        log_request(RequestLine(request_id="r", endpoint="/v1/completions", status=200, duration_ms=1.0))
        logging.getLogger("heliostat.serving").info("quiet")
        logging.getLogger("heliostat.serving").warning("loud")
    finally:
        serve.handlers[:], root.handlers[:] = before
    assert console.getvalue() == "loud\n"
