"""One request at the gateway: what is answered, counted, logged and traced, whatever the replicas do."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

from heliostat.serving import routing, tracing
from heliostat.serving.answers import ChatWire, CompletionWire
from heliostat.serving.calls import Accepted, Broken, Delta, Message, Refused, TokenLogprob
from heliostat.serving.exchange import Exchange, Origin
from heliostat.serving.metrics import GatewayMetrics
from heliostat.serving.protocol import ApiError, ChatCompletionRequest, CompletionRequest
from heliostat.serving.routing import ReplicaLost, Route, Router, Table, Version
from tests.unit.test_serving_metrics import Memory

SECRET = "a secret of the client"
VERSION = Version("app", "3", 0, chat=True, max_length=64, decoding={})
LABELS = ("cron", "3")
Said = Message | Exception | None


class Lines(logging.Handler):
    """Keeps what is logged of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(vars(record))


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, handler = logging.getLogger("ray.serve"), Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PAUSE_S", 0.001)


@dataclass
class Script:
    """What the replicas say, call after call; the last part is said again and again. None: nothing more, ever."""

    parts: list[list[Said]]
    memory: Memory = field(default_factory=Memory)
    spans: tracing.Tracing = field(default_factory=lambda: tracing.start(False, "gateway"))
    calls: int = 0
    closed: int = 0

    async def __call__(self, *_: Any) -> AsyncGenerator[Message]:
        part = self.parts[min(self.calls, len(self.parts) - 1)]
        self.calls += 1
        try:
            for message in part:
                if message is None:
                    await asyncio.Event().wait()
                elif isinstance(message, Exception):
                    raise message
                else:
                    yield message
        finally:
            await asyncio.sleep(0)
            self.closed += 1

    def exchange(self, path: str = "/v1/completions", **body: Any) -> Exchange:
        """A request of a model that is served, with its wire form."""
        router = Router(self, timeout_s=60)
        router.table = Table(0, {"cron": Route("cron", "models:/cron@champion", VERSION)})
        request, wire = parsed(path, body)
        meter = GatewayMetrics(self.memory).request("cron", "completions")
        trace = self.spans.request("text_completion", "cron", None)
        return Exchange(router, request, wire, Origin("r-1", "team", path), meter, trace)


def parsed(path: str, body: Mapping[str, Any]) -> tuple[CompletionRequest | ChatCompletionRequest, CompletionWire]:
    if path == "/v1/completions":
        request = CompletionRequest.model_validate({"model": "cron", "prompt": SECRET, **body})
        return request, CompletionWire("cron", logprobs=request.logprobs is not None)
    chat = ChatCompletionRequest.model_validate(
        {"model": "cron", "messages": [{"role": "user", "content": SECRET}], **body}
    )
    return chat, ChatWire("cron", logprobs=bool(chat.logprobs))


def token(text: str, logprob: float | None) -> TokenLogprob:
    return TokenLogprob(1, text, logprob, () if logprob is None else ((1, text, logprob),))


def deltas(index: int, words: str, logprob: float = -1.0) -> list[Said]:
    """One message for each word of a choice."""
    parts = words.split()
    last = len(parts) - 1
    return [
        [(index, Delta(word, (n,), 3, n + 1, "stop" if n == last else None, (token(word, logprob),)))]
        for n, word in enumerate(parts)
    ]


async def whole(exchange: Exchange) -> dict[str, Any]:
    await exchange.begin()
    return await exchange.whole()


