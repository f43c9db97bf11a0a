"""What objects refer to exists: volumes, claims, Secrets and their keys, accounts, ports, and pods behind selectors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from k8s.validate.manifests import Manifest, Pod, Problem, pods, ray_cluster, selected
from k8s.validate.render import FOLDER

External = Mapping[str, Sequence[str]]


def external() -> External:
    """The Secrets that are made by hand, and their keys."""
    return dict(yaml.safe_load((FOLDER / "external.yaml").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class _Known:
    """What an installation has."""

    manifests: Sequence[Manifest]
    external: External

    @cached_property
    def pods(self) -> list[Pod]:
        return [pod for manifest in self.manifests for pod in pods(manifest)]

    def names(self, kind: str) -> set[str]:
        return {manifest.name for manifest in self.manifests if manifest.kind == kind}

    def config_map(self, name: str) -> dict[str, str] | None:
        maps = {manifest.name: manifest.body for manifest in self.manifests if manifest.kind == "ConfigMap"}
        return {**maps[name].get("data", {}), **maps[name].get("binaryData", {})} if name in maps else None

    def services(self) -> set[str]:
        """With those that KubeRay makes."""
        return self.names("Service") | {f"{name}-serve-svc" for name in self.names("RayService")}


def check(manifests: Sequence[Manifest], external: External) -> Iterator[Problem]:
    """References of an installation to what it does not hold and nobody makes."""
    known = _Known(manifests, external)
    for pod in known.pods:
        yield from _account(pod, known)
        yield from _volumes(pod, known)
        for place, container in pod.containers():
            yield from _environment(pod, place, container, known)
    for manifest in manifests:
        yield from _selectors(manifest, known)
        yield from _backends(manifest, known)
        yield from _redis(manifest, known)


def unused(manifests: Sequence[Manifest], external: External) -> Iterator[Problem]:
    """Entries of the list of Secrets that none of the objects, of all overlays together, refers to."""
    text = yaml.safe_dump([manifest.body for manifest in manifests if manifest.kind != "ConfigMap"])
    words = set(text.replace("'", " ").replace('"', " ").split())
    for name in external:
        if name not in words:
            yield Problem("k8s/external.yaml", f"nothing refers to the Secret `{name}`")


def _account(pod: Pod, known: _Known) -> Iterator[Problem]:
    account = pod.spec.get("serviceAccountName")
    if account is None:
        yield pod.problem(f"{pod.place}.serviceAccountName", "is missing; the namespace's default account is nobody's")
    elif account not in known.names("ServiceAccount"):
        yield pod.problem(f"{pod.place}.serviceAccountName", f"there is no ServiceAccount `{account}`")


def _volumes(pod: Pod, known: _Known) -> Iterator[Problem]:
    claims = pod.owner.spec.get("volumeClaimTemplates") or []
    there = {claim["metadata"]["name"] for claim in claims}
    for number, volume in enumerate(pod.spec.get("volumes") or []):
        there.add(volume.get("name"))
        yield from _volume(pod, f"{pod.place}.volumes[{number}]", volume, known)
    for place, container in pod.containers():
        for mount in container.get("volumeMounts") or []:
            if mount.get("name") not in there:
                yield pod.problem(f"{place}.volumeMounts", f"the pod has no volume `{mount.get('name')}`")


def _volume(pod: Pod, place: str, volume: dict[str, Any], known: _Known) -> Iterator[Problem]:
    claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
    if claim is not None and claim not in known.names("PersistentVolumeClaim"):
        yield pod.problem(place, f"there is no PersistentVolumeClaim `{claim}`")
    config = volume.get("configMap")
    if config is not None and known.config_map(config.get("name")) is None:
        yield pod.problem(place, f"there is no ConfigMap `{config.get('name')}`")
    secret = volume.get("secret")
    if secret is not None:
        keys = [item["key"] for item in secret.get("items") or []]
        yield from _secret(pod.owner, place, secret.get("secretName"), keys, known)


def _environment(pod: Pod, place: str, container: dict[str, Any], known: _Known) -> Iterator[Problem]:
    for number, variable in enumerate(container.get("env") or []):
        where = f"{place}.env[{number}]"
        source = variable.get("valueFrom") or {}
        if "secretKeyRef" in source:
            reference = source["secretKeyRef"]
            yield from _secret(pod.owner, where, reference.get("name"), [reference.get("key")], known)
        if "configMapKeyRef" in source:
            reference = source["configMapKeyRef"]
            if reference.get("key") not in (known.config_map(reference.get("name")) or {}):
                yield pod.problem(
                    where, f"there is no ConfigMap `{reference.get('name')}` with `{reference.get('key')}`"
                )
    for reference in container.get("envFrom") or []:
        yield pod.problem(f"{place}.envFrom", f"name the variables that are needed instead of all of {reference}")


def _secret(owner: Manifest, place: str, name: Any, keys: Sequence[Any], known: _Known) -> Iterator[Problem]:
    if name not in known.external:
        yield owner.problem(place, f"there is no Secret `{name}` in k8s/external.yaml")
        return
    for key in keys:
        if key not in known.external[name]:
            yield owner.problem(place, f"the Secret `{name}` has no key `{key}` in k8s/external.yaml")


def _selectors(manifest: Manifest, known: _Known) -> Iterator[Problem]:
    """Each of these chooses pods by labels; one that chooses none is a slip."""
    spec = manifest.spec
    if manifest.kind == "Service":
        chosen = selected({"matchLabels": spec.get("selector")}, known.pods)
        yield from _ports(manifest, [port.get("targetPort") for port in spec.get("ports") or []], chosen)
    elif manifest.kind == "PodMonitor":
        chosen = selected(spec.get("selector"), known.pods)
        yield from _ports(manifest, [end.get("port") for end in spec.get("podMetricsEndpoints") or []], chosen)
    elif manifest.kind == "PodDisruptionBudget":
        chosen = selected(spec.get("selector"), known.pods)
        yield from _disruption(manifest, chosen)
    elif manifest.kind == "NetworkPolicy":
        chosen = selected(spec.get("podSelector"), known.pods)
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in [*rule.get("from", []), *rule.get("to", [])]:
                if "podSelector" in peer and not selected(peer["podSelector"], known.pods):
                    yield manifest.problem("spec", f"no pod has the labels {peer['podSelector'].get('matchLabels')}")
    else:
        return
    if not chosen:
        yield manifest.problem("spec", "its selector chooses no pod")


def _ports(manifest: Manifest, wanted: Sequence[Any], chosen: Sequence[Pod]) -> Iterator[Problem]:
    containers = [container for pod in chosen for _, container in pod.containers()]
    ports = [port for container in containers for port in container.get("ports") or []]
    there = {port.get("name") for port in ports} | {port.get("containerPort") for port in ports}
    for port in wanted:
        if port not in there:
            yield manifest.problem("spec", f"the pods have no port `{port}`")


def _disruption(manifest: Manifest, chosen: Sequence[Pod]) -> Iterator[Problem]:
    """https://kubernetes.io/docs/tasks/run-application/configure-pdb/#arbitrary-controllers-and-selectors"""
    if not any(pod.is_ray for pod in chosen):
        return
    least = manifest.spec.get("minAvailable")
    if not isinstance(least, int):
        yield manifest.problem("spec", "pods of KubeRay need minAvailable, as a number")
    elif least >= sum(pod.replicas for pod in chosen):
        yield manifest.problem("spec.minAvailable", f"{least} of the pods is all of them: no node could be drained")


