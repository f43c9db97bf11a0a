"""The English wordings of a schedule. Knows nothing of cron lines and of training data.

A phrase is a row of parts in any order: "on fridays" + "at 8am"; `parts` lists the wordings of each. Every phrase has
one meaning, by these conventions:

- no time means midnight: "on mondays" runs at 0:00; no month means every month: "on the 15th"; no day of a month means
  the 1st: "every month", "every quarter";
- digits with neither am, pm nor a part of the day are the 24-hour clock's: "at 9:30", "at 17"; 12am is midnight;
- a spoken clock with none of them is in the morning: "half past nine" is 9:30; the afternoon is 12:00 to 17:59, the
  evening 18:00 to 21:59;
- a weekend is saturday and sunday; a range includes both ends: "monday to thursday", "from june to august";
- intervals count from midnight, from the start of a window, or from january; "twice a day" is every 12 hours;
- "between 9am and 5pm" includes the whole last hour, as `9-17` does.
"""

from collections.abc import Callable, Iterable, Sequence

from heliostat.quickstart.cron import Clock, Schedule

Wordings = tuple[str, ...]

WEEK = (1, 2, 3, 4, 5, 6, 0)
DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
MONTHS = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
LARGE_NUMBERS = {15: "fifteen", 20: "twenty", 30: "thirty"}
SPOKEN_MINUTES = {15: "quarter past {}", 30: "half past {}", 45: "quarter to {}"}
NAMED_TIMES = {(0, 0): {"named": "midnight"}, (12, 0): {"named": "noon"}}

EVERY_DAY = ("every day", "each day", "daily", "every single day", "seven days a week")
NAMED_DAYS = {
    (1, 2, 3, 4, 5): ("every weekday", "on weekdays", "each weekday", "on working days", "weekdays"),
    (6, 0): ("every weekend", "on weekends", "each weekend", "weekends"),
}
DAY_LIST = ("every {one}", "each {one}", "on {many}", "{many}", "on {short}", "every {short}")
DAY_RANGE = ("{} to {}", "from {} to {}", "{} through {}", "every {} to {}")
DAY_EXCEPT = ("every day except {}", "every day but {}", "daily except on {}s", "every day other than {}")
MONTH_DAY = (
    "on the {} of every month",
    "on the {} of each month",
    "every month on the {}",
    "monthly on the {}",
    "on the {}",
)
MONTH_DAY_NUMBER = ("on {} of every month", "on {} of each month", "every month on {}")
MONTH_DAY_RANGE = (
    "from the {} to the {} of every month",
    "from the {} to the {} of each month",
    "every month from the {} to the {}",
)
EVERY_MONTH = (
    "every month",
    "monthly",
    "once a month",
    "on the first of every month",
    "on the first day of each month",
)
DATE = ("on {month} {day}", "every {month} {day}", "every year on {month} {day}")
DATE_OF = ("on the {day} of {month}", "every year on the {day} of {month}")
MONTH_INTERVALS = {
    (1, 4, 7, 10): ("every quarter", "each quarter", "quarterly", "every three months", "every 3 months"),
    (1, 3, 5, 7, 9, 11): ("every two months", "every 2 months", "every other month", "every second month"),
    (1, 5, 9): ("every four months", "every 4 months", "three times a year"),
    (1, 7): ("every six months", "every 6 months", "every half year", "twice a year"),
}
INTERVAL = ("every {n} {unit}s", "once every {n} {unit}s", "at {n} {unit} intervals")
NAMED_INTERVALS = {
    1: ("every minute", "each minute", "once a minute"),
    15: ("every quarter of an hour", "each quarter of an hour", "four times an hour"),
    20: ("three times an hour",),
    30: ("every half hour", "every half an hour", "twice an hour"),
    60: ("every hour", "each hour", "hourly", "once an hour"),
    120: ("every other hour", "every second hour"),
    720: ("twice a day",),
}
WINDOW = ("between {} and {}", "from {} to {}", "from {} through {}")


