"""Two pages that MkDocs makes when it builds the site: configuration.md from the configuration's own models, recipes.md
from the examples.

Knows MkDocs' hook (https://www.mkdocs.org/dev-guide/plugins/#on_files) and pydantic's fields; nothing of what keys
mean.
"""

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from heliostat.config import section
from heliostat.experiment import SYNONYMS, ExperimentConfig

EXAMPLES = Path(__file__).parents[1] / "jobs" / "examples"
_CONFIGURATION = """# Configuration

Every key of the YAML file. `KEY=VALUE` after a command overrides one: `training.learning_rate=1e-4`. Unknown keys are
errors. Editors complete and check keys with the JSON schema that `heliostat schema` prints.
"""
_SYNONYMS = """## Names of other tools

Accepted, with a notice.

| name | key |
|---|---|"""
_RECIPES = """# Recipes

One file each, to copy from. They run as they are on two CPU cores, and on GPUs with `training.use_gpu=true`; sizes are
chosen for the former.
"""


def on_files(files: Any, config: Any) -> Any:
    """MkDocs calls this when it has listed the documents: two more are made."""
    from mkdocs.structure.files import File

    for name, content in (("configuration.md", configuration(ExperimentConfig)), ("recipes.md", recipes(EXAMPLES))):
        files.append(File.generated(config, name, content=content))
    return files


def recipes(folder: Path) -> str:
    """The examples in `folder`, as Markdown: what the comment at the top says of each, and the file."""
    return "\n".join([_RECIPES, *(_recipe(path, folder) for path in sorted(folder.glob("*/*.yaml")))])


def _recipe(path: Path, folder: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    said = [line.removeprefix("#").removeprefix(" ") for line in lines[:end]]
    first = said.index("")
    told = " ".join(said[:first])
    rest = "\n".join(["```text", *said[first + 1 :], "```", "", "```yaml", *lines[end:], "```"])
    return f"## {path.relative_to(folder).with_suffix('')}\n\n{told}\n\n{rest}\n"


def configuration(model: type[BaseModel]) -> str:
    """The reference of all keys of `model`, as Markdown: a table a section, then other tools' names of keys."""
    synonyms = [f"| `{theirs}` | `{ours}` |" for theirs, ours in sorted(SYNONYMS.items())]
    names = [
        "## Names of other tools",
        "",
        "Accepted, with a notice.",
        "",
        "| name | key |",
        "|---|---|",
        *synonyms,
        "",
    ]
    return "\n".join([_CONFIGURATION, *_sections(model, ""), *names])


def _sections(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """The table of the model's own keys, then the sections below it."""
    inner = {name: below for name, field in model.model_fields.items() if (below := section(field.annotation))}
    yield f"## `{prefix.rstrip('.')}`\n" if prefix else "## Top level\n"
    yield f"{' '.join((model.__doc__ or '').split())}\n"
    yield "| key | type | default | |\n|---|---|---|---|"
    for name, field in model.model_fields.items():
        told = f"[section](#{prefix.replace('.', '')}{name})" if name in inner else _cell(field.description or "")
        yield f"| `{prefix}{name}` | {_cell(_type(field.annotation))} | {_default(field)} | {told} |"
    yield ""
    for name, below in inner.items():
        yield from _sections(below, f"{prefix}{name}.")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) or value is None or value is PydanticUndefined:
        return ""
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(annotation: Any) -> str:
    """The annotation in words: `number or nothing`, `one of full, lora`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(option) for option in arguments if option is not types.NoneType))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}.get(annotation, "mapping")
