"""What guards the endpoint in front of Ray Serve's own proxy: with a real proxy, a real application and raw sockets."""

import json
import os
import signal
import ssl
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from ray import serve

from heliostat.serving import edge
from heliostat.serving.bind import trusting
from tests.ports import free_port
from tests.ray import echo
from tests.wire import answers, connect, parsed, raw, read_all, until

HASTY = dict.fromkeys(edge.PROXY_ENVIRONMENT, "tests.ray.echo:hasty_middlewares")


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def url(ray_cluster: Any, notes: Path) -> Iterator[str]:
    port = free_port()
    options: Any = {"host": "127.0.0.1", "port": port}
    serve.start(
        http_options=options, logging_config=echo.QUIET, controller_options={"runtime_env": {"env_vars": HASTY}}
    )
    serve.run(echo.application(notes), name="echo", route_prefix="/")
    address = f"http://127.0.0.1:{port}"
    until(lambda: httpx2.get(f"{address}/echo").status_code == 200)
    yield address
    serve.shutdown()


@pytest.fixture(autouse=True)
def _no_notes(notes: Path) -> None:
    for note in notes.iterdir():
        note.unlink()


STEERING = [
    "x-request-timeout-seconds: 0.001",
    "X-Request-Timeout-Seconds: -1",
    "x-request-disconnect-disabled: ?1",
    "serve_multiplexed_model_id: other",
    "Serve-Multiplexed-Model-Id: other",
    "x-session-id: me",
    "X_Session_Id: me",
    "x-serve-router-target: replica",
]


@pytest.mark.parametrize("header", STEERING)
def test_clients_cannot_steer_ray_serve(url: str, header: str) -> None:
    request = f"POST /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n{header}\r\n\r\nhi"
    status, _, answer = parsed(raw(url, request))
    assert status == 200
    assert answer["bytes"] == 2
    assert {name for name, _ in answer["headers"]} == {"host", "connection", "content-length", "x-request-id"}


REQUEST_IDS = [
    (["mine-1"], "mine-1"),
    (["one", "two"], None),
    (["a b"], None),
    (["x" * 65], None),
    (["\u00e9"], None),
    (["<script>"], None),
    ([""], None),
    ([], None),
]


@pytest.mark.parametrize(("given", "kept"), REQUEST_IDS)
def test_a_response_has_one_harmless_request_id(url: str, given: list[str], kept: str | None) -> None:
    lines = "".join(f"X-Request-Id: {value}\r\n" for value in given)
    request = f"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n"
    status, headers, answer = parsed(raw(url, request))
    assert status == 200
    (seen,) = [value for name, value in answer["headers"] if name == "x-request-id"]
    (returned,) = [value for name, value in headers if name == "x-request-id"]
    assert seen == returned
    assert returned == kept if kept else returned not in given


def test_disconnects_cannot_be_hidden(url: str, notes: Path) -> None:
    with closing(connect(url)) as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\nx-request-disconnect-disabled: ?1\r\n\r\n")
        connection.recv(1000)
    until((notes / "cancelled").exists)


def test_serves_own_routes_are_closed_but_for_the_health_check(url: str) -> None:
    routes = httpx2.get(f"{url}/-/routes")
    assert routes.status_code == 404
    assert "echo" not in routes.text
    assert routes.json()["error"]["type"] == "invalid_request_error"
    assert httpx2.get(f"{url}/-/healthz").status_code == 200


def test_a_body_that_is_too_long_is_not_read(url: str) -> None:
    long = edge.PROXY_MAX_BODY_BYTES + 1
    request = f"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: {long}\r\n\r\n"
    status, headers, answer = parsed(raw(url, request))
    assert status == 413
    assert ("connection", "close") in headers
    assert answer["error"]["code"] == "body_too_large"


