"""What is recorded for requests, engines and versions, and how the texts of several nodes become one."""

import asyncio
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from heliostat.serving import metrics
from heliostat.serving.metrics import FAMILIES, GatewayMetrics, Kind, ReplicaMetrics, RolloutMetrics

Key = tuple[str, tuple[str, ...]]


@dataclass
class Memory:
    """Keeps what is recorded, by name and label values; refuses what a family does not have."""

    counters: dict[Key, float] = field(default_factory=dict)
    gauges: dict[Key, float] = field(default_factory=dict)
    observed: dict[Key, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float, labels: dict[str, str]) -> None:
        assert value >= 0
        key = self._key("counter", name, labels)
        self.counters[key] = self.counters.get(key, 0) + value

    def set(self, name: str, value: float, labels: dict[str, str]) -> None:
        self.gauges[self._key("gauge", name, labels)] = value

    def observe(self, name: str, value: float, labels: dict[str, str]) -> None:
        self.observed.setdefault(self._key("histogram", name, labels), []).append(value)

    def _key(self, kind: Kind, name: str, labels: dict[str, str]) -> Key:
        family = FAMILIES[name]
        assert family.kind == kind
        assert labels.keys() == set(family.labels)
        return name, tuple(labels[label] for label in family.labels)


@dataclass
class Clock:
    """Time that passes when a test says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gateway(memory: Memory, clock: Clock) -> GatewayMetrics:
    return GatewayMetrics(memory, clock)


def test_a_streamed_request_is_counted_and_timed(gateway: GatewayMetrics, memory: Memory, clock: Clock) -> None:
    meter = gateway.request("cron", "chat")
    clock.now += 0.5
    meter.routed("3")
    clock.now += 1.5
    timings = [meter.time_to_first_token]
    for count, pause in ((1, 0.25), (2, 0.75), (1, 0.0)):
        meter.tokens(count)
        clock.now += pause
    clock.now += 1
    timings.append(meter.time_to_first_token)
    assert timings == [None, 2.0]
    meter.finished(prompt_tokens=7, completion_tokens=5, reasons=["stop"])
    assert meter.duration == 4.0
    labels = ("cron", "3")
    assert memory.counters == {
        ("requests_total", ("cron", "chat")): 1,
        ("prompt_tokens_total", labels): 7,
        # Four arrived, and the end token had no text.
        ("generation_tokens_total", labels): 5,
        ("request_success_total", (*labels, "stop")): 1,
    }
    assert memory.observed == {
        ("request_queue_time_seconds", labels): [0.5],
        ("time_to_first_token_seconds", labels): [2.0],
        ("inter_token_latency_seconds", labels): [0.25, 0.75],
        ("request_time_per_output_token_seconds", labels): [0.25],
        ("request_prompt_tokens", labels): [7],
        ("request_generation_tokens", labels): [5],
        ("e2e_request_latency_seconds", labels): [4.0],
    }


def test_choices_side_by_side_do_not_make_tokens_look_faster(
    gateway: GatewayMetrics, memory: Memory, clock: Clock
) -> None:
    meter = gateway.request("cron", "completions")
    meter.routed("3")
    for _ in range(3):
        meter.tokens(2)
        clock.now += 1
    meter.finished(4, 6, ["length", "stop"])
    labels = ("cron", "3")
    assert memory.observed["request_time_per_output_token_seconds", labels] == [1.0]
    assert memory.counters["request_success_total", (*labels, "length")] == 1
    assert memory.counters["request_success_total", (*labels, "stop")] == 1


@pytest.mark.parametrize("tokens", [0, 1])
def test_an_answer_of_at_most_one_token_has_no_time_per_token(
    gateway: GatewayMetrics, memory: Memory, tokens: int
) -> None:
    meter = gateway.request("cron", "completions")
    meter.routed("3")
    for _ in range(tokens):
        meter.tokens(1)
    meter.finished(4, tokens, ["length"])
    assert "request_time_per_output_token_seconds" not in {name for name, _ in memory.observed}
    assert memory.counters["generation_tokens_total", ("cron", "3")] == tokens


def test_a_request_that_goes_on_elsewhere_is_one_request(gateway: GatewayMetrics, memory: Memory, clock: Clock) -> None:
    meter = gateway.request("cron", "chat")
    meter.routed("3")
    meter.tokens(1)
    clock.now += 5
    meter.resumed()
    meter.routed("4")
    meter.tokens(1)
    meter.finished(4, 2, ["stop"])
    assert memory.counters["requests_total", ("cron", "chat")] == 1
    assert memory.counters["requests_resumed_total", ("cron", "3")] == 1
    assert memory.counters["request_success_total", ("cron", "4", "stop")] == 1
    # The pause is what the reader saw.
    assert memory.observed["inter_token_latency_seconds", ("cron", "4")] == [5]
    assert memory.observed["request_queue_time_seconds", ("cron", "3")] == [0]


def test_requests_that_are_not_answered(gateway: GatewayMetrics, memory: Memory) -> None:
    gateway.request(None, "chat").rejected("model_not_found")
    early, late = gateway.request("cron", "chat"), gateway.request("cron", "chat")
    early.cancelled()
    late.routed("3")
    late.cancelled()
    broken = gateway.request("cron", "chat")
    broken.routed("3")
    broken.failed()
    assert memory.counters == {
        ("requests_total", ("unknown", "chat")): 1,
        ("requests_total", ("cron", "chat")): 3,
        ("requests_rejected_total", ("unknown", "model_not_found")): 1,
        ("requests_cancelled_total", ("cron", "none")): 1,
        ("requests_cancelled_total", ("cron", "3")): 1,
        ("requests_failed_total", ("cron", "3")): 1,
    }


def test_refusals_are_counted_under_few_reasons() -> None:
    statuses = {401, 403, 404, 408, 413, 429, 503}
    reasons = {metrics.rejection(status) for status in statuses}
    assert len(reasons) == len(statuses)
    assert {metrics.rejection(status) for status in (400, 405, 415, 422)} == {"invalid_request"}
    assert reasons | {"invalid_request"} == set(metrics.Rejection.__args__)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class State:
    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    restarts: int = 0


def test_an_engines_totals_become_counters_even_when_it_starts_again(memory: Memory) -> None:
    replica = ReplicaMetrics(memory, "cron", "3")
    labels = ("cron", "3")
    for state in (State(2, 5, 0.5, 100, 40), State(3, 0, 0.75, 150, 60), State(0, 0, 0.0, 30, 10, 1)):
        replica.report(state)
    assert memory.gauges["num_requests_running", labels] == 0
    assert memory.gauges["num_requests_waiting", labels] == 0
    assert memory.gauges["kv_cache_usage_perc", labels] == 0
    assert memory.counters["prefix_cache_queries_total", labels] == 180
    assert memory.counters["prefix_cache_hits_total", labels] == 70
    assert memory.counters["engine_restarts_total", labels] == 1


def test_a_version_is_in_one_state_at_a_time(memory: Memory) -> None:
    rollout = RolloutMetrics(memory)

    def states(model: str) -> dict[str, str]:
        found = {}
        for (name, labels), value in memory.gauges.items():
            if name == "model_version" and labels[0] == model and value == 1:
                assert labels[1] not in found
                found[labels[1]] = labels[2]
        return found

    rollout.versions("cron", {"3": "ready"})
    rollout.versions("sql", {"3": "loading"})
    rollout.versions("cron", {"3": "ready", "4": "canary"})
    rollout.canary("cron", "4", 10)
    assert states("cron") == {"3": "ready", "4": "canary"}
    rollout.versions("cron", {"3": "draining", "4": "ready", "5": "rejected"})
    rollout.rejected("cron", "5")
    assert states("cron") == {"3": "draining", "4": "ready", "5": "rejected"}
    rollout.versions("cron", {"4": "ready"})
    assert states("cron") == {"4": "ready"}
    assert states("sql") == {"3": "loading"}
    assert memory.counters == {("rollout_rejected_total", ("cron", "5")): 1}
    assert memory.gauges["canary_percent", ("cron", "4")] == 10


def test_the_table_keeps_prometheus_rules() -> None:
    for name, family in FAMILIES.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert (family.kind == "counter") == name.endswith("_total"), name
        assert (family.kind == "histogram") == bool(family.buckets), name
        assert list(family.buckets) == sorted(set(family.buckets)), name
        # Ray refuses other bounds, and these labels are Ray's or Prometheus' own.
        assert all(bound > 0 for bound in family.buckets)
        assert not {"le", "WorkerId", "NodeAddress", "job", "instance"} & set(family.labels)


def test_the_documentation_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "observability.md").read_text(encoding="utf-8")
    rows = [
        f"| `{metrics.PREFIX}{name}` | {family.kind} | {', '.join(family.labels)} | {family.help} |"
        for name, family in FAMILIES.items()
    ]
    assert [line for line in text.splitlines() if line.startswith(f"| `{metrics.PREFIX}")] == rows


OTEL = 'otel_scope_name="a.b",otel_scope_schema_url="",otel_scope_version=""'
HISTOGRAM = "ray_heliostat_time_to_first_token_seconds"


def agent_text(worker: str, count: int) -> str:
    """What a node's agent says, as Ray 2.60 writes it."""
    labels = f'Component="core_worker",NodeAddress="10.0.0.1",SessionName="s",Version="2.60.0",WorkerId="{worker}"'
    return "\n".join(
        [
            "# HELP ray_tasks Current tasks",
            "# TYPE ray_tasks gauge",
            f"ray_tasks{{{labels}}} 3.0",
            f"# HELP {HISTOGRAM} From the request",
            f"# TYPE {HISTOGRAM} histogram",
            f'{HISTOGRAM}_bucket{{{labels},le="0.01",model_name="m",{OTEL},version="1"}} 0.0',
            f'{HISTOGRAM}_bucket{{{labels},le="+Inf",model_name="m",{OTEL},version="1"}} {count}.0',
            f'{HISTOGRAM}_sum{{{labels},model_name="m",{OTEL},version="1"}} 1.5',
            f'{HISTOGRAM}_count{{{labels},model_name="m",{OTEL},version="1"}} {count}.0',
            "# HELP ray_heliostat_requests_total Requests",
            "# TYPE ray_heliostat_requests_total counter",
            f'ray_heliostat_requests_total{{{labels},endpoint="chat",model_name="a,Version=\\"b\\"",{OTEL}}} {count}.0',
            "",
        ]
    )


