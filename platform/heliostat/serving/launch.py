"""Start and stop an endpoint from the driver. Knows Ray Serve's life cycle, not models or HTTP routes.

Ray must be connected already (`heliostat.cluster.connect`).
"""

import contextlib
import io
import ipaddress
import logging
import re
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ray import serve

from heliostat import cluster, errors
from heliostat.errors import HeliostatError, ResourceError
from heliostat.models import base
from heliostat.registry import versions
from heliostat.serving.config import EndpointArgs, ServingConfig
from heliostat.serving.endpoint import QUIET, build

APPLICATION = "heliostat"
# The model is loaded when Serve reports the application as running; what is left is the proxy learning its route.
ROUTE_TIMEOUT_S = 60.0
_POLL_S = 0.1
_LOOPBACK_NAMES = frozenset({"localhost"})


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
    """Serve the model `reference` on this machine; returns when it answers requests.

    Raises:
        ResourceError: the port is taken, the host is not this machine's own, the cluster is too small, or Serve already
            runs applications on it.
        ModelError, RegistryError: the model does not exist, or cannot be loaded or run.
        HeliostatError: the endpoint did not start for another reason. Nothing is left running.
    """
    _check_host(config.host)
    _check_port(config.host, config.port)
    cluster.require({"CPU": config.num_cpus, "GPU": config.num_gpus}, config.num_replicas, "serving.num_replicas")
    resolved = versions.resolve(reference)
    source = base.resolve(resolved.path)
    name = model_id or config.model_id or resolved.name or (Path(source).name if Path(source).is_dir() else source)
    if serve.status().applications:
        raise ResourceError("Ray Serve already runs applications on this cluster; stop them first (`serve shutdown`)")
    values = {key: value for key, value in config.model_dump().items() if key in EndpointArgs.model_fields}
    args = EndpointArgs(**(values | {"model": source, "model_id": name}))
    origin = f"http://{_bracketed(config.host)}:{config.port}"
    try:
        _deploy(args, config.host, config.port)
        _wait_until_healthy(f"{origin}/health")
    except BaseException:
        serve.shutdown()
        raise
    return Endpoint(f"{origin}/v1", name)


def _deploy(args: EndpointArgs, host: str, port: int) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port}, logging_config=QUIET)
    try:
        serve.run(build(args), name=APPLICATION, route_prefix="/", blocking=False)
    except RuntimeError:
        application = serve.status().applications[APPLICATION]
        reports = [deployment.message for deployment in application.deployments.values()]
        raise _real_error("\n".join([application.message, *reports])) from None


def _real_error(report: str) -> HeliostatError:
    """The error of ours in Serve's report of a failed deployment, which holds a replica's traceback as text."""
    found = re.findall(r"^heliostat\.errors\.(\w+): (.*)$", report, flags=re.MULTILINE)
    if found:
        kind, message = found[-1]
        error: HeliostatError = vars(errors).get(kind, HeliostatError)(message)
        return error
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return HeliostatError(f"the endpoint did not start: {lines[-1] if lines else 'Ray Serve gives no reason'}")


def _wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + ROUTE_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_S)
    raise HeliostatError(f"{url} did not answer within {ROUTE_TIMEOUT_S:g} s of the model being loaded")


def _check_host(host: str) -> None:
    if host in _LOOPBACK_NAMES:
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ResourceError(
            f"serving.host={host}: the endpoint has no API keys, so it is only bound to this machine itself; "
            "set serving.host=127.0.0.1 and put an authenticating proxy in front"
        )


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose another with serving.port="
            ) from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
