"""Prompts of random tokens, and what a model's own `generate()` makes of one."""

import random
from collections.abc import Sequence
from typing import Any

import torch


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts shorter than `longest`, of tokens that the tokenizer of tests.tiny has."""
    rng = random.Random(seed)
    return [[rng.randrange(2, 260) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def alone(model: Any, prompt: Sequence[int], max_tokens: int, **settings: Any) -> list[int]:
    """What the model's own greedy `generate` gives for this prompt alone."""
    ids = torch.tensor([list(prompt)], device=model.device)
    settings = {"max_new_tokens": max_tokens, "do_sample": False, **settings}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]
