"""The quickstart, as the README gives it, far from the checkout with a wheel that is installed in an environment of its
own; and the README's client against the endpoint it leaves up."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from heliostat import state
from heliostat.quickstart.schedules import UNSEEN_PHRASE
from heliostat.registry import versions
from tests import readme, wheel
from tests.slow import command

PORT = "18431"


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """The program of the wheel."""
    return str(wheel.install(wheel.build(tmp_path), tmp_path / "environment") / "heliostat")


def test_quickstart_learns_and_answers(installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.delenv("PYTHONPATH", raising=False)
        process = command.start("quickstart", f"serving.port={PORT}", "--keep", program=[installed])
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
    assert result["decoding"]["kept_greedy"], "nothing beats greedy decoding at telling the one right answer"
    assert served_defaults(result["model_uri"]) == (False, None), "the endpoint answered by what the search chose"
    assert served_defaults("models:/cron/1") == (True, 1.0), "what the model was trained with, and is not served"
    search_again()


def served_defaults(reference: str) -> tuple[bool, float | None]:
    """do_sample and temperature of a version."""
    config = json.loads((Path(versions.resolve(reference).path) / "generation_config.json").read_text())
    return config["do_sample"], config.get("temperature")


def search_again() -> None:
    """The README's command finds nothing new for a version that has its settings already."""
    arguments = readme.commands("Search")[1]
    folder = state.folder() / "cron"
    data = [f"data.{split}={folder / split}.jsonl" for split in ("train", "validation", "test")]
    result = command.run(*arguments, *data, "tune_decoding.num_samples=2")
    assert (result["version"], result["kept_greedy"]) == (None, True)
    assert result["trials"] == 3, "greedy decoding, which the version has, and two others"


def run_readme_client() -> str:
    """What the README's Python example prints; only its port is changed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(readme.python().replace("8000", PORT), {})
    return printed.getvalue().strip()
