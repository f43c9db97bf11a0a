"""Files -> rows: every row arrives with its place, and every malformed input is refused with its place."""

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from heliostat.data.records import Row, expand, file_manifest, read
from heliostat.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
ROWS = [{"a": 'x "quoted", with comma', "b": "1"}, {"a": "two\nlines", "b": "2"}, {"a": "ü \u2028 end", "b": ""}]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_rows(path: Path) -> str:
    if path.suffix == ".jsonl":
        return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    if path.suffix == ".json":
        return write(path, json.dumps(ROWS))
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return str(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["a", "b"])
        writer.writeheader()
        writer.writerows(ROWS)
    return str(path)


@pytest.mark.parametrize(
    ("name", "origins"),
    [
        ("r.jsonl", [":1", ":2", ":3"]),
        ("r.json", ["[0]", "[1]", "[2]"]),
        ("r.parquet", ["[0]", "[1]", "[2]"]),
        ("r.csv", [":2", ":3", ":5"]),
    ],
)
def test_every_form_gives_the_same_rows_with_their_places(tmp_path: Path, name: str, origins: list[str]) -> None:
    path = write_rows(tmp_path / name)
    assert read(path) == [Row(fields, path + origin) for fields, origin in zip(ROWS, origins, strict=True)]


def test_a_byte_order_mark_and_blank_lines_at_the_end_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", b"\xef\xbb\xbf" + b'{"a": 1}\r\n\n \n')
    assert [row.fields for row in read(path)] == [{"a": 1}]
    path = write(tmp_path / "r.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n")
    assert [row.fields for row in read(path)] == [{"a": "1", "b": "2"}]


def test_tsv_has_no_quoting_and_may_lack_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "r.tsv", 'ham\t"unbalanced\nspam\tb"c\n')
    rows = read(path, column_names=["label", "text"])
    assert [row.fields["text"] for row in rows] == ['"unbalanced', 'b"c']
    assert rows[0].origin == f"{path}:1"


def test_a_csv_field_may_be_longer_than_the_default_limit_of_the_csv_module(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", f"a\n{'x' * 200_000}\n")
    assert len(read(path)[0].fields["a"]) == 200_000


def test_text_is_one_document_or_split_at_the_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "r.txt", "one\r\nstill one\n\n\n\ntwo\n\n   \n\nthree\n")
    assert [row.origin for row in read(path)] == [f"{path}:1"]
    rows = read(path, text_separator="\n\n")
    assert [(row.fields["text"], row.origin) for row in rows] == [
        ("one\nstill one", f"{path}:1"),
        ("two", f"{path}:6"),
        ("three", f"{path}:10"),
    ]


def test_globs_are_sorted_and_sources_keep_their_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", name)
    rows = read([str(tmp_path / "c.txt"), str(tmp_path / "[ab].txt")])
    assert [row.fields["text"] for row in rows] == ["c", "a", "b"]
    odd = write(tmp_path / "[ab].txt", "named like a glob")
    assert expand(odd) == [Path(odd)]


