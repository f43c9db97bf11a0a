"""What is counted of a step without weights: as published formulas have it, where there are any."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from heliostat.errors import ModelError
from heliostat.training.tracing import Attention, Batch, Step, trace

ROWS, TOKENS, WIDTH, HEADS = 4, 256, 128, 4
BATCH = Batch(ROWS, TOKENS, learned=1)
GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_embd": WIDTH, "n_head": HEADS, "activation_function": "gelu"}


def step(layers: int, attention: Attention = "unmasked", *, batch: Batch = BATCH, checkpointing: bool = False) -> Step:
    config = AutoConfig.for_model(**GPT2, n_layer=layers)

    def build() -> Any:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    return trace(build, batch, checkpointing=checkpointing, attention=attention)


def test_activations_of_a_block_are_those_of_the_formula() -> None:
    """Korthikanti et al. 2022, section 4.1: 34 s b h bytes in 16 bits, without what flash attention does not keep."""
    per_block = (step(6).activations - step(3).activations) / 3
    assert per_block == pytest.approx(34 * TOKENS * ROWS * WIDTH, rel=0.15)


def test_attention_without_flash_keeps_its_probabilities() -> None:
    """The same formula: 5 a s^2 b bytes more a block."""
    per_block = {kind: (step(6, kind).activations - step(3, kind).activations) / 3 for kind in ("unmasked", "eager")}
    assert per_block["eager"] - per_block["unmasked"] >= 0.8 * 5 * HEADS * TOKENS**2 * ROWS


def test_checkpointing_keeps_a_blocks_input_and_computes_it_twice() -> None:
    plain, again = ([step(n, checkpointing=checkpointing) for n in (3, 6)] for checkpointing in (False, True))
    per_block = (again[1].activations - again[0].activations) / 3
    assert per_block == pytest.approx(2 * TOKENS * ROWS * WIDTH, rel=0.05)
    forward = (plain[1].flops - plain[0].flops) / 3
    assert (again[1].flops - again[0].flops) / (plain[1].flops - plain[0].flops) == pytest.approx(4 / 3, rel=0.05)
    assert forward > 0


def test_operations_are_six_a_parameter_and_token_and_attention() -> None:
    """PaLM (Chowdhery et al. 2022, appendix B): 6 N + 12 l h s a token; flash attention computes 2 l h s again."""
    more = step(6).trained - step(3).trained
    per_token = (step(6).flops - step(3).flops) / (ROWS * TOKENS)
    assert per_token == pytest.approx(6 * more + 14 * 3 * WIDTH * TOKENS, rel=0.01)


def test_logits_are_kept_for_learned_tokens_only_and_as_two_copies() -> None:
    few, many = (step(1, batch=Batch(ROWS, TOKENS, learned)).with_gradients for learned in (1, TOKENS))
    vocab_bytes = 2 * 100 * ROWS * (TOKENS - 1)
    assert vocab_bytes <= many - few <= 3 * vocab_bytes + 2 * 2 * WIDTH * ROWS * TOKENS


def test_frozen_weights_get_no_gradients() -> None:
    def build() -> Any:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GPT2, n_layer=3))
        model.transformer.requires_grad_(False)
        model.transformer.h[2].requires_grad_(True)
        return model

    found = trace(build, BATCH, checkpointing=False, attention="unmasked")
    assert 0 < found.trained < found.frozen
    assert found.flops < step(3).flops


def test_what_depends_on_values_is_refused_with_a_way_to_measure() -> None:
    class Routed(torch.nn.Identity):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden if hidden.sum() > 0 else -hidden

    def build() -> Any:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GPT2, n_layer=1))
        model.transformer.drop = Routed()
        return model

    with pytest.raises(ModelError, match=r"depends on values .*; train a few steps with training\.max_steps"):
        trace(build, BATCH, checkpointing=False, attention="unmasked")
