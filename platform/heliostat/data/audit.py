"""What training is about to learn, as text a person can check before compute is spent. Knows tokens, not files."""

from itertools import groupby
from typing import Any

import numpy as np

from heliostat.data.packing import PackedDataset
from heliostat.errors import DataError

# Characters of a document that are shown from its start; the rest is said to be there.
SHOWN = 600


def summary(data: PackedDataset, tokenizer: Any, n: int = 2) -> str:
    """Counts of a split, and its first `n` documents with [learned tokens in brackets].

    Raises:
        DataError: no token of the split is learned.
    """
    tokens, meta = data.tokens, data.tokens.meta
    if not tokens.label_counts.any():
        raise DataError(f"{meta['split']}: no token carries loss; nothing would be learned (see data.max_length)")
    lines = [
        f"{meta['split']}: {meta['rows']} rows, {meta['documents']} documents, {meta['tokens']} tokens, "
        f"{meta['supervised_tokens']} learned",
        f"  truncated {meta['truncated']}, dropped {meta['dropped']}; {len(data)} sequences of {data.max_length}, "
        f"{data.fill:.1%} full",
        f"  {_eos_sentence(data, tokenizer.eos_token_id)}",
    ]
    shown = range(min(n, len(tokens)))
    return "\n".join(lines + [f"  document {index}: {_marked(data, tokenizer, index)}" for index in shown])


def _eos_sentence(data: PackedDataset, eos: int) -> str:
    last = data.tokens.offsets[1:] - 1
    learned = int(np.sum((data.tokens.input_ids[last] == eos) & data.tokens.loss_mask[last]))
    total = len(data.tokens)
    rest = "" if learned == total else " (the others were split or truncated at max_length)"
    return f"EOS is learned at the end of {learned} of {total} documents{rest}"


def _marked(data: PackedDataset, tokenizer: Any, index: int) -> str:
    ids, mask = data.tokens.document(index)
    text = ""
    for learned, run in groupby(zip(ids.tolist(), mask.tolist(), strict=True), key=lambda token: token[1]):
        part = tokenizer.decode([token for token, _ in run])
        text += f"[{part}]" if learned else part
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(ids)} tokens)"
