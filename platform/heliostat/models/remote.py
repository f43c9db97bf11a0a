"""Models at URIs: copied to this machine, bundles checked on the way. Knows nothing of tensors."""

from pathlib import Path

from heliostat import cache, storage
from heliostat.errors import ModelError
from heliostat.models import bundle
from heliostat.storage import RemoteFile


def fetch(uri: str) -> Path:
    """The folder, or the file, at the URI as a copy on this machine, which stays until this process ends.

    Raises:
        ModelError: there is nothing, or a bundle that is not whole.
        StorageError, ResourceError: it cannot be fetched.
    """
    files = find(uri)
    if [file.uri for file in files] == [uri]:
        return cache.kept_here(files[0])

    places = {file: _place(file, uri) for file in files}

    def fill(folder: Path) -> None:
        storage.download({file: folder / place for file, place in places.items()})
        check(folder, uri)

    return cache.keep(cache.entry_of(files), fill)


def find(uri: str) -> list[RemoteFile]:
    """The model's files.

    Raises:
        ModelError: there are none.
        StorageError: the place cannot be reached.
    """
    files = storage.find(uri)
    if not files:
        raise ModelError(f"model `{uri}`: no such file or folder")
    return files


def _place(file: RemoteFile, uri: str) -> str:
    """Its path in the folder."""
    above = f"{uri.rstrip('/')}/"
    place = file.uri.removeprefix(above)
    if not file.uri.startswith(above) or ".." in place.split("/"):
        raise ModelError(f"{file.uri}: is not a file below {uri}, which must be a model's folder or file")
    return place


def check(folder: Path, source: str) -> None:
    """Check a folder that came from `source`, if it is a bundle.

    Raises:
        ModelError: a file is missing, changed or not listed; the message names it at its source.
    """
    if not (folder / bundle.MANIFEST).exists():
        return
    try:
        bundle.verify(folder)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), source.rstrip("/"))) from error
