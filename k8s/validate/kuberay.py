"""What KubeRay asks of its objects beyond their schemas.

The operator's own checks are in ray-operator/controllers/ray/utils/validation.go (v1.7.0); a cluster tells them only
when the objects are applied, some in the operator's log alone.
"""

import re
from collections.abc import Iterator
from typing import Any

from k8s.validate.images import RAY_VERSION
from k8s.validate.manifests import Manifest, Problem, RayClusterSpec, ray_cluster

# KubeRay makes names of pods and services from these, which Kubernetes ends at 63 characters.
_LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_V2 = "RAY_enable_autoscaler_v2"


def check(manifest: Manifest) -> Iterator[Problem]:
    """What the operator would refuse, or not do as it is meant."""
    if manifest.kind not in _LONGEST:
        return
    yield from _name(manifest)
    cluster = ray_cluster(manifest)
    if cluster is not None:
        yield from _cluster(cluster)
    if manifest.kind == "RayJob":
        yield from _job(manifest)
    if manifest.kind == "RayService":
        yield from _service(manifest)


def _name(manifest: Manifest) -> Iterator[Problem]:
    if len(manifest.name) > _LONGEST[manifest.kind]:
        limit = _LONGEST[manifest.kind]
        yield manifest.problem("metadata.name", f"has {len(manifest.name)} characters; KubeRay allows {limit}")
    if not _DNS_1035.fullmatch(manifest.name):
        yield manifest.problem("metadata.name", "must be lower-case letters, digits and `-`, and begin with a letter")


def _cluster(cluster: RayClusterSpec) -> Iterator[Problem]:
    def problem(place: str, message: str) -> Problem:
        return cluster.owner.problem(f"{cluster.place}.{place}", message)

    spec = cluster.spec
    if spec.get("rayVersion") != RAY_VERSION:
        yield problem("rayVersion", f"is {spec.get('rayVersion')}, but constraints.txt has ray=={RAY_VERSION}")
    for place, group in [
        ("headGroupSpec", cluster.head),
        *((f"workerGroupSpecs[{number}]", group) for number, group in enumerate(cluster.workers)),
    ]:
        params = group.get("rayStartParams") or {}
        if group.get("resources") and any(params.get(name) for name in _RESOURCES):
            yield problem(f"{place}.resources", "resources are in rayStartParams too; keep one")
        if "labels" in params:
            yield problem(f"{place}.rayStartParams.labels", "is not supported; use `labels` of the group")
        if not (group.get("template") or {}).get("spec", {}).get("containers"):
            yield problem(f"{place}.template.spec.containers", "there must be a container for Ray, the first one")
    for number, group in enumerate(cluster.workers):
        yield from _sizes(group, lambda message, n=number: problem(f"workerGroupSpecs[{n}]", message))
    names = [group.get("groupName") for group in cluster.workers]
    if len(set(names)) < len(names):
        yield problem("workerGroupSpecs", "two groups have the same groupName")
    yield from _autoscaling(cluster)
    yield from _fault_tolerance(cluster)


def _sizes(group: dict[str, Any], problem: Any) -> Iterator[Problem]:
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    if least > most:
        yield problem(f"minReplicas={least} is above maxReplicas={most}")
    elif not least <= group.get("replicas", least) <= most:
        yield problem(f"replicas={group['replicas']} is not between minReplicas={least} and maxReplicas={most}")


def _autoscaling(cluster: RayClusterSpec) -> Iterator[Problem]:
    place, owner = cluster.place, cluster.owner
    options = cluster.spec.get("autoscalerOptions") or {}
    set_by_hand = any(variable["name"] == _V2 for variable in _head_environment(cluster))
    if not cluster.spec.get("enableInTreeAutoscaling"):
        if options:
            yield owner.problem(f"{place}.autoscalerOptions", "does nothing without enableInTreeAutoscaling: true")
        if set_by_hand:
            yield owner.problem(f"{place}.headGroupSpec", f"{_V2} needs enableInTreeAutoscaling: true")
        return
    if options.get("version") and set_by_hand:
        yield owner.problem(f"{place}.autoscalerOptions.version", f"{_V2} is set in the head too; keep the former")
    for group in (cluster.head, *cluster.workers):
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if options.get("version") == "v2" and policy != "Never":
            yield owner.problem(place, f"restartPolicy: {policy}; autoscaler v2 needs Never, or none given")
        if group.get("suspend"):
            yield owner.problem(place, "a worker group cannot be suspended while the autoscaler is on")


