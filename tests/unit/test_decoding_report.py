"""The report of a decoding search says what was measured, and no more than the numbers allow."""

import io
import json
from dataclasses import replace
from typing import Literal

import pytest
from matplotlib.figure import Figure

from heliostat.evaluation.bootstrap import Interval
from heliostat.tuning import decoding_report
from heliostat.tuning.decoding_report import GREEDY, OWN, Comparison, Entry

SAMPLING = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.123456, "top_p": 0.9}
ENTRIES = [
    Entry(0, GREEDY, {"max_new_tokens": 40, "do_sample": False}, "finished", 128, 0.75, Interval(0.7, 0.8), 7.0, 0.010),
    Entry(1, OWN, SAMPLING, "finished", 128, 0.5, Interval(0.4, 0.6), 9.0, 0.012),
    Entry(2, "", {"num_beams": 4}, "finished", 128, 0.8, Interval(0.75, 0.85), 7.0, 0.030),
    Entry(3, "", {"few_shot": 2}, "stopped", 16, 0.9, Interval(0.6, 1.0), 4.0, 0.02),
    Entry(4, "", {"few_shot": 3}, "stopped", 16, 0.1, Interval(0.0, 0.2), 4.0, 0.02),
    Entry(5, "", {"system_prompt": "a very long system prompt of many words"}, "failed", error="DataError: too long"),
    Entry(6, "", {"top_k": 5}, "stopped"),
]
COMPARISON = Comparison("exact_match", 172, 0.80, 0.75, 0.05, Interval(0.01, 0.09))


def test_labels_are_short_and_say_what_differs() -> None:
    labels = [decoding_report.label(entry) for entry in ENTRIES]
    assert labels[:5] == [
        "greedy", "present defaults: sampling, temperature 0.123, top_p 0.9", "num_beams 4", "few_shot 2", "few_shot 3",
    ]  # fmt: skip
    assert labels[5] == "system_prompt 'a very long system pro…"
    assert len(decoding_report.label(ENTRIES[1], 20)) == 20


@pytest.mark.parametrize(("greater", "order"), [(True, [2, 0, 1, 3, 4]), (False, [1, 0, 2, 4, 3])])
def test_those_that_saw_all_prompts_are_ranked_first(greater: bool, order: list[int]) -> None:
    assert [entry.index for entry in decoding_report.ranking(ENTRIES, greater)] == order


def test_the_table_tells_of_all_settings() -> None:
    text = decoding_report.table(ENTRIES, True, count=2)
    assert text.splitlines() == [
        "  2  finished   0.8000 on  128 prompts    7.0 tokens    30.0 ms  num_beams 4",
        "  0  finished   0.7500 on  128 prompts    7.0 tokens    10.0 ms  greedy",
        "     and 1 more",
        "     1 stopped before its first score",
        "     2 stopped after 16 prompts",
        "  5  failed    system_prompt 'a very long system pro…: DataError: too long",
    ]


def test_rows_are_json_with_nothing_for_what_was_not_measured() -> None:
    rows = [entry.row() for entry in ENTRIES]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert (rows[2]["score"], rows[2]["low"], rows[2]["high"]) == (0.8, 0.75, 0.85)
    assert rows[6]["score"] is None
    assert len({tuple(row) for row in rows}) == 1, "the same keys"


def test_a_gain_above_zero_is_one() -> None:
    text = decoding_report.verdict(COMPARISON, "num_beams 4")
    assert COMPARISON.significant
    assert text == (
        "num_beams 4 is better than greedy decoding: +0.0500 [+0.0100, +0.0900] on 172 held-out prompts "
        "(exact_match 0.8000, greedy decoding 0.7500)"
    )


@pytest.mark.parametrize("low", [0.0, -0.01, float("nan")])
def test_a_gain_that_may_be_chance_is_none(low: float) -> None:
    comparison = replace(COMPARISON, gain=0.004, interval=Interval(low, 0.017))
    assert not comparison.significant
    text = decoding_report.verdict(comparison, "num_beams 4")
    assert text.startswith("the gain of num_beams 4 is not significant: +0.0040 [")
    assert text.endswith("on 172 held-out prompts; greedy decoding is kept")


def test_greedy_decoding_may_win_the_race() -> None:
    text = decoding_report.verdict(COMPARISON, "")
    assert text == (
        "no setting was better than greedy decoding, which is kept: exact_match 0.7500 on 172 held-out prompts"
    )


def texts(figure: Figure) -> str:
    axes = figure.axes[0]
    legend = axes.get_legend()
    found = [
        text.get_text() for text in (*axes.get_yticklabels(), *axes.texts, *(legend.get_texts() if legend else []))
    ]
    return "\n".join([*found, axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")])


def rendered(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=50)
    return buffer.getvalue()


@pytest.mark.parametrize("chosen", [0, 2])
def test_the_figure_of_scores_shows_every_setting_that_has_one(chosen: int) -> None:
    figure = decoding_report.score_figure(
        ENTRIES, "exact_match", greater_is_better=True, chosen=chosen, title="cron: settings"
    )
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [
        "shots 3  (n=16)", "shots 2  (n=16)", "present defaults: sampling, T 0.123, top_p 0.9", "greedy", "beams 4",
    ]  # fmt: skip
    assert "exact_match (higher is better)" in texts(figure)
    assert ("greedy, chosen" in texts(figure)) == (chosen == 0)
    assert rendered(figure).startswith(b"\x89PNG")


def test_a_large_search_shows_the_best_and_greedy() -> None:
    many = [ENTRIES[0]] + [replace(ENTRIES[2], index=index, score=0.8 + index / 1000) for index in range(1, 80)]
    figure = decoding_report.score_figure(many, "bleu", greater_is_better=True, chosen=79, title="")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 41
    assert labels[0] == "greedy"
    assert rendered(figure)


@pytest.mark.parametrize("cost", ["tokens", "seconds"])
def test_the_figure_of_costs_names_the_points_that_matter(cost: Literal["tokens", "seconds"]) -> None:
    figure = decoding_report.cost_figure(ENTRIES, "exact_match", cost=cost, limit=8.0, chosen=2, title="cron")
    assert {"greedy", "num_beams 4 (chosen)", "limit"} <= set(texts(figure).split("\n"))
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines if len(line.get_xdata()) == 1}  # type: ignore[index, arg-type]
    assert points == {(getattr(entry, cost), entry.score) for entry in ENTRIES if entry.prompts}
    assert rendered(figure)
