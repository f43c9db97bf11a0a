"""The token cache: made once, complete or absent, and made anew whenever anything that matters changes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from heliostat.data import prepare as module
from heliostat.data import tokens
from heliostat.data.config import DataConfig
from heliostat.data.packing import PackedDataset
from heliostat.data.prepare import Prepared, prepare, tokenizer_sha256
from heliostat.data.splits import load_splits
from heliostat.data.tokens import TokenDataset
from heliostat.errors import DataError
from heliostat.models.scratch import train_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


class Untouchable(PreTrainedTokenizerFast):  # type: ignore[misc]
    """A tokenizer that must not be asked for ids."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("tokenised again")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["two plus three is five"] * 5, 300, 64, chat=True)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    path = tmp_path / "train.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} plus 1 is", "completion": f" {i + 1}"}) + "\n" for i in range(40))
    )
    return DataConfig(train=str(path), format="prompt_completion", validation_size=0.1, test_size=0.1)


def run(config: DataConfig, tokenizer: Any, tmp_path: Path, seed: int = 1, **options: Any) -> Prepared:
    return prepare(load_splits(config, seed), config, tokenizer, seed, tmp_path / "cache", **options)


def test_manifest_and_folders_describe_what_was_made(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prepared = run(config, tokenizer, tmp_path)
    assert list(prepared.splits) == ["train", "validation"]
    manifest = json.loads(json.dumps(prepared.manifest))
    data = Path(str(config.train)).read_bytes()
    entry = {"path": config.train, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert manifest["files"] == {"train": [entry], "validation": [entry]}
    for name, size in (("train", 32), ("validation", 4)):
        data_set, counts = TokenDataset.open(prepared.splits[name]), manifest["splits"][name]
        assert counts["rows"] == counts["documents"] == len(data_set) == size
        assert counts["supervised_tokens"] == data_set.label_counts.sum()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [manifest["cache_key"]]


def test_the_second_run_does_not_tokenise(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = run(config, tokenizer, tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    untouchable = Untouchable.from_pretrained(tmp_path / "tokenizer")
    assert run(config, untouchable, tmp_path) == first
    with pytest.raises(AssertionError, match="tokenised again"):
        run(config.model_copy(update={"max_length": 32}), untouchable, tmp_path)


def test_the_key_changes_with_what_matters_and_only_with_that(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def key(**changes: Any) -> Any:
        return run(config.model_copy(update=changes), tokenizer, tmp_path).manifest["cache_key"]

    same = key()
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(str(config.train)).read_bytes())
    assert key(train=str(moved)) == key(packing=False) == same
    changed = [
        key(max_length=64),
        key(train_on_inputs=True),
        key(prompt_template="{prompt}?"),
        key(max_train_samples=5),
    ]
    tokenizer.add_tokens(["plus"])
    changed.append(key())
    assert len({same, *changed}) == 6


def test_the_tokenizers_hash_ignores_what_calls_leave_behind(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_sha256(tokenizer) != before


def test_two_processes_that_race_both_succeed(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tokens.encode
    finished_first: list[Prepared] = []

    def overtaken(*args: Any) -> Any:
        if not finished_first:
            monkeypatch.setattr(module, "encode", encode)
            finished_first.append(run(config, tokenizer, tmp_path))
        return encode(*args)

    monkeypatch.setattr(module, "encode", overtaken)
    assert run(config, tokenizer, tmp_path) == finished_first[0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_failure_leaves_nothing_behind(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:\d+: its \d+ tokens exceed"):
        run(config.model_copy(update={"max_length": 3}), tokenizer, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_first_split_is_required_and_others_are_not(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    alone = config.model_copy(update={"validation_size": 0})
    assert list(run(alone, tokenizer, tmp_path).splits) == ["train"]
    assert list(run(config, tokenizer, tmp_path, splits=("test",)).splits) == ["test"]
    with pytest.raises(DataError, match=r"data\.validation: no file is given"):
        run(alone, tokenizer, tmp_path, splits=("validation",))


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.exists(), reason="the real data sets are not beside the checkout")
def test_real_instructions_pack_well(tmp_path: Path) -> None:
    config = DataConfig(
        train=str(SHARED / "alpaca/alpaca_train.json"), format="alpaca", excess_length_strategy="truncate"
    )
    rows = load_splits(config, 1)
    tokenizer = train_tokenizer((str(row.fields["output"]) for row in rows["train"]), 4000, 512, chat=False)
    prepared = prepare(rows, config, tokenizer, 1, tmp_path)
    assert PackedDataset(TokenDataset.open(prepared.splits["train"]), config.max_length).fill >= 0.97
