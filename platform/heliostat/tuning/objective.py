"""What a decoding search optimises: one metric, or a weighted sum of metrics. Knows metrics by their statistics only.

A single metric is made large or small as it says itself (`greater_is_better`). A weighted sum is always made large: the
weight of a metric that should be small is negative, by the user's own hand.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from heliostat.config import nearest
from heliostat.errors import ConfigError
from heliostat.evaluation import metrics
from heliostat.evaluation.config import JudgeConfig, MetricName
from heliostat.evaluation.metrics import Example, Floats, Metric

Goal = str | Mapping[str, float]
"""A metric's name, or metric -> weight."""


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of metrics, itself a metric: its statistics are theirs, side by side."""

    metrics: tuple[Metric, ...]
    weights: tuple[float, ...]
    widths: tuple[int, ...]
    """Number of statistics of each metric."""
    greater_is_better: bool = True

    @property
    def name(self) -> str:
        """Such as `0.7 rougeL - 0.3 repetition`."""
        terms = [f"{weight:+g} {metric.name}" for weight, metric in zip(self.weights, self.metrics, strict=True)]
        return " ".join(terms).removeprefix("+").replace(" -", " - ").replace(" +", " + ")

    def statistics(self, examples: Sequence[Example]) -> Floats:
        """[examples, sum of the widths]; NaN in the columns of a metric that could not score an example."""
        return np.concatenate([metric.statistics(examples) for metric in self.metrics], axis=1)

    def combine(self, sums: Floats) -> Floats:
        """The weighted sum of what each metric makes of its columns."""
        parts = np.split(sums, np.cumsum(self.widths)[:-1], axis=-1)
        scores = [m.combine(part) for m, part in zip(self.metrics, parts, strict=True)]
        return np.asarray(sum(w * score for w, score in zip(self.weights, scores, strict=True)), dtype=np.float64)


def build(goal: Goal, *, labels: Sequence[str] | None, judge: JudgeConfig | None, references: Sequence[str]) -> Metric:
    """The objective as a metric; `labels`, `judge` and `references` are those of `metrics.build`.

    Raises:
        ConfigError: an unknown metric (the nearest is named), no metric, or one whose settings are missing.
    """
    names = [goal] if isinstance(goal, str) else list(goal)
    check(names)
    found = metrics.build(names, labels=labels, judge=judge, references=references)
    if isinstance(goal, str):
        return found[0]
    return Weighted(tuple(found), tuple(goal.values()), tuple(_width(metric, references[0]) for metric in found))


def check(names: Sequence[str]) -> None:
    """Raises:
    ConfigError: there is no metric, or one of them is unknown.
    """
    known = typing.get_args(MetricName)
    if not names:
        raise ConfigError("tune_decoding.metric: names no metric; write a name, or {metric: weight, ...}")
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean `{near}`?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"tune_decoding.metric: there is no metric `{name}`; {hint}")


def _width(metric: Metric, reference: str) -> int:
    """Number of the metric's statistics."""
    if metric.name == "judge":
        return 2  # known without asking it
    return int(metric.statistics([Example("", reference, reference, 0)]).shape[1])
