"""`engine: vllm`: what is refused, and what ray.serve.llm is told; against its own classes where they are installed."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import GenerationConfig

from heliostat.errors import ConfigError, ModelError
from heliostat.models import base
from heliostat.serving import replica, vllm, vllm_model
from heliostat.serving.admission import Admission
from heliostat.serving.bounds import Bounds
from heliostat.serving.config import AutoscalingArgs, EndpointArgs
from heliostat.serving.endpoint import build
from heliostat.serving.prompts import PromptEncoder
from heliostat.serving.sampling import DecodingDefaults, InvalidRequest, SamplingParams
from heliostat.serving.text import TokenTexts
from heliostat.serving.vllm_model import VllmModel
from tests import tiny


def args(**changes: Any) -> EndpointArgs:
    return EndpointArgs(**({"engine": "vllm", "model": "m", "num_cpus": 2, "num_gpus": 1} | changes))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())


def test_without_the_extra_an_endpoint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'heliostat\[vllm\]'"):
        build(args())
    build(args(engine="transformers"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "transformers", "engine_kwargs": {"seed": 1}}, "need `engine: vllm`"),
        ({"engine": "vllm", "cache_tokens": 1}, "`cache_tokens` is of `engine: transformers`"),
        ({"engine": "vllm", "max_batch_tokens": 1}, "`max_batch_tokens` is of `engine: transformers`"),
        ({"engine": "sglang"}, "'transformers' or 'vllm'"),
    ],
)
def test_settings_of_the_other_engine_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EndpointArgs(**values)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine_kwargs": {"trust_remote_code": True}}, "trust_remote_code cannot be set: code that comes with"),
        ({"engine_kwargs": {"load_format": "pt"}}, "load_format cannot be set: only safetensors"),
        ({"engine_kwargs": {"chat_template": "x"}}, "chat_template cannot be set"),
        ({"engine_kwargs": {"enable_log_requests": True}}, "enable_log_requests cannot be set"),
        ({"num_gpus": 1.5}, "num_gpus=1.5: vLLM takes a share of one GPU, or whole ones"),
        ({"num_gpus": 3, "engine_kwargs": {"pipeline_parallel_size": 2}}, "num_gpus=3 is not tensor_parallel_size=1"),
        ({"num_gpus": 2, "engine_kwargs": {"tensor_parallel_size": 4}}, "num_gpus=2 is not tensor_parallel_size=4"),
    ],
)
def test_what_vllm_could_not_run_with_is_refused_at_the_start(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(args(**changes))


BUNDLES = [
    ({"num_gpus": 1}, [{"GPU": 1, "CPU": 2}]),
    ({"num_gpus": 0.5}, [{"GPU": 0.5, "CPU": 2}]),
    ({"num_gpus": 4}, [{"GPU": 1, "CPU": 2}, {"GPU": 1}, {"GPU": 1}, {"GPU": 1}]),
    ({"num_gpus": 2, "engine_kwargs": {"pipeline_parallel_size": 2}}, [{"GPU": 1, "CPU": 2}, {"GPU": 1}]),
]


@pytest.mark.parametrize(("changes", "bundles"), [*BUNDLES, ({"num_gpus": 0}, [{"CPU": 2}])])
def test_a_replica_gets_all_its_gpus_on_one_node(changes: dict[str, Any], bundles: list[dict[str, float]]) -> None:
    application = replica.application("m", "m", "1", args(**changes), {"A": "b"})
    config = application._bound_deployment._replica_config
    assert config.placement_group_bundles == bundles
    assert config.placement_group_strategy == "STRICT_PACK"
    assert config.ray_actor_options["num_cpus"] == 2
    assert config.ray_actor_options.get("num_gpus", 0) == 0, "its workers have them"
    assert config.ray_actor_options["runtime_env"] == {"env_vars": {"A": "b", "VLLM_NO_USAGE_STATS": "1"}}


def test_the_other_engine_gets_what_it_got() -> None:
    application = replica.application("m", "m", "1", args(engine="transformers"), {})
    config = application._bound_deployment._replica_config
    assert config.placement_group_bundles is None
    assert (config.ray_actor_options["num_cpus"], config.ray_actor_options["num_gpus"]) == (2, 1)


def test_what_ray_serve_llm_is_told() -> None:
    given = args(
        num_gpus=2, max_ongoing_requests=99, engine_kwargs={"max_model_len": 512, "enable_prefix_caching": False}
    )
    assert vllm.settings("/models/m", "chat", 2048, "bfloat16", given) == {
        "model_loading_config": {"model_id": "chat", "model_source": "/models/m"},
        "engine_kwargs": {
            "max_model_len": 512,
            "dtype": "bfloat16",
            "tensor_parallel_size": 2,
            "max_num_seqs": 99,
            "load_format": "safetensors",
            "trust_remote_code": False,
            "enable_log_requests": False,
            "generation_config": "vllm",
            "enable_prefix_caching": False,
        },
        "accelerator_config": {"kind": "gpu"},
        "placement_group_config": {"bundle_per_worker": {"GPU": 1}, "strategy": "STRICT_PACK"},
    }


@pytest.mark.parametrize(("changes", "bundles"), BUNDLES)
def test_the_real_config_takes_it_and_places_workers_alike(
    changes: dict[str, Any], bundles: list[dict[str, float]]
) -> None:
    pytest.importorskip("vllm")
    from ray.serve.llm import LLMConfig, LLMServer

    scaling = AutoscalingArgs(max_replicas=3)
    given = args(**changes, autoscaling=scaling)
    config = LLMConfig(
        **vllm.settings("/models/m", "m", 128, "float16", given),
        deployment_config={
            "max_ongoing_requests": given.max_ongoing_requests,
            "autoscaling_config": scaling.model_dump(),
            "ray_actor_options": {"num_cpus": given.num_cpus},
        },
    )
    options = LLMServer.get_deployment_options(config)
    assert [
        {name: value for name, value in bundle.items() if value} for bundle in options["placement_group_bundles"]
    ] == bundles
    assert vllm.placement(given) == {"placement_group_bundles": bundles, "placement_group_strategy": "STRICT_PACK"}
    assert options["placement_group_strategy"] == "STRICT_PACK"


def test_vllms_own_engine_arguments_take_it(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from ray.serve.llm import LLMConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    given = args(num_gpus=2, engine_kwargs={"gpu_memory_utilization": 0.5, "kv_cache_dtype": "fp8"})
    config = LLMConfig(**vllm.settings(str(tmp_path), "chat", 128, "float16", given))
    made = AsyncEngineArgs(**config.get_engine_config().get_initialization_kwargs())
    assert (made.model, made.served_model_name, made.tensor_parallel_size) == (str(tmp_path), ["chat"], 2)
    assert (made.load_format, made.trust_remote_code, made.enable_log_requests) == ("safetensors", False, False)
    assert (made.gpu_memory_utilization, made.kv_cache_dtype, made.max_num_seqs) == (0.5, "fp8", 32)


def test_an_engine_argument_that_vllm_does_not_know_is_named() -> None:
    pytest.importorskip("vllm")
    settings = vllm.settings("/models/m", "m", 128, "float16", args(engine_kwargs={"no_such_argument": 1}))
    with pytest.raises(ConfigError, match=r"serving.engine_kwargs: Unknown engine argument: no_such_argument"):
        asyncio.run(vllm_model._start(settings))


def test_a_node_without_the_extra_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve.llm", None)
    with pytest.raises(ConfigError, match=r"install heliostat\[vllm\]"):
        asyncio.run(vllm_model._start({}))


def test_a_bundle_that_decodes_with_beams_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, "llama")
    GenerationConfig(num_beams=4).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"`num_beams` cannot be had with engine: vllm"):
        asyncio.run(VllmModel.start(str(folder), "tiny", args()))


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is an adapter.*heliostat merge"):
        asyncio.run(VllmModel.start(str(tmp_path), "tiny", args()))


@pytest.fixture
def model(tmp_path: Path) -> Iterator[VllmModel]:
    """One without an engine."""
    tokenizer = base.load_tokenizer(str(tiny.write_model(tmp_path, "llama")))
    prompts = PromptEncoder(tokenizer, 128)
    yield VllmModel(
        "tiny",
        prompts,
        DecodingDefaults(0, 0, 1),
        TokenTexts(tokenizer),
        tokenizer,
        Bounds(400, 128),
        frozenset({1}),
        [],
        Admission(1000, 1, 50),
        None,
    )
    prompts.close()


def test_what_only_generate_can_do_is_refused_by_name(model: VllmModel) -> None:
    with pytest.raises(InvalidRequest, match="`typical_p` cannot be had with engine: vllm") as found:
        model.check([5], SamplingParams(4, temperature=1, extra={"typical_p": 0.5}))
    assert (found.value.param, found.value.code) == ("typical_p", "unsupported_parameter")
    with pytest.raises(InvalidRequest, match="length is 128 tokens"):
        model.check([5] * 100, SamplingParams(29))


def test_a_request_is_what_vllm_samples_by(model: VllmModel) -> None:
    pytest.importorskip("vllm")
    from ray.serve.llm.openai_api_models import CompletionRequest

    asked = SamplingParams(
        20,
        temperature=0.5,
        top_k=7,
        top_p=0.8,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={5: -1.0},
        seed=3,
        min_tokens=4,
        stop=("x",),
        stop_token_ids=(9,),
        logprobs=2,
    )
    request = CompletionRequest(model="tiny", **model._request([5, 6], asked, skipped=3))
    made = request.to_sampling_params(request.max_tokens, {"temperature": 2.0, "top_k": 50, "min_p": 0.5})
    assert (made.max_tokens, made.min_tokens) == (17, 1), "without the tokens that were given out before"
    assert (made.temperature, made.top_k, made.top_p, made.min_p, made.seed) == (0.5, 7, 0.8, 0.01, 3)
    assert (made.repetition_penalty, made.presence_penalty, made.frequency_penalty) == (1.1, 0.2, 0.3)
    assert (made.logit_bias, made.stop_token_ids, made.logprobs) == ({5: -1.0}, [1, 9], 2)
    assert not made.stop, "strings are looked for here"
    assert made.ignore_eos, "the ends are the bundle's, not the tokenizer's"
    greedy = CompletionRequest(model="tiny", **model._request([5, 6], SamplingParams(2), 0))
    plain = greedy.to_sampling_params(2, {"temperature": 2.0, "top_k": 50, "min_p": 0.5, "repetition_penalty": 2})
    assert (plain.temperature, plain.top_k, plain.min_p, plain.repetition_penalty) == (0, 0, 0, 1)
    assert plain.logprobs is None
