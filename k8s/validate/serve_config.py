"""The endpoint: its Serve config by Ray's schema and by ours, and what must agree between it and the pods."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from heliostat.serving.config import EndpointArgs
from heliostat.serving.edge import PROXY_ENVIRONMENT
from k8s.validate.capacity import amounts
from k8s.validate.manifests import Manifest, Pod, Problem, pods

_LOOPBACK = (None, "localhost", "127.0.0.1", "::1")
_IMPORT_PATHS = ("serve.app:build", "heliostat.serving.endpoint:build")


def check(manifest: Manifest) -> Iterator[Problem]:
    """What is wrong with a RayService's Serve config; other kinds are passed over."""
    if manifest.kind != "RayService":
        return
    place = "spec.serveConfigV2"
    try:
        config = yaml.safe_load(manifest.spec.get("serveConfigV2") or "")
    except yaml.YAMLError as error:
        yield manifest.problem(place, f"is not YAML: {error}")
        return
    yield from (manifest.problem(f"{place}.{key}", f"Ray Serve has no `{key}`") for key in unknown(config))
    try:
        deployed = ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        for detail in error.errors():
            yield manifest.problem(f"{place}.{_dotted(detail['loc'])}", detail["msg"])
        return
    if deployed.controller_options is not None:
        yield manifest.problem(f"{place}.controller_options", "is ignored in a cluster that runs; see docs/security.md")
    for application in deployed.applications:
        if application.import_path not in _IMPORT_PATHS:
            yield manifest.problem(place, f"import_path {application.import_path} is not {_IMPORT_PATHS[0]}")
        yield from _arguments(manifest, f"{place}.applications.args", application.args, deployed.http_options.host)
    yield from _pods(manifest, deployed)


def unknown(config: Any, schema: type[BaseModel] = ServeDeploySchema, prefix: str = "") -> Iterator[str]:
    """Keys that the schema does not have, dotted: Ray Serve takes no notice of them."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key not in schema.model_fields:
            yield f"{prefix}{key}"
            continue
        inner = _model_in(schema.model_fields[key].annotation)
        if inner is not None:
            for item in value if isinstance(value, list) else [value]:
                yield from unknown(item, inner, f"{prefix}{key}.")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(inner) for inner in get_args(annotation))
    return next((model for model in found if model is not None), None)


def _arguments(manifest: Manifest, place: str, given: dict[str, Any], host: str) -> Iterator[Problem]:
    try:
        args = EndpointArgs.model_validate(given)
    except ValidationError as error:
        for detail in error.errors():
            yield manifest.problem(f"{place}.{_dotted(detail['loc'])}", detail["msg"])
        return
    if not args.all_models():
        yield manifest.problem(f"{place}.model", "is missing")
    if args.api_keys is None or args.insecure:
        yield manifest.problem(f"{place}.api_keys", f"clients of other machines (http_options.host {host}) need keys")
    delay = manifest.spec.get("rayClusterDeletionDelaySeconds", 60)
    if delay < args.request_timeout_s:
        yield manifest.problem(
            "spec.rayClusterDeletionDelaySeconds",
            f"an upgrade ends requests after {delay} s, but request_timeout_s is {args.request_timeout_s:g}",
        )
    yield from _room(manifest, place, args)
    if args.api_keys is not None:
        yield from _mounted(manifest, args.api_keys)


def _room(manifest: Manifest, place: str, args: EndpointArgs) -> Iterator[Problem]:
    """The replicas of all models, at their fewest, fit into the workers at their most."""
    each = args.autoscaling.min_replicas if args.autoscaling else args.num_replicas
    wanted = each * len(args.all_models())
    groups = manifest.spec["rayClusterConfig"].get("workerGroupSpecs") or []
    room = sum(_replicas_in(group, args) * group.get("maxReplicas", 0) for group in groups)
    if room < wanted:
        yield manifest.problem(
            f"{place}.num_cpus",
            f"{wanted} replicas of {args.num_cpus:g} CPUs and {args.num_gpus:g} GPUs; the workers have room for {room}",
        )


def _replicas_in(group: dict[str, Any], args: EndpointArgs) -> int:
    cpus, gpus = amounts(group)
    by_gpu = math.floor(gpus / args.num_gpus) if args.num_gpus else math.inf
    return int(min(math.floor(cpus / args.num_cpus), by_gpu))


def _mounted(manifest: Manifest, path: str) -> Iterator[Problem]:
    for pod in pods(manifest):
        mounts = [
            mount["mountPath"] for _, container in pod.containers() for mount in container.get("volumeMounts", [])
        ]
        if not any(path.startswith(f"{mount.rstrip('/')}/") for mount in mounts):
            yield pod.problem(f"{pod.place}.containers", f"nothing is mounted where api_keys ({path}) is")


def _pods(manifest: Manifest, deployed: ServeDeploySchema) -> Iterator[Problem]:
    if deployed.http_options.host in _LOOPBACK:
        yield manifest.problem("spec.serveConfigV2.http_options.host", "only the pod itself could ask; use 0.0.0.0")
    for pod in pods(manifest):
        containers = [container for _, container in pod.containers()]
        ports = {port.get("name"): port["containerPort"] for each in containers for port in each.get("ports", [])}
        if ports.get("serve") != deployed.http_options.port:
            yield pod.problem(pod.place, f"has no port `serve` of http_options.port ({deployed.http_options.port})")
        yield from _guards(pod, containers)
        yield from _grace(pod, containers)


def _guards(pod: Pod, containers: list[dict[str, Any]]) -> Iterator[Problem]:
    given = {variable["name"]: variable.get("value") for each in containers for variable in each.get("env", [])}
    for name, value in PROXY_ENVIRONMENT.items():
        if given.get(name) != value:
            yield pod.problem(pod.place, f"needs {name}={value}; without, nothing guards Ray Serve's proxy")


def _grace(pod: Pod, containers: list[dict[str, Any]]) -> Iterator[Problem]:
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    for container in containers:
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if command[:1] == ["sleep"] and float(command[1]) >= grace:
            yield pod.problem(f"{pod.place}.terminationGracePeriodSeconds", f"{grace} s ends before the preStop hook")


def _dotted(path: Any) -> str:
    return ".".join(str(part) for part in path)
