"""What the endpoint counts and times, and Prometheus' text of it. Knows Ray's metrics, not HTTP routes or models.

Gateways, replicas and the director record through `ray.util.metrics`; each Ray node's agent collects what the
processes of its node report, by default every 10 s, and `exposition` joins what the agents of all nodes have. Names and
meanings are vLLM's where it has the metric (https://docs.vllm.ai/en/latest/usage/metrics.html), after `heliostat_`.

No label ever holds what a client wrote: a model is counted by the name the endpoint knows, anything else as "unknown".
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import aiohttp
import ray
from ray.util import metrics as ray_metrics

PREFIX = "heliostat_"
# What Ray's agents put before every name.
_RAY_PREFIX = "ray_"
UNKNOWN_MODEL = "unknown"
# Version of a request that has ended before a replica took it.
NO_VERSION = "none"
# An agent that has not answered by then is left out of an exposition.
AGENT_TIMEOUT_S = 3.0

Kind = Literal["counter", "gauge", "histogram"]
Endpoint = Literal["completions", "chat", "classify"]
Rejection = Literal[
    "invalid_request",
    "unauthorized",
    "forbidden",
    "model_not_found",
    "too_large",
    "rate_limit",
    "overloaded",
    "timeout",
]
VersionState = Literal["loading", "canary", "ready", "draining", "rejected"]

_MODEL = ("model_name",)
_VERSION = ("model_name", "version")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: what it is, its labels and, for a histogram, the upper bounds of its buckets."""

    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


# By name, without PREFIX. Prometheus' histograms keep counts by bucket; Ray works out their `_sum` from the middles of
# the buckets, so quantiles are as good as the buckets and averages are not meant to be read.
FAMILIES: dict[str, Family] = {
    "requests_total": Family("counter", (*_MODEL, "endpoint"), "Requests for completions that came in"),
    "request_success_total": Family(
        "counter", (*_VERSION, "finished_reason"), "Completions that ended as they should, by finish reason"
    ),
    "requests_failed_total": Family("counter", _VERSION, "Requests that were taken and ended with an error"),
    "requests_rejected_total": Family("counter", (*_MODEL, "reason"), "Requests that were refused"),
    "requests_cancelled_total": Family("counter", _VERSION, "Requests whose client went away"),
    "requests_resumed_total": Family("counter", _VERSION, "Times a request went on in another replica"),
    "prompt_tokens_total": Family("counter", _VERSION, "Tokens of prompts that were answered"),
    "generation_tokens_total": Family("counter", _VERSION, "Tokens generated"),
    "time_to_first_token_seconds": Family("histogram", _VERSION, "From the request to its first new token", _SECONDS),
    "inter_token_latency_seconds": Family(
        "histogram", _VERSION, "Between one arrival of new tokens and the next", _TOKEN_SECONDS
    ),
    "request_time_per_output_token_seconds": Family(
        "histogram", _VERSION, "Mean time between the tokens of a completion, after the first", _TOKEN_SECONDS
    ),
    "e2e_request_latency_seconds": Family("histogram", _VERSION, "From the request to its end", _SECONDS),
    "request_queue_time_seconds": Family("histogram", _VERSION, "Until a replica took the request", _SECONDS),
    "request_prompt_tokens": Family("histogram", _VERSION, "Prompt tokens of a request", _TOKENS),
    "request_generation_tokens": Family("histogram", _VERSION, "Generated tokens of a request", _TOKENS),
    "num_requests_running": Family("gauge", _VERSION, "Generations that a replica is working on"),
    "num_requests_waiting": Family("gauge", _VERSION, "Generations that wait in a replica"),
    "kv_cache_usage_perc": Family("gauge", _VERSION, "Share of a replica's KV cache in use, 0 to 1"),
    "prefix_cache_queries_total": Family("counter", _VERSION, "Prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits_total": Family("counter", _VERSION, "Prompt tokens found in the prefix cache"),
    "engine_restarts_total": Family("counter", _VERSION, "Times an engine was started again after an error"),
    "model_version": Family("gauge", (*_VERSION, "state"), "1 for the state that the version is in, else 0"),
    "canary_percent": Family("gauge", _VERSION, "Share of the requests that a canary gets, 0 to 100"),
    "rollout_rejected_total": Family("counter", _VERSION, "Versions that were not put into service, or taken out"),
    "metrics_nodes": Family("gauge", ("state",), "Ray nodes whose metrics are in this answer, or missing from it"),
}


class Recorder(Protocol):
    """Where values go. Names are those of FAMILIES; labels must be exactly the family's."""

    def add(self, name: str, value: float, labels: dict[str, str]) -> None:
        """Raise a counter by `value` >= 0."""

    def set(self, name: str, value: float, labels: dict[str, str]) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, labels: dict[str, str]) -> None:
        """Count a value into a histogram's bucket."""


