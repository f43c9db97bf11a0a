"""Intervals that theory knows, pairs that share their draws, and rows without a score."""

import math

import numpy as np
import pytest

from heliostat.evaluation import bootstrap, metrics
from heliostat.evaluation.bootstrap import Interval, Term
from heliostat.evaluation.metrics import Example, Floats, Metric

(MATCH,) = metrics.build(["exact_match"])
(BLEU,) = metrics.build(["bleu"])


def matches(*hits: float) -> Floats:
    return np.array([(hit, 1.0) if not math.isnan(hit) else (math.nan, math.nan) for hit in hits])


def random_matches(size: int, share: float, seed: int = 0) -> Floats:
    return matches(*(np.random.default_rng(seed).random(size) < share).astype(float))


def test_the_interval_of_a_share_is_the_normal_one() -> None:
    statistics = random_matches(2000, 0.3)
    share = metrics.score(MATCH, statistics)
    for confidence, deviations in ((0.95, 1.96), (0.8, 1.2816)):
        found = bootstrap.interval(MATCH, statistics, confidence=confidence)
        half = deviations * math.sqrt(share * (1 - share) / 2000)
        assert found.low == pytest.approx(share - half, abs=0.15 * half)
        assert found.high == pytest.approx(share + half, abs=0.15 * half)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    intervals = [bootstrap.interval(MATCH, random_matches(200, 0.5, seed), confidence=0.8) for seed in range(100)]
    covered = sum(found.low <= 0.5 <= found.high for found in intervals)
    assert 68 <= covered <= 92


def test_seeds_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = random_matches(300, 0.4)

    def found(seed: int) -> Interval:
        return bootstrap.interval(MATCH, statistics, confidence=0.9, seed=seed)

    first = found(0)
    assert found(0) == first
    assert len({found(seed) for seed in range(5)}) > 1
    monkeypatch.setattr(bootstrap, "CHUNK_WEIGHTS", 1000)
    assert found(0) == first, "the draws do not depend on how many are held at a time"


def test_metrics_of_a_whole_corpus_are_resampled_as_such() -> None:
    words = ["one two three four five", "six seven eight nine ten", "a b c d e f g"]
    examples = [Example("", words[i % 3] if i % 4 else "one two four five", words[i % 3], 1) for i in range(60)]
    statistics = BLEU.statistics(examples)
    found = bootstrap.interval(BLEU, statistics, confidence=0.95, samples=200)
    assert found.low < metrics.score(BLEU, statistics) < found.high


def test_all_right_leaves_nothing_to_chance() -> None:
    assert bootstrap.interval(MATCH, matches(1, 1, 1), confidence=0.95) == Interval(1.0, 1.0)


def test_rows_without_a_score_are_left_out() -> None:
    with_gaps = matches(1, math.nan, 0, 1, math.nan, 0, 0)
    without = matches(1, 0, 1, 0, 0)
    found = bootstrap.interval(MATCH, with_gaps, confidence=0.9)
    assert found == bootstrap.interval(MATCH, without, confidence=0.9)
    nothing = bootstrap.interval(MATCH, matches(math.nan), confidence=0.9)
    assert math.isnan(nothing.low)
    assert math.isnan(nothing.high)


def gain(first: Floats, second: Floats, weight: float = 1.0, metric: Metric = MATCH) -> tuple[float, Interval]:
    return bootstrap.paired_gain([Term(weight, metric, first, second)], confidence=0.95)


def test_a_gain_is_the_difference_and_its_sign_says_who_is_better() -> None:
    first, second = matches(1, 1, 1, 0), matches(1, 0, 0, 0)
    assert gain(first, second)[0] == 0.5
    assert gain(second, first)[0] == -0.5
    assert gain(second, first, weight=-1.0)[0] == 0.5, "for a metric where less is better"
    forth, back = gain(first, second)[1], gain(second, first)[1]
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))


def test_both_systems_see_the_same_draws() -> None:
    """Unpaired, the spread of a system that is better on one example in 500 would hide the gain's."""
    second = random_matches(500, 0.5)
    first = second.copy()
    first[np.flatnonzero(second[:, 0] == 0)[:20], 0] = 1.0
    difference, found = gain(first, second)
    assert difference == pytest.approx(20 / 500)
    assert 0 < found.low < difference < found.high
    spread = bootstrap.interval(MATCH, first, confidence=0.95)
    assert found.high - found.low < 0.5 * (spread.high - spread.low)
    assert gain(first, first) == (0.0, Interval(0.0, 0.0))


def test_weighted_sums_of_metrics() -> None:
    first, second = random_matches(100, 0.7), random_matches(100, 0.5, seed=1)
    (repetition,) = metrics.build(["repetition"])
    terms = [Term(2.0, MATCH, first, second), Term(-1.0, repetition, second, first)]
    value, found = bootstrap.paired_gain(terms, confidence=0.95)
    alone, interval = gain(first, second)
    assert value == pytest.approx(3 * alone)
    assert (found.low, found.high) == pytest.approx((3 * interval.low, 3 * interval.high)), "all terms share the draws"


def test_a_row_that_one_cannot_score_is_left_out_for_both() -> None:
    first, second = matches(1, math.nan, 0, 1), matches(0, 1, math.nan, 1)
    assert gain(first, second) == gain(matches(1, 1), matches(0, 1))
    value, found = gain(matches(math.nan), matches(1))
    assert math.isnan(value)
    assert math.isnan(found.low)
