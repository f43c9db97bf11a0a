"""A run's metrics as TensorBoard event files, from its journal. Knows nothing of who writes the journal.

The files themselves tell what they hold, so a driver that is killed, at any place, costs no metric and repeats none.
"""

import contextlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from heliostat import journal
from heliostat.config import Notice
from heliostat.errors import ConfigError
from heliostat.training.config import Reporter

FOLDER = "tensorboard"
_INTERVAL_S = 2.0


def check(report_to: Sequence[Reporter]) -> None:
    """Refuse what cannot be reported to.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """
    if "tensorboard" in report_to and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "training.report_to: tensorboard needs its package: pip install 'heliostat[tensorboard]', or leave it out"
        )


@contextlib.contextmanager
def following(
    report_to: Sequence[Reporter],
    run_folder: Path,
    notice: Notice = lambda text: print(text, file=sys.stderr),
) -> Iterator[None]:
    """Write event files to `tensorboard/` in the run folder while the work inside goes on, if that is asked for.

    Never raises into the work: if the files cannot be written, `notice` says so once.
    """
    if "tensorboard" not in report_to:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_follow, name="tensorboard", args=(run_folder, ended, notice), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _follow(run_folder: Path, ended: threading.Event, notice: Notice) -> None:
    try:
        # Imported here: it takes seconds, and is an extra.
        from torch.utils.tensorboard import SummaryWriter

        steps, offset = _steps(run_folder / FOLDER), 0
        writer = SummaryWriter(str(run_folder / FOLDER))
        with contextlib.closing(writer):
            last = False
            while not last:
                last = ended.wait(_INTERVAL_S)  # what was written before the end is read after it
                rows, offset = journal.read(run_folder / journal.NAME, offset)
                _write(writer, rows, steps)
    except Exception as error:
        notice(f"TensorBoard's event files cannot be written ({error}); the metrics are in {run_folder / journal.NAME}")


def _write(writer: Any, rows: Sequence[dict[str, Any]], steps: dict[str, int]) -> None:
    for new in journal.unseen(rows, steps):
        writer.add_scalar(tag(new.name), new.value, new.step, new.time)
    writer.flush()


def tag(name: str) -> str:
    """TensorBoard's name of a metric, as Hugging Face's Trainer has it: train/loss, eval/loss."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def _steps(folder: Path) -> dict[str, int]:
    """The last step of each metric in the event files."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    if not folder.exists():
        return {}
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()  # 0: all of them
    last = {name: max(event.step for event in events.Scalars(name)) for name in events.Tags()[SCALARS]}
    return {name.removeprefix("train/").replace("eval/", "eval_", 1): step for name, step in last.items()}
