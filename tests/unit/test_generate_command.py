"""Settings from the command line, and the table that shows several ways to decode side by side."""

import io
from pathlib import Path

import pytest

from heliostat.errors import ConfigError
from heliostat.evaluation import generate_command as command


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {}),
        (["max_new_tokens=3"], {"max_new_tokens": 3}),
        (["generation.temperature=0.7"], {"temperature": 0.7, "do_sample": True}),
        (["top_k=20", "do_sample=false"], {"top_k": 20, "do_sample": False}),
        (["num_beams=4"], {"num_beams": 4, "do_sample": False}),
        (["num_beams=4", "min_p=0.1"], {"num_beams": 4, "min_p": 0.1, "do_sample": True}),
        (["typical_p=0.9", "repetition_penalty=1.2"], {"typical_p": 0.9, "repetition_penalty": 1.2, "do_sample": True}),
    ],
)
def test_settings_of_sampling_ask_for_it_and_beams_for_none(overrides: list[str], expected: command.Settings) -> None:
    assert command.settings(overrides) == expected


def test_a_way_has_the_common_settings_under_its_own() -> None:
    common = {"max_new_tokens": 5, "temperature": 0.5, "do_sample": True}
    assert command.way("greedy", common) == {**common, "do_sample": False, "num_beams": 1}
    assert command.way("temperature=0.8 top_k=20", common) == {**common, "temperature": 0.8, "top_k": 20}
    assert command.way("stop_strings='[a b, c]'", {}) == {"stop_strings": ["a b", "c"]}
    with pytest.raises(ConfigError, match="unknown key `heat`"):
        command.way("heat=1", common)


def test_prompts_come_from_flags_and_a_file_or_else_from_stdin(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n", encoding="utf-8")
    stdin = ["three\n", " \n"]
    assert command.read_prompts(["zero"], str(file), stdin) == ["zero", "one", "two"]
    assert command.read_prompts(["zero"], None, stdin) == ["zero"]
    assert command.read_prompts([], None, stdin) == ["three"]
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"--file .*prompts\.txt cannot be read"):
        command.read_prompts([], str(file), stdin)
    with pytest.raises(ConfigError, match=r"--file nowhere cannot be read"):
        command.read_prompts([], "nowhere", stdin)
    with pytest.raises(ConfigError, match="no prompt is given"):
        command.read_prompts([], None, io.StringIO(""))


def test_each_prompt_has_a_table_and_no_text_is_taken_for_markup() -> None:
    compared = [
        {"settings": "greedy", "outputs": ["[bold]one[/bold]", "two " * 40]},
        {"settings": "top_k=20", "outputs": ["three", "four"]},
    ]
    shown = command.table(["[red]first", "second"], compared, 60)
    assert "[bold]one[/bold]" in shown
    assert "[red]first" in shown
    assert max(map(len, shown.splitlines())) == 60
    assert [shown.count(word) for word in ("greedy", "top_k=20", "two", "four")] == [2, 2, 40, 1]
