"""`heliostat mlflow`: MLflow's own server as a process, with safe settings. Knows nothing of runs or models.

No secret is on the server's command line, where everybody on the machine reads it: the store's URI, the admin's
password and the key of MLflow's forms go by environment variables.
"""

import configparser
import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heliostat import hosts, state
from heliostat.errors import ConfigError, HeliostatError, ResourceError
from heliostat.registry import store

STARTUP_TIMEOUT_S = 180.0
_POLL_S = 0.2
_USER, _PASSWORD = "MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_ADMIN_PASSWORD"
_KEY, _STORE = "MLFLOW_FLASK_SERVER_SECRET_KEY", "MLFLOW_BACKEND_STORE_URI"
# No job queue, no telemetry: neither is used here.
_DEFAULTS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass(frozen=True)
class ServerSettings:
    """What `heliostat mlflow` is told."""

    backend_store_uri: str | None = None
    """A database, without its password; default: MLFLOW_BACKEND_STORE_URI, or the sqlite file of the state folder."""
    artifacts_destination: str | None = None
    """Folder or URI where the server keeps artifacts; default: in the state folder."""
    host: str = "127.0.0.1"
    port: int = 5000
    workers: int = 1
    """Processes that answer. MLflow restarts one that is silent for 5 s, as one of many is on a busy small machine."""
    auth: bool = False
    """Users and passwords: MLflow's `basic-auth`."""
    insecure: bool = False
    """Listen on any host without `auth`."""
    options: Sequence[str] = ()
    """More options of `mlflow server`."""

    @property
    def url(self) -> str:
        """Where this machine reaches the server."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    username: str | None
    password_file: str | None
    """Holds the admin's password, if it was made here and not given by MLFLOW_AUTH_ADMIN_PASSWORD."""
    process: "subprocess.Popen[bytes]"


def check(settings: ServerSettings) -> None:
    """Refuse what must not run.

    Raises:
        ConfigError: a password on the command line, or a host that others reach without `auth`.
        ResourceError: MLflow's authentication is not installed.
    """
    for text in (settings.backend_store_uri, settings.artifacts_destination, *settings.options):
        if text and store.shown(text) != text and ":" in text.split("://", 1)[-1].split("@")[0]:
            raise ConfigError(
                "a URI on the command line has a password, which others see in the list of processes; give it as "
                f"{_STORE} in the environment, or leave the password to PGPASSWORD or ~/.pgpass"
            )
    if not settings.auth and not hosts.is_loopback(settings.host):
        if not settings.insecure:
            raise ConfigError(
                f"--host {settings.host} makes the server reachable from other machines, where everybody could change "
                "runs and models; add --auth, or --insecure if that is what you want"
            )
        print(f"WARNING: INSECURE: everybody who reaches {settings.host} may change runs and models", file=sys.stderr)
    if settings.auth and importlib.util.find_spec("flask_wtf") is None:
        raise ResourceError("--auth needs MLflow's authentication: pip install 'heliostat[server]'")


@contextlib.contextmanager
def running(settings: ServerSettings) -> Iterator[Server]:
    """A server that answers, until the end of the block. Its own messages go to stderr.

    Raises:
        As `check`; ResourceError also: the port is taken.
        HeliostatError: it did not start; its messages say why.
    """
    check(settings)
    hosts.check_port(settings.host, settings.port, "--port")
    state.folder().mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        environment, password_file = _environment(settings)
        process = subprocess.Popen(_command(settings), env=environment, stdout=sys.stderr, start_new_session=True)
        stack.callback(_end, process)
        _wait(settings.url, process)
        yield Server(settings.url, environment.get(_USER) if settings.auth else None, password_file, process)


def _command(settings: ServerSettings) -> list[str]:
    destination = settings.artifacts_destination or str(state.mlflow_artifacts())
    command = [sys.executable, "-m", "mlflow", "server", "--host", settings.host, "--port", str(settings.port)]
    command += ["--workers", str(settings.workers)]
    command += ["--artifacts-destination", destination, *(["--app-name", "basic-auth"] if settings.auth else [])]
    return [*command, *settings.options]


def _environment(settings: ServerSettings) -> tuple[dict[str, str], str | None]:
    """The server's variables, and the file of the admin's password if there is one."""
    environment = {**_DEFAULTS, **os.environ}
    uri = settings.backend_store_uri or environment.get(_STORE) or f"sqlite:///{state.mlflow_database()}"
    environment[_STORE] = uri
    # Of the client: a server that finds its own address there would ask itself.
    environment.pop("MLFLOW_TRACKING_URI", None)
    if not settings.auth:
        return environment, None
    environment.setdefault(_USER, "admin")
    file = None
    if not environment.get(_PASSWORD):
        file = state.folder() / "mlflow-admin-password"
        environment[_PASSWORD] = _kept_secret(file)
    if not environment.get(_KEY):
        environment[_KEY] = _kept_secret(state.folder() / "mlflow-secret-key")
    if "MLFLOW_AUTH_CONFIG_PATH" not in environment:
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(_write_auth_config(uri, environment))
    return environment, None if file is None else str(file)


def _kept_secret(path: Path) -> str:
    """The secret in the file, which is made if there is none: 192 random bits that only the user may read."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(24))
    return path.read_text(encoding="utf-8").strip()


def _write_auth_config(uri: str, environment: Mapping[str, str]) -> Path:
    """MLflow's own defaults, with the users in the same database, or in a sqlite file beside the store's."""
    users = f"sqlite:///{state.folder()}/mlflow-users.db" if uri.startswith("sqlite:") else uri
    config = configparser.ConfigParser(interpolation=None)
    config["mlflow"] = {
        "default_permission": "READ",
        "database_uri": users.replace("%", "%%"),  # MLflow reads it with interpolation
        "admin_username": environment[_USER],
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    path = state.folder() / "mlflow-auth.ini"
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        config.write(file)
    os.rename(temporary, path)
    return path


def _wait(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise HeliostatError(f"MLflow's server ended with code {process.returncode}; its messages are above")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(_POLL_S)
    raise HeliostatError(f"MLflow's server did not answer at {url} within {STARTUP_TIMEOUT_S:g} s")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the server and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
