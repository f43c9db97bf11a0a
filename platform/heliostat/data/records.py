"""Files -> rows. Knows file formats and where each row came from; nothing of what a row means.

Every row is kept or refused with its place: nothing is skipped in silence.
"""

import codecs
import csv
import glob
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from heliostat import cache, storage
from heliostat.errors import DataError
from heliostat.storage import RemoteFile

File = Path | RemoteFile
HUB_PREFIX = "hf:"
# `train.{en,de}`: files that have a row in common on each line.
_PARALLEL = re.compile(r"(.*)\{([^{},]+(?:,[^{},]+)+)\}(.*)")
# Documents are longer than the csv module's 128 KiB default; the largest value that fits a C long everywhere.
FIELD_SIZE_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Row:
    """One record: column -> value, and its place (`file:line`, or `file[index]` where a file has no lines)."""

    fields: dict[str, Any]
    origin: str
    source: int = 0
    """Which data set of a mixture it is of."""

    @property
    def characters(self) -> int:
        """Characters of its texts, those inside of lists and objects not counted."""
        return sum(len(value) for value in self.fields.values() if isinstance(value, str))

    def content(self) -> bytes:
        """The fields as canonical JSON: equal for equal rows, whatever their file or column order."""
        return json.dumps(self.fields, sort_keys=True, ensure_ascii=False, default=str).encode()


def read(
    sources: str | Sequence[str], *, column_names: Sequence[str] | None = None, text_separator: str | None = None
) -> list[Row]:
    """Read files, globs (sorted), URIs of both, or `hf:NAME[:SPLIT]` (default split: train), in the order given.

    Supported: .jsonl .json (an array of objects) .csv (RFC 4180 quoting) .tsv (no quoting) .parquet .txt, and text
    files of parallel lines as `train.{en,de}`, whose columns are then `en` and `de`.
    `column_names` names the columns of csv and tsv files without a header line. A .txt file is one document, or is
    split at `text_separator`, the parts stripped of surrounding white space.

    Raises:
        DataError: a source is missing, empty, of an unknown kind, not UTF-8, or has a malformed row (with its line).
        StorageError, ResourceError: a remote file cannot be fetched.
    """
    rows: list[Row] = []
    for source in _as_list(sources):
        if source.startswith(HUB_PREFIX):
            rows += _read_hub(source)
            continue
        if names := parallel_files(source):
            files = {column: file for column, name in names.items() for file in expand(name)}
            rows += _read_parallel(files)
            continue
        for path in expand(source):
            found = _read_file(path, column_names, text_separator)
            if not found:
                raise DataError(f"{path}: has no rows")
            rows += found
    return rows


def file_manifest(sources: str | Sequence[str]) -> list[dict[str, Any]]:
    """Path, sha256 and size in bytes of every file, for lineage; hub data sets have a name only.

    Raises:
        DataError: a file is missing.
    """
    return [entry for source in _as_list(sources) for entry in _manifest_entries(source)]


def local_files(source: str) -> list[Path]:
    """The files of this machine that one source stands for; a hub data set and a URI have none.

    Raises:
        As `expand`.
    """
    found = [] if source.startswith(HUB_PREFIX) else expand(source)
    return [file for file in found if isinstance(file, Path)]


