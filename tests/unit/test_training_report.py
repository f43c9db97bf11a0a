"""The table and the figures of a training search: nothing left out, whatever the trials came to."""

import math
from io import BytesIO

import pytest
from matplotlib.figure import Figure

from heliostat.tuning import training_report
from heliostat.tuning.training_report import Trial

KEYS = ("training.learning_rate", "adapter.lora_target_modules", "adapter.method")
TRIALS = [
    Trial(0, dict(zip(KEYS, (1e-3, ["q", "v"], "lora"), strict=True)), "finished", 0.5,
          ((20, 0.9), (100, 0.5)), 50, 10.0),
    Trial(1, {KEYS[0]: 1e-5, KEYS[2]: "full"}, "stopped", 2.0, ((20, 2.0),), 10, 2.0),
    Trial(2, dict(zip(KEYS, (3e-4, ["q"], "lora"), strict=True)), "failed", math.nan, (), 0, 0.0,
          "DataError: no rows"),
]  # fmt: skip


def text_of(figure: Figure) -> str:
    figure.savefig(BytesIO(), format="png")
    texts = [t.get_text() for axes in figure.axes for t in [axes.title, *axes.texts, *axes.get_xticklabels()]]
    return " ".join([*texts, *(axes.get_title(loc="left") for axes in figure.axes)])


def test_the_table_ranks_and_says_how_each_trial_ended() -> None:
    lines = training_report.table(TRIALS, TRIALS[0], "eval_loss").splitlines()
    assert lines[0].split() == ["trial", *KEYS, "eval_loss", "ended"]
    assert lines[1].split() == ["0", "0.001", '["q",', '"v"]', "lora", "0.5000", "finished"]
    assert lines[2].split() == ["1", "1e-05", "-", "full", "2.0000", "stopped", "at", "20%"]
    assert lines[3].endswith("nan        failed: DataError: no rows")
    assert lines[4] == "3 trials (1 finished, 1 stopped, 1 failed), 60 steps of 100 without early stops (60%), " \
        "12 s of training"  # fmt: skip


@pytest.mark.parametrize("trials", [TRIALS, TRIALS[:1]], ids=["mixed", "only one"])
def test_figures_show_all_trials(trials: list[Trial]) -> None:
    assert "trial curves" in text_of(training_report.curves(trials, TRIALS[0], "eval_loss"))
    parallel = text_of(training_report.parallel_coordinates(trials, TRIALS[0], "eval_loss"))
    assert all(name in parallel for name in ("learning_rate", "method", "eval_loss", "lora", "0.5"))
    for key in KEYS:
        assert key in text_of(training_report.against(trials, TRIALS[0], "eval_loss", key))


def test_a_wide_range_is_logarithmic_and_categories_keep_their_names() -> None:
    rates = training_report.against(TRIALS, TRIALS[0], "eval_loss", KEYS[0])
    assert rates.axes[0].get_xscale() == "log"
    methods = training_report.against(TRIALS, TRIALS[0], "eval_loss", KEYS[2])
    assert [label.get_text() for label in methods.axes[0].get_xticklabels()] == ["lora", "full"]
