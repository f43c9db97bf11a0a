"""The endpoint on Ray Serve: OpenAI's client against real HTTP, start and stop from the driver, nothing left behind."""

import asyncio
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import ray
import yaml
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from transformers import GenerationConfig

from benchmarks import faults
from heliostat.errors import ConfigError, ModelError, RegistryError, ResourceError
from heliostat.evaluation.prefix import KEY, PromptPrefix
from heliostat.models import base, bundle
from heliostat.registry import store, versions
from heliostat.serving import applications, launch
from heliostat.serving.applications import REPLICA, VERSIONS
from heliostat.serving.config import EndpointArgs, ServingConfig
from heliostat.serving.endpoint import build
from tests import load, tiny
from tests.bundles import write_bundle
from tests.long_model import write_long_bundle
from tests.ports import free_port
from tests.wire import answers, until

ROOT = Path(__file__).parents[2]
CANARY = "canary-7f3a in the prompt"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with room for long completions."""
    return write_long_bundle(tmp_path_factory.mktemp("models") / "tiny-chat")


def config(**changes: Any) -> ServingConfig:
    sizes = {"num_cpus": 0.5, "cache_tokens": 8192, "port": free_port()}
    return ServingConfig(**(sizes | changes))


@pytest.fixture(scope="module")
def endpoint(ray_cluster: Any, model_folder: Path, home: Path) -> Iterator[launch.Endpoint]:
    """It serves the model from a registry in `home`."""
    os.environ["HELIOSTAT_HOME"] = str(home)
    run_id = store.client().create_run(store.experiment_id("serving")).info.run_id
    versions.register(run_id, model_folder, "tiny-chat", {}, alias="champion")
    running = launch.start(config(), "models:/tiny-chat@champion")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(endpoint: launch.Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0)


def test_openais_client_completes_chats_and_streams(client: openai.OpenAI, model_folder: Path) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny-chat", "tiny-chat@1"]
    whole = client.completions.create(model="tiny-chat", prompt="hello", max_tokens=20)
    loaded = base.load_for_inference(str(model_folder))
    ids = loaded.tokenizer("hello", return_tensors="pt")
    expected = loaded.model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert whole.choices[0].text.rstrip("\ufffd") == loaded.tokenizer.decode(expected, skip_special_tokens=True).rstrip(
        "\ufffd"
    )
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
        client.completions.create(model="tiny-chat", prompt="hello", suffix="x")
    assert (refused.value.param, refused.value.code) == ("suffix", "unsupported_parameter")
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
    (name,) = applications.running(VERSIONS)
    return int(serve.get_deployment_handle(REPLICA, name).in_flight.remote().result())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(endpoint: launch.Endpoint, stream: bool) -> None:
    request = {"model": "tiny-chat", "prompt": "hello", "max_tokens": 480, "n": 8, "stream": stream}

    async def leave() -> None:
        async with httpx2.AsyncClient() as http:
            jobs = [asyncio.create_task(http.post(f"{endpoint.url}/completions", json=request)) for _ in range(4)]
            while await asyncio.to_thread(in_flight) == 0:
                await asyncio.sleep(0.01)
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    asyncio.run(leave())
    until(lambda: in_flight() == 0, seconds=120)


def test_sixteen_at_a_time_get_what_generate_gives(endpoint: launch.Endpoint, model_folder: Path) -> None:
    prompts = [f"{text} {number}" for number, text in zip(range(64), itertools.cycle(tiny.TEXTS), strict=False)]
    bodies = [
        {"model": "tiny-chat", "prompt": prompt, "max_tokens": 8 + number % 24} for number, prompt in enumerate(prompts)
    ]
    loaded = base.load_for_inference(str(model_folder))

    def expected(body: dict[str, Any]) -> str:
        ids = loaded.tokenizer(body["prompt"], return_tensors="pt")
        output = loaded.model.generate(**ids, max_new_tokens=body["max_tokens"], do_sample=False)
        return str(loaded.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    answers = asyncio.run(load.each(endpoint.url, bodies, 16))
    assert [answer.text.rstrip("\ufffd") for answer in answers] == [expected(body).rstrip("\ufffd") for body in bodies]


def test_what_clients_write_is_in_no_log_metric_or_record(endpoint: launch.Endpoint, home: Path) -> None:
    """Nor are the answers."""
    good = [{"prompt": f"{CANARY} {number}", "max_tokens": 1} for number in range(400)]
    long = [{"prompt": f"{CANARY} {number}", "max_tokens": 30} for number in range(20)]
    bad = [
        {"prompt": f"{CANARY} {number}", **wrong}
        for number in range(20)
        for wrong in ({"max_tokens": 5000}, {"nonsense": CANARY}, {"stop": [CANARY * 50]}, {"model": CANARY})
    ]
    bodies = [{"model": "tiny-chat", **body} for body in (*good, *long, *bad)]
    answers = asyncio.run(load.each(endpoint.url, bodies, 16))
    assert len(answers) == 500
    assert [answer.kind for answer in answers] == ["complete"] * 420 + ["refused"] * 80
    texts = {CANARY.encode(), *(answer.text.encode() for answer in answers[400:420])}
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = [path for folder in (logs, home) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("replica_") for path in files)
    assert any(path.suffix == ".db" for path in files)
    assert [path for path in files for text in texts if text in path.read_bytes()] == []
    until(lambda: counted(endpoint.url, "requests_total") >= 500, seconds=120)
    metrics = httpx2.get(endpoint.url.replace("/v1", "/metrics")).content
    assert [text for text in texts if text in metrics] == []


def counted(url: str, name: str) -> float:
    return asyncio.run(faults.counted(url, name))


def test_starting_twice_or_on_a_taken_port_is_refused(endpoint: launch.Endpoint, model_folder: Path) -> None:
    port = int(endpoint.url.rsplit(":", 1)[1].removesuffix("/v1"))
    with pytest.raises(ResourceError, match=rf"port {port} .*serving\.port="):
        launch.start(config(port=port), str(model_folder))
    with pytest.raises(ResourceError, match="already"):
        launch.start(config(), str(model_folder))
    assert httpx2.get(f"{endpoint.url}/models").status_code == 200


def test_what_cannot_be_served_is_told_before_anything_starts(ray_cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such"):
        launch.start(config(), str(tmp_path / "nowhere"))
    with pytest.raises(RegistryError, match="nobody"):
        launch.start(config(), "models:/nobody@champion")
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(ResourceError, match=r"serving\.host.*keys"):
            launch.start(config(host=host), str(tmp_path))
    with pytest.raises(ResourceError, match=r"serving\.num_replicas.*GPU"):
        launch.start(config(num_gpus=1), str(tmp_path))
    with pytest.raises(ConfigError, match="model"):
        build(EndpointArgs())


@pytest.fixture
def no_endpoint(ray_cluster: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    """Serve is down; run these last, since they end the module's endpoint."""
    serve.shutdown()
    yield
    assert not serve.status().applications
    serve.shutdown()


