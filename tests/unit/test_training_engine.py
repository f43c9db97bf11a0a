"""The loss that training installs: the plain one's value and gradients, without the plain one's memory."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from heliostat.models import adapters
from heliostat.models.config import AdapterConfig
from heliostat.training import engine
from heliostat.training.objectives import causal_lm_loss, learned_positions
from heliostat.training.tracing import _Live
from tests import tiny

TOKENS, VOCAB = 8192, 2000
KEYS = {**tiny.KEYS["llama"], "num_hidden_layers": 1, "max_position_embeddings": TOKENS}


def model(method: str, *, chunked: bool) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=VOCAB, **KEYS))
    if chunked:
        engine.chunk_loss(made)
    return adapters.attach(made, AdapterConfig(method="lora"), base="x", seed=0) if method == "lora" else made


def counted(trained: Any, loss_of: Any) -> tuple[float, int]:
    """The loss, and the most bytes beside weights in forward and backward."""
    with _Live([*trained.parameters(), *trained.buffers()]) as live:
        loss = loss_of()
        loss.backward()
    return loss.item(), live.peak


@pytest.mark.parametrize("method", ["full", "lora"])
def test_rows_of_8192_tokens_have_the_plain_loss_and_gradients_in_less_memory(method: str) -> None:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCAB, (1, TOKENS))
    batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(TOKENS)[None]}
    plain, chunked = (model(method, chunked=chunked) for chunked in (False, True))
    expected, plain_peak = counted(plain, lambda: plain(**batch, use_cache=False).loss)
    found, peak = counted(chunked, lambda: causal_lm_loss(chunked, learned_positions(batch), TOKENS - 1))
    assert found == pytest.approx(expected, rel=1e-5)
    pairs = zip(plain.parameters(), chunked.parameters(), strict=True)
    for before, after in pairs:
        if before.requires_grad:
            torch.testing.assert_close(after.grad, before.grad, rtol=1e-3, atol=1e-6)
    logits = 4 * TOKENS * VOCAB
    assert peak < plain_peak - 0.9 * logits, "a copy of all logits less"
