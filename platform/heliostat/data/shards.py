"""Pieces of files -> shards: their token ids and what is to be known of their rows, made by several processes.

A shard is a file of the cache, whole or absent. Knows nothing of splits.
"""

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import threading
import zipfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from heliostat.data.config import DataConfig
from heliostat.data.contents import digest
from heliostat.data.pieces import Piece, lines_before
from heliostat.data.records import Row
from heliostat.data.streams import rows_of
from heliostat.data.tokens import CHUNK_ROWS, DocumentEncoder, Ids, fit
from heliostat.errors import DataError, ResourceError

# Rows that are tokenised in one call hold about so many characters: ids take far more memory than text meanwhile.
CHUNK_CHARACTERS = 2_000_000
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """A tokenised piece: its documents end to end, and the rows that they are of."""

    input_ids: Ids
    """[tokens], of the type that `id_type` gives."""
    lengths: Integers
    """Tokens of each document, [documents]."""
    documents: Integers
    """Documents of each row, [rows]."""
    digests: npt.NDArray[np.uint64]
    """What each row says (see `contents.digest`), [rows]."""
    numbers: Integers
    """Lines (rows, for Parquet) of the piece before each row, [rows]."""
    lines: int
    """Lines (rows) of the piece."""

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
            np.savez(file, **vars(self))
        os.replace(file.name, path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            DataError: the file is damaged.
        """
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            return cls(**{**arrays, "lines": int(arrays["lines"])})
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: cannot be read as tokenised data ({error}); delete it") from error

    def only(self, rows: npt.NDArray[np.bool_]) -> "Shard":
        """The shard with only the rows of a mask, [rows]."""
        documents = np.repeat(rows, self.documents)
        return Shard(
            self.input_ids[np.repeat(documents, self.lengths)],
            self.lengths[documents],
            self.documents[rows],
            self.digests[rows],
            self.numbers[rows],
            self.lines,
        )


def id_type(tokenizer: Any) -> type[np.uint16] | type[np.int32]:
    """The type of the ids: two bytes where the vocabulary allows it."""
    return np.uint16 if len(tokenizer) <= 2**16 else np.int32


def made(jobs: Sequence[tuple[Piece, Path]], tokenizer: Any, config: DataConfig) -> Generator[Path]:
    """The shards of the pieces, each at its path, in their order; those that are not there yet are made.

    Whoever wants no more closes the generator, which ends the work.

    Raises:
        DataError: a file or a row is wrong.
        ModelError: the tokenizer is unfit.
        ResourceError: a process was killed.
    """
    missing = [(piece, path) for piece, path in jobs if not path.exists()]
    processes = min(config.preprocessing_num_workers or len(os.sched_getaffinity(0)), len(missing))
    if processes < 2:
        for piece, path in jobs:
            if not path.exists():
                tokenise(piece, path, tokenizer, config)
            yield path
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start, initargs=(tokenizer, config)
    )
    try:
        working = {path: pool.submit(_work, piece, path) for piece, path in missing}
        for _, path in jobs:
            if path in working:
                working[path].result()
            yield path
    except BrokenProcessPool as error:
        raise ResourceError(
            f"a process that tokenises was killed, probably for want of memory; the same command goes on from there, "
            f"with fewer processes by data.preprocessing_num_workers (now {processes})"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_own: list[Any] = []
"""Tokenizer and configuration of a process of the pool."""


def _start(tokenizer: Any, config: DataConfig) -> None:
    # There are as many processes as CPUs already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _own[:] = [tokenizer, config]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool whose owner was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(piece: Piece, path: Path) -> None:
    tokenise(piece, path, *_own)


def tokenise(piece: Piece, path: Path, tokenizer: Any, config: DataConfig) -> None:
    """Write the shard of a piece.

    Raises:
        DataError: a row is wrong.
        ModelError: the tokenizer is unfit.
    """
    encoder = DocumentEncoder(tokenizer, config)
    try:
        shard = _encode(piece, encoder, tokenizer, config, before=0)
    except DataError:
        # Once more for the right line in the message: counting those before each piece would read a file many times.
        _encode(piece, encoder, tokenizer, config, before=lines_before(piece, config.text_separator))
        raise
    path.parent.mkdir(parents=True, exist_ok=True)
    shard.save(path)


def _encode(piece: Piece, encoder: DocumentEncoder, tokenizer: Any, config: DataConfig, before: int) -> Shard:
    rows = rows_of(piece, config, before)
    ids: list[Ids] = []
    lengths: list[int] = []
    documents: list[int] = []
    digests: list[int] = []
    numbers: list[int] = []
    for chunk in _chunks(rows):
        encoded = encoder.documents([row for _, row in chunk])
        for (number, row), (document, mask) in zip(chunk, encoded, strict=True):
            parts = [part for part, _ in fit(document, mask, config)]
            ids += [part.astype(id_type(tokenizer)) for part in parts]
            lengths += map(len, parts)
            documents.append(len(parts))
            digests.append(digest(row, config))
            numbers.append(number)
    return Shard(
        np.concatenate([np.zeros(0, id_type(tokenizer)), *ids]),
        np.array(lengths, dtype=np.int64),
        np.array(documents, dtype=np.int64),
        np.array(digests, dtype=np.uint64),
        np.array(numbers, dtype=np.int64),
        rows.lines,
    )


def _chunks(rows: Iterable[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    """The rows in lists of at most `CHUNK_ROWS` and about `CHUNK_CHARACTERS`."""
    chunk: list[tuple[int, Row]] = []
    characters = 0
    for number, row in rows:
        chunk.append((number, row))
        characters += row.characters
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
