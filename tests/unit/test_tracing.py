"""Traces as a collector receives them over OTLP/HTTP."""

import http.server
import importlib.util
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, service_attributes

from heliostat.errors import ConfigError
from heliostat.serving import tracing

EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
CLIENTS_TRACE, CLIENTS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{CLIENTS_TRACE}-{CLIENTS_SPAN}-01"


def exporter_is_installed() -> bool:
    try:
        return importlib.util.find_spec(EXPORTER) is not None
    except ModuleNotFoundError:
        return False


needs_exporter = pytest.mark.skipif(not exporter_is_installed(), reason="heliostat[otel] is not installed")


class Collector:
    """Keeps the spans that are sent to it, by the name of the service."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = {}

    def receive(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = attributes(resource.resource)[service_attributes.SERVICE_NAME]
            for scope in resource.scope_spans:
                self.spans.setdefault(service, []).extend(scope.spans)


def attributes(holder: Any) -> dict[str, Any]:
    """The attributes of a span, resource or event as plain values."""
    found = {}
    for attribute in holder.attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        found[attribute.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector on this machine, to which the environment points."""
    received = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.receive(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield received
        server.shutdown()


def serve_one_request(gateway: tracing.Tracing, replica: tracing.Tracing, traceparent: str | None) -> str | None:
    """The first replica breaks after a token, the second answers."""
    request = gateway.request("chat", "cron", traceparent)
    first = request.attempt("cron", "3")
    broken = replica.generation(first.carrier, "cron", "3")
    broken.first_token()
    request.first_token()
    broken.ended(1, "engine_failed")
    first.ended("replica_failed")
    second = request.attempt("cron", "4")
    generation = replica.generation(second.carrier, "cron", "4")
    generation.first_token()
    generation.ended(4)
    second.ended()
    request.finished(7, 5, ["stop", "length"])
    return request.trace_id


@needs_exporter
def test_a_request_is_one_trace_from_the_client_to_each_replica(collector: Collector) -> None:
    gateway, replica = tracing.start(True, "gateway"), tracing.start(True, "replica")
    trace_id = serve_one_request(gateway, replica, TRACEPARENT)
    gateway.close()
    replica.close()
    assert trace_id == CLIENTS_TRACE
    assert {span.trace_id.hex() for spans in collector.spans.values() for span in spans} == {CLIENTS_TRACE}
    first, second, request = collector.spans["heliostat-gateway"]
    broken, generation = collector.spans["heliostat-replica"]
    assert [span.name for span in (request, first, broken)] == ["chat cron", "attempt", "generate"]
    assert request.parent_span_id.hex() == CLIENTS_SPAN
    assert {first.parent_span_id, second.parent_span_id} == {request.span_id}
    assert (broken.parent_span_id, generation.parent_span_id) == (first.span_id, second.span_id)
    assert request.kind == broken.kind == Span.SPAN_KIND_SERVER
    assert first.kind == Span.SPAN_KIND_CLIENT
    assert [event.name for span in (request, broken, generation) for event in span.events] == [tracing.FIRST_TOKEN] * 3


@needs_exporter
def test_attributes_follow_the_conventions(collector: Collector) -> None:
    gateway, replica = tracing.start(True, "gateway"), tracing.start(True, "replica")
    serve_one_request(gateway, replica, None)
    gateway.close()
    replica.close()
    first, second, request = collector.spans["heliostat-gateway"]
    broken, generation = collector.spans["heliostat-replica"]
    assert not request.parent_span_id
    assert attributes(request) == {
        gen_ai_attributes.GEN_AI_OPERATION_NAME: gen_ai_attributes.GenAiOperationNameValues.CHAT.value,
        gen_ai_attributes.GEN_AI_PROVIDER_NAME: "heliostat",
        gen_ai_attributes.GEN_AI_REQUEST_MODEL: "cron",
        gen_ai_attributes.GEN_AI_RESPONSE_MODEL: "cron",
        gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS: 7,
        gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS: 5,
        gen_ai_attributes.GEN_AI_RESPONSE_FINISH_REASONS: ["stop", "length"],
        "heliostat.model.version": "4",
    }
    assert request.status.code == second.status.code == generation.status.code == Status.STATUS_CODE_UNSET
    for span, version, code in ((first, "3", "replica_failed"), (broken, "3", "engine_failed")):
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert span.status.message == ""
        assert attributes(span)[error_attributes.ERROR_TYPE] == code
        assert attributes(span)["heliostat.model.version"] == version
    assert attributes(generation)[gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS] == 4


@needs_exporter
@pytest.mark.parametrize("traceparent", ["nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "", "é" * 9999])
def test_a_wrong_traceparent_starts_a_trace_of_its_own(collector: Collector, traceparent: str) -> None:
    gateway = tracing.start(True, "gateway")
    request = gateway.request("text_completion", None, traceparent)
    request.failed("model_not_found")
    gateway.close()
    (span,) = collector.spans["heliostat-gateway"]
    assert span.trace_id.hex() == request.trace_id
    assert not span.parent_span_id
    assert span.name == "text_completion"
    assert "gen_ai.request.model" not in attributes(span)


@needs_exporter
def test_the_environment_names_the_service_and_samples(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "answers")
    gateway = tracing.start(True, "gateway")
    gateway.request("chat", "cron", None).failed("cancelled")
    gateway.close()
    assert [len(spans) for spans in collector.spans.values()] == [1]
    assert "answers" in collector.spans
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    silent = tracing.start(True, "gateway")
    silent.request("chat", "cron", None).failed("cancelled")
    silent.close()
    assert [len(spans) for spans in collector.spans.values()] == [1]


@needs_exporter
def test_a_collector_that_is_away_costs_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    gateway = tracing.start(True, "gateway")
    serve_one_request(gateway, gateway, None)
    gateway.close()


def test_without_tracing_nothing_happens() -> None:
    quiet = tracing.start(False, "gateway")
    assert serve_one_request(quiet, quiet, None) is None
    # Logs can still be found by what the client traces.
    assert serve_one_request(quiet, quiet, TRACEPARENT) == CLIENTS_TRACE
    quiet.close()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    tracing.check(False)
    for attempt in (lambda: tracing.check(True), lambda: tracing.start(True, "gateway")):
        with pytest.raises(ConfigError, match=r"serving\.tracing.*pip install 'heliostat\[otel\]'"):
            attempt()
