"""API keys: a file with one entry a key, and the ring that checks what clients present. Knows no HTTP.

The file holds the SHA-256 of each key. Slow hashes (bcrypt, argon2) exist for what people choose as passwords; a key
from `add` is 256 random bits, which nobody can try out, so a fast hash protects it as well, and a flood of wrong keys
costs the endpoint next to nothing. JSON, because in YAML a digest such as 12345e67 would be a number.
"""

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

from filelock import FileLock
from pydantic import AwareDatetime, Field, PositiveInt, ValidationError, model_validator

from heliostat.config import StrictModel
from heliostat.errors import ConfigError

logger = logging.getLogger(__name__)
PREFIX = "hsk_"
# Random bytes of a key.
KEY_BYTES = 32
# How often the file is looked at, at most: a revoked key stops working within this time.
RELOAD_S = 0.5


class Key(StrictModel):
    """An entry of the key file: who may do what. The key itself is not in it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Whose key it is; in logs and metrics the key goes by this name."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    created: AwareDatetime
    models: tuple[Annotated[str, Field(pattern=r"^[^@\s]{1,200}$")], ...] | None = Field(None, min_length=1)
    """Ids of the models that it may use, with all their versions; null: every model."""
    requests_per_minute: PositiveInt | None = None
    max_concurrent: PositiveInt | None = None
    """Requests that may run at once."""


class _KeyFile(StrictModel):
    keys: tuple[Key, ...]

    @model_validator(mode="after")
    def _all_different(self) -> Self:
        names = [key.name for key in self.keys]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two entries have the name `{name}`")
        if len({key.sha256 for key in self.keys}) < len(self.keys):
            raise ValueError("two entries have the same sha256")
        return self


class _Missing(ConfigError):
    """There is no key file."""


def add(
    path: str | Path,
    name: str,
    *,
    models: Sequence[str] | None = None,
    requests_per_minute: int | None = None,
    max_concurrent: int | None = None,
) -> str:
    """Make a key and enter it in the file, which is created if need be; returns the key, which is kept nowhere.

    Raises:
        ConfigError: the name is taken, a value is wrong, or the file cannot be read or written.
    """
    secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    values = {
        "name": name,
        "sha256": _digest(secret),
        "created": datetime.now(UTC).replace(microsecond=0),
        "models": models,
        "requests_per_minute": requests_per_minute,
        "max_concurrent": max_concurrent,
    }
    with _locked(path):
        present = listing(path) if os.path.exists(path) else ()
        if name in {key.name for key in present}:
            raise ConfigError(f"{path}: the name `{name}` is taken; choose another, or revoke that key first")
        try:
            entry = Key.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"the key `{name}`: {_explain(error)}") from None
        _write(path, (*present, entry))
    return secret


def revoke(path: str | Path, name: str) -> None:
    """Take a key out of the file. Running endpoints refuse it within RELOAD_S.

    Raises:
        ConfigError: no key has the name, or the file cannot be read or written.
    """
    with _locked(path):
        present = listing(path)
        left = [key for key in present if key.name != name]
        if len(left) == len(present):
            names = ", ".join(key.name for key in present) or "none"
            raise ConfigError(f"{path}: no key has the name `{name}` (there are: {names})")
        _write(path, left)


def listing(path: str | Path) -> tuple[Key, ...]:
    """The entries of the file.

    Raises:
        ConfigError: the file is missing, unreadable or malformed; the message names the entry, and quotes no value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _Missing(f"{path}: there is no such key file; make one with `heliostat keys add {path} NAME`") from None
    except OSError as error:
        raise ConfigError(f"{path}: the key file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the key file is not UTF-8 text") from None
    try:
        # What goes wrong here must not be chained: those errors hold the text of the file.
        values = json.loads(text)
        return _KeyFile.model_validate(values).keys
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: the key file is not JSON: {error.msg}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, values)}") from None


class KeyRing:
    """The keys that are valid now. It follows its file: what is added or revoked counts without a restart.

    A file that turns unreadable or malformed changes nothing but the log, so that a slip of an editor does not lock
    everybody out. A file that is gone leaves no key valid: taking it away is how all access is withdrawn at once.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            ConfigError: it is missing, unreadable or malformed.
        """
        self._path = path
        self._clock = clock
        self._stamp = _stamp(path)
        self._keys = listing(path)
        self._next_look = clock() + RELOAD_S

    def check(self, presented: str | None) -> Key | None:
        """The entry of a presented key; None if it is not valid.

        Every entry is compared in constant time, whichever matches, so the time it takes tells nothing.
        """
        self._follow_the_file()
        digest = _digest(presented or "")
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found if presented else None

    def _follow_the_file(self) -> None:
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + RELOAD_S
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            self._stamp = stamp
            self._keys = self._reread()

    def _reread(self) -> tuple[Key, ...]:
        try:
            return listing(self._path)
        except _Missing:
            logger.error("the key file %s is gone: no API key is valid until it is back", self._path)
            return ()
        except ConfigError as error:
            logger.error("%s; the keys that were valid before stay valid", error)
            return self._keys


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def _stamp(path: str | Path) -> tuple[int, ...]:
    """What changes when the file does: edited in place, replaced, or reached through another link."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextlib.contextmanager
def _locked(path: str | Path) -> Iterator[None]:
    """Hold off others that edit the file."""
    if not Path(path).parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {Path(path).parent}")
    try:
        with FileLock(f"{os.path.realpath(path)}.lock", mode=0o600):
            yield
    except OSError as error:
        raise ConfigError(f"{path}: the key file cannot be changed: {error.strerror}") from error


def _write(path: str | Path, keys: Sequence[Key]) -> None:
    """Replace the file in one step. Only its owner may read it; a file that was there keeps its owner."""
    target = Path(os.path.realpath(path))
    text = json.dumps({"keys": [key.model_dump(mode="json") for key in keys]}, indent=2) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # its mode is 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            if target.exists() and os.geteuid() == 0:
                os.fchown(file.fileno(), target.stat().st_uid, target.stat().st_gid)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _explain(error: ValidationError, values: Any = None) -> str:
    """The first thing that is wrong, and where; never the value, which could be a key."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    match first["loc"]:
        case ("keys", int(index), *rest):
            place = f"entry {index + 1}{_name_of(values, index)}: "
        case (*rest,):
            place = ""
    where = ".".join(map(str, rest))
    return place + (f"{where}: " if where else "") + first["msg"].removeprefix("Value error, ")


def _name_of(values: Any, index: int) -> str:
    """` (NAME)` where an entry of the raw file has a name."""
    entry = values["keys"][index]
    name = entry.get("name") if isinstance(entry, dict) else None
    return f" ({name[:64]})" if isinstance(name, str) else ""
