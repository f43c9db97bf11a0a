"""Show a run's progress in the terminal, from its metrics journal. Knows nothing of who writes it."""

import os
import re
import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from heliostat import journal

# Lines of progress where there is no terminal. Who follows a job and draws a bar from its lines asks for more of them.
LINES = "HELIOSTAT_PROGRESS_LINES"
_LINE = re.compile(r"step (\d+)/(\d+)  (.*)")


class ProgressBar:
    """Follows `metrics.jsonl` in a thread: a bar on a terminal, elsewhere a line every tenth of the way, or `LINES`."""

    def __init__(self, path: Path, total_steps: int, console: Console) -> None:
        self._journal = path
        self._total = total_steps
        self._console = console
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._latest: dict[str, float] = {}
        self._printed = 0
        self._lines = int(os.environ.get(LINES, 10))

    def __enter__(self) -> "ProgressBar":
        self._offset = self._journal.stat().st_size if self._journal.exists() else 0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        with bar_on(self._console) as bar:
            task = bar.add_task("starting workers", total=self._total, numbers="")
            while not self._stop.wait(0.3):
                self._show(bar, task)
            self._show(bar, task)

    def _show(self, bar: Progress, task: Any) -> None:
        rows, self._offset = journal.read(self._journal, self._offset)
        for row in rows:
            self._latest.update(row["metrics"])
            if "note" in row:
                self._console.print(row["note"], highlight=False, markup=False)
            step = row["step"]
            bar.update(task, completed=step, description="training", numbers=self._numbers())
            part = step * self._lines // self._total
            if not self._console.is_terminal and "loss" in row["metrics"] and part > self._printed:
                self._printed = part
                self._console.print(f"step {step}/{self._total}  {self._numbers()}", highlight=False)

    def _numbers(self) -> str:
        shown = (("loss", "loss {:.4f}"), ("eval_loss", "validation {:.4f}"), ("tokens_per_second", "{:,.0f} tokens/s"))
        return "  ".join(form.format(self._latest[name]) for name, form in shown if name in self._latest)


def bar_on(console: Console) -> Progress:
    """A bar for tasks with a field `numbers`; it shows nothing where there is no terminal."""
    return Progress(*_columns(), console=console, disable=not console.is_terminal)


def parse(line: str) -> tuple[int, int, str] | None:
    """(step, of how many, numbers) of a line of progress; None: it is another line."""
    match = _LINE.fullmatch(line)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
