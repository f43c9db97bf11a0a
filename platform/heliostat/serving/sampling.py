"""What may be asked of a generation, and what a bundle's defaults say. Knows names and ranges of settings; no tensors.

The ranges are OpenAI's where OpenAI has the setting, else transformers'.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

from heliostat.errors import ModelError, UserError

Settings = dict[str, Any]
Origin = Literal["generation_config.json", "built-in"]

# Bounds on what one request may make a step do; OpenAI has none for the first three.
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_BEAMS = 32
MAX_LOGPROBS = 20

# Decoding settings that only `generate()` can honour (see serving/lane.py), with the values that mean "off".
_BEAMS: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "length_penalty": (None, 1.0),
    "early_stopping": (None, False),
}
_SAMPLED_ONLY: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
}
_GENERATE_ONLY: dict[str, tuple[Any, ...]] = {
    **_BEAMS,
    **_SAMPLED_ONLY,
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "min_length": (None, 0),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "renormalize_logits": (None, False),
    "remove_invalid_values": (None, False),
}
# What nothing here can do: it needs code from the hub, a clock, a second model, or the text itself.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "max_time": (None,),
    "token_healing": (None, False),
    "num_return_sequences": (None, 1),
}


class InvalidRequest(UserError):
    """A generation request that is wrong in itself; `param` names the setting, `code` the kind of mistake."""

    def __init__(self, message: str, param: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class _Rule(NamedTuple):
    """What a setting must be, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str


def _whole(low: int, high: int | None = None) -> _Rule:
    words = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    return _Rule(lambda value: _is_int(value) and low <= value and (high is None or value <= high), words)


def _number(low: float, high: float = math.inf) -> _Rule:
    words = f"a number of at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
    return _Rule(lambda value: _is_real(value) and low <= value <= high, words)


def _share() -> _Rule:
    return _Rule(lambda value: _is_real(value) and 0 < value <= 1, "a number above 0 and at most 1")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    """Whether single precision can hold it: JSON has integers that no float can."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _is_logit_bias(value: object) -> bool:
    if not isinstance(value, Mapping) or len(value) > MAX_LOGIT_BIASES:
        return False
    return all(_is_int(token) and token >= 0 and _is_real(bias) and abs(bias) <= 100 for token, bias in value.items())


def _is_token_list(value: object) -> bool:
    return isinstance(value, tuple) and len(value) <= MAX_STOP_TOKEN_IDS and all(map(_is_int, value))


_RULES: dict[str, _Rule] = {
    "max_tokens": _whole(1),
    "temperature": _number(0),
    "top_k": _whole(0),
    "top_p": _share(),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _Rule(_is_logit_bias, f"at most {MAX_LOGIT_BIASES} token ids, each with a number from -100 to 100"),
    "min_tokens": _whole(0),
    "stop": _Rule(
        lambda value: isinstance(value, tuple) and all(isinstance(text, str) and text for text in value),
        "non-empty strings",
    ),
    "stop_token_ids": _Rule(_is_token_list, f"at most {MAX_STOP_TOKEN_IDS} token ids"),
    "sequences": _whole(1),
}
_OPTIONAL_RULES: dict[str, _Rule] = {"seed": _whole(-(2**63), 2**63 - 1), "logprobs": _whole(0, MAX_LOGPROBS)}
# Settings of `generate()` that a request may bring, and what they mean when nobody does.
_EXTRA_RULES: dict[str, _Rule] = {
    "num_beams": _whole(1, MAX_BEAMS),
    "length_penalty": _number(-10, 10),
    "early_stopping": _Rule(lambda value: isinstance(value, bool) or value == "never", 'true, false or "never"'),
    "no_repeat_ngram_size": _whole(0),
    "typical_p": _share(),
}
_EXTRA_NEUTRAL: Settings = {
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
}


def _check(name: str, value: Any, rule: _Rule) -> None:
    if not rule.holds(value):
        raise InvalidRequest(f"`{name}` must be {rule.words}", name)


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one generation. The defaults change nothing: greedy decoding of the model's own scores.

    Raises:
        InvalidRequest: a value has the wrong type or is out of range, or two settings cannot be had together.
    """

    max_tokens: int
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_k: int = 0
    """0 cuts nothing off."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one's probability are cut off."""
    repetition_penalty: float = 1.0
    """Makes tokens of prompt and completion less likely, above 1; Keskar et al. 2019, arXiv:1909.05858."""
    presence_penalty: float = 0.0
    """Taken from the scores of tokens that were generated already; OpenAI's."""
    frequency_penalty: float = 0.0
    """The same, once for each time; OpenAI's."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its score."""
    seed: int | None = None
    """The same seed, prompt and settings give the same tokens; None: others each time."""
    min_tokens: int = 0
    """The completion does not end by an end token before it has so many."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion as the model's own end tokens do."""
    logprobs: int | None = None
    """None: no log-probabilities; else those of each token and of so many likeliest ones."""
    sequences: int = 1
    """The best so many beams are the result."""
    extra: Settings = field(default_factory=dict)
    """Settings by transformers' names that only `generate()` can honour."""

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            _check(name, getattr(self, name), rule)
        for name, rule in _OPTIONAL_RULES.items():
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), rule)
        for name in _EXTRA_RULES.keys() & self.extra.keys():
            _check(name, self.extra[name], _EXTRA_RULES[name])
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest("`min_tokens` must not be above `max_tokens`", "min_tokens")
        if self.sequences > self.extra.get("num_beams", 1):
            raise InvalidRequest("`n` must not be above `num_beams`: a beam gives one completion", "n")
        if not self.extra:
            return
        other = "num_beams" if "num_beams" in self.extra else min(self.extra)
        for name, asked in (
            ("logprobs", self.logprobs is not None),
            ("presence_penalty", self.presence_penalty != 0),
            ("frequency_penalty", self.frequency_penalty != 0),
            ("logit_bias", bool(self.logit_bias) and "sequence_bias" in self.extra),
        ):
            if asked:
                raise InvalidRequest(f"`{name}` cannot be had together with `{other}`={self.extra[other]}", name)


