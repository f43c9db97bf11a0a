"""Pods as the restricted standard wants them, and with room of their own.

https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
"""

from collections.abc import Iterator
from typing import Any

from k8s.validate.manifests import Manifest, Pod, Problem, pods, ray_cluster


def check(manifest: Manifest) -> Iterator[Problem]:
    """Pods that may become root, write to their image, or take what they did not ask for."""
    for pod in pods(manifest):
        yield from _pod(pod)
        for place, container in pod.containers():
            yield from _container(pod, place, container)
            if not container.get("image"):
                yield pod.problem(f"{place}.image", "is missing")
    cluster = ray_cluster(manifest)
    if cluster is not None and cluster.spec.get("enableInTreeAutoscaling"):
        options = cluster.spec.get("autoscalerOptions") or {}
        place = f"{cluster.place}.autoscalerOptions"
        yield from _privileges(manifest, place, options.get("securityContext") or {})
        yield from _resources(manifest, place, options.get("resources") or {})


def _pod(pod: Pod) -> Iterator[Problem]:
    context = pod.spec.get("securityContext") or {}
    place = f"{pod.place}.securityContext"
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield pod.problem(place, "needs runAsNonRoot: true, and a runAsUser that is not 0")
    if (context.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield pod.problem(place, "needs seccompProfile: {type: RuntimeDefault}")
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(name):
            yield pod.problem(f"{pod.place}.{name}", "is not allowed")
    for volume in pod.spec.get("volumes") or []:
        if "hostPath" in volume:
            yield pod.problem(f"{pod.place}.volumes", f"`{volume.get('name')}` is a folder of the node")


def _container(pod: Pod, place: str, container: dict[str, Any]) -> Iterator[Problem]:
    context = container.get("securityContext") or {}
    yield from _privileges(pod.owner, place, context)
    if context.get("readOnlyRootFilesystem") is not True:
        yield pod.problem(f"{place}.securityContext", "needs readOnlyRootFilesystem: true; mount what is written to")
    yield from _resources(pod.owner, place, container.get("resources") or {})


def _privileges(owner: Manifest, place: str, context: dict[str, Any]) -> Iterator[Problem]:
    if context.get("privileged") or context.get("allowPrivilegeEscalation") is not False:
        yield owner.problem(f"{place}.securityContext", "needs allowPrivilegeEscalation: false, and no privileged")
    if "ALL" not in (context.get("capabilities") or {}).get("drop", []):
        yield owner.problem(f"{place}.securityContext", "needs capabilities: {drop: [ALL]}")


def _resources(owner: Manifest, place: str, resources: dict[str, Any]) -> Iterator[Problem]:
    """CPU without a limit is fine: it is shared fairly. Memory is not given back."""
    if not {"cpu", "memory"} <= (resources.get("requests") or {}).keys():
        yield owner.problem(f"{place}.resources", "needs requests of cpu and memory")
    if "memory" not in (resources.get("limits") or {}):
        yield owner.problem(f"{place}.resources", "needs a limit of memory")