class RayRecorder:
    """Records into this process' Ray metrics. A call takes a few microseconds and never waits."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {name: _ray_metric(name, family) for name, family in FAMILIES.items()}

    def add(self, name: str, value: float, labels: dict[str, str]) -> None:
        """See Recorder; Ray refuses to add nothing."""
        if value > 0:
            self._metrics[name].inc(value, labels)

    def set(self, name: str, value: float, labels: dict[str, str]) -> None:
        """See Recorder; Ray goes on reporting the value until it is set anew or the process ends."""
        self._metrics[name].set(value, labels)

    def observe(self, name: str, value: float, labels: dict[str, str]) -> None:
        """See Recorder."""
        self._metrics[name].observe(value, labels)


def _ray_metric(name: str, family: Family) -> Any:
    if family.kind == "histogram":
        buckets = list(family.buckets)
        return ray_metrics.Histogram(PREFIX + name, family.help, boundaries=buckets, tag_keys=family.labels)
    kind = ray_metrics.Counter if family.kind == "counter" else ray_metrics.Gauge
    return kind(PREFIX + name, family.help, tag_keys=family.labels)


def rejection(status: int) -> Rejection:
    """The reason under which a refusal with this HTTP status is counted."""
    reasons: dict[int, Rejection] = {
        401: "unauthorized",
        403: "forbidden",
        404: "model_not_found",
        408: "timeout",
        413: "too_large",
        429: "rate_limit",
        503: "overloaded",
    }
    return reasons.get(status, "invalid_request")


class GatewayMetrics:
    """What a gateway records; one for the process."""

    def __init__(self, recorder: Recorder, clock: Callable[[], float] = time.monotonic) -> None:
        self._recorder = recorder
        self._clock = clock

    def request(self, model: str | None, endpoint: Endpoint) -> "RequestMeter":
        """A request has come in for `model`: the plain name of a model that the endpoint serves, else None."""
        meter = RequestMeter(self._recorder, model or UNKNOWN_MODEL, self._clock)
        self._recorder.add("requests_total", 1, {"model_name": meter.model, "endpoint": endpoint})
        return meter


class RequestMeter:
    """Follows one request from its arrival to exactly one of `finished`, `rejected`, `cancelled` and `failed`."""

    def __init__(self, recorder: Recorder, model: str, clock: Callable[[], float]) -> None:
        self.model = model
        self._recorder = recorder
        self._clock = clock
        self._arrival = clock()
        self._labels = {"model_name": model, "version": NO_VERSION}
        self._first: float | None = None
        self._last = self._arrival
        self._tokens = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds; None before the first token."""
        return None if self._first is None else self._first - self._arrival

    @property
    def duration(self) -> float:
        """Seconds since the request came in."""
        return self._clock() - self._arrival

    def routed(self, version: str) -> None:
        """A replica of `version` has taken the request. Again after a retry or a resumption, which times nothing."""
        if self._labels["version"] == NO_VERSION:
            self._labels["version"] = version
            self._observe("request_queue_time_seconds", self.duration)
        self._labels["version"] = version

    def tokens(self, count: int) -> None:
        """`count` new tokens, of all choices together, have arrived."""
        now = self._clock()
        if self._first is None:
            self._first = now
            self._observe("time_to_first_token_seconds", now - self._arrival)
        else:
            self._observe("inter_token_latency_seconds", now - self._last)
        self._last = now
        self._tokens += count
        self._recorder.add("generation_tokens_total", count, self._labels)

    def resumed(self) -> None:
        """The request goes on in another replica."""
        self._recorder.add("requests_resumed_total", 1, self._labels)

    def finished(self, prompt_tokens: int, completion_tokens: int, reasons: Sequence[str]) -> None:
        """Everything has been answered; `reasons` are the finish reasons of the choices."""
        self._recorder.add("prompt_tokens_total", prompt_tokens, self._labels)
        # Tokens without text, such as the end token, may not have been among the arrivals.
        self._recorder.add("generation_tokens_total", max(0, completion_tokens - self._tokens), self._labels)
        for reason in reasons:
            self._recorder.add("request_success_total", 1, self._labels | {"finished_reason": reason})
        self._observe("request_prompt_tokens", prompt_tokens)
        self._observe("request_generation_tokens", completion_tokens)
        self._observe("e2e_request_latency_seconds", self.duration)
        gaps = completion_tokens / max(1, len(reasons)) - 1
        if self._first is not None and gaps > 0:
            self._observe("request_time_per_output_token_seconds", (self._last - self._first) / gaps)

    def rejected(self, reason: Rejection) -> None:
        """The request is refused; nothing of it has been worked on."""
        self._recorder.add("requests_rejected_total", 1, {"model_name": self.model, "reason": reason})

    def cancelled(self) -> None:
        """The client has gone away."""
        self._recorder.add("requests_cancelled_total", 1, self._labels)

    def failed(self) -> None:
        """The request was taken and ends with an error."""
        self._recorder.add("requests_failed_total", 1, self._labels)

    def _observe(self, name: str, value: float) -> None:
        self._recorder.observe(name, value, self._labels)


