"""OpenTelemetry traces of requests, if wanted. Knows spans and where they go, not HTTP, Ray or models.

    chat cron          the request, in the gateway; a child of the client's span if it sent `traceparent`
    └── attempt        one replica's work on it, as the gateway sees it; more than one after a failure
        └── generate   the same, as the replica sees it

Attributes follow the conventions for generative AI (https://opentelemetry.io/docs/specs/semconv/gen-ai/). No span holds
prompts, completions or messages of errors. Where spans go is said by OpenTelemetry's own environment variables.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from opentelemetry.context import Context
from opentelemetry.trace import NoOpTracer, Span, SpanKind, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from heliostat.errors import ConfigError

Operation = Literal["chat", "text_completion", "classify"]
Process = Literal["gateway", "replica"]
FIRST_TOKEN = "first_token"
_W3C = TraceContextTextMapPropagator()


class Tracing:
    """Starts the spans of one process."""

    def __init__(self, tracer: Tracer, close: Callable[[], None]) -> None:
        self._tracer = tracer
        self._close = close

    def request(self, operation: Operation, model: str | None, traceparent: str | None) -> "RequestTrace":
        """A request has come in for `model`, which the endpoint serves (else None), with the client's `traceparent`."""
        # Not `tracestate`: it is any text the client likes.
        parent = _W3C.extract({"traceparent": traceparent} if traceparent else {})
        name = f"{operation} {model}" if model else operation
        span = self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER)
        span.set_attributes({"gen_ai.operation.name": operation, "gen_ai.provider.name": "heliostat"})
        if model:
            span.set_attribute("gen_ai.request.model", model)
        return RequestTrace(self._tracer, span)

    def generation(self, carrier: Mapping[str, str], model: str, version: str) -> "GenerationTrace":
        """A replica has begun to work on a request; `carrier` is that of the gateway's attempt."""
        span = self._tracer.start_span("generate", context=_W3C.extract(carrier), kind=SpanKind.SERVER)
        span.set_attributes({"gen_ai.request.model": model, "heliostat.model.version": version})
        return GenerationTrace(span)

    def close(self) -> None:
        """Send what has not been sent yet; waits for that as long as the exporter's time limit."""
        self._close()


class RequestTrace:
    """The span of a request, which `finished` or `failed` ends."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def trace_id(self) -> str | None:
        """32 hex digits, for logs: the client's where it sent `traceparent`; None if nothing is traced."""
        context = self._span.get_span_context()
        return format_trace_id(context.trace_id) if context.is_valid else None

    def attempt(self, model: str, version: str) -> "Attempt":
        """A replica of `version` is asked."""
        self._span.set_attributes({"gen_ai.response.model": model, "heliostat.model.version": version})
        parent = set_span_in_context(self._span, Context())
        span = self._tracer.start_span("attempt", context=parent, kind=SpanKind.CLIENT)
        span.set_attribute("heliostat.model.version", version)
        return Attempt(span)

    def first_token(self) -> None:
        """The first new token has arrived."""
        self._span.add_event(FIRST_TOKEN)

    def finished(self, prompt_tokens: int, completion_tokens: int, reasons: Sequence[str]) -> None:
        """Everything has been answered; `reasons` are the finish reasons of the choices."""
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": prompt_tokens,
                "gen_ai.usage.output_tokens": completion_tokens,
                "gen_ai.response.finish_reasons": list(reasons),
            }
        )
        self._span.end()

    def failed(self, error: str) -> None:
        """The request was refused, broke or was cancelled; `error` is a code such as `model_not_found`."""
        _end(self._span, error)


class Attempt:
    """The span of one replica's work, as the gateway sees it."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.carrier: dict[str, str] = {}
        """To be passed on to the replica."""
        _W3C.inject(self.carrier, set_span_in_context(span, Context()))

    def ended(self, error: str | None = None) -> None:
        """The replica has done its work, or `error`, a code, says why not."""
        _end(self._span, error)


class GenerationTrace:
    """The span of one replica's work, as it sees it itself."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def first_token(self) -> None:
        """The first new token has been generated."""
        self._span.add_event(FIRST_TOKEN)

    def ended(self, completion_tokens: int, error: str | None = None) -> None:
        """The work is done or, with `error`, a code, given up; tokens that another replica generated do not count."""
        self._span.set_attribute("gen_ai.usage.output_tokens", completion_tokens)
        _end(self._span, error)


def _end(span: Span, error: str | None) -> None:
    if error is not None:
        span.set_attribute("error.type", error)
        span.set_status(StatusCode.ERROR)
    span.end()


def check(enabled: bool) -> None:
    """To be asked before anything starts.

    Raises:
        ConfigError: traces are wanted, and the package that sends them is not installed.
    """
    if not enabled:
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "serving.tracing=true needs a package that is not installed: pip install 'heliostat[otel]'"
        ) from error


def start(enabled: bool, process: Process) -> Tracing:
    """What traces this process; without `enabled`, all calls do nothing.

    Spans leave in batches, from a thread, over OTLP/HTTP to OTEL_EXPORTER_OTLP_ENDPOINT (default http://localhost:4318).
    A collector that is away delays no request; spans are then lost.

    Raises:
        ConfigError: see `check`.
    """
    if not enabled:
        return Tracing(NoOpTracer(), lambda: None)
    check(enabled)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # The environment's OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go first.
    resource = Resource.create({"service.name": f"heliostat-{process}"}).merge(OTELResourceDetector().detect())
    # A provider of our own, not the global one: that may be Ray's.
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider.get_tracer("heliostat.serving"), provider.shutdown)
