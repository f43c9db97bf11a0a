"""Rows -> token ids and loss masks, kept in a folder of numpy files. Knows nothing of packing or batches.

A document's ids are `[bos] + ids(prompt) + ids(completion) + [eos]`. Prompt and completion are tokenised separately, so
the prompt that is served later tokenises to exactly the prefix that was trained: a tokenizer applied to both at once
could merge characters across their border.

- bos comes first if the tokenizer itself puts it before plain text (Llama does, GPT-2 does not). A chat template writes
  its own.
- eos ends every document and is learned, or the model would not know when to stop. It is not added where the chat
  template already ended the answer with it; a template with another end token (Gemma's <end_of_turn>) gets both.
- For classification there is no end token, and the last "token" is the number of the label, the only one with loss.
  Before it come the ids that the tokenizer itself makes of the text, with whatever special tokens it puts around it.
- `seq2seq` keeps two sequences in one document, source and target, each with the special tokens that the tokenizer puts
  around it; the first learned token is where the target begins.
- Text that looks like a special token stays text in plain formats; in chats, the template's own are parsed.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from heliostat.data.config import DataConfig
from heliostat.data.formats import Segment, chat_template, to_segments
from heliostat.data.records import Row
from heliostat.errors import DataError, ModelError

# Rows tokenised in one call: enough for the tokenizer's threads, little enough for memory.
CHUNK_ROWS = 1000
# Below this many rows, tokenising is over before a progress bar tells anything.
PROGRESS_ROWS = 20_000

ARRAYS = ("input_ids", "loss_mask", "offsets")
Ids = npt.NDArray[np.int32 | np.uint16]
Mask = npt.NDArray[np.bool_]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a split."""

    rows: int
    documents: int
    tokens: int
    supervised_tokens: int
    """Tokens that carry loss; the first of a document never does, because nothing comes before it."""
    truncated: int
    """Documents cut at max_length."""
    dropped: int
    """Documents left out: longer than max_length, or without a learned token once cut."""


@dataclass(frozen=True)
class Encoded:
    """All documents end to end: `input_ids` and `loss_mask` [tokens], `offsets` [documents + 1]."""

    input_ids: Ids
    loss_mask: Mask
    offsets: Offsets
    counts: Counts

    def save(self, folder: Path, split: str) -> None:
        """Write the files that `TokenDataset.open` reads into `folder`, which is made."""
        folder.mkdir(parents=True)
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        (folder / "meta.json").write_text(json.dumps({"split": split, **asdict(self.counts)}, indent=2) + "\n")


class TokenDataset:
    """The documents of a split, memory-mapped: opening costs nothing, workers of a machine share the pages."""

    def __init__(self, input_ids: Ids, loss_mask: Mask | None, offsets: Offsets, meta: dict[str, Any]) -> None:
        """`loss_mask` None: everything is learned, and `meta` has what `count_ended` tells."""
        self.input_ids = input_ids
        self.loss_mask = loss_mask
        self.offsets = offsets
        self.meta = meta

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open what `Encoded.save` wrote, or `Corpus.tokenise`, which leaves out the mask.

        Raises:
            DataError: a file is missing or damaged.
        """
        try:
            meta = json.loads((folder / "meta.json").read_text())
            names = [name for name in ARRAYS if name != "loss_mask" or not meta.get("all_learned")]
            found = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: cannot be read as tokenised data ({error}); delete the folder") from error
        return cls(found["input_ids"], found.get("loss_mask"), found["offsets"], meta)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Offsets:
        """Tokens of each document, [documents]."""
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> Offsets:
        """Tokens of each document that carry loss, [documents]; its first token never does."""
        if self.loss_mask is None:
            return self.lengths - 1
        starts = self.offsets[:-1]
        learned = np.add.reduceat(self.loss_mask, starts, dtype=np.int64)
        return np.asarray(learned - self.loss_mask[starts], dtype=np.int64)

    def document(self, index: int) -> tuple[Ids, Mask]:
        """(ids, loss mask) of one document, both [length], views of the files."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        ids = self.input_ids[span]
        return ids, np.ones(len(ids), dtype=np.bool_) if self.loss_mask is None else self.loss_mask[span]

    def count_ended(self, token: int) -> int:
        """Documents whose last token is this one and carries loss."""
        if self.loss_mask is None:
            return int(self.meta["ended"])
        last = self.offsets[1:] - 1
        return int(((self.input_ids[last] == token) & self.loss_mask[last]).sum())


