"""Promotion: the alias `champion` moves only through gates, and leaves a record. Knows no metric's meaning."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from heliostat.errors import GateRefused, HeliostatError
from heliostat.registry import store, versions
from heliostat.registry.versions import ModelVersion

CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS_CHAMPION = "previous_champion"


@dataclass(frozen=True)
class Promotion:
    """A promotion that took place."""

    name: str
    version: str
    previous: str | None
    """The version that was champion before; the same one if nothing had to move; None if there was none."""
    metric: str | None = None
    score: float | None = None
    previous_score: float | None = None


def promote(
    name: str,
    version: str | None = None,
    *,
    verify: Callable[[Path], None],
    metric: str | None = None,
    greater_is_better: bool = True,
    tolerance: float = 0.0,
    reason: str = "",
) -> Promotion:
    """Make the version (default: the challenger) the champion, if it passes all gates.

    Args:
        verify: raises a HeliostatError if the bundle in the folder must not be served.
        metric: score that must be recorded (`versions.log_evaluation`) for the version and the champion, and must not
            be worse than the champion's by more than `tolerance`. Without a champion it only has to be recorded.

    Raises:
        GateRefused: a gate said no; the message holds both scores. Nothing has changed then.
        RegistryError: there is no such model, version or alias, or the store failed.
    """
    candidate = versions.get_version(name, version) if version else versions.version_of_alias(name, CHALLENGER)
    champion_version = versions.aliases(name).get(CHAMPION)
    champion = versions.get_version(name, champion_version) if champion_version else None
    _verify(candidate, verify)
    score = previous_score = None
    if metric is not None:
        score = _score(candidate, metric)
        previous_score = _score(champion, metric) if champion else None
        _compare(candidate, champion, metric, score, previous_score, greater_is_better, tolerance)
    if champion is None or champion.version != candidate.version:
        _move(candidate, champion, reason)
    return Promotion(name, candidate.version, champion_version, metric, score, previous_score)


def _verify(candidate: ModelVersion, verify: Callable[[Path], None]) -> None:
    folder = Path(versions.resolve(candidate.uri).path)
    try:
        verify(folder)
    except HeliostatError as error:
        raise GateRefused(f"{candidate.uri} is not promoted: {error}") from error


def _score(version: ModelVersion, metric: str) -> float:
    scores = versions.evaluation(version)
    if metric not in scores:
        known = ", ".join(sorted(scores)) or "none"
        raise GateRefused(
            f"{version.uri} has no score `{metric}` (recorded: {known}); evaluate it with "
            f"`heliostat evaluate` on the same test split as the other, or name another metric"
        )
    return scores[metric]


def _compare(
    candidate: ModelVersion,
    champion: ModelVersion | None,
    metric: str,
    score: float,
    previous_score: float | None,
    greater_is_better: bool,
    tolerance: float,
) -> None:
    if champion is None or previous_score is None:
        return
    gain = score - previous_score if greater_is_better else previous_score - score
    if gain < -tolerance and not math.isclose(gain, -tolerance):
        wanted = "at least" if greater_is_better else "at most"
        raise GateRefused(
            f"{candidate.uri} is not promoted: its {metric} is {score:g}, the champion's (version {champion.version}) "
            f"is {previous_score:g}; wanted is {wanted} that, with a tolerance of {tolerance:g}"
        )


def _move(candidate: ModelVersion, champion: ModelVersion | None, reason: str) -> None:
    """Write the record, then move the aliases: a champion without a record cannot be."""
    record = {
        "promoted_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "promoted_from": champion.version if champion else "",
        "promoted_by": store.user(),
        "promotion_reason": reason,
    }
    versions.set_tags(candidate.name, candidate.version, record)
    if champion is not None:
        versions.set_alias(candidate.name, PREVIOUS_CHAMPION, champion.version)
    versions.set_alias(candidate.name, CHAMPION, candidate.version)
