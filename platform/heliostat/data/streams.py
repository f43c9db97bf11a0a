"""The rows of a corpus that does not fit into memory: its splits, read from the files whenever they are asked for.

Which split a row is in is decided by itself alone, by a hash of its text and the seed. So neither the other rows nor
the number of files or processes matter, and a corpus that grows never moves a row from one split to another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heliostat import cache
from heliostat.data.config import DataConfig
from heliostat.data.contents import digest
from heliostat.data.pieces import Piece, PieceRows, pieces
from heliostat.data.records import HUB_PREFIX, Row, expand
from heliostat.errors import DataError

# Characters that a new tokenizer learns from: more changes a vocabulary of usual size little, and takes memory.
SAMPLE_CHARACTERS = 100_000_000


@dataclass(frozen=True)
class Share:
    """The part of the rows that a split takes: those whose hash is from `low` to below `high`, of 0 to 1."""

    low: float = 0.0
    high: float = 1.0

    def chosen(self, digests: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.bool_]:
        """Which rows, of their `contents.digest`, are in the split, [rows].

        The hash is a multiplication by an odd number that the seed draws (Dietzfelbinger et al. 1997, "A Reliable
        Randomized Algorithm for the Closest-Pair Problem"): equal texts have equal hashes, whatever their white space.
        """
        if self == Share():
            return np.ones(len(digests), dtype=np.bool_)
        hashes = (digests * _factor(seed) >> np.uint64(11)) / 2.0**53
        return np.asarray((hashes >= self.low) & (hashes < self.high), dtype=np.bool_)


@lru_cache
def _factor(seed: int) -> npt.NDArray[np.uint64]:
    return np.random.SeedSequence(seed).generate_state(1, np.uint64) | np.uint64(1)


class Stream(Sequence[Row]):
    """The rows of a split. Going through them reads the files; `len` and indices hold all of them in memory."""

    def __init__(self, files: Sequence[Path], config: DataConfig, seed: int, share: Share, limit: int | None) -> None:
        self.files = tuple(files)
        self.share = share
        self.limit = limit
        self._config = config
        self._seed = seed

    def __iter__(self) -> Iterator[Row]:
        """The rows, in the order of the files.

        Raises:
            DataError: a file or a row is wrong.
        """
        found = 0
        for path in self.files:
            before = 0
            for piece in pieces(path, self._config.text_separator):
                rows = rows_of(piece, self._config, before)
                for _, row in rows:
                    if found == self.limit:
                        return
                    if self._is_chosen(row):
                        found += 1
                        yield row
                before += rows.lines

    def sample(self, characters: int = SAMPLE_CHARACTERS) -> Iterator[Row]:
        """Rows of about so many characters, as many from each piece of the files; the same whenever it is called."""
        parts = [piece for path in self.files for piece in pieces(path, self._config.text_separator)]
        for piece in parts:
            left = characters / len(parts)
            for _, row in rows_of(piece, self._config):
                if left <= 0:
                    break
                if self._is_chosen(row):
                    left -= row.characters
                    yield row

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: Any) -> Any:
        return self._all[index]

    @cached_property
    def _all(self) -> list[Row]:
        return list(iter(self))

    def _is_chosen(self, row: Row) -> bool:
        if self.share == Share():
            return True
        return bool(self.share.chosen(np.array([digest(row, self._config)], dtype=np.uint64), self._seed)[0])


def rows_of(piece: Piece, config: DataConfig, before: int = 0) -> PieceRows:
    """The rows of a piece; `before`: lines (rows, for Parquet) of its file before it, as far as places matter."""
    return PieceRows(piece, [config.columns.get("text", "text")], config.text_separator, before)


def streams(config: DataConfig, seed: int, wanted: Sequence[str]) -> dict[str, Stream]:
    """Those of the `wanted` splits that exist, as `splits.load_splits` gives them; no file is read yet.

    Raises:
        DataError: no file is given, or one is missing.
    """
    train = [source.path for source in config.sources]
    if not train and not config.validation and not config.test:
        raise DataError("data.train: no file is given; set data.train (or data.test to evaluate only)")
    given = {"train": train, "validation": _as_list(config.validation), "test": _as_list(config.test)}
    for source in [source for name in wanted for source in given[name] or train]:
        if source.startswith(HUB_PREFIX):
            raise DataError(f"{source}: data.streaming reads files; download the data set, and name its .parquet files")
    limits = {
        "train": config.max_train_samples,
        "validation": config.max_validation_samples,
        "test": config.max_test_samples,
    }
    shares = _shares(config)
    found = {}
    for name in wanted:
        sources, share = (given[name], Share()) if name != "train" and given[name] else (train, shares.get(name))
        if sources and share is not None:
            files = [cache.kept_here(file) for source in sources for file in expand(source)]
            found[name] = Stream(files, config, seed, share, limits[name])
    return found


def _shares(config: DataConfig) -> dict[str, Share]:
    """The parts of the training files that each split takes; one with files of its own takes none."""
    test = config.test_size if not config.test else 0.0
    validation = config.validation_size if not config.validation else 0.0
    shares = {"train": Share(test + validation, 1.0)}
    if test:
        shares["test"] = Share(0.0, test)
    if validation:
        shares["validation"] = Share(test, test + validation)
    return shares


def _as_list(sources: str | list[str] | None) -> list[str]:
    return [sources] if isinstance(sources, str) else sources or []
