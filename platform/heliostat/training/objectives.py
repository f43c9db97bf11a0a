"""The training loss of a task. Knows nothing of optimizers, workers or files."""

from typing import Any

import torch
from torch import Tensor

from heliostat.data.packing import IGNORED


def learned_positions(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `labels` [rows, tokens] replaced by what they say: where logits are needed, and for which tokens.

    `logits_to_keep` [rows, most learned tokens of a row] are the positions before learned tokens, `shift_labels` of the
    same shape those tokens. Rows with fewer are filled up with positions whose label is -100. Meant for the CPU, before
    the batch goes to its device: an accelerator would have to be waited for to know the shape.
    """
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    learned = following != IGNORED
    width = max(1, int(learned.sum(dim=1).max()))
    positions = learned.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
    rest = {name: value for name, value in batch.items() if name != "labels"}
    return {**rest, "logits_to_keep": positions, "shift_labels": following.gather(1, positions)}


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
