"""What may be asked is checked by name; what is left open comes from the bundle, and it is told from where."""

import subprocess
import sys
from typing import Any

import pytest
from transformers import GenerationConfig

from heliostat.errors import ModelError
from heliostat.serving.sampling import MAX_BEAMS, DecodingDefaults, Default, InvalidRequest, Origin, SamplingParams

FILE: Origin = "generation_config.json"
BUILT_IN: Origin = "built-in"
NOT_FINITE = (float("nan"), float("inf"), 10**400)


def test_gateways_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, heliostat.serving.sampling, heliostat.serving.protocol, heliostat.serving.calls\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *[("max_tokens", value) for value in (0, -1, 1.5, True, "3")],
        *[("temperature", value) for value in (-0.1, "1", True, *NOT_FINITE)],
        *[("top_k", value) for value in (-1, 2.0, False)],
        *[("top_p", value) for value in (0, 1.1, *NOT_FINITE)],
        *[("min_p", value) for value in (-0.1, 1.1, *NOT_FINITE)],
        *[("repetition_penalty", value) for value in (0, -1.0, 101, True, *NOT_FINITE)],
        *[("presence_penalty", value) for value in (-2.1, 2.1, "1", *NOT_FINITE)],
        *[("frequency_penalty", value) for value in (-2.1, 2.1, False, *NOT_FINITE)],
        *[("logit_bias", value) for value in ({"5": 1}, {5: 101}, {-1: 1}, {True: 1}, {5: None}, [5])],
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        *[("seed", value) for value in (1.0, True, 2**63, -(2**63) - 1)],
        *[("min_tokens", value) for value in (-1, 1.0, 2)],
        *[("stop", value) for value in (("",), (3,), "ab")],
        *[("stop_token_ids", value) for value in ((1.0,), (True,), 5, tuple(range(129)))],
        *[("logprobs", value) for value in (-1, 21, True)],
        *[("sequences", value) for value in (0, True)],
    ],
)
def test_wrong_settings_are_refused_by_name(param: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"`{param}`") as caught:
        SamplingParams(**{"max_tokens": 1, param: value})
    assert caught.value.param == param


