"""What a recurring schedule is, and the one cron line that says it. Knows nothing of English.

A line has five fields: minute, hour, day of month, month, weekday (crontab(5)). Each schedule has one line:

- sunday is 0, saturday is 6; lists are sorted; three or more neighbours are a range: `0,6`, `1-5`, `0,2-6`;
- only intervals of minutes and hours become steps: `*/15`, `8-18/2`. Months and clock times are lists: `1,4,7,10`;
- day of month and weekday are never restricted together, because cron reads that as "either".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

Clock = tuple[int, int]


@dataclass(frozen=True)
class Schedule:
    """When something runs: at `times`, or else every `interval` minutes; on the days that fit every given restriction.

    An empty tuple restricts nothing. All `times` share one minute, or one line could not say them.
    """

    times: tuple[Clock, ...] = ()
    """(hour, minute), ascending."""
    interval: int = 0
    """Minutes between two runs, counted from the first hour of `window`, or from midnight; divides an hour or a day."""
    minutes: tuple[int, ...] = ()
    """Where in the hour an interval of whole hours runs; default: on the hour."""
    window: tuple[int, int] | None = None
    """First and last hour of an interval. The last one counts whole: every 10 minutes from 9 to 17 ends at 17:50."""
    weekdays: tuple[int, ...] = ()
    days: tuple[int, ...] = ()
    months: tuple[int, ...] = ()


def cron_line(schedule: Schedule) -> str:
    """The cron line of a schedule: equal schedules, equal lines."""
    dates = (schedule.days, schedule.months, schedule.weekdays)
    return " ".join([*_time_fields(schedule), *map(_field, dates)])


def _time_fields(schedule: Schedule) -> tuple[str, str]:
    if schedule.times:
        return _field(minute for _, minute in schedule.times), _field(hour for hour, _ in schedule.times)
    hours = "*" if schedule.window is None else "{}-{}".format(*schedule.window)
    if schedule.interval < 60:
        return _stepped("*", schedule.interval), hours
    return _field(schedule.minutes or (0,)), _stepped(hours, schedule.interval // 60)


def _stepped(field: str, step: int) -> str:
    return field if step == 1 else f"{field}/{step}"


def _field(values: Iterable[int]) -> str:
    """`*` for no values, else the sorted list with ranges for three or more neighbours."""
    ordered = sorted(set(values))
    # Neighbours have the same difference between value and position.
    runs = [[value for _, value in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs) or "*"
