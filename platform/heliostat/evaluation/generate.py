"""Batched generation with `transformers.generate`. Knows token ids and decoding settings, not tasks or metrics."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig

from heliostat.errors import DataError
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

    A continuation has at most `config.max_new_tokens` tokens (default: that of GenerationSettings), and no more than
    the model has positions left after the prompt. Prompts of similar length share a batch, left-padded. `advance` is
    told how many prompts were finished.

    Raises:
        DataError: a prompt has no token, or leaves no position for a new one.
    """
    torch.manual_seed(seed)
    limits = _new_token_limits(model, prompts, config.max_new_tokens or GenerationSettings().max_new_tokens)
    results: list[list[int]] = [[] for _ in prompts]
    for limit, batch in _batches(prompts, limits, batch_size):
        changes = {"max_new_tokens": limit, "pad_token_id": pad_token_id}
        limited = GenerationConfig.from_dict({**config.to_dict(), **changes})
        for index, tokens in zip(batch, _generate_batch(model, [prompts[i] for i in batch], limited), strict=True):
            results[index] = tokens
        advance(len(batch))
    return results


def _new_token_limits(model: Any, prompts: Sequence[list[int]], wanted: int) -> list[int]:
    # Models without learned or rotary positions (state space models) have no such key, and no end.
    positions = getattr(model.config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DataError(f"prompt {number} of {len(prompts)} has no token to go on from")
        if positions is not None and len(prompt) >= positions:
            raise DataError(
                f"prompt {number} of {len(prompts)} has {len(prompt)} tokens, which leaves none of the model's "
                f"{positions} positions for an answer; shorten it"
            )
    return [wanted if positions is None else min(wanted, positions - len(prompt)) for prompt in prompts]


def _batches(prompts: Sequence[list[int]], limits: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """(new tokens, indices of prompts): only prompts of one limit share a batch, so none is cut for its neighbours."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for limit, group in groupby(order, key=lambda i: limits[i]):
        indices = list(group)
        yield from ((limit, indices[start : start + size]) for start in range(0, len(indices), size))


def _generate_batch(model: Any, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[config.pad_token_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=config,
        )
    return [_until_end(row[longest:].tolist(), config) for row in output]


def _until_end(tokens: list[int], config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)