def _backends(manifest: Manifest, known: _Known) -> Iterator[Problem]:
    if manifest.kind != "Ingress":
        return
    for entry in manifest.spec.get("tls") or []:
        yield from _secret(manifest, "spec.tls", entry.get("secretName"), ["tls.crt", "tls.key"], known)
    for rule in manifest.spec.get("rules") or []:
        for path in rule["http"]["paths"]:
            name = path["backend"]["service"]["name"]
            if name not in known.services():
                yield manifest.problem("spec.rules", f"there is no Service `{name}`")


def _redis(manifest: Manifest, known: _Known) -> Iterator[Problem]:
    cluster = ray_cluster(manifest)
    options = (cluster.spec.get("gcsFaultToleranceOptions") or {}) if cluster else {}
    if not options:
        return
    place = f"{cluster.place}.gcsFaultToleranceOptions" if cluster else ""
    host = str(options.get("redisAddress")).removeprefix("redis://").partition(":")[0]
    if "." not in host and host not in known.services():
        yield manifest.problem(f"{place}.redisAddress", f"there is no Service `{host}`")
    reference = ((options.get("redisPassword") or {}).get("valueFrom") or {}).get("secretKeyRef")
    if reference:
        yield from _secret(manifest, f"{place}.redisPassword", reference.get("name"), [reference.get("key")], known)
