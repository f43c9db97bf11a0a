"""Where an endpoint listens: which hosts are safe without keys, and how its own TLS certificate is trusted."""

import ssl
import sys

from heliostat import hosts
from heliostat.errors import ResourceError


def check_bind(host: str, api_keys: str | None, insecure: bool) -> None:
    """Refuse to be reachable from other machines without keys, unless that is what the user says.

    Raises:
        ResourceError: the host is not this machine itself, and there are neither keys nor `insecure`.
    """
    if api_keys is not None or hosts.is_loopback(host):
        return
    if not insecure:
        raise ResourceError(
            f"serving.host={host} makes the endpoint reachable from other machines, and it has no API keys; make some "
            "(`heliostat keys add keys.json NAME`) and set serving.api_keys=keys.json, or set serving.host=127.0.0.1 "
            "(in a Serve config: api_keys of the application's args, host of http_options)"
        )
    print(
        f"WARNING: INSECURE: everybody who reaches {host} may use the endpoint: it has no API keys (serving.insecure)",
        file=sys.stderr,
        flush=True,
    )


def trusting(certificate: str) -> ssl.SSLContext:
    """For a request to our own endpoint: only this certificate counts, whoever signed it and whatever host it names."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
