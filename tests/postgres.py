"""A private PostgreSQL for tests: a cluster in a temporary folder, on a loopback port, gone afterwards."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

DATABASE = "heliostat"


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The URI of an empty database; the test is skipped where PostgreSQL is not installed."""
    initdb, pg_ctl, createdb = (_binary(name) for name in ("initdb", "pg_ctl", "createdb"))
    # Not in pytest's folders: only their owner may enter them, and PostgreSQL refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="heliostat-postgres-"))
    data, port = folder / "data", _free_port()
    quick = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200"
    try:
        _hand_over(folder)
        _run([initdb, "-D", data, "-U", "tester", "-A", "trust", "--no-sync"])
        _run([pg_ctl, "-D", data, "-l", folder / "log", "-o", quick, "-w", "start"])
        try:
            _run([createdb, "-h", folder, "-p", str(port), "-U", "tester", DATABASE])
            yield f"postgresql+psycopg2://tester@127.0.0.1:{port}/{DATABASE}"
        finally:
            _run([pg_ctl, "-D", data, "-m", "immediate", "-w", "stop"])
    finally:
        shutil.rmtree(folder)


def _binary(name: str) -> Path:
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name) or (installed[-1] if installed else None)
    if found is None:
        pytest.skip(f"PostgreSQL is not installed ({name} is neither on PATH nor in /usr/lib/postgresql)")
    return Path(found)


def _account() -> str | None:
    """The user PostgreSQL runs as; None: this one."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _hand_over(folder: Path) -> None:
    if account := _account():
        shutil.chown(folder, account)


def _run(command: Sequence[Path | str]) -> None:
    # Into a file: the server inherits these streams, and would keep a pipe open for as long as it runs.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            [str(part) for part in command], user=_account(), cwd="/", stdout=output, stderr=output, check=False
        )
        output.seek(0)
        assert done.returncode == 0, f"{command}: {output.read()}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
