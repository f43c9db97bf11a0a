"""The terminal shows where a run is, from a journal that another process is writing."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heliostat.training import progress
from heliostat.training.progress import ProgressBar


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def line(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "time": 0.0, "metrics": metrics}) + "\n"


def append(journal: Path, text: str) -> None:
    with journal.open("a") as file:
        file.write(text)


def shown(journal: Path, total: int, *texts: str, terminal: bool = False) -> str:
    """What is printed while the texts are appended one after the other."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=150)
    with ProgressBar(journal, total, console):
        for text in texts:
            append(journal, text)
            time.sleep(0.35 if len(texts) > 1 else 0)
    return output.getvalue()


def steps(output: str) -> list[int]:
    return [int(found.split()[1].split("/")[0]) for found in output.splitlines()]


@pytest.mark.parametrize("total", [10, 100, 997])
def test_elsewhere_than_on_a_terminal_it_is_a_line_each_tenth(total: int, journal: Path) -> None:
    output = shown(journal, total, "".join(line(step, loss=1 / step) for step in range(1, total + 1)))
    found = steps(output)
    assert len(found) == 10
    assert found[-1] == total
    assert all(abs(step - total * tenth / 10) <= 1 for tenth, step in enumerate(found, 1))
    assert f"step {total}/{total}  loss {1 / total:.4f}" in output


def test_a_run_of_few_steps_prints_each(journal: Path) -> None:
    assert steps(shown(journal, 3, "".join(line(step, loss=1.0) for step in (1, 2, 3)))) == [1, 2, 3]


def test_the_latest_numbers_are_shown_together(journal: Path) -> None:
    text = line(0, eval_loss=5.25) + line(1, loss=4.5, tokens_per_second=1234.5, grad_norm=1.0)
    assert shown(journal, 1, text) == "step 1/1  loss 4.5000  validation 5.2500  1,234 tokens/s\n"


def test_a_half_written_line_is_read_once_it_is_whole(journal: Path) -> None:
    text = line(1, loss=2.0)
    output = shown(journal, 2, text[:20], text[20:] + line(2, loss=1.0)[:-1], "\n")
    assert steps(output) == [1, 2]
    assert "loss 1.0000" in output


def test_what_stays_half_written_is_left_out(journal: Path) -> None:
    assert steps(shown(journal, 2, line(1, loss=2.0) + line(2, loss=1.0)[:-5])) == [1]


def test_rows_of_an_earlier_attempt_are_not_shown_again(journal: Path) -> None:
    append(journal, "".join(line(step, loss=9.0) for step in range(1, 51)))
    output = shown(journal, 100, line(60, loss=1.0))
    assert steps(output) == [60]
    assert "9.0" not in output


def test_a_journal_that_never_comes_is_nothing_to_show(journal: Path) -> None:
    assert shown(journal, 10) == ""


def test_on_a_terminal_it_is_a_bar(journal: Path) -> None:
    output = shown(journal, 4, "".join(line(step, loss=0.5) for step in (1, 2)), terminal=True)
    assert "2/4" in output
    assert "loss 0.5000" in output
    assert "step 2/4" not in output


def test_an_error_inside_ends_the_thread(journal: Path) -> None:
    bar: Any = ProgressBar(journal, 1, Console(file=io.StringIO()))
    with pytest.raises(KeyboardInterrupt), bar:
        raise KeyboardInterrupt
    assert not bar._thread.is_alive()


def test_who_follows_from_elsewhere_may_ask_for_more_lines_and_read_them(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(progress.LINES, "50")
    output = shown(journal, 100, "".join(line(step, loss=1 / step) for step in range(1, 101)))
    found = [progress.parse(text) for text in output.splitlines()]
    assert found == [(step, 100, f"loss {1 / step:.4f}") for step in range(2, 101, 2)]
    assert progress.parse("stepping on 3/4") is None