BAD = [
    ("r.jsonl", '{"a": 1}\n{"a": 2,}\n', r"r\.jsonl:2: is not valid JSON: .* at column 9"),
    ("r.jsonl", '{"a": 1}\n\n{"a": 2}\n', r"r\.jsonl:2: is not valid JSON"),
    ("r.jsonl", '{"a": 1}\n[1]\n', r"r\.jsonl:2: must be a JSON object .* found a list"),
    ("r.json", '[{"a": 1},\n{"a": }]', r"r\.json:2: is not valid JSON: .* at column 7"),
    ("r.json", '{"a": 1}\n{"a": 2}\n', r"r\.json:2: is not valid JSON: Extra data .* must be named \.jsonl"),
    ("r.json", '{"a": 1}', r"r\.json:1: must be a JSON array"),
    ("r.json", "[1]", r"r\.json\[0\]: must be a JSON object"),
    ("r.json", "[]", r"r\.json: has no rows"),
    ("r.csv", "a,b\n1,2\n3\n", r"r\.csv:3: has 1 fields where 2 are expected"),
    ("r.csv", 'a,b\n"x\ny",2\n3,4,5\n', r"r\.csv:4: has 3 fields"),
    ("r.csv", 'a,b\n1,2\n"x,2\n', r"r\.csv:3: is not valid CSV: unexpected end of data"),
    ("r.csv", "a,b\n\n1,2\n", r"r\.csv:2: has 0 fields"),
    ("r.csv", "a,a\n1,2\n", r"r\.csv:1: the header names a column twice"),
    ("r.csv", "a,b\n", r"r\.csv: has no rows"),
    ("r.tsv", "a\tb\n1\n", r"r\.tsv:2: has 1 fields"),
    ("r.txt", "", r"r\.txt: is empty"),
    ("r.jsonl", "\n \n", r"r\.jsonl: is empty"),
    ("r.txt", b"fine\nna\xefve\n", r"r\.txt:2: byte 0xef is not UTF-8"),
    ("r.parquet", "not parquet", r"r\.parquet: cannot be read as Parquet"),
    ("r.xlsx", "x", r"unknown kind of file `\.xlsx`; supported: \.jsonl \.json"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_malformed_input_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_missing_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="matches no file"):
        read(str(tmp_path / "*.jsonl"))
    with pytest.raises(DataError, match=r"is a folder; name its files, such as .*/\*\.jsonl"):
        read(str(tmp_path))


def test_content_ignores_column_order_and_place() -> None:
    one, two = Row({"a": 1, "b": "ü"}, "x:1"), Row({"b": "ü", "a": 1}, "y:9")
    assert one.content() == two.content() != Row({"a": 1, "b": "u"}, "x:1").content()


def test_manifest_has_hash_and_size_of_every_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.txt", "abc")
    assert file_manifest([path, "hf:name"]) == [
        {"path": path, "sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3},
        {"path": "hf:name", "sha256": None, "bytes": None},
    ]


def test_hub_data_sets_load_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `load_dataset` takes a folder of files as well as a hub name, by the same path.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"a": "x"}\n{"a": "y"}\n')
    rows = read(f"hf:{folder}:train")
    assert [row.fields for row in rows] == [{"a": "x"}, {"a": "y"}]
    assert rows[1].origin == f"hf:{folder}:train[1]"
    with pytest.raises(DataError, match="cannot be loaded as a hub data set"):
        read(f"hf:{folder}:nosuchsplit")


def test_an_unreachable_hub_is_a_data_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hf:heliostat/none: cannot be loaded .* name files instead"):
        read("hf:heliostat/none")


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.exists(), reason="the real data sets are not beside the checkout")
def test_real_files_read_completely() -> None:
    spam = read(str(SHARED / "sms_spam/train.tsv"), column_names=["label", "text"])
    assert len(spam) == 4459
    assert {row.fields["label"] for row in spam} == {"ham", "spam"}
    assert len(read(str(SHARED / "alpaca/*.json"))) == 1700
    assert len(read(str(SHARED / "gsm8k/train.jsonl"))) == 3000


def test_parallel_lines_are_rows(tmp_path: Path) -> None:
    write(tmp_path / "val.en", "a man\n\na dog  \n")
    write(tmp_path / "val.de", "ein Mann\nleer\nein\u2028Hund\n")
    source = str(tmp_path / "val.{en,de}")
    assert [row.fields for row in read(source)] == [
        {"en": "a man", "de": "ein Mann"},
        {"en": "", "de": "leer"},
        {"en": "a dog", "de": "ein\u2028Hund"},
    ]
    assert read(source)[2].origin == f"{tmp_path}/val.en:3"
    assert [Path(entry["path"]).name for entry in file_manifest(source)] == ["val.en", "val.de"]


def test_parallel_files_of_other_lengths_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "val.en", "one\ntwo\n")
    write(tmp_path / "val.de", "eins\n")
    with pytest.raises(DataError, match=r"val\.de: has 1 lines where .*val\.en has 2"):
        read(str(tmp_path / "val.{en,de}"))
    with pytest.raises(DataError, match=r"val\.fr: no such file"):
        read(str(tmp_path / "val.{en,fr}"))


def test_files_at_uris_are_rows_with_their_uris(tmp_path: Path) -> None:
    folder = tmp_path / "bucket"
    folder.mkdir()
    paths = [write_rows(folder / name) for name in ("1.jsonl", "2.csv", "3.parquet")]
    uris = [f"file://{path}" for path in paths]
    assert read(uris) == [replace(row, origin=f"file://{row.origin}") for row in read(paths)]
    assert file_manifest(uris) == [{**entry, "path": f"file://{entry['path']}"} for entry in file_manifest(paths)]
    assert read(f"file://{folder}/*.jsonl") == read(uris[0])
    write(folder / "t.en", "a\nb\n")
    write(folder / "t.de", "c\nd\n")
    assert [row.fields for row in read(f"file://{folder}/t.{{en,de}}")] == [
        {"en": "a", "de": "c"},
        {"en": "b", "de": "d"},
    ]
    write(folder / "1.jsonl", '{"a": 1}\n{"a"')
    with pytest.raises(DataError, match=rf"^{uris[0]}:2: is not valid JSON"):
        read(uris[0])


@pytest.mark.parametrize(("name", "told"), [("nix.jsonl", "no such file"), ("", "is a folder; name its files")])
def test_uris_of_no_file_are_refused(tmp_path: Path, name: str, told: str) -> None:
    write_rows(tmp_path / "r.jsonl")
    with pytest.raises(DataError, match=told):
        read(f"file://{tmp_path}/{name}")
