"""The endpoint on Ray Serve: OpenAI's client against real HTTP, start and stop from the driver, nothing left behind."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import ray
import yaml
from ray import serve

from heliostat.errors import ConfigError, ModelError, RegistryError, ResourceError
from heliostat.models import base, scratch
from heliostat.serving import launch
from heliostat.serving.config import EndpointArgs, ServingConfig
from heliostat.serving.endpoint import build

ROOT = Path(__file__).parents[2]
CANARY = "canary-7f3a in the prompt"


@pytest.fixture(scope="module")
def endpoint_ray() -> Iterator[None]:
    """Ray for this module."""
    ray.init(num_cpus=4, include_dashboard=True, logging_level="ERROR", log_to_driver=False)
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that chats in ChatML."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    tokenizer = scratch.train_tokenizer(["hello world"] * 2, 300, 512, chat=True)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    keys = {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    scratch.write(folder, tokenizer, "gpt2", keys, 512)
    model = base.load_untrained(str(folder), seed=1).model
    # Without an end token, a completion is as long as asked for.
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config(**changes: Any) -> ServingConfig:
    sizes = {"num_cpus": 0.5, "cache_tokens": 8192, "port": free_port()}
    return ServingConfig(**(sizes | changes))


@pytest.fixture(scope="module")
def endpoint(endpoint_ray: None, model_folder: Path) -> Iterator[launch.Endpoint]:
    running = launch.start(config(), str(model_folder))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(endpoint: launch.Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_openais_client_completes_chats_and_streams(client: openai.OpenAI, model_folder: Path) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny-chat"]
    whole = client.completions.create(model="tiny-chat", prompt="hello", max_tokens=20)
    loaded = base.load_for_inference(str(model_folder))
    ids = loaded.tokenizer("hello", return_tensors="pt")
    expected = loaded.model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert whole.choices[0].text.rstrip("\ufffd") == loaded.tokenizer.decode(expected).rstrip("\ufffd")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20

    stream = client.completions.create(model="tiny-chat", prompt="hello", max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    messages: Any = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="tiny-chat", messages=messages, max_tokens=10)
    chunks = client.chat.completions.create(model="tiny-chat", messages=messages, max_tokens=10, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_comes_while_it_is_generated(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="tiny-chat", prompt="hello", max_tokens=400, stream=True)
    next(iter(stream))
    # A second request is answered in full while the first is being streamed.
    assert client.completions.create(model="tiny-chat", prompt="a", max_tokens=1).choices[0].finish_reason == "length"
    assert sum(1 for _ in stream) > 100


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="hello")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny-chat", prompt="hello", presence_penalty=1)
    assert (refused.value.param, refused.value.code) == ("presence_penalty", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny-chat", prompt="hello", max_tokens=5000)
    assert long.value.code == "context_length_exceeded"


def test_health_and_request_ids(endpoint: launch.Endpoint) -> None:
    assert httpx2.get(endpoint.url.replace("/v1", "/health")).status_code == 200
    ids = [httpx2.get(f"{endpoint.url}/models").headers["x-request-id"] for _ in range(2)]
    assert all(ids)
    assert ids[0] != ids[1]


def in_flight() -> int:
    """Requests in the engine of the one replica."""
    replicas = serve.status().applications[launch.APPLICATION].deployments["Endpoint"].replica_states
    assert replicas == {"RUNNING": 1}
    handle = serve.get_app_handle(launch.APPLICATION)
    return int(handle.in_flight.remote().result())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(endpoint: launch.Endpoint, stream: bool) -> None:
    request = {"model": "tiny-chat", "prompt": "hello", "max_tokens": 480, "n": 8, "stream": stream}

    async def leave() -> None:
        async with httpx2.AsyncClient() as http:
            jobs = [asyncio.create_task(http.post(f"{endpoint.url}/completions", json=request)) for _ in range(4)]
            while await asyncio.to_thread(in_flight) < 8:
                await asyncio.sleep(0.01)
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    asyncio.run(leave())
    until(lambda: in_flight() == 0)


def test_neither_prompts_nor_completions_are_logged(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny-chat", prompt=CANARY, max_tokens=30)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny-chat", prompt=CANARY, max_tokens=5000)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny-chat", prompt=CANARY, extra_body={"nonsense": CANARY})
    logs = [path for path in Path(ray._private.worker._global_node.get_logs_dir_path()).rglob("*") if path.is_file()]
    assert logs
    for path in logs:
        content = path.read_bytes()
        assert CANARY.encode() not in content, path
        assert answer.choices[0].text.encode() not in content, path


def test_starting_twice_or_on_a_taken_port_is_refused(endpoint: launch.Endpoint, model_folder: Path) -> None:
    port = int(endpoint.url.rsplit(":", 1)[1].removesuffix("/v1"))
    with pytest.raises(ResourceError, match=rf"port {port} .*serving\.port="):
        launch.start(config(port=port), str(model_folder))
    with pytest.raises(ResourceError, match="already"):
        launch.start(config(), str(model_folder))
    assert httpx2.get(f"{endpoint.url}/models").status_code == 200
