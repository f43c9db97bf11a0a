"""Search spaces: YAML -> distributions, and draws from them. Knows Optuna's distributions, not what the keys mean.

    training.learning_rate: {loguniform: [1e-5, 1e-3]}
    training.weight_decay: [0.0, 0.1]                              # a list is a choice
    adapter.method: {grid: [full, lora]}                           # the same; the searcher `grid` takes both
    adapter.lora_r: {choice: [8, 32], when: {adapter.method: lora}}

Names and bounds are Ray Tune's: the upper end of `randint` is not drawn.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heliostat.config import nearest
from heliostat.errors import ConfigError

Point = dict[str, Any]
"""Key -> value."""

_RANGES = ("uniform", "loguniform", "randint", "lograndint")
_CHOICES = ("choice", "grid")


@dataclass(frozen=True)
class Parameter:
    """One key of the space."""

    key: str
    kind: str
    low: float = 0
    high: float = 0
    choices: tuple[Any, ...] = ()
    when: Mapping[str, Any] = field(default_factory=dict)
    """Other keys and the values that they must have for this one to exist."""

    def suggest(self, trial: Any) -> Any:
        """Draw from the distribution through an Optuna trial."""
        if self.kind in _CHOICES:
            return json.loads(trial.suggest_categorical(self.key, [_label(choice) for choice in self.choices]))
        log = self.kind.startswith("log")
        if self.kind in ("uniform", "loguniform"):
            return trial.suggest_float(self.key, self.low, self.high, log=log)
        return trial.suggest_int(self.key, int(self.low), int(self.high) - 1, log=log)

    def raw(self, value: Any) -> Any:
        """The value as Optuna stores it."""
        return _label(value) if self.kind in _CHOICES else value

    def extremes(self) -> list[Any]:
        """Values that show whether every value is allowed."""
        if self.kind in _CHOICES:
            return list(self.choices)
        if self.kind in ("uniform", "loguniform"):
            return [self.low, self.high]
        return [int(self.low), int(self.high) - 1]


class Space:
    """The parameters, those that others depend on first."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = tuple(_ordered(parameters))

    def suggest(self, trial: Any) -> Point:
        """One point of the space, drawn through an Optuna trial (define-by-run)."""
        point: Point = {}
        for parameter in self.parameters:
            if _applies(parameter, point):
                point[parameter.key] = parameter.suggest(trial)
        return point

    def raw(self, point: Mapping[str, Any]) -> Point:
        """The point as Optuna stores it, to enqueue it."""
        return {p.key: p.raw(point[p.key]) for p in self.parameters if p.key in point}

    def grid(self, where: str) -> list[Point]:
        """Every combination of the choices, in the order of the file.

        Raises:
            ConfigError: a parameter is a range, which has no combinations.
        """
        for parameter in self.parameters:
            if parameter.kind not in _CHOICES:
                raise ConfigError(
                    f"{where}.space.{parameter.key}: searcher grid needs lists of values, not {parameter.kind}; "
                    "give a list, or use the searcher random or optuna"
                )
        return list(_combinations(self.parameters, {}))

    def size(self) -> int | None:
        """An upper bound of the number of different points; None if there are endlessly many."""
        if any(parameter.kind in ("uniform", "loguniform") for parameter in self.parameters):
            return None
        return math.prod(len(p.choices) if p.kind in _CHOICES else int(p.high - p.low) for p in self.parameters)

    def extremes(self) -> Iterator[tuple[str, Any, Point]]:
        """(key, value, a point with it) for the ends of every range and every choice, conditions met."""
        first = {parameter.key: parameter.extremes()[0] for parameter in self.parameters}
        for parameter in self.parameters:
            for value in parameter.extremes():
                wanted = {**first, **parameter.when, parameter.key: value}
                yield parameter.key, value, self._valid(wanted)

    def _valid(self, values: Point) -> Point:
        point: Point = {}
        for parameter in self.parameters:
            if _applies(parameter, point):
                point[parameter.key] = values[parameter.key]
        return point