def move(temporary: Path, folder: Path) -> None:
    """Put a finished folder where it belongs, unless another process has put one with the same content there."""
    temporary.chmod(0o755)
    try:
        os.rename(temporary, folder)
    except OSError:
        # Another process was first; a folder that is there is complete.
        if not folder.exists():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def encode(rows: Sequence[Row], tokenizer: Any, config: DataConfig) -> Encoded:
    """Tokenise rows into documents of at most `max_length` tokens.

    Longer ones are split into pieces of nearly equal length (`text`), or treated by `excess_length_strategy`: raise,
    truncate (the beginning is kept, so its end and eos are lost; but a label or target stays) or drop.

    Raises:
        DataError: a row is wrong (see `to_segments`) or too long, or no document is left.
        ModelError: the tokenizer is unfit: no eos token, no fast implementation, no chat template.
    """
    encoder = DocumentEncoder(tokenizer, config)
    ids: list[Ids] = []
    masks: list[Mask] = []
    truncated = dropped = 0
    too_long: list[tuple[int, str]] = []
    for row, document, mask in _documents(rows, encoder):
        pieces = fit(document, mask, config, encoder.source_end)
        shortened = len(document) > config.max_length and config.format != "text"
        if shortened:
            too_long.append((len(document), row.origin))
        truncated += shortened and bool(pieces)
        dropped += not pieces
        ids += [piece for piece, _ in pieces]
        masks += [learned for _, learned in pieces]
    if too_long and config.excess_length_strategy == "raise":
        raise _too_long_error(too_long, len(rows), config.max_length)
    if not ids:
        raise DataError(
            f"none of the {len(rows)} rows fits data.max_length: {config.max_length} with a learned token; raise it"
        )
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    supervised = sum(int(mask[1:].sum()) for mask in masks)
    counts = Counts(len(rows), len(ids), int(offsets[-1]), supervised, truncated, dropped)
    return Encoded(np.concatenate(ids), np.concatenate(masks), offsets, counts)


