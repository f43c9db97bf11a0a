"""Scores of prompts are those of a plain forward pass, in any batch and however little of it is looked at once."""

import random

import pytest
import torch

from heliostat.models import base
from heliostat.serving import scoring
from heliostat.serving.scoring import score
from tests import tiny

Loaded = base.InferenceModel


@pytest.fixture(scope="module", params=list(tiny.KEYS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return base.load_for_inference(str(tiny.write_model(tmp_path_factory.mktemp("model"), request.param)))


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(2, 260) for _ in range(rng.randrange(1, 128))] for _ in range(count)] + [[5], [7, 8]]


@pytest.mark.parametrize("score_bytes", [64 << 20, 40_000, 1], ids=["at once", "some positions", "one position"])
def test_equals_a_plain_forward_pass(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, score_bytes: int) -> None:
    monkeypatch.setattr(scoring, "_SCORE_BYTES", score_bytes)
    given = prompts(6)
    for prompt, records in zip(given, score(loaded.model, given, 3), strict=True):
        with torch.inference_mode():
            expected = loaded.model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
        assert len(records) == len(prompt)
        assert records[0] is None
        for position, record in enumerate(records[1:], 1):
            assert record is not None
            assert record.token_id == prompt[position]
            assert record.logprob == pytest.approx(expected[position - 1, prompt[position]].item(), abs=1e-4)
            best = expected[position - 1].topk(3).values.tolist()
            assert [value for _, value in record.top] == pytest.approx(best, abs=1e-4)


def test_no_more_positions_are_looked_at_than_the_limit_allows(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = loaded.model.config.vocab_size
    monkeypatch.setattr(scoring, "_SCORE_BYTES", 4 * vocabulary * 3 * 10)
    forward, seen = loaded.model.forward, []

    def watched(*args: torch.Tensor, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        seen.append(tuple(output.logits.shape))
        return output

    monkeypatch.setattr(loaded.model, "forward", watched)
    score(loaded.model, [[5] * 36, [6] * 20, [7]], 0)
    assert seen == [(3, 10, vocabulary)] * 3 + [(3, 5, vocabulary)]