def parts(schedule: Schedule) -> list[Wordings]:
    """The wordings of each part of the phrase; an empty wording may be left out. Any order of the parts is English."""
    found = [*_date_parts(schedule)]
    if schedule.times:
        found.append(_times(schedule.times))
    else:
        found.append(_interval(schedule.interval, schedule.minutes))
    if schedule.window is not None:
        found.append(_pair(WINDOW, schedule.window, lambda hour: clock(hour, 0)))
    return found


def clock(hour: int, minute: int) -> dict[str, str]:
    """Style -> a time of day in that style, such as {"24 h": "21:30", "12 h": "9:30pm", ...}."""
    twelve, half = hour % 12 or 12, "am" if hour < 12 else "pm"
    digits = f"{twelve}:{minute:02}" if minute else f"{twelve}"
    styles = {
        "24 h": f"{hour}:{minute:02}",
        "12 h": f"{digits}{half}",
        "12 h spaced": f"{digits} {half}",
        **NAMED_TIMES.get((hour, minute), {}),
        **_spoken_clock(hour, minute),
    }
    # Few people mean the small hours by a bare number.
    if not minute and hour >= 6:
        styles["hour"] = f"{hour}"
    return styles


def _spoken_clock(hour: int, minute: int) -> dict[str, str]:
    if minute not in SPOKEN_MINUTES or not 1 <= hour <= 21:
        return {}
    named_hour = hour + (minute > 30)
    text = SPOKEN_MINUTES[minute].format(NUMBERS[(named_hour - 1) % 12 + 1])
    if hour < 12:
        return {"spoken": text}
    return {"spoken": f"{text} in the {'afternoon' if hour < 18 else 'evening'}"}


def _times(times: Sequence[Clock]) -> Wordings:
    styles = [clock(*time) for time in times]
    shared = [style for style in styles[0] if all(style in other for other in styles)]
    if len(times) > 1:
        # "half past one and half past three in the afternoon" could be either.
        shared = [style for style in shared if style != "spoken"]
    wordings = [f"at {joined(other[style] for other in styles)}" for style in shared]
    return (*_unique(wordings), *([""] if times == ((0, 0),) else []))


def _date_parts(schedule: Schedule) -> list[Wordings]:
    if schedule.days:
        return [_month_days(schedule.days, schedule.months)]
    found = [_weekdays(schedule.weekdays)] if schedule.weekdays or schedule.times else []
    if schedule.months:
        found.append(_months(schedule.months))
    return found


def _weekdays(weekdays: Sequence[int]) -> Wordings:
    ordered = tuple(day for day in WEEK if day in weekdays)
    names = [DAYS[day] for day in ordered]
    found = list(NAMED_DAYS.get(ordered, () if ordered else EVERY_DAY))
    if 1 <= len(names) <= 3:
        forms = {
            "one": joined(names),
            "many": joined(f"{name}s" for name in names),
            "short": joined(map(_short, names)),
        }
        found += [template.format(**forms) for template in DAY_LIST]
    if len(names) == 1:
        found.append(f"every week on {names[0]}")
    if len(names) == 6:
        found += _each(DAY_EXCEPT, [DAYS[day] for day in WEEK if day not in weekdays])
    if len(names) >= 3 and ordered in (WEEK[start : start + len(ordered)] for start in range(5)):
        found += _pair(DAY_RANGE, (ordered[0], ordered[-1]), lambda day: {"full": DAYS[day]})
        found.append(f"{_short(names[0])}-{_short(names[-1])}")
    return tuple(found)


def _months(months: Sequence[int]) -> Wordings:
    names = [MONTHS[month - 1] for month in months]
    if len(months) >= 3:
        ends = (months[0], months[-1])
        return _pair(("from {} to {}", "from {} through {}"), ends, _month_names)
    return _unique(_each(("in {}",), [joined(names), joined(map(_short, names))]))


