"""Score a model on rows of data: likelihood of the references, and exact match of what it generates. Knows no files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from heliostat.data import formats
from heliostat.data.config import DataConfig
from heliostat.data.packing import IGNORED, PackedDataset, collate
from heliostat.data.records import Row
from heliostat.data.tokens import DocumentEncoder, TokenDataset, encode
from heliostat.errors import DataError
from heliostat.evaluation import metrics
from heliostat.evaluation.config import GenerationSettings
from heliostat.evaluation.generate import generate, generation_config
from heliostat.models.base import InferenceModel

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Scores:
    """What one model reached on one set of rows."""

    n: int
    metrics: dict[str, float]
    groups: dict[str, dict[str, float]]
    """Exact match and n by the value of the `group_by` column."""
    predictions: list[str]
    references: list[str]


def evaluate(
    loaded: InferenceModel,
    rows: Sequence[Row],
    data: DataConfig,
    settings: GenerationSettings | None,
    *,
    batch_size: int,
    group_by: str | None = None,
    advance: Advance = lambda done: None,
) -> Scores:
    """Loss, perplexity and token accuracy; for all formats but `text` also exact match of the generated completions.

    `settings` None decodes by the model's own defaults. `advance` is told how many rows were generated for.

    Raises:
        DataError: a row is wrong, or has no `group_by` column.
    """
    scores = likelihood(loaded, rows, data)
    if data.format == "text":
        return Scores(len(rows), scores, {}, [], [])
    predictions, references = predict(loaded, rows, data, settings, batch_size=batch_size, advance=advance)
    scores["exact_match"] = metrics.exact_match(predictions, references)
    groups = metrics.exact_match_by_group(predictions, references, _groups(rows, group_by)) if group_by else {}
    return Scores(len(rows), scores, groups, predictions, references)


def likelihood(loaded: InferenceModel, rows: Sequence[Row], data: DataConfig) -> dict[str, float]:
    """Mean next-token loss in nats, its perplexity, and how often the most likely token is the reference's."""
    encoded = encode(rows, loaded.tokenizer, data)
    tokens = TokenDataset(encoded.input_ids, encoded.loss_mask, encoded.offsets, {})
    packed = PackedDataset(tokens, data.max_length, packing=True)
    loss = hits = count = 0.0
    for index in range(len(packed)):
        row_loss, row_hits, row_count = _row_likelihood(loaded, packed, index)
        loss, hits, count = loss + row_loss, hits + row_hits, count + row_count
    mean = loss / max(1, count)
    return {"loss": mean, "perplexity": metrics.perplexity(mean), "token_accuracy": hits / max(1, count)}


def _row_likelihood(loaded: InferenceModel, packed: PackedDataset, index: int) -> tuple[float, int, int]:
    """Summed loss, correct tokens and learned tokens of one packed row."""
    batch: dict[str, Any] = collate([packed.row(index)], loaded.tokenizer.pad_token_id, flatten=False)
    labels = batch.pop("labels")[0, 1:].to(loaded.model.device)
    with torch.inference_mode():
        inputs = {name: value.to(loaded.model.device) for name, value in batch.items()}
        logits = loaded.model(**inputs, use_cache=False).logits[0, :-1].float()
    learned = labels != IGNORED
    loss = functional.cross_entropy(logits[learned], labels[learned], reduction="sum")
    return loss.item(), int((logits.argmax(-1) == labels)[learned].sum()), int(learned.sum())


def predict(
    loaded: InferenceModel,
    rows: Sequence[Row],
    data: DataConfig,
    settings: GenerationSettings | None,
    *,
    batch_size: int,
    advance: Advance = lambda done: None,
) -> tuple[list[str], list[str]]:
    """Generated completions and the references, in the order of the rows."""
    template = formats.chat_template(loaded.tokenizer, data)
    pairs = [formats.prompt_of(row, data, template) for row in rows]
    outputs = generate(
        loaded.model,
        DocumentEncoder(loaded.tokenizer, data).prompts([prompt for prompt, _ in pairs]),
        config=generation_config(loaded.model, settings),
        pad_token_id=loaded.tokenizer.pad_token_id,
        batch_size=batch_size,
        advance=advance,
    )
    texts = loaded.tokenizer.batch_decode(outputs, skip_special_tokens=True)
    return texts, [reference for _, reference in pairs]


def _groups(rows: Sequence[Row], column: str) -> list[str]:
    for row in rows:
        if column not in row.fields:
            raise DataError(
                f"{row.origin}: evaluation.group_by: has no column `{column}`; it has {', '.join(row.fields)}"
            )
    return [str(row.fields[column]) for row in rows]
