"""The promotion log: an append-only list of a model's promotions in MLflow. Knows versions and aliases, no gates.

Entry i is the param `promotion.00000i` of one run. MLflow never changes a param, and its databases hold one value for
each key of a run, so logging the next param is a compare-and-swap: of two processes, on whatever machines, one gets the
place and the other is refused, reads again and decides again. The entries in their order are the truth; the aliases
`champion` and `previous_champion`, the tags of the versions and the run's artifacts `promotions/*.json` follow from
them, and what a killed process left unwritten is written by the next.

This needs a store with a database (sqlite, PostgreSQL, MySQL, a server on one), not MLflow's plain files.
"""

import functools
import json
import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from heliostat.errors import RegistryError
from heliostat.registry import store, versions

CHAMPION = "champion"
PREVIOUS_CHAMPION = "previous_champion"
ARTIFACTS = "promotions"

_RUN_TAG = "heliostat.promotion_log"
_PREFIX = "promotion."
# MLflow's MAX_PARAM_VAL_LENGTH; it would cut what is longer.
_MAX_LENGTH = 6000
# How long the one who wrote an entry has to write its tags and artifact, before others do.
_IN_FLIGHT = timedelta(minutes=1)
# The longest pause after a lost race, times the number of races lost in a row (up to 10).
_PAUSE_S = 0.02
# The pause, in lost races, before the aliases are set for somebody else.
_PATIENCE = 5

Kind = Literal["promote", "rollback", "adopt"]


