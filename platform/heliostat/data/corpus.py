"""The files of a corpus -> token folders on disk, in memory that does not grow with the corpus.

Each piece of a file is tokenised to a shard in the cache (`shards`), and the shards are put together to the splits,
which `TokenDataset` opens. So work that was killed goes on with the next shard, and files that were added cost only
themselves.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from heliostat.config import fingerprint
from heliostat.data.config import DataConfig
from heliostat.data.contents import Contents
from heliostat.data.pieces import Piece, origin, pieces
from heliostat.data.shards import Shard, id_type, made
from heliostat.data.streams import Share, Stream
from heliostat.data.tokens import Counts, move
from heliostat.errors import DISK_FULL, DataError, ResourceError


@dataclass(frozen=True)
class File:
    """A file and its content."""

    path: Path
    sha256: str
    size: int
    """Bytes."""


class Corpus:
    """The splits of a corpus, and the files that they are made of."""

    def __init__(self, splits: Mapping[str, Stream], config: DataConfig, seed: int, cache: Path) -> None:
        """Hash the files, unless `cache` knows them by their path, size and time.

        Raises:
            DataError: a file cannot be read.
        """
        self._splits = splits
        self._config = config
        self._seed = seed
        self._cache = cache
        paths = dict.fromkeys(path for split in splits.values() for path in split.files)
        with ThreadPoolExecutor() as pool:
            self._files = {file.path: file for file in pool.map(partial(_look_at, memory=cache / "files"), paths)}

    @property
    def sha256(self) -> str:
        """Hash of everything that decides which rows the splits have."""
        splits = {
            name: [[self._content(path) for path in split.files], asdict(split.share), split.limit]
            for name, split in self._splits.items()
        }
        seed = None if all(split.share == Share() for split in self._splits.values()) else self._seed
        what = [splits, seed, self._config.columns, self._config.text_separator]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def manifest(self) -> dict[str, list[dict[str, Any]]]:
        """Split -> its files, as `records.file_manifest` gives them."""
        return {name: [self._entry(path) for path in split.files] for name, split in self._splits.items()}

    def tokenise(self, tokenizer: Any, folder: Path, made_by: Sequence[Any]) -> None:
        """Write each split to a folder below `folder`, unless that is there. `made_by`: all that tokens depend on
        beside the files.

        A second process with the same work waits for the first.

        Raises:
            DataError: a file or a row is wrong, or a split has no rows.
            ModelError: the tokenizer is unfit.
            ResourceError: a process that tokenises was killed, or the disk is full.
        """
        with _locked(folder):
            if folder.exists():
                return
            temporary = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            try:
                for files in dict.fromkeys(split.files for split in self._splits.values()):
                    self._write(files, tokenizer, temporary, made_by)
                move(temporary, folder)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                raise ResourceError(
                    f"no room to write the tokens of the corpus to {self._cache}: {error.strerror}; make room, and the "
                    "same command goes on from there"
                ) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, files: tuple[Path, ...], tokenizer: Any, folder: Path, made_by: Sequence[Any]) -> None:
        """The splits that are made of these files."""
        jobs = [(number, *job) for number, path in enumerate(files) for job in self._jobs(path, made_by)]
        lines, rows = [0] * len(files), [0] * len(files)
        with ExitStack() as stack:
            shards = stack.enter_context(closing(made([job[1:] for job in jobs], tokenizer, self._config)))
            told = stack.enter_context(closing(_told(shards, len(jobs))))
            writers = [
                stack.enter_context(_Writer(folder / name, split, self._seed, tokenizer))
                for name, split in self._splits.items()
                if split.files == files
            ]
            for (number, _, _), place in zip(jobs, told, strict=True):
                shard = Shard.open(place)
                for writer in writers:
                    writer.add(number, lines[number], shard)
                lines[number] += shard.lines
                rows[number] += len(shard.digests)
                if all(writer.is_full for writer in writers):
                    return
            if 0 in rows:
                raise DataError(f"{files[rows.index(0)]}: has no rows")

    def _jobs(self, path: Path, made_by: Sequence[Any]) -> Iterator[tuple[Piece, Path]]:
        """The pieces of a file, and where their shards are."""
        found = pieces(path, self._config.text_separator)
        if not found:
            raise DataError(f"{path}: has no rows")
        for piece in found:
            what = [*self._content(path), piece.start, piece.end, self._config.text_separator, *made_by]
            yield piece, self._cache / "shards" / f"{fingerprint(what)}.npz"

    def _content(self, path: Path) -> list[str]:
        return [self._files[path].sha256, path.suffix.lower()]

    def _entry(self, path: Path) -> dict[str, Any]:
        file = self._files[path]
        return {"path": str(path), "sha256": file.sha256, "bytes": file.size}


class _Writer:
    """The folder of one split, written a shard at a time."""

    def __init__(self, folder: Path, split: Stream, seed: int, tokenizer: Any) -> None:
        folder.mkdir(parents=True)
        self._folder, self._split, self._seed, self._eos = folder, split, seed, tokenizer.eos_token_id
        self._rows = self._documents = self._tokens = self._ended = 0
        types = {"input_ids": id_type(tokenizer), "offsets": np.int64, **_ROW_TYPES}
        self._arrays = {name: _GrowingArray(folder / f"{name}.npy", dtype) for name, dtype in types.items()}
        self._arrays["offsets"].append(np.zeros(1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        for array in self._arrays.values():
            array.close()
        if failed:
            return
        if not self._rows:
            raise DataError(
                f"data.{self._folder.name}: none of the rows falls to this split; give it files of its own, or raise "
                f"data.{self._folder.name}_size"
            )
        # The first token of a document is never learned; none is cut or left out.
        counts = Counts(self._rows, self._documents, self._tokens, self._tokens - self._documents, 0, 0)
        meta = {"split": self._folder.name, **asdict(counts), "all_learned": True, "ended": self._ended}
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

    @property
    def is_full(self) -> bool:
        """Whether the split takes no more rows."""
        return self._rows == self._split.limit

    def add(self, file: int, before: int, shard: Shard) -> None:
        """Take the split's rows of a shard of file number `file`, with `before` lines before its piece."""
        chosen = self._split.share.chosen(shard.digests, self._seed)
        if self._split.limit is not None:
            chosen &= np.cumsum(chosen) <= self._split.limit - self._rows
        part = shard if chosen.all() else shard.only(chosen)
        ends = np.cumsum(part.lengths)
        values = {
            "input_ids": part.input_ids,
            "offsets": self._tokens + ends,
            "digests": part.digests,
            "files": np.full(len(part.digests), file),
            "numbers": before + part.numbers,
        }
        for name, array in self._arrays.items():
            array.append(values[name])
        self._rows += len(part.digests)
        self._documents += len(part.lengths)
        self._tokens += len(part.input_ids)
        self._ended += int((part.input_ids[ends - 1] == self._eos).sum())


