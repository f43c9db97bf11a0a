"""What training is about to learn, as text a person can check before compute is spent. Knows tokens, not files."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from heliostat.data.packing import PackedDataset
from heliostat.errors import DataError

# Characters of a document that are shown from its start; the rest is said to be there.
SHOWN = 600


def summary(data: PackedDataset, tokenizer: Any, n: int = 2, *, labels: Sequence[str] = ()) -> str:
    """Counts of a split, and its first `n` documents with [learned tokens in brackets].

    With `labels`, the last token of a document is the number of its label.

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
        f"  {_labels_sentence(data, labels) if labels else _eos_sentence(data, tokenizer.eos_token_id)}",
    ]
    shown = range(min(n, len(tokens)))
    return "\n".join(lines + [f"  document {index}: {_marked(data, tokenizer, index, labels)}" for index in shown])


def _labels_sentence(data: PackedDataset, labels: Sequence[str]) -> str:
    found = np.bincount(data.tokens.input_ids[data.tokens.offsets[1:] - 1], minlength=len(labels))
    return "labels: " + ", ".join(f"{label} {count}" for label, count in zip(labels, found, strict=True))


def _eos_sentence(data: PackedDataset, eos: int) -> str:
    last = data.tokens.offsets[1:] - 1
    learned = int(np.sum((data.tokens.input_ids[last] == eos) & data.tokens.loss_mask[last]))
    total = len(data.tokens)
    rest = "" if learned == total else " (the others were split or truncated at max_length)"
    return f"EOS is learned at the end of {learned} of {total} documents{rest}"


def _marked(data: PackedDataset, tokenizer: Any, index: int, labels: Sequence[str]) -> str:
    ids, mask = data.tokens.document(index)
    text = ""
    if labels:
        return f"{tokenizer.decode(ids[:-1])[:SHOWN]} -> [{labels[ids[-1]]}]"
    for learned, run in groupby(zip(ids.tolist(), mask.tolist(), strict=True), key=lambda token: token[1]):
        part = tokenizer.decode([token for token, _ in run])
        text += f"[{part}]" if learned else part
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(ids)} tokens)"
