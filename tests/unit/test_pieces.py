"""Files in pieces: together exactly the rows of the whole file, with their places, wherever the cuts fall."""

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from heliostat.data import pieces as module
from heliostat.data.pieces import PieceRows, lines_before, pieces
from heliostat.data.records import Row, read
from heliostat.errors import DataError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and blocks so small that every border is in the middle of something."""
    monkeypatch.setattr(module, "PIECE_BYTES", 23)
    monkeypatch.setattr(module, "_BLOCK", 7)


def in_pieces(path: Path, separator: str | None = None) -> list[Row]:
    found = []
    before = 0
    for piece in pieces(path, separator):
        assert before == lines_before(piece, separator)
        rows = PieceRows(piece, ["text"], separator, before)
        found += [row for _, row in rows]
        before += rows.lines
    return found


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "\n", "aa", "--\n", "=", "=-="])
def test_text_is_split_as_in_one_go(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "t.txt"
    chance = random.Random(separator)
    parts = [separator, separator, "\n", "\r\n", " ", "a", "aaa", "word", "=", "-", "é\u2028", "<|end", "x" * 30]
    for _ in range(100):
        path.write_bytes("".join(["\ufeff", "x", *chance.choices(parts, k=chance.randrange(40))]).encode())
        assert in_pieces(path, separator) == read(str(path), text_separator=separator)


def test_lines_are_read_as_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    chance = random.Random(0)
    for _ in range(50):
        texts = ["é\u2028 " * chance.randrange(12) + "." for _ in range(chance.randrange(1, 20))]
        end = chance.choice(["\n", "\r\n"])
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        path.write_bytes(("\ufeff" + end.join(lines) + chance.choice(["", end, end * 3])).encode())
        assert in_pieces(path) == read(str(path))


def test_row_groups_are_read_as_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"text": [f"row {number}" for number in range(50)], "other": list(range(50))})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    assert len(pieces(path, None)) > 3
    expected = [Row({"text": row.fields["text"]}, row.origin) for row in read(str(path))]
    assert in_pieces(path) == expected


def test_a_text_file_without_a_separator_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one\n\ntwo " * 20)
    assert in_pieces(path) == read(str(path))


@pytest.mark.parametrize(
    ("name", "content", "separator", "message"),
    [
        ("t.csv", "text\na\n", None, r"t\.csv: data\.streaming reads \.jsonl"),
        ("t.txt", "word " * 200, None, r"t\.txt:1: this document has more than .* set data\.text_separator"),
        ("t.txt", "word " * 200, "#", r"t\.txt, byte 0: this document has more than"),
        ("t.jsonl", '{"text": "a"}\n' + '{"text": "' + "word " * 200, None, r"t\.jsonl:2: this document has more"),
        ("t.jsonl", '{"text": "a"}\n' * 5 + "{nothing}\n", None, r"t\.jsonl:6: is not valid JSON"),
        ("t.jsonl", '{"text": "a"}\n' * 5 + "[]\n", None, r"t\.jsonl:6: must be a JSON object"),
        ("t.parquet", "no table", None, r"t\.parquet: cannot be read as Parquet"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, separator: str | None, message: str
) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 500)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        in_pieces(tmp_path / name, separator)


def test_bytes_that_are_not_utf_8_are_named_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"one\n#two\n#\xff\n")
    with pytest.raises(DataError, match=r"t\.txt:3: byte 0xff is not UTF-8"):
        in_pieces(tmp_path / "t.txt", "#")
