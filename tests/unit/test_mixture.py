"""Each source has its share of an epoch, whatever the others are; held-out rows are no part of it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from heliostat import config as configuration
from heliostat.data import mixture, prepare, splits
from heliostat.data.audit import Report
from heliostat.data.config import DataConfig, TrainSource
from heliostat.data.records import Row
from heliostat.errors import ConfigError, DataError
from heliostat.training import auditing
from tests import tiny

SOURCES = [TrainSource(path="a"), TrainSource(path="b", weight=2.5), TrainSource(path="c", weight=0.25)]
SIZES = (10, 4, 8)
ROWS = [
    Row({"text": f"{source} {n}"}, f"{source}:{n}", source) for source, size in enumerate(SIZES) for n in range(size)
]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_weights_say_how_often_a_row_comes() -> None:
    found = mixture.mix(ROWS, SOURCES, seed=1)
    assert [entry["rows"] for entry in mixture.counts(found, SOURCES)] == [10, 10, 2]
    times = Counter(row.origin for row in found)
    assert {times[f"0:{n}"] for n in range(10)} == {1}
    assert sorted(times[f"1:{n}"] for n in range(4)) == [2, 2, 3, 3]
    assert len([origin for origin in times if origin.startswith("2:")]) == 2


def test_the_seed_decides_and_the_first_rows_are_a_mixture() -> None:
    found = mixture.mix(ROWS, SOURCES, seed=1)
    assert mixture.mix(ROWS, SOURCES, seed=1) == found
    other = mixture.mix(ROWS, SOURCES, seed=2)
    assert other != found
    assert Counter(row.source for row in other) == Counter(row.source for row in found)
    assert len({row.source for row in found[:8]}) > 1


def test_a_mixture_is_held_out_from_before_it_is_weighted(tmp_path: Path) -> None:
    """With another name of a column in one file, and lineage of each source."""
    first = write(tmp_path, "a.jsonl", [{"prompt": f"a{n}", "completion": "x"} for n in range(20)])
    second = write(tmp_path, "b.jsonl", [{"question": f"b{n}", "completion": "y"} for n in range(20)])
    given = [first, {"path": second, "weight": 3, "columns": {"prompt": "question"}}]
    config = DataConfig.model_validate({"format": "prompt_completion", "train": given, "validation_size": 0.2})
    found = splits.load_splits(config, 0)
    held, kept = ({row.fields["prompt"] for row in found[name]} for name in ("validation", "train"))
    assert (len(held), len(kept), held & kept) == (8, 32, set())
    sources = Counter(row.source for row in found["train"])
    assert sources[0] + sources[1] / 3 == 32
    prepared = prepare.prepare(found, config, tiny.tokenizer(), 0, tmp_path / "cache")
    assert [entry["rows"] for entry in prepared.manifest["sources"]] == [sources[0], sources[1]]
    assert [Path(entry["path"]).name for entry in prepared.manifest["files"]["train"]] == ["a.jsonl", "b.jsonl"]


def test_rows_that_a_weight_repeats_are_no_duplicates_but_equal_rows_of_two_sources_are(tmp_path: Path) -> None:
    first = write(tmp_path, "a.jsonl", [{"prompt": f"a{n}", "completion": "x"} for n in range(8)])
    second = write(tmp_path, "b.jsonl", [{"prompt": f"b{n}", "completion": "y"} for n in range(3)])
    given = [first, {"path": second, "weight": 3}]
    own = audited(given)
    assert (own.splits["train"].rows, own.splits["train"].duplicates) == (17, 0)
    assert "duplicates" not in {finding.check for finding in own.findings}

    copies = write(tmp_path, "c.jsonl", [{"prompt": "b1", "completion": "y"}] * 2)
    found = audited([*given, copies])
    assert found.splits["train"].duplicates == 2
    (finding,) = [finding for finding in found.findings if finding.check == "duplicates"]
    assert {place.row.partition(":")[0] for place in finding.rows} <= {str(copies), second}
    assert len({place.row for place in finding.rows} | {place.same_as for place in finding.rows}) == 3


def audited(sources: list[Any]) -> Report:
    config = DataConfig.model_validate({"format": "prompt_completion", "train": sources, "validation_size": 0})
    return auditing.look(splits.load_splits(config, 0), config, tiny.tokenizer(), seed=0).report


def test_wrong_mixtures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the weight 0\.01 leaves none of the 10 training rows of a"):
        mixture.mix(ROWS, [TrainSource(path="a", weight=0.01)], 0)
    path = write(tmp_path, "a.jsonl", [{"text": "x"}])
    config = DataConfig(train=[TrainSource(path=path, columns={"text": "story"})], validation_size=0)
    with pytest.raises(DataError, match=r"a\.jsonl:1: has no column `story`, which data\.train names"):
        splits.load_splits(config, 0)
    with pytest.raises(ConfigError, match=r"train.*weight"):
        configuration.load(DataConfig, None, ["train=[{path: a, weight: -1}]"])
