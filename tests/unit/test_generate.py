"""Batched generation gives every prompt what it would get alone, and never runs over the model's positions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from heliostat.errors import DataError
from heliostat.evaluation.config import GenerationSettings
from heliostat.evaluation.generate import batches, decode, generate, generation_config
from heliostat.models import base
from tests import tiny

END, PAD, POSITIONS = 0, 1, 128


TOKENIZER = tiny.tokenizer()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tiny.write_model(tmp_path_factory.mktemp("generate") / "model", request.param)
    return base.load_for_inference(str(folder)).model


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in lengths]


def greedy(max_new_tokens: int | None = 12, **settings: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=END, **settings)


def alone(model: Any, prompt: list[int], config: GenerationConfig, **options: Any) -> list[int]:
    """transformers' own generation of one prompt, without padding."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig.from_dict({**config.to_dict(), "pad_token_id": PAD}),
            **options,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def until(tokens: list[int], ends: set[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)


def run(model: Any, given: list[list[int]], config: GenerationConfig, **options: Any) -> list[list[int]]:
    return generate(model, given, config=config, pad_token_id=PAD, **{"batch_size": 4, **options})


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_batch_gives_what_each_prompt_gives_alone(model: Any, batch_size: int) -> None:
    given = prompts(3, 40, 1, 17, 9, 9, 64, 2)
    expected = [until(alone(model, prompt, greedy()), {END}) for prompt in given]
    assert len({tuple(tokens) for tokens in expected}) >= 6, "the prompts have different answers"
    assert run(model, given, greedy(), batch_size=batch_size) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": -2.0, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_every_way_of_decoding_gives_what_each_prompt_gives_alone(model: Any, settings: dict[str, Any]) -> None:
    """The padding counts as no repetition, and each beam goes back to its prompt."""
    given = [tokens + tokens[:2] for tokens in prompts(3, 20, 2, 17, 9, 9, 31)]
    config = greedy(8, **settings)
    expected = [until(alone(model, prompt, config), {END}) for prompt in given]
    assert expected != [until(alone(model, prompt, greedy(8)), {END}) for prompt in given], "the setting matters"
    # PAD is what the untrained model would repeat, were it not for the penalty; its own end token is most telling.
    for pad in (PAD, END, expected[0][0]):
        assert generate(model, given, config=config, pad_token_id=pad, batch_size=16) == expected


def test_where_ngrams_must_not_repeat_no_prompt_is_padded(model: Any) -> None:
    given = prompts(3, 4, 3, 4, 3)
    assert [batch.prompts for batch in batches(model, given, greedy(), 4)] == [[0, 2, 4, 1], [3]]
    assert [batch.prompts for batch in batches(model, given, greedy(no_repeat_ngram_size=2), 4)] == [[0, 2, 4], [1, 3]]


def test_one_answer_a_prompt_whatever_the_model_says(model: Any) -> None:
    config = greedy(4, num_beams=2, num_return_sequences=2)
    assert len(run(model, prompts(3, 4, 5), config)) == 3


def stopped(tokens: list[int], stop: str) -> list[int]:
    """The tokens up to the one that completes the stop string."""
    ends = (end for end in range(1, len(tokens) + 1) if stop in TOKENIZER.decode(tokens[:end]))
    return tokens[: next(ends, len(tokens))]


@pytest.mark.parametrize("end", [None, END])
def test_stop_strings_end_an_answer_in_the_midst_of_a_batch(model: Any, end: int | None) -> None:
    given = prompts(3, 20, 7, 17, 9)
    free = [alone(model, prompt, GenerationConfig(max_new_tokens=12, do_sample=False)) for prompt in given]
    # In all of the answer but its start: a part of a character is no string.
    stop = next(text for text in map(TOKENIZER.decode, free[0][2:]) if text.isascii())
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=end, stop_strings=[stop])
    outputs = run(model, given, config, tokenizer=TOKENIZER)
    texts = decode(TOKENIZER, outputs, config)
    ends = {END} if end is not None else set()
    whole = TOKENIZER.batch_decode([until(tokens, ends) for tokens in free], skip_special_tokens=True)
    assert texts == [text.split(stop)[0] for text in whole]
    assert texts[0] != whole[0]
    if end is not None:
        assert outputs == [until(stopped(tokens, stop), ends) for tokens in free]