def test_the_borders_themselves_are_allowed() -> None:
    SamplingParams(1, presence_penalty=-2, frequency_penalty=2, seed=-(2**63), logprobs=20, min_p=1, min_tokens=1)
    SamplingParams(1, seed=2**63 - 1, logprobs=0, logit_bias={0: -100, 5: 100.0}, repetition_penalty=100)
    SamplingParams(1, sequences=4, extra={"num_beams": 4, "early_stopping": "never"})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("num_beams", value) for value in (0, MAX_BEAMS + 1, True, 2.0)],
        *[("length_penalty", value) for value in (11, True, float("nan"))],
        *[("early_stopping", value) for value in (1, "perhaps")],
        *[("no_repeat_ngram_size", value) for value in (-1, 2.0, True)],
        *[("typical_p", value) for value in (0, 1.5, True)],
    ],
)
def test_wrong_settings_of_generate_are_refused_whoever_brings_them(setting: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(1, extra={setting: value})
    assert caught.value.param == setting
    with pytest.raises(InvalidRequest):
        DecodingDefaults.of(GenerationConfig()).params(1, **{setting: value})


def test_defaults_are_what_generate_would_use() -> None:
    greedy = DecodingDefaults.of(GenerationConfig(max_new_tokens=9))
    assert greedy == DecodingDefaults(temperature=0.0, top_k=0, top_p=1.0, max_tokens=9)
    tuned = DecodingDefaults.of(GenerationConfig(do_sample=True, temperature=0.7, top_k=0, top_p=0.9, min_p=0.05))
    assert tuned == DecodingDefaults(temperature=0.7, top_k=0, top_p=0.9, min_p=0.05)
    # transformers fills in top_k=50 where sampling is on and nothing is said.
    assert DecodingDefaults.of(GenerationConfig(do_sample=True)).top_k == 50


def test_a_request_replaces_what_it_sets_and_nothing_else() -> None:
    defaults = DecodingDefaults.of(GenerationConfig(repetition_penalty=1.2, min_new_tokens=4, stop_strings=["\n"]))
    assert defaults.params(9) == SamplingParams(9, repetition_penalty=1.2, min_tokens=4, stop=("\n",))
    own = {"repetition_penalty": 1.0, "min_tokens": 0, "stop": [], "seed": 3, "stop_token_ids": [7], "logprobs": 0}
    assert defaults.params(9, **own) == SamplingParams(9, seed=3, stop_token_ids=(7,), logprobs=0)
    assert defaults.params(9, temperature=None, seed=None) == defaults.params(9)
    assert defaults.params(2).min_tokens == 2, "a minimum of the bundle's is no reason to refuse a short answer"
    with pytest.raises(InvalidRequest, match="min_tokens"):
        defaults.params(2, min_tokens=3)


def test_stop_strings_of_a_bundle_hold_where_a_request_gives_none() -> None:
    for given in ("\n", ["\n"]):
        defaults = DecodingDefaults.of(GenerationConfig(stop_strings=given))
        assert defaults.params(5) == SamplingParams(5, stop=("\n",))
        assert defaults.params(5, stop=["a", "b"]).stop == ("a", "b")
        assert defaults.params(5, stop=[]).stop == ()


def test_settings_that_continuous_batching_cannot_do_come_along() -> None:
    tuned = {"no_repeat_ngram_size": 3, "num_beams": 4, "length_penalty": 0.5, "suppress_tokens": [3]}
    defaults = DecodingDefaults.of(GenerationConfig(**tuned))
    assert defaults.params(5) == SamplingParams(5, extra=tuned)
    assert defaults.params(7, temperature=0, top_k=3) == SamplingParams(7, temperature=0, top_k=3, extra=tuned)
    neutral = {"no_repeat_ngram_size": 0, "num_beams": 1, "typical_p": 1.0}
    assert DecodingDefaults.of(GenerationConfig(**neutral, stop_strings=[])).extra == {}
    assert DecodingDefaults.of(GenerationConfig(length_penalty=2.0, early_stopping=True)).extra == {}, "without beams"


def test_a_request_may_bring_settings_of_generate() -> None:
    plain = DecodingDefaults.of(GenerationConfig())
    asked = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True, "no_repeat_ngram_size": 2}
    assert plain.params(5, **asked, sequences=3) == SamplingParams(5, sequences=3, extra=asked)
    neutral = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False, "typical_p": 1.0}
    assert plain.params(5, **neutral, no_repeat_ngram_size=0) == SamplingParams(5)
    assert plain.params(5, temperature=1.0, typical_p=0.5).extra == {"typical_p": 0.5}
    assert plain.params(5, typical_p=0.5).extra == {}, "greedy decoding has no use for it"
    with pytest.raises(InvalidRequest, match="needs `num_beams`") as caught:
        plain.params(5, length_penalty=2.0)
    assert caught.value.param == "length_penalty"


def test_a_request_may_switch_off_what_the_bundle_asks_for() -> None:
    tuned = DecodingDefaults.of(GenerationConfig(num_beams=4, length_penalty=0.5, no_repeat_ngram_size=3))
    assert tuned.params(5, num_beams=1).extra == {"no_repeat_ngram_size": 3}
    assert tuned.params(5, num_beams=1, no_repeat_ngram_size=0) == SamplingParams(5)
    assert tuned.params(5, length_penalty=1.0).extra == {"num_beams": 4, "no_repeat_ngram_size": 3}