async def streamed(exchange: Exchange) -> list[Any]:
    """The events, parsed; "[DONE]" as it is."""
    await exchange.begin()
    texts = [event.removeprefix("data: ").strip() async for event in exchange.events()]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def test_a_whole_answer_with_its_usage(lines: Lines) -> None:
    script = Script([[Accepted(3, 2), *deltas(0, "a b c"), *deltas(1, "d e")]])
    answer = asyncio.run(whole(script.exchange(n=2)))
    assert [choice["text"] for choice in answer["choices"]] == ["abc", "de"]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert script.memory.counters == {
        ("requests_total", ("cron", "completions")): 1,
        ("prompt_tokens_total", LABELS): 3,
        ("generation_tokens_total", LABELS): 5,
        ("request_success_total", (*LABELS, "stop")): 2,
    }
    assert script.closed == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_line_of_a_request_tells_all_but_what_the_client_wrote(lines: Lines, path: str) -> None:
    script = Script([[Accepted(3, 1), *deltas(0, "a b")]])
    asyncio.run(whole(script.exchange(path, stop=SECRET)))
    (line,) = lines.found
    assert (
        line.items()
        >= {
            "event": "request",
            "request_id": "r-1",
            "endpoint": path,
            "status": 200,
            "key": "team",
            "model": "cron",
            "version": "3",
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "finish_reasons": ("stop",),
        }.items()
    )
    assert 0 <= line["ttft_ms"] <= line["duration_ms"]
    assert {"error", "resumed", "trace_id"}.isdisjoint(line)
    assert SECRET not in repr(line)


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_ends_with_its_usage_if_that_is_asked_for(lines: Lines, usage: bool) -> None:
    script = Script([[Accepted(3, 1), *deltas(0, "a b c")]])
    body: dict[str, Any] = {"stream": True, **({"stream_options": {"include_usage": True}} if usage else {})}
    *chunks, done = asyncio.run(streamed(script.exchange(**body)))
    assert done == "[DONE]"
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b", "c"]


def test_deltas_that_say_nothing_are_not_sent(lines: Lines) -> None:
    silent: list[Said] = [[(0, Delta("", (9,), 3, 1))]]
    script = Script([[Accepted(3, 1), *silent, *deltas(0, "a b")]])
    events = asyncio.run(streamed(script.exchange(stream=True)))
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["a", "b"]
    assert script.memory.counters["generation_tokens_total", LABELS] == 3


def test_best_of_gives_the_likeliest_of_each_prompt_and_bills_all(lines: Lines) -> None:
    likely = {0: -3.0, 1: -1.0, 2: -2.0, 3: -0.5, 4: -9.0, 5: -0.7}
    # The mean counts, not the sum: choice 1 is longer.
    said = [message for index, mean in likely.items() for message in deltas(index, f"c{index} x x"[: 4 + index], mean)]
    script = Script([[Accepted(6, 6), *said]])
    answer = asyncio.run(whole(script.exchange(prompt=["p", "q"], n=2, best_of=3)))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:2] for choice in answer["choices"]] == ["c1", "c2", "c3", "c5"]
    generated = sum(len(message) for message in said if isinstance(message, list))
    assert answer["usage"]["completion_tokens"] == generated
    assert all(choice["logprobs"] is None for choice in answer["choices"]), "they were for the ranking alone"


def test_equally_likely_choices_stay_in_their_order(lines: Lines) -> None:
    script = Script([[Accepted(3, 3), *deltas(0, "a"), *deltas(1, "b"), *deltas(2, "c")]])
    answer = asyncio.run(whole(script.exchange(n=2, best_of=3)))
    assert [choice["text"] for choice in answer["choices"]] == ["a", "b"]


