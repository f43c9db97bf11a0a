"""The director: which versions of the models are loaded, and which of them get traffic. Knows Ray Serve and the
registry, not HTTP or what is in a model.

It follows each model's reference. When an alias moves, the new version is loaded beside the old one as a Serve
application of its own, proves itself on the check prompts, takes over (as a canary first, if so configured), and the
old one is drained. A version that fails on the way never takes the place of the old one.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from heliostat import __version__, storage
from heliostat.errors import GateRefused, HeliostatError, RegistryError, ResourceError
from heliostat.models import remote
from heliostat.registry import versions
from heliostat.serving import applications, logs
from heliostat.serving.applications import APPLICATION, DIRECTOR, REPLICA, VERSIONS
from heliostat.serving.config import CanaryArgs, EndpointArgs, ModelArgs
from heliostat.serving.metrics import RayRecorder, RolloutMetrics, VersionState
from heliostat.serving.replica import application
from heliostat.serving.routing import Route, Table, Version

logger = logging.getLogger(__name__)

# What a gateway's question waits for at most before it is answered with what it knows already.
POLL_S = 1.0
# Serve is asked this often how its applications are: to tell it costs its controller some milliseconds.
HEALTH_S = 3.0
# A gateway that has not asked for so long is gone.
GONE_S = 10.0
KEPT_REJECTIONS = 10
_UNVERSIONED = "unversioned"
_LOOK_S = 0.2
_EVALUATION_TAGS = (versions.EVALUATION_PREFIX, versions.EVALUATION_DATA_PREFIX)
# Settings that may change while the replicas stay. Any other needs new ones.
_NOT_OF_REPLICAS = {
    "model",
    "model_id",
    "models",
    "poll_s",
    "startup_timeout_s",
    "canary",
    "request_timeout_s",
    "gateways",
    "api_keys",
    "insecure",
    "max_body_bytes",
    "playground",
}

Outcomes = Mapping[tuple[str, Literal["ok", "failed"]], int]


@dataclass(frozen=True)
class Target:
    """What a reference stands for now."""

    id: str
    reference: str
    """Of this version itself, where it is registered."""
    registered: str | None
    """The registered model's name."""
    version: str | None
    base: str
    """What the names of its Serve applications begin with, up to their last underscore."""

    @classmethod
    def of(cls, model: ModelArgs, args: EndpointArgs) -> Self:
        """Look the reference up; nothing is fetched yet, since each replica does that where it runs.

        Raises:
            RegistryError, ModelError: it does not exist.
            StorageError: the place of its URI cannot be reached.
        """
        found = versions.look_up(model.model)
        if found is not None:
            name, version, reference = found.name, found.version, found.uri
        elif storage.is_remote(model.model):
            remote.find(model.model)
            version, name, reference = None, PurePosixPath(model.model).name, model.model
        else:
            reference = _resolved(model.model)
            version, name = None, Path(reference).name if Path(reference).is_dir() else reference
        model_id = model.model_id or name
        return cls(
            model_id, reference, found.name if found else None, version, _base(model_id, version, reference, args)
        )

    def is_loaded_as(self, version: Version) -> bool:
        """Whether the version is this target, with the same settings."""
        return _base_of(version.app) == self.base


def _base(model_id: str, version: str | None, reference: str, args: EndpointArgs) -> str:
    """Another one for other settings, which need replicas of their own."""
    settings = args.model_dump(exclude=_NOT_OF_REPLICAS, mode="json")
    digest = _digest(json.dumps([reference, settings, __version__], sort_keys=True))
    return f"{_family(model_id)}{version or _UNVERSIONED}_{digest}"


def _family(model_id: str) -> str:
    """What the names of all applications of a model, and of no other, begin with.

    Underscores part the names, since Ray takes what follows a dot for a method.
    """
    plain = re.sub(r"[^A-Za-z0-9-]", "-", model_id)
    return f"{VERSIONS}_{plain if plain == model_id else f'{plain}-{_digest(model_id)}'}_"


