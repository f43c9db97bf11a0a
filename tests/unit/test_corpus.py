"""Corpora that are streamed: the same tokens, audit and losses as in memory, in bounded memory, and through kills."""

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError
from rich.console import Console

from heliostat import journal
from heliostat.data import audit, corpus, pieces, shards
from heliostat.data.config import DataConfig
from heliostat.data.contents import contents
from heliostat.data.packing import PackedDataset
from heliostat.data.prepare import Prepared, prepare
from heliostat.data.records import Row
from heliostat.data.splits import load_splits
from heliostat.data.streams import Stream
from heliostat.data.tokens import TokenDataset
from heliostat.errors import DataError, ResourceError
from heliostat.experiment import ExperimentConfig
from heliostat.training import trainer, worker
from tests import tiny

END = "<|endoftext|>"
LONG = " ".join(tiny.TEXTS[:9])
HELD_OUT = [f"{text} at last" for text in tiny.TEXTS[:7]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 400)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A corpus in three kinds of files, and one of its own for validation."""
    texts = [*tiny.TEXTS[:40], LONG, *tiny.TEXTS[40:60], tiny.TEXTS[3]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": 1, "said": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text(f"\n{END}\n".join([*tiny.TEXTS[60:90], LONG[::-1]]))
    table = pyarrow.table({"said": [f"{text} again" for text in tiny.TEXTS], "other": tiny.TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=11)
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"said": text}) + "\n" for text in HELD_OUT))
    return {
        "train": [str(tmp_path / name) for name in ("a.jsonl", "c.parquet")],
        "validation": str(tmp_path / "held_out.jsonl"),
        "columns": {"text": "said"},
        "max_length": 64,
        "preprocessing_num_workers": 1,
    }


def run(settings: Mapping[str, Any], tokenizer: Any, cache: Path, *, streaming: bool = True, seed: int = 1) -> Prepared:
    config = DataConfig.model_validate({**settings, "streaming": streaming})
    return prepare(load_splits(config, seed), config, tokenizer, seed, cache)


def documents(folder: Path) -> list[tuple[list[int], list[bool]]]:
    """Ids of each document, and which of them are learned; of the first it says nothing."""
    tokens = TokenDataset.open(folder)
    found = [tokens.document(index) for index in range(len(tokens))]
    return [(ids.tolist(), mask[1:].tolist()) for ids, mask in found]


def report(settings: Mapping[str, Any], tokenizer: Any, cache: Path, *, streaming: bool) -> dict[str, Any]:
    config = DataConfig.model_validate({**settings, "streaming": streaming})
    rows = load_splits(config, 1)
    folders = prepare(rows, config, tokenizer, 1, cache).splits
    packed = {name: PackedDataset.open(path, 64, packing=True) for name, path in folders.items()}
    said = {
        name: corpus.contents(folders[name], each.files) if isinstance(each, Stream) else contents(each, config)
        for name, each in rows.items()
    }
    return asdict(audit.audit(said, packed, tokenizer, config))


@pytest.mark.parametrize("source", ["lines", "text"])
def test_all_is_as_it_is_in_memory(settings: dict[str, Any], tokenizer: Any, tmp_path: Path, source: str) -> None:
    if source == "text":
        settings |= {"train": str(tmp_path / "b.txt"), "text_separator": END, "columns": {}}
        settings["validation"] = settings["train"]
    streamed, whole = (run(settings, tokenizer, tmp_path / str(number), streaming=not number) for number in range(2))
    for name, folder in whole.splits.items():
        assert documents(streamed.splits[name]) == documents(folder)
        rows = [PackedDataset.open(made.splits[name], 64, packing=True) for made in (streamed, whole)]
        assert len(rows[0]) == len(rows[1])
        for index in range(len(rows[0])):
            first, second = (asdict(each.row(index)) for each in rows)
            assert all(np.array_equal(first[key], second[key]) for key in first)
        counts = [made.manifest["splits"][name] for made in (streamed, whole)]
        assert counts[0] == {**counts[1], "all_learned": True, "ended": counts[1]["rows"]}
    assert streamed.manifest["files"] == whole.manifest["files"]
    assert TokenDataset.open(streamed.splits["train"]).input_ids.dtype == np.uint16
    audits = [report(settings, tokenizer, tmp_path / str(number), streaming=not number) for number in range(2)]
    assert audits[0] == audits[1]
    expected = "duplicates" if source == "lines" else "validation_leakage"
    assert expected in {finding["check"] for finding in audits[0]["findings"]}


def test_a_run_stopped_in_the_middle_of_an_epoch_ends_as_one_in_memory(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str, *, streaming: bool) -> list[tuple[int, dict[str, float]]]:
        config = ExperimentConfig.model_validate({
            "name": name,
            "model": {"scratch": {"model_type": "llama", "vocab_size": 400, "config": {**tiny.KEYS["llama"]}}},
            "data": {**settings, "streaming": streaming},
            "training": {"num_workers": 0, "max_steps": 6, "save_steps": 2, "eval_steps": 3, "logging_steps": 1,
                         "per_device_train_batch_size": 4},
            "registry": {"register_model": False},
        })  # fmt: skip
        rows, _ = journal.read(Path(trainer.train(config, Console(stderr=True)).run_folder) / journal.NAME)
        return [
            (row["step"], {key: row["metrics"][key] for key in ("loss", "eval_loss", "epoch") if key in row["metrics"]})
            for row in rows
        ]

    expected = train("whole", streaming=False)
    with monkeypatch.context() as patched:
        patched.setattr(worker.LocalSession, "report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train("streamed", streaming=True)
    found = train("streamed", streaming=True)
    assert [each for each in found if each[1]] == [each for each in expected if each[1]]
    assert 0 < max(metrics.get("epoch", 0) for _, metrics in found) < 1


KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from heliostat.data import corpus, pieces, prepare
from heliostat.data.config import DataConfig
from heliostat.data.splits import load_splits

if __name__ == "__main__":
    config = DataConfig.model_validate_json(sys.argv[1])
    pieces.PIECE_BYTES = 400
    opened = corpus.Shard.open
    taken = []

    def killed(path):
        taken.append(path)
        if len(taken) == 3:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(path)

    corpus.Shard.open = killed
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
    prepare.prepare(load_splits(config, 1), config, tokenizer, 1, Path(sys.argv[3]))
"""


