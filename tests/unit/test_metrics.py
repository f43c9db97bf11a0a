"""Metrics against values worked out by hand, and against the libraries that define them."""

import math
import random
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from heliostat.errors import ConfigError
from heliostat.evaluation import metrics
from heliostat.evaluation.config import LOWER_IS_BETTER, JudgeConfig, MetricName
from heliostat.evaluation.metrics import Example

NAMES: tuple[str, ...] = MetricName.__args__  # type: ignore[attr-defined]
TEXT = "the cat sat on a mat while two dogs ran, quickly; past an old house. Yes No 7 1,200"
WORDS = TEXT.split()


def example(prediction: str, reference: str = "") -> Example:
    return Example("p", prediction, reference, len(prediction))


def value(name: str, predictions: Sequence[str], references: Sequence[str], **options: Any) -> float:
    (metric,) = metrics.build([name], references=references, **options)
    assert metric.name == name
    return metrics.score(metric, metric.statistics(list(map(example, predictions, references))))


def one(name: str, prediction: str, reference: str = "") -> float:
    return value(name, [prediction], [reference])


def corpus(size: int = 40) -> list[Example]:
    """Random texts, some equal, some empty."""
    draw = random.Random(3)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(12))) for _ in range(size)]
    return [example(text if draw.random() < 0.2 else " ".join(draw.choices(WORDS, k=draw.randrange(12))), text)
            for text in texts]  # fmt: skip


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
    assert one("exact_match", prediction, reference) == float(same)


def test_exact_match_is_the_part_that_is_right() -> None:
    assert value("exact_match", ["a", "b", "c", "d"], ["a", "x", "c", "y"]) == 0.5


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The cat, sat!", "cat sat", 1.0),
        ("a dog", "the cat", 0.0),
        ("red cat", "the red dog ran", 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
        ("cat cat cat", "cat", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("", "the", 1.0),
        ("", "cat", 0.0),
        ("theatre", "atre", 0.0),
    ],
)
def test_token_f1_as_squad_defines_it(prediction: str, reference: str, expected: float) -> None:
    assert one("token_f1", prediction, reference) == pytest.approx(expected)


def test_accuracy_counts_labels_only() -> None:
    references = ["spam", "ham", "ham", "spam"]
    assert value("accuracy", [" Spam.", "ham", "spam", "spam, I think"], references) == 0.5
    assert value("accuracy", [" Spam.", "HAM", "ham", "'spam'"], references, labels=["Ham", "spam", "other"]) == 1.0
    # Right by its text, but a label that is not in the set can only come from the references: that is an error.
    with pytest.raises(ConfigError, match=r"evaluation\.labels lacks `ham`, which the references hold"):
        value("accuracy", ["ham"], ["ham"], labels=["spam"])


def test_macro_f1_by_hand() -> None:
    references = ["a", "a", "a", "b", "b", "c"]
    predictions = ["a", "a", "b", "b", "nonsense", "a"]
    a, b, c = 2 * 2 / (2 * 2 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 1), 0.0
    assert value("macro_f1", predictions, references) == pytest.approx((a + b + c) / 3)
    # A label that occurs nowhere has no F1 to average.
    assert value("macro_f1", predictions, references, labels=["a", "b", "c", "d"]) == pytest.approx((a + b + c) / 3)
    assert value("macro_f1", references, references) == 1.0


def test_labels_are_few_and_there() -> None:
    with pytest.raises(ConfigError, match=r"`macro_f1` needs labels, from 1 to 500; there are 501\. Set evaluation"):
        value("macro_f1", [""] * 501, [str(number) for number in range(501)])
    with pytest.raises(ConfigError, match="there are 0"):
        metrics.build(["accuracy"])


@pytest.mark.parametrize(("name", "reference_metric"), [("bleu", BLEU()), ("chrf", CHRF())])
def test_corpus_scores_are_sacrebleus(name: str, reference_metric: Any) -> None:
    whole = corpus()
    for examples in (whole, whole[:1], whole[5:9], [example("", "x y")], [example("x", "x")]):
        predictions, references = [e.prediction for e in examples], [e.reference for e in examples]
        expected = reference_metric.corpus_score(predictions, [references]).score
        assert value(name, predictions, references) == expected
    assert 5 < value(name, [e.prediction for e in whole], [e.reference for e in whole]) < 95


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_mean_of_rouge_scores_f1_with_stemming(name: str) -> None:
    examples = corpus()
    scorer = RougeScorer([name], use_stemmer=True)
    expected = np.mean([scorer.score(e.reference, e.prediction)[name].fmeasure for e in examples])
    assert value(name, [e.prediction for e in examples], [e.reference for e in examples]) == pytest.approx(expected)
    assert 0.05 < expected < 0.95
    assert one("rouge1", "running houses", "run house") == 1.0


