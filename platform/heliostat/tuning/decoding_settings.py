"""What a point of a decoding search means: settings for the generator, and what comes before the prompts.

Knows the configuration and the rows' formats; no model and no Ray.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from heliostat.data import formats
from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import ConfigError, ModelError
from heliostat.evaluation.config import SAMPLING_SETTINGS, GenerationSettings
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.evaluation.questions import Pair
from heliostat.tuning import space
from heliostat.tuning.space import Parameter, Point, Space

SECTION = "tune_decoding"
SYSTEM_PROMPT, FEW_SHOT = "system_prompt", "few_shot"
GENERATION_KEYS = tuple(GenerationSettings.model_fields)
KEYS = (*GENERATION_KEYS, SYSTEM_PROMPT, FEW_SHOT)

# What transformers takes for a setting that is left out (GenerationConfig._get_default_generation_params), or what
# switches the setting off.
_NEUTRAL = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "stop_strings": [],
}


@dataclass(frozen=True)
class Setting:
    """All that makes one trial differ from another."""

    generation: GenerationSettings
    prefix: PromptPrefix

    def decoding(self) -> dict[str, Any]:
        """The decoding settings that matter, by their names in generation_config.json.

        Those with neutral values are left out, as are those of sampling and of beams where there is none. Two settings
        decode alike if and only if these are equal.
        """
        given = self.generation.model_dump(exclude_none=True)
        idle = set(SAMPLING_SETTINGS) if not self.generation.do_sample else set()
        idle |= {"length_penalty"} if (self.generation.num_beams or 1) == 1 else set()
        return {key: value for key, value in given.items() if key not in idle and value != _NEUTRAL.get(key)}

    def generation_config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The content of generation_config.json: the model's `own` with its decoding settings replaced by these.

        Token ids, and settings that no search knows, stay.
        """
        kept = {key: value for key, value in own.items() if key not in GENERATION_KEYS}
        return {**kept, **self.decoding()}

    def summary(self) -> dict[str, Any]:
        """`decoding` and the prefix, with a count for the examples."""
        prefix: dict[str, Any] = {}
        if self.prefix.system_prompt:
            prefix[SYSTEM_PROMPT] = self.prefix.system_prompt
        if self.prefix.few_shot:
            prefix[FEW_SHOT] = len(self.prefix.few_shot)
        return {**self.decoding(), **prefix}

    def same_as(self, other: "Setting") -> bool:
        """Whether both generate the same."""
        return self.decoding() == other.decoding() and self.prefix == other.prefix


def of_point(point: Mapping[str, Any], defaults: GenerationSettings, shots: Sequence[Pair]) -> Setting:
    """The setting of a point on top of the experiment's `generation` section; `shots` are the first training rows.

    Raises:
        ValidationError: a value that GenerationSettings refuses.
    """
    values = {**defaults.model_dump(), **{key: value for key, value in point.items() if key in GENERATION_KEYS}}
    wanted = point.get(FEW_SHOT) or 0
    pairs = shots[:wanted] if isinstance(wanted, int) else [(str(prompt), str(answer)) for prompt, answer in wanted]
    return Setting(GenerationSettings(**values), PromptPrefix(point.get(SYSTEM_PROMPT), tuple(pairs)))


def greedy_point(defaults: GenerationSettings) -> Point:
    """Greedy decoding: no sampling, beams, penalties or prefix. Length and stop strings are the experiment's."""
    blank: Point = dict.fromkeys(KEYS)
    kept = {"max_new_tokens": defaults.max_new_tokens, "stop_strings": defaults.stop_strings}
    return {**blank, "do_sample": False, "num_beams": 1, **kept}


def own_point(
    generation_config: Mapping[str, Any], prefix: PromptPrefix, defaults: GenerationSettings, where: str
) -> Point:
    """What a bundle decodes with now, as a point; `where` names its generation_config.json.

    Raises:
        ModelError: a value there is not one that a search could set.
    """
    found = {key: generation_config.get(key) for key in GENERATION_KEYS}
    values = {**found, "do_sample": bool(found["do_sample"])}
    values["max_new_tokens"] = found["max_new_tokens"] or defaults.max_new_tokens
    if isinstance(found["stop_strings"], str):
        values["stop_strings"] = [found["stop_strings"]]
    try:
        GenerationSettings(**values)
    except ValidationError as error:
        raise ModelError(f"{where}: {_first(error)}") from error
    return {**values, SYSTEM_PROMPT: prefix.system_prompt, FEW_SHOT: [list(pair) for pair in prefix.few_shot]}


def parse_space(values: Mapping[str, Any], defaults: GenerationSettings) -> Space:
    """The space of the section `tune_decoding`.

    Raises:
        ConfigError: an unknown key (the nearest is named), a wrong distribution, or one that holds a value that the key
            cannot have.
    """
    found = space.parse(values, SECTION, KEYS)
    for parameter in found.parameters:
        for value in _probes(parameter):
            _check(parameter.key, value, defaults)
    return found


def most_shots(found: Space) -> int:
    """How many training rows the space asks for as examples."""
    wanted = [value for key, value, _ in found.extremes() if key == FEW_SHOT and isinstance(value, int)]
    return max(wanted, default=0)


def question_of(row: Row, data: DataConfig) -> str:
    """What the model is asked in this row: rows with equal questions must not be told apart."""
    if data.format != "chat":
        return formats.prompt_of(row, data, None)[0]
    dialogue = formats.dialogue_of(row, data)
    return json.dumps([dialogue.tools, dialogue.messages[: dialogue.last_answer]], ensure_ascii=False)


def _probes(parameter: Parameter) -> Iterator[Any]:
    """Values that show whether all are allowed: both ends, and a fraction between them where fractions are drawn."""
    yield from parameter.extremes()
    if parameter.kind in ("uniform", "loguniform"):
        yield parameter.low + (parameter.high - parameter.low) / math.pi


def _check(key: str, value: Any, defaults: GenerationSettings) -> None:
    where = f"{SECTION}.space.{key}"
    if key == SYSTEM_PROMPT:
        if not isinstance(value, str | None):
            raise ConfigError(f"{where}: {value!r} is not a text or null")
    elif key == FEW_SHOT:
        if not _is_few_shot(value):
            raise ConfigError(f"{where}: {value!r} is neither a count of training rows nor a list of [prompt, answer]")
    else:
        try:
            GenerationSettings(**{**defaults.model_dump(), key: value})
        except ValidationError as error:
            raise ConfigError(f"{where}: {value!r} is not allowed: {_first(error, key)}") from error


def _is_few_shot(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and value >= 0
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in value
    )


def _first(error: ValidationError, key: str | None = None) -> str:
    detail = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in detail["loc"])
    return str(detail["msg"]) if place == key else f"{place}: {detail['msg']}"
