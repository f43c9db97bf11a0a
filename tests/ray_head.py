"""A Ray cluster for tests: `ray start --head`, processes of their own, with token authentication on."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from tests.ports import free_port


class RayHead:
    """A head with two CPUs, in a temporary folder that is short enough for Unix sockets; it ends with `close`."""

    def __init__(self, home: Path) -> None:
        """`home` is the cluster's state folder; its processes do not have this one's PYTHONPATH."""
        self.home = home
        self.token = secrets.token_hex(32)
        self._folder = Path(tempfile.mkdtemp(prefix="heliostat-ray-"))
        token_file = self._folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(self.token)
        programs = Path(sys.executable).parent
        ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port",
                                                "ray-client-server-port")}  # fmt: skip
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.gcs = f"127.0.0.1:{ports['port']}"
        command = [f"{programs}/ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats",
                   f"--temp-dir={self._folder}/ray", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
                   *(f"--{name}={port}" for name, port in ports.items())]  # fmt: skip
        ours = ("PYTHONPATH", "RAY_AUTH_TOKEN")
        environment = {name: value for name, value in os.environ.items() if name not in ours} | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_raylet_start_wait_time_s": "120",  # 30 are too few on a busy machine
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "HELIOSTAT_HOME": str(home),
        }
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, env=environment, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        """Of the process that all others are below."""
        return self._process.pid

    def wait(self, seconds: float = 120) -> None:
        """Wait until the job server answers; the limit only keeps a broken one from hanging the tests."""
        deadline = time.monotonic() + seconds
        bearer = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.address}/api/version", headers=bearer)
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                log = (self._folder / "log").read_text()
                assert self._process.poll() is None, log
                assert time.monotonic() < deadline, log
                time.sleep(0.2)

    def close(self) -> None:
        """Kill it and all that it started."""
        below = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        for process in below:
            process.kill()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
