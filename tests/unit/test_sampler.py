"""The sampler does to scores what transformers' processors do; seeds fix the tokens; bad rows hurt nobody."""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from heliostat.serving import sampler as sampler_module
from heliostat.serving.sampler import LOWEST, ROW, Row, Sampler, draw, likeliest, warp
from heliostat.serving.sampling import SamplingParams

VOCABULARY = 50
GRID = [(step + 0.5) / 2000 for step in range(2000)]


def random_scores(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def request(params: SamplingParams, prompt: Sequence[int], generated: Sequence[int] = (), **row: Any) -> RequestState:
    kwargs = {ROW: Row(params, len(prompt), **{"ends": [0], **row})}
    state = RequestState("id", initial_tokens=list(prompt), max_new_tokens=100, logit_processor_kwargs=kwargs)
    state.generated_tokens = list(generated)
    return state


def step(sampler: Sampler, states: Sequence[RequestState], scores: torch.Tensor) -> torch.Tensor:
    """One call as the generation loop makes it; the scores that it takes the argmax of."""
    batch = [FutureRequestState(state, True, {}, 1) for state in states]
    storage = torch.empty((0, 8), dtype=torch.int32)
    return sampler(torch.empty(0), scores.clone(), sampler.prepare_tensor_args(batch, storage))


def picked(states: Sequence[RequestState], scores: torch.Tensor) -> list[int]:
    tokens: list[int] = step(Sampler(), states, scores).argmax(dim=-1).tolist()
    return tokens


CUTS = [
    (1.0, 0, 1.0, 0.0),
    (0.5, 0, 1.0, 0.0),
    (1.3, 7, 1.0, 0.0),
    (1.0, 0, 0.6, 0.0),
    (0.8, 10, 0.9, 0.0),
    (1.0, 49, 0.05, 0.0),
    (2.0, 2, 0.999, 0.0),
    (1.0, 0, 1.0, 0.2),
    (1.5, 20, 0.95, 0.05),
    (0.7, 0, 1.0, 1.0),
]


@pytest.mark.parametrize("few", [1, 8, 256])
def test_warps_as_transformers_does_row_by_row(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(sampler_module, "_FEW", few)
    scores = random_scores(len(CUTS))
    rows = [SamplingParams(1, temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in CUTS]
    together = warp(scores, rows).softmax(dim=-1)
    # Together, one row that needs more makes all be sorted; alone, each goes its own way.
    assert torch.equal(
        together, torch.cat([warp(scores[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]).softmax(-1)
    )
    for row, (temperature, top_k, top_p, min_p) in enumerate(CUTS):
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        warpers += [MinPLogitsWarper(min_p)] if min_p else []
        expected = warpers(torch.empty(0), scores[row : row + 1]).softmax(dim=-1)[0]
        assert torch.equal(together[row] > 0, expected > 0), CUTS[row]
        assert torch.allclose(together[row], expected, atol=1e-6), CUTS[row]


def test_numbers_spread_evenly_draw_the_distribution() -> None:
    scores = random_scores(1, seed=4)
    params = [SamplingParams(1, temperature=1.2, top_k=12)] * len(GRID)
    counts = Counter(draw(scores.expand(len(GRID), -1), params, GRID).tolist())
    for token, probability in enumerate(warp(scores, params[:1]).softmax(dim=-1)[0].tolist()):
        assert counts[token] == pytest.approx(probability * len(GRID), abs=1.01)


def test_the_borders_of_the_numbers_give_tokens_that_can_be() -> None:
    scores = torch.full((2, VOCABULARY), -torch.inf)
    scores[:, [3, 9]] = 0.0
    warm = SamplingParams(1, temperature=1.0)
    assert draw(scores, [warm, warm], [0.0, 1 - 2**-48]).tolist() == [3, 9]


ADJUSTMENTS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6},
    {"logit_bias": {4: 7.5, 11: -100.0}},
    {"min_tokens": 7},
    {"min_tokens": 6},
    {"repetition_penalty": 1.3, "logit_bias": {5: 4.0}, "min_tokens": 20},
]


@pytest.mark.parametrize("adjustment", ADJUSTMENTS, ids=str)
def test_adjusts_as_transformers_does(adjustment: dict[str, Any]) -> None:
    prompt, generated = [5, 6, 7, 5], [8, 9, 9, 5, 11, 9]
    scores = random_scores(1, seed=5)
    scores[0, 0] = 20.0  # the end token, unless it is not allowed yet
    ids = torch.tensor([prompt + generated])
    theirs = LogitsProcessorList()
    if "logit_bias" in adjustment:
        theirs.append(SequenceBiasLogitsProcessor([[[i], float(b)] for i, b in adjustment["logit_bias"].items()]))
    if "repetition_penalty" in adjustment:
        theirs.append(RepetitionPenaltyLogitsProcessor(adjustment["repetition_penalty"]))
    if "min_tokens" in adjustment:
        theirs.append(MinNewTokensLengthLogitsProcessor(len(prompt), adjustment["min_tokens"], 0))
    got = step(Sampler(), [request(SamplingParams(30, **adjustment), prompt, generated)], scores)
    assert torch.equal(got, theirs(ids, scores.clone()))


def test_presence_and_frequency_count_what_was_generated_and_not_the_prompt() -> None:
    scores = random_scores(1, seed=6)
    state = request(SamplingParams(30, presence_penalty=0.5, frequency_penalty=0.25), [5, 6, 7], [7, 8, 8])
    expected = scores.clone()
    expected[0, 7] -= 0.5 + 0.25
    expected[0, 8] -= 0.5 + 2 * 0.25
    assert torch.equal(step(Sampler(), [state], scores), expected)


def test_the_history_is_true_from_step_to_step_and_when_a_request_loses_its_cache() -> None:
    settings = SamplingParams(30, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=-0.5)
    scores = random_scores(1, seed=7)
    sampler, state = Sampler(), request(settings, [5, 6], [])
    for token in [9, 9, 5, 11]:
        step(sampler, [state], scores)
        state.generated_tokens.append(token)
    afresh = request(settings, [5, 6], [9, 9, 5, 11])
    assert torch.equal(step(sampler, [state], scores), step(Sampler(), [afresh], scores))
    moved = state.create_equivalent_initial_request()
    assert moved.initial_tokens == [5, 6, 9, 9, 5, 11]
    assert torch.equal(step(sampler, [moved], scores), step(Sampler(), [afresh], scores))
    moved.generated_tokens.append(30)
    longer = request(settings, [5, 6], [9, 9, 5, 11, 30])
    assert torch.equal(step(sampler, [moved], scores), step(Sampler(), [longer], scores))


def test_rows_that_ask_for_nothing_are_left_as_they_are() -> None:
    scores = random_scores(3, seed=8)
    scores[0, [7, 11]] = 50.0
    plain = request(SamplingParams(9), [5])
    assert torch.equal(step(Sampler(), [plain, plain], scores), scores)
    mixed = step(Sampler(), [plain, request(SamplingParams(9, temperature=1.0), [5])], scores)
    assert torch.equal(mixed[[0, 2]], scores[[0, 2]])
    assert mixed[0].argmax() == 7, "the first of equals, as in `generate`"


def test_a_seed_fixes_the_tokens_whoever_else_is_in_the_batch() -> None:
    scores = random_scores(1, seed=9).expand(40, -1)
    seeded = SamplingParams(99, temperature=1.5, seed=-3)

    def at(position: int, others: int = 0) -> int:
        states = [request(SamplingParams(9, temperature=1.0), [5]) for _ in range(others)]
        states.append(request(seeded, [5, 6], [1] * position))
        return picked(states, scores[: len(states)])[-1]

    alone = [at(position) for position in range(40)]
    assert alone == [at(position, others=3) for position in range(40)]
    assert len(set(alone)) > 5, "each position has a number of its own"
    other = SamplingParams(99, temperature=1.5, seed=4)
    assert alone != picked([request(other, [5, 6], [1] * position) for position in range(40)], scores)


def test_without_a_seed_tokens_differ() -> None:
    warm = request(SamplingParams(9, temperature=1.5), [5])
    scores = random_scores(1, seed=9).expand(64, -1)
    assert len(set(picked([warm] * 64, scores))) > 5


def test_copies_that_transformers_makes_are_the_same_request() -> None:
    state = request(SamplingParams(9, logprobs=1), [5])
    assert copy.deepcopy(state.logit_processor_kwargs)[ROW] is state.logit_processor_kwargs[ROW]


def test_logprobs_are_the_models_own() -> None:
    scores = random_scores(3, seed=10)
    changed: dict[str, Any] = {"temperature": 0.7, "top_k": 1, "repetition_penalty": 2.0, "logit_bias": {3: 100.0}}
    states = [
        request(SamplingParams(9, logprobs=0), [5]),
        request(SamplingParams(9), [5]),
        request(SamplingParams(9, logprobs=4, **changed), [5]),
    ]
    tokens = picked(states, scores)
    assert tokens[2] == 3
    expected = scores.log_softmax(dim=-1)
    records = [state.logit_processor_kwargs[ROW].records for state in states]
    assert records[1] == []
    assert (records[0][0].token_id, records[0][0].top) == (tokens[0], ())
    assert records[0][0].logprob == pytest.approx(expected[0, tokens[0]].item())
    assert records[2][0].logprob == pytest.approx(expected[2, 3].item())
    values, ids = expected[2].topk(4)
    assert [token for token, _ in records[2][0].top] == ids.tolist()
    assert [value for _, value in records[2][0].top] == pytest.approx(values.tolist())


def test_there_is_one_record_for_each_token_also_when_a_step_is_taken_again() -> None:
    scores = random_scores(1, seed=11)
    state = request(SamplingParams(9, logprobs=0), [5, 6], [20, 21], skipped=2)
    sampler = Sampler()
    for _ in range(3):
        step(sampler, [state], scores)
    records = state.logit_processor_kwargs[ROW].records
    assert len(records) == 1
    state.generated_tokens.append(records[0].token_id)
    step(sampler, [state], scores)
    assert len(records) == 2


BROKEN = [float("nan"), float("inf")]


@pytest.mark.parametrize("bad", BROKEN)
def test_a_row_of_broken_scores_spoils_no_other(bad: float) -> None:
    scores = random_scores(4, seed=1)
    scores[0, 3] = bad
    scores[1] = bad
    full: dict[str, Any] = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 1, "logprobs": 3}
    harsh = SamplingParams(9, repetition_penalty=1.2, presence_penalty=1.0, min_tokens=3, logit_bias={3: 1.0}, **full)
    states = [request(harsh, [5, 6]) for _ in range(4)]
    together = picked(states, scores)
    assert together[2:] == picked([request(harsh, [5, 6])] * 2, scores[2:])
    assert all(0 <= token < VOCABULARY for token in together)
    for state in states:
        (record,) = state.logit_processor_kwargs[ROW].records
        assert all(map(math.isfinite, [record.logprob, *(value for _, value in record.top)]))


def test_scores_that_forbid_everything_still_give_a_token() -> None:
    scores = torch.full((1, VOCABULARY), -torch.inf)
    for params in (SamplingParams(9, temperature=1.0, min_tokens=1), SamplingParams(9, min_tokens=1, logprobs=1)):
        assert 0 <= picked([request(params, [5], ends=range(VOCABULARY))], scores)[0] < VOCABULARY


def test_a_vanishing_temperature_is_greedy_not_an_error() -> None:
    scores = random_scores(3, seed=2) * 30
    cold = [SamplingParams(1, temperature=heat, top_p=0.9) for heat in (1e-300, 1e-30, 1e-9)]
    assert picked([request(params, [5]) for params in cold], scores) == scores.argmax(dim=-1).tolist()


def test_records_hold_numbers_that_json_can() -> None:
    logprobs = torch.tensor([[0.0, -torch.inf, torch.nan]])
    (record,) = likeliest(logprobs, [1], 3)
    assert record.logprob == LOWEST
    assert {value for _, value in record.top} == {0.0, LOWEST}
