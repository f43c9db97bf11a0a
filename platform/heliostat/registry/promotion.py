"""Promotion: the champion changes only through gates, or back to one that was. Knows no metric's meaning.

What was decided is decided against the newest entry of the promotion log (`registry/audit.py`): where another process
promotes at the same moment, one of the two comes second, and passes the gates again, against the new champion.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from heliostat.errors import GateRefused, HeliostatError, RegistryError
from heliostat.registry import versions
from heliostat.registry.audit import Entry, PromotionLog, back_off
from heliostat.registry.config import Gate
from heliostat.registry.versions import ModelVersion

CHALLENGER = "challenger"


@dataclass(frozen=True)
class Comparison:
    """A gate that was passed."""

    metric: str
    score: float
    previous_score: float | None
    """The champion's; None if there was none."""


@dataclass(frozen=True)
class Promotion:
    """A promotion or rollback that took place."""

    name: str
    version: str
    previous: str | None
    """The version that was champion before; the same one if nothing had to change; None if there was none."""
    scores: tuple[Comparison, ...] = ()


def promote(
    name: str,
    version: str | None = None,
    *,
    verify: Callable[[Path], None],
    gates: Sequence[Gate] = (),
    reason: str = "",
    config: str = "CONFIG",
) -> Promotion:
    """Make the version (default: the challenger) the champion, if it passes all gates.

    Args:
        verify: raises a HeliostatError if the bundle in the folder must not be served. Called last: it may take long.
        gates: scores that must be recorded (`versions.log_evaluation`) for the version and the champion, measured on
            the same data, and be no worse than the champion's by more than the tolerance. Without a champion the
            version's only have to be recorded.
        config: the experiment's file, for the commands that messages tell.

    Raises:
        GateRefused: a gate said no; the message holds both scores. Nothing has changed then.
        RegistryError: there is no such model, version or alias, or the store failed.
    """
    candidate = versions.get_version(name, version) if version else versions.version_of_alias(name, CHALLENGER)
    log = PromotionLog.open(name)
    _compare(candidate, _existing(name, log.settle().champion), gates, config)
    _verify(candidate, verify)
    for lost in count():
        back_off(lost)
        history = log.read()
        champion = history.champion
        scores = _compare(candidate, _existing(name, champion), gates, config)
        if champion == candidate.version:
            log.settle()
            break
        if number := log.append(history, _entry(candidate, champion, scores, reason)):
            log.finish(number)
            break
    return Promotion(name, candidate.version, champion, scores)


def rollback(name: str, reason: str = "", *, verify: Callable[[Path], None]) -> Promotion:
    """Make the champion the one that was before it.

    Rolling back again goes one further; a promotion in between is gone back over in its turn.

    Raises:
        GateRefused: there is none before it, its bundle must not be served, or the champion changed meanwhile.
        RegistryError: there is no such model, the version was deleted, or the store failed.
    """
    log = PromotionLog.open(name)
    history = log.settle()
    if len(history.champions) < 2:
        held = f"version {history.champion} is its first champion" if history.champion else "it has no champion"
        raise GateRefused(f"`{name}` cannot be rolled back: {held}; promote another version instead")
    *_, previous, champion = history.champions
    former = versions.find_version(name, previous)
    if former is None:
        raise RegistryError(
            f"`{name}` cannot be rolled back: the champion before, version {previous}, was deleted; "
            f"promote another one with `heliostat promote {name} --version N`"
        )
    _verify(former, verify)
    for lost in count():
        back_off(lost)
        history = log.read()
        if history.champion != champion:
            raise GateRefused(
                f"`{name}` is not rolled back: its champion was version {champion}, and became version "
                f"{history.champion} meanwhile; look whether that one is what you want"
            )
        if number := log.append(history, Entry("rollback", champion, previous, reason=reason)):
            log.finish(number)
            break
    return Promotion(name, previous, champion)


def _entry(candidate: ModelVersion, champion: str | None, scores: Sequence[Comparison], reason: str) -> Entry:
    return Entry(
        "promote",
        champion,
        candidate.version,
        reason=reason,
        metrics={passed.metric: passed.score for passed in scores},
        previous_metrics={p.metric: p.previous_score for p in scores if p.previous_score is not None},
    )


def _existing(name: str, champion: str | None) -> ModelVersion | None:
    """The champion; None where there is none, or it was deleted."""
    return versions.find_version(name, champion) if champion else None


def _verify(candidate: ModelVersion, verify: Callable[[Path], None]) -> None:
    folder = Path(versions.resolve(candidate.uri).path)
    try:
        verify(folder)
    except HeliostatError as error:
        raise GateRefused(f"{candidate.uri} is not made champion: {error}") from error


def _compare(
    candidate: ModelVersion, champion: ModelVersion | None, gates: Sequence[Gate], config: str
) -> tuple[Comparison, ...]:
    return tuple(_pass(candidate, champion, gate, config) for gate in gates)


def _pass(candidate: ModelVersion, champion: ModelVersion | None, gate: Gate, config: str) -> Comparison:
    score = _score(candidate, gate.metric, config)
    if champion is None:
        return Comparison(gate.metric, score, None)
    previous = _score(champion, gate.metric, config)
    _refuse_other_data(candidate, champion, gate.metric, config)
    gain = score - previous if gate.mode == "max" else previous - score
    if gain < -gate.tolerance and not math.isclose(gain, -gate.tolerance):
        wanted = "at least" if gate.mode == "max" else "at most"
        raise GateRefused(
            f"{candidate.uri} is not promoted: its {gate.metric} is {score:g}, the champion's (version "
            f"{champion.version}) is {previous:g}; wanted is {wanted} that, with a tolerance of {gate.tolerance:g}"
        )
    return Comparison(gate.metric, score, previous)


def _score(version: ModelVersion, metric: str, config: str) -> float:
    scores = versions.evaluation(version)
    if metric not in scores:
        known = ", ".join(sorted(scores)) or "none"
        raise GateRefused(
            f"{version.uri} has no score `{metric}` (recorded: {known}); evaluate it on the same test split as the "
            f"other with `heliostat evaluate {config} --model {version.uri}`, or name another metric"
        )
    return scores[metric]


def _refuse_other_data(candidate: ModelVersion, champion: ModelVersion, metric: str, config: str) -> None:
    if versions.evaluation_data(candidate).get(metric, "") != versions.evaluation_data(champion).get(metric, ""):
        raise GateRefused(
            f"{candidate.uri} is not promoted: its {metric} was measured on other data than the champion's (version "
            f"{champion.version}); evaluate the champion on this data with `heliostat evaluate {config} "
            f"--model {champion.uri}`, then promote again"
        )
