"""Files at URIs such as s3://bucket/folder/file, through pyarrow. Knows no models, data or caches.

Credentials, region and endpoint come from the environment or from the files of the cloud's own tools
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL; see
https://arrow.apache.org/docs/python/filesystems.html), never from the URI.
"""

import contextlib
import functools
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
from fsspec.utils import glob_translate
from pyarrow import fs

from heliostat.errors import DISK_FULL, ResourceError, StorageError

_URI = re.compile(r"([a-z][a-z0-9+.-]*)://([^?]*)")
_MAGIC = re.compile(r"[*\[]")
_CHUNK = 2**23
_STREAMS = 8
# What AWS's client for C++ writes into its messages, and what it means for the user.
_CAUSES = {
    "NO_SUCH_BUCKET": "there is no such bucket",
    "NETWORK_CONNECTION": "the server cannot be reached; look at the network and at AWS_ENDPOINT_URL",
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|EXPIRED_TOKEN|status: 403": (
        "access is refused; look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and at what they may do"
    ),
}


@dataclass(frozen=True)
class RemoteFile:
    """A file as it was when it was listed."""

    uri: str
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """The last part of the URI."""
        return PurePosixPath(self.uri).name

    @property
    def suffix(self) -> str:
        """The name's ending, with its dot."""
        return PurePosixPath(self.uri).suffix

    def __str__(self) -> str:
        return self.uri


def is_remote(reference: str) -> bool:
    """Whether the reference is a URI, and no path, name or models:/ reference."""
    return _URI.match(reference) is not None


def find(uri: str) -> list[RemoteFile]:
    """The files that the URI stands for, sorted: one file, all below a folder, or all that match a glob; or none.

    Raises:
        StorageError: the place cannot be reached or read, or pyarrow does not know it.
    """
    filesystem, path = _open(uri)
    scheme = uri.partition("://")[0]
    with failures(uri):
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            found = [info]
        elif _MAGIC.search(path):
            matches = re.compile(glob_translate(path)).fullmatch
            found = [each for each in _below(filesystem, _fixed_part(path)) if matches(each.path)]
        else:
            found = _below(filesystem, path)
    files = [RemoteFile(f"{scheme}://{each.path}", each.size, each.mtime_ns or 0) for each in found]
    return sorted(files, key=lambda file: file.uri)


def download(files: dict[RemoteFile, Path]) -> None:
    """Fetch each file to its path, several at once.

    Raises:
        StorageError: a file cannot be read, or is not as it was listed.
        ResourceError: the disk is full.
    """
    for folder in {target.parent for target in files.values()}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_STREAMS, thread_name_prefix="download") as pool:
        list(pool.map(_download, files, files.values()))


def upload(files: dict[Path, str]) -> None:
    """Write each file to its URI, several at once; in object stores each appears whole or not at all.

    Raises:
        StorageError: a place cannot be reached or written.
    """
    with ThreadPoolExecutor(_STREAMS, thread_name_prefix="upload") as pool:
        list(pool.map(_upload, files, files.values()))


def delete(uris: Iterable[str]) -> None:
    """Delete files.

    Raises:
        StorageError: one cannot be reached or deleted.
    """
    for uri in uris:
        filesystem, path = _open(uri)
        with failures(uri):
            filesystem.delete_file(path)


@contextlib.contextmanager
def failures(uri: str) -> Iterator[None]:
    """Tell what goes wrong inside with a file at the URI.

    Raises:
        StorageError: it cannot be reached, read or written.
        ResourceError: a disk of this machine is full.
    """
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise ResourceError(f"{uri}: there is no room for it on this machine: {error}") from error
        raise StorageError(f"{uri}: {_explain(str(error))}") from error


def _download(file: RemoteFile, target: Path) -> None:
    filesystem, path = _open(file.uri)
    with (
        failures(file.uri),
        filesystem.open_input_stream(path, compression=None) as source,
        target.open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy, _CHUNK)
    if target.stat().st_size != file.size:
        raise StorageError(f"{file.uri}: {target.stat().st_size} bytes came of {file.size}; it changed meanwhile")


def _upload(source: Path, uri: str) -> None:
    filesystem, path = _open(uri)
    with failures(uri):
        if isinstance(filesystem, fs.LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as file, filesystem.open_output_stream(path) as copy:
            shutil.copyfileobj(file, copy, _CHUNK)


def _open(uri: str) -> tuple[Any, str]:
    """The file system, and the path in it."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise StorageError(
            f"{uri}: a URI is SCHEME://BUCKET/PATH, without `?`; the endpoint is AWS_ENDPOINT_URL of the environment"
        )
    scheme, path = match.groups()
    bucket, _, rest = path.rstrip("/").partition("/")
    filesystem, root = _filesystem(scheme, bucket)
    return filesystem, f"{root.rstrip('/')}/{rest}" if rest else root


@functools.cache
def _filesystem(scheme: str, bucket: str) -> tuple[Any, str]:
    uri = f"{scheme}://{bucket}"
    with failures(uri):
        filesystem, root = fs.FileSystem.from_uri(uri if bucket else f"{uri}/")
    return filesystem, root


def _below(filesystem: Any, folder: str) -> list[Any]:
    try:
        found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    except FileNotFoundError:
        return []
    return [each for each in found if each.type == fs.FileType.File]


def _fixed_part(path: str) -> str:
    """The deepest folder that all matches of a glob are in."""
    parts = path.split("/")
    wild = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    return "/".join(parts[:wild])


def _explain(text: str) -> str:
    line = " ".join(text.split()).partition(" (Request ID")[0]
    for pattern, cause in _CAUSES.items():
        if re.search(pattern, line):
            return f"{cause} ({line})"
    return line
