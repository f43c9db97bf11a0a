"""What fits on the nodes of a cluster."""

import math

import pytest

from heliostat import cluster

NODES = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}, {}]


@pytest.mark.parametrize(
    ("resources", "per_node", "expected"),
    [
        ({"CPU": 1}, None, 6),
        ({"CPU": 3}, None, 1),  # of six CPUs, but on two nodes
        ({"CPU": 5}, None, 0),
        ({"CPU": 0.1}, None, 60),
        ({"CPU": 1, "GPU": 0.5}, None, 2),
        ({"CPU": 1, "GPU": 0}, 1, 2),
        ({}, 1, 3),
        ({}, None, math.inf),
    ],
)
def test_a_worker_is_on_one_node(resources: dict[str, float], per_node: int | None, expected: float) -> None:
    assert cluster.places(NODES, resources, per_node) == expected
