"""Parity: the endpoint's engine must give the tokens that `generate()` gives. Knows bundles, not the registry.

Both decode greedily, from the same weights in the same precision, so any difference is a fault of the engine with this
model: a wrong mask, wrong positions, a wrong cache.
"""

import asyncio
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import torch
from transformers import GenerationConfig

from heliostat.data import formats, splits
from heliostat.data.tokens import DocumentEncoder
from heliostat.errors import ConfigError, GateRefused, ModelError
from heliostat.evaluation.completion import encode_prompt
from heliostat.experiment import ExperimentConfig
from heliostat.models import base, bundle
from heliostat.models.base import InferenceModel
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import Engine
from heliostat.serving.sampling import DecodingDefaults, SamplingParams
from heliostat.serving.served import engine_of

# Tokens generated after each prompt, and the longest prompt: `generate` takes the prompts one by one.
NEW_TOKENS = 32
PROMPT_TOKENS = 256
_TEXTS = (
    "Hello, how are you today?",
    "Once upon a time there was",
    "The capital of France is",
    "1, 2, 3, 4,",
    "def add(a, b):\n    return",
    "Dear Sir or Madam,",
    "Every Monday at nine o'clock",
    "Das ist ein kurzer Satz.",
)


def check(folder: Path, prompts: Sequence[Sequence[int]], args: EndpointArgs | None = None) -> None:
    """Generate from each prompt (token ids; long ones are cut) with the engine, all at once, and with `generate()`.

    Raises:
        GateRefused: the tokens differ; the message says for which prompt and from which token on.
        ModelError: the bundle cannot be trusted or loaded, or the endpoint cannot run it as it is.
    """
    loaded = base.load_for_inference(str(folder))
    given = loaded.model.generation_config
    DecodingDefaults.of(given)
    # Only what ends a text is kept: sampling and penalties would make `generate` do something else.
    loaded.model.generation_config = GenerationConfig(
        eos_token_id=given.eos_token_id, pad_token_id=given.pad_token_id, bos_token_id=given.bos_token_id
    )
    cut, served = asyncio.run(_serve(loaded, prompts, args or EndpointArgs()))
    for number, (prompt, got) in enumerate(zip(cut, served, strict=True), 1):
        expected = _generate(loaded, prompt)
        if got != expected:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(got, expected, strict=False)))
            raise GateRefused(
                f"{folder}: the endpoint's engine does not give what `generate()` gives: prompt {number} of "
                f"{len(cut)} differs after {same} equal tokens of {len(expected)}"
            )


def prompts_for(folder: Path, count: int, config: ExperimentConfig | None = None) -> list[list[int]]:
    """Up to `count` prompts, as token ids: of the config's test rows, or some texts where there are none.

    Raises:
        UserError: the bundle or the data is wrong, or more prompts are asked for than there are texts.
    """
    tokenizer = base.load_tokenizer(str(folder))
    if config is not None and config.data.format != "text":
        rows = splits.load_splits(config.data, config.seed, ("test",)).get("test")
        if rows:
            template = formats.chat_template(tokenizer, config.data)
            texts = [formats.prompt_of(row, config.data, template)[0] for row in rows[:count]]
            return DocumentEncoder(tokenizer, config.data).prompts(texts)
    if count > len(_TEXTS):
        raise ConfigError(
            f"promotion.parity_prompts: {count}, but without a test split of prompts there are only {len(_TEXTS)}"
        )
    reader = InferenceModel(None, tokenizer, bundle.read_manifest(folder), str(folder))  # no weights for a prompt
    return [encode_prompt(reader, text) for text in _TEXTS[:count]]


async def _serve(
    loaded: InferenceModel, prompts: Sequence[Sequence[int]], args: EndpointArgs
) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts as far as they were used, and the engine's tokens for each."""
    engine = engine_of(loaded, args)
    await engine.start()
    try:
        room = min(PROMPT_TOKENS, engine.max_length - NEW_TOKENS)
        if room < 1:
            raise ModelError(f"a request may have {engine.max_length} tokens only; raise serving.cache_tokens")
        cut = [list(prompt[:room]) for prompt in prompts]
        return cut, await asyncio.gather(*(_tokens(engine, prompt) for prompt in cut))
    finally:
        engine.close()


async def _tokens(engine: Engine, prompt: list[int]) -> list[int]:
    deltas = engine.generate(prompt, SamplingParams(NEW_TOKENS))
    return [token async for delta in deltas for token in delta.token_ids]


def _generate(loaded: InferenceModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=loaded.model.device)
    with torch.inference_mode():
        output = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
