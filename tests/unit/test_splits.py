"""Held-out rows: exact sizes, no row in two splits, and a choice that depends on content and seed only."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.data.splits import load_splits
from heliostat.errors import DataError


def write(path: Path, texts: Sequence[str]) -> str:
    path.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    return str(path)


def config(**values: Any) -> DataConfig:
    return DataConfig.model_validate({"format": "prompt_completion", **values})


def texts(rows: Sequence[Row]) -> list[str]:
    return [row.fields["text"] for row in rows]


def test_fractions_and_counts_are_exact_and_order_is_kept(tmp_path: Path) -> None:
    all_texts = [f"row {i}" for i in range(200)]
    splits = load_splits(config(train=write(tmp_path / "t.csv", all_texts), validation_size=0.1, test_size=30), seed=1)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 150, "validation": 20, "test": 30}
    assert sorted(text for rows in splits.values() for text in texts(rows)) == sorted(all_texts)
    for rows in splits.values():
        assert texts(rows) == sorted(texts(rows), key=all_texts.index)


def test_the_choice_depends_on_content_and_seed_only(tmp_path: Path) -> None:
    all_texts = [f"row {i}" for i in range(200)]
    path = write(tmp_path / "t.csv", all_texts)
    first = load_splits(config(train=path, test_size=20), seed=1)
    random.Random(0).shuffle(all_texts)
    moved = load_splits(config(train=write(tmp_path / "moved.csv", all_texts), test_size=20), seed=1)
    assert all(set(texts(first[name])) == set(texts(moved[name])) for name in first)
    assert set(texts(load_splits(config(train=path, test_size=20), seed=2)["test"])) != set(texts(first["test"]))
    # The test split comes first: how much is kept for validation does not change it.
    other = load_splits(config(train=path, test_size=20, validation_size=0.5), seed=1)
    assert texts(other["test"]) == texts(first["test"])


def test_identical_rows_never_leak_into_another_split(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [f"row {i % 40}" for i in range(200)])
    splits = load_splits(config(train=path, validation_size=0.2, test_size=0.2), seed=3)
    found = [set(texts(splits[name])) for name in ("train", "validation", "test")]
    assert sum(map(len, found)) == len(set.union(*found)) == 40
    assert len(splits["test"]) == len(splits["validation"]) == 40


def test_rows_that_differ_in_white_space_stay_together(tmp_path: Path) -> None:
    plain = [f"row {i}" for i in range(100)]
    spaced = [f" row  {i} " for i in range(0, 100, 2)]
    splits = load_splits(config(train=write(tmp_path / "t.csv", [*plain, *spaced]), test_size=30), seed=3)
    found = [{" ".join(text.split()) for text in texts(splits[name])} for name in ("train", "test")]
    assert not set.intersection(*found)
    assert len(splits["test"]) == 30 > len(found[1])


def test_sample_limits_act_after_splitting(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [f"row {i}" for i in range(100)])
    whole = load_splits(config(train=path, validation_size=20, test_size=20), seed=1)
    limits = {"max_train_samples": 10, "max_validation_samples": 5, "max_test_samples": 7}
    limited = load_splits(config(train=path, validation_size=20, test_size=20, **limits), seed=1)
    for name, size in (("train", 10), ("validation", 5), ("test", 7)):
        assert limited[name] == whole[name][:size]


def test_given_files_win(tmp_path: Path) -> None:
    train, held = write(tmp_path / "t.csv", ["a", "b", "c"]), write(tmp_path / "v.csv", ["d"])
    splits = load_splits(config(train=train, validation=held), seed=1)
    assert {name: texts(rows) for name, rows in splits.items()} == {"train": ["a", "b", "c"], "validation": ["d"]}
    assert list(load_splits(config(test=held, validation_size=0.5), seed=1)) == ["test"]
    assert list(load_splits(config(train=train, validation_size=0), seed=1)) == ["train"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"validation_size": 4}, "cannot take 4 of the 3 rows"),
        ({"validation_size": 3}, "leaves none of the 3 rows"),
        ({"validation_size": 0.99}, r"data\.validation_size: 0\.99 leaves none"),
        ({"validation_size": 1, "test_size": 2}, "leaves none"),
    ],
)
def test_too_large_a_part_is_refused(tmp_path: Path, sizes: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_splits(config(train=write(tmp_path / "t.csv", ["a", "b", "c"]), **sizes), seed=1)


def test_rows_that_are_all_alike_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few are distinct"):
        load_splits(config(train=write(tmp_path / "t.csv", ["a"] * 10), validation_size=2), seed=1)


def test_nothing_given_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train: no file is given"):
        load_splits(DataConfig(), seed=1)


def test_one_large_document_is_cut_at_its_end(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the document\n" for i in range(1000))
    path = tmp_path / "t.txt"
    path.write_text(text)
    splits = load_splits(DataConfig(train=str(path), validation_size=0.1, test_size=0.05), seed=1)
    parts = [splits[name][0].fields["text"] for name in ("train", "validation", "test")]
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts)
    assert [round(len(part) / len(text), 2) for part in parts] == [0.85, 0.1, 0.05]


def test_few_documents_give_their_last_ones_and_a_part_of_one(tmp_path: Path) -> None:
    paths = []
    for name, text in (("a", "x " * 500), ("b", "yz " * 300), ("c", "end")):
        (tmp_path / f"{name}.txt").write_text(text)
        paths.append(str(tmp_path / f"{name}.txt"))
    splits = load_splits(DataConfig(train=paths, validation_size=0.2), seed=1)
    assert [len(rows) for rows in splits.values()] == [2, 2]
    assert splits["validation"][1].fields["text"] == "end"
    assert "".join(texts([*splits["train"], *splits["validation"]])) == "x " * 500 + "yz " * 300 + "end"
    assert splits["validation"][0].fields["text"].startswith("yz ")


def test_only_the_files_of_wanted_splits_are_read(tmp_path: Path) -> None:
    all_texts = [f"row {i}" for i in range(100)]
    train, missing = write(tmp_path / "t.csv", all_texts), str(tmp_path / "missing.csv")
    assert set(load_splits(config(train=train, test=missing), 1, ("train", "validation"))) == {"train", "validation"}
    assert list(load_splits(config(train=missing, test=train), 1, ("test",))) == ["test"]
    held_out = load_splits(config(train=train, test_size=20), 1, ("test",))
    assert texts(held_out["test"]) == texts(load_splits(config(train=train, test_size=20), 1)["test"])
    assert list(held_out) == ["test"]
    with pytest.raises(DataError, match=re.escape(missing)):
        load_splits(config(train=train, test=missing), 1)
