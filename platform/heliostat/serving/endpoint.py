"""The Ray Serve deployment: one model, loaded in each replica, behind OpenAI's API. Knows Ray Serve, not the routes.

`build` takes the `args:` of a Serve config (serve/local.yaml) or of `heliostat serve`. Ray finds the type of its
parameter by inspection, so this module must not postpone the evaluation of annotations.
"""

import asyncio
import contextlib
from pathlib import Path

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from heliostat.errors import ConfigError
from heliostat.models.base import InferenceModel, load_for_inference
from heliostat.registry import versions
from heliostat.serving.api import create_app
from heliostat.serving.config import EndpointArgs
from heliostat.serving.served import ServedModel

# No access log: it would hold a line for every request. Nothing here or below logs prompts or completions.
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
# Running generations get this long to finish when a replica is stopped.
GRACEFUL_SHUTDOWN_S = 60.0


@serve.ingress()
class Endpoint:
    """A replica: the model, what generates with it, and the HTTP application."""

    async def __init__(self, args: EndpointArgs) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Load the model and start what generates; the replica takes requests when this returns.

        Raises:
            UserError: the model cannot be found, trusted, loaded or run; the message says why.
        """
        self._cleanup = contextlib.ExitStack()
        torch.set_num_threads(max(1, int(args.num_cpus)))
        self._served = await _serve_model(args)
        self._cleanup.callback(self._served.close)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application that Ray Serve puts behind its proxy."""
        return create_app(self._served)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica when this raises several times in a row."""
        if not self._served.healthy:
            raise RuntimeError("a generation thread is down")

    def in_flight(self) -> int:
        """Generations that are waiting or running in this replica."""
        return self._served.in_flight

    def __del__(self) -> None:
        self._cleanup.close()


def build(args: EndpointArgs) -> Application:
    """The Serve application for `args`.

    Raises:
        ConfigError: `args` names no model.
    """
    if args.model is None:
        raise ConfigError("`model` is missing from the endpoint's args; give models:/NAME@ALIAS or a bundle folder")
    deployment = serve.deployment(
        Endpoint,
        name="Endpoint",
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_ongoing_requests=args.max_ongoing_requests,
        max_constructor_retry_count=args.max_constructor_retry_count,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        logging_config=QUIET,
    )
    return deployment.bind(args)


async def _serve_model(args: EndpointArgs) -> ServedModel:
    resolved = versions.resolve(str(args.model))
    device = "cuda" if args.num_gpus > 0 else "cpu"
    loaded = await asyncio.to_thread(load_for_inference, resolved.path, device=device)
    return await ServedModel.start(loaded, args.model_id or resolved.name or _folder_name(loaded), args)


def _folder_name(loaded: InferenceModel) -> str:
    """A folder's name; a hub name as it is."""
    return Path(loaded.path).name if Path(loaded.path).is_dir() else loaded.path
