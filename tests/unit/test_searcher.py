"""The searcher hands out each point once, in the order promised, and the same ones for the same seed."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from heliostat.config import fingerprint
from heliostat.errors import ConfigError
from heliostat.tuning import space
from heliostat.tuning.config import SearchConfig
from heliostat.tuning.searcher import PointSearcher
from heliostat.tuning.space import Point

KEYS = ["x", "n", "m"]
RANGE = {"x": {"uniform": [0, 1]}, "n": {"randint": [0, 5]}}
SMALL = {"n": [1, 2, 3], "m": ["a", "b"]}


def searcher(
    values: dict[str, Any], *, seed: int = 0, notes: list[Any] | None = None, fixed: Sequence[Point] = (),
    known: Sequence[Point] = (), **config: Any,
) -> PointSearcher:  # fmt: skip
    found = notes if notes is not None else []
    return PointSearcher(
        space.parse(values, "tune_training", KEYS), SearchConfig(**config), where="tune_training", metric="loss",
        mode="min", seed=seed, note=lambda index, point: found.append((index, point)), fixed=fixed, known=known,
    )  # fmt: skip


def points(of: PointSearcher, value: float | None = 1.0, most: int = 100) -> list[Point]:
    """All that it suggests, each told to have ended with the value."""
    found: list[Point] = []
    for number in range(most):
        suggestion = of.suggest(f"t{number}")
        if isinstance(suggestion, str):
            assert suggestion == PointSearcher.FINISHED
            return found
        assert suggestion["index"] == number
        found.append(suggestion["point"])
        of.on_trial_complete(f"t{number}", {} if value is None else {"loss": value})
    raise AssertionError("it never ends")


@pytest.mark.parametrize("name", ["optuna", "random"])
def test_as_many_points_as_asked_for_and_the_same_for_a_seed(name: str) -> None:
    first = points(searcher(RANGE, searcher=name, num_samples=12))
    assert len(first) == 12
    assert first == points(searcher(RANGE, searcher=name, num_samples=12))
    assert first != points(searcher(RANGE, searcher=name, num_samples=12, seed=1))


@pytest.mark.parametrize("name", ["optuna", "random"])
def test_no_point_comes_twice_and_a_small_space_ends(name: str) -> None:
    of = searcher(SMALL, searcher=name, num_samples=50)
    found = points(of)
    assert len({fingerprint(point) for point in found}) == len(found) == 6
    assert of.limit == 6


def test_the_grid_is_tried_in_its_order_whatever_num_samples_says() -> None:
    of = searcher(SMALL, searcher="grid", num_samples=2)
    assert of.limit == 6
    assert points(of) == [{"n": n, "m": m} for n in (1, 2, 3) for m in "ab"]


def test_a_grid_of_ranges_is_refused() -> None:
    with pytest.raises(ConfigError, match="searcher grid needs lists"):
        searcher(RANGE, searcher="grid")


@pytest.mark.parametrize("name", ["optuna", "random", "grid"])
def test_fixed_points_come_first_then_known_ones(name: str) -> None:
    """Fixed ones may lie outside of the space, and come on top of num_samples."""
    known = [{"n": 3, "m": "b"}, {"n": 2, "m": "a"}]
    of = searcher(SMALL, searcher=name, num_samples=4, fixed=[{"n": 99}], known=known)
    found = points(of)
    assert found[:3] == [{"n": 99}, *known]
    assert len(found) == (7 if name == "grid" else 5)
    assert len({fingerprint(point) for point in found}) == len(found)


def test_known_points_of_a_range_are_tried_again_as_they_were() -> None:
    first = points(searcher(RANGE, num_samples=5))
    assert points(searcher(RANGE, num_samples=8, known=first))[:5] == first


def test_every_point_is_noted_before_its_trial_exists() -> None:
    notes: list[Any] = []
    of = searcher(RANGE, num_samples=3, notes=notes, fixed=[{"x": 2.0}])
    suggestion = of.suggest("t0")
    assert isinstance(suggestion, dict)
    assert notes == [(0, {"x": 2.0})]
    of.suggest("t1")
    assert [index for index, _ in notes] == [0, 1]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_trials_without_a_value_hinder_nothing(value: float | None) -> None:
    assert len(points(searcher(RANGE, num_samples=15), value)) == 15


def test_a_trial_that_died_hinders_nothing() -> None:
    of = searcher(RANGE, num_samples=3)
    for number in range(3):
        assert isinstance(of.suggest(f"t{number}"), dict)
        of.on_trial_complete(f"t{number}", None, error=True)
    assert of.suggest("t3") == PointSearcher.FINISHED


def test_optuna_learns_where_the_good_values_are() -> None:
    of = searcher({"x": {"uniform": [0, 1]}}, num_samples=40)
    found = []
    for number in range(40):
        suggestion = of.suggest(f"t{number}")
        assert isinstance(suggestion, dict)
        found.append(suggestion["point"]["x"])
        of.on_trial_complete(f"t{number}", {"loss": (found[-1] - 0.3) ** 2})
    early, late = ([abs(x - 0.3) for x in part] for part in (found[:10], found[-15:]))
    assert sum(late) / len(late) < sum(early) / len(early) / 2
