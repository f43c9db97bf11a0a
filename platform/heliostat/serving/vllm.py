"""vLLM's part of an endpoint's settings: what is refused, where replicas find room, what `ray.serve.llm` is told.

Knows values only: neither vLLM nor `ray.serve.llm`, which take half a minute to import and which the processes that
start replicas do not need.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from heliostat.errors import ConfigError
from heliostat.serving.config import EndpointArgs

# vLLM reports to its makers what it runs on, unless it is told not to.
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1"}
# Engine arguments that the endpoint sets itself, and why they cannot be had otherwise.
_OWN = {
    "model": "`model` names it",
    "served_model_name": "`model_id` names it",
    "tokenizer": "the model's own is used",
    "chat_template": "the model's own is used",
    "generation_config": "the endpoint applies it",
    "trust_remote_code": "code that comes with a model is never run",
    "load_format": "only safetensors are read",
    "enable_log_requests": "prompts are not logged",
    "max_num_seqs": "give `max_ongoing_requests`",
    "data_parallel_size": "give `num_replicas`",
}


def check(args: EndpointArgs) -> None:
    """Refuse what vLLM could not run with; nothing is loaded for that.

    Raises:
        ConfigError: vLLM is not installed, an engine argument is the endpoint's own, or `num_gpus` cannot be divided
            as it should be.
    """
    if args.engine != "vllm":
        return
    if find_spec("vllm") is None:
        raise ConfigError(
            "serving.engine: vllm is not installed here; install the extra: pip install 'heliostat[vllm]'"
        )
    for name, instead in _OWN.items():
        if name in args.engine_kwargs:
            raise ConfigError(f"serving.engine_kwargs: {name} cannot be set: {instead}")
    workers(args)


def workers(args: EndpointArgs) -> int:
    """Processes with a GPU each (a share of one below 1) that run one replica's model together; 1 without GPUs.

    Raises:
        ConfigError: `num_gpus` is not whole, or is not what the parallel sizes among the engine arguments need.
    """
    if args.num_gpus > 1 and args.num_gpus % 1:
        raise ConfigError(f"serving.num_gpus={args.num_gpus:g}: vLLM takes a share of one GPU, or whole ones")
    found = max(1, int(args.num_gpus))
    pipeline = args.engine_kwargs.get("pipeline_parallel_size", 1)
    tensor = args.engine_kwargs.get("tensor_parallel_size", found // pipeline)
    if tensor * pipeline != found:
        raise ConfigError(
            f"serving.num_gpus={args.num_gpus:g} is not tensor_parallel_size={tensor} times "
            f"pipeline_parallel_size={pipeline} of serving.engine_kwargs"
        )
    return found


def placement(args: EndpointArgs) -> dict[str, Any]:
    """Options of Ray Serve's deployment: all GPUs of a replica on the node where its model is fetched.

    The same bundles as those of ray.serve.llm's own deployments: the replica itself holds no GPU, its workers do.
    """
    bundles = [_bundle(args) for _ in range(workers(args))]
    bundles[0]["CPU"] = args.num_cpus
    return {"placement_group_bundles": bundles, "placement_group_strategy": "STRICT_PACK"}


def settings(source: str, model_id: str, max_length: int, dtype: str, args: EndpointArgs) -> dict[str, Any]:
    """The arguments of `ray.serve.llm.LLMConfig`.

    `source`: the model's folder. `max_length`, `dtype`: of the model, where the engine arguments have none.
    """
    pipeline = args.engine_kwargs.get("pipeline_parallel_size", 1)
    engine: Mapping[str, Any] = {
        "max_model_len": max_length,
        "dtype": dtype,
        "tensor_parallel_size": workers(args) // pipeline,
        **args.engine_kwargs,
        "max_num_seqs": args.max_ongoing_requests,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "enable_log_requests": False,
        # Every request brings all its settings, the model's defaults under its own.
        "generation_config": "vllm",
    }
    return {
        "model_loading_config": {"model_id": model_id, "model_source": source},
        "engine_kwargs": engine,
        "accelerator_config": {"kind": "gpu" if args.num_gpus else "cpu"},
        "placement_group_config": {"bundle_per_worker": _bundle(args), "strategy": "STRICT_PACK"},
    }


def _bundle(args: EndpointArgs) -> dict[str, float]:
    return {"GPU": args.num_gpus / workers(args)} if args.num_gpus else {"CPU": args.num_cpus}