class Default(NamedTuple):
    """A setting in force where a request leaves it open, and where it comes from."""

    value: Any
    origin: Origin


# Name here -> name in generation_config.json.
_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens",
    "max_tokens": "max_new_tokens",
    "stop": "stop_strings",
}
_SAMPLED = ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class DecodingDefaults:
    """What a model's generation_config.json says about requests that leave a setting open."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    extra: Settings = field(default_factory=dict)
    given: frozenset[str] = field(default=frozenset(), compare=False)
    """The settings that the file itself sets, by the names here."""

    @classmethod
    def of(cls, generation_config: Any) -> Self:
        """The defaults in a transformers GenerationConfig, read as `generate()` reads them.

        Raises:
            ModelError: a value is wrong, or asks for what cannot be done here, which must not be ignored silently.
        """
        given = generation_config.to_dict()
        for name, off in _UNSUPPORTED.items():
            if given.get(name) not in off:
                raise ModelError(
                    f"generation_config.json: the endpoint cannot decode with {name}={given[name]}; "
                    f"remove {name} there, or search decoding settings again without it"
                )
        stop = given.get("stop_strings") or ()
        defaults = cls(
            **_sampled(given, generation_config),
            max_tokens=given.get("max_new_tokens"),
            min_p=given.get("min_p") or 0.0,
            repetition_penalty=1.0 if given.get("repetition_penalty") is None else given["repetition_penalty"],
            min_tokens=given.get("min_new_tokens") or 0,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            extra=_extra(given),
            given=_given(given),
        )
        try:
            defaults.params(defaults.max_tokens or 1)
        except InvalidRequest as error:
            raise ModelError(f"generation_config.json: {error}") from error
        return defaults

    def params(self, max_tokens: int, **asked: Any) -> SamplingParams:
        """The settings of a request: its own (`asked`, by the names of `SamplingParams` or transformers), and these.

        None leaves a setting open. What a request sets replaces that setting alone, except where the two contradict
        each other. At temperature 0 nothing is sampled, so typical_p and the like are off. A temperature above 0 on a
        bundle tuned for beam search samples without beams: beams look for the likeliest text, which is not what the
        request wants. On a bundle that itself samples with beams it only replaces the temperature.

        Raises:
            InvalidRequest: a value has the wrong type or is out of range, or settings cannot be had together.
        """
        _check("max_tokens", max_tokens, _RULES["max_tokens"])
        own = {name: value for name, value in asked.items() if value is not None}
        settings = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": min(self.min_tokens, max_tokens),
            "stop": self.stop,
            **{name: value for name, value in own.items() if name not in _EXTRA_RULES},
        }
        settings |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
        own_extra = {name: value for name, value in own.items() if name in _EXTRA_RULES}
        extra = self._extra(settings["temperature"], own_extra)
        return SamplingParams(max_tokens=max_tokens, extra=extra, **settings)

    def in_force(self) -> dict[str, Default]:
        """Every setting of a request that leaves all open, by its name in the API, and where it comes from."""
        named: Settings = {name: getattr(self, name) for name in _FIELDS}
        values = {**named, "presence_penalty": 0.0, "frequency_penalty": 0.0, **_EXTRA_NEUTRAL, **self.extra}
        return {
            name: Default(value, "generation_config.json" if name in self.given else "built-in")
            for name, value in values.items()
        }

    def _extra(self, temperature: float, own: Settings) -> Settings:
        """The settings for `generate()` alone, of a request that has `own` ones."""
        for name, value in own.items():
            _check(name, value, _EXTRA_RULES[name])
        off = _SAMPLED_ONLY if temperature == 0 else _BEAMS if self.temperature == 0 else {}
        merged = {name: value for name, value in self.extra.items() if name not in off} | own
        found = {name: value for name, value in merged.items() if value not in _GENERATE_ONLY[name]}
        for name in ("length_penalty", "early_stopping"):
            if name in found.keys() & own.keys() and "num_beams" not in found:
                raise InvalidRequest(f"`{name}` needs `num_beams` above 1", name)
        return {
            name: value for name, value in _only_with_beams(found).items() if name not in _SAMPLED_ONLY or temperature
        }


def _sampled(given: Settings, generation_config: Any) -> Settings:
    """Temperature, top_k and top_p; where sampling is on and one is missing, transformers has a standard value."""
    if not given.get("do_sample"):
        return {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    standard = generation_config._get_default_generation_params()
    return {name: standard[name] if given.get(name) is None else given[name] for name in _SAMPLED}


def _extra(given: Settings) -> Settings:
    """The settings of a generation config that only `generate()` can honour."""
    return _only_with_beams({name: given[name] for name, off in _GENERATE_ONLY.items() if given.get(name) not in off})


def _only_with_beams(found: Settings) -> Settings:
    return found if "num_beams" in found else {name: found[name] for name in found.keys() - _BEAMS.keys()}


def _given(given: Settings) -> frozenset[str]:
    """The settings in force that a generation config itself sets."""
    names = {name for name, theirs in _FIELDS.items() if given.get(theirs) is not None}
    if not given.get("do_sample"):
        # The file's values are for sampling, which it does not ask for; that it says so is what makes it greedy.
        names -= set(_SAMPLED)
        names |= {"temperature"} if given.get("do_sample") is False else set()
    return frozenset(names | _extra(given).keys())
