"""Metrics of real processes on a Ray cluster of two nodes come out of one exposition."""

import asyncio
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from heliostat.serving import metrics

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 90.0
# Values of the series of two processes that have answered 3 and 4 requests, smallest first.
EXPECTED = {
    "heliostat_requests_total": [1, 1, 3, 4],
    "heliostat_requests_rejected_total": [1, 1],
    "heliostat_request_success_total": [3, 4],
    "heliostat_generation_tokens_total": [15, 20],
    "heliostat_inter_token_latency_seconds_count": [12, 16],
    "heliostat_e2e_request_latency_seconds_count": [3, 4],
    "heliostat_num_requests_running": [2, 2],
    "heliostat_kv_cache_usage_perc": [0.25, 0.25],
    "heliostat_prefix_cache_hits_total": [4, 4],
    "heliostat_metrics_nodes": [0, 2],
}


@dataclass(frozen=True)
class State:
    running: int = 2
    waiting: int = 1
    cache_usage: float = 0.25
    prefix_queries: int = 10
    prefix_hits: int = 4
    restarts: int = 0


class Process:
    """A gateway and a replica in one actor."""

    def __init__(self) -> None:
        self._recorder = metrics.RayRecorder()
        self._gateway = metrics.GatewayMetrics(self._recorder)

    def work(self, requests: int) -> None:
        metrics.ReplicaMetrics(self._recorder, "cron", "3").report(State())
        for _ in range(requests):
            meter = self._gateway.request("cron", "chat")
            meter.routed("3")
            for _ in range(5):
                meter.tokens(1)
            meter.finished(4, 5, ["stop"])
        self._gateway.request(None, "chat").rejected("model_not_found")


def values(text: str, sample: str) -> list[float]:
    """The values of all series of a sample, smallest first."""
    families = text_string_to_metric_families(text)
    return sorted(found.value for family in families for found in family.samples if found.name == sample)


def two_nodes() -> None:
    """Run in a process of its own: the cluster of the other tests reports less often."""
    import ray
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 1, "resources": {"first": 1}, "_system_config": {"metrics_report_interval_ms": 1000}}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        cluster.add_node(num_cpus=1, resources={"second": 1})
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        remote = ray.remote(Process)
        actors = [remote.options(resources={place: 1}).remote() for place in ("first", "second")]
        ray.get([actor.work.remote(count) for actor, count in zip(actors, (3, 4), strict=True)])
        check_table(wait_for_values())
    finally:
        ray.shutdown()
        cluster.shutdown()


def wait_for_values() -> str:
    """The exposition, as soon as it holds everything that the actors recorded."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        text = asyncio.run(metrics.exposition()).decode()
        found = {name: values(text, name) for name in EXPECTED}
        if found == EXPECTED:
            return text
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def check_table(text: str) -> None:
    """Kinds, help and labels are those of the table."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        name = family.name.removeprefix(metrics.PREFIX) + ("_total" if family.type == "counter" else "")
        declared = metrics.FAMILIES[name]
        assert (family.type, family.documentation) == (declared.kind, declared.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le", "WorkerId", "NodeAddress"} == set(declared.labels)


def test_one_exposition_holds_the_processes_of_all_nodes() -> None:
    code = "from tests.ray.test_serving_metrics import two_nodes; two_nodes()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
