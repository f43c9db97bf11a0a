"""Files at URIs are found and fetched as they are; what goes wrong is told with the URI and what to do."""

import errno
from pathlib import Path

import pytest

from heliostat import storage
from heliostat.errors import ResourceError, StorageError


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    for name in ("a/1.jsonl", "a/2.jsonl", "a/b/3.jsonl", "a/other.csv"):
        path = tmp_path / "bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "bucket"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/1.jsonl", ["1.jsonl"]),
        ("a/*.jsonl", ["1.jsonl", "2.jsonl"]),
        ("a/[2-9].jsonl", ["2.jsonl"]),
        ("*/b/*.jsonl", ["3.jsonl"]),
        ("a/**/*.jsonl", ["1.jsonl", "2.jsonl", "3.jsonl"]),
        ("a/b", ["3.jsonl"]),
        ("a/b/", ["3.jsonl"]),
        ("a/nix*", []),
        ("nix/*", []),
        ("nix", []),
    ],
)
def test_a_uri_is_a_file_a_folder_or_a_glob(bucket: Path, pattern: str, names: list[str]) -> None:
    found = storage.find(f"{bucket.as_uri()}/{pattern}")
    assert [file.name for file in found] == names
    assert all(Path(file.uri.removeprefix("file://")).stat().st_size == file.size for file in found)


def test_files_come_as_they_are_even_compressed_ones(bucket: Path, tmp_path: Path) -> None:
    (bucket / "x y%20#.gz").write_bytes(b"\x1f\x8b not really")
    files = storage.find(f"file://{bucket}")
    targets = {file: tmp_path / "copy" / file.uri.removeprefix(f"file://{bucket}/") for file in files}
    storage.download(targets)
    copied = {path.relative_to(tmp_path / "copy"): path.read_bytes() for path in targets.values()}
    assert copied == {path.relative_to(bucket): path.read_bytes() for path in bucket.rglob("*") if path.is_file()}


def test_a_file_that_changes_after_it_was_listed_is_refused(bucket: Path, tmp_path: Path) -> None:
    (file,) = storage.find(f"{bucket.as_uri()}/a/1.jsonl")
    (bucket / "a" / "1.jsonl").write_text("more than before")
    with pytest.raises(StorageError, match=r"a/1.jsonl: 16 bytes came of 9"):
        storage.download({file: tmp_path / "copy"})


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("nix://bucket/x", "nix://bucket: .*nix"),
        ("s3://bucket/x?endpoint_override=localhost:9", r"without `\?`; the endpoint is AWS_ENDPOINT_URL"),
    ],
)
def test_what_is_no_place_is_refused(uri: str, told: str) -> None:
    assert storage.is_remote(uri)
    with pytest.raises(StorageError, match=told):
        storage.find(uri)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            "AWS Error NO_SUCH_BUCKET in ListObjectsV2: x (Request ID: 7)",
            r"^s3://x: there is no such bucket",
        ),
        ("AWS Error ACCESS_DENIED during HeadObject operation: No response body.", "AWS_ACCESS_KEY_ID"),
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7", "AWS_ENDPOINT_URL"),
    ],
)
def test_failures_are_told_with_what_to_do(error: str, told: str) -> None:
    with pytest.raises(StorageError, match=told) as raised, storage.failures("s3://x"):
        raise OSError(error)
    assert "Request ID" not in str(raised.value)


def test_a_full_disk_is_no_failure_of_the_place() -> None:
    with pytest.raises(ResourceError, match="s3://x: there is no room"), storage.failures("s3://x"):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/x")


@pytest.mark.parametrize("reference", ["gpt2", "/a/b", "models:/a/1", "hf:x", "package:a/b.gguf", "a:b"])
def test_other_references_are_no_uris(reference: str) -> None:
    assert not storage.is_remote(reference)
