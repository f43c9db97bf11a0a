"""Metrics against values worked out by hand."""

import math

import pytest

from heliostat.evaluation import metrics


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("0 9 * * 1", "0 9 * * 1", True),
        ("  0 9\t* *\n1 ", "0 9 * * 1", True),
        ("", " \n", True),
        ("Yes", "yes", False),
        ("yes.", "yes", False),
        ("0 9 * * 1 x", "0 9 * * 1", False),
        ("09* * 1", "0 9 * * 1", False),
        ("", "a", False),
    ],
)
def test_exact_match_ignores_white_space_alone(prediction: str, reference: str, same: bool) -> None:
    assert metrics.exact_match([prediction], [reference]) == float(same)


def test_exact_match_is_the_part_that_is_right() -> None:
    assert metrics.exact_match(["a", "b", "c", "d"], ["a", "x", "c", "y"]) == 0.5
    assert metrics.exact_match([], []) == 0.0
    with pytest.raises(ValueError, match="shorter"):
        metrics.exact_match(["a", "b"], ["a"])


def test_groups_add_up_to_the_whole() -> None:
    predictions, references = list("aabbc"), list("axbbx")
    groups = metrics.exact_match_by_group(predictions, references, ["one", "one", "two", "two", "three"])
    assert groups == {
        "one": {"exact_match": 0.5, "n": 2},
        "three": {"exact_match": 0.0, "n": 1},
        "two": {"exact_match": 1.0, "n": 2},
    }
    assert list(groups) == sorted(groups)
    weighted = sum(group["exact_match"] * group["n"] for group in groups.values())
    assert weighted / 5 == metrics.exact_match(predictions, references) == 0.6


def test_perplexity_of_a_uniform_choice_is_the_number_of_choices() -> None:
    assert metrics.perplexity(math.log(50257)) == pytest.approx(50257)
    assert metrics.perplexity(0.0) == 1.0
    assert metrics.perplexity(1e6) == math.inf


def test_mean() -> None:
    assert metrics.mean([1.0, 2.0, 6.0]) == 3.0
    assert metrics.mean([]) == 0.0