def python(code: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run code as a file: processes that it starts read it too."""
    (folder / "script.py").write_text(code)
    return subprocess.run(
        [sys.executable, str(folder / "script.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )


def test_work_that_was_killed_goes_on(settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = DataConfig.model_validate({**settings, "streaming": True, "preprocessing_num_workers": 2})
    done = python(KILLED, tmp_path, config.model_dump_json(), str(tmp_path / "tokenizer"), str(tmp_path / "cache"))
    assert done.returncode == -9, done.stderr
    children = [psutil.Process(int(pid)) for pid in done.stdout.split() if psutil.pid_exists(int(pid))]
    assert psutil.wait_procs(children, timeout=60)[1] == [], "processes are left behind"
    before = {path: path.stat().st_ino for path in (tmp_path / "cache" / "shards").glob("*.npz")}
    assert len(before) >= 3
    made = run(settings, tokenizer, tmp_path / "cache")
    after = {path: path.stat().st_ino for path in (tmp_path / "cache" / "shards").glob("*.npz")}
    assert len(after) > len(before)
    assert {path: after[path] for path in before} == before
    expected = run(settings, tokenizer, tmp_path / "memory", streaming=False)
    assert documents(made.splits["train"]) == documents(expected.splits["train"])


def test_a_full_disk_is_told_and_leaves_what_was_made(
    settings: dict[str, Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(corpus._Writer, "add", full)
        with pytest.raises(ResourceError, match=r"no room to write .* No space left on device; make room"):
            run(settings, tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tmp"))
    made = len(list((tmp_path / "cache" / "shards").iterdir()))
    work = tokenised(monkeypatch)
    run(settings, tokenizer, tmp_path / "cache")
    assert len(work) == len(list((tmp_path / "cache" / "shards").iterdir())) - made


def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[pieces.Piece]:
    """The pieces that are tokenised from now on."""
    found: list[pieces.Piece] = []
    original = shards.tokenise

    def noted(piece: pieces.Piece, *rest: Any) -> None:
        found.append(piece)
        original(piece, *rest)

    monkeypatch.setattr(shards, "tokenise", noted)
    return found


def test_files_that_are_added_cost_only_themselves(
    settings: dict[str, Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tokenised(monkeypatch)
    settings["train"] = [str(tmp_path / "a.jsonl")]
    first = run(settings, tokenizer, tmp_path / "cache")
    assert {piece.path.name for piece in work} == {"a.jsonl", "held_out.jsonl"}
    assert len(work) > 5
    work.clear()
    assert run(settings, tokenizer, tmp_path / "cache") == first
    assert run(settings, tokenizer, tmp_path / "cache", seed=2).splits == first.splits
    # Content counts, not the name; and what is chosen of it costs nothing either.
    settings["train"] = [str((tmp_path / "a.jsonl").rename(tmp_path / "moved.jsonl"))]
    assert run(settings, tokenizer, tmp_path / "cache").splits == first.splits
    assert run({**settings, "max_train_samples": 3}, tokenizer, tmp_path / "cache").splits != first.splits
    assert work == []
    settings["train"].append(str(tmp_path / "c.parquet"))
    run(settings, tokenizer, tmp_path / "cache")
    assert {piece.path.name for piece in work} == {"c.parquet"}
    work.clear()
    (tmp_path / "moved.jsonl").write_text((tmp_path / "moved.jsonl").read_text().replace("cat", "rat"))
    run(settings, tokenizer, tmp_path / "cache")
    assert {piece.path.name for piece in work} == {"moved.jsonl"}


def test_a_sample_costs_only_the_pieces_that_it_is_in(
    settings: dict[str, Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tokenised(monkeypatch)
    sample = {**settings, "max_train_samples": 9, "max_validation_samples": 2}
    made = run(sample, tokenizer, tmp_path / "cache")
    assert sum(piece.path.name != "held_out.jsonl" for piece in work) == 2
    expected = run(sample, tokenizer, tmp_path / "memory", streaming=False)
    for name in ("train", "validation"):
        assert documents(made.splits[name]) == documents(expected.splits[name])


def held_out(settings: dict[str, Any], seed: int = 1) -> dict[str, list[str]]:
    config = DataConfig.model_validate({**settings, "streaming": True})
    return {name: [row.fields["said"] for row in rows] for name, rows in load_splits(config, seed).items()}


def test_rows_are_held_out_each_by_itself(settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    chance = random.Random(0)
    texts = [f"number {chance.random()}" for _ in range(2000)]
    texts += [f"  {text.replace(' ', '  ')} " for text in texts[:200]]
    lines = [json.dumps({"said": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    settings |= {"train": str(tmp_path / "a.jsonl"), "validation": None, "validation_size": 0.1, "test_size": 0.05}
    pieces.PIECE_BYTES = 20_000
    found = held_out(settings)
    assert sorted(text for some in found.values() for text in some) == sorted(texts)
    assert len(found["validation"]) / len(texts) == pytest.approx(0.1, abs=0.02)
    assert len(found["test"]) / len(texts) == pytest.approx(0.05, abs=0.015)
    plain = {name: {" ".join(text.split()) for text in some} for name, some in found.items()}
    assert sum(map(len, plain.values())) == 2000, "texts that differ in white space stay together"
    assert held_out(settings, seed=2) != found
    # Other rows move none.
    chance.shuffle(lines)
    (tmp_path / "a.jsonl").write_text("".join(lines[:1500]))
    fewer = held_out(settings)
    assert all(set(fewer[name]) <= set(found[name]) for name in found)
    # What is tokenised is what is read.
    made = run(settings, tokenizer, tmp_path / "cache")
    for name, folder in made.splits.items():
        stream = load_splits(DataConfig.model_validate({**settings, "streaming": True}), 1)[name]
        assert isinstance(stream, Stream)
        assert [row.origin for row in stream] == list(corpus.contents(folder, stream.files).origins)


def test_a_new_tokenizer_learns_from_a_sample_of_the_training_rows(settings: dict[str, Any]) -> None:
    config = DataConfig.model_validate({**settings, "streaming": True, "validation": None, "validation_size": 0.3})
    splits = load_splits(config, 1)
    train = splits["train"]
    assert isinstance(train, Stream)

    def texts(rows: Sequence[Row]) -> list[str]:
        return [row.fields["said"] for row in rows]

    assert texts(list(train.sample())) == texts(list(train))
    some = texts(list(train.sample(600)))
    assert some == texts(list(train.sample(600)))
    assert 0 < sum(map(len, some)) < 3000
    assert some[0] == train[0].fields["said"]
    assert some[-1].endswith("again"), "every file gives its part"
    assert not set(some) & set(texts(list(splits["validation"])))


MEMORY = """
import json, random, resource, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from heliostat.data import audit, corpus, pieces, prepare
from heliostat.data.config import DataConfig
from heliostat.data.packing import PackedDataset
from heliostat.data.splits import load_splits
from heliostat.training import order

pieces.PIECE_BYTES = 2_000_000
words = [f"{number:0250}" for number in range(50)]
inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["?", "<e>", *words])}, unk_token="?"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", eos_token="<e>", pad_token="?")
chance = random.Random(0)