def _month_names(month: int) -> dict[str, str]:
    name = MONTHS[month - 1]
    return {"full": name, "short": _short(name)}


def _short(name: str) -> str:
    return name[:3]


def _month_days(days: Sequence[int], months: Sequence[int]) -> Wordings:
    if len(months) == 1:
        month_names = _unique(_month_names(months[0]).values())
        by_name = list(zip(month_names, (ordinal(days[0]), str(days[0])), strict=False))
        found = [template.format(month=name, day=day) for template in DATE for name, day in by_name]
        return *found, *(template.format(month=month_names[0], day=ordinal(days[0])) for template in DATE_OF)
    if months:
        every = MONTH_INTERVALS[tuple(months)]
        return every if tuple(days) == (1,) else tuple(f"{text} on the {ordinal(days[0])}" for text in every)
    if len(days) >= 3 and days[-1] - days[0] == len(days) - 1:
        return _pair(MONTH_DAY_RANGE, (days[0], days[-1]), lambda day: {"ordinal": ordinal(day)})
    numbers = f"day{'s' if len(days) > 1 else ''} {joined(map(str, days))}"
    found = [*_each(MONTH_DAY, [joined(map(ordinal, days))]), *_each(MONTH_DAY_NUMBER, [numbers])]
    return *found, *(EVERY_MONTH if tuple(days) == (1,) else ())


def ordinal(day: int) -> str:
    """1st, 2nd, 3rd, 4th, ..., 31st."""
    ending = "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def _interval(interval: int, minutes: Sequence[int]) -> Wordings:
    unit, n = ("minute", interval) if interval < 60 else ("hour", interval // 60)
    every = list(NAMED_INTERVALS.get(interval, ()))
    if n > 1:
        words = {**dict(enumerate(NUMBERS)), **LARGE_NUMBERS}
        every += [template.format(n=text, unit=unit) for template in INTERVAL for text in (str(n), words[n])]
    if not minutes:
        return tuple(every)
    past = [*_past(minutes), *_plural("minute", minutes), joined(f":{minute:02}" for minute in minutes)]
    found = [f"{text} at {at}" for text in every for at in past]
    if interval == 60:
        hours = ("every hour", "each hour", "the hour")
        found += [f"at {at} {hour}" for at in (*_past(minutes), *_before(minutes)) for hour in hours]
        found += [f"at {at} of every hour" for at in _plural("minute", minutes)]
    return tuple(found)


def _past(minutes: Sequence[int]) -> list[str]:
    numbers = joined(map(str, minutes))
    quarters = {15: ["quarter past"], 30: ["half past"]}.get(minutes[0], []) if len(minutes) == 1 else []
    return [f"{numbers} past", f"{numbers} minutes past", *quarters]


def _before(minutes: Sequence[int]) -> list[str]:
    if len(minutes) > 1 or minutes[0] <= 30:
        return []
    left = 60 - minutes[0]
    return [f"{left} to", f"{left} minutes before", *(["quarter to"] if left == 15 else [])]


def _plural(noun: str, numbers: Sequence[int]) -> list[str]:
    return [f"{noun}{'s' if len(numbers) > 1 else ''} {joined(map(str, numbers))}"]


def _pair(templates: Iterable[str], ends: tuple[int, int], styles: Callable[[int], dict[str, str]]) -> Wordings:
    """A range: both ends are worded in one style."""
    first, last = styles(ends[0]), styles(ends[1])
    pairs = dict.fromkeys((first[style], last[style]) for style in first if style in last)
    return tuple(template.format(*pair) for template in templates for pair in pairs)


def _each(templates: Iterable[str], values: Iterable[str]) -> list[str]:
    values = list(values)
    return [template.format(value) for template in templates for value in values]


def _unique(texts: Iterable[str]) -> Wordings:
    return tuple(dict.fromkeys(texts))


def joined(words: Iterable[str]) -> str:
    """a; a and b; a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
