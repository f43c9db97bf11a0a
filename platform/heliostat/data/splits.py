"""Rows -> train, validation and test rows. Knows nothing of what a row means, except how a `text` document is cut.

Which rows are held out depends on their content and the seed only: rows that are equal, white space aside, always
land in the same split, and neither the order of the files nor `max_train_samples` changes the choice.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from heliostat.data.cloze import questions
from heliostat.data.config import DataConfig
from heliostat.data.formats import field_text
from heliostat.data.mixture import mix
from heliostat.data.records import Row, read
from heliostat.data.streams import streams
from heliostat.errors import DataError

SPLITS = ("train", "validation", "test")
# How far before the wanted place a document may be cut, so that no line or word is broken.
BORDER_WINDOW = 1000


def load_splits(config: DataConfig, seed: int, wanted: Sequence[str] = SPLITS) -> Mapping[str, Sequence[Row]]:
    """The rows of those of the `wanted` splits ("train", "validation", "test") that exist; no other files are read.

    Files that are given win. Otherwise `test_size`, then `validation_size`, are taken from the training rows: below 1 a
    fraction of them (at least one row), else a count. When `format: text` has too few rows for that, such as one large
    document, the end of the text is cut off instead. A passage of `format: cloze` is
    held out whole, and then becomes one row for each question. `max_*_samples` keeps the first rows of the finished
    splits. With `streaming`, the rows are read when they are asked for (see `streams`).

    Raises:
        DataError: nothing is given, a file is wrong (see `read`), or the held-out part leaves no training row.
    """
    if config.streaming:
        return streams(config, seed, wanted)
    given = {"train": [source.path for source in config.sources], "validation": config.validation, "test": config.test}
    sizes = {"test": config.test_size, "validation": config.validation_size}
    held_out = {name: size for name, size in sizes.items() if size and not given[name]}
    needed = {name for name in wanted if given[name]} | ({"train"} if held_out.keys() & set(wanted) else set())
    splits = {
        name: read(sources, column_names=config.column_names, text_separator=config.text_separator)
        for name, sources in given.items()
        if sources and name in needed and name != "train"
    }
    if config.sources and "train" in needed:
        splits["train"] = [row for number in range(len(config.sources)) for row in _read_source(config, number)]
    if not any(given.values()):
        raise DataError("data.train: no file is given; set data.train (or data.test to evaluate only)")
    if "train" in splits:
        splits |= _hold_out(splits["train"], held_out, config, seed)
    if config.format == "cloze":
        splits = {name: questions(rows) for name, rows in splits.items() if name in wanted}
    if config.is_mixture and "train" in splits and "train" in wanted:
        splits["train"] = mix(splits["train"], config.sources, seed)
    limits = {
        "train": config.max_train_samples,
        "validation": config.max_validation_samples,
        "test": config.max_test_samples,
    }
    return {name: splits[name][: limits[name]] for name in SPLITS if name in splits and name in wanted}


def _read_source(config: DataConfig, number: int) -> list[Row]:
    """The rows of a data set of `data.train`, with the columns that `data.columns` names."""
    source = config.sources[number]
    rows = read(source.path, column_names=config.column_names, text_separator=config.text_separator)
    names = {column: config.columns.get(field, field) for field, column in source.columns.items()}
    for row in rows:
        for column in names:
            if column not in row.fields:
                raise DataError(
                    f"{row.origin}: has no column `{column}`, which data.train names for {source.path} (found: "
                    f"{', '.join(row.fields)})"
                )
    renamed = [{names.get(key, key): value for key, value in row.fields.items()} for row in rows]
    return [dataclasses.replace(row, source=number, fields=new) for row, new in zip(rows, renamed, strict=True)]


def _hold_out(rows: list[Row], sizes: dict[str, float], config: DataConfig, seed: int) -> dict[str, list[Row]]:
    """ "train" and one split for each of `sizes`."""
    by_text = config.format == "text" and any(0 < size * len(rows) < 1 for size in sizes.values())
    if by_text:
        return _hold_out_text(rows, sizes, config)
    counts = {name: max(1, round(size * len(rows))) if size < 1 else int(size) for name, size in sizes.items()}
    groups = _groups_by_hash(rows, seed)
    splits = {name: _take(groups, count, name, len(rows)) for name, count in counts.items()}
    splits["train"] = [index for group in groups for index in group]
    if not splits["train"]:
        keys = " and ".join(f"data.{name}_size: {sizes[name]}" for name in sizes)
        raise DataError(f"{keys} leaves none of the {len(rows)} rows of data.train for training; make it smaller")
    return {name: [rows[index] for index in sorted(indices)] for name, indices in splits.items()}


def _groups_by_hash(rows: Sequence[Row], seed: int) -> list[list[int]]:
    """Indices of equal rows together, the groups in the order of their lowest hash with the seed."""
    groups: dict[bytes, list[int]] = {}
    lowest: dict[bytes, bytes] = {}
    for index, row in enumerate(rows):
        equal = dataclasses.replace(row, fields=_single_spaced(row.fields)).content()
        order = hashlib.sha256(f"{seed}\n".encode() + row.content()).digest()
        groups.setdefault(equal, []).append(index)
        lowest[equal] = min(order, lowest.get(equal, order))
    return [groups[equal] for equal in sorted(groups, key=lowest.__getitem__)]


def _single_spaced(value: Any) -> Any:
    """The value with each run of white space in its texts as one space, none at their ends."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, dict):
        return {key: _single_spaced(each) for key, each in value.items()}
    return [_single_spaced(each) for each in value] if isinstance(value, list) else value


def _take(groups: list[list[int]], count: int, name: str, total: int) -> list[int]:
    """Move whole groups that add up to `count` rows out of `groups`; one that is too large stays."""
    taken: list[int] = []
    left = []
    for group in groups:
        if len(taken) + len(group) <= count:
            taken += group
        else:
            left.append(group)
    if len(taken) < count and not (taken and left):
        raise DataError(
            f"data.{name}_size: cannot take {count} of the {total} rows of data.train; too few are distinct"
        )
    groups[:] = left
    return taken


def _hold_out_text(rows: list[Row], sizes: dict[str, float], config: DataConfig) -> dict[str, list[Row]]:
    column = config.columns.get("text", "text")
    total = sum(len(field_text(row, config, "text")) for row in rows)
    splits: dict[str, list[Row]] = {}
    left = list(rows)
    for name, size in sizes.items():
        if size >= 1:
            raise DataError(f"data.{name}_size: {size} rows cannot be taken from {len(rows)}; give a fraction below 1")
        left, splits[name] = _cut_end(left, round(size * total), column)
    if not left or not all(splits.values()):
        raise DataError(f"data.train: its {total} characters are too few to hold out {sizes}")
    return {"train": left, **splits}


def _cut_end(rows: list[Row], size: int, column: str) -> tuple[list[Row], list[Row]]:
    """The rows without their last `size` characters, and those, cut at the end of a line or word."""
    left = list(rows)
    end: list[Row] = []
    while left and size > 0:
        row = left.pop()
        text = row.fields[column]
        border = _border(text, len(text) - size) if len(text) > size else 0
        if border:
            left.append(_with_text(row, column, text[:border]))
        end.insert(0, _with_text(row, column, text[border:]))
        size -= len(text) - border
    return left, end


def _with_text(row: Row, column: str, text: str) -> Row:
    return dataclasses.replace(row, fields={**row.fields, column: text})


def _border(text: str, at: int) -> int:
    for mark in ("\n", " "):
        found = text.rfind(mark, max(0, at - BORDER_WINDOW), at)
        if found > 0:
            return found + 1
    return at
