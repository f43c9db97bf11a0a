"""Answers as the likeliest of given candidates. Knows rows and a model's probabilities; nothing of metrics.

The score of a candidate is the sum of the log-probabilities of its tokens after the prompt, as in lm-evaluation-harness
(https://github.com/EleutherAI/lm-evaluation-harness, `acc`), or their mean, as in Brown et al. 2020 (GPT-3,
https://arxiv.org/abs/2005.14165, section 2.4). Its end token is no part of it, because a model that was not trained on
the task does not know where an answer ends. The prompt goes through the model once for all its candidates.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from heliostat.data import formats
from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.data.tokens import DocumentEncoder
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation.generate import by_length, left_padded
from heliostat.evaluation.metrics import MAX_LABELS, Example, normalise
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.evaluation.questions import question_of
from heliostat.models.base import InferenceModel

Ids = list[int]


def candidates(rows: Sequence[Row], data: DataConfig, labels: Sequence[str] | None) -> list[tuple[str, ...]]:
    """What may be answered in each row: its own candidates, or else the labels.

    `labels` None are the different references of the rows. A label is preceded by the white space that precedes the
    references.

    Raises:
        ConfigError: there are too few or too many labels.
        DataError: a row has no candidate.
    """
    own = [formats.candidates_of(row, data) for row in rows]
    references = [formats.reference_of(row, data) for row in rows]
    known = list(labels) if labels is not None else sorted({normalise(reference) for reference in references})
    found = []
    for row, choice, reference in zip(rows, own, references, strict=True):
        if formats.calls_tools(row, data):
            raise DataError(
                f"{row.origin}: its last answer is a tool call, which cannot be chosen (scoring: likelihood)"
            )
        if choice is None:
            _check_labels(known)
            before = reference[: len(reference) - len(reference.lstrip())]
            choice = tuple(before + label for label in known)
        if not choice:
            raise DataError(f"{row.origin}: its passage names no entity to choose from (scoring: likelihood)")
        found.append(choice)
    return found


def _check_labels(labels: Sequence[str]) -> None:
    if not 2 <= len(labels) <= MAX_LABELS:
        raise ConfigError(
            f"evaluation.scoring: likelihood chooses among 2 to {MAX_LABELS} labels; there are {len(labels)}. Set "
            "evaluation.labels, or evaluation.scoring: generate"
        )


class ChoiceWork:
    """The choices for rows of data, in pieces: batches of prompts, the same on every machine."""

    def __init__(
        self,
        loaded: InferenceModel,
        rows: Sequence[Row],
        data: DataConfig,
        choices: Sequence[Sequence[str]],
        *,
        batch_size: int,
        length_normalization: bool = False,
        prefix: PromptPrefix | None = None,
    ) -> None:
        """Raises ModelError for a classifier, and DataError for a row that is wrong or too long."""
        loaded.check_task("causal_lm")
        own = PromptPrefix.of(loaded.manifest) if prefix is None else prefix
        template = formats.chat_template(loaded.tokenizer, data)
        encoder = DocumentEncoder(loaded.tokenizer, data)
        self._model, self._batch_size, self._mean = loaded.model, batch_size, length_normalization
        self._questions = [question_of(row, data, template, own) for row in rows]
        self._prompts = encoder.prompts([question.asked for question in self._questions])
        self._choices = choices
        self._completions = [encoder.completions(texts) for texts in choices]
        self._check_lengths(rows)
        self._batches = by_length([len(prompt) for prompt in self._prompts], batch_size)

    def __len__(self) -> int:
        return len(self._batches)

    def piece(self, number: int) -> dict[int, Example]:
        """The examples of one batch, by the index of their row."""
        batch = self._batches[number]
        completions = [self._completions[index] for index in batch]
        found = logprobs(self._model, [self._prompts[index] for index in batch], completions, self._batch_size)
        return {index: self._example(index, scores) for index, scores in zip(batch, found, strict=True)}

    def _example(self, index: int, logprobs: Sequence[float]) -> Example:
        question = self._questions[index]
        lengths = [len(ids) if self._mean else 1 for ids in self._completions[index]]
        scores = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
        best = self._choices[index][scores.index(max(scores))]
        reference, *others = question.references
        return Example(question.prompt, best, reference, 0, others=tuple(others))

    def _check_lengths(self, rows: Sequence[Row]) -> None:
        positions = getattr(self._model.config, "max_position_embeddings", None)
        for row, prompt, completions in zip(rows, self._prompts, self._completions, strict=True):
            if not prompt or not all(completions):
                raise DataError(f"{row.origin}: its prompt or a candidate has no token")
            needed = len(prompt) + max(map(len, completions))
            if positions is not None and needed > positions:
                raise DataError(
                    f"{row.origin}: its prompt and a candidate have {needed} tokens, more than the model's {positions} "
                    "positions; shorten it"
                )


@dataclass(frozen=True)
class _Prompts:
    """A batch of prompts that went through the model, each but for its last token."""

    last: torch.Tensor
    """Its last token, [prompts, 1]."""
    mask: torch.Tensor
    """[prompts, longest - 1]; 0 where it is padded, on the left."""
    cache: DynamicCache


def logprobs(
    model: Any, prompts: Sequence[Ids], completions: Sequence[Sequence[Ids]], batch_size: int
) -> list[list[float]]:
    """The summed log-probability, in nats, of each completion after its prompt.

    `completions` are those of each prompt. The prompts share a batch, then `batch_size` completions at a time do.
    """
    pairs = [(row, ids) for row, found in enumerate(completions) for ids in found]
    results: list[list[float]] = [[] for _ in prompts]
    with torch.inference_mode():
        known = _through(model, prompts)
        for start in range(0, len(pairs), batch_size):
            chunk = pairs[start : start + batch_size]
            for (row, _), logprob in zip(chunk, _after(model, known, chunk), strict=True):
                results[row].append(logprob)
    return results


def _through(model: Any, prompts: Sequence[Ids]) -> _Prompts:
    ids, mask = (tensor.to(model.device) for tensor in left_padded(prompts))
    cache = DynamicCache(config=model.config)
    before = mask[:, :-1]
    if before.shape[1]:
        places = (before.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids[:, :-1], "attention_mask": before, "position_ids": places}
        model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _Prompts(ids[:, -1:], before, cache)


def _after(model: Any, known: _Prompts, pairs: Sequence[tuple[int, Ids]]) -> list[float]:
    """The log-probability of each pair's completion after the prompt in that row."""
    rows = torch.tensor([row for row, _ in pairs], device=model.device)
    longest = max(len(ids) for _, ids in pairs)
    targets = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in pairs], device=model.device)
    counts = torch.tensor([[len(ids)] for _, ids in pairs], device=model.device)
    steps = torch.arange(longest, device=model.device)[None]
    cache = copy.deepcopy(known.cache)
    cache.batch_select_indices(rows)
    # What fills a shorter completion up comes behind its end: it changes nothing in a causal model.
    logits = model(
        input_ids=torch.cat([known.last[rows], targets[:, :-1]], dim=1),
        attention_mask=torch.cat([known.mask[rows], known.mask.new_ones(targets.shape)], dim=1),
        position_ids=known.mask[rows].sum(1, keepdim=True) + torch.minimum(steps, counts - 1),
        past_key_values=cache,
        use_cache=True,
    ).logits.float()
    found = logits.gather(2, targets[..., None])[..., 0] - logits.logsumexp(2)
    sums: list[float] = (found * (steps < counts)).sum(1).tolist()
    return sums
