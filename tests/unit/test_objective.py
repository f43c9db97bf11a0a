"""A weighted sum of metrics is a metric: for all examples, for some of them, and for none that one could not score."""

import numpy as np
import pytest

from heliostat.errors import ConfigError
from heliostat.evaluation import bootstrap, metrics
from heliostat.evaluation.metrics import Example
from heliostat.tuning import objective

EXAMPLES = [
    Example("a", "red house", "red house", 2),
    Example("b", "the the the the the the", "big market", 6),
    Example("c", "old cat", "old dog", 2),
    Example("d", "river bank", "river", 2),
]
REFERENCES = [example.reference for example in EXAMPLES]
GOAL = {"chrf": 0.01, "repetition": -0.5, "macro_f1": 1.0}


def build(goal: objective.Goal) -> metrics.Metric:
    return objective.build(goal, labels=None, judge=None, references=REFERENCES)


def test_a_single_metric_is_itself() -> None:
    found = build("repetition")
    assert (found.name, found.greater_is_better) == ("repetition", False)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_weighted_sum_is_the_sum_of_the_scores(count: int) -> None:
    examples = EXAMPLES[:count]
    whole = build(GOAL)
    expected = sum(
        weight * metrics.score(build(name), build(name).statistics(examples)) for name, weight in GOAL.items()
    )
    assert metrics.score(whole, whole.statistics(examples)) == pytest.approx(expected)
    assert whole.greater_is_better
    assert whole.name == "0.01 chrf - 0.5 repetition + 1 macro_f1"


def test_a_weighted_sum_has_bootstrap_intervals() -> None:
    whole = build(GOAL)
    statistics = whole.statistics(EXAMPLES)
    found = bootstrap.interval(whole, statistics, confidence=0.9)
    assert found.low < metrics.score(whole, statistics) < found.high


def test_what_one_metric_cannot_score_counts_for_none() -> None:
    whole = build(GOAL)
    statistics = whole.statistics(EXAMPLES)
    statistics[1, -1] = np.nan
    kept = [EXAMPLES[0], EXAMPLES[2], EXAMPLES[3]]
    assert metrics.score(whole, statistics) == pytest.approx(metrics.score(whole, whole.statistics(kept)))


def test_mistakes_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"tune_decoding\.metric: there is no metric `exact_mach`; did you mean `exact_"
    ):
        build("exact_mach")
    with pytest.raises(ConfigError, match="there is no metric `zzz`; there are exact_match, "):
        build({"chrf": 1.0, "zzz": 1.0})
    with pytest.raises(ConfigError, match="names no metric"):
        build({})