class EngineState(Protocol):
    """How an engine is doing; the last three count since its process started."""

    @property
    def running(self) -> int:
        """Generations that are being worked on."""

    @property
    def waiting(self) -> int:
        """Generations that wait."""

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""

    @property
    def prefix_queries(self) -> int:
        """Prompt tokens looked up in the prefix cache."""

    @property
    def prefix_hits(self) -> int:
        """Prompt tokens found there."""

    @property
    def restarts(self) -> int:
        """Times the engine was started again."""


class ReplicaMetrics:
    """What a replica records about its engine; one for the process."""

    def __init__(self, recorder: Recorder, model: str, version: str) -> None:
        self._recorder = recorder
        self._labels = {"model_name": model, "version": version}
        self._counted: dict[str, int] = {}

    def report(self, state: EngineState) -> None:
        """Record `state`; to be called about once a second."""
        self._recorder.set("num_requests_running", state.running, self._labels)
        self._recorder.set("num_requests_waiting", state.waiting, self._labels)
        self._recorder.set("kv_cache_usage_perc", state.cache_usage, self._labels)
        self._count("prefix_cache_queries_total", state.prefix_queries)
        self._count("prefix_cache_hits_total", state.prefix_hits)
        self._count("engine_restarts_total", state.restarts)

    def _count(self, name: str, total: int) -> None:
        before = self._counted.get(name, 0)
        # An engine that was started again may count from 0 again.
        self._recorder.add(name, total - before if total >= before else total, self._labels)
        self._counted[name] = total


