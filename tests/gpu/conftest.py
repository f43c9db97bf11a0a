"""These tests need a GPU and skip without one; the machine that tests every change has none."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def gpu_cluster(gpu: torch.device) -> Iterator[Any]:
    """A Ray cluster with this machine's GPUs."""
    from heliostat import cluster

    with cluster.connected():
        yield