def peak(megabytes):
    path = Path(sys.argv[1]) / f"{megabytes}.jsonl"
    with path.open("w") as file:
        for _ in range(megabytes * 500):
            file.write(json.dumps({"text": " ".join(chance.choices(words, k=8))}) + chr(10))
    config = DataConfig(train=str(path), validation_size=0.01, streaming=True, preprocessing_num_workers=1)
    rows = load_splits(config, 1)
    folders = prepare.prepare(rows, config, tokenizer, 1, Path(sys.argv[1]) / "cache").splits
    packed = {name: PackedDataset.open(folder, 512, packing=True) for name, folder in folders.items()}
    said = {name: corpus.contents(folder, rows[name].files) for name, folder in folders.items()}
    audit.audit(said, packed, tokenizer, config)
    order.global_batch(0, 8, len(packed["train"]), 1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

print(json.dumps([peak(8), peak(32)]))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    done = python(MEMORY, tmp_path, str(tmp_path))
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout)
    assert large - small < 0.25 * (32 - 8), "megabytes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "prompt_completion"}, "`streaming` reads `format: text`, not prompt_completion"),
        ({"train": [{"path": "a.jsonl", "weight": 2}]}, "does not go with weights"),
        ({"validation_size": 100}, "fractions below 1"),
        ({"validation_size": 0.5, "test_size": 0.5}, "leave nothing to train on"),
    ],
)
def test_what_cannot_be_streamed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"streaming": True, **change})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", '{"said": "a cat"}\n' * 60 + '{"said": " "}\n', r"a\.jsonl:61: the text is empty"),
        ("a.jsonl", '{"said": "a cat"}\n' * 60 + '{"other": "a"}\n', r"a\.jsonl:61: has no column `said`"),
        ("a.jsonl", "\n\n", r"a\.jsonl: has no rows"),
        ("a.jsonl", "", r"a\.jsonl: has no rows"),
    ],
)
def test_wrong_rows_are_refused_with_their_place(
    settings: dict[str, Any], tokenizer: Any, tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        run(settings, tokenizer, tmp_path / "cache")
    left = {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert left <= {"files", "shards"}


def test_other_sources_and_empty_splits_are_refused(settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hf:corpus: data\.streaming reads files"):
        run({**settings, "train": "hf:corpus"}, tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"data\.train: no file is given"):
        run({"max_length": 64}, tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"data\.validation: none of the rows falls to this split"):
        run({**settings, "validation": None, "validation_size": 1e-9}, tokenizer, tmp_path / "cache")


def test_damaged_shards_are_found(settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    run(settings, tokenizer, tmp_path / "cache")
    shard = sorted((tmp_path / "cache" / "shards").glob("*.npz"))[0]
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(DataError, match=f"{shard.name}: cannot be read as tokenised data"):
        run({**settings, "max_train_samples": 1000}, tokenizer, tmp_path / "cache")
    shard.unlink()
    run({**settings, "max_train_samples": 1000}, tokenizer, tmp_path / "cache")
