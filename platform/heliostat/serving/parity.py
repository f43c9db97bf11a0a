"""Parity: the endpoint's engine must give the tokens that `generate()` gives. Knows bundles, not the registry.

Both decode greedily, from the same weights in the same precision, so any difference is a fault of the engine with this
model: a wrong mask, wrong positions, a wrong cache. In 16 bits only, tokens of nearly the same score may change places.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch

from heliostat.data import formats, splits
from heliostat.data.tokens import DocumentEncoder, text_ids
from heliostat.errors import ConfigError, GateRefused, ModelError
from heliostat.evaluation.completion import encode_prompt
from heliostat.experiment import ExperimentConfig
from heliostat.models import base, bundle
from heliostat.models.base import InferenceModel
from heliostat.models.virtual import VirtualTokens
from heliostat.serving.classifier import ServedClassifier
from heliostat.serving.config import EndpointArgs
from heliostat.serving.engine import Engine
from heliostat.serving.lane import Lane
from heliostat.serving.lane_model import LaneModel
from heliostat.serving.sampling import SamplingParams
from heliostat.serving.served import TEXTS, ServedModel

Check = Callable[..., Awaitable[None]]

# Tokens generated after each prompt, and the longest prompt: `generate` takes the prompts one by one.
NEW_TOKENS = 32
PROMPT_TOKENS = 256
# Nats by which two tokens' log-probabilities may differ and still be as good as equal: scores of 16 and more are
# multiples of 1/8 in bfloat16 and 1/64 in float16, and batches of other shapes round otherwise in every layer.
TIES = {torch.bfloat16: 0.5, torch.float16: 0.1}


def check(folder: Path, prompts: Sequence[Sequence[int]], args: EndpointArgs | None = None) -> None:
    """Serve the bundle for as long as `check_served` needs. `prompts`: token ids; long ones are cut.

    Raises:
        GateRefused: the tokens differ; the message says for which prompt and from which token on.
        ModelError: the bundle cannot be trusted or loaded, or the endpoint cannot run it as it is.
    """
    loaded = base.load_for_inference(str(folder))

    async def serve() -> None:
        if loaded.task == "classification":
            await _check_classifier(ServedClassifier(loaded, str(folder), args or EndpointArgs()), prompts)
            return
        served, answers = await start(loaded, str(folder), args or EndpointArgs())
        try:
            await answers(prompts)
        finally:
            served.close()

    asyncio.run(serve())


async def _check_classifier(served: ServedClassifier, prompts: Sequence[Sequence[int]]) -> None:
    try:
        await served.check_ids([list(prompt[: served.max_length]) for prompt in prompts])
    finally:
        served.close()


async def start(loaded: InferenceModel, model_id: str, args: EndpointArgs) -> tuple[ServedModel | LaneModel, Check]:
    """The model running, and the check that it answers prompts (default: its own) as it should.

    Raises:
        ModelError, ResourceError: it cannot be run.
    """
    if loaded.task == "seq2seq" or isinstance(loaded.model, VirtualTokens):
        alone = await LaneModel.start(loaded, model_id, args)
        return alone, alone.try_out
    served = await ServedModel.start(loaded, model_id, args)
    return served, partial(check_served, served)


async def check_served(served: ServedModel, prompts: Sequence[Sequence[int]] | None = None) -> None:
    """Generate from each prompt with the running engine, all at once, and with `generate()`, one after the other.

    `prompts`: token ids; default: the model's own check prompts. The bundle's decoding settings do not count: sampling
    and penalties would compare something else.

    Raises:
        GateRefused: the tokens differ; the message says for which prompt and from which token on.
        ModelError: requests of this endpoint are too short for a comparison.
    """
    room = min(PROMPT_TOKENS, served.max_length - NEW_TOKENS)
    if room < 1:
        raise ModelError(f"a request may have {served.max_length} tokens only; raise serving.cache_tokens")
    cut = [list(prompt[:room]) for prompt in (served.check_prompts if prompts is None else prompts)]
    answers = await asyncio.gather(*(_tokens(served.engine, prompt) for prompt in cut))
    for number, (prompt, got) in enumerate(zip(cut, answers, strict=True), 1):
        # Alone in its batch: padding would change the last bits of the scores.
        expected = await _tokens(served.lane, prompt)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(got, expected, strict=False)))
        if got != expected and not await _as_good(served, [*prompt, *expected[:same]], got[same:], expected[same:]):
            raise GateRefused(
                f"{served.id}: the endpoint's engine does not give what `generate()` gives: prompt {number} of "
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
    if count > len(TEXTS):
        raise ConfigError(
            f"promotion.parity_prompts: {count}, but without a test split of prompts there are only {len(TEXTS)}"
        )
    if base.task_of(str(folder)) == "classification":
        return text_ids(tokenizer, TEXTS[:count])
    reader = InferenceModel(None, tokenizer, bundle.read_manifest(folder), str(folder))  # no weights for a prompt
    return [encode_prompt(reader, text) for text in TEXTS[:count]]


async def _as_good(served: ServedModel, before: list[int], got: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether the first token of `got` is as good as that of `expected`, behind `before`, to what 16 bits can tell."""
    if served.dtype not in TIES or not got or not expected:
        return False
    scored = [await served.lane.score([*before, token], 0) for token in (got[0], expected[0])]
    found, best = (record.logprob for records in scored if (record := records[-1]) is not None)
    return best - found <= TIES[served.dtype]


async def _tokens(runner: Engine | Lane, prompt: list[int]) -> list[int]:
    deltas = runner.generate(prompt, SamplingParams(NEW_TOKENS))
    return [token async for delta in deltas for token in delta.token_ids]
