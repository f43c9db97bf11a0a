"""Workers of one group must reach each other, whatever their hosts' names stand for."""

import os

import psutil
import pytest
import ray

from heliostat.training import ray_worker


@pytest.mark.parametrize("named", [None, "chosen0"])
def test_gloo_listens_at_the_nodes_address_unless_told_otherwise(
    named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, address = next(
        (name, each.address) for name, found in psutil.net_if_addrs().items() for each in found if each.address
    )
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.setattr("heliostat.hosts.is_loopback", lambda host: False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if named:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
    ray_worker._name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == (named or name)


def test_a_machine_alone_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    ray_worker._name_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
