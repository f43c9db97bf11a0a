"""SIGTERM to the driver of a training: saved, then ended. Knows signals and a file, not who looks for the file.

It ends as Ray's own drivers do, by a SystemExit whose code is the signal's number. Signals reach main threads only: in
another one, such as a trial's, nothing here changes anything.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit, so that what is open is closed."""
    with _calling(_end):
        yield


@contextlib.contextmanager
def pausing(file: Path) -> Iterator[None]:
    """Inside, SIGTERM makes the file, which tells the work inside to come to its end; SystemExit is raised then.

    A second SIGTERM does not wait for that.
    """
    file.unlink(missing_ok=True)

    def pause() -> None:
        if file.exists():
            _end()
        file.touch()

    with _calling(pause):
        yield
    if file.exists():
        file.unlink()
        _end()


def _end() -> NoReturn:
    sys.exit(signal.SIGTERM)


@contextlib.contextmanager
def _calling(handler: Callable[[], object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
