"""Whether a Serve application works, by what Serve says of it."""

import pytest
from ray.serve.schema import ApplicationStatus as App
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, DeploymentStatusTrigger
from ray.serve.schema import DeploymentStatus as Deployment
from ray.serve.schema import ReplicaState as Replica

from heliostat.serving import applications


@pytest.mark.parametrize(
    ("application", "deployment", "replicas", "expected"),
    [
        (App.RUNNING, Deployment.HEALTHY, {Replica.RUNNING: 2}, True),
        (App.RUNNING, Deployment.HEALTHY, {}, True),  # scaled to zero
        (App.RUNNING, Deployment.UPSCALING, {Replica.STARTING: 1}, True),
        (App.UNHEALTHY, Deployment.UNHEALTHY, {Replica.RUNNING: 1, Replica.STARTING: 1}, True),
        (App.UNHEALTHY, Deployment.UNHEALTHY, {Replica.STARTING: 1}, False),
        (App.UNHEALTHY, Deployment.UNHEALTHY, {Replica.STOPPING: 1}, False),
        (App.DEPLOYING, Deployment.UPDATING, {Replica.RUNNING: 1, Replica.STARTING: 1}, False),
        (App.DEPLOY_FAILED, Deployment.DEPLOY_FAILED, {Replica.RUNNING: 1}, False),
    ],
)
def test_one_replica_of_several_is_enough_once_all_have_run(
    application: App, deployment: Deployment, replicas: dict[Replica, int], expected: bool
) -> None:
    trigger = DeploymentStatusTrigger.UNSPECIFIED
    told = DeploymentStatusOverview(status=deployment, status_trigger=trigger, replica_states=replicas, message="")
    overview = ApplicationStatusOverview(
        status=application, message="", last_deployed_time_s=0, deployments={"Replica": told}
    )
    assert applications.healthy(overview) is expected


def test_one_that_is_not_there_does_not_work() -> None:
    assert not applications.healthy(None)
