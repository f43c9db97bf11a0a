"""Predictions as a file: .jsonl, .csv or .parquet. Knows columns and rows, and nothing of what they say."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from heliostat.errors import ConfigError

SUFFIXES = (".jsonl", ".csv", ".parquet")


def check(path: Path) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Raises:
        ConfigError: its kind is unknown, or its folder is not there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--predictions {path}: unknown kind of file; its name must end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--predictions {path}: there is no folder {path.parent}; make it first")


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys, by the file's suffix; what was there before is replaced once all is written.

    CSV is RFC 4180 in UTF-8: every text is in quotes, which tells an empty one from a missing value.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _write(temporary, path.suffix.lower(), rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, suffix: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    if suffix == ".csv":
        pyarrow.csv.write_csv(_table([_flat(row) for row in rows]), path)
    else:
        pyarrow.parquet.write_table(_table(rows), path)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with mappings, such as probabilities, as JSON text, which is all that a CSV field can hold."""
    return {key: json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value
            for key, value in row.items()}  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    table = pyarrow.Table.from_pylist([dict(row) for row in rows])
    # A metric that scored no row would be a column without a type.
    fields = [
        field.with_type(pyarrow.float64()) if pyarrow.types.is_null(field.type) else field for field in table.schema
    ]
    return table.cast(pyarrow.schema(fields))
