"""Passages with gaps -> one row for each question. Knows the files of RuCoS and ReCoRD; nothing of prompts or tokens.

A file's row is {"passage": {"text", "entities": [{start, end}]}, "qas": [{"query", "answers": [{start, end, text}]}]}:
ReCoRD (Zhang et al. 2018, https://arxiv.org/abs/1810.12885) and RuCoS (Shavrina et al. 2020,
https://arxiv.org/abs/2010.15925). A query has `@placeholder` where one of the passage's entities belongs. Places are
characters of the passage. ReCoRD's `end` is the last character, RuCoS's the one behind it; the answers, which bring
their text, tell which.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from heliostat.data.records import Row
from heliostat.errors import DataError

PLACEHOLDER = "@placeholder"
HIGHLIGHT = "\n@highlight\n"
"""What stands between the passage and each sentence of its summary."""


def questions(rows: Sequence[Row]) -> list[Row]:
    """One row for each question, in order, with the columns

    - `passage`: its text, the sentences of its summary as lines that begin with "- ",
    - `query`: the text with the gap,
    - `answers`: the different texts that are right, the first one first,
    - `candidates`: the different entities of the passage, by place,

    and all others that the file's row has beside `passage` and `qas`.

    Raises:
        DataError: a row is not of that form, a query has no gap or no answer, or an answer is not where it says.
    """
    return [question for row in rows for question in _questions(row)]


def _questions(row: Row) -> Iterator[Row]:
    passage = _get(row.fields, "passage", dict, row.origin)
    text = _get(passage, "text", str, f"{row.origin}: passage")
    asked = _get(row.fields, "qas", list, row.origin)
    answers = [_answers(qa, f"{row.origin}: question {number}") for number, qa in enumerate(asked, 1)]
    width = _width(text, [answer for found in answers for answer in found], row.origin)
    candidates = [_part(text, entity, width, row.origin) for entity in _get(passage, "entities", list, row.origin)]
    others = {name: value for name, value in row.fields.items() if name not in ("passage", "qas")}
    for number, (qa, found) in enumerate(zip(asked, answers, strict=True), 1):
        origin = f"{row.origin}: question {number}" if len(asked) > 1 else row.origin
        fields = {
            "passage": text.replace(HIGHLIGHT, "\n- "),
            "query": _query(qa, f"{row.origin}: question {number}"),
            "answers": list(dict.fromkeys(answer["text"] for answer in found)),
            "candidates": list(dict.fromkeys(candidates)),
        }
        yield Row({**others, **fields}, origin, row.source)


def _query(qa: Mapping[str, Any], place: str) -> str:
    query: str = _get(qa, "query", str, place)
    if PLACEHOLDER not in query:
        raise DataError(f"{place}: its query has no {PLACEHOLDER}; there is nothing to fill in")
    return query


def _answers(qa: Any, place: str) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = _get(qa, "answers", list, place)
    if not answers:
        raise DataError(f"{place}: has no answer; leave out the rows of a test set without answers")
    for answer in answers:
        if not _get(answer, "text", str, f"{place}: answer").strip():
            raise DataError(f"{place}: an answer's text is empty")
    return answers


def _width(text: str, answers: Sequence[Mapping[str, Any]], origin: str) -> int:
    """How many characters behind `end` a part ends: 0 (RuCoS) or 1 (ReCoRD)."""
    for width in (0, 1):
        if all(_part(text, answer, width, origin) == answer["text"] for answer in answers):
            return width
    raise DataError(
        f"{origin}: the answers' `start` and `end` do not give their `text` in the passage, neither with `end` behind "
        "the last character (RuCoS) nor at it (ReCoRD)"
    )


def _part(text: str, place: Any, width: int, origin: str) -> str:
    start, end = _get(place, "start", int, origin), _get(place, "end", int, origin)
    if not 0 <= start < end + width <= len(text):
        raise DataError(f"{origin}: {start} to {end} is no part of the passage, which has {len(text)} characters")
    return text[start : end + width]


def _get(value: Any, key: str, kind: type, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: must be an object with `{key}`, found a {type(value).__name__}")
    if not isinstance(value.get(key), kind):
        found = "nothing" if value.get(key) is None else f"a {type(value[key]).__name__}"
        raise DataError(f"{place}: `{key}` must be a {kind.__name__}, found {found} (format: cloze)")
    return value[key]
