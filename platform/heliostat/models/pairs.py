"""What an encoder-decoder says of a target. Knows no loss, no files."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heliostat.tasks import IGNORED


def target_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits in fp32, [rows, tokens, vocabulary], of the tokens in `labels` [rows, tokens], each given those before it.

    `batch`: as `packing.collate_pairs` makes it. Labels are not handed to the model, whose own loss would be a mean.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    shifted = _decoder_inputs(model, batch["labels"])
    logits: Tensor = model(**inputs, decoder_input_ids=shifted, use_cache=False).logits
    return logits.float()


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """The labels one place later, as the architecture itself begins them; those of M2M100 and NLLB do not say how."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        shifted: Tensor = own(labels)
        return shifted
    # DeepSpeed's engine has a `config` of its own.
    config = getattr(model, "module", model).config
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    before = torch.cat([start, labels[:, :-1]], dim=1)
    return before.masked_fill(before == IGNORED, config.pad_token_id)
