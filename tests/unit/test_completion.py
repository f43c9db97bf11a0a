"""A prompt from the command line reaches the model in the form it was trained on."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heliostat.data.config import DataConfig
from heliostat.data.formats import chat_template, prompt_of
from heliostat.data.records import Row
from heliostat.data.tokens import DocumentEncoder
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation import completion
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.models import base
from heliostat.models.base import InferenceModel
from tests import tiny


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    folder: Path = tiny.write_model(tmp_path_factory.mktemp("completion") / "model", "gpt2")
    return base.load_for_inference(str(folder))


def trained_as(loaded: InferenceModel, **manifest: Any) -> InferenceModel:
    return replace(loaded, manifest={"prompt_template": None, **manifest})


def prompt_in_training(loaded: InferenceModel, data: DataConfig, fields: dict[str, Any]) -> list[int]:
    row = Row(fields, "x:1")
    text, _ = prompt_of(row, data, chat_template(loaded.tokenizer, data))
    (ids,) = DocumentEncoder(loaded.tokenizer, data).prompts([text])
    return ids


@pytest.mark.parametrize("template", [None, "{prompt}\n", "Q: {prompt} A:"])
def test_prompts_are_tokenised_as_in_training(loaded: InferenceModel, template: str | None) -> None:
    data = DataConfig(format="prompt_completion", prompt_template=template)
    expected = prompt_in_training(loaded, data, {"prompt": "the red cat", "completion": "x"})
    asked = trained_as(loaded, format="prompt_completion", prompt_template=template)
    assert completion.encode_prompt(asked, "the red cat") == expected


def test_chats_are_tokenised_as_in_training(loaded: InferenceModel) -> None:
    messages = [{"role": "user", "content": "the red cat"}, {"role": "assistant", "content": "x"}]
    expected = prompt_in_training(loaded, DataConfig(format="chat"), {"messages": messages})
    assert completion.encode_prompt(trained_as(loaded, format="chat"), "the red cat") == expected
    assert completion.encode_prompt(loaded, "the red cat") == expected, "a model with a template that is no bundle"
    plain = trained_as(loaded, format="prompt_completion")
    assert completion.encode_prompt(plain, "the red cat") != expected


def test_text_that_looks_like_a_special_token_stays_text(loaded: InferenceModel) -> None:
    ids = completion.encode_prompt(trained_as(loaded, format="text"), "a<|endoftext|>b")
    assert loaded.tokenizer.eos_token_id not in ids
    assert loaded.tokenizer.decode(ids) == "a<|endoftext|>b"


def test_an_empty_prompt_is_refused(loaded: InferenceModel) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        completion.encode_prompt(trained_as(loaded, format="text"), "")


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        (None, "x{y}"),
        ("{prompt}\n", "x{y}\n"),
        ("{{literal}} {text}:", "{literal} x{y}:"),
        ("{a} and {b}", "x{y}"),
        ("no gap", "x{y}"),
    ],
)
def test_a_template_with_one_gap_is_filled(template: str | None, filled: str) -> None:
    assert completion.fill(template, "x{y}") == filled


def test_answers_come_in_order_by_the_models_defaults_and_settings_over_them(loaded: InferenceModel) -> None:
    model = copy.deepcopy(loaded.model)
    model.generation_config.max_new_tokens = 3
    asked = replace(trained_as(loaded, format="text"), model=model)
    prompts = ["the red cat goes to the house", "old", "the big dog goes"]
    outputs = completion.complete(asked, prompts, {}, batch_size=2)
    assert outputs == [completion.complete(asked, [prompt], {})[0] for prompt in prompts]
    longer = completion.complete(asked, prompts, {"max_new_tokens": 6})
    assert all(whole.startswith(start) for start, whole in zip(outputs, longer, strict=True))
    counts = [len(loaded.tokenizer(text)["input_ids"]) for text in longer]
    assert max(counts) > 3


def test_a_prompt_longer_than_the_model_is_refused(loaded: InferenceModel) -> None:
    with pytest.raises(DataError, match=r"leaves none of the model's 128 positions for an answer"):
        completion.complete(trained_as(loaded, format="text"), ["the red cat " * 100], {})


PREFIX = PromptPrefix("Be brief.", (("one?", " two"), ("three?", " four")))


def test_the_bundles_prefix_comes_before_prompts(loaded: InferenceModel) -> None:
    plain = trained_as(
        loaded, format="prompt_completion", prompt_template="Q: {prompt} A:", prompt_prefix=PREFIX.manifest()
    )
    ids = completion.encode_prompt(plain, "five?")
    assert loaded.tokenizer.decode(ids) == "Be brief.\n\none? two\n\nthree? four\n\nQ: five? A:"
    chat = trained_as(loaded, format="chat", prompt_prefix=PREFIX.manifest())
    messages = [{"role": "system", "content": "Be brief."}]
    for prompt, answer in PREFIX.few_shot:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": "five?"}]
    expected = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert completion.encode_prompt(chat, "five?") == expected


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_an_empty_prefix_changes_nothing(loaded: InferenceModel, kind: str) -> None:
    empty = trained_as(loaded, format=kind, prompt_prefix=PromptPrefix().manifest())
    assert completion.encode_prompt(empty, "five?") == completion.encode_prompt(
        trained_as(loaded, format=kind), "five?"
    )


def test_a_stop_string_of_the_bundle_cuts_the_answer(loaded: InferenceModel) -> None:
    whole = completion.complete(trained_as(loaded, format="text"), ["the red cat"], {"max_new_tokens": 20})[0]
    stop = whole[len(whole) // 2 :][:2]
    model = copy.deepcopy(loaded.model)
    model.generation_config.update(max_new_tokens=20, stop_strings=[stop])
    stopping = replace(trained_as(loaded, format="text"), model=model)
    assert completion.complete(stopping, ["the red cat"], {}) == [whole[: whole.index(stop)]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "top_k": 50},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_what_is_streamed_is_what_comes_in_one_piece(loaded: InferenceModel, settings: dict[str, Any]) -> None:
    asked = trained_as(loaded, format="text")
    pieces: list[str] = []
    settings = {"max_new_tokens": 24, **settings}
    streamed = completion.stream(asked, "the red cat", settings, pieces.append, seed=3)
    (whole,) = completion.complete(asked, ["the red cat"], settings, seed=3)
    assert "".join(pieces) == streamed == whole
    assert len(pieces) > 1


def test_no_part_of_a_stop_string_is_streamed(loaded: InferenceModel) -> None:
    asked = trained_as(loaded, format="text")
    (text,) = completion.complete(asked, ["the red cat"], {"max_new_tokens": 24})
    for stop in (text[3:5], text[5:12], text[-2:], "never"):
        settings = {"max_new_tokens": 24, "stop_strings": ["another", stop]}
        pieces: list[str] = []
        streamed = completion.stream(asked, "the red cat", settings, pieces.append)
        assert "".join(pieces) == streamed == text.split(stop)[0]


def test_beams_cannot_be_streamed(loaded: InferenceModel) -> None:
    with pytest.raises(ConfigError, match="num_beams=2 cannot be streamed"):
        completion.stream(loaded, "x", {"num_beams": 2}, print)