def test_an_echo_comes_before_each_choice_of_its_prompt_whole_and_streamed(lines: Lines) -> None:
    prompts = ((token("p", None),), (token("q", None), token("r", -0.3)))
    said = [message for index in range(4) for message in deltas(index, "a b")]
    script = Script([[Accepted(3, 4, ("p", "qr"), prompts), *said]])
    body: dict[str, Any] = {"prompt": ["p", "qr"], "n": 2, "echo": True, "logprobs": 1}
    answer = asyncio.run(whole(script.exchange(**body)))
    assert [choice["text"] for choice in answer["choices"]] == ["pab", "pab", "qrab", "qrab"]
    logprobs = answer["choices"][2]["logprobs"]
    assert logprobs["tokens"] == ["q", "r", "a", "b"]
    assert logprobs["token_logprobs"] == [None, -0.3, -1.0, -1.0]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    *chunks, _ = asyncio.run(streamed(script.exchange(**body, stream=True)))
    for choice in answer["choices"]:
        pieces = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for piece in pieces for value in piece["logprobs"][name]] == values


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (Refused(400, "too long", "prompt", "context_length_exceeded"), "invalid_request"),
        (Refused(503, "full", code="overloaded", retry_after=4.2), "overloaded"),
    ],
)
def test_a_refusal_is_an_error_and_counted_by_its_reason(lines: Lines, refused: Refused, reason: str) -> None:
    script = Script([[refused]])
    with pytest.raises(ApiError) as caught:
        asyncio.run(script.exchange().begin())
    error = caught.value
    assert (error.status, error.param, error.code, error.retry_after) == (
        refused.status, refused.param, refused.code, refused.retry_after,
    )  # fmt: skip
    assert script.memory.counters["requests_rejected_total", ("cron", reason)] == 1
    assert "requests_failed_total" not in {name for name, _ in script.memory.counters}
    (line,) = lines.found
    assert (line["status"], line["error"], line.get("version")) == (refused.status, refused.code, None)


def test_a_model_that_never_runs_counts_as_failed_not_as_full(lines: Lines) -> None:
    script = Script([[ReplicaLost("dead")]])
    with pytest.raises(ApiError) as caught:
        asyncio.run(script.exchange().begin())
    assert (caught.value.status, caught.value.code) == (503, "engine_failed")
    assert script.memory.counters["requests_failed_total", ("cron", "none")] == 1
    assert "requests_rejected_total" not in {name for name, _ in script.memory.counters}


def test_a_fault_of_ours_before_the_beginning_is_told_and_counted(lines: Lines) -> None:
    script = Script([[ValueError(SECRET)]])
    with pytest.raises(ValueError, match=SECRET):
        asyncio.run(script.exchange().begin())
    assert script.memory.counters["requests_failed_total", ("cron", "none")] == 1
    assert (lines.found[0]["status"], lines.found[0]["error"]) == (500, "ValueError")


BROKEN: list[list[Said]] = [
    [Accepted(3, 1), *deltas(0, "a b c")[:1], Broken("no")],
    [Accepted(3, 1), Broken("no")],
]


def test_an_answer_that_breaks_is_a_503(lines: Lines) -> None:
    script = Script(BROKEN)
    with pytest.raises(ApiError) as caught:
        asyncio.run(whole(script.exchange()))
    assert (caught.value.status, caught.value.code) == (503, "engine_failed")
    assert caught.value.headers()["Retry-After"] == "1"
    assert script.memory.counters["requests_failed_total", LABELS] == 1
    (line,) = lines.found
    assert (line["status"], line["error"], line["resumed"]) == (503, "engine_failed", routing.ATTEMPTS - 1)


def test_a_stream_that_breaks_ends_with_an_error_and_not_as_done(lines: Lines) -> None:
    script = Script(BROKEN)
    first, error = asyncio.run(streamed(script.exchange(stream=True)))
    assert first["choices"][0]["text"] == "a"
    assert error["error"].keys() == {"message", "type", "param", "code"}
    assert (error["error"]["type"], error["error"]["code"]) == ("server_error", "engine_failed")
    (line,) = lines.found
    assert (line["status"], line["error"]) == (200, "engine_failed"), "its status was sent before it broke"


def test_a_stream_that_meets_a_fault_of_ours_says_so_without_details(lines: Lines) -> None:
    script = Script([[Accepted(3, 1), *deltas(0, "a b c")[:1], ValueError(SECRET)]])
    _, error = asyncio.run(streamed(script.exchange(stream=True)))
    assert error["error"]["code"] == "internal_error"
    assert SECRET not in repr(error)
    assert SECRET not in repr(lines.found)
    assert script.memory.counters["requests_failed_total", LABELS] == 1


