"""The schema of every object: Kubernetes' own, KubeRay's, and the little that is used of the Prometheus operator's.

KubeRay's are files of its release, which are not part of this project: `Kuberay` reads them from a folder.
"""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import yaml
from pydantic import ValidationError

from heliostat.errors import ConfigError
from k8s.validate import prometheus
from k8s.validate.manifests import Manifest, Problem

# The oldest Kubernetes that these manifests are for.
KUBERNETES = "1.31"
_KUBERAY = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
HOW_TO_GET = (
    "KubeRay's schemas are the files of helm-chart/kuberay-operator/crds in a release, as KUBERAY_CRDS/ray.io_*.yaml; "
    "or what `kubectl get crd rayjobs.ray.io -o yaml` says where it runs, and so for rayclusters and rayservices"
)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check(manifest: Manifest) -> Iterator[Problem]:
    """Fields that the object's kind does not have, lacks, or wants otherwise; KubeRay's kinds are passed over."""
    if manifest.kind in prometheus.KINDS:
        yield from _prometheus(manifest)
    elif manifest.kind not in _KUBERAY:
        yield from _core(manifest)


def _core(manifest: Manifest) -> Iterator[Problem]:
    try:
        kubernetes_validate.validate(manifest.body, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield manifest.problem(_dotted(error.path), error.message[:300])
    except kubernetes_validate.SchemaNotFoundError:
        api = manifest.body.get("apiVersion")
        yield manifest.problem("kind", f"Kubernetes {KUBERNETES} has no {manifest.kind} in {api}")


def _prometheus(manifest: Manifest) -> Iterator[Problem]:
    try:
        prometheus.KINDS[manifest.kind].model_validate(manifest.body)
    except ValidationError as error:
        for detail in error.errors():
            yield manifest.problem(_dotted(detail["loc"]), detail["msg"])


class Kuberay:
    """KubeRay's schemas, as its release or a cluster with it has them.

    Raises:
        ConfigError: the folder does not hold them.
    """

    def __init__(self, folder: Path) -> None:
        self._schemas = {kind: _kuberay_schema(folder / f"ray.io_{name}.yaml") for kind, name in _KUBERAY.items()}
        self._validators = {kind: _validator(schema) for kind, schema in self._schemas.items()}

    def check(self, manifest: Manifest) -> Iterator[Problem]:
        """Fields that the schema does not have, lacks, or wants otherwise; other kinds are passed over."""
        if manifest.kind not in self._validators:
            return
        body = copy.deepcopy(manifest.body)
        _fill_defaults(self._schemas[manifest.kind], body)
        for error in self._validators[manifest.kind].iter_errors(body):
            yield manifest.problem(_dotted(error.absolute_path), error.message[:300])


def _dotted(path: Any) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "(whole)"


@cache
def _kuberay_schema(file: Path) -> dict[str, Any]:
    try:
        definition = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}. {HOW_TO_GET}") from error
    versions = {version["name"]: version for version in definition["spec"]["versions"]}
    return dict(versions["v1"]["schema"]["openAPIV3Schema"])


def _validator(schema: dict[str, Any]) -> Any:
    strict = _strict(schema)
    strict["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(strict)


def _strict(node: Any) -> Any:
    """A structural schema of OpenAPI as JSON schema in which unknown fields are errors.

    https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema
    """
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _strict(value) for key, value in node.items() if not key.startswith("x-kubernetes")}
    if node.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if node.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    open_ended = "additionalProperties" in node or node.get("x-kubernetes-preserve-unknown-fields")
    if node.get("type") == "object" and isinstance(node.get("properties"), dict) and not open_ended:
        made["additionalProperties"] = False
    return made


def _fill_defaults(schema: Any, value: Any) -> None:
    """What the API server does before it asks what is missing: fields left out get their defaults, nulls go."""
    if not isinstance(schema, dict):
        return
    if isinstance(value, list):
        for item in value:
            _fill_defaults(schema.get("items"), item)
    if not isinstance(value, dict):
        return
    for key, inner in (schema.get("properties") or {}).items():
        if key not in value and "default" in inner:
            value[key] = copy.deepcopy(inner["default"])
        if value.get(key, inner) is None and not inner.get("nullable"):
            del value[key]
        elif key in value:
            _fill_defaults(inner, value[key])