class RolloutMetrics:
    """What the director records about versions; one for the process."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._states: dict[tuple[str, str], VersionState] = {}

    def versions(self, model: str, states: Mapping[str, VersionState]) -> None:
        """All versions of `model` that are loaded, or were refused, with their state."""
        for (name, version), state in list(self._states.items()):
            if name == model and states.get(version) != state:
                self._set(model, version, state, 0)
                del self._states[name, version]
        for version, state in states.items():
            self._set(model, version, state, 1)
            self._states[model, version] = state

    def canary(self, model: str, version: str, percent: float) -> None:
        """`version` gets `percent` of the requests as a canary; 0 when it no longer is one."""
        self._recorder.set("canary_percent", percent, {"model_name": model, "version": version})

    def rejected(self, model: str, version: str) -> None:
        """`version` was not put into service, or was taken out as a canary."""
        self._recorder.add("rollout_rejected_total", 1, {"model_name": model, "version": version})

    def _set(self, model: str, version: str, state: VersionState, value: int) -> None:
        self._recorder.set("model_version", value, {"model_name": model, "version": version, "state": state})


async def exposition(timeout_s: float = AGENT_TIMEOUT_S) -> bytes:
    """Heliostat's metrics of every process of this Ray cluster, as Prometheus text (format 0.0.4).

    A node whose agent does not answer within `timeout_s` is left out and counted in `heliostat_metrics_nodes`.
    """
    urls = await asyncio.to_thread(agents)
    texts = await collect(urls, timeout_s)
    return await asyncio.to_thread(merge, texts)


def agents() -> list[str]:
    """Where the metrics agents of the alive nodes answer."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [f"http://{_bracketed(node['NodeManagerAddress'])}:{node['MetricsExportPort']}/metrics" for node in nodes]


async def collect(urls: Iterable[str], timeout_s: float) -> list[str | None]:
    """What each agent says, asked all at once; None for one that does not answer properly in time."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
        return await asyncio.gather(*(_fetch(session, url) for url in urls))


async def _fetch(session: aiohttp.ClientSession, url: str) -> str | None:
    try:
        async with session.get(url, raise_for_status=True) as answer:
            return await answer.text()
    # ValueError: a node without an agent has a port that is none.
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None


# Labels of Ray's that are the same for all of an endpoint's processes. WorkerId and NodeAddress stay: they keep the
# series of different processes apart, which Prometheus needs to notice that a process started anew.
_NOISE = re.compile(r'(?<=[{,])(?:otel_scope_\w+|Component|SessionName|Version)="(?:[^"\\]|\\.)*",?')
_HEADER = re.compile(rf"# (?:HELP|TYPE) {_RAY_PREFIX}({PREFIX}\w+) (.*)")


def merge(texts: Sequence[str | None]) -> bytes:
    """The agents' texts as one: Heliostat's families only, each once, without Ray's prefix."""
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in filter(None, texts):
        for name, headings, lines in _families(text):
            headers.setdefault(name, headings)
            samples.setdefault(name, []).extend(lines)
    answered = sum(text is not None for text in texts)
    families = [line for name, lines in samples.items() for line in (*headers[name], *lines)]
    return "\n".join([*families, *_nodes(answered, len(texts) - answered), ""]).encode()


def _families(text: str) -> Iterable[tuple[str, list[str], list[str]]]:
    """(name, header lines, sample lines) of each of Heliostat's families in one agent's text."""
    name, headers, samples = "", list[str](), list[str]()
    for line in text.splitlines():
        if header := _HEADER.fullmatch(line):
            if header[1] != name:
                if name:
                    yield name, headers, samples
                name, headers, samples = header[1], [], []
            headers.append(line.replace(_RAY_PREFIX, "", 1))
        elif line.startswith(_RAY_PREFIX + PREFIX):
            samples.append(_NOISE.sub("", line.removeprefix(_RAY_PREFIX)))
    if name:
        yield name, headers, samples


def _nodes(answered: int, missing: int) -> list[str]:
    name = PREFIX + "metrics_nodes"
    return [
        f"# HELP {name} {FAMILIES['metrics_nodes'].help}",
        f"# TYPE {name} gauge",
        f'{name}{{state="answered"}} {answered}',
        f'{name}{{state="missing"}} {missing}',
    ]


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