def test_a_request_that_goes_on_elsewhere_is_one_request(lines: Lines) -> None:
    rest: list[Said] = [*deltas(0, "a b c")[1:]]
    script = Script([[Accepted(3, 1), *deltas(0, "a b c")[:1], ReplicaLost("dead")], [Accepted(3, 1), *rest]])
    answer = asyncio.run(whole(script.exchange()))
    assert answer["choices"][0]["text"] == "abc"
    assert answer["usage"]["completion_tokens"] == 3
    assert script.memory.counters["requests_resumed_total", LABELS] == 1
    assert script.memory.counters["request_success_total", (*LABELS, "stop")] == 1
    assert lines.found[-1]["resumed"] == 1


def test_a_client_that_leaves_a_stream_frees_it_and_is_counted(lines: Lines) -> None:
    script = Script([[Accepted(3, 1), *deltas(0, "a b c")]])

    async def body() -> None:
        exchange = script.exchange(stream=True)
        await exchange.begin()
        async with aclosing(exchange.events()) as events:  # type: ignore[type-var]  # it is a generator
            await anext(events)

    asyncio.run(body())
    assert script.closed == 1
    assert script.memory.counters["requests_cancelled_total", LABELS] == 1
    (line,) = lines.found
    assert (line["status"], line["completion_tokens"]) == (499, 1)


@pytest.mark.parametrize("read", [0, 1])
def test_closing_ends_a_stream_whose_reader_does_not(lines: Lines, read: int) -> None:
    script = Script([[Accepted(3, 1), *deltas(0, "a b c")]])

    async def body() -> None:
        exchange = script.exchange(stream=True)
        await exchange.begin()
        events = exchange.events()
        for _ in range(read):
            await anext(events)
        await exchange.close()
        assert script.closed == 1
        assert [line["status"] for line in lines.found] == [499]

    asyncio.run(body())
    assert script.memory.counters["requests_cancelled_total", LABELS] == 1


def test_closing_what_has_ended_changes_nothing(lines: Lines) -> None:
    script = Script([[Accepted(3, 1), *deltas(0, "a b c")]])

    async def body() -> None:
        exchange = script.exchange(stream=True)
        await streamed(exchange)
        await exchange.close()

    asyncio.run(body())
    assert [line["status"] for line in lines.found] == [200]
    assert "requests_cancelled_total" not in {name for name, _ in script.memory.counters}


def test_a_client_that_leaves_before_the_first_token_is_counted(lines: Lines) -> None:
    script = Script([[None]])

    async def body() -> None:
        work = asyncio.create_task(script.exchange().begin())
        while not script.calls:
            await asyncio.sleep(0)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    asyncio.run(body())
    assert script.memory.counters["requests_cancelled_total", ("cron", "none")] == 1
    assert lines.found[0]["status"] == 499


def test_a_prompt_that_is_only_given_back_has_no_first_token(lines: Lines) -> None:
    nothing: list[Said] = [[(0, Delta("", (), 3, 0, "length"))]]
    script = Script([[Accepted(3, 1, ("hello",)), *nothing]])
    answer = asyncio.run(whole(script.exchange(echo=True, max_tokens=0)))
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("hello", "length")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert "time_to_first_token_seconds" not in {name for name, _ in script.memory.observed}
    assert "ttft_ms" not in lines.found[0]


def test_the_line_names_the_trace(lines: Lines) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    script = Script([[Accepted(3, 1), *deltas(0, "a")]])
    script.spans = tracing.Tracing(sdk.TracerProvider().get_tracer("test"), lambda: None)
    exchange = script.exchange()
    asyncio.run(whole(exchange))
    assert lines.found[0]["trace_id"] == exchange.trace.trace_id
    assert len(str(exchange.trace.trace_id)) == 32
