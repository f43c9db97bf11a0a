"""What the serving benchmark makes of streams, rounds and memory. That servers can be measured is not tested here."""

import asyncio
import json
from typing import Any

import httpx2
import pytest

from benchmarks import serve, streams
from benchmarks.streams import Ask, Round, Stream
from tests import tiny

EVENTS = [
    {"choices": [{"text": ""}], "usage": None},
    {"choices": [{"text": "a"}], "usage": None},
    {"choices": [{"text": "b"}]},
    {"choices": [], "usage": {"completion_tokens": 3}},
]


def read(answer: httpx2.Response) -> Stream:
    """What the client makes of this answer."""

    async def run() -> Stream:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(lambda _: answer)) as http:
            return await streams.read(http, "http://server/v1", streams.body("m", Ask(" a", 3)))

    return asyncio.run(run())


def sse(*events: Any) -> str:
    """The events on the wire."""
    return "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)


def test_a_stream_is_read_whole() -> None:
    stream = read(httpx2.Response(200, text=sse(*EVENTS, "[DONE]")))
    assert (stream.tokens, stream.error) == (3, "")
    assert 0 < stream.first <= stream.last


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx2.Response(503, text="{}"), "HTTP 503"),
        (httpx2.Response(200, text=sse(*EVENTS[:2], {"error": {"message": "down"}})), "{'message': 'down'}"),
        (httpx2.Response(200, text=sse(*EVENTS[:2])), "no usage"),
        (httpx2.Response(200, text="data: {\n\n"), "JSONDecodeError"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(answer: httpx2.Response, error: str) -> None:
    assert read(answer).error.startswith(error)


def test_prompts_have_the_lengths_asked_for() -> None:
    tokenizer = tiny.tokenizer()
    asks = streams.requests(streams.words(tokenizer), 16, seed=3)
    assert sorted(len(tokenizer(ask.prompt)["input_ids"]) for ask in asks) == streams.spread(16, 256, 16)
    assert sorted(ask.max_tokens for ask in asks) == streams.spread(16, 128, 16)
    assert asks == streams.requests(streams.words(tokenizer), 16, seed=3)
    assert asks != streams.requests(streams.words(tokenizer), 16, seed=4)


def test_clients_work_off_a_list_together() -> None:
    at_once, most = 0, 0

    async def ask(_: Ask) -> Stream:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1
        return Stream(2, 0.1, 0.2)

    done = asyncio.run(streams.work_off([Ask("a", 1)] * 10, 4, ask))
    assert (len(done.streams), most, done.tokens) == (10, 4, 20)


def test_figures_are_medians_of_rounds_and_quantiles_of_streams() -> None:
    quick, slow = Stream(11, 1.0, 2.0), Stream(11, 2.0, 4.0)
    broken = Stream(0, 9.0, 9.0, "HTTP 503")
    found = streams.figures([Round([quick, broken], 1.1, 2.2), Round([slow], 2.2, 2.2), Round([slow], 2.2, 2.2)])
    assert found["tokens_per_second"] == pytest.approx(5)
    assert found["cpu_ms_per_token"] == pytest.approx(200)
    assert (found["ttft_p50_ms"], found["tpot_p50_ms"]) == (2000, 200)
    assert (found["tokens"], found["errors"]) == (33, 1)


def test_ratios_compare_contenders_of_the_same_turn() -> None:
    def turn(seconds: float) -> list[Round]:
        return [Round([Stream(10, seconds / 2, seconds)], seconds)]

    found = serve.summary({"ours": turn(1), "peer": turn(2), "engine": turn(0.5)})
    assert (found["speed_ratio"], found["ttft_ratio"]) == (2, 0.5)
    assert found["gateway_ms_per_token"] == pytest.approx(50)


def test_growth_compares_the_end_with_the_beginning() -> None:
    samples = [{"replica": (100 + minute) << 20, "proxy": 100 << 20} for minute in range(24)]
    found = serve.growth(samples)
    assert found["rss_mib_first"] == {"replica": 100.5, "proxy": 100, "all": 200.5}
    assert found["growth_percent"]["proxy"] == 0
    assert found["growth_percent"]["all"] == pytest.approx(100 * 22 / 200.5, abs=0.01)
