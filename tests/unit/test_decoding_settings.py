"""A point of a decoding search means what transformers will make of it, and is refused where it cannot be meant."""

from typing import Any

import pytest
from transformers import GenerationConfig

from heliostat.data import formats
from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import ConfigError, ModelError
from heliostat.evaluation.config import GenerationSettings
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.tuning import decoding_settings
from heliostat.tuning.decoding_settings import Setting

DEFAULTS = GenerationSettings(max_new_tokens=12, repetition_penalty=1.2, stop_strings=["\n"])
SHOTS = (("one ->", " 1"), ("two ->", " 2"), ("three ->", " 3"))
PAIRS = DataConfig(format="prompt_completion", prompt_template="{prompt} ->")
CHATS = DataConfig(format="chat")


def setting(**point: Any) -> Setting:
    return decoding_settings.of_point(point, DEFAULTS, SHOTS)


def chat(*texts: str) -> Row:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return Row({"messages": messages}, "chats.jsonl:1")


def test_a_point_goes_on_top_of_the_generation_section() -> None:
    found = setting(do_sample=True, temperature=0.7, system_prompt="Be brief.", few_shot=2)
    assert found.generation == DEFAULTS.model_copy(update={"do_sample": True, "temperature": 0.7})
    assert found.prefix == PromptPrefix("Be brief.", SHOTS[:2])
    assert setting(few_shot=[["a", "b"]]).prefix == PromptPrefix(None, (("a", "b"),))
    assert setting().prefix == PromptPrefix()


def test_only_what_matters_is_told() -> None:
    """Neutral values, and settings of sampling or beams where there is none, make no difference."""
    given = setting(temperature=0.7, top_p=0.9, num_beams=1, length_penalty=0.5, no_repeat_ngram_size=0)
    assert given.decoding() == {
        "max_new_tokens": 12,
        "do_sample": False,
        "repetition_penalty": 1.2,
        "stop_strings": ["\n"],
    }
    assert given.same_as(setting())
    sampling = setting(do_sample=True, temperature=1.0, top_k=50, top_p=0.9, num_beams=2, length_penalty=0.5)
    assert sampling.decoding() | setting().decoding() == {
        **setting().decoding(), "top_p": 0.9, "num_beams": 2, "length_penalty": 0.5,
    }  # fmt: skip
    assert sampling.decoding()["do_sample"] is True
    assert not sampling.same_as(setting(do_sample=True))
    assert not setting().same_as(setting(few_shot=1))


def test_neutral_values_are_those_of_transformers() -> None:
    standard = GenerationConfig._get_default_generation_params()
    known = {key: value for key, value in decoding_settings._NEUTRAL.items() if standard.get(key) is not None}
    assert known == {key: standard[key] for key in known}
    assert {"temperature", "top_k", "top_p", "num_beams", "repetition_penalty"} <= known.keys()


def test_the_models_own_file_keeps_what_no_search_knows() -> None:
    own = {"eos_token_id": [0, 5], "pad_token_id": 1, "suppress_tokens": [3], "temperature": 1.5, "do_sample": True}
    found = setting(repetition_penalty=None, stop_strings=None).generation_config(own)
    assert found == {
        "eos_token_id": [0, 5], "pad_token_id": 1, "suppress_tokens": [3], "max_new_tokens": 12, "do_sample": False,
    }  # fmt: skip


def test_greedy_is_free_of_penalties_and_prefixes_but_keeps_length_and_stops() -> None:
    greedy = setting(**decoding_settings.greedy_point(DEFAULTS))
    assert greedy.decoding() == {"max_new_tokens": 12, "do_sample": False, "stop_strings": ["\n"]}
    assert greedy.prefix == PromptPrefix()


def test_the_bundles_own_settings_are_a_point() -> None:
    prefix = PromptPrefix("Be brief.", SHOTS[:1])
    point = decoding_settings.own_point(
        {"do_sample": True, "temperature": 1.5, "eos_token_id": 0}, prefix, DEFAULTS, "x"
    )
    own = setting(**point)
    assert own.decoding() == {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5}
    assert own.prefix == prefix
    with pytest.raises(ModelError, match=r"^x: temperature: "):
        decoding_settings.own_point({"temperature": -1.0}, prefix, DEFAULTS, "x")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"temprature": [1]}, "did you mean `temperature`"),
        ({"temperature": {"uniform": [0, 1]}}, r"tune_decoding\.space\.temperature: 0\.0 is not allowed"),
        ({"top_p": {"uniform": [0.5, 1.5]}}, r"space\.top_p: 1\.5 is not allowed"),
        ({"top_p": [0.5, 2]}, r"space\.top_p: 2 is not allowed"),
        ({"num_beams": {"randint": [0, 4]}}, r"space\.num_beams: 0 is not allowed"),
        ({"num_beams": {"uniform": [1, 4]}}, r"space\.num_beams: 1\.95\d* is not allowed: .*integer"),
        ({"do_sample": {"uniform": [0, 1]}}, r"space\.do_sample: 0\.3\d* is not allowed: .*boolean"),
        ({"system_prompt": ["a", 3]}, r"space\.system_prompt: 3 is not a text or null"),
        ({"few_shot": [0, -1]}, r"space\.few_shot: -1 is neither a count"),
        ({"few_shot": [True]}, r"space\.few_shot: True is neither"),
        ({"few_shot": [[["only a prompt"]]]}, r"space\.few_shot: .* is neither"),
        ({"few_shot": {"uniform": [0, 4]}}, r"space\.few_shot: 0\.0 is neither"),
    ],
)
def test_values_that_cannot_be_are_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decoding_settings.parse_space(space, DEFAULTS)


def test_every_key_can_be_searched() -> None:
    space = {
        "do_sample": [True, False], "temperature": {"uniform": [0.1, 1.5], "when": {"do_sample": True}},
        "top_k": [0, 50], "top_p": {"uniform": [0.5, 1]}, "min_p": [0.0, 0.1],
        "typical_p": [0.5, 1.0], "num_beams": {"randint": [1, 5]},
        "repetition_penalty": {"loguniform": [1, 2]}, "no_repeat_ngram_size": [0, 3], "length_penalty": [-1.0, 1.0],
        "stop_strings": [None, ["\n"]], "max_new_tokens": [8, 16], "system_prompt": [None, "Be brief."],
        "few_shot": [0, 2, [["a", "b"]]],
    }  # fmt: skip
    found = decoding_settings.parse_space(space, DEFAULTS)
    assert {parameter.key for parameter in found.parameters} == set(decoding_settings.KEYS)
    assert decoding_settings.most_shots(found) == 2
    for _, _, point in found.extremes():
        assert setting(**point).decoding()


def test_questions_of_pairs() -> None:
    row = Row({"prompt": "two", "completion": " 2"}, "rows.jsonl:1")
    assert decoding_settings.question_of(row, PAIRS) == "two ->"
    assert formats.reference_of(row, PAIRS) == " 2"


def test_questions_of_chats() -> None:
    """All before the last answer is the question."""
    row = chat("Be nice.", "hello", "hi", "how are you?", "well")
    assert formats.reference_of(row, CHATS) == "well"
    other = chat("Be rude.", "hello", "hi", "how are you?", "well")
    assert decoding_settings.question_of(row, CHATS) != decoding_settings.question_of(other, CHATS)
    same = chat("Be nice.", "hello", "hi", "how are you?", "badly")
    assert decoding_settings.question_of(row, CHATS) == decoding_settings.question_of(same, CHATS)