def test_distinct_and_repetition_by_hand() -> None:
    assert one("distinct_1", "a b a c") == 3 / 4
    assert one("distinct_2", "a b a b") == 2 / 3
    assert one("distinct_2", "a") == one("distinct_1", "") == 0.0
    assert one("repetition", "a b c d a b c d") == pytest.approx(1 / 5)
    assert one("repetition", "x " * 104) == pytest.approx(100 / 101)
    assert one("repetition", "a b c") == 0.0
    assert value("distinct_1", ["a a", "a b"], ["", ""]) == 0.75, "within each prediction"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 apples and 4 pears make 7. #### 7", "7"),
        ("so #### $1,234.50. Next question: 9 #### 8", "1234.50"),
        ("It costs $18.", "18"),
        ("1 + 2 = 3.0", "3.0"),
        ("from 10-5 to -5", "-5"),
        ("that leaves 10-5", "5"),
        ("half: .5", ".5"),
        ("#### seven, or 6", "6"),
        ("ten", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert metrics.final_number(text) == (None if number is None else Decimal(number))


def test_numbers_match_by_value() -> None:
    assert one("numeric_match", "The answer is 72.00.", "48/2=24\n#### 72") == 1.0
    assert one("numeric_match", "72", "#### 73") == 0.0
    assert one("numeric_match", "none", "none") == 0.0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "judge"])
def test_sums_of_statistics_give_the_score_of_any_multiset(name: str) -> None:
    """What the bootstrap relies on: an example counted twice is the example twice."""
    examples = corpus()
    (metric,) = metrics.build([name], references=[e.reference for e in examples])
    statistics = metric.statistics(examples)
    weights = np.random.default_rng(0).integers(0, 3, size=(5, len(examples)))
    combined = metric.combine(weights @ statistics)
    assert combined.shape == (5,)
    for row, result in zip(weights, combined, strict=True):
        repeated = [e for e, count in zip(examples, row, strict=True) for _ in range(count)]
        assert result == pytest.approx(metrics.score(metric, metric.statistics(repeated)))
    assert metric.combine(np.zeros(statistics.shape[1])) == 0, "of nothing"
    alone = metrics.scores_of_examples(metric, statistics)
    assert alone[3] == pytest.approx(metrics.score(metric, statistics[3:4]))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "judge"])
def test_better_answers_score_better(name: str) -> None:
    """The declared direction is right: the reference against nonsense (or, for diversity, against stuttering)."""
    references = ["the cat sat on one mat #### 4", "a dog ran past two houses #### 5"]
    (metric,) = metrics.build([name], references=references)

    def scored(change: Callable[[str], str]) -> float:
        return metrics.score(metric, metric.statistics([example(change(text), text) for text in references]))

    good, bad = scored(lambda text: text), scored(lambda text: "no no no no no no no")
    assert good > bad if metric.greater_is_better else good < bad


def test_examples_without_a_score_are_left_out() -> None:
    (metric,) = metrics.build(["exact_match"])
    statistics = np.array([[1.0, 1.0], [np.nan, np.nan], [0.0, 1.0]])
    assert metrics.score(metric, statistics) == 0.5
    assert metrics.scored(statistics).tolist() == [True, False, True]
    assert np.isnan(metrics.scores_of_examples(metric, statistics)).tolist() == [False, True, False]
    assert math.isnan(metrics.score(metric, statistics[1:2]))
    assert math.isnan(metrics.score(metric, metric.statistics([])))


def test_every_name_of_the_configuration_is_built_in_order() -> None:
    judge = JudgeConfig(base_url="http://127.0.0.1:1/v1", model="m")
    built = metrics.build(NAMES, references=["a", "b"], judge=judge)
    assert [metric.name for metric in built] == list(NAMES)
    assert {metric.name for metric in built if not metric.greater_is_better} == LOWER_IS_BETTER == {"repetition"}


def test_a_judge_without_settings_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the metric `judge` needs evaluation\.judge: set its base_url and model"):
        metrics.build(["exact_match", "judge"])


def test_perplexity_of_a_uniform_choice_is_the_number_of_choices() -> None:
    assert metrics.perplexity(math.log(50257)) == pytest.approx(50257)
    assert metrics.perplexity(0.0) == 1.0
    assert metrics.perplexity(1e6) == math.inf
