"""What `heliostat generate` does: prompts in, continuations out, in one way or several side by side. Knows no flags."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from heliostat import config as configuration
from heliostat.errors import ConfigError
from heliostat.evaluation.config import SAMPLING_SETTINGS, GenerationSettings

GREEDY = "greedy"

Settings = dict[str, Any]


def settings(overrides: Sequence[str]) -> Settings:
    """The decoding settings that `key=value` overrides name, and no others.

    Settings of sampling ask for it, and beams for a search without it, where `do_sample` itself is not named.

    Raises:
        ConfigError: there is no such setting, or its value is wrong.
    """
    plain = [override.removeprefix("generation.") for override in overrides]
    named = {override.split("=")[0] for override in plain}
    given = configuration.load(GenerationSettings, None, plain).model_dump(include=named)
    samples = bool(named.intersection(SAMPLING_SETTINGS))
    if "do_sample" in named or not (samples or "num_beams" in named):
        return given
    return {**given, "do_sample": samples}


def way(text: str, common: Settings) -> Settings:
    """The settings of one way to decode: `greedy`, or `temperature=0.8 top_k=20`; `common` ones under them.

    Raises:
        ConfigError: as `settings`.
    """
    own = {"do_sample": False, "num_beams": 1} if text.strip() == GREEDY else settings(shlex.split(text))
    return {**common, **own}


def read_prompts(given: Sequence[str], file: str | None, stdin: Iterable[str]) -> list[str]:
    """The prompts given, those of the file's lines, or else of standard input's; empty lines are none.

    Raises:
        ConfigError: the file cannot be read, or there is no prompt.
    """
    lines: Iterable[str] = [] if given or file else stdin
    if file:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--file {file} cannot be read ({error})") from error
    prompts = [*given, *(line.rstrip("\n") for line in lines if line.strip())]
    if not prompts:
        raise ConfigError("no prompt is given; use --prompt or --file, or write one prompt a line to stdin")
    return prompts


def compare(loaded: Any, prompts: Sequence[str], ways: dict[str, Settings], seed: int) -> list[dict[str, Any]]:
    """For each way, its name and its outputs, in the order of the prompts. `loaded`: a base.InferenceModel."""
    from heliostat.evaluation import completion

    return [
        {"settings": name, "outputs": completion.complete(loaded, prompts, given, seed=seed)}
        for name, given in ways.items()
    ]


def table(prompts: Sequence[str], compared: Sequence[dict[str, Any]], width: int) -> str:
    """For each prompt, the outputs of all ways below each other, `width` columns wide."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(width=width)
    with console.capture() as captured:
        for number, prompt in enumerate(prompts):
            rows = Table("settings", Column(Text(prompt)), box=box.ROUNDED, show_lines=True, expand=True)
            for each in compared:
                # As text: a model may write what rich would take for markup.
                rows.add_row(Text(each["settings"]), Text(each["outputs"][number]))
            console.print(rows)
    return captured.get().rstrip("\n")


def stream(loaded: Any, prompts: Iterable[str], given: Settings, seed: int, write: Callable[[str], None]) -> None:
    """Complete one prompt after the other, and write each continuation while it comes.

    Raises:
        ConfigError: beams are asked for, of which no text is certain before the end.
    """
    from heliostat.evaluation import completion

    for prompt in prompts:
        completion.stream(loaded, prompt, given, write, seed=seed)
        write("\n")