def _resolved(reference: str) -> str:
    from heliostat.models import base  # which imports what models need, and the director does not

    return base.resolve(reference)


def _base_of(app: str) -> str:
    return app.rpartition("_")[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Director:
    """Follows all models of an endpoint, and tells the gateways where requests go."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, args: EndpointArgs, environment: Mapping[str, str]
    ) -> None:
        """Load all models, in replicas that have the variables of `environment`.

        Raises:
            UserError: one cannot be found, trusted, loaded or run. Nothing that was started for it is left.
        """
        logs.setup()
        self._table = Table(0)
        self._changed = asyncio.Condition()
        self._seen: dict[str, tuple[int, float]] = {}
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._beats: dict[tuple[str, str], tuple[bool, float]] = {}
        self._metrics = RolloutMetrics(RayRecorder())
        self._followers = [_Follower(model, args, environment, self) for model in args.all_models()]
        await asyncio.gather(*(follower.start() for follower in self._followers))
        self._tasks = [asyncio.create_task(follower.run()) for follower in self._followers]
        self._tasks.append(asyncio.create_task(self._watch_health()))

    async def table(self, gateway: str, seen: int, outcomes: Outcomes) -> Table:
        """The routing table, as soon as it is newer than generation `seen`; after a moment the one that there is.

        `outcomes` are the requests that ended at the gateway since it asked last.
        """
        self._outcomes.update(outcomes)
        self._seen[gateway] = (seen, time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S), self._changed:
                await self._changed.wait_for(lambda: self._table.generation > seen)
        return self._table

    async def publish(self, route: Route) -> None:
        """Make a route known."""
        for version, percent in _shares(self._table.routes.get(route.id), route).items():
            self._metrics.canary(route.id, version, percent)
        async with self._changed:
            # In the order of the settings, whichever was loaded first.
            routes = {found.id: found for follower in self._followers if (found := follower.published)}
            self._table = Table(self._table.generation + 1, routes)
            self._changed.notify_all()
        self._metrics.versions(route.id, _states(route))

    async def known(self) -> None:
        """Wait until all gateways go by the table as it is now."""
        generation = self._table.generation
        while any(seen < generation for seen, at in self._seen.values() if time.monotonic() - at < GONE_S):
            await asyncio.sleep(0.05)

    def outcomes(self, app: str) -> tuple[int, int]:
        """Requests of a version that ended, and how many of these failed."""
        failed = self._outcomes[app, "failed"]
        return self._outcomes[app, "ok"] + failed, failed

    def rejected(self, model_id: str, version: str | None, reason: str) -> None:
        """Record a version that was not let in."""
        logger.error("version %s of %s is not served: %s", version, model_id, reason)
        self._metrics.rejected(model_id, version or "")

    async def beat(self, app: str, replica: str, works: bool) -> None:
        """What each replica tells every moment: whether its threads that generate are alive."""
        self._beats[app, replica] = (works, time.monotonic())

    def down(self, app: str) -> bool:
        """Whether all replicas of a version that told of themselves lately say that they cannot work."""
        now = time.monotonic()
        self._beats = {key: beat for key, beat in self._beats.items() if now - beat[1] < GONE_S}
        told = [works for (name, _), (works, _) in self._beats.items() if name == app]
        return bool(told) and not any(told)

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_S)
            loaded = await asyncio.to_thread(applications.running, VERSIONS)
            for follower in self._followers:
                await follower.look_at_health(loaded)


class _Follower:
    """One model: its route, and the way from one version to the next."""

    def __init__(
        self, model: ModelArgs, args: EndpointArgs, environment: Mapping[str, str], director: Director
    ) -> None:
        self._model = model
        self._args = args
        self._environment = environment
        self._director = director
        self.published: Route | None = None
        self._refused: str | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def route(self) -> Route:
        """The route as it is published.

        Raises:
            RuntimeError: `start` has not found one yet.
        """
        if self.published is None:
            raise RuntimeError("the model has no route yet")
        return self.published

    async def start(self) -> None:
        """Load the model, or take over what a director before this one has loaded.

        Raises:
            UserError: the model cannot be found, trusted, loaded or run.
        """
        target = await asyncio.to_thread(Target.of, self._model, self._args)
        left = await asyncio.to_thread(applications.running, _family(target.id))
        working = sorted(app for app, found in left.items() if applications.healthy(found))
        same = [app for app in working if _base_of(app) == target.base]
        taken = (same or working)[-1:]
        version = await _about(taken[0], target.registered) if taken else await self._bring_up(target)
        await self._publish(Route(target.id, self._model.model, version))
        for app in left.keys() - taken:
            self._retire(app)

    async def run(self) -> None:
        """Follow the reference: for ever, if it is an alias; any other stands for the same thing always."""
        trouble = None
        while True:
            await asyncio.sleep(self._args.poll_s)
            try:
                await self._follow()
                trouble = None
                if not versions.is_alias(self._model.model):
                    return
            except Exception as error:
                if trouble != (trouble := logs.describe(error)):
                    logger.error("%s cannot be followed at the moment: %s", self._model.model, trouble)

    async def _follow(self) -> None:
        target = await asyncio.to_thread(Target.of, self._model, self._args)
        if target.is_loaded_as(self.route.stable):
            self._refused = None
        elif target.base != self._refused:
            await self._move_to(target)

    async def look_at_health(self, loaded: Mapping[str, Any]) -> None:
        """Publish whether the replicas work, where that has changed. `loaded`: Serve's applications."""
        stable = self._seen(self.route.stable, loaded)
        canary = self._seen(self.route.canary, loaded) if self.route.canary else None
        route = replace(self.route, stable=stable, canary=canary)
        if route != self.route:
            await self._publish(route)

    def _seen(self, version: Version, loaded: Mapping[str, Any]) -> Version:
        works = applications.healthy(loaded.get(version.app)) and not self._director.down(version.app)
        return replace(version, healthy=works)

    async def _move_to(self, target: Target) -> None:
        """Load the target beside what is served, and let it take over if it proves itself."""
        await self._publish(replace(self.route, loading=target.version))
        try:
            version = await self._bring_up(target)
            if self._args.canary.percent:
                await self._try_as_canary(version, target)
        except HeliostatError as error:
            await self._reject(target, str(error))
            return
        old = self.route.stable
        await self._publish(replace(self.route, stable=version, canary=None, percent=0, loading=None))
        logger.info("%s is served by version %s now", self.route.id, version.name)
        self._retire(old.app)

    async def _bring_up(self, target: Target) -> Version:
        """Load a version and let it prove itself; what fails is removed again.

        Raises:
            HeliostatError: it cannot be loaded or run, or does not give what `generate()` gives.
        """
        app = await asyncio.to_thread(_new_name, target.base)
        try:
            async with asyncio.timeout(self._args.startup_timeout_s):
                return await self._load(target, app)
        except BaseException as error:
            await asyncio.to_thread(applications.delete, app)
            if isinstance(error, TimeoutError):
                raise self._too_slow() from error
            raise

    async def _load(self, target: Target, app: str) -> Version:
        director = serve.get_deployment_handle(DIRECTOR, APPLICATION)
        version = application(
            target.reference, target.id, target.version or "", self._args, self._environment, director
        )
        await asyncio.to_thread(applications.run, version, app, None, logs.logging_config())
        try:
            wrong: str | None = await serve.get_deployment_handle(REPLICA, app).check.remote()
            if wrong is not None:
                raise GateRefused(wrong)
            return await _about(app, target.registered)
        except (RayError, RayServeException) as error:
            raise GateRefused(f"its replica was lost while it was checked ({type(error).__name__})") from error

    def _too_slow(self) -> ResourceError:
        return ResourceError(
            f"it was not loaded within serving.startup_timeout_s={self._args.startup_timeout_s:g}: the cluster may "
            f"have no room for {self._args.num_cpus:g} CPU and {self._args.num_gpus:g} GPU beside what is served"
        )

    async def _try_as_canary(self, version: Version, target: Target) -> None:
        """Give the version a share of the traffic for a while.

        Raises:
            GateRefused: too many requests failed, or the alias moved on meanwhile.
        """
        canary = self._args.canary
        before = self._director.outcomes(version.app)
        await self._publish(replace(self.route, canary=version, percent=canary.percent, loading=None))
        started = asked = time.monotonic()
        while not _proved(canary, before, self._director.outcomes(version.app), time.monotonic() - started):
            await asyncio.sleep(_LOOK_S)
            if self.route.canary is not None and not self.route.canary.healthy:
                raise GateRefused("its replicas failed while it was a canary")
            if time.monotonic() - asked > self._args.poll_s:
                asked = time.monotonic()
                await self._still_wanted(target)

    async def _still_wanted(self, target: Target) -> None:
        with contextlib.suppress(RegistryError):  # a registry that is away says nothing against the canary
            now = await asyncio.to_thread(Target.of, self._model, self._args)
            if now.base != target.base:
                raise GateRefused("the alias moved on while it was a canary")

    async def _reject(self, target: Target, reason: str) -> None:
        self._refused = target.base
        self._director.rejected(self.route.id, target.version, reason)
        canary = self.route.canary
        rejected = (*self.route.rejected, (target.version or "", reason))[-KEPT_REJECTIONS:]
        await self._publish(replace(self.route, canary=None, percent=0, loading=None, rejected=rejected))
        if canary is not None:
            self._retire(canary.app)

    def _retire(self, app: str) -> None:
        """Remove a version once no gateway sends it anything more; what it works on is finished first.

        In the background: a long answer must not hold up the way back to the version before.
        """

        async def retire() -> None:
            await self._director.known()
            await asyncio.to_thread(applications.delete, app)

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _publish(self, route: Route) -> None:
        self.published = route
        await self._director.publish(route)


def _proved(canary: CanaryArgs, before: tuple[int, int], now: tuple[int, int], seconds: float) -> bool:
    """Whether a canary that has had traffic for `seconds` may take over. Counts are (requests, failed ones).

    Raises:
        GateRefused: too many requests failed.
    """
    requests, failed = now[0] - before[0], now[1] - before[1]
    if failed > canary.max_error_rate * max(requests, canary.min_requests):
        raise GateRefused(f"{failed} of {requests} requests failed while it was a canary")
    return seconds >= canary.duration_s and requests >= canary.min_requests


def _new_name(base: str) -> str:
    """A name that no application has, not even one that is being drained."""
    taken = applications.running(f"{base}_")
    return next(name for number in itertools.count(1) if (name := f"{base}_{number}") not in taken)


async def _about(app: str, registered: str | None) -> Version:
    """What is known of a loaded version; its scores and tags come from the registry, if it is there."""
    about: dict[str, Any] = await serve.get_deployment_handle(REPLICA, app).about.remote()
    number = app.split("_")[-3]
    version = Version(app, None if number == _UNVERSIONED else number, int(time.time()), **about)
    if registered is None or version.name is None:
        return version
    try:
        found = await asyncio.to_thread(versions.get_version, registered, version.name)
    except RegistryError as error:  # it works all the same
        logger.warning("what the registry knows of %s is not shown: %s", app, error)
        return version
    tags = {key: value for key, value in found.tags.items() if not key.startswith(_EVALUATION_TAGS)}
    return replace(version, metrics=versions.evaluation(found), tags=tags)


def _states(route: Route) -> dict[str, VersionState]:
    """Version -> its state, for metrics."""
    states: dict[str, VersionState] = {version: "rejected" for version, _ in route.rejected}
    if route.loading:
        states[route.loading] = "loading"
    if route.canary is not None:
        states[route.canary.name or ""] = "canary"
    return {**states, route.stable.name or "": "ready"}


def _shares(before: Route | None, now: Route) -> dict[str, float]:
    """Version -> its share of the requests as a canary; 0 for one that is none any more."""
    gone = {before.canary.name or "": 0.0} if before and before.canary else {}
    return gone | ({now.canary.name or "": now.percent} if now.canary else {})
