"""What a classifier makes of texts: probabilities, and which labels it takes for which. Knows no metrics or files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from heliostat.data import formats
from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.data.tokens import DocumentEncoder
from heliostat.evaluation.generate import by_length
from heliostat.evaluation.metrics import Example
from heliostat.models.base import InferenceModel


def probabilities(loaded: InferenceModel, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The probability of each label for each text, [texts, labels], from token ids that `tokens.text_ids` made."""
    device, pad = loaded.model.device, loaded.tokenizer.pad_token_id
    ids = [torch.tensor(text, device=device) for text in texts]
    with torch.inference_mode():
        logits = loaded.model(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=pad),
            attention_mask=pad_sequence([torch.ones_like(text) for text in ids], batch_first=True),
        ).logits
    found: torch.Tensor = logits.double().softmax(dim=-1).cpu()
    return found


class ClassificationWork:
    """The predictions for rows of data, in pieces: batches of texts of similar length, the same on every machine."""

    def __init__(self, loaded: InferenceModel, rows: Sequence[Row], data: DataConfig, *, batch_size: int) -> None:
        """Texts longer than `data.max_length` are cut, as `excess_length_strategy: truncate` does it.

        Raises:
            ModelError: the model is no classifier.
            DataError: a row is wrong, or has a label that the model does not know.
        """
        loaded.check_task("classification")
        known = data.model_copy(update={"labels": list(loaded.labels)})
        self._loaded = loaded
        self._texts = [formats.prompt_of(row, known, None) for row in rows]
        ids = DocumentEncoder(loaded.tokenizer, known).prompts([text for text, _ in self._texts])
        self._ids = [text[: data.max_length - 1] for text in ids]
        self._batches = by_length([len(text) for text in self._ids], batch_size)

    def __len__(self) -> int:
        return len(self._batches)

    def piece(self, number: int) -> dict[int, Example]:
        """The examples of one batch, by the index of their row."""
        batch = self._batches[number]
        found = probabilities(self._loaded, [self._ids[index] for index in batch]).tolist()
        return {index: self._example(index, row) for index, row in zip(batch, found, strict=True)}

    def _example(self, index: int, row: list[float]) -> Example:
        text, reference = self._texts[index]
        by_label = dict(zip(self._loaded.labels, row, strict=True))
        return Example(text, max(by_label, key=by_label.__getitem__), reference, 0, by_label)


@dataclass(frozen=True)
class Confusion:
    """How often the texts of a label were taken for each label."""

    labels: tuple[str, ...]
    counts: list[list[int]]
    """[label, predicted label]."""

    def per_label(self) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and number of texts (n) of each label; 0 where there is nothing to divide by."""
        found = {}
        for place, label in enumerate(self.labels):
            hits, n = self.counts[place][place], sum(self.counts[place])
            predicted = sum(row[place] for row in self.counts)
            found[label] = {
                "precision": hits / max(1, predicted),
                "recall": hits / max(1, n),
                "f1": 2 * hits / max(1, predicted + n),
                "n": n,
            }
        return found


def confusion(examples: Sequence[Example]) -> Confusion:
    """Of a classifier's examples, at least one."""
    labels = tuple(examples[0].probabilities or ())
    found = Counter((example.reference, example.prediction) for example in examples)
    return Confusion(labels, [[found[label, predicted] for predicted in labels] for label in labels])