def _fault_tolerance(cluster: RayClusterSpec) -> Iterator[Problem]:
    options = cluster.spec.get("gcsFaultToleranceOptions")
    names = {variable["name"] for variable in _head_environment(cluster)}
    params = cluster.head.get("rayStartParams") or {}
    place = f"{cluster.place}.gcsFaultToleranceOptions"
    for name in names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
        yield cluster.owner.problem(place, f"{name} is set in the head; say it here instead")
    for name in params.keys() & {"redis-password", "redis-username"}:
        yield cluster.owner.problem(place, f"`{name}` is among rayStartParams; say it here instead")
    if options is not None and options.get("backend", "redis") == "redis" and not options.get("redisAddress"):
        yield cluster.owner.problem(place, "redisAddress is missing")


def _head_environment(cluster: RayClusterSpec) -> list[dict[str, Any]]:
    containers = cluster.head["template"]["spec"].get("containers") or [{}]
    return list(containers[0].get("env") or [])


def _job(manifest: Manifest) -> Iterator[Problem]:
    spec = manifest.spec
    ends = spec.get("shutdownAfterJobFinishes", False)
    for name in ("suspend", "ttlSecondsAfterFinished"):
        if spec.get(name) and not ends:
            yield manifest.problem(f"spec.{name}", "needs shutdownAfterJobFinishes: true")
    if (spec.get("deletionStrategy") or {}).get("deletionRules") and ends:
        yield manifest.problem("spec.deletionStrategy", "its rules and shutdownAfterJobFinishes exclude each other")
    if bool(spec.get("rayClusterSpec")) == bool(spec.get("clusterSelector")):
        yield manifest.problem("spec", "give one of rayClusterSpec and clusterSelector")
    mode = spec.get("submissionMode", "K8sJobMode")
    if spec.get("backoffLimit", 0) > 0 and (mode == "InteractiveMode" or spec.get("clusterSelector")):
        yield manifest.problem("spec.backoffLimit", "needs a cluster of the job's own, and no InteractiveMode")
    if mode == "SidecarMode" and (spec.get("submitterPodTemplate") or spec.get("submitterConfig")):
        yield manifest.problem("spec.submissionMode", "SidecarMode has no submitterPodTemplate or submitterConfig")
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        yield manifest.problem("spec.activeDeadlineSeconds", "must be above 0")
    if mode != "InteractiveMode" and not spec.get("entrypoint"):
        yield manifest.problem("spec.entrypoint", "is missing")


def _service(manifest: Manifest) -> Iterator[Problem]:
    strategy = manifest.spec.get("upgradeStrategy") or {}
    kinds = ("NewClusterWithIncrementalUpgrade", "NewCluster", "None")
    if strategy.get("type", "NewCluster") not in kinds:
        yield manifest.problem("spec.upgradeStrategy.type", f"{strategy['type']} is none of {', '.join(kinds)}")
    cluster = manifest.spec.get("rayClusterConfig") or {}
    if (cluster.get("headGroupSpec") or {}).get("headService", {}).get("metadata", {}).get("name"):
        yield manifest.problem("spec.rayClusterConfig.headGroupSpec.headService", "must have no name")
    if strategy.get("type") != kinds[0]:
        return
    options = strategy.get("clusterUpgradeOptions") or {}
    place = "spec.upgradeStrategy.clusterUpgradeOptions"
    if not cluster.get("enableInTreeAutoscaling"):
        yield manifest.problem("spec.rayClusterConfig.enableInTreeAutoscaling", f"{kinds[0]} needs the autoscaler")
    if not 0 < options.get("stepSizePercent", 0) <= options.get("maxSurgePercent", 100) <= 100:
        yield manifest.problem(place, "must be: 0 < stepSizePercent <= maxSurgePercent <= 100")
    if options.get("intervalSeconds", 0) <= 0 or not options.get("gatewayClassName"):
        yield manifest.problem(place, "needs intervalSeconds above 0 and a gatewayClassName")
