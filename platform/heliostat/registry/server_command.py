"""`heliostat mlflow`: its flags and output. Knows nothing of how the server is run."""

import argparse
import contextlib
import signal
import sys

from heliostat.command import Command, Result
from heliostat.errors import HeliostatError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "heliostat mlflow [options] [options of `mlflow server`, such as --allowed-hosts NAMES]"
    parser.add_argument(
        "--backend-store-uri",
        metavar="URI",
        help="database, without its password: sqlite:///FILE, postgresql://USER@HOST/NAME; default: the environment's "
        "MLFLOW_BACKEND_STORE_URI, or .heliostat/mlflow.db",
    )
    parser.add_argument(
        "--artifacts-destination",
        metavar="PLACE",
        help="folder or URI, such as s3://BUCKET/PATH, of the artifacts; default: .heliostat/artifacts",
    )
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes that answer (default: %(default)s)")
    parser.add_argument("--auth", action="store_true", help="users and passwords (MLflow's basic-auth)")
    parser.add_argument("--insecure", action="store_true", help="listen on any host without --auth")


def _run(options: argparse.Namespace) -> None:
    from heliostat.registry import server

    settings = server.ServerSettings(
        options.backend_store_uri,
        options.artifacts_destination,
        options.host,
        options.port,
        options.workers,
        options.auth,
        options.insecure,
        options.rest,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with server.running(settings) as running:
        result = {"url": running.url, "username": running.username, "password_file": running.password_file}
        options.emit(result)
        print("press Ctrl-C to stop", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            code = running.process.wait()
            raise HeliostatError(f"MLflow's server ended with code {code}; its messages are above")


def _show(result: Result) -> str:
    lines = [f"MLflow is at {result['url']}", f"export MLFLOW_TRACKING_URI={result['url']}"]
    if result["username"]:
        lines.append(f"export MLFLOW_TRACKING_USERNAME={result['username']}")
    if result["password_file"]:
        lines.append(f'export MLFLOW_TRACKING_PASSWORD="$(cat {result["password_file"]})"')
    return "\n".join(lines)


COMMAND = Command("run an MLflow server, with authentication if wanted", _arguments, _run, _show, passes_on=True)
