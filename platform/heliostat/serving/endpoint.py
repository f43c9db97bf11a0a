"""The Serve application of an endpoint: gateways that answer HTTP, and the director of the models behind them.

`build` takes the `args:` of a Serve config (serve/local.yaml) or of `heliostat serve`. Ray finds the type of its
parameter by inspection, so this module must not postpone the evaluation of annotations.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ray import serve
from ray.serve import Application

from heliostat.errors import ConfigError
from heliostat.serving import gateway, tracing, vllm
from heliostat.serving.applications import DIRECTOR
from heliostat.serving.config import EndpointArgs
from heliostat.serving.keys import KeyRing
from heliostat.serving.logs import logging_config
from heliostat.serving.rollout import Director


def build(args: EndpointArgs) -> Application:
    """The Serve application for `args`, in the environment that the cluster's nodes have.

    Raises:
        ConfigError: see `application`.
    """
    return application(args, {})


def application(args: EndpointArgs, environment: Mapping[str, str]) -> Application:
    """The Serve application for `args`. `environment`: variables that tell its processes where the registry is.

    Raises:
        ConfigError: `args` names no model, or two of the same name; the file of API keys is wrong; tracing or vLLM is
            asked for and not installed, or vLLM cannot be had as it is asked for.
    """
    if not args.all_models():
        raise ConfigError("`model` is missing from the endpoint's args; give models:/NAME@ALIAS or a bundle folder")
    names = [model.model_id or _name(model.model) for model in args.all_models()]
    if len(set(names)) < len(names):
        raise ConfigError("two of the endpoint's `models` have the same name; give each its own `model_id`")
    if args.api_keys:
        KeyRing(args.api_keys)
    tracing.check(args.tracing)
    vllm.check(args)
    director = serve.deployment(
        Director,
        name=DIRECTOR,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": dict(environment)}},
        # Gateways and replicas ask and tell all the time; none of that is work.
        max_ongoing_requests=10_000,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=5,
        logging_config=logging_config(),
    )
    return gateway.deployment(args).bind(args, director.bind(args, environment))


def _name(reference: str) -> str:
    """What a model without a `model_id` is called (see rollout.Target), without asking the registry."""
    registered = re.match(r"models:/([^/@]+)", reference)
    if registered:
        return registered[1]
    return Path(reference).name if Path(reference).is_dir() else reference
