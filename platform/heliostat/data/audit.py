"""What training is about to learn, and what speaks against it, before compute is spent. Knows rows and tokens.

Counts come from the token arrays and from one hash a row, so that an audit costs little beside tokenising.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from heliostat.data.config import AuditConfig, Check, DataConfig, Severity
from heliostat.data.contents import Contents
from heliostat.data.packing import PackedDataset
from heliostat.data.tokens import Ids, TokenDataset
from heliostat.errors import AuditFailed

LEVELS: tuple[Severity, ...] = ("info", "warning", "error")
# Rows that a finding names; the count tells of the others.
MAX_PLACES = 100
# Rows of the first must not be in the second; test rows among those that weights are chosen by are the lesser evil.
LEAKS: tuple[tuple[str, str, Check], ...] = (
    ("train", "validation", "validation_leakage"),
    ("train", "test", "test_leakage"),
    ("validation", "test", "validation_leakage"),
)


@dataclass(frozen=True)
class Place:
    """A row, by its `file:line`."""

    row: str
    same_as: str | None = None
    """The earlier row that it repeats."""

    def __str__(self) -> str:
        return self.row if self.same_as is None else f"{self.row} = {self.same_as}"


@dataclass(frozen=True)
class Finding:
    """What a check found in a split."""

    check: Check
    severity: Severity
    split: str
    text: str
    """What is wrong, and what to do."""
    rows: list[Place]
    """Where, if that is known: the first `MAX_PLACES` rows."""


@dataclass(frozen=True)
class SplitCounts:
    """What a split consists of."""

    rows: int
    documents: int
    tokens: int
    supervised_tokens: int
    """Tokens that carry loss."""
    eos_learned: int | None
    """Documents whose last token is EOS and carries loss; None where a label is learned in place of text."""
    truncated: int
    dropped: int
    empty: int
    """Rows with an empty prompt or message."""
    duplicates: int
    """Rows that repeat an earlier one of the split, white space aside; not those that a mixture's weight repeats."""
    sequences: int
    """Training sequences that the documents are packed into."""
    fill: float
    """Part of their positions that hold a token."""
    document_tokens: dict[str, float]
    """Statistics of the documents' lengths: min, mean, median, p95, max."""
    learned_tokens: dict[str, float]
    """The same of the tokens that carry loss in each document."""
    labels: dict[str, int] | None
    """Label -> rows, where completions are few and short; else None."""


