"""The quickstart, as the README gives it, and the README's client against the endpoint it leaves up."""

import contextlib
import io
import json

from heliostat.quickstart.schedules import UNSEEN_PHRASE
from tests import readme
from tests.slow import command

PORT = "18431"


def test_quickstart_learns_and_answers() -> None:
    process = command.start("quickstart", f"serving.port={PORT}", "--keep")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()
    result = json.loads(line)
    client_output = run_readme_client()
    below = command.processes_below(process.pid)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert result["exact_match"] >= 0.95
    assert result["exact_match_before"] <= 0.01
    assert (result["phrase"], result["answer"]) == UNSEEN_PHRASE
    assert client_output == UNSEEN_PHRASE[1]
    assert len(result["families"]) >= 10
    assert min(result["families"].values()) >= 0.7
    assert command.still_alive(below) == []


def run_readme_client() -> str:
    """What the README's Python example prints; only its port is changed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(readme.python().replace("8000", PORT), {})
    return printed.getvalue().strip()
