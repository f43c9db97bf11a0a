"""Documents -> rows of at most max_length tokens -> batches. Knows token ids and labels; nothing of text or models.

Documents share a row but never see each other: position ids restart at 0 for each, and the models derive the attention
mask from that. This holds only without an attention mask and with `use_cache=False`.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from heliostat.data.tokens import TokenDataset, move
from heliostat.errors import DataError
from heliostat.tasks import IGNORED

# Documents that are packed together: enough to fill the rows, and few beside those of a corpus.
WINDOW = 2**17

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedRow:
    """One training sequence, not padded; all arrays are [tokens] but `document_lengths` [documents]."""

    input_ids: Integers
    labels: Integers
    """The ids, or -100 where a token is not learned or begins a document."""
    position_ids: Integers
    document_lengths: Integers


def pack(lengths: npt.NDArray[np.integer], max_length: int) -> list[list[int]]:
    """Indices of the documents in each row, by best-fit decreasing bin packing.

    Every document, the longest first, goes to the row with the least room that still takes it (Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830). O(n log n) for the sorting, and
    O(max_length / 64) a document for the search: the amounts of room that some row has are the bits of one integer.

    Args:
        lengths: tokens of each document, [documents], each from 1 to max_length.
    """
    sizes = lengths.tolist()
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[document]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room = len(rows), max_length
            rows.append([])
        rows[row].append(document)
        with_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows


@dataclass(frozen=True)
class Packing:
    """Which documents are in which row."""

    documents: Integers
    """Indices of the documents of all rows, end to end, [documents]."""
    offsets: Integers
    """Where each row begins in them, [rows + 1]."""
    label_counts: Integers
    """Tokens of each row that carry loss, [rows]."""
    token_counts: Integers
    """Tokens of each row, [rows]."""

    @classmethod
    def of(cls, tokens: TokenDataset, max_length: int, *, packing: bool) -> Self:
        """Pack each `WINDOW` documents by themselves."""
        lengths, labels = tokens.lengths, tokens.label_counts
        if not packing:
            every = np.arange(len(tokens) + 1)
            return cls(every[:-1], every, labels, lengths)
        documents, sizes = [], []
        for start in range(0, len(lengths), WINDOW):
            rows = pack(lengths[start : start + WINDOW], max_length)
            documents.append(start + np.fromiter(chain.from_iterable(rows), dtype=np.int64))
            sizes.append(np.fromiter(map(len, rows), dtype=np.int64))
        order, offsets = np.concatenate(documents), np.cumsum(np.concatenate([[0], *sizes]), dtype=np.int64)
        counts = [np.add.reduceat(values[order], offsets[:-1]) for values in (labels, lengths)]
        return cls(order, offsets, *counts)

    def save(self, folder: Path) -> None:
        """Write the files that `open` reads, unless another process is first."""
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        for field in dataclasses.fields(self):
            np.save(temporary / f"{field.name}.npy", getattr(self, field.name))
        move(temporary, folder)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """What `save` wrote, memory-mapped.

        Raises:
            DataError: a file is missing or damaged.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: cannot be read as packed data ({error}); delete the folder") from error


