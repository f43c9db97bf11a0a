"""Which hosts an endpoint may listen on without keys. For `trusting`, see ray/test_edge.py."""

import pytest

from heliostat.errors import ResourceError
from heliostat.serving.bind import check_bind

LOOPBACK = ["127.0.0.1", "127.3.2.1", "::1", "localhost"]
OTHERS = ["0.0.0.0", "::", "", "10.0.0.5", "192.168.1.2", "fe80::1", "example.org", "localhost.example.org", "127.1"]


@pytest.mark.parametrize("host", LOOPBACK)
def test_this_machine_needs_no_keys(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_bind(host, None, insecure=False)
    check_bind(host, None, insecure=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("host", OTHERS)
def test_other_hosts_need_keys(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResourceError, match=r"heliostat keys add .*serving\.api_keys"):
        check_bind(host, None, insecure=False)
    check_bind(host, "keys.json", insecure=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("host", OTHERS)
def test_insecure_is_said_loudly(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_bind(host, None, insecure=True)
    output = capsys.readouterr()
    assert "INSECURE" in output.err
    assert output.out == ""
