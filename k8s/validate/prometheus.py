"""The Prometheus operator's objects, as far as they are used here: no package of a registry has its own schemas.

https://prometheus-operator.dev/docs/api-reference/api/
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from heliostat.config import StrictModel


class _Object(StrictModel):
    model_config = ConfigDict(alias_generator=to_camel)


class _Relabeling(_Object):
    action: Literal["replace", "keep", "drop", "labeldrop", "labelkeep"] = "replace"
    source_labels: tuple[str, ...] = ()
    regex: str | None = None
    target_label: str | None = None
    replacement: str | None = None


class _Endpoint(_Object):
    port: str
    path: str | None = None
    interval: str | None = None
    metric_relabelings: tuple[_Relabeling, ...] = ()
    relabelings: tuple[_Relabeling, ...] = ()


class _Pods(_Object):
    selector: dict[str, Any]
    job_label: str | None = None
    pod_target_labels: tuple[str, ...] = ()
    pod_metrics_endpoints: tuple[_Endpoint, ...]


class _Group(_Object):
    name: str
    rules: tuple[dict[str, Any], ...]
    """What is in them is for promtool (tests/unit/test_dashboards.py)."""


class _Rules(_Object):
    groups: tuple[_Group, ...]


class PodMonitor(_Object):
    """Which pods are scraped, and how."""

    api_version: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: dict[str, Any]
    spec: _Pods


class PrometheusRule(_Object):
    """Alerts."""

    api_version: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    metadata: dict[str, Any]
    spec: _Rules


KINDS: dict[str, type[BaseModel]] = {"PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule}
