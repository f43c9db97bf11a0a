"""Sources of training rows in one epoch, each as often as its weight says. Knows rows and weights; no files, no tokens.

An epoch has round(weight x rows) rows of each source: every row floor(weight) times, and the rest of them once more,
drawn by the seed. The mixture is made once, before the data is tokenised, so the order of an epoch is still a function
of the seed and the epoch alone, and an epoch is over when each of its rows was seen once.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from heliostat.data.config import TrainSource
from heliostat.data.records import Row
from heliostat.errors import DataError


def mix(rows: Sequence[Row], sources: Sequence[TrainSource], seed: int) -> list[Row]:
    """The rows of an epoch, in an order drawn by the seed, so that the first of them are a mixture too.

    Raises:
        DataError: a weight leaves none of its source's rows.
    """
    chosen = [row for number, source in enumerate(sources) for row in _weighted(rows, number, source, seed)]
    random.Random(seed).shuffle(chosen)
    return chosen


def _weighted(rows: Sequence[Row], number: int, source: TrainSource, seed: int) -> list[Row]:
    own = [row for row in rows if row.source == number]
    wanted = round(source.weight * len(own))
    if not wanted:
        raise DataError(
            f"data.train: the weight {source.weight} leaves none of the {len(own)} training rows of {source.path}; "
            "raise it, or leave the source out"
        )
    times, rest = divmod(wanted, len(own))
    more = sorted(random.Random(f"{seed} {number}").sample(range(len(own)), rest))
    return own * times + [own[index] for index in more]


def counts(rows: Sequence[Row], sources: Sequence[TrainSource]) -> list[dict[str, Any]]:
    """Path, weight and rows in an epoch of each source, for lineage."""
    found = Counter(row.source for row in rows)
    return [
        {"path": source.path, "weight": source.weight, "rows": found[number]} for number, source in enumerate(sources)
    ]
