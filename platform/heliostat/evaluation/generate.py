"""Batched generation with `transformers.generate`. Knows token ids and decoding settings, not tasks or metrics."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from heliostat.evaluation.config import GenerationSettings


def generation_config(model: Any, settings: GenerationSettings | None) -> GenerationConfig:
    """The model's own decoding defaults with `settings` on top (None: the defaults alone)."""
    changes = settings.model_dump(exclude_none=True) if settings else {}
    base = model.generation_config.to_dict()
    if changes.get("do_sample") is False:
        # Left-over sampling settings would only make transformers warn.
        base.update({"temperature": None, "top_k": None, "top_p": None, "min_p": None})
    return GenerationConfig.from_dict({**base, **changes})


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    config: GenerationConfig,
    pad_token_id: int,
    batch_size: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Continuations of token id prompts, in their order, without prompt, padding and end token.

    Prompts of similar length share a batch, left-padded. `advance` is told how many prompts were finished.
    """
    torch.manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for index, tokens in zip(
            batch, _generate_batch(model, [prompts[i] for i in batch], config, pad_token_id), strict=True
        ):
            results[index] = tokens
        advance(len(batch))
    return results


def _generate_batch(
    model: Any, prompts: list[list[int]], config: GenerationConfig, pad_token_id: int
) -> list[list[int]]:
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad_token_id] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids, attention_mask=mask, generation_config=config, pad_token_id=pad_token_id
        )
    return [_until_end(row[longest:].tolist(), config) for row in output]


def _until_end(tokens: list[int], config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)
