"""Which MLflow store is used, and how its failures are told to the user. Knows nothing of runs or models.

The store is MLFLOW_TRACKING_URI's (a server, a database); without it, a sqlite file in the state folder. The URIs are
handed to each client and never set globally: `mlflow.set_tracking_uri` would overwrite the user's environment variable.
"""

import functools
import getpass
import logging
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.telemetry import set_telemetry_client

from heliostat import state
from heliostat.errors import RegistryError

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's own 7 retries block a call for minutes when the server is down; two take seconds.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
_SQLITE = "sqlite:///"
# Tries of a call, and the longest pause after the first failed one; it doubles each time.
_ATTEMPTS = 5
_PAUSE_S = 0.1

T = TypeVar("T")


def connect() -> str:
    """Make MLflow quiet and quick to fail, as far as the user's environment does not say otherwise.

    Returns:
        The tracking URI; credentials included, so not for showing (see `shown`).
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    set_telemetry_client()  # it was made when mlflow was imported; made again, it sees that it is switched off
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each retry
    return os.environ.get("MLFLOW_TRACKING_URI") or _embedded()


def environment() -> dict[str, str]:
    """The variables with which another process uses this store.

    A URI with a password is left out: the variables of Ray's actors are shown by its dashboard. The machines of a
    cluster must have it of their own.
    """
    uris = {name: os.environ.get(name, "") for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    given = {name: uri for name, uri in uris.items() if uri and shown(uri) == uri}
    return {"HELIOSTAT_HOME": str(state.folder()), **given}


def client() -> MlflowClient:
    """A client of the store.

    The first one for a new sqlite file takes seconds, about half of them for MLflow's schema migrations.

    Raises:
        MlflowException: the database cannot be opened, or has another MLflow version's schema.
    """
    uri = connect()
    return _client(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def experiment_id(name: str) -> str:
    """The id of the experiment called `name`, which is created if there is none.

    Raises:
        RegistryError: the experiment was deleted.
        MlflowException: the store failed.
    """
    mlflow = client()
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        try:
            return create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # else another process was quicker
                raise
            experiment = mlflow.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        raise RegistryError(
            f"the MLflow experiment `{name}` was deleted; restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, or set registry.experiment_name"
        )
    return str(experiment.experiment_id)


def create_experiment(name: str) -> str:
    """The id of a new experiment.

    Raises:
        MlflowException: there is one of that name, or the store failed.
    """
    return str(client().create_experiment(name, artifact_location=_artifact_location()))


def attempt(call: Callable[[], T]) -> T:
    """What `call` returns; where the store failed for the moment (a locked database, 5xx), it is called again.

    So `call` must do no harm when it is done twice.

    Raises:
        MlflowException: it failed several times, or in a way that does not pass.
    """
    for tried in range(_ATTEMPTS - 1):
        try:
            return call()
        except MlflowException as error:
            if not _may_pass(error):
                raise
        time.sleep(random.uniform(0, _PAUSE_S * 2**tried))
    return call()


@contextmanager
def failures(doing: str) -> Iterator[None]:
    """Turn what MLflow raises in this block into a RegistryError that starts with `doing`, without credentials."""
    try:
        yield
    except (MlflowException, OSError) as error:
        raise RegistryError(f"{doing}: {explain(error)}") from error


def explain(error: BaseException) -> str:
    """What went wrong, in one line, without credentials."""
    if isinstance(error, MlflowException) and _is_unreachable(error):
        return f"the MLflow server at {shown(connect())} cannot be reached; start it, or correct MLFLOW_TRACKING_URI"
    text = " ".join(str(error).split()) or type(error).__name__
    return shown(text if len(text) <= 400 else text[:400] + "...")


def shown(text: str) -> str:
    """The text with the `user:password@` of each URL in it taken out."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def user() -> str:
    """The name of the user, or a stand-in where the system knows none (containers with an arbitrary user id)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@functools.cache
def _client(uri: str, registry_uri: str) -> Any:
    if not uri.startswith(_SQLITE):
        return MlflowClient(tracking_uri=uri, registry_uri=registry_uri)
    database = Path(uri.removeprefix(_SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):  # MLflow takes none here: two processes would both create the tables
        if not database.exists():
            _create_database(database)
        return MlflowClient(tracking_uri=uri, registry_uri=registry_uri)


def _create_database(database: Path) -> None:
    """Make the tables in a file of another name: a process killed half-way would leave one that never opens again."""
    with tempfile.TemporaryDirectory(dir=database.parent) as folder:
        MlflowClient(tracking_uri=f"{_SQLITE}{folder}/new.db")
        os.rename(f"{folder}/new.db", database)


def _embedded() -> str:
    return f"{_SQLITE}{state.mlflow_database()}"


def _artifact_location() -> str | None:
    """Where a new experiment's artifacts go; None: where the server puts them."""
    return state.mlflow_artifacts().as_uri() if connect() == _embedded() else None


def _may_pass(error: MlflowException) -> bool:
    """Whether the same call may succeed a moment later.

    BAD_REQUEST is what MLflow's database stores make of a broken constraint: two clients set a new tag or alias at the
    same time, both found none, and one was too late to insert it. A server that is away was waited for already.
    """
    if _is_unreachable(error):
        return False
    return bool(error.error_code == "BAD_REQUEST" or error.get_http_status_code() >= 500)


def _is_unreachable(error: BaseException) -> bool:
    """Whether a network error lies under the exception: MLflow wraps them without a type of their own."""
    cause = error.__cause__ or error.__context__
    return cause is not None and (isinstance(cause, OSError) or _is_unreachable(cause))
