"""Connect to Ray: a cluster by address, or a private one on this machine. Knows nothing of what runs there."""

import contextlib
import importlib.metadata
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from heliostat.errors import ResourceError

_PACKAGE = Path(__file__).parent
SET_TOKEN = (
    "set RAY_AUTH_MODE=token and the cluster's token as RAY_AUTH_TOKEN, or its file as RAY_AUTH_TOKEN_PATH (default: "
    "~/.ray/auth_token)"
)
"""What to do where a cluster's token is missing or another."""
# Set in the driver, passed on by Ray Train to its controller and workers.
TRAIN_ENVIRONMENT = {
    # How often the controller looks at its workers, and so how long a checkpoint report takes (default 2 s).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
}


def connect(address: str | None = None) -> None:
    """Join the Ray cluster at `address` (default: RAY_ADDRESS), or start one here; nothing if already connected.

    Raises:
        ResourceError: no cluster answers at the address, or it wants a token.
    """
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        return
    os.environ.update({key: value for key, value in TRAIN_ENVIRONMENT.items() if key not in os.environ})
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        ray.init(
            # Not whatever cluster may run on this machine, or have run: Ray would look for one.
            address=address or "local",
            # Train's clean-up of dead runs asks the State API, which is part of the dashboard.
            include_dashboard=None if address else True,
            runtime_env=_runtime_env(private=address is None),
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, AuthenticationError) as error:
        # Ray tells of a wrong token in the text of a cause only.
        if isinstance(error, AuthenticationError) or "InvalidAuthToken" in str(error.__cause__):
            raise ResourceError(
                f"the Ray cluster at {address} (RAY_ADDRESS) wants another token; {SET_TOKEN}"
            ) from error
        raise ResourceError(
            f"no Ray cluster answers at {address} (RAY_ADDRESS); start it, or unset it to use this machine"
        ) from error


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connected inside; a cluster that was started for it is gone afterwards, whatever happens."""
    import ray

    mine = not ray.is_initialized()
    try:
        connect(address)
        yield
    finally:
        if mine:
            ray.shutdown()


def require(resources: Mapping[str, float], count: int, key: str, per_node: int | None = None) -> None:
    """Refuse what the cluster can never give: `count` workers with `resources` each, at most `per_node` on one node.

    Raises:
        ResourceError: naming the key to change, what is asked for and what is there.
    """
    import ray

    total = ray.cluster_resources()
    for name, amount in resources.items():
        if amount * count > total.get(name, 0):
            raise ResourceError(
                f"{key}={count} needs {amount * count:g} {name}, but the cluster has {total.get(name, 0):g}; "
                f"lower {key}, or join a larger cluster with RAY_ADDRESS"
            )
    found = room(resources, per_node)
    if count > found:
        each = f" with {shown(resources)} each" if resources else ""
        most = f", at most {per_node} on a node" if per_node else ""
        raise ResourceError(
            f"{key}={count}: the cluster's nodes have room for {found:g}{each}{most}; lower {key} or what each needs, "
            "or join a larger cluster with RAY_ADDRESS"
        )


def room(resources: Mapping[str, float], per_node: int | None = None) -> float:
    """How many workers with `resources` each the nodes have room for, were they idle."""
    import ray

    return places([node["Resources"] for node in ray.nodes() if node["Alive"]], resources, per_node)


def places(nodes: Sequence[Mapping[str, float]], resources: Mapping[str, float], per_node: int | None = None) -> float:
    """How many workers with `resources` each fit on the nodes: each is on one, at most `per_node` on it."""
    most = [float(per_node)] if per_node else []
    wanted = {name: amount for name, amount in resources.items() if amount > 0}
    # What floating point makes of 0.3 / 0.1 is three places too.
    fits = [[math.floor(node.get(name, 0) / amount + 1e-6) for name, amount in wanted.items()] for node in nodes]
    return sum(min([*each, *most], default=math.inf) for each in fits)


def shown(resources: Mapping[str, float]) -> str:
    """Resources in words."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Ray resources such as {"CPU": 1, "GPU": 1} as `ray.remote` takes them; what is not named is not reserved."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": others}


def package_to_ship() -> Path | None:
    """The library's folder, if jobs elsewhere must bring it along; None if it is an installed wheel, there as here."""
    return None if _installed(editable_counts=False) else _PACKAGE


def _runtime_env(*, private: bool) -> dict[str, Any]:
    """Workers elsewhere get the checkout with the job, unless Heliostat is an installed wheel there as here.

    Workers of a private cluster share this Python environment, where an editable install is enough.
    """
    environment: dict[str, Any] = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
    if not _installed(editable_counts=private):
        environment["py_modules"] = [str(_PACKAGE)]
    return environment


def _installed(*, editable_counts: bool) -> bool:
    if any(part in ("site-packages", "dist-packages") for part in _PACKAGE.parts):
        return True
    return editable_counts and any(importlib.metadata.distributions(name="heliostat"))
