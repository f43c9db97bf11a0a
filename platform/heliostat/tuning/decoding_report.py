"""What a decoding search found: a table, a sentence, figures. Knows numbers and names; no model, no MLflow."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from heliostat.evaluation.bootstrap import Interval

GREEDY, OWN = "greedy", "present defaults"
_GREEDY_COLOR, _BEST_COLOR, _COLOR, _STOPPED_COLOR = "#E45756", "#54A24B", "#4C78A8", "#9AA5B1"
_UNKNOWN = Interval(math.nan, math.nan)
_MAX_BARS = 40
_TICK_LENGTH = 64
# In the figure, where labels of settings that differ in their last value must differ too.
_ABBREVIATIONS = {
    "temperature": "T", "repetition_penalty": "rep", "length_penalty": "len", "no_repeat_ngram_size": "ngram",
    "num_beams": "beams", "few_shot": "shots", "system_prompt": "system",
}  # fmt: skip
_TEXT_LENGTH = 24


@dataclass(frozen=True)
class Entry:
    """One setting and what it reached."""

    index: int
    name: str
    """`greedy`, `present defaults`, or empty."""
    settings: Mapping[str, Any]
    """What differs from greedy decoding and no prefix."""
    state: Literal["finished", "stopped", "failed"]
    prompts: int = 0
    """Those it was tried on; where there are none, the values below mean nothing."""
    score: float = math.nan
    interval: Interval = _UNKNOWN
    tokens: float = math.nan
    """Generated per prompt."""
    seconds: float = math.nan
    """Of compute per prompt."""
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """As a row of the search's table; None for what was not measured."""
        values = {
            "score": self.score, "low": self.interval.low, "high": self.interval.high, "tokens": self.tokens,
            "seconds": self.seconds,
        }  # fmt: skip
        return {
            "index": self.index, "name": self.name, "settings": json.dumps(dict(self.settings), ensure_ascii=False),
            "state": self.state, "prompts": self.prompts, "error": self.error,
            **{key: value if math.isfinite(value) else None for key, value in values.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """The winner of the race against greedy decoding, on prompts that neither was chosen by."""

    metric: str
    prompts: int
    score: float
    greedy_score: float
    gain: float
    """Positive where the winner is better."""
    interval: Interval

    @property
    def significant(self) -> bool:
        """Whether all of the gain's interval lies above zero."""
        return self.interval.low > 0


def label(entry: Entry, length: int = 100) -> str:
    """The setting in at most `length` characters; long texts are cut."""
    parts = [
        f"{key} {_short(value)}" for key, value in entry.settings.items() if key not in ("do_sample", "max_new_tokens")
    ]
    if entry.settings.get("do_sample"):
        parts = ["sampling", *parts]
    text = ", ".join(parts)
    whole = f"{entry.name}: {text}" if entry.name and text else entry.name or text or GREEDY
    return whole if len(whole) <= length else f"{whole[: length - 1]}…"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _TEXT_LENGTH else f"{text[: _TEXT_LENGTH - 1]}…"


def line(entry: Entry) -> str:
    """The setting in one line."""
    if entry.state == "failed":
        return f"{entry.index:>3}  failed    {label(entry)}: {entry.error}"
    if not entry.prompts:
        return f"{entry.index:>3}  {entry.state:<8} before its first score  {label(entry)}"
    cost = f"{entry.tokens:6.1f} tokens {1000 * entry.seconds:7.1f} ms"
    return f"{entry.index:>3}  {entry.state:<8} {entry.score:8.4f} on {entry.prompts:>4} prompts {cost}  {label(entry)}"


def table(entries: Sequence[Entry], greater_is_better: bool, count: int = 10) -> str:
    """The best settings, and what became of the others."""
    ranked = ranking(entries, greater_is_better)
    finished = [entry for entry in ranked if entry.state == "finished"]
    stopped: dict[int, int] = {}
    for entry in entries:
        if entry.state == "stopped":
            stopped[entry.prompts] = stopped.get(entry.prompts, 0) + 1
    lines = [line(entry) for entry in finished[:count]]
    lines += [f"     and {len(finished) - count} more"] if len(finished) > count else []
    for prompts, number in sorted(stopped.items()):
        lines.append(f"     {number} stopped {f'after {prompts} prompts' if prompts else 'before its first score'}")
    return "\n".join(lines + [line(entry) for entry in entries if entry.state == "failed"])


def ranking(entries: Sequence[Entry], greater_is_better: bool) -> list[Entry]:
    """Those with a score, the settings that saw all prompts first, each part from best to worst."""
    sign = -1 if greater_is_better else 1
    scored = [entry for entry in entries if entry.prompts]
    return sorted(scored, key=lambda entry: (entry.state != "finished", sign * entry.score, entry.index))


def verdict(comparison: Comparison, winner: str) -> str:
    """What the comparison on the held-out prompts means. `winner` is the setting that won the race; empty: greedy."""
    where = f"on {comparison.prompts} held-out prompts"
    if not winner:
        return (
            f"no setting was better than greedy decoding, which is kept: {comparison.metric} "
            f"{comparison.greedy_score:.4f} {where}"
        )
    gain = f"{comparison.gain:+.4f} [{comparison.interval.low:+.4f}, {comparison.interval.high:+.4f}] {where}"
    if not comparison.significant:
        return f"the gain of {winner} is not significant: {gain}; greedy decoding is kept"
    scores = f"{comparison.metric} {comparison.score:.4f}, greedy decoding {comparison.greedy_score:.4f}"
    return f"{winner} is better than greedy decoding: {gain} ({scores})"


def score_figure(entries: Sequence[Entry], metric: str, *, greater_is_better: bool, chosen: int, title: str) -> Figure:
    """Score by setting with its interval, the best on top. Those that were stopped early are faint."""
    ranked = ranking(entries, greater_is_better)
    shown = ranked[:_MAX_BARS] + [entry for entry in ranked[_MAX_BARS:] if entry.index in (0, chosen)]
    figure = Figure(figsize=(10, 1.6 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, entry in enumerate(reversed(shown)):
        _plot_score(axes, place, entry, chosen)
    greedy = next((entry for entry in shown if entry.index == 0), None)
    if greedy is not None:
        axes.axvline(greedy.score, color=_GREEDY_COLOR, linewidth=1, linestyle="--", alpha=0.6, zorder=0)
    axes.set_yticks(range(len(shown)), [_tick(entry) for entry in reversed(shown)], fontsize=9)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    better = "higher is better" if greater_is_better else "lower is better"
    axes.set_xlabel(f"{metric} ({better})", fontsize=11)
    axes.grid(alpha=0.3, axis="x")
    _finish(axes, title, [entry.state for entry in shown], chosen)
    return figure


def cost_figure(
    entries: Sequence[Entry],
    metric: str,
    *,
    cost: Literal["tokens", "seconds"],
    limit: float | None,
    chosen: int,
    title: str,
) -> Figure:
    """Score against the tokens or seconds per prompt; `limit` is the search's own for them."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    shown = [entry for entry in entries if entry.prompts]
    for entry in shown:
        color, alpha = _look(entry, chosen)
        special = entry.index == 0 or entry.index == chosen or entry.name == OWN
        axes.plot(
            getattr(entry, cost), entry.score, marker="D" if special else "o", markersize=9 if special else 7,
            color=color, alpha=alpha, linestyle="", markeredgecolor="white", zorder=3 if special else 2,
        )  # fmt: skip
    _name_specials(axes, [entry for entry in shown if entry.index in (0, chosen) or entry.name == OWN], cost, chosen)
    if limit is not None:
        axes.axvline(limit, color="black", linewidth=1, linestyle=":")
        axes.annotate(
            "limit", (limit, 1), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points"
        )
    unit = "tokens generated per prompt" if cost == "tokens" else "seconds of compute per prompt"
    axes.set_xlabel(unit, fontsize=11)
    axes.set_ylabel(metric, fontsize=11)
    axes.margins(x=0.08, y=0.1)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    _finish(axes, title, [entry.state for entry in shown], chosen)
    return figure


def _plot_score(axes: Axes, place: int, entry: Entry, chosen: int) -> None:
    color, alpha = _look(entry, chosen)
    axes.plot([entry.interval.low, entry.interval.high], [place, place], color=color, alpha=alpha, linewidth=2)
    special = entry.index in (0, chosen)
    axes.plot(entry.score, place, marker="D" if special else "o", markersize=7, color=color, alpha=alpha)


def _look(entry: Entry, chosen: int) -> tuple[str, float]:
    """(color, alpha)."""
    if entry.index == chosen:
        return _BEST_COLOR, 1.0
    if entry.index == 0:
        return _GREEDY_COLOR, 1.0
    return (_STOPPED_COLOR, 0.6) if entry.state == "stopped" else (_COLOR, 1.0)


def _tick(entry: Entry) -> str:
    text = label(entry, 200)
    for name, short in _ABBREVIATIONS.items():
        text = text.replace(name, short)
    text = text if len(text) <= _TICK_LENGTH else f"{text[: _TICK_LENGTH - 1]}…"
    return f"{text}  (n={entry.prompts})" if entry.state == "stopped" else text


def _name_specials(axes: Axes, entries: Sequence[Entry], cost: str, chosen: int) -> None:
    """Names beside the points that matter; where points lie on each other, below each other."""
    taken: list[tuple[float, float]] = []
    for entry in entries:
        place = (round(getattr(entry, cost), 6), round(entry.score, 6))
        text = f"{label(entry)} (chosen)" if entry.index == chosen else label(entry)
        down = -13 * sum(other == place for other in taken)
        axes.annotate(
            text, (getattr(entry, cost), entry.score), xytext=(9, 6 + down), textcoords="offset points",
            fontsize=9, color=_look(entry, chosen)[0],
        )  # fmt: skip
        taken.append(place)


def _finish(axes: Axes, title: str, states: Sequence[str], chosen: int) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=13, loc="left", fontweight="bold", pad=26)
    marks = [(_BEST_COLOR, "D", "chosen" if chosen else "greedy, chosen")]
    marks += [(_GREEDY_COLOR, "D", GREEDY)] if chosen else []
    marks += [(_COLOR, "o", "all prompts")]
    marks += [(_STOPPED_COLOR, "o", "stopped early")] if "stopped" in states else []
    handles = [Line2D([], [], color=color, marker=mark, linestyle="", label=text) for color, mark, text in marks]
    axes.legend(handles=handles, fontsize=9, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
