"""Rendered manifests, the pods in them, and problems of them. Knows Kubernetes' and KubeRay's shapes, no rules."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and its place."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Manifest:
    """One object as kustomize renders it."""

    source: str
    """The folder that was rendered."""
    body: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body.get("kind"))

    @property
    def name(self) -> str:
        return str(self.body.get("metadata", {}).get("name"))

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self.body.get("spec") or {})

    def problem(self, place: str, message: str) -> Problem:
        """A problem of this object, at a dotted place in it."""
        return Problem(f"{self.source}: {self.kind}/{self.name}: {place}", message)


@dataclass(frozen=True)
class RayClusterSpec:
    """A Ray cluster in a RayCluster, a RayJob or a RayService."""

    owner: Manifest
    place: str
    spec: dict[str, Any]

    @property
    def head(self) -> dict[str, Any]:
        return dict(self.spec["headGroupSpec"])

    @property
    def workers(self) -> list[dict[str, Any]]:
        return list(self.spec.get("workerGroupSpecs") or [])


@dataclass(frozen=True)
class Pod:
    """A pod template: where it is, the labels that its pods will have, and its spec."""

    owner: Manifest
    place: str
    spec: dict[str, Any]
    labels: dict[str, str] = field(default_factory=dict)
    replicas: int = 1
    """Pods that are there at the least."""

    @property
    def is_ray(self) -> bool:
        return "ray.io/node-type" in self.labels

    def containers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each container with its place."""
        for group in ("initContainers", "containers"):
            for number, container in enumerate(self.spec.get(group) or []):
                yield f"{self.place}.{group}[{number}]", container

    def problem(self, place: str, message: str) -> Problem:
        return self.owner.problem(place, message)


_RAY_PLACES = {"RayCluster": "spec", "RayJob": "spec.rayClusterSpec", "RayService": "spec.rayClusterConfig"}


def ray_cluster(manifest: Manifest) -> RayClusterSpec | None:
    """The Ray cluster that the object describes, if it is one of KubeRay's with a whole one in it."""
    place = _RAY_PLACES.get(manifest.kind)
    if place is None:
        return None
    spec = manifest.body
    for key in place.split("."):
        spec = spec.get(key) or {}
    return RayClusterSpec(manifest, place, spec) if spec.get("headGroupSpec") else None


def pods(manifest: Manifest) -> Iterator[Pod]:
    """The pod templates in the object."""
    if manifest.kind in ("Deployment", "StatefulSet", "Job"):
        yield _pod(manifest, "spec.template", manifest.spec["template"], {}, manifest.spec.get("replicas", 1))
    if manifest.kind == "RayJob" and "submitterPodTemplate" in manifest.spec:
        yield _pod(manifest, "spec.submitterPodTemplate", manifest.spec["submitterPodTemplate"], {}, 1)
    cluster = ray_cluster(manifest)
    if cluster is not None:
        place = f"{cluster.place}.headGroupSpec.template"
        yield _pod(manifest, place, cluster.head.get("template") or {}, _ray_labels("head", "headgroup"), 1)
        for number, group in enumerate(cluster.workers):
            place = f"{cluster.place}.workerGroupSpecs[{number}].template"
            labels = _ray_labels("worker", str(group.get("groupName")))
            yield _pod(manifest, place, group.get("template") or {}, labels, group.get("minReplicas", 0))


def _pod(owner: Manifest, place: str, template: dict[str, Any], added: dict[str, str], replicas: int) -> Pod:
    labels = (template.get("metadata") or {}).get("labels") or {}
    return Pod(owner, f"{place}.spec", template.get("spec") or {}, labels | added, replicas)


def _ray_labels(node_type: str, group: str) -> dict[str, str]:
    """What KubeRay adds (ray-operator/controllers/ray/common/pod.go)."""
    return {"ray.io/is-ray-node": "yes", "ray.io/node-type": node_type, "ray.io/group": group, "ray.io/cluster": "any"}


def selected(selector: dict[str, Any] | None, all_pods: list[Pod]) -> list[Pod]:
    """The pods that a selector's `matchLabels` choose; an empty one chooses all."""
    wanted = (selector or {}).get("matchLabels") or {}
    return [pod for pod in all_pods if wanted.items() <= pod.labels.items()]
