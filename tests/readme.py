"""The README's commands and code, as they stand there, for tests that run them."""

import re

from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands(heading: str) -> list[list[str]]:
    """The `heliostat` commands of the indented block below a heading, each as its arguments."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line.split()[1:] for line in section.splitlines() if line.startswith("    heliostat ")]


def python() -> str:
    """The Python example."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    return str(code)
