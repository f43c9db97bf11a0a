"""A space is what the YAML says, and what is wrong in it is named."""

from typing import Any

import optuna
import pytest

from heliostat.errors import ConfigError
from heliostat.tuning import space
from heliostat.tuning.space import Point, Space

KEYS = ["training.learning_rate", "training.warmup_steps", "adapter.method", "adapter.lora_r", "data.packing"]
RATE = {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}


def parse(values: dict[str, Any]) -> Space:
    return space.parse(values, "tune_training", KEYS)


def draws(found: Space, count: int = 40) -> list[Point]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [found.suggest(study.ask()) for _ in range(count)]


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ({"uniform": [0, 2]}, lambda x: isinstance(x, float) and 0 <= x <= 2),
        ({"loguniform": [1e-5, 1e-3]}, lambda x: 1e-5 <= x <= 1e-3),
        ({"randint": [1, 4]}, lambda x: x in (1, 2, 3)),
        ({"lograndint": [1, 9]}, lambda x: isinstance(x, int) and 1 <= x <= 8),
        ({"choice": [1, "a", None, [1, 2]]}, lambda x: x in (1, "a", None, [1, 2])),
        ({"grid": [True, False]}, lambda x: isinstance(x, bool)),
        ([3, 5], lambda x: x in (3, 5)),
    ],
)
def test_each_form_draws_what_it_says(value: Any, allowed: Any) -> None:
    values = [point["training.learning_rate"] for point in draws(parse({"training.learning_rate": value}))]
    assert all(allowed(found) for found in values)
    assert len({str(found) for found in values}) > 1


def test_the_upper_end_of_whole_numbers_is_not_drawn_but_the_lower_is() -> None:
    values = {point["training.warmup_steps"] for point in draws(parse({"training.warmup_steps": {"randint": [1, 4]}}))}
    assert values == {1, 2, 3}
    assert parse({"training.warmup_steps": {"randint": [1, 4]}}).parameters[0].extremes() == [1, 3]


def test_a_logarithmic_range_is_even_in_the_logarithm() -> None:
    values = [point["training.learning_rate"] for point in draws(parse(RATE), 400)]
    assert 0.4 < sum(value < 1e-4 for value in values) / 400 < 0.6


def test_nested_keys_are_those_with_dots() -> None:
    assert (
        parse({"training": {"learning_rate": [1, 2]}}).parameters
        == parse({"training.learning_rate": [1, 2]}).parameters
    )


CONDITIONAL = {
    "adapter.lora_r": {"choice": [8, 32], "when": {"adapter.method": "lora"}},
    "adapter.method": ["full", "lora"],
}


def test_a_conditional_key_exists_only_where_its_condition_holds() -> None:
    found = draws(parse(CONDITIONAL))
    assert {point["adapter.method"] for point in found} == {"full", "lora"}
    assert all(("adapter.lora_r" in point) == (point["adapter.method"] == "lora") for point in found)


def test_the_grid_is_every_combination_that_exists() -> None:
    assert parse(CONDITIONAL).grid("tune_training") == [
        {"adapter.method": "full"},
        {"adapter.method": "lora", "adapter.lora_r": 8},
        {"adapter.method": "lora", "adapter.lora_r": 32},
    ]


def test_a_range_has_no_grid() -> None:
    with pytest.raises(ConfigError, match=r"tune_training\.space\.training\.learning_rate: .* not loguniform"):
        parse(RATE).grid("tune_training")


def test_size_counts_the_points_where_they_can_be_counted() -> None:
    assert parse({"training.warmup_steps": {"randint": [1, 4]}, "data.packing": [True, False]}).size() == 6
    assert parse(RATE).size() is None


def test_extremes_meet_the_conditions_of_their_keys() -> None:
    found = [(key, value, point) for key, value, point in parse(CONDITIONAL).extremes()]
    assert ("adapter.lora_r", 32, {"adapter.method": "lora", "adapter.lora_r": 32}) in found
    assert ("adapter.method", "full", {"adapter.method": "full"}) in found
    assert len(found) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"tune_training\.space is empty"),
        ({"training.learning_rat": [1]}, r"`training\.learning_rat` .* did you mean `training\.learning_rate`\?"),
        ({"learning_rate": [1]}, r"did you mean `training\.learning_rate`\?"),
        ({"xyz": [1]}, "`heliostat schema` lists all keys"),
        ({"data.packing": {"normal": [0, 1]}}, r"space\.data\.packing: give one of uniform, .*; found normal"),
        ({"data.packing": {"uniform": [0, 1], "choice": [1]}}, "found uniform, choice"),
        ({"data.packing": []}, "needs a list of values"),
        ({"data.packing": 3}, "needs a list of values"),
        ({"data.packing": {"uniform": [1, 1]}}, "needs low < high"),
        ({"data.packing": {"randint": [3, 2]}}, r"low < high \(high is not drawn\)"),
        ({"data.packing": {"uniform": [1]}}, "needs two numbers"),
        ({"data.packing": {"uniform": ["a", 2]}}, "needs two numbers"),
        ({"data.packing": {"loguniform": [0, 1]}}, "needs low > 0"),
        ({"data.packing": {"randint": [0.5, 2]}}, "needs whole numbers"),
        ({"data.packing": {"choice": [1], "when": 3}}, r"packing\.when: write \{other_key: value\}"),
        ({"data.packing": {"choice": [1], "when": {"adapter.method": "lora"}}}, "is not another key of the space"),
        ({"data.packing": {"choice": [1], "when": {"data.packing": 1}}}, "is not another key of the space"),
        ({**CONDITIONAL, "adapter.method": ["full"]}, "`adapter.method` never has the value 'lora'"),
        ({**RATE, "data.packing": {"choice": [1], "when": {"training.learning_rate": 1e-4}}}, "never has the value"),
        (
            {
                "data.packing": {"choice": [1], "when": {"adapter.method": "full"}},
                "adapter.method": {"choice": ["full"], "when": {"data.packing": 1}},
            },
            "go round in a circle",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(values)
