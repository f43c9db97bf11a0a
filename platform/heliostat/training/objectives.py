"""The training loss of a task. Knows nothing of optimizers, workers or files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from heliostat.data.packing import PackedRow, collate, collate_pairs
from heliostat.models.pairs import target_logits
from heliostat.tasks import IGNORED, Task


class Objective(Protocol):
    """What a task makes of rows, and its loss."""

    def batch(self, rows: Sequence[PackedRow], *, flatten: bool) -> dict[str, Any]:
        """What `loss` needs of the rows, on the CPU. `flatten`: without padding, if the task can (flash attention)."""
        ...

    def loss(self, model: Any, batch: dict[str, Any], num_items: int) -> Tensor:
        """The sum of the losses of what the batch learns, divided by `num_items`.

        With `num_items` = learned tokens of the whole global batch, the sum over micro-batches and workers is the mean,
        however the batch is cut. A row whose labels are all -100 adds nothing.
        """
        ...


def build(task: Task, *, pad_token_id: int, class_weights: Sequence[float] | None = None, before: int = 0) -> Objective:
    """The objective of a task. `class_weights` are those of `Classification`, `before` that of `NextToken`."""
    if task == "classification":
        return Classification(pad_token_id, class_weights)
    if task == "seq2seq":
        return Seq2Seq(pad_token_id)
    return NextToken(pad_token_id, before)


@dataclass(frozen=True)
class NextToken:
    """Next-token cross-entropy of a causal language model."""

    pad_token_id: int
    before: int = 0
    """Virtual tokens that come first in what the model puts out, too (prompt tuning)."""

    def batch(self, rows: Sequence[PackedRow], *, flatten: bool) -> dict[str, Any]:
        """As `learned_positions`."""
        return learned_positions(collate(rows, self.pad_token_id, flatten=flatten), self.before)

    def loss(self, model: Any, batch: dict[str, Any], num_items: int) -> Tensor:
        """As `causal_lm_loss`."""
        return causal_lm_loss(model, batch, num_items)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of the labels of texts. The last token of a row is no token, but the number of its label."""

    pad_token_id: int
    class_weights: Sequence[float] | None = None
    """How much a text of each label counts, [labels]; None: all the same."""

    def batch(self, rows: Sequence[PackedRow], *, flatten: bool = False) -> dict[str, Any]:
        """`input_ids` and `attention_mask` [rows, longest text], padded on the right; `labels` [rows]."""
        texts = [torch.from_numpy(row.input_ids[:-1]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(texts, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(text) for text in texts], batch_first=True),
            "labels": torch.tensor([row.labels[-1] for row in rows]),
        }

    def loss(self, model: Any, batch: dict[str, Any], num_items: int) -> Tensor:
        """The class weights count in the sum alone: balanced ones are 1 on the average over the training texts."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()
        weights = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        total = torch.nn.functional.cross_entropy(
            logits, batch["labels"], weight=weights, ignore_index=IGNORED, reduction="sum"
        )
        return total / num_items


@dataclass(frozen=True)
class Seq2Seq:
    """Next-token cross-entropy of a target, which the decoder writes while it looks at the encoded source."""

    pad_token_id: int

    def batch(self, rows: Sequence[PackedRow], *, flatten: bool = False) -> dict[str, Any]:
        """As `collate_pairs`."""
        return collate_pairs(rows, self.pad_token_id)

    def loss(self, model: Any, batch: dict[str, Any], num_items: int) -> Tensor:
        """Summed over the target tokens of the batch, and divided by `num_items`."""
        logits, labels = target_logits(model, batch), batch["labels"]
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total / num_items


def learned_positions(batch: dict[str, Any], before: int = 0) -> dict[str, Any]:
    """The batch with `labels` [rows, tokens] replaced by what they say: where logits are needed, and for which tokens.

    `logits_to_keep` [rows, most learned tokens of a row] are the positions before learned tokens, `shift_labels` of the
    same shape those tokens. Rows with fewer are filled up with positions whose label is -100. Meant for the CPU, before
    the batch goes to its device: an accelerator would have to be waited for to know the shape.

    `before`: virtual tokens that PEFT puts before the batch's own; it then counts positions itself.
    """
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    learned = following != IGNORED
    width = max(1, int(learned.sum(dim=1).max()))
    positions = learned.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
    dropped = {"labels", "position_ids"} if before else {"labels"}
    rest = {name: value for name, value in batch.items() if name not in dropped}
    return {**rest, "logits_to_keep": positions + before, "shift_labels": following.gather(1, positions)}


def causal_lm_loss(model: Any, batch: dict[str, Any], num_items: int) -> Tensor:
    """Next-token cross-entropy, summed over the learned tokens of `batch` and divided by `num_items`.

    `batch` is as `learned_positions` makes it, so no logits are computed for tokens that are not learned. With
    `num_items` = learned tokens of the whole global batch, the sum over micro-batches and workers is the token
    mean, however the batch is cut. A mean of micro-batch means would weigh tokens of short completions more.

    `use_cache=False` and no 2-D mask: only then does transformers keep packed documents from seeing each other.
    """
    # `labels` make the model compute a loss; which ones, `shift_labels` say.
    labels = batch["shift_labels"]
    loss: Tensor = model(**batch, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(num_items)).loss
    return loss
