"""Start and stop an endpoint from the driver. Knows Ray Serve's life cycle, not models or HTTP routes.

Ray must be connected already (`heliostat.cluster.connect`).
"""

import contextlib
import io
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from ray import serve

from heliostat import cluster, hosts
from heliostat.errors import HeliostatError, ResourceError
from heliostat.registry import store
from heliostat.serving import applications, bind, edge, rollout, vllm
from heliostat.serving.applications import APPLICATION
from heliostat.serving.config import EndpointArgs, ServingConfig
from heliostat.serving.endpoint import application
from heliostat.serving.logs import QUIET, logging_config

# The model is loaded when Serve reports the application as running; what is left is the proxy learning its route.
ROUTE_TIMEOUT_S = 60.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint."""

    url: str
    """The base URL for OpenAI clients, ending in /v1."""
    model_id: str

    def stop(self) -> None:
        """Shut the endpoint and Ray Serve down."""
        # Serve's controller ends itself in answering, which Ray prints as an error.
        with contextlib.redirect_stdout(io.StringIO()):
            serve.shutdown()


def start(config: ServingConfig, reference: str, *, model_id: str | None = None) -> Endpoint:
    """Serve the model `reference`, and the others that `config` names, on this machine; returns when it answers.

    Raises:
        ResourceError: the port is taken, the host is open to others without API keys, the cluster is too small, or
            Serve already runs applications on it.
        ConfigError: see `endpoint.application`.
        ModelError, RegistryError: a model does not exist, or cannot be loaded or run.
        HeliostatError: the endpoint did not start for another reason. Nothing is left running.
    """
    bind.check_bind(config.host, config.api_keys, config.insecure)
    hosts.check_port(config.host, config.port, "serving.port=")
    _check_room(config)
    values = {key: value for key, value in config.model_dump().items() if key in EndpointArgs.model_fields}
    args = EndpointArgs(**(values | {"model": reference, "model_id": model_id or config.model_id}))
    vllm.check(args)
    names = [rollout.Target.of(model, args).id for model in args.all_models()]  # what is wrong is told at once
    if serve.status().applications:
        raise ResourceError("Ray Serve already runs applications on this cluster; stop them first (`serve shutdown`)")
    scheme = "https" if config.ssl_certfile else "http"
    origin = f"{scheme}://{_bracketed(config.host)}:{config.port}"
    try:
        # The proxies inherit the controller's environment, which says what guards them.
        guards = {"runtime_env": {"env_vars": edge.PROXY_ENVIRONMENT}}
        serve.start(http_options=_http_options(config), controller_options=guards, logging_config=QUIET)
        applications.run(application(args, store.environment()), APPLICATION, "/", logging_config())
        _wait_until_healthy(f"{origin}/health", config.ssl_certfile)
    except BaseException:
        serve.shutdown()
        raise
    return Endpoint(f"{origin}/v1", names[0])


def _check_room(config: ServingConfig) -> None:
    """Refuse replicas and gateways that would wait for ever."""
    each = config.autoscaling.min_replicas if config.autoscaling else config.num_replicas
    models, most = 1 + len(config.models), config.max_replicas_per_node
    resources = {"CPU": config.num_cpus, "GPU": config.num_gpus}
    cluster.require(resources, each * models, "serving.num_replicas", most and most * models)
    if most:
        cluster.require({}, config.gateways, "serving.gateways", most)


def _http_options(config: ServingConfig) -> dict[str, Any]:
    tls = {"ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile} if config.ssl_certfile else {}
    return {"host": config.host, "port": config.port, **tls}


def _wait_until_healthy(url: str, certificate: str | None) -> None:
    context = bind.trusting(certificate) if certificate else None
    deadline = time.monotonic() + ROUTE_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5, context=context):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_S)
    raise HeliostatError(f"{url} did not answer within {ROUTE_TIMEOUT_S:g} s of the model being loaded")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
