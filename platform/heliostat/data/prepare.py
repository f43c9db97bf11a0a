"""Rows of each split -> tokenised folders on disk, made once. Knows the cache; the work is in the other modules."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.config import fingerprint
from heliostat.data import mixture
from heliostat.data.config import DataConfig
from heliostat.data.corpus import Corpus
from heliostat.data.records import Row, file_manifest
from heliostat.data.streams import Stream
from heliostat.data.tokens import TokenDataset, encode, move
from heliostat.errors import DataError

# Raise when the same rows and config become other tokens than before.
FORMAT_VERSION = 2
# The config keys that decide how a given row is tokenised; the others act on which rows there are, or on packing.
TOKEN_KEYS = {
    "format",
    "columns",
    "prompt_template",
    "completion_template",
    "labels",
    "train_on_inputs",
    "max_length",
    "excess_length_strategy",
}


@dataclass(frozen=True)
class Prepared:
    """Tokenised data, ready for `TokenDataset.open`."""

    splits: dict[str, Path]
    """Split -> its folder."""
    manifest: dict[str, Any]
    """Lineage: `files` (path, sha256, bytes for each split), `splits` (counts for each), `sources` (of a mixture),
    `data_sha256` (the rows used), `tokenizer_sha256`, `cache_key`, `seed`, `task`, `labels` (of a classifier)."""


def prepare(
    rows: Mapping[str, Sequence[Row]],
    config: DataConfig,
    tokenizer: Any,
    seed: int,
    cache: Path,
    splits: Sequence[str] = ("train", "validation"),
) -> Prepared:
    """Tokenise the rows that `load_splits` gave, unless `cache` has them by the same tokenizer and config already.

    The first of `splits` must exist; the others are prepared if they do. Two processes may prepare the same data at
    once: each writes a folder of its own, and the first to finish moves it into place. `seed` is only recorded.

    Raises:
        DataError: a file, a row or a split is wrong.
        ModelError: the tokenizer is unfit for the format.
    """
    used = {name: rows[name] for name in splits if name in rows}
    if splits[0] not in used:
        raise DataError(f"data.{splits[0]}: no file is given for this split; set it, or data.{splits[0]}_size")
    tokenizer_hash = tokenizer_sha256(tokenizer)
    made_by = [FORMAT_VERSION, tokenizer_hash, config.model_dump(mode="json", include=TOKEN_KEYS)]
    if streamed := {name: split for name, split in used.items() if isinstance(split, Stream)}:
        corpus = Corpus(streamed, config, seed, cache)
        data_hash, files = corpus.sha256, corpus.manifest
        key = fingerprint([data_hash, *made_by])
        corpus.tokenise(tokenizer, cache / key, made_by)
    else:
        data_hash, files = _data_sha256(used), _files(config, used)
        key = fingerprint([data_hash, *made_by])
        if not (cache / key).exists():
            _tokenise(used, tokenizer, config, cache / key)
    folders = {name: cache / key / name for name in used}
    manifest = {
        "files": files,
        "splits": {name: TokenDataset.open(path).meta for name, path in folders.items()},
        "sources": mixture.counts(used["train"], config.sources) if config.is_mixture and "train" in used else [],
        "data_sha256": data_hash,
        "tokenizer_sha256": tokenizer_hash,
        "cache_key": key,
        "seed": seed,
        "task": config.task,
        "labels": config.labels,
    }
    return Prepared(folders, manifest)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of everything that decides a text's ids: vocabulary, merges, special tokens, chat template, languages."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # State that earlier calls leave behind; it does not act on ours.
    del backend["truncation"], backend["padding"]
    languages = [getattr(tokenizer, key) for key in ("src_lang", "tgt_lang") if key in tokenizer.init_kwargs]
    parts = [backend, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, *languages]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenise(rows: Mapping[str, Sequence[Row]], tokenizer: Any, config: DataConfig, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for name, found in rows.items():
            encode(found, tokenizer, config).save(temporary / name, name)
        move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _data_sha256(rows: Mapping[str, Sequence[Row]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(rows):
        digest.update(f"{name} {len(rows[name])}\n".encode())
        for row in rows[name]:
            digest.update(hashlib.sha256(row.content()).digest())
    return digest.hexdigest()


def _files(config: DataConfig, rows: Mapping[str, Sequence[Row]]) -> dict[str, list[dict[str, Any]]]:
    train = [source.path for source in config.sources]
    given = {"train": train, "validation": config.validation, "test": config.test}
    # A split without files of its own was taken from the training rows.
    return {name: file_manifest(given[name] or train) for name in rows}
