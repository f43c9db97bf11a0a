"""A Ray cluster of separate processes for tests: `ray start --head`, and more nodes, with token authentication on."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from tests.ports import free_port

_RAY = Path(sys.executable).parent / "ray"


class RayCluster:
    """A head, and nodes that can be added and killed. Everything ends with `close`.

    Each node is a session of processes of its own, in a temporary folder that is short enough for Unix sockets.
    """

    def __init__(self, home: Path, num_cpus: int = 2) -> None:
        """`home` is the state folder that the nodes share; they do not have this process's PYTHONPATH."""
        self.home = home
        self.folder = Path(tempfile.mkdtemp(prefix="heliostat-ray-"))
        self.token = secrets.token_hex(32)
        token_file = self.folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(self.token)
        self.port, self.dashboard = free_port(), free_port()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._environment = {**own, "PATH": path, **auth, "HELIOSTAT_HOME": str(home)}
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.start("--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", cpus=num_cpus)

    @property
    def address(self) -> str:
        """Of the job server."""
        return f"http://127.0.0.1:{self.dashboard}"

    def start(self, *arguments: str, cpus: int) -> "subprocess.Popen[bytes]":
        """Start a node."""
        node = self.folder / str(len(self._nodes))
        node.mkdir()
        command = [_RAY, "start", *arguments, "--block", f"--num-cpus={cpus}", "--disable-usage-stats"]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--node-ip-address=127.0.0.1"]
        if "--head" in arguments:
            command += [
                f"--temp-dir={self.folder}/ray",
                "--dashboard-host=127.0.0.1",
                f"--ray-client-server-port={free_port()}",
            ]
        with (node / "log").open("wb") as log:
            process = subprocess.Popen(
                [str(part) for part in command], cwd=node, env=self._environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._nodes.append(process)
        return process

    def wait(self, seconds: float = 120) -> None:
        """Wait until the job server answers; the limit only keeps a broken one from hanging the tests."""
        deadline = time.monotonic() + seconds
        request = urllib.request.Request(
            f"{self.address}/api/version", headers={"Authorization": f"Bearer {self.token}"}
        )
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                log = (self.folder / "0" / "log").read_text()
                assert self._nodes[0].poll() is None, log
                assert time.monotonic() < deadline, log
                time.sleep(0.2)

    def close(self) -> None:
        """Kill all that was started, and nothing else."""
        for process in self._nodes:
            kill_tree(process)
        shutil.rmtree(self.folder, ignore_errors=True)


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """Kill a node and all its processes at once, as a machine that loses its power does."""
    if process.poll() is None:
        below = psutil.Process(process.pid).children(recursive=True)
        for each in below:
            each.send_signal(signal.SIGKILL)
        process.kill()
    process.wait()
