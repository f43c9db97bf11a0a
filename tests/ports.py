"""A port of this machine that nobody uses at the moment."""

import socket


def free_port() -> int:
    """Asked of the system, which hands such ports out in turns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
