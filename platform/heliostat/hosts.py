"""Where a server of ours may listen: hosts that only this machine reaches, ports that are free."""

import ipaddress
import socket

from heliostat.errors import ResourceError


def is_loopback(host: str) -> bool:
    """Whether only this machine itself reaches the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_port(host: str, port: int, setting: str) -> None:
    """Refuse a port that cannot be listened on.

    Raises:
        ResourceError: it is taken, or not allowed; the message names the `setting` to choose another with.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose another with {setting}"
            ) from error
