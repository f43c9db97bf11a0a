"""Leaving out logits that nothing is learned from changes neither the loss nor a gradient."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from heliostat.tasks import IGNORED
from heliostat.training.objectives import causal_lm_loss, learned_positions
from tests.tiny import KEYS

ROWS, TOKENS, VOCAB = 3, 24, 50


def batch() -> dict[str, Any]:
    """Packed rows: two documents each, of which a different part is learned."""
    torch.manual_seed(1)
    input_ids = torch.randint(0, VOCAB, (ROWS, TOKENS))
    positions = torch.cat([torch.arange(10), torch.arange(TOKENS - 10)]).expand(ROWS, -1)
    labels = input_ids.clone()
    for row, prompt in enumerate((1, 4, 8)):
        labels[row, :prompt] = IGNORED
        labels[row, 10 : 10 + prompt] = IGNORED
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions.contiguous()}


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_loss_and_gradients_are_those_of_all_logits(model_type: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=VOCAB, **KEYS[model_type]))
    model.eval()
    whole = model(**batch(), use_cache=False, num_items_in_batch=torch.tensor(7)).loss
    whole.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = causal_lm_loss(model, learned_positions(batch()), 7)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_only_learned_tokens_get_logits() -> None:
    given = batch()
    made = learned_positions(given)
    width = int((given["labels"][:, 1:] != IGNORED).sum(dim=1).max())
    assert made["logits_to_keep"].shape == made["shift_labels"].shape == (ROWS, width)
    for row in range(ROWS):
        kept = made["shift_labels"][row] != IGNORED
        learned = given["labels"][row, 1:] != IGNORED
        assert torch.equal(made["shift_labels"][row][kept], given["labels"][row, 1:][learned])
        assert torch.equal(made["logits_to_keep"][row][kept], learned.nonzero()[:, 0])


def test_batch_without_a_learned_token_has_no_loss() -> None:
    given = {**batch(), "labels": torch.full((ROWS, TOKENS), IGNORED)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=VOCAB, **KEYS["gpt2"]))
    assert causal_lm_loss(model, learned_positions(given), 1).item() == 0
