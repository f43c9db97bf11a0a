"""The audit of an experiment's data: of all splits, before a training or by itself. Knows no workers."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat import state
from heliostat.data import audit, audit_view, corpus, prepare, splits
from heliostat.data.config import DataConfig
from heliostat.data.contents import Contents, contents
from heliostat.data.packing import PackedDataset
from heliostat.data.prepare import Prepared
from heliostat.data.records import Row
from heliostat.data.streams import Stream
from heliostat.experiment import ExperimentConfig
from heliostat.training import runs, setup

FILES = ("audit.json", "data.txt", "token_lengths.png")
"""What `Audited.save` writes: the report, the same as text, and the figure."""
Rows = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Audited:
    """Tokenised data and what is to be said of it."""

    prepared: Prepared
    """The training and validation splits."""
    report: audit.Report
    lengths: dict[str, Any]
    """Split -> tokens of each document, [documents]."""
    max_length: int

    def save(self, folder: Path) -> None:
        """Write `FILES` to the folder, each whole or not at all."""
        runs.write_atomically(folder / "audit.json", json.dumps(asdict(self.report), indent=2, ensure_ascii=False))
        runs.write_atomically(folder / "data.txt", audit_view.text(self.report) + "\n")
        temporary = folder / "token_lengths.png.tmp"
        audit_view.figure(self.report, self.lengths, self.max_length).savefig(temporary, format="png", dpi=150)
        os.replace(temporary, folder / "token_lengths.png")


def command(config: ExperimentConfig, write: Callable[[str], None] | None) -> dict[str, Any]:
    """What `heliostat audit` does: the report, and `folder`, where `FILES` are. `write`: shows it on stdout.

    Raises:
        UserError: the configuration, the data or the model is wrong; AuditFailed: there is a finding that forbids
            training.
    """
    audited = audit_of(config)
    folder = state.audits() / config.name
    folder.mkdir(parents=True, exist_ok=True)
    audited.save(folder)
    if write is not None:
        # Not sys.stdout, which is stderr while a command runs.
        write(f"{audit_view.text(audited.report, Console(file=sys.__stdout__))}\nsaved in {folder}\n")
    audited.report.check()
    return asdict(audited.report) | {"folder": str(folder)}


def audit_of(config: ExperimentConfig) -> Audited:
    """Look at the data of an experiment that is not being trained.

    Raises:
        UserError: the configuration, the data or the model is wrong.
    """
    setup.check(config)
    rows = splits.load_splits(config.data, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        source = setup.load_source(config, rows["train"], Path(folder) / "init")
        return look(rows, source.data(config.data), source.tokenizer, config.seed)


def look(rows: Rows, data: DataConfig, tokenizer: Any, seed: int) -> Audited:
    """Tokenise all splits, unless the cache has them, and audit them.

    The test split is tokenised by itself: what a training uses, and its lineage, does not depend on there being one.

    Raises:
        DataError, ModelError: as `prepare.prepare`.
    """
    prepared = prepare.prepare(rows, data, tokenizer, seed, state.token_cache())
    folders = dict(prepared.splits)
    if "test" in rows:
        folders |= prepare.prepare(rows, data, tokenizer, seed, state.token_cache(), ("test",)).splits
    packed = {
        name: PackedDataset.open(folder, data.max_length, packing=data.packing) for name, folder in folders.items()
    }
    said = {name: _contents(rows[name], data, folder) for name, folder in folders.items()}
    report = audit.audit(said, packed, tokenizer, data)
    return Audited(prepared, report, {name: each.tokens.lengths for name, each in packed.items()}, data.max_length)


def _contents(rows: Sequence[Row], data: DataConfig, folder: Path) -> Contents:
    """What the rows say; those of a corpus were read as they were tokenised."""
    return corpus.contents(folder, rows.files) if isinstance(rows, Stream) else contents(rows, data)


def tell(report: audit.Report, console: Console) -> None:
    """Print the report; samples on terminals only, because logs are no place for what the data says."""
    audit_view.show(report, console, samples=console.is_terminal)
