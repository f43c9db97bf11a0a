"""Show a run's progress in the terminal, from its metrics journal. Knows nothing of who writes it."""

import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from heliostat import journal


class ProgressBar:
    """Follows `metrics.jsonl` in a thread: a bar on a terminal, a line every tenth of the way elsewhere."""

    def __init__(self, path: Path, total_steps: int, console: Console) -> None:
        self._journal = path
        self._total = total_steps
        self._console = console
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._latest: dict[str, float] = {}
        self._printed = 0

    def __enter__(self) -> "ProgressBar":
        self._offset = self._journal.stat().st_size if self._journal.exists() else 0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        with Progress(*_columns(), console=self._console, disable=not self._console.is_terminal) as bar:
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
            if not self._console.is_terminal and "loss" in row["metrics"] and step * 10 // self._total > self._printed:
                self._printed = step * 10 // self._total
                self._console.print(f"step {step}/{self._total}  {self._numbers()}", highlight=False)

    def _numbers(self) -> str:
        shown = (("loss", "loss {:.4f}"), ("eval_loss", "validation {:.4f}"), ("tokens_per_second", "{:,.0f} tokens/s"))
        return "  ".join(form.format(self._latest[name]) for name, form in shown if name in self._latest)


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
