"""What a group of Ray workers gives, as KubeRay tells Ray: by its start parameters, else by its first container."""

from typing import Any

_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_DECIMAL = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def quantity(text: str | float) -> float:
    """A number of Kubernetes, such as 500m or 4Gi.

    https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
    """
    written = str(text)
    for suffix, factor in (*_BINARY.items(), *_DECIMAL.items()):
        if written.endswith(suffix):
            return float(written.removesuffix(suffix)) * factor
    return float(written)


def amounts(group: dict[str, Any]) -> tuple[float, float]:
    """CPUs and GPUs of one worker of the group."""
    params = group.get("rayStartParams") or {}
    container = group["template"]["spec"]["containers"][0]
    resources = container.get("resources") or {}
    given = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    cpus = params.get("num-cpus", given.get("cpu", 0))
    return quantity(cpus), quantity(params.get("num-gpus", given.get("nvidia.com/gpu", 0)))