def test_a_model_that_fails_in_the_replica_is_one_clear_error(no_endpoint: None, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "model")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    settings = config()
    with pytest.raises(ModelError, match=r"config\.json"):
        launch.start(settings, str(folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", settings.port))


def test_a_model_that_is_not_loaded_in_time_is_given_up(no_endpoint: None, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"not loaded within serving\.startup_timeout_s=0\.01"):
        launch.start(config(startup_timeout_s=0.01), str(write_bundle(tmp_path / "model")))


def test_a_bundle_served_from_the_registry_answers_under_its_name(no_endpoint: None, tmp_path: Path) -> None:
    run_id = store.client().create_run(store.experiment_id("serving")).info.run_id
    versions.register(run_id, write_bundle(tmp_path / "model"), "greeter", {}, alias="champion")
    running = launch.start(config(), "models:/greeter@champion")
    client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)
    answer = client.completions.create(model="greeter", prompt="the big cat")
    assert answer.usage is not None
    # The bundle's own max_new_tokens, and its end token.
    assert 1 <= answer.usage.completion_tokens <= 8
    running.stop()
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_bundle_tuned_for_what_needs_generate_is_served_by_it(no_endpoint: None, tmp_path: Path) -> None:
    weights = tiny.write_model(tmp_path / "weights", "llama")
    tuned = {"num_beams": 3, "repetition_penalty": 1.3, "max_new_tokens": 20, "eos_token_id": 0, "pad_token_id": 1}
    prefix = PromptPrefix("Be brief.")
    folder = bundle.write(
        tmp_path / "tuned",
        weights=weights,
        tokenizer=tiny.tokenizer(),
        generation_config=GenerationConfig(**tuned),
        manifest={"task": "causal_lm", "format": "text", KEY: prefix.manifest()},
    )
    loaded = base.load_for_inference(str(folder))
    ids = loaded.tokenizer(prefix.text() + "the big cat", return_tensors="pt")
    output = loaded.model.generate(**ids)[0, ids["input_ids"].shape[1] :]
    running = launch.start(config(), str(folder))
    client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)
    answer = client.completions.create(model="tuned", prompt="the big cat")
    expected = loaded.tokenizer.decode(output, skip_special_tokens=True)
    assert answer.choices[0].text.rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert in_flight() == 0
    running.stop()


@pytest.fixture
def serve_config(model_folder: Path) -> dict[str, Any]:
    """serve/local.yaml for the tiny model, on a free port."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "serve" / "local.yaml").read_text())
    settings["http_options"]["port"] = free_port()
    application = settings["applications"][0]
    EndpointArgs(**application["args"])
    application["args"].update(model=str(model_folder), num_cpus=0.5)
    application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    return settings


def deploy(settings: dict[str, Any]) -> str:
    """By Serve's own client. Returns the origin of the URLs."""
    dashboard = ray._private.worker.get_dashboard_url()
    ServeSubmissionClient(f"http://{dashboard}").deploy_applications(settings)
    return f"http://127.0.0.1:{settings['http_options']['port']}"


def test_the_serve_config_deploys(no_endpoint: None, serve_config: dict[str, Any]) -> None:
    origin = deploy(serve_config)
    until(lambda: answers(f"{origin}/health"), seconds=120)
    client = openai.OpenAI(base_url=f"{origin}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list().data] == ["tiny-chat"]
    serve.shutdown()


def test_a_serve_config_that_is_open_to_all_does_not_deploy(no_endpoint: None, serve_config: dict[str, Any]) -> None:
    serve_config["http_options"]["host"] = "0.0.0.0"
    origin = deploy(serve_config)
    until(lambda: "it has no API keys" in applications.report("heliostat"), seconds=120)
    assert not answers(f"{origin}/v1/models")
    serve.shutdown()
