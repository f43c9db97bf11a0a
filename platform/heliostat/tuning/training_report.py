"""Figures and the table of a training search. Knows outcomes of trials, and nothing of where the figures go."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heliostat.tuning.search import State
from heliostat.tuning.space import Point

_STATE_COLOURS = {"finished": "#4C78A8", "stopped": "#BAB0AC", "failed": "#E45756"}
_BEST = "#54A24B"


@dataclass(frozen=True)
class Trial:
    """What a trial reached."""

    index: int
    point: Point
    state: State
    value: float
    """The best value of the metric; NaN if there is none."""
    curve: tuple[tuple[float, float], ...]
    """(percent of the steps, value of the metric)."""
    steps: int
    seconds: float
    error: str | None = None


def table(trials: Sequence[Trial], best: Trial, metric: str) -> str:
    """The trials, best first, as lines of text: values, metric, how they ended; then what it all cost."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.point))
    ranked = sorted(trials, key=lambda trial: (math.isnan(trial.value), abs(trial.value - best.value)))
    lines = [["trial", *keys, metric, "ended"]]
    for trial in ranked:
        values = [shown(trial.point[key]) if key in trial.point else "-" for key in keys]
        lines.append([str(trial.index), *values, f"{trial.value:.4f}", ended(trial)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, cost(trials)])


def cost(trials: Sequence[Trial]) -> str:
    """How much was trained, and how much the early stops saved."""
    counts = {state: sum(trial.state == state for trial in trials) for state in _STATE_COLOURS}
    full = sum(trial.steps / (trial.curve[-1][0] / 100) for trial in trials if trial.curve)
    steps = sum(trial.steps for trial in trials)
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    saved = f" of {full:,.0f} without early stops ({steps / full:.0%})" if full else ""
    return (
        f"{len(trials)} trials ({states}), {steps:,} steps{saved}, {sum(t.seconds for t in trials):.0f} s of training"
    )


def ended(trial: Trial) -> str:
    """How the trial ended, and when it was stopped."""
    if trial.state == "failed":
        return f"failed: {trial.error}"
    return trial.state if trial.state == "finished" or not trial.curve else f"stopped at {trial.curve[-1][0]:.0f}%"


def shown(value: Any) -> str:
    """A value of the space, short."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def curves(trials: Sequence[Trial], best: Trial, metric: str) -> Figure:
    """The metric of every trial over its course; where a line ends early, the trial was stopped."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for trial in sorted((t for t in trials if t.curve), key=lambda t: t.index == best.index):
        is_best = trial.index == best.index
        axes.plot(
            *zip(*trial.curve, strict=True), marker="o", markersize=4, linewidth=2.5 if is_best else 1.2,
            color=_BEST if is_best else _STATE_COLOURS[trial.state],
        )  # fmt: skip
        axes.annotate(str(trial.index), trial.curve[-1], xytext=(5, 0), textcoords="offset points", fontsize=8)
    _finish(axes, "percent of the trial's steps", metric)
    _legend(axes, trials)
    axes.set_title("trial curves", fontsize=13, loc="left", fontweight="bold")
    return figure


def against(trials: Sequence[Trial], best: Trial, metric: str, key: str) -> Figure:
    """The metric against one searched key."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    shown_trials = [t for t in trials if key in t.point and not math.isnan(t.value)]
    positions, labels, log = _scale([t.point[key] for t in shown_trials])
    for trial, x in zip(shown_trials, positions, strict=True):
        is_best = trial.index == best.index
        colour = _BEST if is_best else _STATE_COLOURS[trial.state]
        axes.scatter(x, trial.value, s=160 if is_best else 60, marker="*" if is_best else "o", color=colour, zorder=3)
        axes.annotate(str(trial.index), (x, trial.value), xytext=(6, 4), textcoords="offset points", fontsize=8)
    if log:
        axes.set_xscale("log")
    if labels:
        axes.set_xticks(range(len(labels)), labels)
    _finish(axes, key, metric)
    _legend(axes, trials)
    axes.set_title(f"{metric} against {key}", fontsize=13, loc="left", fontweight="bold")
    return figure


def parallel_coordinates(trials: Sequence[Trial], best: Trial, metric: str) -> Figure:
    """One line per trial through the values of all searched keys, to the metric; coloured by the metric."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.point))
    usable = [t for t in trials if not math.isnan(t.value)]
    figure = Figure(figsize=(2.6 * (len(keys) + 1) + 2, 5.5), layout="constrained")
    axes = figure.subplots()
    columns = [_Column.of([t.point.get(key) for t in usable]) for key in keys] + [_Column.of([t.value for t in usable])]
    order = np.argsort([-abs(t.value - best.value) for t in usable])
    colours = matplotlib.colormaps["viridis_r"](
        np.argsort(np.argsort([abs(t.value - best.value) for t in usable])) / max(1, len(usable) - 1)
    )
    for i in order:
        is_best = usable[i].index == best.index
        heights = [column.heights[i] for column in columns]
        axes.plot(heights, color=_BEST if is_best else colours[i], linewidth=3 if is_best else 1.3, alpha=0.9)
    for x, column in enumerate(columns):
        axes.axvline(x, color="#999999", linewidth=0.8)
        for height, text in column.ticks:
            axes.annotate(text, (x, height), xytext=(4, 2), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(len(columns)), [*(key.rpartition(".")[2] for key in keys), metric], fontsize=10)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(
        "parallel coordinates (the best trial is the thick line)", fontsize=13, loc="left", fontweight="bold"
    )
    return figure


@dataclass(frozen=True)
class _Column:
    """One axis of the parallel coordinates: heights between 0 and 1; -0.08 where a trial has no value."""

    heights: list[float]
    ticks: list[tuple[float, str]]

    @classmethod
    def of(cls, values: Sequence[Any]) -> "_Column":
        given = [value for value in values if value is not None]
        positions, labels, log = _scale(given)
        scaled = np.log(positions) if log else np.asarray(positions, dtype=float)
        low, span = (scaled.min(), np.ptp(scaled) or 1.0) if len(scaled) else (0.0, 1.0)
        heights = iter((scaled - low) / span)
        if labels:
            ticks = [((place - low) / span, label) for place, label in enumerate(labels)]
        else:
            ticks = [(0.0, shown(min(given))), (1.0, shown(max(given)))] if given else []
        return cls([float(next(heights)) if value is not None else -0.08 for value in values], ticks)


def _scale(values: Sequence[Any]) -> tuple[list[float], list[str], bool]:
    """(positions, labels of categories, whether a logarithmic scale suits): numbers as they are, others by category."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = [float(value) for value in values]
        return numbers, [], bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) >= 10
    labels = list(dict.fromkeys(shown(value) for value in values))
    return [float(labels.index(shown(value))) for value in values], labels, False


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, trials: Sequence[Trial]) -> None:
    colours: Mapping[str, str] = {"best": _BEST} | {
        state: colour for state, colour in _STATE_COLOURS.items() if any(trial.state == state for trial in trials)
    }
    for name, colour in colours.items():
        axes.plot([], [], color=colour, marker="o", linestyle="none", label=name)
    axes.legend(fontsize=10, frameon=False)
