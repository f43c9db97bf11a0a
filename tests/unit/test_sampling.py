"""The sampler keeps exactly the tokens that transformers' warpers keep; greedy is argmax; bad rows hurt nobody."""

from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from heliostat.errors import ModelError
from heliostat.serving.sampling import DecodingDefaults, InvalidRequest, Sampler, SamplingParams

VOCABULARY = 50


def settings(*rows: SamplingParams) -> torch.Tensor:
    """Settings of several requests in the form that the generation loop stores them."""
    kwargs = [row.row(VOCABULARY) for row in rows]
    temperature, top_k, top_p = ([row[name] for row in kwargs] for name in ("temperature", "top_k", "top_p"))
    return torch.stack(
        [
            torch.tensor(temperature, dtype=torch.float32).view(torch.int32),
            torch.tensor(top_k, dtype=torch.int32),
            torch.tensor(top_p, dtype=torch.float32).view(torch.int32),
        ]
    )


def sampled(scores: torch.Tensor, *rows: SamplingParams) -> torch.Tensor:
    """The distributions that the sampler makes of `scores`."""
    return Sampler()(torch.empty(0), scores, settings(*rows)).softmax(dim=-1)


CUTS = [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.3, 7, 1.0), (1.0, 0, 0.6), (0.8, 10, 0.9), (1.0, 49, 0.05), (2.0, 2, 0.999)]


def test_equals_the_warpers_of_transformers_row_by_row() -> None:
    scores = torch.randn(len(CUTS), VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    rows = [SamplingParams(1, temperature=t, top_k=k, top_p=p) for t, k, p in CUTS]
    together = sampled(scores, *rows)
    for row, (temperature, top_k, top_p) in enumerate(CUTS):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        expected = warpers(torch.empty(0), scores[row : row + 1]).softmax(dim=-1)[0]
        assert torch.allclose(together[row], expected, atol=1e-6), CUTS[row]


def test_greedy_takes_the_first_of_equal_scores_as_argmax_does() -> None:
    scores = torch.zeros(2, VOCABULARY)
    scores[:, [7, 11, 30]] = 5.0
    mixed = sampled(scores, SamplingParams(1), SamplingParams(1, temperature=1.0))
    assert mixed[0].argmax() == 7
    assert mixed[0, 7] == 1.0
    assert torch.equal(mixed[1, [7, 11, 30]], mixed[1, [7, 7, 7]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_broken_scores_spoils_no_other(bad: float) -> None:
    scores = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(1))
    scores[0, 3] = bad
    warm = SamplingParams(1, temperature=0.7, top_k=5, top_p=0.9)
    both = sampled(scores, warm, warm)
    assert both.isfinite().all()
    assert torch.allclose(both.sum(dim=-1), torch.ones(2))
    assert torch.allclose(both[1], sampled(scores[1:], warm)[0])


def test_a_vanishing_temperature_is_greedy_not_an_error() -> None:
    scores = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 100
    cold = sampled(scores, SamplingParams(1, temperature=1e-300), SamplingParams(1, temperature=1e-30))
    assert torch.equal(cold.argmax(dim=-1), scores.argmax(dim=-1))
    assert torch.allclose(cold.amax(dim=-1), torch.ones(2))


def test_rows_without_settings_are_greedy() -> None:
    """The loop also samples for prompts that are not read to their end, and throws the token away."""
    storage = torch.full((3, 4), -1, dtype=torch.int32)
    Sampler().fill_defaults(storage)
    scores = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(3))
    distribution = Sampler()(torch.empty(0), scores, storage).softmax(dim=-1)
    assert torch.equal(distribution.argmax(dim=-1), scores.argmax(dim=-1))


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *[("max_tokens", value) for value in (0, -1, 1.5, True, "3")],
        *[("temperature", value) for value in (-0.1, float("nan"), float("inf"), "1", True)],
        *[("top_k", value) for value in (-1, 2.0, False)],
        *[("top_p", value) for value in (0, 1.1, float("nan"))],
        *[("stop", value) for value in (("",), (3,))],
    ],
)
def test_wrong_settings_are_refused_by_name(param: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{"max_tokens": 1, param: value})
    assert caught.value.param == param


