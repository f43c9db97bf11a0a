"""A job's log, in whatever pieces it comes: what is shown, what is progress, and which line is the result."""

import io
import json

import pytest
from rich.console import Console

from heliostat.errors import JobFailed
from heliostat.jobs import follow
from heliostat.training import progress

RESULT = {"run_id": "abc", "version": "3"}
LINES = [
    "Running entrypoint for job x: exec python -m heliostat.cli train",
    "run /home/me/.heliostat/runs/tiny-0001",
    '{"not": "the result"}',
    "step 5/20  loss 2.0000",
    "[bold]no markup[/bold]",
    json.dumps(RESULT),
    "a library's last words",
]


def show(pieces: list[str], terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, color_system=None, width=100, soft_wrap=True)
    with progress.bar_on(console) as bar:
        log = follow.Log(console, bar)
        for piece in pieces:
            log.take(piece)
        assert log.length == sum(map(len, pieces))
    return output.getvalue()


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_log_is_shown_but_for_its_result(size: int) -> None:
    text = "".join(f"{line}\n" for line in LINES)
    shown = show([text[start : start + size] for start in range(0, len(text), size)], terminal=False)
    assert shown.splitlines() == [LINES[1], LINES[3], LINES[4], LINES[2], LINES[6]]


def test_a_terminal_shows_progress_as_a_bar() -> None:
    shown = show(["step 5/20  loss 2.0000\n", "step 10/20  loss 1.0000\nother\n"], terminal=True)
    assert "step " not in shown
    assert "10/20 loss 1.0000" in shown
    assert "other" in shown


def test_the_result_is_the_last_json_object() -> None:
    assert follow.result_of("\n".join(LINES)) == RESULT
    assert follow.result_of("[1]\n{\n{'a'}") == {}


def known(status: str, code: int | None, **more: str) -> dict[str, object]:
    return {"job_id": "x", "status": status, "exit_code": code, "message": "Ray's words", **more}


def test_a_job_that_went_well_gives_its_facts() -> None:
    facts = known("SUCCEEDED", 0, run_id="abc")
    assert follow.outcome(facts) == facts


@pytest.mark.parametrize(
    ("facts", "code", "message"),
    [
        (known("FAILED", 2, error="data.jsonl:3: is bad"), 2, r"failed: data\.jsonl:3: is bad"),
        (known("FAILED", 3, error="a gate refused"), 3, "a gate refused"),
        (known("FAILED", None), 1, "Ray's words"),
        (known("FAILED", -9), 1, "Ray's words"),
        (known("STOPPED", None), 1, "was stopped"),
    ],
)
def test_a_job_that_failed_has_the_exit_code_of_its_command(facts: dict[str, object], code: int, message: str) -> None:
    with pytest.raises(JobFailed, match=message) as failed:
        follow.outcome(facts)
    assert failed.value.exit_code == code
    assert failed.value.facts == facts
