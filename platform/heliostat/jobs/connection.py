"""The job server of a Ray cluster: its address, its errors in words, its jobs. Knows nothing of what the jobs do."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from heliostat import cluster
from heliostat.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Of Ray's; each wins over what a client is told.
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_OLDEST_RAY = (2, 60)
# Metadata of the jobs that are ours.
VERB, NAME = "heliostat_command", "heliostat_config"


class Cluster:
    """A connected client."""

    def __init__(self, address: str | None) -> None:
        """Connect to `address` (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine).

        Raises:
            ResourceError: nothing answers there, it is no Ray, too old a Ray, or wants another token.
        """
        self.address = address or next(filter(None, map(os.environ.get, _ADDRESSES)), DEFAULT_ADDRESS)
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported, which reads it then
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)
        with self.errors(), _without(*_ADDRESSES):
            try:
                self.client = JobSubmissionClient(self.address)
            except RuntimeError as error:  # of a 404, or of a Ray that is too old for its own client
                raise self._no_ray(error) from error
            self.version: str = self.client._server_ray_version  # read by the client when it connected
            self._check_version()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what goes wrong on the way to the job server into an error that says where, and what to do."""
        from aiohttp import ClientConnectionError, ClientError
        from ray.exceptions import AuthenticationError
        from requests import ConnectionError as RequestsConnectionError
        from requests import RequestException

        try:
            yield
        except AuthenticationError as error:
            missing = "required" in str(error).split(":")[0]
            problem = "wants a token" if missing else f"does not take the token of {_token_source()}"
            raise ResourceError(f"the Ray cluster at {self.address} {problem}; {cluster.SET_TOKEN}") from error
        except (ConnectionError, RequestsConnectionError, ClientConnectionError) as error:
            raise ResourceError(
                f"no Ray cluster answers at {self.address}; start one (`ray start --head`), or give the address of "
                "its dashboard with --address or RAY_ADDRESS"
            ) from error
        except (RequestException, ClientError, json.JSONDecodeError, KeyError) as error:
            raise self._no_ray(error) from error

    def job(self, job: str) -> "JobDetails":
        """What the cluster knows of a job.

        Raises:
            ConfigError: there is no such job.
        """
        with self.errors():
            try:
                return self.client.get_job_info(job)
            except RuntimeError as error:
                if "404" not in str(error):
                    raise
                raise ConfigError(
                    f"there is no job `{job}` at {self.address}; `heliostat status` lists the jobs there"
                ) from None

    def jobs(self) -> "list[JobDetails]":
        """Our jobs, the latest first."""
        with self.errors():
            ours = [job for job in self.client.list_jobs() if VERB in (job.metadata or {})]
        return sorted(ours, key=lambda job: job.start_time or 0, reverse=True)

    def logs(self, job: str) -> str:
        """All that the job has written so far; empty before it starts."""
        with self.errors():
            return self.client.get_job_logs(job) or ""

    def _no_ray(self, error: Exception) -> ResourceError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ResourceError(
            f"what answers at {self.address} is not the dashboard of a Ray cluster ({reason}); its port is 8265 unless "
            "it was set"
        )

    def _check_version(self) -> None:
        if tuple(int(part) for part in self.version.split(".")[:2]) < _OLDEST_RAY:
            raise ResourceError(
                f"the cluster at {self.address} runs Ray {self.version}; Heliostat needs "
                f"{'.'.join(map(str, _OLDEST_RAY))} or newer there"
            )


def _token_source() -> str:
    """Where Ray's client took its token from, in its order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Without these environment variables."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
