"""Figures of trainings and evaluations. Knows their numbers, and nothing of where the figures go."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_TRAIN, _VALIDATION, _RATE, _NORM = "#4C78A8", "#E45756", "#54A24B", "#8E6C8A"
# Labels of a confusion matrix whose numbers still find room.
_MAX_WRITTEN = 20


def loss_curves(
    rows: Sequence[Mapping[str, Any]],
    title: str = "",
    *,
    loss: str = "loss",
    validation_loss: str = "eval_loss",
    learning_rate: str = "learning_rate",
    grad_norm: str = "grad_norm",
) -> Figure:
    """Training and validation loss over the steps; below, the learning rate and the gradient norm where recorded.

    `rows` are those of the journal (`heliostat.journal`): {"step", "metrics": {name: value}}; the keyword arguments
    name the metrics. Where a resumed training repeated a step, its last value counts.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    _plot_losses(upper, *series(rows, loss), *series(rows, validation_loss))
    _plot_scalar(lower, *series(rows, grad_norm), "gradient norm", _NORM, linewidth=0.8)
    _plot_scalar(lower.twinx(), *series(rows, learning_rate), "learning rate", _RATE, linewidth=2)
    upper.spines[["top", "right"]].set_visible(False)
    upper.set_title(title, fontsize=13, loc="left", fontweight="bold")
    lower.set_xlabel("optimizer step", fontsize=11)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def confusion_matrix(labels: Sequence[str], counts: Sequence[Sequence[int]], title: str = "") -> Figure:
    """How often texts of each label (rows) were taken for each label (columns); shades are shares of the row.

    Numbers are written into the squares of up to 20 labels.
    """
    size = min(4 + 0.5 * len(labels), 16)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    matrix = np.asarray(counts)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the label's texts")
    places = range(len(labels))
    axes.set_xticks(places, labels, rotation=45, ha="right")
    axes.set_yticks(places, labels)
    axes.set_xlabel("predicted", fontsize=11)
    axes.set_ylabel("label", fontsize=11)
    axes.set_title(title, fontsize=13, loc="left", fontweight="bold")
    for row, column in itertools.product(places, places) if len(labels) <= _MAX_WRITTEN else ():
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color)
    return figure


def series(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, in the order of the steps, each step once."""
    values = {row["step"]: row["metrics"][metric] for row in rows if metric in row["metrics"]}
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _plot_losses(
    axes: Axes, steps: list[int], losses: list[float], eval_steps: list[int], eval_losses: list[float]
) -> None:
    axes.plot(steps, losses, color=_TRAIN, alpha=0.3, linewidth=1, label="training loss")
    axes.plot(steps, _smooth(losses), color=_TRAIN, linewidth=2, label="training loss, smoothed")
    if eval_losses:
        axes.plot(eval_steps, eval_losses, color=_VALIDATION, marker="o", markersize=5, label="validation loss")
        best = int(np.argmin(eval_losses))
        axes.plot(eval_steps[best], eval_losses[best], marker="*", markersize=15, color=_VALIDATION)
        axes.annotate(
            f"best {eval_losses[best]:.4g}\nstep {eval_steps[best]}",
            (eval_steps[best], eval_losses[best]),
            xytext=(0, 18),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            color=_VALIDATION,
        )
    axes.set_ylabel("loss", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=10, frameon=False)


def _plot_scalar(axes: Axes, steps: list[int], values: list[float], label: str, color: str, linewidth: float) -> None:
    axes.plot(steps, values, color=color, linewidth=linewidth)
    axes.set_ylabel(label, fontsize=11, color=color)
    axes.tick_params(axis="y", labelcolor=color)
    axes.margins(y=0.15)
    axes.grid(alpha=0.3, axis="x")


def _smooth(values: Sequence[float]) -> np.ndarray:
    """A centred moving average over about a twentieth of the run; its window shrinks at both ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    smoothed: np.ndarray = (sums[last] - sums[first]) / np.maximum(last - first, 1)
    return smoothed
