"""The training loss of a task. Knows nothing of optimizers, workers or files."""

from typing import Any

import torch
from torch import Tensor


def causal_lm_loss(model: Any, batch: dict[str, Tensor], num_items: int) -> Tensor:
    """Next-token cross-entropy, summed over the learned tokens of `batch` and divided by `num_items`.

    With `num_items` = learned tokens of the whole global batch, the sum over micro-batches and workers is the token
    mean, however the batch is cut. A mean of micro-batch means would weigh tokens of short completions more.

    `use_cache=False` and no 2-D mask: only then does transformers keep packed documents from seeing each other.
    """
    loss: Tensor = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(num_items)).loss
    return loss