def test_the_texts_of_two_nodes_become_one() -> None:
    merged = metrics.merge([agent_text("w1", 4), None, agent_text("w2", 6)]).decode()
    own = 'NodeAddress="10.0.0.1",WorkerId'
    name = "heliostat_time_to_first_token_seconds"
    lines = []
    for worker, count in (("w1", 4), ("w2", 6)):
        lines += [
            f'{name}_bucket{{{own}="{worker}",le="0.01",model_name="m",version="1"}} 0.0',
            f'{name}_bucket{{{own}="{worker}",le="+Inf",model_name="m",version="1"}} {count}.0',
            f'{name}_sum{{{own}="{worker}",model_name="m",version="1"}} 1.5',
            f'{name}_count{{{own}="{worker}",model_name="m",version="1"}} {count}.0',
        ]
    model = 'model_name="a,Version=\\"b\\"",'
    assert merged.splitlines() == [
        f"# HELP {name} From the request",
        f"# TYPE {name} histogram",
        *lines,
        "# HELP heliostat_requests_total Requests",
        "# TYPE heliostat_requests_total counter",
        f'heliostat_requests_total{{{own}="w1",endpoint="chat",{model}}} 4.0',
        f'heliostat_requests_total{{{own}="w2",endpoint="chat",{model}}} 6.0',
        f"# HELP heliostat_metrics_nodes {FAMILIES['metrics_nodes'].help}",
        "# TYPE heliostat_metrics_nodes gauge",
        'heliostat_metrics_nodes{state="answered"} 2',
        'heliostat_metrics_nodes{state="missing"} 1',
    ]
    assert merged.endswith("\n")


def test_a_cluster_without_any_answer_still_says_so() -> None:
    assert metrics.merge([]).decode().splitlines()[-1] == 'heliostat_metrics_nodes{state="missing"} 0'
    assert metrics.merge([None]).decode().splitlines()[-1] == 'heliostat_metrics_nodes{state="missing"} 1'


@contextmanager
def agent(text: str, status: int = 200, until: threading.Event | None = None) -> Iterator[str]:
    """A metrics agent over real HTTP that answers when `until` is set."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if until is not None:
                until.wait()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/metrics"
        finally:
            if until is not None:
                until.set()
            server.shutdown()


def test_agents_that_are_down_broken_or_hang_are_left_out() -> None:
    with agent("fine") as fine, agent("no", 500) as broken, agent("late", until=threading.Event()) as hanging:
        urls = [fine, broken, hanging, "http://127.0.0.1:1/metrics", "http://127.0.0.1:-1/metrics"]
        assert asyncio.run(metrics.collect(urls, 0.5)) == ["fine", None, None, None, None]