@dataclass(frozen=True)
class Entry:
    """A change of the champion."""

    kind: Kind
    """adopt: the aliases as they were before there was a log, `previous` being the previous champion's."""
    previous: str | None
    """The champion before."""
    version: str
    """The champion after."""
    who: str = ""
    when: str = ""
    """UTC, ISO 8601."""
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    """The scores that counted."""
    previous_metrics: dict[str, float] = field(default_factory=dict)
    """The same of the champion before."""
    nonce: str = ""
    """Makes every entry another one, even where two processes say the same at the same time."""

    def to_json(self) -> str:
        """The entry as MLflow keeps it; a reason that is too long for MLflow is cut.

        Raises:
            RegistryError: it is too long even without its reason.
        """
        cut = 0
        while excess := max(0, len(text := self._shortened(cut)) - _MAX_LENGTH):
            if cut >= len(self.reason):
                raise RegistryError(
                    f"the promotion's record is {excess} characters too long for MLflow; use fewer metrics"
                )
            cut += max(2, excess // 2)  # a character takes up to six in JSON
        return text

    def _shortened(self, cut: int) -> str:
        reason = f"{self.reason[:-cut]}…" if cut else self.reason
        return json.dumps({**asdict(self), "reason": reason}, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class History:
    """The log as it was at one moment."""

    entries: tuple[Entry, ...]
    adopted: Entry | None = None
    """What the aliases say while there are no entries."""

    @property
    def champions(self) -> tuple[str, ...]:
        """The versions to go back to, the champion last: a promotion adds one, a rollback takes one away."""
        stack: list[str] = []
        for entry in self.entries or filter(None, (self.adopted,)):
            if entry.kind == "adopt":
                stack = [version for version in (entry.previous, entry.version) if version]
            elif entry.kind == "promote":
                stack.append(entry.version)
            else:
                stack.pop()
        return tuple(stack)

    @property
    def champion(self) -> str | None:
        """The version that is champion."""
        return self.champions[-1] if self.champions else None

    @property
    def aliases(self) -> dict[str, str | None]:
        """What the aliases must be; None: there is none."""
        padded = (None, None, *self.champions)
        return {CHAMPION: padded[-1], PREVIOUS_CHAMPION: padded[-2]}


class PromotionLog:
    """The log of one registered model."""

    def __init__(self, name: str, run_id: str) -> None:
        self.name = name
        self.run_id = run_id

    @classmethod
    def open(cls, name: str) -> Self:
        """The model's log, which is created if there is none.

        Its run is alone in an experiment named after the model and the moment of its creation: a model that is deleted
        and made anew starts a log of its own. Experiment names are unique. The experiment is made under another name
        and renamed when the run is in it, so every process finds the whole or nothing, and the same.

        Raises:
            RegistryError: there is no such model, its log was deleted, or the store failed.
        """
        since = versions.created_at(name).isoformat(timespec="milliseconds")
        title = f"promotions of {name} since {since}"
        with store.failures(f"the promotion log of `{name}` cannot be opened"):
            client = store.client()
            experiment = store.attempt(lambda: client.get_experiment_by_name(title))
            if experiment is None:
                experiment = _create(client, name, title)
        if experiment.lifecycle_stage != "active":
            raise RegistryError(
                f"the promotion log of `{name}` was deleted; restore it with "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
            )
        return cls(name, experiment.tags[_RUN_TAG])

    def read(self) -> History:
        """The log as it is now.

        Raises:
            RegistryError: the store failed.
        """
        with store.failures(f"the promotion log of `{self.name}` cannot be read"):
            params = store.attempt(lambda: store.client().get_run(self.run_id)).data.params
        keys = sorted(key for key in params if key.startswith(_PREFIX))
        entries = tuple(Entry(**json.loads(params[key])) for key in keys)
        return History(entries, None if entries else self._adopted())

    def append(self, history: History, entry: Entry) -> int | None:
        """Add the entry behind `history` and return its number; None: another process was quicker, nothing was added.

        Raises:
            RegistryError: the entry is too long, or the store failed.
        """
        number = len(history.entries)
        for new in filter(None, (history.adopted, entry)):
            number += 1
            if not self._write(number, new):
                return None
        return number

    def settle(self) -> History:
        """Make the aliases, and the tags and artifacts of those who were killed, what the log says; return the log.

        Raises:
            RegistryError: the store failed.
        """
        history = self.read()
        if self._wrong(history):
            back_off(_PATIENCE)  # most likely somebody is at it
            if self.read() == history:
                self._align()
        overdue = datetime.now(UTC) - _IN_FLIGHT
        with store.failures(f"the promotion log of `{self.name}` cannot be completed"):
            client = store.client()
            written = {file.path for file in store.attempt(lambda: client.list_artifacts(self.run_id, ARTIFACTS))}
            for number, entry in enumerate(history.entries, 1):
                if _path(number) not in written and datetime.fromisoformat(entry.when) <= overdue:
                    self._publish(history, number)
        return history

    def finish(self, number: int) -> None:
        """Let aliases, tags and artifacts follow the new entry of that number.

        Raises:
            RegistryError: the store failed.
        """
        history = self._align()
        with store.failures(f"the promotion of `{self.name}` cannot be recorded"):
            self._publish(history, number)

    def _adopted(self) -> Entry | None:
        known = versions.aliases(self.name)
        if CHAMPION not in known:
            return None
        return _signed(Entry("adopt", known.get(PREVIOUS_CHAMPION), known[CHAMPION]))

    def _write(self, index: int, entry: Entry) -> bool:
        key, value = f"{_PREFIX}{index:06}", _signed(entry).to_json()
        with store.failures(f"the promotion of `{self.name}` cannot be recorded"):
            client = store.client()
            try:
                store.attempt(lambda: client.log_param(self.run_id, key, value))
            except MlflowException:
                present = store.attempt(lambda: client.get_run(self.run_id)).data.params.get(key)
                if present is None:
                    raise
                return bool(present == value)  # it may have been written although it seemed to fail
        return True

    def _align(self) -> History:
        """Set the aliases and return the log.

        Whoever set an alias looks at the log and the alias once more, and sets it again if the log is newer and nobody
        else has set it. So the last one of all to set it saw the newest entry.
        """
        mine: dict[str, str | None] = {}
        while True:
            history = self.read()
            wrong = self._wrong(history, mine)
            if not wrong:
                return history
            mine = wrong
            with store.failures(f"the aliases of `{self.name}` cannot be set"):
                for alias, version in wrong.items():
                    _set_alias(store.client(), self.name, alias, version)

    def _wrong(self, history: History, mine: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
        """Aliases that are not what the log says, and what it says; of `mine`, only those still as I set them."""
        wanted = history.aliases if history.entries else {}
        current = versions.aliases(self.name)
        wrong = {alias: version for alias, version in wanted.items() if version != current.get(alias)}
        return {a: version for a, version in wrong.items() if not mine or (a in mine and current.get(a) == mine[a])}

    def _publish(self, history: History, number: int) -> None:
        """Write the tags of the entry's version, unless a newer entry has or older ones stay, and last the artifact."""
        client, entry = store.client(), history.entries[number - 1]
        if entry.kind != "adopt" and entry.version not in {newer.version for newer in history.entries[number:]}:
            _tag(client, self.name, entry)
        text = json.dumps(asdict(entry), ensure_ascii=False, indent=2) + "\n"
        store.attempt(lambda: client.log_text(self.run_id, text, _path(number)))


def back_off(lost: int) -> None:
    """Wait a random moment after so many lost races in a row."""
    time.sleep(random.uniform(0, _PAUSE_S * min(lost, 10)))


def _path(number: int) -> str:
    return f"{ARTIFACTS}/{number:06}.json"


def _signed(entry: Entry) -> Entry:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return Entry(**{**asdict(entry), "who": store.user(), "when": now, "nonce": uuid.uuid4().hex})


def _create(client: MlflowClient, name: str, title: str) -> Any:
    """The experiment called `title` with its run, whoever made it."""
    own = store.attempt(lambda: store.create_experiment(f"{title} (new, {uuid.uuid4().hex})"))
    run_id = store.attempt(lambda: client.create_run(own, run_name=f"promotions of {name}")).info.run_id
    # Entries may still be added; it must only not look like work in progress.
    store.attempt(lambda: client.set_terminated(run_id))
    store.attempt(lambda: client.set_experiment_tag(own, _RUN_TAG, run_id))
    store.attempt(lambda: _claim(client, own, title))
    experiment = store.attempt(lambda: client.get_experiment_by_name(title))
    if experiment.experiment_id != own:
        store.attempt(lambda: client.delete_experiment(own))
    return experiment


def _claim(client: MlflowClient, experiment_id: str, title: str) -> None:
    """Give the experiment its name, unless another one has it."""
    try:
        client.rename_experiment(experiment_id, title)
    except MlflowException:
        if client.get_experiment_by_name(title) is None:
            raise


def _set_alias(client: MlflowClient, name: str, alias: str, version: str | None) -> None:
    """Set or delete the alias; a version that was deleted can have none."""
    if version is None:
        store.attempt(lambda: client.delete_registered_model_alias(name, alias))
        return
    try:
        store.attempt(lambda: client.set_registered_model_alias(name, alias, version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _tag(client: MlflowClient, name: str, entry: Entry) -> None:
    tags = {
        "promoted_at": entry.when,
        "promoted_from": entry.previous or "",
        "promoted_by": entry.who,
        "promotion_reason": entry.reason,
    }
    try:
        for key, value in tags.items():
            store.attempt(functools.partial(client.set_model_version_tag, name, entry.version, key, value))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