class _GrowingArray:
    """A .npy file of one dimension, to which one appends: numpy pads its header so that the length can be written last.

    https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._write_header()

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self._length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


_ROW_TYPES = {"digests": np.uint64, "files": np.uint32, "numbers": np.int64}
"""What is kept of each row beside its tokens."""


class Origins(Sequence[str]):
    """Where each row of a split is from, put together when it is asked for."""

    def __init__(self, paths: Sequence[Path], files: npt.NDArray[np.uint32], numbers: npt.NDArray[np.int64]) -> None:
        """`files`: the number of each row's file in `paths`; `numbers`: lines (rows) before it there; both [rows]."""
        self._paths, self._files, self._numbers = paths, files, numbers

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        return origin(self._paths[self._files[index]], int(self._numbers[index]))


def contents(folder: Path, paths: Sequence[Path]) -> Contents:
    """What the rows of a split say that `Corpus.tokenise` wrote to `folder`; `paths`: its files.

    Raises:
        DataError: a file is missing or damaged.
    """
    try:
        digests, files, numbers = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ROW_TYPES)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read as tokenised data ({error}); delete the folder") from error
    # A row without text is refused when it is tokenised, and there are no weights.
    none = np.zeros(len(digests), dtype=np.bool_)
    return Contents(Origins(paths, files, numbers), digests, again=none, blank=none, labels=None)


def _look_at(path: Path, memory: Path) -> File:
    """Hash a file, or remember its hash from `memory`, where it has the same path, size and time."""
    try:
        status = path.stat()
        known = memory / f"{fingerprint([str(path.absolute()), status.st_size, status.st_mtime_ns])}.sha256"
        if not known.exists():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            memory.mkdir(parents=True, exist_ok=True)
            temporary = known.with_suffix(f".{os.getpid()}")
            temporary.write_text(digest)
            os.replace(temporary, known)
        return File(path, known.read_text(), status.st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time works on the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            Console(stderr=True).print("another process tokenises the same data; waiting for it", highlight=False)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _told(shards: Iterable[Path], total: int) -> Generator[Path]:
    """The shards, with a progress bar on a terminal, or a line for each tenth where there are many."""
    console = Console(stderr=True)
    told = track(shards, "tokenising", total=total, console=console, disable=total == 1 or not console.is_terminal)
    for number, shard in enumerate(told, 1):
        yield shard
        if not console.is_terminal and total >= 10 and number * 10 // total > (number - 1) * 10 // total:
            console.print(f"tokenised {number} of {total} pieces", highlight=False)
