"""The quickstart's data: "every weekday at 9:30" -> "30 9 * * 1-5". Knows nothing of models and of training.

Rows are drawn family by family: a random `Schedule` gives the completion (`cron.cron_line`), one of its wordings the
prompt (`phrases.parts`; their docstrings say how a phrase is read). Exact match on the test split means understanding:
the splits share no cron line, so no test completion was ever trained on, in any wording. Each wording and each value
(hour, weekday, month, ...) alone does occur in training. Minutes are multiples of five, except in `*/12` and the like.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple, get_args

from heliostat.errors import ResourceError
from heliostat.quickstart.cron import Clock, Schedule, cron_line
from heliostat.quickstart.phrases import MONTH_INTERVALS, parts

Split = Literal["train", "validation", "test"]

ROWS_PER_FAMILY: dict[Split, int] = {"train": 2000, "validation": 25, "test": 50}
MAX_PROMPT_LENGTH = 60
UNSEEN_PHRASE = ("every weekday at 9:30", "30 9 * * 1-5")
"""A phrase and its cron line, which for every seed is in the test split only."""

ROUND_DAYS = (1, 5, 10, 15, 20, 25)
TASKS = (
    "run",
    "remind me",
    "start the job",
    "send the report",
    "back up the database",
    "sync the files",
)


class Row(NamedTuple):
    """One pair: the phrase, its cron line, and the family of schedules it was drawn from."""

    prompt: str
    completion: str
    family: str


def write(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write train.jsonl, validation.jsonl and test.jsonl into `folder`; returns the rows of each split.

    A row is {"prompt": ..., "completion": ..., "family": ...}. The same seed gives the same bytes on every machine.

    Raises:
        ResourceError: the folder cannot be written.
    """
    splits = rows(seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, found in splits.items():
            _write_lines(folder / f"{split}.jsonl", [json.dumps(row._asdict()) for row in found])
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be written: {error.strerror}; name another folder") from error
    return {split: len(found) for split, found in splits.items()}


def _write_lines(path: Path, lines: list[str]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes("".join(f"{line}\n" for line in lines).encode())
    unfinished.replace(path)


def rows(seed: int = 0) -> dict[Split, list[Row]]:
    """The rows of each split, shuffled: `ROWS_PER_FAMILY` of each family, no prompt twice, no cron line shared."""
    splits: dict[Split, list[Row]] = {split: [] for split in get_args(Split)}
    splits["test"].append(Row(*UNSEEN_PHRASE, "weekday_time"))
    seen = {UNSEEN_PHRASE[0]}
    for family in FAMILIES:
        missing = {split: ROWS_PER_FAMILY[split] - _count(splits[split], family) for split in splits}
        drawn = _draw(family, seed)
        while any(missing.values()):
            row = next(drawn)
            split = split_of(row.completion, seed)
            if missing[split] and row.prompt not in seen:
                seen.add(row.prompt)
                splits[split].append(row)
                missing[split] -= 1
    for split, found in splits.items():
        Random(f"{seed} {split}").shuffle(found)
    return splits


def split_of(line: str, seed: int) -> Split:
    """The one split that may use this cron line: a tenth of all lines is tested, a tenth validates."""
    if line == UNSEEN_PHRASE[1]:
        return "test"
    tenth = int.from_bytes(hashlib.sha256(f"{seed} {line}".encode()).digest()[:8]) % 10
    return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def _count(found: list[Row], family: str) -> int:
    return sum(row.family == family for row in found)


def _draw(family: str, seed: int) -> Iterator[Row]:
    rng = Random(f"{seed} {family}")
    while True:
        schedule = FAMILIES[family](rng)
        prompt = phrase(schedule, rng)
        if len(prompt) < MAX_PROMPT_LENGTH:
            yield Row(prompt, cron_line(schedule), family)


def phrase(schedule: Schedule, rng: Random) -> str:
    """One wording of the schedule, sometimes with a task before it: "send the report on fridays at 8am"."""
    chosen = [rng.choice(wordings) for wordings in parts(schedule)]
    rng.shuffle(chosen)
    task = rng.choice(TASKS) if rng.random() < 0.15 else ""
    return " ".join(filter(None, [task, *chosen]))


def _minute(rng: Random) -> int:
    """Round minutes are as common as people make them."""
    return rng.choice((0, rng.choice((15, 30, 45)), rng.randrange(0, 60, 5)))


def _time(rng: Random) -> tuple[Clock, ...]:
    hour = rng.choice((rng.randrange(6, 22), rng.randrange(24)))
    return ((hour, _minute(rng)),) if rng.random() < 0.95 else ((0, 0),)


def _times(rng: Random) -> tuple[Clock, ...]:
    minute = rng.choice((0, _minute(rng)))
    return tuple((hour, minute) for hour in _some(rng, range(24), rng.choice((2, 2, 2, 3))))


def _day(rng: Random, last: int = 31) -> int:
    return rng.choice((rng.choice(ROUND_DAYS), rng.randint(1, last)))


def _some(rng: Random, values: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(values, count)))


def _span(rng: Random, values: range, longest: int) -> tuple[int, ...]:
    """Three or more neighbours."""
    length = rng.randint(3, longest)
    start = rng.randrange(len(values) - length + 1)
    return tuple(values[start : start + length])


def _weekdays(rng: Random) -> tuple[int, ...]:
    week = range(1, 8)
    shape = rng.choices(("weekdays", "weekend", "one", "two", "three", "range", "all but one"), (4, 2, 5, 4, 2, 4, 2))[
        0
    ]
    if shape == "weekdays":
        return (1, 2, 3, 4, 5)
    if shape == "weekend":
        return (0, 6)
    if shape == "range":
        days = _span(rng, week, 6)
    else:
        days = _some(rng, week, {"one": 1, "two": 2, "three": 3, "all but one": 6}[shape])
    return tuple(sorted(day % 7 for day in days))


def _maybe_weekdays(rng: Random) -> tuple[int, ...]:
    return _weekdays(rng) if rng.random() < 0.5 else ()


def _past(rng: Random) -> tuple[int, ...]:
    count = rng.choice((1, 1, 2))
    return _some(rng, range(5, 60, 5), count)


def _interval(rng: Random) -> int:
    return rng.choice((1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30))


def _interval_hours(rng: Random) -> Schedule:
    hours = rng.choice((1, 2, 3, 4, 6, 8, 12))
    minutes = _some(rng, range(5, 60, 5), 1) if hours > 1 and rng.random() < 0.5 else ()
    return Schedule(interval=60 * hours, minutes=minutes, weekdays=_maybe_weekdays(rng))


def _hour_range(rng: Random) -> Schedule:
    hours = rng.choice((range(rng.randint(7, 10), rng.randint(16, 19)), _span(rng, range(5, 24), 14)))
    interval = rng.choice((_interval(rng), 60, rng.choice((120, 180))))
    return Schedule(interval=interval, window=(hours[0], hours[-1]), weekdays=_maybe_weekdays(rng))


def _day_list_of_month(rng: Random) -> Schedule:
    if rng.random() < 0.3:
        return Schedule(times=_time(rng), days=_span(rng, range(1, 32), 10))
    days = rng.choice((ROUND_DAYS, range(1, 32)))
    return Schedule(times=_time(rng), days=_some(rng, days, rng.choice((2, 2, 2, 3))))


def _yearly(rng: Random) -> Schedule:
    month = rng.randint(1, 12)
    last_day = 28 if month == 2 else 30 if month in (4, 6, 9, 11) else 31
    return Schedule(times=_time(rng), days=(_day(rng, last_day),), months=(month,))


def _month_range(rng: Random) -> Schedule:
    year = range(1, 13)
    months = rng.choice((_some(rng, year, 1), _some(rng, year, 2), _span(rng, year, 9)))
    return Schedule(times=_time(rng), weekdays=_maybe_weekdays(rng), months=months)


def _month_interval(rng: Random) -> Schedule:
    months = rng.choices(list(MONTH_INTERVALS), (3, 1, 1, 1))[0]
    return Schedule(times=_time(rng), days=(rng.choice((1, _day(rng))),), months=months)


FAMILIES: dict[str, Callable[[Random], Schedule]] = {
    "daily_time": lambda rng: Schedule(times=_time(rng)),
    "weekday_time": lambda rng: Schedule(times=_time(rng), weekdays=_weekdays(rng)),
    "several_times": lambda rng: Schedule(times=_times(rng), weekdays=_maybe_weekdays(rng)),
    "interval_minutes": lambda rng: Schedule(interval=_interval(rng), weekdays=_maybe_weekdays(rng)),
    "interval_hours": _interval_hours,
    "minute_of_hour": lambda rng: Schedule(interval=60, minutes=_past(rng), weekdays=_maybe_weekdays(rng)),
    "hour_range": _hour_range,
    "month_day": lambda rng: Schedule(times=_time(rng), days=(_day(rng),)),
    "day_list_of_month": _day_list_of_month,
    "yearly": _yearly,
    "month_range": _month_range,
    "month_interval": _month_interval,
}


def main() -> None:
    """`python -m heliostat.quickstart.schedules FOLDER [--seed N]`: write the data, print the rows of each split."""
    parser = argparse.ArgumentParser(description="Write the quickstart's data: plain-English schedules and cron lines.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        print(json.dumps(write(arguments.folder, arguments.seed)))
    except ResourceError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
