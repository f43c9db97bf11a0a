"""The metrics journal of a run: `metrics.jsonl` in its folder. Knows the file's form, not what writes or reads it.

One JSON line for each logged step: {"step", "time" (unix seconds), "metrics": {name: finite number}}; or, with a
"note" beside them, what the user must be told. The first
training worker appends; the driver follows the file, to show progress and to ship the metrics to MLflow. A run that
goes on from a checkpoint repeats the steps since, with equal values.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"


@dataclass(frozen=True)
class Scalar:
    """One value of one metric."""

    name: str
    value: float
    step: int
    time: float
    """Unix seconds."""


def append(path: Path, step: int, metrics: Mapping[str, float], note: str | None = None) -> None:
    """Add a row with those metrics that are finite."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    row = {"step": step, "time": time.time(), "metrics": finite, **({"note": note} if note else {})}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path, offset: int = 0, limit: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """Up to `limit` complete rows of the journal from byte `offset`, and the offset behind them.

    A last line that is still being written is left for later, a line that is no row is passed over, and a journal that
    became shorter than `offset` is read from its start.
    """
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows, offset
    with path.open("rb") as file:
        offset = offset if offset <= os.fstat(file.fileno()).st_size else 0
        file.seek(offset)
        while (limit is None or len(rows) < limit) and (line := file.readline()).endswith(b"\n"):
            offset += len(line)
            row = _parse_row(line)
            if row is not None:
                rows.append(row)
    return rows, offset


def unseen(rows: Sequence[Mapping[str, Any]], steps: dict[str, int]) -> Iterator[Scalar]:
    """The finite metrics of steps that come after those in `steps` (metric -> last step), which is brought up to date.

    Steps that a resumed training repeats thereby come up once.
    """
    for row in rows:
        for name, value in row["metrics"].items():
            if row["step"] > steps.get(name, -1) and math.isfinite(value):
                steps[name] = row["step"]
                yield Scalar(name, value, row["step"], row["time"])


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        metrics = {str(name): float(value) for name, value in row["metrics"].items()}
        note = {"note": str(row["note"])} if "note" in row else {}
        return {"step": int(row["step"]), "time": float(row["time"]), "metrics": metrics, **note}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
