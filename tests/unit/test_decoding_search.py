"""Who wins the race: the best of those that came to the end and keep to the limits."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import pytest

from heliostat.errors import HeliostatError
from heliostat.tuning import decoding_search
from heliostat.tuning.search import Outcome


def outcome(
    index: int, score: float, state: Literal["finished", "stopped", "failed"] = "finished", tokens: float = 10.0,
    seconds: float = 1.0, error: str | None = None,
) -> Outcome:  # fmt: skip
    reports = [{"score": 0.0, "tokens": 1.0, "seconds": 0.1}, {"score": score, "tokens": tokens, "seconds": seconds}]
    return Outcome(index, {}, reports, state, error)


def select(
    outcomes: list[Outcome], constraints: Mapping[str, float] = MappingProxyType({}), greater_is_better: bool = True
) -> int | None:
    found = decoding_search.select(outcomes, constraints, greater_is_better=greater_is_better)
    return found.index if found else None


def test_the_best_last_score_wins() -> None:
    outcomes = [outcome(0, 0.5), outcome(1, 0.7), outcome(2, 0.6)]
    assert select(outcomes) == 1
    assert select(outcomes, greater_is_better=False) == 0


def test_of_equals_the_earliest_wins_so_greedy_is_not_replaced_for_nothing() -> None:
    assert select([outcome(0, 0.7), outcome(1, 0.7), outcome(2, 0.7)]) == 0
    assert select([outcome(0, 0.7), outcome(1, 0.7)], greater_is_better=False) == 0


def test_those_that_did_not_see_all_prompts_cannot_win() -> None:
    assert select([outcome(0, 0.5), outcome(1, 0.9, "stopped"), outcome(2, 0.9, "failed")]) == 0
    assert select([outcome(1, 0.9, "stopped")]) is None


@pytest.mark.parametrize(
    ("constraints", "expected"),
    [({}, 1), ({"tokens": 10}, 2), ({"seconds": 2.5}, 1), ({"tokens": 10, "seconds": 2.5}, 0), ({"tokens": 1}, None)],
)
def test_limits_are_kept(constraints: dict[str, float], expected: int | None) -> None:
    outcomes = [outcome(0, 0.5), outcome(1, 0.9, tokens=11), outcome(2, 0.8, seconds=3)]
    assert select(outcomes, constraints) == expected


def test_a_search_in_which_all_fails_tells_the_first_reason() -> None:
    first = outcome(0, 0.5, "failed", error="ValueError: no")
    with pytest.raises(HeliostatError, match="all 2 settings failed; the first: ValueError: no"):
        decoding_search._check([first, outcome(1, 0.5, "failed", error="other")])
    with pytest.raises(HeliostatError, match=r"greedy decoding failed, .*: ValueError: no"):
        decoding_search._check([first, outcome(1, 0.5)])
    decoding_search._check([outcome(0, 0.5), outcome(1, 0.5, "failed")])


@pytest.mark.parametrize("version", ["7", None])
def test_the_text_says_where_the_settings_are(version: str | None) -> None:
    result: dict[str, Any] = {
        "model_uri": version and f"models:/m/{version}", "bundle": None, "table": "T", "verdict": "V", "settings": {},
    }  # fmt: skip
    expected = "models:/m/7 has the chosen settings" if version else "no new version"
    assert expected in decoding_search.show(result)
