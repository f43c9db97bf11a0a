"""The commands and code of README.md and docs/, as they stand there, for tests that run or check them."""

import re

from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("heliostat", "curl", "serve", "make", "python", "pip", "pytest", "ray", "mlflow", "tensorboard", "kubectl",
            "docker", "helm", "git", "export", ".")  # fmt: skip
_LINE = re.compile(rf"^ {{4,}}(?:\w+=\S+ )*(?:{'|'.join(map(re.escape, PROGRAMS))}) .*$", re.MULTILINE)


def document(name: str) -> str:
    """The text of a document of docs/."""
    return (REPOSITORY / "docs" / name).read_text(encoding="utf-8")


def section(heading: str, text: str = TEXT) -> str:
    """What is below a heading."""
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def shell(text: str) -> list[str]:
    """The command lines of the indented blocks of a text; one that goes on behind a backslash is one."""
    return [line.strip() for line in _LINE.findall(text.replace("\\\n", ""))]


def commands(heading: str) -> list[list[str]]:
    """The `heliostat` commands of the indented block below a heading of the README, each as its arguments."""
    return [line.split()[1:] for line in shell(section(heading)) if line.startswith("heliostat ")]


def python() -> str:
    """The Python example."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    return str(code)
