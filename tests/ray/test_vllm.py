"""Real vLLM, through the real ray.serve.llm, behind the endpoint: where its CPU build is installed (docs/vllm.md)."""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from transformers import GenerationConfig

from heliostat.models import base
from heliostat.serving import keys, launch
from heliostat.serving.api import Front, create_app, guarded
from heliostat.serving.calls import Delta
from heliostat.serving.config import EndpointArgs, ServingConfig
from heliostat.serving.engine import EngineFailed
from heliostat.serving.generation import Served
from heliostat.serving.sampling import SamplingParams
from heliostat.serving.served import ServedModel
from tests import tiny
from tests.ports import free_port
from tests.service import connected, router_of

pytest.importorskip("vllm")

from heliostat.serving.vllm_model import VllmModel

SETTINGS: dict[str, Any] = {
    "engine": "vllm",
    "num_cpus": 1,
    "max_ongoing_requests": 8,
    # Compiling takes a minute; and others need the memory too.
    "engine_kwargs": {"enforce_eager": True, "gpu_memory_utilization": 0.1},
}
PROMPT = [40, 41, 42, 43, 44, 45]


@pytest.fixture(scope="module", autouse=True)
def _a_small_engine() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("these tests are for vLLM's CPU build")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with heads as large as vLLM's kernels need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.KEYS, "llama", tiny.KEYS["llama"] | {"hidden_size": 128})
        return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def model(ray_cluster: Any, folder: Path, loop: asyncio.Runner) -> Iterator[VllmModel]:
    started = loop.run(VllmModel.start(str(folder), "tiny", EndpointArgs(**SETTINGS)))
    yield started
    started.close()


@pytest.fixture(scope="module")
def other(folder: Path, loop: asyncio.Runner) -> Iterator[ServedModel]:
    """The same model in transformers' engine."""
    args = EndpointArgs(max_batch_tokens=64, cache_tokens=2048, max_ongoing_requests=8)
    started = loop.run(ServedModel.start(base.load_for_inference(str(folder)), "tiny", args))
    yield started
    started.close()


async def deltas(served: Served, params: SamplingParams, emitted: tuple[int, ...] = ()) -> list[Delta]:
    return [delta async for _, delta in served.generate(PROMPT, params, emitted)]


def tokens(found: list[Delta]) -> list[int]:
    return [token for delta in found for token in delta.token_ids]


def text(found: list[Delta]) -> str:
    return "".join(delta.text for delta in found)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(24),
        SamplingParams(24, repetition_penalty=1.3),
        SamplingParams(24, presence_penalty=1.0, frequency_penalty=0.5),
        SamplingParams(24, logit_bias={50: 5.0, 60: -100.0}),
        SamplingParams(24, min_tokens=20),
        SamplingParams(24, temperature=1, top_k=1),
        SamplingParams(1),
    ],
    ids=str,
)
def test_greedy_tokens_and_texts_are_those_of_the_other_engine(
    model: VllmModel, other: ServedModel, loop: asyncio.Runner, params: SamplingParams
) -> None:
    ours, theirs = loop.run(deltas(model, params)), loop.run(deltas(other, params))
    assert tokens(ours) == tokens(theirs)
    assert text(ours) == text(theirs)
    assert [ours[-1].finish_reason, ours[-1].completion_tokens] == [theirs[-1].finish_reason, len(tokens(ours))]


def test_the_tokens_are_those_of_generate(model: VllmModel, folder: Path, loop: asyncio.Runner) -> None:
    loaded = base.load_for_inference(str(folder))
    expected = loaded.model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0, len(PROMPT) :]
    assert tokens(loop.run(deltas(model, SamplingParams(24)))) == expected.tolist()


def test_a_completion_goes_on_where_another_replica_stopped(model: VllmModel, loop: asyncio.Runner) -> None:
    whole = tokens(loop.run(deltas(model, SamplingParams(24))))
    rest = loop.run(deltas(model, SamplingParams(24), tuple(whole[:10])))
    assert tokens(rest) == whole[10:]
    assert rest[-1].completion_tokens == len(whole)
    assert rest[-1].finish_reason is not None
    ended = loop.run(deltas(model, SamplingParams(10), tuple(whole[:10])))
    assert [delta.finish_reason for delta in ended] == ["length"]


def test_stops_end_a_completion(model: VllmModel, loop: asyncio.Runner) -> None:
    whole = loop.run(deltas(model, SamplingParams(24)))
    stop = text(whole)[4:7]
    found = loop.run(deltas(model, SamplingParams(24, stop=(stop,))))
    assert text(found) == text(whole).partition(stop)[0]
    assert found[-1].finish_reason == "stop"
    end = tokens(whole)[5]
    found = loop.run(deltas(model, SamplingParams(24, stop_token_ids=(end,))))
    assert tokens(found) == tokens(whole)[: tokens(whole).index(end) + 1]
    assert found[-1].finish_reason == "stop"


