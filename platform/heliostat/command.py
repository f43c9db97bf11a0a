"""What a command of the command line is. Knows no command."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A verb: what it does, its arguments, and the function that does it.

    The function returns its result, or shows it by `options.emit` before it ends, as a server does once it is up.
    """

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result | None]
    show: Callable[[Result], str]
    passes_on: bool = False
    """Whether arguments that it does not know are another command's: they are `options.rest`, in their order."""


def parser_of(verb: str, command: Command) -> argparse.ArgumentParser:
    """The parser of `heliostat VERB`."""
    parser = argparse.ArgumentParser(
        prog=f"heliostat {verb}", description=command.help, allow_abbrev=not command.passes_on
    )
    command.arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object, the last line of stdout"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def console() -> "Console":
    """stderr, where progress and notes go."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)
