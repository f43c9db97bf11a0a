"""The quickstart's data: what the cron lines mean, how phrases read, how the splits are made."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from itertools import chain, combinations, permutations, product
from pathlib import Path
from random import Random

import pytest

from heliostat.errors import ResourceError
from heliostat.quickstart import phrases, schedules
from heliostat.quickstart.cron import Schedule, cron_line
from heliostat.quickstart.schedules import FAMILIES, ROWS_PER_FAMILY, UNSEEN_PHRASE, Row, Split

Fires = tuple[frozenset[date], frozenset[int]]
"""The dates of 2027 and 2028 (a leap year) and the minutes of the day at which something runs."""

YEARS = [date(2027, 1, 1) + timedelta(days) for days in range(731)]
BOUNDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
WORKDAYS = (1, 2, 3, 4, 5)
WEEKEND = (0, 6)

BY_HAND = [
    # daily_time
    (Schedule(times=((9, 30),)), "every day at 9:30", "30 9 * * *"),
    (Schedule(times=((0, 0),)), "daily at midnight", "0 0 * * *"),
    (Schedule(times=((0, 0),)), "every day", "0 0 * * *"),
    (Schedule(times=((0, 15),)), "at 12:15 am each day", "15 0 * * *"),
    (Schedule(times=((12, 5),)), "seven days a week at 12:05pm", "5 12 * * *"),
    (Schedule(times=((17, 45),)), "at quarter to six in the afternoon every day", "45 17 * * *"),
    (Schedule(times=((21, 30),)), "every single day at half past nine in the evening", "30 21 * * *"),
    (Schedule(times=((9, 30),)), "daily at half past nine", "30 9 * * *"),
    (Schedule(times=((12, 45),)), "daily at quarter to one in the afternoon", "45 12 * * *"),
    (Schedule(times=((11, 45),)), "daily at quarter to twelve", "45 11 * * *"),
    # weekday_time
    (Schedule(times=((9, 30),), weekdays=WORKDAYS), "every weekday at 9:30", "30 9 * * 1-5"),
    (Schedule(times=((7, 0),), weekdays=WORKDAYS), "at 7am mon-fri", "0 7 * * 1-5"),
    (Schedule(times=((10, 0),), weekdays=WEEKEND), "on weekends at 10", "0 10 * * 0,6"),
    (Schedule(times=((10, 0),), weekdays=WEEKEND), "at 10am saturdays and sundays", "0 10 * * 0,6"),
    (Schedule(times=((18, 5),), weekdays=(0,)), "on sundays at 6:05 pm", "5 18 * * 0"),
    (Schedule(times=((0, 0),), weekdays=(1,)), "on mondays", "0 0 * * 1"),
    (Schedule(times=((8, 0),), weekdays=(1, 2, 3, 4)), "monday through thursday at 8:00", "0 8 * * 1-4"),
    (Schedule(times=((8, 0),), weekdays=(0, 5, 6)), "from friday to sunday at 8", "0 8 * * 0,5,6"),
    (Schedule(times=((6, 0),), weekdays=(1, 3, 5)), "at 6 am every mon, wed and fri", "0 6 * * 1,3,5"),
    (Schedule(times=((12, 0),), weekdays=(0, 2, 3, 4, 5, 6)), "every day but monday at noon", "0 12 * * 0,2-6"),
    # several_times
    (Schedule(times=((8, 0), (17, 0)), weekdays=(5,)), "at 8:00 and 17:00 on fridays", "0 8,17 * * 5"),
    (Schedule(times=((6, 30), (18, 30))), "every day at 6:30am and 6:30pm", "30 6,18 * * *"),
    (Schedule(times=((0, 0), (12, 0))), "daily at midnight and noon", "0 0,12 * * *"),
    (Schedule(times=((8, 0), (9, 0), (10, 0))), "at 8am, 9am and 10am each day", "0 8-10 * * *"),
    # interval_minutes
    (Schedule(interval=1), "every minute", "* * * * *"),
    (Schedule(interval=15), "each quarter of an hour", "*/15 * * * *"),
    (Schedule(interval=5, weekdays=WORKDAYS), "every five minutes on weekdays", "*/5 * * * 1-5"),
    (Schedule(interval=20), "at 20 minute intervals", "*/20 * * * *"),
    # interval_hours
    (Schedule(interval=60), "hourly", "0 * * * *"),
    (Schedule(interval=120), "every other hour", "0 */2 * * *"),
    (Schedule(interval=180, minutes=(20,)), "every 3 hours at 20 past", "20 */3 * * *"),
    (Schedule(interval=720), "twice a day", "0 */12 * * *"),
    # minute_of_hour
    (Schedule(interval=60, minutes=(20,)), "at 20 past every hour", "20 * * * *"),
    (Schedule(interval=60, minutes=(45,)), "at quarter to each hour", "45 * * * *"),
    (Schedule(interval=60, minutes=(50,), weekdays=(6,)), "at 10 minutes before the hour on sat", "50 * * * 6"),
    (Schedule(interval=60, minutes=(5, 35)), "hourly at :05 and :35", "5,35 * * * *"),
    # hour_range
    (
        Schedule(interval=10, window=(9, 17), weekdays=WORKDAYS),
        "every 10 minutes between 9am and 5pm on weekdays",
        "*/10 9-17 * * 1-5",
    ),
    (Schedule(interval=60, window=(0, 6)), "from 12am to 6am every hour", "0 0-6 * * *"),
    (Schedule(interval=120, window=(8, 18)), "every 2 hours from 8 through 18", "0 8-18/2 * * *"),
    # month_day
    (Schedule(times=((12, 0),), days=(1,)), "on the 1st of every month at noon", "0 12 1 * *"),
    (Schedule(times=((6, 15),), days=(22,)), "monthly on the 22nd at 6:15", "15 6 22 * *"),
    (Schedule(times=((20, 0),), days=(13,)), "every month on day 13 at 8 pm", "0 20 13 * *"),
    (Schedule(times=((0, 0),), days=(1,)), "once a month", "0 0 1 * *"),
    # day_list_of_month
    (Schedule(times=((6, 15),), days=(1, 15)), "on the 1st and 15th at 6:15", "15 6 1,15 * *"),
    (Schedule(times=((9, 0),), days=(2, 3)), "at 9:00 on days 2 and 3 of each month", "0 9 2,3 * *"),
    (
        Schedule(times=((7, 0),), days=(1, 2, 3, 4, 5)),
        "from the 1st to the 5th of each month at 7am",
        "0 7 1-5 * *",
    ),
    # yearly
    (Schedule(times=((20, 0),), days=(3,), months=(3,)), "on march 3rd at 8 pm", "0 20 3 3 *"),
    (Schedule(times=((8, 0),), days=(25,), months=(12,)), "every year on the 25th of december at 8:00", "0 8 25 12 *"),
    (Schedule(times=((0, 0),), days=(1,), months=(1,)), "every jan 1", "0 0 1 1 *"),
    # month_range
    (Schedule(times=((7, 0),), months=(6, 7, 8)), "every day from june to august at 7:00", "0 7 * 6-8 *"),
    (Schedule(times=((9, 0),), weekdays=(1,), months=(6,)), "at 9am every monday in june", "0 9 * 6 1"),
    (Schedule(times=((0, 0),), months=(2, 11)), "in feb and nov daily", "0 0 * 2,11 *"),
    # month_interval
    (Schedule(times=((6, 0),), days=(1,), months=(1, 4, 7, 10)), "every quarter at 6am", "0 6 1 1,4,7,10 *"),
    (Schedule(times=((9, 0),), days=(5,), months=(1, 7)), "twice a year on the 5th at 9:00", "0 9 5 1,7 *"),
    (
        Schedule(times=((12, 0),), days=(10,), months=(1, 3, 5, 7, 9, 11)),
        "at noon every two months on the 10th",
        "0 12 10 1,3,5,7,9,11 *",
    ),
]


@pytest.fixture(scope="module")
def rows() -> dict[Split, list[Row]]:
    return schedules.rows(seed=0)


def fires(line: str) -> Fires:
    """When cron runs a line, read by the rules of crontab(5)."""
    fields = [values(text, *bounds) for text, bounds in zip(line.split(), BOUNDS, strict=True)]
    minutes, hours, days, months, weekdays = fields
    dates = (day for day in YEARS if day.day in days and day.month in months and day.isoweekday() % 7 in weekdays)
    return frozenset(dates), frozenset(60 * hour + minute for hour in hours for minute in minutes)


def values(text: str, lowest: int, highest: int) -> set[int]:
    found: set[int] = set()
    for item in text.split(","):
        first, last, step = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?", item).groups()  # type: ignore[union-attr]
        start = int(first or lowest)
        stop = int(last or first or highest)
        assert lowest <= start <= stop <= highest, text
        found |= set(range(start, stop + 1, int(step or 1)))
    return found


def meaning(schedule: Schedule) -> Fires:
    """When a schedule runs, by walking through the days and the day."""
    dates = (day for day in YEARS if all(allowed(schedule, day)))
    if schedule.times:
        return frozenset(dates), frozenset(60 * hour + minute for hour, minute in schedule.times)
    first, last = schedule.window or (0, 23)
    starts = range(60 * first, 60 * last + 60, schedule.interval)
    return frozenset(dates), frozenset(start + minute for start in starts for minute in schedule.minutes or (0,))


def allowed(schedule: Schedule, day: date) -> Iterator[bool]:
    yield not schedule.weekdays or day.isoweekday() % 7 in schedule.weekdays
    yield not schedule.days or day.day in schedule.days
    yield not schedule.months or day.month in schedule.months


def all_phrases(schedule: Schedule) -> set[str]:
    orders = permutations(phrases.parts(schedule))
    return {" ".join(filter(None, words)) for order in orders for words in product(*order)}


@pytest.mark.parametrize(("schedule", "phrase", "line"), BY_HAND, ids=[phrase for _, phrase, _ in BY_HAND])
def test_generates_what_a_person_wrote(schedule: Schedule, phrase: str, line: str) -> None:
    assert phrase in all_phrases(schedule)
    assert cron_line(schedule) == line


@pytest.mark.parametrize("family", FAMILIES)
def test_a_line_fires_when_its_schedule_runs(family: str) -> None:
    rng = Random(family)
    for schedule in [FAMILIES[family](rng) for _ in range(200)]:
        assert fires(cron_line(schedule)) == meaning(schedule), schedule
        assert not (schedule.days and schedule.weekdays)
        assert all(meaning(schedule))


def test_every_clock_wording_reads_as_its_time_only() -> None:
    read: dict[str, tuple[int, int]] = {}
    for hour, minute in product(range(24), range(60)):
        styles = phrases.clock(hour, minute)
        formats = {"24 h": "%H:%M", "12 h": "%I:%M%p" if minute else "%I%p", "hour": "%H"}
        for style in styles.keys() & formats:
            assert datetime.strptime(styles[style], formats[style]).time() == time(hour, minute)
        for wording in styles.values():
            assert read.setdefault(wording, (hour, minute)) == (hour, minute)


def test_a_part_of_the_day_never_follows_two_times() -> None:
    # "half past one and half past three in the afternoon" would have two meanings.
    found = all_phrases(Schedule(times=((1, 30), (15, 30))))
    assert "every day at 1:30 and 15:30" in found
    assert not [phrase for phrase in found if "past" in phrase or "afternoon" in phrase]


def test_different_schedules_share_no_phrase() -> None:
    meanings: dict[str, str] = {}
    rng = Random(0)
    drawn = [FAMILIES[family](rng) for family in FAMILIES for _ in range(40)]
    weeks = chain.from_iterable(combinations(range(7), count) for count in (1, 2, 3, 6))
    for schedule in [*drawn, *(Schedule(interval=15, weekdays=week) for week in weeks)]:
        for phrase in all_phrases(schedule):
            assert meanings.setdefault(phrase, cron_line(schedule)) == cron_line(schedule), phrase


@pytest.mark.parametrize("seed", range(4))
def test_splits_share_no_phrase_and_no_line(seed: int) -> None:
    splits = schedules.rows(seed)
    prompts = [row.prompt for row in chain.from_iterable(splits.values())]
    assert len(set(prompts)) == len(prompts)
    lines = {split: {row.completion for row in found} for split, found in splits.items()}
    for one, other in combinations(lines.values(), 2):
        assert not one & other


@pytest.mark.parametrize("seed", range(4))
def test_families_are_balanced_in_every_split(seed: int) -> None:
    for split, found in schedules.rows(seed).items():
        assert Counter(row.family for row in found) == dict.fromkeys(FAMILIES, ROWS_PER_FAMILY[split])
        families = [row.family for row in found]
        assert families != sorted(families, key=list(FAMILIES).index)


@pytest.mark.parametrize("seed", range(4))
def test_training_shows_every_tested_word_and_value(seed: int) -> None:
    splits = schedules.rows(seed)

    def words(split: Split) -> set[str]:
        return {word for row in splits[split] for word in re.findall(r"[a-z']+", row.prompt)}

    def field_values(split: Split) -> set[tuple[int, int]]:
        fields = (values_of for row in splits[split] for values_of in enumerate(row.completion.split()))
        return {(field, value) for field, text in fields for value in values(text, *BOUNDS[field])}

    assert words("test") <= words("train")
    assert field_values("test") <= field_values("train")


def test_wordings_of_every_table_are_trained_on(rows: dict[Split, list[Row]]) -> None:
    trained = "\n".join(row.prompt for row in rows["train"])
    tables: list[tuple[str, ...]] = [phrases.EVERY_DAY, phrases.EVERY_MONTH, *phrases.NAMED_DAYS.values()]
    tables += [*phrases.MONTH_INTERVALS.values(), *phrases.NAMED_INTERVALS.values(), schedules.TASKS]
    assert [text for text in chain.from_iterable(tables) if text not in trained] == []
    templates = chain(phrases.DAY_LIST, phrases.DAY_RANGE, phrases.DAY_EXCEPT, phrases.WINDOW, phrases.DATE_OF)
    for template in chain(templates, phrases.MONTH_DAY, phrases.MONTH_DAY_RANGE, phrases.DATE, phrases.INTERVAL):
        assert re.search(re.sub(r"\{.*?\}", ".+", template), trained), template


def test_rows_are_short_and_lines_are_valid(rows: dict[Split, list[Row]]) -> None:
    for row in chain.from_iterable(rows.values()):
        assert 5 <= len(row.prompt) < schedules.MAX_PROMPT_LENGTH
        assert re.fullmatch(r"[a-z0-9:,' -]+", row.prompt)
        assert "  " not in row.prompt
        assert all(fires(row.completion))


def test_unseen_phrase_is_only_tested() -> None:
    prompt, line = UNSEEN_PHRASE
    assert (Schedule(times=((9, 30),), weekdays=WORKDAYS), prompt, line) in BY_HAND
    for seed in range(4):
        splits = schedules.rows(seed)
        assert Row(prompt, line, "weekday_time") in splits["test"]
        assert line not in {row.completion for row in splits["train"] + splits["validation"]}


def test_write_gives_the_rows_as_json_lines(tmp_path: Path, rows: dict[Split, list[Row]]) -> None:
    counts = schedules.write(tmp_path / "data", seed=0)
    assert counts == {"train": 24000, "validation": 300, "test": 600}
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    for split, found in rows.items():
        lines = (tmp_path / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [row._asdict() for row in found]


def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = "import sys, pathlib; from heliostat.quickstart import schedules; schedules.write(pathlib.Path(sys.argv[1]))"
    path = os.pathsep.join(sys.path)
    for number in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": number, "PYTHONPATH": path}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / number)], check=True, env=environment)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_another_seed_gives_other_rows(tmp_path: Path) -> None:
    schedules.write(tmp_path / "0", seed=0)
    schedules.write(tmp_path / "1", seed=1)
    assert not set(digests(tmp_path / "0").values()) & set(digests(tmp_path / "1").values())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="file: cannot be written"):
        schedules.write(tmp_path / "file")


def test_the_module_is_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["schedules", str(tmp_path / "data"), "--seed", "3"])
    schedules.main()
    assert json.loads(capsys.readouterr().out) == schedules.write(tmp_path / "again", seed=3)
    assert digests(tmp_path / "data") == digests(tmp_path / "again")


def test_the_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["schedules", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as exit_status:
        schedules.main()
    assert exit_status.value.code == 2
    assert "file: cannot be written" in capsys.readouterr().err