class DocumentEncoder:
    """Segments -> ids, by the rules at the top of this module. Raises ModelError for a tokenizer that is unfit."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} has no fast implementation (tokenizer.json); convert it first"
            )
        self._labels = {label: number for number, label in enumerate(config.labels or ())}
        if tokenizer.eos_token_id is None and config.task == "causal_lm":
            raise ModelError("the tokenizer has no eos token, so the model could not learn where to stop; set one")
        self._tokenizer = tokenizer
        self._config = config
        self._template = chat_template(tokenizer, config)
        self.source_end = _tokens_behind(tokenizer) if config.task == "seq2seq" else 0
        """Tokens that the tokenizer puts behind a source: they stay when it is cut."""
        self._bos = [] if self._template or config.task == "seq2seq" else leading_bos(tokenizer)

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the prompts that `prompt_of` gives: exactly the prefixes of the trained documents."""
        if self._config.task != "causal_lm":
            return text_ids(self._tokenizer, texts)
        return [self._bos + ids for ids in self._tokenise(texts)["input_ids"]]

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of completions as they are trained, without their end token."""
        return [list(ids) for ids in self._tokenise(texts)["input_ids"]]

    def documents(self, rows: Sequence[Row]) -> list[tuple[Ids, Mask]]:
        """(ids, loss mask) of each row's document, of any length."""
        segments = [to_segments(row, self._config, self._template) for row in rows]
        if self._config.task == "classification":
            texts = self.prompts([text.text for text, _ in segments])
            return [self._labelled(ids, label.text) for ids, (_, label) in zip(texts, segments, strict=True)]
        if self._config.task == "seq2seq":
            return self._pairs(segments)
        prompts = self._prompts_with_masks([parts[:-1] for parts in segments])
        completions = self._tokenise([parts[-1].text for parts in segments])["input_ids"]
        return [self._join(*prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]

    def _labelled(self, text: list[int], label: str) -> tuple[Ids, Mask]:
        ids = np.array([*text, self._labels[label]], dtype=np.int32)
        return ids, np.arange(len(ids)) == len(text)

    def _pairs(self, segments: list[list[Segment]]) -> list[tuple[Ids, Mask]]:
        sources = text_ids(self._tokenizer, [source.text for source, _ in segments])
        texts = [target.text for _, target in segments]
        targets = self._tokenizer(text_target=texts, split_special_tokens=True, verbose=False)["input_ids"]
        return [
            self._join(source, [False] * len(source), target) for source, target in zip(sources, targets, strict=True)
        ]

    def _join(self, prompt: list[int], prompt_mask: list[bool], completion: list[int]) -> tuple[Ids, Mask]:
        eos = self._tokenizer.eos_token_id
        # mBART writes the target's language behind it.
        if eos not in completion[-2 if self._config.task == "seq2seq" else -1 :]:
            completion = [*completion, eos]
        bos = self._bos
        ids = np.array(bos + prompt + completion, dtype=np.int32)
        mask = np.array([False] * len(bos) + prompt_mask + [True] * len(completion), dtype=np.bool_)
        return ids, mask

    def _prompts_with_masks(self, prompts: list[list[Segment]]) -> Iterator[tuple[list[int], list[bool]]]:
        texts = ["".join(part.text for part in parts) for parts in prompts]
        if not any(part.learn for parts in prompts for part in parts):
            yield from ((ids, [False] * len(ids)) for ids in self._tokenise(texts)["input_ids"])
            return
        encoded = self._tokenise(texts, offsets=True)
        for parts, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield ids, _learned(parts, offsets)

    def _tokenise(self, texts: Sequence[str], *, offsets: bool = False) -> Any:
        return self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=self._template is None,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of whole texts, as a classifier sees them: what looks like a special token in them stays text."""
    encoded = tokenizer(list(texts), split_special_tokens=True, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def leading_bos(tokenizer: Any) -> list[int]:
    """[bos id] if the tokenizer itself puts it before plain text, else []."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []


def _learned(parts: Sequence[Segment], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token of a prompt, whether it begins in a learned segment (an earlier answer of a dialogue)."""
    if not parts:
        return []
    ends = np.cumsum([len(part.text) for part in parts])
    learn = np.array([part.learn for part in parts])
    starts = np.array([start for start, _ in offsets])
    # A token of white space only may be said to begin at its end, and so after the last part.
    containing = np.minimum(np.searchsorted(ends, starts, side="right"), len(parts) - 1)
    mask: list[bool] = learn[containing].tolist()
    return mask


def _documents(rows: Sequence[Row], encoder: DocumentEncoder) -> Iterator[tuple[Row, Ids, Mask]]:
    chunks = [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]
    console = Console(stderr=True)
    quiet = len(rows) < PROGRESS_ROWS or not console.is_terminal
    for chunk in track(chunks, "tokenising", console=console, disable=quiet):
        for row, (ids, mask) in zip(chunk, encoder.documents(chunk), strict=True):
            yield row, ids, mask


def _too_long_error(too_long: list[tuple[int, str]], rows: int, limit: int) -> DataError:
    length, origin = too_long[0]
    return DataError(
        f"{origin}: its {length} tokens exceed data.max_length: {limit} ({len(too_long)} of {rows} rows do, the "
        f"longest has {max(too_long)[0]}); raise it, or set data.excess_length_strategy to truncate or drop"
    )


def _tokens_behind(tokenizer: Any) -> int:
    added = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return sum(1 for _ in takewhile(bool, reversed(added)))


def fit(ids: Ids, mask: Mask, config: DataConfig, source_end: int = 0) -> list[tuple[Ids, Mask]]:
    """The pieces of a document that are not longer than `max_length`; none if it is to be dropped."""
    limit = config.max_length
    if len(ids) <= limit:
        return [(ids, mask)]
    if config.format == "text":
        # Nearly equal pieces: a remainder of one token, which could not be learned, never comes up.
        pieces = -(-len(ids) // limit)
        return list(zip(np.array_split(ids, pieces), np.array_split(mask, pieces), strict=True))
    if config.task == "classification":
        cut = config.excess_length_strategy == "truncate"
        return [(np.append(ids[: limit - 1], ids[-1]), np.append(mask[: limit - 1], mask[-1]))] if cut else []
    if config.format == "seq2seq":
        return _with_shorter_source(ids, mask, config, source_end)
    fits = config.excess_length_strategy == "truncate" and mask[1:limit].any()
    return [(ids[:limit], mask[:limit])] if fits else []


def _with_shorter_source(ids: Ids, mask: Mask, config: DataConfig, end: int) -> list[tuple[Ids, Mask]]:
    """A source and its target, of which the source alone is cut: before the tokens that end it."""
    start = int(mask.argmax())
    room = config.max_length - (len(ids) - start)
    if config.excess_length_strategy != "truncate" or room <= end:
        return []
    kept = np.r_[0 : room - end, start - end : len(ids)]
    return [(ids[kept], mask[kept])]
