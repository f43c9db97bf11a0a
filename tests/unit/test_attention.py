"""Attention of continuous batching on CPUs gives what transformers' own gives, layer by layer and token by token."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from heliostat.models import base
from heliostat.serving import attention
from tests import tiny

PROMPTS = [list(range(10, 10 + length)) for length in (30, 38, 40, 64, 40, 7, 1, 33, 20)]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Tests register attention functions for the whole process."""
    before = AttentionInterface._global_mapping["sdpa"]
    yield
    AttentionInterface.register("sdpa", before)


def generate(model: Any, tokens: int = 12) -> dict[str, list[int]]:
    """Greedy tokens of all prompts at once, in steps too small for all of them and with pages that several share."""
    sizes = {"page_size": 16, "num_blocks": 40, "max_batch_tokens": 48, "max_requests_per_batch": 6}
    outputs = model.generate_batch(
        PROMPTS,
        GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=tokens),
        ContinuousBatchingConfig(**sizes, auto_switch_to_flash=False, use_cuda_graph=False),
    )
    return {name: output.generated_tokens for name, output in outputs.items()}


@pytest.fixture(scope="module", params=list(tiny.KEYS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return base.load_for_inference(str(tiny.write_model(tmp_path_factory.mktemp("model"), request.param))).model


def test_every_layer_of_every_step_attends_as_transformers_does(model: Any) -> None:
    plans: list[attention._Plan] = []

    def both(module: Any, *given: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        # Both write the same to the cache.
        theirs, _ = sdpa_attention_forward(module, *given, **dict(kwargs))
        ours, _ = attention._attention(module, *given, **dict(kwargs))
        torch.testing.assert_close(ours, theirs)
        plans.append(attention._plans[kwargs["cache"]])
        return theirs, None

    AttentionInterface.register("sdpa", both)
    assert all(len(tokens) == 12 for tokens in generate(model).values())
    spans = [span for plan in plans for span in plan.spans]
    assert any(plan.decoding > 1 and plan.mask is not None for plan in plans), "decoding, padded"
    assert any(plan.decoding and plan.spans for plan in plans), "decoding beside prompts"
    assert any(span.mask is None for span in spans), "whole prompts"
    assert any(span.mask is not None for span in spans), "parts of prompts"
    assert any(len(plan.read_index) == 0 for plan in plans), "nothing cached yet"


def test_tokens_are_those_of_generate(model: Any) -> None:
    attention.install()
    for prompt, tokens in zip(PROMPTS, generate(model).values(), strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert tokens == alone[0, len(prompt) :].tolist()


def test_requests_of_very_different_length_are_not_padded() -> None:
    assert attention._count_decoding([0, 1, 2, 3], [0, 30, 60, 92]) == 3
    assert attention._count_decoding([0, 1, 2, 3], [0, 3, 6, 4000]) == 0
    assert attention._count_decoding([0, 1, 2, 9], [0, 30, 60, 67]) == 2
    assert attention._count_decoding([0, 9], [0, 9]) == 0


def test_padding_reads_only_what_is_the_requests_own() -> None:
    read_index = torch.arange(100, 112)
    padded, longest, mask = attention._padded(read_index, [0, 4, 6, 9], torch.float32)
    assert longest == 4
    assert padded.tolist() == [100, 101, 102, 103, 104, 105, 104, 104, 106, 107, 108, 106, 109, 110, 111]
    assert mask is not None
    assert mask.isfinite().squeeze().tolist() == [[True] * 4, [True, True, False, False], [True, True, True, False]]


def test_equal_lengths_need_no_mask() -> None:
    read_index = torch.arange(8)
    padded, longest, mask = attention._padded(read_index, [0, 4, 8], torch.float32)
    assert (padded.tolist(), longest, mask) == (list(range(8)), 4, None)


def test_sliding_windows_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**tiny.KEYS["llama"], "vocab_size": 400, "sliding_window": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **keys), attn_implementation="sdpa").eval()
    theirs = generate(model)
    monkeypatch.setattr(attention, "_plans", None)
    attention.install()
    assert list(generate(model).values()) == list(theirs.values())


def test_plain_generation_is_untouched(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    before = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    attention.install()
    assert model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist() == before.tolist()
