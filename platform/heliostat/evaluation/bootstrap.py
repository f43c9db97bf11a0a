"""How far a score might be off for the choice of examples: bootstrap intervals. Knows metrics by their statistics only.

Examples are drawn with replacement as often as there are examples (Efron & Tibshirani 1993, "An Introduction to the
Bootstrap", ch. 13: percentile intervals); two systems are compared on the same draws (Koehn 2004, "Statistical
Significance Tests for Machine Translation Evaluation", https://aclanthology.org/W04-3250). A draw is a row of weights,
so all its sums are one matrix product.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from heliostat.evaluation.metrics import Floats, Metric, scored

CHUNK_WEIGHTS = 2_000_000
"""Weights that are held at a time: 16 MB."""


@dataclass(frozen=True)
class Interval:
    """Of a score or a gain; NaN where no example was scored."""

    low: float
    high: float


@dataclass(frozen=True)
class Term:
    """One metric of two systems on the same examples, in a weighted sum that should be large.

    The weight carries the sign: positive where more of the metric is better.
    """

    weight: float
    metric: Metric
    first: Floats
    """Statistics of the first system, [examples, k]."""
    second: Floats


def interval(metric: Metric, statistics: Floats, *, confidence: float, samples: int = 1000, seed: int = 0) -> Interval:
    """Where the metric lies in the middle `confidence` of the draws; `statistics` is [examples, k]."""
    rows = statistics[scored(statistics)]
    values = [metric.combine(weights @ rows) for weights in _draws(len(rows), samples, seed)]
    return _middle(values, confidence)


def paired_gain(
    terms: Sequence[Term], *, confidence: float, samples: int = 1000, seed: int = 0
) -> tuple[float, Interval]:
    """How much larger the weighted sum of the metrics is for the first system than for the second.

    Both systems, and all terms, see the same draws. An example that a term could not score for one of the systems is
    left out for both, in all terms.
    """
    kept = np.logical_and.reduce([scored(term.first) & scored(term.second) for term in terms])
    pairs = [Term(term.weight, term.metric, term.first[kept], term.second[kept]) for term in terms]
    count = int(kept.sum())
    if not count:
        return math.nan, Interval(math.nan, math.nan)
    gain = float(_gains(pairs, np.ones((1, count)))[0])
    return gain, _middle([_gains(pairs, weights) for weights in _draws(count, samples, seed)], confidence)


def _gains(terms: Sequence[Term], weights: Floats) -> Floats:
    """The gain in each draw, [draws]."""
    differences = [
        term.weight * (term.metric.combine(weights @ term.first) - term.metric.combine(weights @ term.second))
        for term in terms
    ]
    return np.asarray(np.sum(differences, axis=0), dtype=np.float64)


def _draws(examples: int, samples: int, seed: int) -> Iterator[Floats]:
    """How often each example is drawn, [draws, examples], until there were `samples` draws."""
    generator = np.random.default_rng(seed)
    size = max(1, CHUNK_WEIGHTS // max(1, examples))
    for start in range(0, samples if examples else 0, size):
        count = min(size, samples - start)
        drawn = generator.integers(examples, size=(count, examples))
        # Each draw has numbers of its own, so that one bincount, which is quicker than `multinomial`, counts them all.
        drawn += examples * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * examples)
        yield counts.reshape(count, examples).astype(np.float64)


def _middle(values: Sequence[Floats], confidence: float) -> Interval:
    if not values:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(np.concatenate(values), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
