"""Metrics over predictions and references, and over token losses. Knows nothing of models."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence


def normalise(text: str) -> str:
    """What exact match ignores: surrounding white space and runs of white space. Case and punctuation count."""
    return " ".join(text.split())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Part of the predictions that equal their reference after `normalise`."""
    pairs = zip(predictions, references, strict=True)
    return mean([float(normalise(p) == normalise(r)) for p, r in pairs])


def exact_match_by_group(
    predictions: Sequence[str], references: Sequence[str], groups: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Exact match and number of examples of each group, by group name."""
    members: Mapping[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return {
        group: {
            "exact_match": exact_match([predictions[i] for i in indices], [references[i] for i in indices]),
            "n": len(indices),
        }
        for group, indices in sorted(members.items())
    }


def perplexity(loss: float) -> float:
    """exp of a mean next-token loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def mean(values: Sequence[float]) -> float:
    """The average; 0 for none."""
    return sum(values) / len(values) if values else 0.0