def test_decoding_cuts_at_the_first_stop_string_of_all() -> None:
    ids = TOKENIZER("the red cat goes home")["input_ids"] + [END]
    for stops, expected in [
        (None, "the red cat goes home"),
        (["zebra"], "the red cat goes home"),
        (["goes", " cat"], "the red"),
        ("go", "the red cat "),
        (["the"], ""),
    ]:
        assert decode(TOKENIZER, [ids], GenerationConfig(stop_strings=stops)) == [expected]


def test_the_end_token_and_what_follows_are_cut(model: Any) -> None:
    """Every token in turn is made the end: what comes back stops right before it, in the midst of a batch."""
    given = prompts(5, 11)
    free = [alone(model, prompt, GenerationConfig(max_new_tokens=8, do_sample=False)) for prompt in given]
    for index in range(8):
        ends = [free[0][index], free[1][index]]
        config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=ends)
        assert run(model, given, config) == [until(tokens, set(ends)) for tokens in free]


def test_no_end_token_means_all_the_tokens(model: Any) -> None:
    (tokens,) = run(model, prompts(4), GenerationConfig(max_new_tokens=9, do_sample=False))
    assert len(tokens) == 9


def test_near_the_last_position_answers_get_shorter_and_nothing_else(model: Any) -> None:
    """Prompts of one batch do not shorten each other's answers."""
    given = prompts(127, 5, 126, 120, 120, 116, 117, 60)
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    found = run(model, given, config)
    assert [len(tokens) for tokens in found] == [1, 12, 2, 8, 8, 12, 11, 12]
    for prompt, tokens in zip(given, found, strict=True):
        fitting = GenerationConfig(max_new_tokens=min(12, POSITIONS - len(prompt)), do_sample=False)
        assert tokens == alone(model, prompt, fitting)


@pytest.mark.parametrize("length", [POSITIONS, POSITIONS + 1, 500])
def test_a_prompt_that_fills_the_positions_is_refused(model: Any, length: int) -> None:
    with pytest.raises(
        DataError, match=rf"prompt 2 of 2 has {length} tokens, which leaves none of the model's 128 pos"
    ):
        run(model, prompts(3, length), greedy())


def test_a_prompt_without_tokens_is_refused(model: Any) -> None:
    with pytest.raises(DataError, match="prompt 1 of 2 has no token to go on from"):
        run(model, [[], [5]], greedy())


def test_no_prompts_are_no_work(model: Any) -> None:
    assert run(model, [], greedy()) == []


def test_progress_is_told_as_it_comes(model: Any) -> None:
    done: list[int] = []
    run(model, prompts(*range(1, 8)), greedy(1), batch_size=3, advance=done.append)
    assert done == [3, 3, 1]


def test_sampling_follows_from_the_seed(model: Any) -> None:
    config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=1.5)
    given = prompts(5, 6)

    def sampled(seed: int) -> list[list[int]]:
        torch.rand(3)
        return run(model, given, config, seed=seed)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_without_a_limit_the_settings_default_holds(model: Any) -> None:
    (tokens,) = run(model, prompts(4), GenerationConfig(do_sample=False))
    assert len(tokens) == GenerationSettings().max_new_tokens == 64


def test_the_callers_configuration_is_not_changed(model: Any) -> None:
    config = greedy(100)
    before = config.to_dict()
    run(model, prompts(100), config)
    assert config.to_dict() == before


class Model:
    """What `generation_config` looks at."""

    def __init__(self, **defaults: Any) -> None:
        self.generation_config = GenerationConfig(**defaults)


def test_settings_go_over_the_models_own_defaults() -> None:
    model = Model(
        max_new_tokens=5, do_sample=True, temperature=0.3, top_k=7, repetition_penalty=1.2, eos_token_id=[0, 9]
    )
    own = generation_config(model, None)
    assert (own.max_new_tokens, own.do_sample, own.temperature, own.top_k) == (5, True, 0.3, 7)
    changed = generation_config(model, GenerationSettings(max_new_tokens=9, do_sample=True, top_p=0.5))
    assert (changed.max_new_tokens, changed.temperature, changed.top_k, changed.top_p) == (9, 0.3, 7, 0.5)
    assert (changed.repetition_penalty, changed.eos_token_id) == (1.2, [0, 9])
    assert model.generation_config.max_new_tokens == 5


def test_greedy_settings_drop_what_only_sampling_has() -> None:
    model = Model(do_sample=True, temperature=0.3, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    made = generation_config(model, GenerationSettings(do_sample=False))
    assert (made.do_sample, made.temperature, made.top_k, made.top_p, made.min_p) == (False, None, None, None, None)
    assert made.repetition_penalty == 1.2
    made.validate(strict=True)
