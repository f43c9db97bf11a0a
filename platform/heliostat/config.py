"""YAML < `key.sub=value` overrides -> a strict, frozen pydantic model. Knows nothing of what the keys mean.

The sections of the configuration live beside the code they configure; `heliostat.experiment` puts them together.
"""

import difflib
import hashlib
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from heliostat.errors import ConfigError

Notice = Callable[[str], None]


class StrictModel(BaseModel):
    """A section of the configuration: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


M = TypeVar("M", bound=BaseModel)

# scheme://user:password@host, or ?...secret=... as pyarrow takes; a whole value, so that a prompt may quote one.
_CREDENTIALS = re.compile(
    r"[a-z][a-z0-9+.-]*://([^/\s:@]*:[^/\s@]+@\S*|\S*[?&]\w*(password|secret|token|access_key)\w*=\S+)", re.IGNORECASE
)


def load(
    model: type[M],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    synonyms: Mapping[str, str] = types.MappingProxyType({}),
    notice: Notice = lambda text: print(text, file=sys.stderr),
) -> M:
    """Read the YAML file at `path` (none: only the overrides), apply `key.sub=value` overrides, validate.

    `synonyms` maps a key other tools use to the dotted key meant here; each one used is told through `notice`.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or a key or value is wrong. Lists every wrong key with its
            place and, for an unknown key, the nearest valid one. Or a value is a URI with a password in it.
    """
    values, lines = _read_yaml(Path(path)) if path is not None else ({}, {})
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        key, value = _parse_override(override)
        set_key(values, key, value, override)
        origins[key] = f"override {override.split('=', 1)[0]}"
    values, origins = _rename_synonyms(model, values, origins, synonyms, notice)
    _refuse_credentials(values, origins, str(path or "command line"))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(model, error, origins, str(path or "command line"))) from error


def dump(config: BaseModel) -> str:
    """The configuration with every default filled in, as YAML that `load` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def fingerprint(value: Any) -> str:
    """A short hash of a JSON-like value (a config, a manifest): equal values, equal hash, on every machine."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key that `model` accepts, dotted: `name`, `training`, `training.learning_rate`, ..."""
    for name, field in model.model_fields.items():
        yield prefix + name
        below = section(field.annotation)
        if below is not None:
            yield from dotted_keys(below, f"{prefix}{name}.")


def section(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation such as `Section` or `Section | None`."""
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's values, and the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Give the path of a YAML config; examples are in jobs/examples/"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{path}:{line}: is not valid YAML: character #x{error.character:04x} is not allowed"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: is not valid YAML: {error.problem}") from error
    if values is None:
        raise ConfigError(f"{path}: is empty; a config needs at least `model:` and `data:`")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: must be a mapping of keys to values, found a {type(values).__name__}")
    return values, dict(_key_lines(path, node))


def _key_lines(path: Path, node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            first = seen[key.value]
            raise ConfigError(f"{path}:{line}: `{prefix}{key.value}` is given twice (first on line {first}); keep one")
        seen[key.value] = line
        yield f"{prefix}{key.value}", line
        yield from _key_lines(path, value, f"{prefix}{key.value}.")


def _parse_override(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"`{override}` is not an override; write key.sub=value, such as training.learning_rate=1e-4")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        return key, text


def set_key(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Set the dotted key in nested values; sections that are missing or null are made.

    Raises:
        ConfigError: a value stands where the key needs a section; the message quotes `override`.
    """
    *sections, leaf = key.split(".")
    for section in sections:
        child = values.setdefault(section, {})
        if child is None:
            child = values[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"override `{override}`: `{section}` is a value, not a section; nothing can be set below it"
            )
        values = child
    values[leaf] = value


def _refuse_credentials(values: Any, origins: Mapping[str, str], source: str, key: str = "") -> None:
    """Configurations are kept in run folders, in MLflow and in logs of jobs, where no password belongs."""
    if isinstance(values, str) and _CREDENTIALS.fullmatch(values):
        raise ConfigError(
            f"{_origin(key, origins, source)}: `{key}` holds a password or key, and configurations are kept in run "
            "folders and MLflow; leave it out of the URI, and give it by the environment or a credentials file"
        )
    if isinstance(values, Mapping):
        for name, value in values.items():
            _refuse_credentials(value, origins, source, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            _refuse_credentials(value, origins, source, key)


def _rename_synonyms(
    model: type[BaseModel],
    values: dict[str, Any],
    origins: dict[str, str],
    synonyms: Mapping[str, str],
    notice: Notice,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Move well-known keys of other tools, and flat keys (`learning_rate` at the top), to where they belong here."""
    valid = set(dotted_keys(model))
    leaves: dict[str, list[str]] = {}
    for key in valid:
        leaves.setdefault(key.rsplit(".", 1)[-1], []).append(key)

    def meant(key: str) -> str | None:
        leaf = key.rsplit(".", 1)[-1]
        if leaf in synonyms:
            return synonyms[leaf]
        return leaves[leaf][0] if "." not in key and len(leaves.get(leaf, [])) == 1 else None

    for key in [key for key in _leaf_keys(values) if key not in valid and not _is_free(key, valid)]:
        target = meant(key)
        if target is None:
            continue
        where = origins.get(key, key)
        if _get(values, target) is not None:
            raise ConfigError(
                f"{where}: `{key}` means `{target}`, which is also given ({origins.get(target)}); keep one"
            )
        set_key(values, target, _pop(values, key), key)
        origins[target] = where
        notice(f"{where}: `{key}` is read as `{target}`")
    return values, origins


def _is_free(key: str, valid: set[str]) -> bool:
    """Whether the key lies in a mapping whose keys are the user's own, such as data.columns or a search space."""
    parts = key.split(".")
    above = [".".join(parts[:length]) for length in range(1, len(parts))]
    return any(name in valid and not any(other.startswith(f"{name}.") for other in valid) for name in above)


def _leaf_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaf_keys(value, f"{prefix}{key}.")


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values


def _pop(values: dict[str, Any], key: str) -> Any:
    *sections, leaf = key.split(".")
    for section in sections:
        values = values[section]
    return values.pop(leaf)


def _explain(model: type[BaseModel], error: ValidationError, origins: Mapping[str, str], source: str) -> str:
    valid = list(dotted_keys(model))
    problems = []
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"])
        where = _origin(key, origins, source)
        problems.append(f"{where}: {_explain_one(key, detail, valid)}")
    return "\n".join(dict.fromkeys(problems))


def _origin(key: str, origins: Mapping[str, str], source: str) -> str:
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return source


def _explain_one(key: str, detail: Any, valid: list[str]) -> str:
    if detail["type"] == "extra_forbidden":
        near = nearest(key, valid)
        return f"unknown key `{key}`" + (f"; did you mean `{near}`?" if near else "; `heliostat schema` lists all keys")
    if detail["type"] == "missing":
        return f"`{key}` is missing"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] == "value_error" else f" (given: {json.dumps(detail['input'], default=str)[:80]})"
    return f"`{key}`: {message}{given}" if key else message


def nearest(key: str, valid: Sequence[str]) -> str | None:
    """The valid dotted key that `key` most likely stands for: alike as a whole, or alike in its last part."""
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.75)
    if close:
        return close[0]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in valid}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.7)
    return by_leaf[close[0]] if close else None
