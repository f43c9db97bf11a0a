"""The quickstart, as the README gives it."""

from heliostat.quickstart.schedules import UNSEEN_PHRASE
from tests.slow import command


def test_quickstart_learns_and_answers() -> None:
    process = command.start("quickstart", "serving.port=18431")
    result = command.finish(process)
    assert result["exact_match"] >= 0.95
    assert result["exact_match_before"] <= 0.01
    assert (result["phrase"], result["answer"]) == UNSEEN_PHRASE
    assert len(result["families"]) >= 10
    assert min(result["families"].values()) >= 0.7
    assert result["seconds"] > 0
