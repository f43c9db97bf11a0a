"""`heliostat mlflow`: what is refused, and that secrets are where nobody sees them. Real ones: slow/test_jobs.py."""

import configparser
import socket
import stat
from pathlib import Path

import pytest

from heliostat import cli, state
from heliostat.errors import ConfigError, ResourceError
from heliostat.registry import server
from heliostat.registry.server import ServerSettings

SECRETS = ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "MLFLOW_BACKEND_STORE_URI")
WITH_PASSWORD = "postgresql://me:hunter2@host/mlflow"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SECRETS, "MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    state.folder().mkdir(parents=True)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "example.org"])
def test_other_hosts_need_authentication(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="add --auth, or --insecure"):
        server.check(ServerSettings(host=host))
    server.check(ServerSettings(host=host, auth=True))
    assert capsys.readouterr().err == ""
    server.check(ServerSettings(host=host, insecure=True))
    assert "INSECURE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        ServerSettings(backend_store_uri=WITH_PASSWORD),
        ServerSettings(artifacts_destination=WITH_PASSWORD),
        ServerSettings(options=["--read-replica-backend-store-uri", WITH_PASSWORD]),
    ],
)
def test_a_password_on_the_command_line_is_refused_and_not_repeated(settings: ServerSettings) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_BACKEND_STORE_URI in the environment") as refused:
        server.check(settings)
    assert "hunter2" not in str(refused.value)


def test_a_user_without_a_password_is_no_secret() -> None:
    server.check(ServerSettings(backend_store_uri="postgresql://me@host:5432/mlflow"))


def test_secrets_are_made_once_in_files_of_the_user_alone() -> None:
    settings = ServerSettings(auth=True)
    environment, file = server._environment(settings)
    again, _ = server._environment(settings)
    assert file is not None
    password = Path(file).read_text()
    assert environment["MLFLOW_AUTH_ADMIN_PASSWORD"] == password == again["MLFLOW_AUTH_ADMIN_PASSWORD"]
    assert len(password) == 32
    for path in state.folder().iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    secret = [environment[name] for name in SECRETS[:2]]
    assert not any(text in part for text in secret for part in server._command(settings))


def test_a_password_of_the_environment_is_written_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "hunter2hunter2")
    environment, file = server._environment(ServerSettings(auth=True))
    assert file is None
    assert environment["MLFLOW_AUTH_ADMIN_PASSWORD"] == "hunter2hunter2"
    assert all("hunter2" not in path.read_text() for path in state.folder().iterdir())


@pytest.mark.parametrize(
    ("uri", "users"),
    [
        (None, "sqlite:///{state}/mlflow-users.db"),
        ("postgresql://me:a%40b@host/mlflow", "postgresql://me:a%40b@host/mlflow"),
    ],
)
def test_users_are_kept_with_the_store(uri: str | None, users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if uri is not None:
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", uri)
    environment, _ = server._environment(ServerSettings(auth=True))
    config = configparser.ConfigParser()  # as MLflow reads it
    config.read(environment["MLFLOW_AUTH_CONFIG_PATH"])
    assert config["mlflow"]["database_uri"] == users.format(state=state.folder())
    assert config["mlflow"]["default_permission"] == "READ"
    assert "admin_password" not in config["mlflow"]


def test_other_options_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--allowed-hosts", "mlflow.example.org"]
    assert server._command(ServerSettings(options=more))[-2:] == more
    assert cli.main(["mlflow", *more, "--host", "10.0.0.5"]) == 2
    assert "--auth" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(ResourceError, match="choose another with --port"), server.running(settings):
            raise AssertionError("must not start")
