"""Batched generation with `transformers.generate`. Knows token ids and decoding settings, not tasks or metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from heliostat.errors import DataError
from heliostat.evaluation.config import SAMPLING_SETTINGS, GenerationSettings


def generation_config(model: Any, settings: GenerationSettings | None) -> GenerationConfig:
    """The model's own decoding defaults with `settings` on top (None: the defaults alone)."""
    return changed_config(model, settings.model_dump(exclude_none=True) if settings else {})


def changed_config(model: Any, changes: Mapping[str, Any]) -> GenerationConfig:
    """The model's own decoding defaults with `changes` on top, by transformers' names."""
    base = model.generation_config.to_dict()
    if changes.get("do_sample") is False:
        # Left-over sampling settings would only make transformers warn.
        base.update(dict.fromkeys(SAMPLING_SETTINGS))
    return GenerationConfig.from_dict({**base, **changes})


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    config: GenerationConfig,
    pad_token_id: int,
    batch_size: int,
    seed: int = 0,
    tokenizer: Any = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Continuations of token id prompts, in their order, without prompt, padding and end token.

    A continuation has at most `config.max_new_tokens` tokens (default: that of GenerationSettings), and no more than
    the model has positions left after the prompt. Prompts of similar length share a batch, left-padded. `tokenizer` is
    needed for `config.stop_strings`; a continuation then ends with the token that completes one (see `decode`).
    `advance` is told how many prompts were finished.

    Raises:
        DataError: a prompt has no token, or leaves no position for a new one.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for batch in batches(model, prompts, config, batch_size):
        inputs = [prompts[index] for index in batch.prompts]
        options = {"config": config, "pad_token_id": pad_token_id, "tokenizer": tokenizer}
        outputs = generate_batch(model, inputs, batch, seed=seed, **options)
        for index, tokens in zip(batch.prompts, outputs, strict=True):
            results[index] = tokens
        advance(len(outputs))
    return results


def decode(tokenizer: Any, outputs: Sequence[Sequence[int]], config: GenerationConfig) -> list[str]:
    """The texts of continuations, without special tokens, each up to the first of `config.stop_strings` in it."""
    texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    stops = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
    return [text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))] for text in texts]


@dataclass(frozen=True)
class Batch:
    """Prompts that are continued together."""

    number: int
    prompts: list[int]
    """Their indices."""
    max_new_tokens: int


def batches(model: Any, prompts: Sequence[list[int]], config: GenerationConfig, size: int) -> list[Batch]:
    """Which prompts are continued together, by their lengths: the same on every machine.

    Only prompts of one limit share a batch, so that none is cut for its neighbours. Where n-grams must not repeat, only
    prompts of one length do: padding would make n-grams too.

    Raises:
        DataError: as `generate`.
    """
    limits = _new_token_limits(model, prompts, config.max_new_tokens or GenerationSettings().max_new_tokens)
    unpadded = bool(config.no_repeat_ngram_size)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = []
    for (limit, _), group in groupby(order, key=lambda i: (limits[i], unpadded and len(prompts[i]))):
        indices = list(group)
        found += [(indices[start : start + size], limit) for start in range(0, len(indices), size)]
    return [Batch(number, indices, limit) for number, (indices, limit) in enumerate(found)]


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of at most `size`, those of similar lengths together."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def generate_batch(
    model: Any,
    prompts: Sequence[list[int]],
    batch: Batch,
    *,
    config: GenerationConfig,
    pad_token_id: int,
    seed: int,
    tokenizer: Any,
    streamer: Any = None,
) -> list[list[int]]:
    """Continuations of the batch's `prompts`. What is sampled follows from the seed and the batch's number alone.

    `streamer`: a transformers one, which is given the tokens as they come, if the batch has one prompt.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, batch.number]).generate_state(1)[0]))
    changes = {"max_new_tokens": batch.max_new_tokens, "pad_token_id": pad_token_id, "num_return_sequences": 1}
    limited = GenerationConfig.from_dict({**config.to_dict(), **changes})
    ids, mask = padded(model, prompts)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=limited,
            tokenizer=tokenizer if limited.stop_strings else None,
            streamer=streamer,
        )
    return [_until_end(row[given_tokens(model, ids) :].tolist(), limited) for row in output]


def padded(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of the prompts, both (n, longest), padded where the model's kind wants it."""
    if not model.config.is_encoder_decoder:
        return left_padded(prompts)
    # An encoder reads from the first position on; mirrored twice, the padding comes last.
    ids, mask = left_padded([prompt[::-1] for prompt in prompts])
    return ids.flip(1), mask.flip(1)


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of the prompts, both (n, longest).

    The mask hides the padding from the model, but not from a repetition penalty: a token of the prompt is neutral.
    """
    longest = max(map(len, prompts))
    rows = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(mask)


def given_tokens(model: Any, ids: torch.Tensor) -> int:
    """Tokens before the new ones in what `generate()` returns: the prompts `ids`, or an encoder-decoder's start."""
    return 1 if model.config.is_encoder_decoder else ids.shape[1]


def _new_token_limits(model: Any, prompts: Sequence[list[int]], wanted: int) -> list[int]:
    """The encoder of an encoder-decoder has positions of its own, so that a prompt takes none from the answer.

    Models without learned or rotary positions (state space models) have no such key, and no end.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise DataError(f"prompt {number} of {len(prompts)} has no token to go on from")
        if positions is not None and len(prompt) >= positions:
            raise DataError(
                f"prompt {number} of {len(prompts)} has {len(prompt)} tokens, which leaves none of the model's "
                f"{positions} positions for an answer; shorten it"
            )
    if positions is None:
        return [wanted for _ in prompts]
    return [min(wanted, positions - (0 if model.config.is_encoder_decoder else len(prompt))) for prompt in prompts]


def _until_end(tokens: list[int], config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    kept = next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)
    # Padding without an end token: a stop string came first.
    while config.stop_strings and kept and kept[-1] == config.pad_token_id:
        kept = kept[:-1]
    return kept