def expand(source: str) -> list[File]:
    """The files that one path, glob or URI stands for, sorted; of parallel lines, in the order of their columns.

    Raises:
        DataError: there are none, or the source is a folder.
        StorageError: a remote place cannot be reached.
    """
    if names := parallel_files(source):
        return [found for name in names.values() for found in expand(name)]
    if storage.is_remote(source):
        return _expand_remote(source)
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{source}: is a folder; name its files, such as {path}/*.jsonl")
    if path.exists():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        problem = "matches no file" if glob.has_magic(str(path)) else "no such file"
        raise DataError(f"{source}: {problem} (looked in {Path.cwd()})")
    return list(found)


def _expand_remote(source: str) -> list[File]:
    found = storage.find(source)
    if not found:
        raise DataError(f"{source}: no such file")
    if "*" not in source and found[0].uri != source:
        raise DataError(f"{source}: is a folder; name its files, such as {source.rstrip('/')}/*.jsonl")
    return list(found)


def parallel_files(source: str) -> dict[str, str]:
    """Column -> file, where the source names files of parallel lines (`train.{en,de}`); else empty."""
    match = _PARALLEL.fullmatch(source)
    if match is None:
        return {}
    start, names, end = match.groups()
    return {name: f"{start}{name}{end}" for name in names.split(",")}


def _read_parallel(files: dict[str, File]) -> list[Row]:
    columns = {name: _decode(path).rstrip("\n").split("\n") for name, path in files.items()}
    first, *others = files
    for name in others:
        if len(columns[name]) != len(columns[first]):
            raise DataError(
                f"{files[name]}: has {len(columns[name])} lines where {files[first]} has {len(columns[first])}; "
                "lines of parallel files belong together"
            )
    rows = zip(*columns.values(), strict=True)
    return [
        Row({name: line.strip() for name, line in zip(files, lines, strict=True)}, f"{files[first]}:{number}")
        for number, lines in enumerate(rows, 1)
    ]


def _as_list(sources: str | Sequence[str]) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources)


def _manifest_entries(source: str) -> Iterator[dict[str, Any]]:
    if source.startswith(HUB_PREFIX):
        yield {"path": source, "sha256": None, "bytes": None}
        return
    for found in expand(source):
        with cache.here(found) as path, path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield {"path": str(found), "sha256": digest, "bytes": path.stat().st_size}


def _read_file(path: File, column_names: Sequence[str] | None, text_separator: str | None) -> list[Row]:
    readers: dict[str, Callable[[], list[Row]]] = {
        ".jsonl": lambda: _read_jsonl(path),
        ".json": lambda: _read_json(path),
        ".csv": lambda: _read_table(path, column_names, delimiter=",", quoted=True),
        ".tsv": lambda: _read_table(path, column_names, delimiter="\t", quoted=False),
        ".parquet": lambda: _read_parquet(path),
        ".txt": lambda: _read_text(path, text_separator),
    }
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: unknown kind of file `{path.suffix}`; supported: {' '.join(readers)}")
    return readers[path.suffix.lower()]()


def _decode(path: File) -> str:
    """The file's text, without a byte order mark."""
    try:
        with cache.here(path) as here:
            data = here.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    text = to_text(data, path)
    if not text.strip():
        raise DataError(f"{path}: is empty")
    return text


def to_text(data: bytes, path: File, line: int = 1) -> str:
    """Decode bytes that begin on `line` of a file.

    Raises:
        DataError: they are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        byte = data[error.start]
        raise DataError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from error


def _read_jsonl(path: File) -> list[Row]:
    # Not splitlines(): JSON strings may hold other line separators, such as U+2028.
    lines = _decode(path).rstrip().split("\n")
    return [object_row(parse_json(path, line, number), f"{path}:{number}") for number, line in enumerate(lines, 1)]


def parse_json(path: File, text: str, line: int = 1, hint: str = "") -> Any:
    """Parse JSON that starts on `line` of the file.

    Raises:
        DataError: it is malformed.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise DataError(f"{place}: is not valid JSON: {error.msg} at column {error.colno}{hint}") from error


def object_row(value: Any, origin: str) -> Row:
    """The row of a JSON object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, dict):
        raise DataError(f"{origin}: must be a JSON object of columns and values, found a {type(value).__name__}")
    return Row(value, origin)


def _read_json(path: File) -> list[Row]:
    hint = " (a file with one object a line must be named .jsonl)"
    values = parse_json(path, _decode(path), hint=hint)
    if not isinstance(values, list):
        raise DataError(f"{path}:1: must be a JSON array of objects, found a {type(values).__name__}{hint}")
    return [object_row(value, f"{path}[{index}]") for index, value in enumerate(values)]


def _read_table(path: File, column_names: Sequence[str] | None, *, delimiter: str, quoted: bool) -> list[Row]:
    records = _table_records(path, _decode(path), delimiter, quoted)
    while records and not records[-1][1]:
        records.pop()
    columns = list(column_names) if column_names else records.pop(0)[1]
    if len(set(columns)) < len(columns):
        raise DataError(
            f"{path}:1: the header names a column twice: {columns}; set data.column_names if it has no header"
        )
    for line, values in records:
        if len(values) != len(columns):
            raise DataError(f"{path}:{line}: has {len(values)} fields where {len(columns)} are expected: {columns}")
    return [Row(dict(zip(columns, values, strict=True)), f"{path}:{line}") for line, values in records]


def _table_records(path: File, text: str, delimiter: str, quoted: bool) -> list[tuple[int, list[str]]]:
    """(line on which the record starts, its values); a blank line has no values."""
    csv.field_size_limit(FIELD_SIZE_LIMIT)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    records: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for values in reader:
            records.append((line, values))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: is not valid CSV: {error} (the record starts on this line)") from error
    return records


def _read_parquet(path: File) -> list[Row]:
    try:
        with cache.here(path) as here:
            values = pyarrow.parquet.read_table(here).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    return [Row(value, f"{path}[{index}]") for index, value in enumerate(values)]


def _read_text(path: File, separator: str | None) -> list[Row]:
    text = _decode(path).replace("\r\n", "\n")
    if separator is None:
        return [Row({"text": text}, f"{path}:1")]
    rows = []
    start = counted = 0
    line = 1
    for part in text.split(separator):
        if part.strip():
            first = start + len(part) - len(part.lstrip())
            line, counted = line + text.count("\n", counted, first), first
            rows.append(Row({"text": part.strip()}, f"{path}:{line}"))
        start += len(part) + len(separator)
    return rows


def _read_hub(source: str) -> list[Row]:
    # Imported here: it takes a second that reading plain files need not pay.
    import datasets

    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{source}: cannot be loaded as a hub data set: {reason}. Offline, name files instead"
        ) from error
    return [Row(dict(value), f"{source}[{index}]") for index, value in enumerate(data)]
