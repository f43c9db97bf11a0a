"""Logs of the endpoint's processes: one JSON line for each request, and no client's text. Knows logging, not requests.

Lines go where Ray Serve's go: into the process' own file in `logs/serve` of Ray's session folder, which `ray logs`, the
dashboard and log shippers read. The console, and so a laptop's terminal, gets warnings only.
"""

import logging
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ray.serve.schema import LoggingConfig

from heliostat.errors import ConfigError, ModelError, RegistryError, ResourceError

# Errors shown of a chain of causes.
_MAX_CHAIN = 16
_PACKAGE = Path(__file__).parents[1]
_SERVE = logging.getLogger("ray.serve")
# Errors about what the operator wrote. Any other message may quote a request.
_MESSAGE_IS_SAFE = (ConfigError, ModelError, RegistryError, ResourceError)
_WITHHELD = "(message withheld)"
_SHORT = 3


# Of what is not ours: Serve's proxies and controller.
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def logging_config() -> LoggingConfig:
    """For the deployments: JSON lines, ours for each request instead of Serve's."""
    return LoggingConfig(encoding="JSON", log_level="INFO", enable_access_log=False)


def setup() -> None:
    """To be called once in each of the endpoint's processes, when Serve has set its own logging up.

    All loggers then write where Serve's writes, warnings only to the console, tracebacks without messages.
    """
    root = logging.getLogger()
    for handler in _SERVE.handlers:
        handler.addFilter(_WITHHOLD)
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
        root.addHandler(handler)
    logging.getLogger("heliostat").setLevel(logging.INFO)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLine:
    """What is logged of a request. Nothing here may be text that a client wrote."""

    request_id: str
    endpoint: str
    """The route, as the endpoint declares it; never the requested path."""
    status: int
    """HTTP's; 499 if the client went away. A stream that broke has its 200, and `error`."""
    duration_ms: float | None = None
    """None for what was refused before any model was asked."""
    key: str | None = None
    """The name of the API key."""
    model: str | None = None
    """None unless the endpoint serves it."""
    version: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reasons: tuple[str, ...] | None = None
    ttft_ms: float | None = None
    resumed: int | None = None
    """Times that it went on in another replica."""
    trace_id: str | None = None
    error: str | None = None
    """The `code` or `type` of the error; never its message."""


def log_request(line: RequestLine) -> None:
    """Write the line; what is None is left out."""
    values = {key: value for key, value in asdict(line).items() if value is not None}
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    # Serve would put its own request id, which may be the client's words, over ours.
    _SERVE.info("request", extra={"event": "request", "time": now, "skip_context_filter": True, **values})


def describe(error: BaseException) -> str:
    """What may be logged of an error: types, places in the code, and messages only where they quote no request."""
    return "\n".join(line for link, one in _chain(error) for line in (*link, *_lines(one)))


def _chain(error: BaseException) -> Iterator[tuple[tuple[str, ...], BaseException]]:
    """The error, those of a group, and what caused them, each after what links it to the one before.

    Each once: an error object that is raised again and again, as Ray's are, can come to be its own cause.
    """
    left: list[tuple[tuple[str, ...], BaseException]] = [((), error)]
    seen: set[int] = set()
    while left and len(seen) < _MAX_CHAIN:
        link, one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield link, one
        if cause := one.__cause__ or (None if one.__suppress_context__ else one.__context__):
            left.append((("caused by",), cause))
        if isinstance(one, BaseExceptionGroup):
            left += [(("of which",), member) for member in reversed(one.exceptions)]


def _lines(error: BaseException) -> Iterator[str]:
    yield f"{type(error).__name__}: {str(error) if _is_safe(error) else _WITHHELD}"
    frames = traceback.extract_tb(error.__traceback__)
    # Our own frames, and the one that raised.
    shown = [frame for frame in frames if frame is frames[-1] or _PACKAGE in Path(frame.filename).parents]
    yield from (f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in shown)


def _is_safe(error: BaseException) -> bool:
    return type(error) in _MESSAGE_IS_SAFE


class _Withhold(logging.Filter):
    """Puts `describe` in the place of tracebacks, and takes out of the log's message what it quotes of the errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1]:
            record.exc_text = describe(record.exc_info[1])
            record.msg, record.args = _without_quotes(record.getMessage(), record.exc_info[1]), ()
        return True


def _without_quotes(text: str, error: BaseException) -> str:
    """As asyncio quotes the error of a task that nobody waited for."""
    for _, one in _chain(error):
        if not _is_safe(one):
            text = text.replace(repr(one), type(one).__name__)
            # A message of a few characters would be found everywhere, and tells nothing.
            text = text.replace(str(one), _WITHHELD) if len(str(one)) > _SHORT else text
    return text


_WITHHOLD = _Withhold()
