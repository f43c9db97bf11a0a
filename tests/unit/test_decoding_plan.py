"""Which rows a decoding search sees: never the same prompt on both sides, never too few, the same ones for a seed."""

import pytest

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.errors import DataError
from heliostat.tuning import decoding_plan

DATA = DataConfig(format="prompt_completion")


def rows(count: int, copies: int = 1) -> list[Row]:
    return [
        Row({"prompt": f"question {number}", "completion": f" {copy}"}, f"rows.jsonl:{number}")
        for copy in range(copies)
        for number in range(count)
    ]


def questions(found: tuple[Row, ...]) -> list[str]:
    return [row.fields["prompt"] for row in found]


def divide(
    given: list[Row], prompts: int = 10, holdout: int = 20, min_prompts: int = 4, seed: int = 0
) -> tuple[list[str], list[str], tuple[str, ...]]:
    first, second, notes = decoding_plan.divide(
        given, DATA, prompts=prompts, holdout=holdout, min_prompts=min_prompts, seed=seed
    )
    return questions(first), questions(second), notes


def test_the_rows_are_as_many_as_asked_for_and_different() -> None:
    first, second, notes = divide(rows(50))
    assert (len(first), len(second), notes) == (10, 20, ())
    assert len({*first, *second}) == 30
    assert first != sorted(first), "not the first of the file"


def test_the_choice_follows_from_prompts_and_seed_alone() -> None:
    assert divide(rows(50)) == divide(rows(50)[::-1])
    assert divide(rows(50)) != divide(rows(50), seed=1)


def test_equal_prompts_are_never_on_both_sides() -> None:
    first, second, _ = divide(rows(30, copies=3))
    assert len(first) + len(second) == len({*first, *second}) == 30


def test_too_few_rows_are_divided_in_proportion_and_told_of() -> None:
    first, second, (note,) = divide(rows(15))
    assert (len(first), len(second)) == (5, 10)
    assert (
        "15 different prompts, fewer than tune_decoding.prompts + holdout_prompts = 30: 5 are searched on, 10 held"
        in note
    )


def test_both_sides_have_the_fewest_prompts_that_settings_are_tried_on() -> None:
    first, second, _ = divide(rows(9), prompts=10, holdout=1000)
    assert (len(first), len(second)) == (4, 5)
    first, second, _ = divide(rows(9), prompts=1000, holdout=10)
    assert (len(first), len(second)) == (5, 4)


def test_fewer_than_that_are_refused() -> None:
    with pytest.raises(DataError, match=r"tune_decoding\.min_prompts: 4 prompts .* more than the 7 different prompts"):
        divide(rows(7, copies=2))


@pytest.mark.parametrize(
    ("prompts", "least", "factor", "expected"),
    [(128, 16, 3, (16, 48, 128)), (144, 16, 3, (16, 48, 144)), (8, 16, 3, (8,)), (16, 16, 3, (16,)),
     (20, 4, 1.5, (4, 6, 9, 14, 20)), (17, 16, 4, (16, 17))],
)  # fmt: skip
def test_rungs_grow_by_the_factor_up_to_all_prompts(
    prompts: int, least: int, factor: float, expected: tuple[int, ...]
) -> None:
    assert decoding_plan.rungs(prompts, least, factor) == expected