def test_a_slow_body_is_cut_off(url: str) -> None:
    status, headers, answer = parsed(raw(url, b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf"))
    assert status == 408
    assert ("connection", "close") in headers
    assert answer["error"]["code"] == "request_timeout"


def test_a_client_that_does_not_read_is_cut_off(url: str, notes: Path) -> None:
    with closing(connect(url, receive_buffer=4096)) as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        until((notes / "running").exists)
        until((notes / "cancelled").exists)
        # What was buffered can still be read; then the connection ends, without the end of the response.
        assert not read_all(connection).endswith(b"0\r\n\r\n")


def test_a_client_that_is_slower_than_its_stream_is_not(url: str, notes: Path) -> None:
    with closing(connect(url)) as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline = time.monotonic() + 3 * echo.SEND_TIMEOUT_S
        while time.monotonic() < deadline:
            connection.recv(200_000)
            time.sleep(0.1)
        assert not (notes / "cancelled").exists()


def test_a_stream_of_a_gateway_that_dies_ends_with_an_error(url: str, notes: Path) -> None:
    pid = httpx2.get(f"{url}/echo").json()["pid"]
    received = b""
    with httpx2.stream("GET", f"{url}/stream", timeout=60) as response:
        for piece in response.iter_raw():
            if not received:
                os.kill(pid, signal.SIGKILL)
            received += piece
    last = received.strip().split(b"\n\n")[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "overloaded"


def test_a_request_to_a_gateway_that_dies_is_answered(url: str) -> None:
    until(lambda: answers(f"{url}/echo"))
    pid = httpx2.get(f"{url}/echo").json()["pid"]
    with closing(connect(url)) as connection:
        connection.sendall(b"POST /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi")
        time.sleep(0.2)  # /slow answers after half a second: the request is being worked on
        os.kill(pid, signal.SIGKILL)
        status, headers, answer = parsed(read_all(connection))
    assert (status, answer["error"]["type"]) == (503, "server_error")
    assert ("retry-after", "1") in headers


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "heliostat test")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


def test_without_the_edge_clients_would_steer_ray_serve(ray_cluster: Any, notes: Path) -> None:
    """The trap itself. From here on Ray Serve is started anew."""
    serve.shutdown()
    port = free_port()
    options: Any = {"host": "127.0.0.1", "port": port}
    serve.start(http_options=options, logging_config=echo.QUIET)
    try:
        serve.run(echo.application(notes), name="echo", route_prefix="/")
        address = f"http://127.0.0.1:{port}"
        until(lambda: httpx2.get(f"{address}/echo").status_code == 200)
        assert httpx2.get(f"{address}/slow", headers={"x-request-timeout-seconds": "0.001"}).status_code == 408
        given = {"x-request-id": "<script>"}
        assert "<script>" in httpx2.get(f"{address}/echo", headers=given).headers["x-request-id"]
    finally:
        serve.shutdown()


def test_https(ray_cluster: Any, tmp_path: Path, notes: Path) -> None:
    serve.shutdown()
    certfile, keyfile = certificate(tmp_path)
    port = free_port()
    options: Any = {"host": "127.0.0.1", "port": port, "ssl_certfile": str(certfile), "ssl_keyfile": str(keyfile)}
    environment = {"runtime_env": {"env_vars": edge.PROXY_ENVIRONMENT}}
    serve.start(http_options=options, logging_config=echo.QUIET, controller_options=environment)
    try:
        serve.run(echo.application(notes), name="echo", route_prefix="/")
        address = f"https://127.0.0.1:{port}"
        verified = ssl.create_default_context(cafile=str(certfile))
        until(lambda: httpx2.get(f"{address}/echo", verify=verified).status_code == 200)
        assert httpx2.get(f"{address}/echo", verify=trusting(str(certfile))).status_code == 200
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/echo")
        other, _ = certificate(tmp_path)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/echo", verify=trusting(str(other)))
        old = ssl.create_default_context(cafile=str(certfile))
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.minimum_version, old.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/echo", verify=old)
    finally:
        serve.shutdown()
