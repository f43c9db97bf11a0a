"""What an encoder-decoder says of a target. Knows no loss, no files."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def target_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits in fp32, [rows, tokens, vocabulary], of the tokens in `labels` [rows, tokens], each given those before it.

    `batch`: as `packing.collate_pairs` makes it. Labels are not handed to the model, whose own loss would be a mean.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    shifted = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    logits: Tensor = model(**inputs, decoder_input_ids=shifted, use_cache=False).logits
    return logits.float()
