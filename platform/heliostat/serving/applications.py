"""Serve applications: run one, find out why it failed, delete it. Knows Ray Serve, not what an application does."""

import logging
import re
from collections.abc import Mapping

from ray import serve
from ray.serve import Application
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    LoggingConfig,
    ReplicaState,
)

from heliostat import errors
from heliostat.errors import HeliostatError

# The application of the gateways and the director, the beginning of the names of those of the models' versions, and
# the deployments in them.
APPLICATION = "heliostat"
VERSIONS = "heliostat-model"
DIRECTOR = "Director"
REPLICA = "Replica"


def run(application: Application, name: str, route_prefix: str | None, logs: LoggingConfig) -> None:
    """Deploy, and wait until it runs. One of the same name is replaced.

    Raises:
        HeliostatError: it did not start; the error is the one that its replica raised, where that is one of ours.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.run(application, name=name, route_prefix=route_prefix, blocking=False, logging_config=logs)
    except RuntimeError as error:
        raise _real_error(report(name) or str(error)) from None


def delete(name: str) -> None:
    """Delete an application, and wait until it is gone; what it works on is finished first."""
    if name in running():
        serve.delete(name)


def running(prefix: str = "") -> Mapping[str, ApplicationStatusOverview]:
    """All applications whose name begins so."""
    return {name: found for name, found in serve.status().applications.items() if name.startswith(prefix)}


def healthy(application: ApplicationStatusOverview | None) -> bool:
    """Whether each deployment has a running replica, or is scaled to none, or on its way there or back.

    Serve calls one unhealthy that has lost a replica of several, until there is room for another.
    """
    if application is None or application.status not in (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY):
        return False
    return all(_works(deployment) for deployment in application.deployments.values())


def _works(deployment: DeploymentStatusOverview) -> bool:
    states = deployment.replica_states
    if deployment.status == DeploymentStatus.UNHEALTHY:
        return bool(states.get(ReplicaState.RUNNING))
    scales = deployment.status in (DeploymentStatus.UPSCALING, DeploymentStatus.DOWNSCALING)
    return scales or states.get(ReplicaState.RUNNING, 0) > 0 or set(states) <= {ReplicaState.STOPPING}


def report(name: str) -> str:
    """What Serve says of an application: why it failed, for one."""
    application = serve.status().applications.get(name)
    if application is None:
        return ""
    return "\n".join([application.message, *(each.message for each in application.deployments.values())])


def _real_error(report: str) -> HeliostatError:
    """The error of ours in Serve's report of a failed deployment, which holds a replica's traceback as text."""
    found = re.findall(r"^heliostat\.errors\.(\w+): (.*)$", report, flags=re.MULTILINE)
    if found:
        kind, message = found[-1]
        error: HeliostatError = vars(errors).get(kind, HeliostatError)(message)
        return error
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return HeliostatError(f"the endpoint did not start: {lines[-1] if lines else 'Ray Serve gives no reason'}")