def test_what_only_sampling_heeds_is_off_when_greedy() -> None:
    sampled = DecodingDefaults.of(GenerationConfig(do_sample=True, temperature=0.8, typical_p=0.9, suppress_tokens=[3]))
    assert sampled.params(5).extra == {"typical_p": 0.9, "suppress_tokens": [3]}
    assert sampled.params(5, temperature=0).extra == {"suppress_tokens": [3]}
    greedy = DecodingDefaults.of(GenerationConfig(typical_p=0.9))
    assert greedy.params(5) == SamplingParams(5)
    assert greedy.params(5, temperature=0.5).extra == {"typical_p": 0.9}


def test_a_temperature_on_a_bundle_tuned_for_beams_samples_without_beams() -> None:
    defaults = DecodingDefaults.of(GenerationConfig(num_beams=4, length_penalty=0.5, no_repeat_ngram_size=2))
    assert defaults.params(5, temperature=0.5) == SamplingParams(5, temperature=0.5, extra={"no_repeat_ngram_size": 2})
    assert defaults.params(5, temperature=0.5, num_beams=2).extra == {"num_beams": 2, "no_repeat_ngram_size": 2}
    both = DecodingDefaults.of(GenerationConfig(num_beams=4, do_sample=True, temperature=0.8))
    assert both.params(5).extra == {"num_beams": 4}
    assert both.params(5, temperature=0.3).extra == {"num_beams": 4}
    assert both.params(5, temperature=0).extra == {"num_beams": 4}


@pytest.mark.parametrize("asked", [{"logprobs": 0}, {"presence_penalty": 1.0}, {"frequency_penalty": -1.0}])
def test_what_cannot_be_had_together_is_refused_by_name(asked: dict[str, Any]) -> None:
    defaults = DecodingDefaults.of(GenerationConfig(no_repeat_ngram_size=2))
    for settings in ({}, {"num_beams": 3}):
        with pytest.raises(InvalidRequest, match=f"together with `{next(iter(settings), 'no_repeat')}") as caught:
            defaults.params(5, **asked, **settings)
        assert caught.value.param == next(iter(asked))
    assert defaults.params(5, **asked, no_repeat_ngram_size=0) == SamplingParams(5, **asked)


def test_more_completions_than_beams_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="num_beams") as caught:
        SamplingParams(5, sequences=4, extra={"num_beams": 3})
    assert caught.value.param == "n"


@pytest.mark.parametrize(
    "setting", [{"penalty_alpha": 0.6}, {"num_beam_groups": 2}, {"guidance_scale": 1.5}, {"max_time": 3.0}]
)
def test_a_bundle_tuned_for_what_cannot_be_done_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(setting))):
        DecodingDefaults.of(GenerationConfig(**setting))


@pytest.mark.parametrize(
    "setting", [{"do_sample": True, "top_k": 2.5}, {"stop_strings": [""]}, {"repetition_penalty": 0.0}]
)
def test_a_bundle_with_a_wrong_value_is_refused_at_once(setting: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        DecodingDefaults.of(GenerationConfig(**setting))


def test_the_defaults_in_force_are_told_with_where_they_come_from() -> None:
    built_in = DecodingDefaults.of(GenerationConfig()).in_force()
    assert {origin for _, origin in built_in.values()} == {BUILT_IN}
    assert built_in["temperature"] == Default(0.0, BUILT_IN)
    assert built_in["num_beams"] == Default(1, BUILT_IN)
    tuned = DecodingDefaults.of(
        GenerationConfig(do_sample=True, temperature=0.7, num_beams=3, max_new_tokens=64, stop_strings="x")
    ).in_force()
    assert {name: default.value for name, default in tuned.items() if default.origin == FILE} == {
        "temperature": 0.7,
        "num_beams": 3,
        "max_tokens": 64,
        "stop": ("x",),
    }
    assert tuned["top_k"] == Default(50, BUILT_IN)
    greedy = DecodingDefaults.of(GenerationConfig(do_sample=False, temperature=0.7, top_k=5)).in_force()
    assert greedy["temperature"] == Default(0.0, FILE), "do_sample: false in the file is what makes it greedy"
    assert greedy["top_k"] == Default(0, BUILT_IN)