@dataclass(frozen=True)
class Span:
    """A part of a document, and whether its tokens carry loss."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Sample:
    """A document as the model sees it."""

    document: int
    tokens: int
    spans: list[Span]


@dataclass(frozen=True)
class Report:
    """An audit."""

    splits: dict[str, SplitCounts]
    findings: list[Finding]
    """The worst first."""
    samples: list[Sample]
    """Documents of the training split, spread over it."""
    fail_on: Literal["warning", "error"]

    @property
    def failures(self) -> list[Finding]:
        """The findings that end the command."""
        return [found for found in self.findings if LEVELS.index(found.severity) >= LEVELS.index(self.fail_on)]

    def check(self) -> None:
        """Raises AuditFailed if a finding is as severe as `data.audit.fail_on`; its message says what to do."""
        if not self.failures:
            return
        problems = "; ".join(f"{found.split}: {found.text}{_places(found.rows)}" for found in self.failures)
        severity = ", ".join(sorted({f"{found.check}: info" for found in self.failures} - {"nothing_learned: info"}))
        way_out = f". If it is meant so, set data.audit.severity: {{{severity}}}" if severity else ""
        raise AuditFailed(f"the data failed its audit: {problems}{way_out}", asdict(self))


def audit(
    said: Mapping[str, Contents], packed: Mapping[str, PackedDataset], tokenizer: Any, config: DataConfig
) -> Report:
    """Look at what the rows of each split say, and at what they were tokenised to."""
    counts = {name: _counts(packed[name], said[name], tokenizer, config) for name in packed}
    found = [*_of_tokens(counts, config), *_of_rows(said, config.audit), *_of_labels(counts, config.audit)]
    return Report(
        splits=counts,
        findings=sorted(found, key=lambda finding: -LEVELS.index(finding.severity)),
        samples=_samples(packed["train"].tokens, tokenizer, config),
        fail_on=config.audit.fail_on,
    )


def _counts(packed: PackedDataset, said: Contents, tokenizer: Any, config: DataConfig) -> SplitCounts:
    tokens = packed.tokens
    return SplitCounts(
        rows=tokens.meta["rows"],
        documents=len(tokens),
        tokens=tokens.meta["tokens"],
        supervised_tokens=tokens.meta["supervised_tokens"],
        eos_learned=tokens.count_ended(tokenizer.eos_token_id) if config.task == "causal_lm" else None,
        truncated=tokens.meta["truncated"],
        dropped=tokens.meta["dropped"],
        empty=int(said.blank.sum()),
        duplicates=len(said.repeats[0]),
        sequences=len(packed),
        fill=packed.fill,
        document_tokens=_statistics(tokens.lengths),
        learned_tokens=_statistics(tokens.label_counts),
        labels=said.labels,
    )


def _statistics(values: npt.NDArray[np.int64]) -> dict[str, float]:
    low, median, p95, high = np.percentile(values, [0, 50, 95, 100]).tolist()
    return {"min": low, "mean": float(values.mean()), "median": median, "p95": p95, "max": high}


def _of_tokens(counts: Mapping[str, SplitCounts], config: DataConfig) -> Iterator[Finding]:
    settings, limit = config.audit, f"data.max_length: {config.max_length}"
    for split, count in counts.items():
        if not count.supervised_tokens:
            text = f"no token carries loss; nothing would be learned (see data.format, {limit})"
            yield from _finding(settings, "nothing_learned", split, text)
        text = f"documents are cut at {limit}, so their end is lost; raise it, or set "
        text += "data.excess_length_strategy: drop"
        yield from _share(settings, "truncated", split, count.truncated, count.documents, text, settings.max_truncated)
        text = f"rows are left out, as longer than {limit}; raise it, or shorten them"
        yield from _share(settings, "dropped", split, count.dropped, count.rows, text, settings.max_dropped)
    train = counts["train"]
    if train.supervised_tokens and train.eos_learned == 0:
        text = f"none of {train.documents:,} documents ends with a learned EOS, so the model would not learn to stop; "
        yield from _finding(settings, "eos_not_learned", "train", f"{text}raise {limit}")


def _of_rows(said: Mapping[str, Contents], settings: AuditConfig) -> Iterator[Finding]:
    for split, own in said.items():
        total = len(own.origins)
        blank = np.flatnonzero(own.blank)
        places = [Place(own.origins[index]) for index in blank[:MAX_PLACES]]
        text = "rows have an empty prompt or message; fill or remove them"
        yield from _share(settings, "empty", split, len(blank), total, text, settings.max_empty, places)
        repeats, first = own.repeats
        pairs = zip(repeats[:MAX_PLACES], first[:MAX_PLACES], strict=True)
        places = [Place(own.origins[index], own.origins[earlier]) for index, earlier in pairs]
        text = "rows repeat an earlier one; remove them"
        yield from _share(settings, "duplicates", split, len(repeats), total, text, settings.max_duplicates, places)
    for source, split, check in LEAKS:
        if source in said and split in said:
            places, count = _leaked(said[source], said[split])
            text = f"rows are in {source} too; remove them from one of the two"
            total = len(said[split].origins)
            yield from _share(settings, check, split, count, total, text, settings.max_leakage, places)


def _leaked(source: Contents, held_out: Contents) -> tuple[list[Place], int]:
    """The first rows of `held_out` that are in `source` too, and how many there are."""
    digests, first = np.unique(source.digests, return_index=True)
    leaked = np.flatnonzero(np.isin(held_out.digests, digests))
    shown = leaked[:MAX_PLACES]
    originals = first[np.searchsorted(digests, held_out.digests[shown])]
    places = [Place(held_out.origins[a], source.origins[b]) for a, b in zip(shown, originals, strict=True)]
    return places, len(leaked)


def _of_labels(counts: Mapping[str, SplitCounts], settings: AuditConfig) -> Iterator[Finding]:
    known = counts["train"].labels
    if not known:
        return
    label, most = next(iter(known.items()))
    if len(known) > 1 and most > settings.max_label_share * counts["train"].rows:
        text = f"rows have the label `{label}`; balance them, or judge by macro_f1"
        yield from _share(settings, "label_imbalance", "train", most, counts["train"].rows, text, 0)
    for split, count in counts.items():
        unseen = {label: rows for label, rows in (count.labels or {}).items() if label not in known}
        names = ", ".join(f"`{label}`" for label in unseen)
        text = f"rows have a label that train does not have: {names}"
        yield from _share(settings, "unseen_label", split, sum(unseen.values()), count.rows, text, 0)


def _share(
    settings: AuditConfig,
    check: Check,
    split: str,
    count: int,
    total: int,
    text: str,
    limit: float,
    places: Sequence[Place] = (),
) -> Iterator[Finding]:
    """The finding that `count` of `total` are so, if any are."""
    if count:
        share = f"{count:,} of {total:,} ({count / total:.1%}) {text}"
        yield from _finding(settings, check, split, share, places, above=count > limit * total)


def _finding(
    settings: AuditConfig, check: Check, split: str, text: str, places: Sequence[Place] = (), *, above: bool = True
) -> Iterator[Finding]:
    """A finding of the severity that is set: `info` where it is not above its limit, nothing where it is ignored."""
    severity = settings.severity_of(check)
    if severity != "ignore":
        yield Finding(check, severity if above else "info", split, text, list(places))


def _places(rows: Sequence[Place], shown: int = 3) -> str:
    return f" ({', '.join(map(str, rows[:shown]))}{', ...' if len(rows) > shown else ''})" if rows else ""


def _samples(tokens: TokenDataset, tokenizer: Any, config: DataConfig) -> list[Sample]:
    wanted = min(config.audit.samples, len(tokens))
    indices = np.unique(np.linspace(0, len(tokens) - 1, wanted, dtype=np.int64))
    return [
        Sample(index, int(tokens.lengths[index]), _spans(tokens, tokenizer, index, config))
        for index in indices.tolist()
    ]


def _spans(tokens: TokenDataset, tokenizer: Any, index: int, config: DataConfig) -> list[Span]:
    """A document in runs of tokens that are learned or not; its first token never is."""
    ids, mask = tokens.document(index)
    if config.task == "classification":
        # The last token is the number of the label.
        return [Span(_decode(tokenizer, ids[:-1]), False), Span((config.labels or [])[ids[-1]], True)]
    runs = [(learned, len(list(run))) for learned, run in groupby([False, *mask[1:].tolist()])]
    spans, start, before = [], 0, ""
    for learned, length in runs:
        start += length
        # Decoded from the start: some tokenizers drop the white space at the beginning of what they decode.
        text = _decode(tokenizer, ids[:start])
        spans.append(Span(text.removeprefix(before), learned))
        # A character whose bytes are in two runs is shown whole in the second.
        before = text.rstrip("\ufffd")
    return spans


def _decode(tokenizer: Any, ids: Ids) -> str:
    """The one place where an audit turns tokens into text."""
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