class PackedDataset:
    """The rows of a split. With `packing` False, every document is a row."""

    def __init__(
        self, tokens: TokenDataset, max_length: int, *, packing: bool = True, made: Packing | None = None
    ) -> None:
        """`made`: how the documents were packed before."""
        self.tokens = tokens
        self.max_length = max_length
        made = made or Packing.of(tokens, max_length, packing=packing)
        self._documents, self._offsets = made.documents, made.offsets
        self._label_counts, self._token_counts = made.label_counts, made.token_counts

    @classmethod
    def open(cls, folder: Path, max_length: int, *, packing: bool) -> Self:
        """The split whose tokens are in `folder`, which are packed once for all processes that open it.

        Raises:
            DataError: a file is missing or damaged.
        """
        tokens = TokenDataset.open(folder)
        if not packing:
            return cls(tokens, max_length, packing=False)
        packed = folder / f"packed-{max_length}"
        if not packed.exists():
            Packing.of(tokens, max_length, packing=True).save(packed)
        return cls(tokens, max_length, made=Packing.open(packed))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def fill(self) -> float:
        """Part of the positions that hold a token, were every row padded to max_length."""
        return len(self.tokens.input_ids) / (len(self) * self.max_length)

    def num_label_tokens(self, rows: int | slice | Integers) -> Integers:
        """Tokens that carry loss, of one row or of each of an array or slice of rows."""
        return np.asarray(self._label_counts[rows], dtype=np.int64)

    def num_tokens(self, rows: int | slice | Integers) -> Integers:
        """Tokens of one row or of each of an array or slice of rows, padding not counted."""
        return np.asarray(self._token_counts[rows], dtype=np.int64)

    def documents(self, row: int) -> Integers:
        """Indices of the documents in a row."""
        return self._documents[self._offsets[row] : self._offsets[row + 1]]

    def row(self, row: int) -> PackedRow:
        """The documents of a row, end to end."""
        documents = [self.tokens.document(index) for index in self.documents(row)]
        lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
        input_ids = np.concatenate([ids for ids, _ in documents]).astype(np.int64)
        learned = np.concatenate([mask for _, mask in documents])
        starts = np.cumsum(lengths) - lengths
        learned[starts] = False
        position_ids = np.arange(len(input_ids)) - np.repeat(starts, lengths)
        return PackedRow(input_ids, np.where(learned, input_ids, IGNORED), position_ids, lengths)


def unlearned(row: PackedRow) -> PackedRow:
    """The same row with no token to learn: it takes part in a batch, and adds nothing to its loss."""
    return dataclasses.replace(row, labels=np.full_like(row.labels, IGNORED))


def collate(rows: Sequence[PackedRow], pad_token_id: int, *, flatten: bool) -> dict[str, torch.Tensor | int]:
    """The keyword arguments of a model's forward pass, never an attention mask.

    flatten False: `input_ids`, `labels`, `position_ids` [rows, longest row]; the padding is a document of its own
    without labels. flatten True (flash attention): the same as [1, all tokens], unpadded, with the document borders as
    int32 `cu_seq_lens_q/k` [documents + 1] and `max_length_q/k`, as transformers' DataCollatorWithFlattening does it.
    """
    return _flatten(rows) if flatten else _pad(rows, pad_token_id)


def collate_pairs(rows: Sequence[PackedRow], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Of rows that hold a source and a learned target: `input_ids` and `attention_mask` [rows, longest source], padded
    on the right, and `labels` [rows, longest target], filled up with -100. A row without labels is a source alone.
    """
    learned = [row.labels != IGNORED for row in rows]
    sources = [torch.from_numpy(row.input_ids[~mask]) for row, mask in zip(rows, learned, strict=True)]
    targets = [torch.from_numpy(row.labels[mask]) for row, mask in zip(rows, learned, strict=True)]
    if not any(map(len, targets)):
        targets[0] = torch.tensor([IGNORED])
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad(sources, padding_value=pad_token_id),
        "attention_mask": pad([torch.ones_like(source) for source in sources]),
        "labels": pad(targets, padding_value=IGNORED),
    }


def _pad(rows: Sequence[PackedRow], pad_token_id: int) -> dict[str, torch.Tensor | int]:
    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    position_ids = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        size = len(row.input_ids)
        input_ids[index, :size] = torch.from_numpy(row.input_ids)
        labels[index, :size] = torch.from_numpy(row.labels)
        position_ids[index, :size] = torch.from_numpy(row.position_ids)
        position_ids[index, size:] = torch.arange(longest - size)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def _flatten(rows: Sequence[PackedRow]) -> dict[str, torch.Tensor | int]:
    lengths = np.concatenate([row.document_lengths for row in rows])
    borders = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(np.concatenate([row.input_ids for row in rows]))[None],
        "labels": torch.from_numpy(np.concatenate([row.labels for row in rows]))[None],
        "position_ids": torch.from_numpy(np.concatenate([row.position_ids for row in rows]))[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }
