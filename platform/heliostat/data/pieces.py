"""Large text files -> pieces of them -> rows, read as a stream. Knows file formats; nothing of what a row means.

A piece is a range of bytes (.jsonl, .txt) or of row groups (.parquet). A row belongs to the piece in which it begins,
so pieces can be read by different processes, and together give exactly the rows of `records.read`.
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from heliostat.data.records import Row, object_row, parse_json, to_text
from heliostat.errors import DataError

SUFFIXES = (".jsonl", ".parquet", ".txt")
PIECE_BYTES = 64 * 2**20
# A longer document is more likely a separator that was not found; tokenising it would take gigabytes.
MAX_DOCUMENT_BYTES = 32 * 2**20
_BLOCK = 2**20
_BATCH_ROWS = 1000


@dataclass(frozen=True)
class Piece:
    """Part of a file."""

    path: Path
    start: int
    end: int
    """Bytes, or row groups of a Parquet file."""


def pieces(path: Path, separator: str | None) -> list[Piece]:
    """The parts of a file, in order. `separator`: what ends a document of a .txt file; None: it is one document.

    Raises:
        DataError: the file cannot be read, or not as a stream.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: data.streaming reads {' '.join(SUFFIXES)}, not `{path.suffix}`; convert it, or drop streaming"
        )
    if path.suffix.lower() == ".parquet":
        return _row_groups(path)
    size = path.stat().st_size
    if path.suffix.lower() == ".txt" and separator is None:
        _check_size(size, f"{path}:1")
        return [Piece(path, 0, size)]
    return [Piece(path, start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES)]


class PieceRows:
    """The rows of a piece, each with its number: how many lines (rows, for Parquet) of the piece are before it.

    `before` is the number of those before the piece itself, for the places that errors name.
    """

    def __init__(self, piece: Piece, columns: list[str], separator: str | None, before: int = 0) -> None:
        """`columns`: those of Parquet files that are read, where there are such."""
        self._piece = piece
        self._columns = columns
        self._separator = separator
        self._before = before
        self.lines = 0
        """Lines (rows) of the piece that were read so far; all, once the iteration is over."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Read the piece.

        Raises:
            DataError: a row is malformed (with its line), or the file cannot be read.
        """
        self.lines = 0
        suffix = self._piece.path.suffix.lower()
        read = {".jsonl": self._jsonl, ".parquet": self._parquet, ".txt": self._text}[suffix]
        try:
            yield from read()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self._piece.path}: cannot be read: {error}") from error

    def _jsonl(self) -> Iterator[tuple[int, Row]]:
        piece = self._piece
        with piece.path.open("rb") as file:
            if piece.start:
                # Of a line that begins at `start`, this reads no more than the end of the one before.
                file.seek(piece.start - 1)
                file.readline()
            while file.tell() < piece.end:
                number, line = self.lines, file.readline(MAX_DOCUMENT_BYTES + 1)
                self.lines += 1
                _check_size(len(line), self._origin(number))
                text = self._decoded(line, number, first=number == piece.start == 0)
                # White space at the end of a file is no row.
                if text.strip():
                    value = parse_json(piece.path, text.rstrip(), self._before + number + 1)
                    yield number, object_row(value, self._origin(number))

    def _text(self) -> Iterator[tuple[int, Row]]:
        with self._piece.path.open("rb") as file:
            for start, data, end in self._documents(file):
                text = self._decoded(data, self.lines, first=start == 0).replace("\r\n", "\n")
                if text.strip() and self._separator is None:
                    yield 0, Row({"text": text}, self._origin(0))
                elif text.strip():
                    number = self.lines + text[: len(text) - len(text.lstrip())].count("\n")
                    yield number, Row({"text": text.strip()}, self._origin(number))
                self.lines += (data + end).count(b"\n")

    def _documents(self, file: BinaryIO) -> Iterator[tuple[int, bytes, bytes]]:
        """(first byte, document, the separator behind it) of each document that begins in the piece."""
        piece = self._piece
        if self._separator is None:
            yield 0, file.read(), b""
            return
        begin = _begin(file, self._separator, piece.start)
        for number, (start, data, end) in enumerate(_split(file, self._separator, begin, piece.path)):
            if start >= piece.end:
                return
            # The first part begins where the search begins, which is where a document does at the top of a file only.
            if start >= piece.start and (number or not piece.start):
                yield start, data, end

    def _parquet(self) -> Iterator[tuple[int, Row]]:
        piece = self._piece
        with pyarrow.parquet.ParquetFile(piece.path) as file:
            columns = [name for name in self._columns if name in file.schema_arrow.names] or None
            groups = range(piece.start, piece.end)
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns):
                for value in batch.to_pylist():
                    self.lines += 1
                    yield self.lines - 1, Row(value, self._origin(self.lines - 1))

    def _origin(self, number: int) -> str:
        return origin(self._piece.path, self._before + number)

    def _decoded(self, data: bytes, number: int, *, first: bool) -> str:
        return to_text(
            data.removeprefix(codecs.BOM_UTF8) if first else data, self._piece.path, self._before + number + 1
        )


def origin(path: Path, number: int) -> str:
    """The place of a row with `number` lines (rows, for Parquet) of the file before it, as `records.read` writes it."""
    return f"{path}[{number}]" if path.suffix.lower() == ".parquet" else f"{path}:{number + 1}"


def lines_before(piece: Piece, separator: str | None) -> int:
    """Lines (rows, for Parquet) of the file before the first of a piece; reads all that is before it."""
    if piece.path.suffix.lower() == ".parquet":
        metadata = pyarrow.parquet.read_metadata(piece.path)
        return sum(metadata.row_group(group).num_rows for group in range(piece.start))
    if piece.start == 0:
        return 0
    before = PieceRows(Piece(piece.path, 0, piece.start), [], separator)
    for _ in before:
        pass
    return before.lines


def _row_groups(path: Path) -> list[Piece]:
    """Runs of row groups that add up to `PIECE_BYTES` or more, uncompressed."""
    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    found, start, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= PIECE_BYTES or group == metadata.num_row_groups - 1:
            found.append(Piece(path, start, group + 1))
            start, size = group + 1, 0
    return found


def _check_size(size: int, place: str) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{place}: this document has more than {MAX_DOCUMENT_BYTES // 2**20} MiB; set data.text_separator to what "
            "lies between the documents of a .txt file, or cut it"
        )


def _pattern(separator: str) -> re.Pattern[bytes]:
    return re.compile(re.escape(separator).encode().replace(re.escape("\n").encode(), b"\r?\n"))


def _begin(file: BinaryIO, separator: str, start: int) -> int:
    """Where to begin, at or before `start`, to find the same separators that a search of the whole file finds.

    A separator is made of its own bytes, so none lies across the beginning of a run of them.
    """
    own = set(separator.encode() + (b"\r" if "\n" in separator else b""))
    while start:
        low = max(0, start - _BLOCK)
        file.seek(low)
        block = file.read(start - low)
        other = next((place for place in range(len(block) - 1, -1, -1) if block[place] not in own), None)
        if other is not None:
            return low + other + 1
        start = low
    return 0


def _split(file: BinaryIO, separator: str, begin: int, path: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """(first byte, part, the separator behind it) from `begin` to the end of the file."""
    pattern = _pattern(separator)
    file.seek(begin)
    rest = b""
    while block := file.read(_BLOCK):
        rest += block
        cursor = 0
        for match in pattern.finditer(rest):
            yield begin + cursor, rest[cursor : match.start()], match.group()
            cursor = match.end()
        rest = rest[cursor:]
        begin += cursor
        _check_size(len(rest), f"{path}, byte {begin}")
    yield begin, rest, b""