def parse(values: Mapping[str, Any], where: str, valid: Sequence[str]) -> Space:
    """The space in the YAML mapping of the section `where`; its keys must be some of the dotted keys `valid`.

    Keys may also be nested, as overrides on the command line make them.

    Raises:
        ConfigError: the space is empty, a key or a distribution is wrong; names the key and what to write.
    """
    flat = dict(flatten(values, valid))
    if not flat:
        raise ConfigError(
            f"{where}.space is empty; name what to search, such as "
            "space: {training.learning_rate: {loguniform: [1e-5, 1e-3]}}"
        )
    check_keys(flat, f"{where}.space", valid)
    parameters = [_parse_one(key, value, f"{where}.space.{key}") for key, value in flat.items()]
    for parameter in parameters:
        _check_condition(parameter, parameters, where)
    return Space(parameters)


def check_keys(keys: Iterable[str], where: str, valid: Sequence[str]) -> None:
    """Raises:
    ConfigError: a key is not one of `valid`; the nearest one is named.
    """
    for key in keys:
        if key not in valid:
            near = nearest(key, valid)
            hint = f"did you mean `{near}`?" if near else "`heliostat schema` lists all keys"
            raise ConfigError(f"{where}: there is no key `{key}` that can be set here; {hint}")


def flatten(values: Mapping[str, Any], valid: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; what lies above some of the dotted keys `valid` is a section."""
    for key, value in values.items():
        whole = f"{prefix}{key}"
        if isinstance(value, Mapping) and any(name.startswith(f"{whole}.") for name in valid):
            yield from flatten(value, valid, f"{whole}.")
        else:
            yield whole, value


def _parse_one(key: str, value: Any, where: str) -> Parameter:
    if not isinstance(value, Mapping):
        value = {"choice": value}
    names = [name for name in value if name != "when"]
    if len(names) != 1 or names[0] not in (*_RANGES, *_CHOICES):
        raise ConfigError(f"{where}: give one of {', '.join((*_RANGES, *_CHOICES))}; found {', '.join(names) or value}")
    kind, given, when = names[0], value[names[0]], value.get("when", {})
    if not isinstance(when, Mapping):
        raise ConfigError(f"{where}.when: write {{other_key: value}}")
    if kind in _CHOICES:
        if not isinstance(given, list) or not given:
            raise ConfigError(f"{where}: {kind} needs a list of values, such as [1, 2]")
        return Parameter(key, kind, choices=tuple(given), when=when)
    low, high = _bounds(given, kind, where)
    return Parameter(key, kind, low, high, when=when)


def _bounds(given: Any, kind: str, where: str) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in given)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {kind} needs two numbers, [low, high]; found {given}") from None
    whole = kind.endswith("randint")
    if low >= high:
        raise ConfigError(f"{where}: {kind} needs low < high{' (high is not drawn)' if whole else ''}; found {given}")
    if kind.startswith("log") and low <= 0:
        raise ConfigError(f"{where}: {kind} needs low > 0; found {given}")
    if whole and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"{where}: {kind} needs whole numbers; found {given}")
    return low, high


def _check_condition(parameter: Parameter, parameters: Sequence[Parameter], where: str) -> None:
    known = {other.key: other for other in parameters if other.key != parameter.key}
    for key, value in parameter.when.items():
        place = f"{where}.space.{parameter.key}.when"
        if key not in known:
            raise ConfigError(f"{place}: `{key}` is not another key of the space")
        if known[key].kind not in _CHOICES or value not in known[key].choices:
            raise ConfigError(f"{place}: `{key}` never has the value {value!r}; a condition names one of its choices")


def _ordered(parameters: Sequence[Parameter]) -> Iterator[Parameter]:
    left, done = list(parameters), set[str]()
    while left:
        ready = [parameter for parameter in left if parameter.when.keys() <= done]
        if not ready:
            raise ConfigError(f"the conditions of {', '.join(p.key for p in left)} go round in a circle")
        yield from ready
        done |= {parameter.key for parameter in ready}
        left = [parameter for parameter in left if parameter not in ready]


def _applies(parameter: Parameter, point: Point) -> bool:
    return all(key in point and point[key] == value for key, value in parameter.when.items())


def _combinations(parameters: Sequence[Parameter], point: Point) -> Iterator[Point]:
    if not parameters:
        yield point
        return
    first, *rest = parameters
    if not _applies(first, point):
        yield from _combinations(rest, point)
        return
    for choice in first.choices:
        yield from _combinations(rest, {**point, first.key: choice})


def _label(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
