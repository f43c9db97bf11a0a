"""How likely a model finds the tokens of given texts. Knows tensors; no engine, no tokenizer, no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heliostat.models import virtual
from heliostat.serving.sampler import Record, likeliest

# Bytes of scores over the vocabulary that one forward pass may give, in single precision.
_SCORE_BYTES = 64 << 20


@dataclass(frozen=True)
class Scoring:
    """The wish to have a prompt's own tokens scored, with the `top` likeliest ones in the place of each."""

    top: int


def score(model: Any, prompts: Sequence[Sequence[int]], top: int) -> list[list[Record | None]]:
    """Log-probabilities of the tokens of each prompt, given those before; None for the first, which has none before it.

    The prompts go through the model together, some positions at a time with a cache of those before, so that scores
    over the whole vocabulary are there for a few positions only. Shorter prompts are filled up behind their end: what
    comes later changes nothing in a causal model.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=model.device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    step = max(1, _SCORE_BYTES // (4 * vocabulary * len(prompts)))
    found: list[list[Record | None]] = [[None] for _ in prompts]
    with torch.inference_mode():
        runner, cache = virtual.start(model, len(prompts))
        for start in range(0, longest - 1, step):
            end = min(start + step, longest - 1)
            logits = runner(ids[:, start:end], past_key_values=cache, use_cache=True).logits
            logprobs = logits.float().log_softmax(dim=-1)
            for row, prompt in enumerate(prompts):
                here = prompt[start + 1 : end + 1]
                found[row] += likeliest(logprobs[row, : len(here)], here, top)
    return found
