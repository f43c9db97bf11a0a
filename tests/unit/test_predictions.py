"""Files of predictions are read back by others exactly as they were written."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow.csv
import pyarrow.parquet
import pytest

from heliostat.errors import ConfigError
from heliostat.evaluation import predictions

Rows = list[dict[str, Any]]
TEXTS = [
    "",
    " ",
    "plain",
    'say "hi", twice',
    "two\nlines\r\nand\ttabs",
    "трава 家 \u2028 é",
    "=1+1",
    "NA",
    "1.5",
    "'a'",
    "\\n",
]
ROWS: Rows = [
    {
        "prompt": text,
        "reference": TEXTS[-number],
        "prediction": text * 2,
        "exact_match": float(number % 2),
        "chrf": None if number == 1 else number / 7,
        "judge": None,
    }
    for number, text in enumerate(TEXTS)
]


def by_pandas(path: Path) -> Rows:
    if path.suffix == ".csv":
        # Texts such as NA are texts; a missing score has no quotes, and is read as one.
        texts = dict.fromkeys(("prompt", "reference", "prediction"), str)
        table = pandas.read_csv(path, dtype=texts, keep_default_na=False, na_values={"chrf": [""], "judge": [""]})
    else:
        read: dict[str, Any] = {".parquet": pandas.read_parquet}
        table = read[path.suffix](path)
    return list(table.astype(object).where(table.notna(), None).to_dict("records"))


def by_arrow(path: Path) -> Rows:
    if path.suffix == ".parquet":
        return list(pyarrow.parquet.read_table(path).to_pylist())
    text = pyarrow.string()
    options = pyarrow.csv.ConvertOptions(column_types={"prompt": text, "reference": text, "prediction": text})
    lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return list(pyarrow.csv.read_csv(path, parse_options=lines, convert_options=options).to_pylist())


def by_datasets(path: Path) -> Rows:
    kind = {".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    return list(datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(path.parent / "cache")))


def by_the_standard_library(path: Path) -> Rows:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    with path.open(encoding="utf-8", newline="") as file:
        scores = ("exact_match", "chrf", "judge")
        return [
            {name: (float(value) if value else None) if name in scores else value for name, value in row.items()}
            for row in csv.DictReader(file, strict=True)
        ]


@pytest.mark.parametrize(
    ("suffix", "read"),
    [
        (".jsonl", by_the_standard_library),
        (".jsonl", by_datasets),
        (".csv", by_the_standard_library),
        (".csv", by_pandas),
        (".csv", by_arrow),
        (".parquet", by_pandas),
        (".parquet", by_arrow),
        (".parquet", by_datasets),
    ],
)
def test_what_is_read_is_what_was_written(suffix: str, read: Callable[[Path], Rows], tmp_path: Path) -> None:
    path = tmp_path / f"predictions{suffix}"
    predictions.write(path, ROWS)
    assert [dict(row) for row in read(path)] == ROWS
    assert list(read(path)[0]) == list(ROWS[0])


def test_probabilities_are_json_in_a_csv_field_and_themselves_elsewhere(tmp_path: Path) -> None:
    rows: Rows = [{"prompt": "a", "probabilities": {"ham": 0.75, 'say "spam"': 0.25}}]
    for suffix in predictions.SUFFIXES:
        path = tmp_path / f"predictions{suffix}"
        predictions.write(path, rows)
        (row,) = by_arrow(path) if suffix == ".parquet" else by_the_standard_library(path)
        found = json.loads(row["probabilities"]) if suffix == ".csv" else row["probabilities"]
        assert found == rows[0]["probabilities"]


@pytest.mark.parametrize("suffix", predictions.SUFFIXES)
def test_a_file_is_replaced_whole_or_left_as_it_was(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"predictions{suffix}"
    predictions.write(path, ROWS)
    before = path.read_bytes()
    with pytest.raises((TypeError, pyarrow.ArrowException)):
        predictions.write(path, [*ROWS, {**ROWS[0], "prompt": object()}])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "nothing half-written"
    predictions.write(path, ROWS[:1])
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.xlsx", r"must end in \.jsonl, \.csv, \.parquet"), ("a", "unknown kind"), ("gone/a.csv", "there is no folder")],
)
def test_what_could_not_be_written_is_refused_first(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        predictions.check(tmp_path / name)
    predictions.check(tmp_path / "a.CSV")