def test_a_seed_gives_the_same_sample(model: VllmModel, loop: asyncio.Runner) -> None:
    def sample(seed: int) -> list[int]:
        return tokens(loop.run(deltas(model, SamplingParams(24, temperature=1.5, seed=seed))))

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_log_probabilities_are_the_models_own(model: VllmModel, other: ServedModel, loop: asyncio.Runner) -> None:
    params = SamplingParams(8, logprobs=3, logit_bias={50: 5.0})
    ours, theirs = loop.run(deltas(model, params)), loop.run(deltas(other, params))
    pairs = zip((r for d in ours for r in d.logprobs), (r for d in theirs for r in d.logprobs), strict=True)
    for own, expected in pairs:
        assert (own.token_id, own.text) == (expected.token_id, expected.text)
        assert own.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [token for token, _, _ in own.top] == [token for token, _, _ in expected.top]
    scored, expected_scores = loop.run(model.score(PROMPT, 2)), loop.run(other.score(PROMPT, 2))
    assert scored[0] is expected_scores[0] is None
    for one, another in zip(scored[1:], expected_scores[1:], strict=True):
        assert one is not None
        assert another is not None
        assert one.logprob == pytest.approx(another.logprob, abs=1e-4)
        assert [token for token, _, _ in one.top] == [token for token, _, _ in another.top]


def test_a_generation_that_nobody_reads_any_more_is_ended(model: VllmModel, loop: asyncio.Runner) -> None:
    async def leave_early() -> int:
        generation: AsyncGenerator[Any] = model.generate(PROMPT, SamplingParams(100, min_tokens=100))
        async with aclosing(generation):
            await anext(generation)
            assert model.in_flight == 1
        await asyncio.sleep(0.2)
        client = model.server.engine._engine_client
        return int(client.output_processor.get_num_unfinished_requests())

    assert loop.run(leave_early()) == 0
    assert model.in_flight == 0


def test_the_gateway_in_front_of_it_is_the_same(model: VllmModel, loop: asyncio.Runner, tmp_path: Path) -> None:
    """Keys, limits, validation, errors: a chat template in a request is refused, not used."""
    file = str(tmp_path / "keys.yaml")
    key = keys.add(file, "me")
    args = EndpointArgs(**SETTINGS, api_keys=file)
    front = Front.of(args)
    http = connected(guarded(create_app(router_of(model, args), front), front))  # type: ignore[arg-type]

    def post(path: str, authorization: str = f"Bearer {key}", **body: Any) -> httpx2.Response:
        sent = http.post(path, json={"model": "tiny", **body}, headers={"Authorization": authorization})
        return loop.run(sent)

    messages = [{"role": "user", "content": "hello"}]
    answer = post("/chat/completions", messages=messages, max_tokens=5, temperature=0, n=2, logprobs=True)
    assert answer.status_code == 200, answer.text
    assert len({choice["message"]["content"] for choice in answer.json()["choices"]}) == 1
    assert answer.json()["usage"]["completion_tokens"] <= 10
    assert post("/chat/completions", authorization="Bearer no", messages=messages).status_code == 401
    refusals: list[tuple[str, dict[str, Any], str]] = [
        ("/chat/completions", {"messages": messages, "chat_template": "{{ 1 }}"}, "unknown_parameter"),
        ("/chat/completions", {"messages": messages, "num_beams": 2}, "unsupported_parameter"),
        ("/completions", {"prompt": "a", "max_tokens": 500}, "context_length_exceeded"),
        ("/completions", {"prompt": [4000]}, "invalid_value"),
    ]
    for path, body, code in refusals:
        refused = post(path, **body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
    echoed = post("/completions", prompt="hello", echo=True, max_tokens=0, logprobs=1).json()["choices"][0]
    assert echoed["text"] == "hello"
    assert echoed["logprobs"]["token_logprobs"][0] is None


def test_a_version_is_tried_out_before_it_takes_requests(model: VllmModel, loop: asyncio.Runner) -> None:
    loop.run(model.try_out())


def test_when_its_processes_are_gone_requests_fail_and_the_replica_is_unhealthy(
    model: VllmModel, loop: asyncio.Runner
) -> None:
    """The last test with this engine."""

    async def lose_it() -> None:
        generation = model.generate(PROMPT, SamplingParams(100, min_tokens=100))
        async with aclosing(generation):
            await anext(generation)
            for process in psutil.Process().children(recursive=True):
                if "EngineCore" in process.name():
                    process.kill()
            with pytest.raises(EngineFailed):
                async for _ in generation:
                    pass
        async with asyncio.timeout(20):
            while model.healthy:
                await asyncio.sleep(0.1)

    loop.run(lose_it())
    assert model.in_flight == 0
    with pytest.raises(EngineFailed):
        loop.run(deltas(model, SamplingParams(2)))


def test_an_endpoint_on_ray_serve(ray_cluster: Any, folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    GenerationConfig(do_sample=False, eos_token_id=1, max_new_tokens=7).save_pretrained(own)
    config = ServingConfig(**SETTINGS, port=free_port())
    running = launch.start(config, str(own), model_id="tiny")
    try:
        with httpx2.Client(base_url=running.url, timeout=60) as http:
            answer = http.post("/completions", json={"model": "tiny", "prompt": "hello"}).json()
            assert answer["usage"]["completion_tokens"] <= 7
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True}
            streamed = http.post("/chat/completions", json=body)
            assert streamed.text.rstrip().endswith("data: [DONE]")
    finally:
        running.stop()
    deadline = time.monotonic() + 60
    while [process.pid for process in psutil.process_iter() if "EngineCore" in process.name()]:
        assert time.monotonic() < deadline, "vLLM's processes end with the replica"
        time.sleep(0.5)