def test_defaults_are_what_generate_would_use() -> None:
    greedy = DecodingDefaults.of(GenerationConfig(max_new_tokens=9))
    assert greedy == DecodingDefaults(temperature=0.0, top_k=0, top_p=1.0, max_tokens=9)
    tuned = DecodingDefaults.of(GenerationConfig(do_sample=True, temperature=0.7, top_k=0, top_p=0.9))
    assert tuned == DecodingDefaults(temperature=0.7, top_k=0, top_p=0.9, max_tokens=None)
    # transformers fills in top_k=50 where sampling is on and nothing is said.
    assert DecodingDefaults.of(GenerationConfig(do_sample=True)).top_k == 50


def test_stop_strings_of_a_bundle_hold_where_a_request_gives_none() -> None:
    for given in ("\n", ["\n"]):
        defaults = DecodingDefaults.of(GenerationConfig(stop_strings=given))
        assert defaults.params(5) == SamplingParams(5, stop=("\n",))
        assert defaults.params(5, stop=["a", "b"]).stop == ("a", "b")
        assert defaults.params(5, stop=[]).stop == ()


def test_settings_that_continuous_batching_cannot_do_come_along() -> None:
    tuned = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "num_beams": 4, "length_penalty": 0.5}
    defaults = DecodingDefaults.of(GenerationConfig(**tuned))
    assert defaults.params(5) == SamplingParams(5, extra=tuned)
    assert defaults.params(7, temperature=0, top_k=3) == SamplingParams(7, temperature=0, top_k=3, extra=tuned)
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_p": 0.0, "typical_p": 1.0}
    assert DecodingDefaults.of(GenerationConfig(**neutral, stop_strings=[])).extra == {}
    assert DecodingDefaults.of(GenerationConfig(length_penalty=2.0, early_stopping=True)).extra == {}, "without beams"


def test_what_only_sampling_heeds_is_off_when_greedy() -> None:
    sampled = DecodingDefaults.of(GenerationConfig(do_sample=True, temperature=0.8, min_p=0.1, repetition_penalty=1.2))
    assert sampled.params(5).extra == {"min_p": 0.1, "repetition_penalty": 1.2}
    assert sampled.params(5, temperature=0).extra == {"repetition_penalty": 1.2}
    greedy = DecodingDefaults.of(GenerationConfig(min_p=0.1, typical_p=0.9))
    assert greedy.params(5) == SamplingParams(5)
    assert greedy.params(5, temperature=0.5).extra == {"min_p": 0.1, "typical_p": 0.9}


def test_a_temperature_on_a_bundle_tuned_for_beams_samples_without_beams() -> None:
    defaults = DecodingDefaults.of(GenerationConfig(num_beams=4, length_penalty=0.5, repetition_penalty=1.2))
    assert defaults.params(5, temperature=0.5) == SamplingParams(5, temperature=0.5, extra={"repetition_penalty": 1.2})
    both = DecodingDefaults.of(GenerationConfig(num_beams=4, do_sample=True, temperature=0.8))
    assert both.params(5).extra == {"num_beams": 4}
    assert both.params(5, temperature=0.3).extra == {"num_beams": 4}
    assert both.params(5, temperature=0).extra == {"num_beams": 4}


@pytest.mark.parametrize(
    "setting", [{"penalty_alpha": 0.6}, {"num_beam_groups": 2}, {"guidance_scale": 1.5}, {"max_time": 3.0}]
)
def test_a_bundle_tuned_for_what_cannot_be_done_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(setting))):
        DecodingDefaults.of(GenerationConfig(**setting))


@pytest.mark.parametrize("setting", [{"do_sample": True, "top_k": 2.5}, {"stop_strings": [""]}])
def test_a_bundle_with_a_wrong_value_is_refused_at_once(setting: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        DecodingDefaults.of(GenerationConfig(**setting))
