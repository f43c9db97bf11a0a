"""What rows say, whatever white space they say it with: for finding equal rows, blank ones and labels.

Knows formats as far as columns go; nothing of tokens or chat templates, so that 100,000 rows cost about a second.
"""

import hashlib
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from heliostat.data.config import DataConfig
from heliostat.data.dialogue import as_text
from heliostat.data.formats import dialogue_of, field_text, label_of, reference_of, to_segments
from heliostat.data.records import Row

# Completions are labels if they are this few and this short, and each occurs this often on average.
MAX_LABELS = 50
MAX_LABEL_CHARACTERS = 60
MIN_ROWS_OF_A_LABEL = 3

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Contents:
    """What the rows of a split say."""

    origins: Sequence[str]
    """Where each row is from."""
    digests: npt.NDArray[np.uint64]
    """[rows]: equal where the text that is trained on is, white space aside."""
    again: npt.NDArray[np.bool_]
    """[rows]: the very row that came before, as a weight of a mixture repeats it."""
    blank: npt.NDArray[np.bool_]
    """[rows]: what the model is to answer, or a part of it, is empty."""
    labels: dict[str, int] | None
    """Label -> rows, the most frequent first; None if the completions are no labels."""

    @cached_property
    def repeats(self) -> tuple[Indices, Indices]:
        """The rows that say what an earlier one says, and the first that says it; those of a weight aside."""
        _, first, which = np.unique(self.digests, return_index=True, return_inverse=True)
        earlier = first[which]
        found = np.flatnonzero((earlier != np.arange(len(earlier))) & ~self.again)
        return found, earlier[found]


def contents(rows: Sequence[Row], config: DataConfig) -> Contents:
    """Read all rows once.

    Raises:
        DataError: a row is wrong (see `to_segments`).
    """
    digests = np.fromiter((digest(row, config) for row in rows), dtype=np.uint64, count=len(rows))
    blank = np.fromiter((_is_blank(row, config) for row in rows), dtype=np.bool_, count=len(rows))
    return Contents([row.origin for row in rows], digests, _again(rows), blank, _labels(rows, config))


def _again(rows: Sequence[Row]) -> npt.NDArray[np.bool_]:
    _, first = np.unique(np.fromiter(map(id, rows), dtype=np.uint64, count=len(rows)), return_index=True)
    again = np.ones(len(rows), dtype=np.bool_)
    again[first] = False
    return again


def digest(row: Row, config: DataConfig) -> int:
    """64 bits of what is trained on, white space aside: two different rows among a million share them with a
    probability of 3e-8.

    Raises:
        DataError: the row is wrong (see `to_segments`).
    """
    normalised = " ".join(_text(row, config).split()).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(normalised, digest_size=8).digest(), "big")


def _text(row: Row, config: DataConfig) -> str:
    if config.format == "chat":
        dialogue = dialogue_of(row, config)
        said = (f"{message['role']}: {as_text(message)}" for message in dialogue.messages)
        return "\n".join([str(dialogue.tools or ""), *said])
    return "\n".join(segment.text for segment in to_segments(row, config, None))


def _is_blank(row: Row, config: DataConfig) -> bool:
    if config.format == "chat":
        return not all(as_text(message).strip() for message in dialogue_of(row, config).messages)
    return not all(field_text(row, config, field).strip() for field in _prompt_fields(config))


def _prompt_fields(config: DataConfig) -> list[str]:
    """The columns that a prompt is made of and cannot do without; those of a template by their names."""
    required = {"alpaca": ["instruction"], "prompt_completion": ["prompt"]}.get(config.format, [])
    if config.prompt_template is None:
        return required
    return [name for _, name, _, _ in string.Formatter().parse(config.prompt_template) if name]


def _labels(rows: Sequence[Row], config: DataConfig) -> dict[str, int] | None:
    if config.format == "classification":
        return dict(Counter(label_of(row, config) for row in rows).most_common())
    if config.format not in ("prompt_completion", "alpaca"):
        return None
    found: Counter[str] = Counter()
    for row in rows:
        completion = reference_of(row, config).strip()
        found[completion] += 1
        if len(found) > MAX_LABELS or len(completion) > MAX_LABEL_CHARACTERS:
            return None
    return dict(found.most_common()) if len(rows) >= MIN_ROWS_OF_A_LABEL * len(found) else None
