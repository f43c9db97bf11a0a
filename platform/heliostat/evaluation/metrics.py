"""Scores of generated texts against references. Knows nothing of models, files or Ray.

A metric turns each example into a row of sufficient statistics; the score of a set of examples is a function of the sum
of their rows. Scores are thereby exact for any weights on the examples, which is what `bootstrap` builds on. A row of
NaN is an example that could not be scored: it is left out.
"""

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import ConfigError
from heliostat.evaluation.config import JudgeConfig

Floats = NDArray[np.float64]

MAX_LABELS = 500
"""More different references than that are texts, not labels."""


@dataclass(frozen=True)
class Example:
    """One prompt and what became of it."""

    prompt: str
    """The row's own prompt as the model is asked it, without the prefix of the bundle."""
    prediction: str
    reference: str
    tokens: int
    """Number of tokens generated."""
    probabilities: Mapping[str, float] | None = None
    """A classifier's, of each label."""
    others: tuple[str, ...] = ()
    """More right answers, which exact_match, cloze_em and token_f1 take as well."""

    @property
    def references(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.reference, *self.others)


class Metric(Protocol):
    """A score in terms of sufficient statistics."""

    @property
    def name(self) -> str:
        """As in `evaluation.metrics`."""
        ...

    @property
    def greater_is_better(self) -> bool:
        """False for what should be small."""
        ...

    def statistics(self, examples: Sequence[Example]) -> Floats:
        """[examples, k]; a row of NaN is an example that could not be scored."""
        ...

    def combine(self, sums: Floats) -> Floats:
        """Sums of rows [..., k] -> scores [...]."""
        ...


def build(
    names: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    judge: JudgeConfig | None = None,
    references: Sequence[str] = (),
) -> list[Metric]:
    """The metrics of these names (`MetricName`), in their order.

    `labels` is the label set of accuracy and macro_f1; default: what occurs among `references`.

    Raises:
        ConfigError: the judge or the labels are missing, or do not fit the references.
    """
    return [_build(name, labels, judge, references) for name in names]


def score(metric: Metric, statistics: Floats) -> float:
    """The score of all scored examples; NaN if there is none."""
    rows = scored(statistics)
    return float(metric.combine(statistics[rows].sum(axis=0))) if rows.any() else math.nan


def scored(statistics: Floats) -> NDArray[np.bool_]:
    """Which examples could be scored, [examples]."""
    return np.asarray(~np.isnan(statistics).any(axis=1))


def scores_of_examples(metric: Metric, statistics: Floats) -> Floats:
    """The score of each example by itself, [examples]; NaN where it could not be scored."""
    result = np.full(len(statistics), np.nan)
    rows = scored(statistics)
    result[rows] = metric.combine(statistics[rows])
    return result


def perplexity(loss: float) -> float:
    """exp of a mean next-token loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Mean:
    """The average of a score of single examples; its statistics are [score, 1]."""

    name: str
    value: Callable[[Example], float]
    greater_is_better: bool = True

    def statistics(self, examples: Sequence[Example]) -> Floats:
        """[examples, 2]."""
        return np.array([(self.value(example), 1.0) for example in examples], dtype=np.float64).reshape(-1, 2)

    def combine(self, sums: Floats) -> Floats:
        """Sum of the scores over their number."""
        return _ratio(sums[..., 0], sums[..., 1])


@dataclass(frozen=True)
class MacroF1:
    """The mean over labels of F1 = 2 tp / (2 tp + fp + fn), of those labels that occur in a reference or a prediction.

    A prediction outside the label set is a false negative of the reference's label, and of no label a false positive.
    Equals scikit-learn's `f1_score(average="macro")`, but that the latter would make such predictions a label.
    """

    labels: tuple[str, ...]
    """Normalised."""
    name: str = "macro_f1"
    greater_is_better: bool = True

    def statistics(self, examples: Sequence[Example]) -> Floats:
        """[examples, 3 labels]: tp of each label, then fp, then fn."""
        places = {label: place for place, label in enumerate(self.labels)}
        counts = np.zeros((len(examples), 3, len(self.labels)))
        for row, example in enumerate(examples):
            expected = places[normalise_label(example.reference)]
            found = places.get(normalise_label(example.prediction))
            counts[row, 0 if found == expected else 2, expected] = 1
            if found is not None and found != expected:
                counts[row, 1, found] = 1
        return counts.reshape(len(examples), -1)

    def combine(self, sums: Floats) -> Floats:
        """The mean over the labels that occur."""
        tp, fp, fn = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, len(self.labels)), -2, 0)
        occurs = (tp + fp + fn) > 0
        return _ratio(_ratio(2 * tp, 2 * tp + fp + fn).sum(axis=-1), occurs.sum(axis=-1))


@dataclass(frozen=True)
class SacreBleu:
    """BLEU or chrF of a whole corpus, by sacrebleu's own statistics and aggregation (Post 2018, "A Call for Clarity in
    Reporting BLEU Scores", https://aclanthology.org/W18-6319), with its default settings. From 0 to 100.
    """

    name: str
    implementation: Any
    greater_is_better: bool = True

    def statistics(self, examples: Sequence[Example]) -> Floats:
        """[examples, k], as sacrebleu orders them."""
        if not examples:
            return np.zeros((0, 1))
        predictions, references = [e.prediction for e in examples], [e.reference for e in examples]
        # The pieces of `corpus_score`, which sacrebleu's own significance tests are made of too.
        return np.array(self.implementation._extract_corpus_statistics(predictions, [references]), dtype=np.float64)

    def combine(self, sums: Floats) -> Floats:
        """sacrebleu's score of each sum."""
        flat = sums.reshape(-1, sums.shape[-1]).tolist()
        scores = [self.implementation._compute_score_from_stats(row).score for row in flat]
        return np.array(scores, dtype=np.float64).reshape(sums.shape[:-1])


def normalise(text: str) -> str:
    """What exact match ignores: surrounding white space and runs of white space. Case and punctuation count."""
    return " ".join(text.split())


def normalise_label(text: str) -> str:
    """What accuracy and macro F1 ignore: also case, and quotes and full stops around the label."""
    return normalise(text).casefold().strip(" .,;:!\"'`")


def normalise_answer(text: str) -> str:
    """What token F1 ignores: case, ASCII punctuation, the articles a, an, the (Rajpurkar et al. 2016, "SQuAD",
    https://arxiv.org/abs/1606.05250, as in its evaluation script).
    """
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return normalise(re.sub(r"\b(a|an|the)\b", " ", plain))


def exact_match(example: Example) -> float:
    """1 if the prediction is a reference after `normalise`."""
    return float(normalise(example.prediction) in map(normalise, example.references))


def cloze_em(example: Example) -> float:
    """1 if the prediction is a reference after `normalise_answer`: exact match as SQuAD, ReCoRD and RuCoS count it."""
    return float(normalise_answer(example.prediction) in map(normalise_answer, example.references))


def token_f1(example: Example) -> float:
    """The best F1 that the prediction has with a reference, as SQuAD, ReCoRD and RuCoS count it."""
    return max(_words_f1(example.prediction, reference) for reference in example.references)


def _words_f1(predicted: str, expected: str) -> float:
    """Harmonic mean of precision and recall of the words; without any words, 1 if both have none."""
    prediction, reference = normalise_answer(predicted).split(), normalise_answer(expected).split()
    if not prediction or not reference:
        return float(prediction == reference)
    common = (Counter(prediction) & Counter(reference)).total()
    return 2 * common / (len(prediction) + len(reference))


def distinct(n: int, example: Example) -> float:
    """Different n-grams of the prediction's words over all of them (Li et al. 2016, https://arxiv.org/abs/1510.03055,
    but within one text); 0 if it has none.
    """
    ngrams = _ngrams(example.prediction, n)
    return len(set(ngrams)) / max(1, len(ngrams))


def repetition(example: Example) -> float:
    """rep-4: the share of the prediction's 4-grams of words that were there before (Welleck et al. 2020,
    https://arxiv.org/abs/1908.04319); 0 if it has none.
    """
    ngrams = _ngrams(example.prediction, 4)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def numeric_match(example: Example) -> float:
    """1 if the final numbers of prediction and reference are equal; 0 if one has none."""
    found = final_number(example.prediction)
    return float(found is not None and found == final_number(example.reference))


_NUMBER = r"(?:(?<!\w)[-+])?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def final_number(text: str) -> Decimal | None:
    """The number after the first `####` (Cobbe et al. 2021, "GSM8K", https://arxiv.org/abs/2110.14168), else the last
    number in the text. Commas, a dollar sign and a dot after it are no part of it.
    """
    marked = re.search(rf"####\s*({_NUMBER})", text)
    found = [marked[1]] if marked else re.findall(_NUMBER, text)
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def rouge(name: str, example: Example) -> float:
    """F1 of rouge-score with Porter stemming (Lin 2004, https://aclanthology.org/W04-1013)."""
    return float(_rouge_scorer(name).score(example.reference, example.prediction)[name].fmeasure)


@functools.cache
def _rouge_scorer(name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    return RougeScorer([name], use_stemmer=True)


_SIMPLE: dict[str, Metric] = {
    "exact_match": Mean("exact_match", exact_match),
    "cloze_em": Mean("cloze_em", cloze_em),
    "token_f1": Mean("token_f1", token_f1),
    "rouge1": Mean("rouge1", functools.partial(rouge, "rouge1")),
    "rouge2": Mean("rouge2", functools.partial(rouge, "rouge2")),
    "rougeL": Mean("rougeL", functools.partial(rouge, "rougeL")),
    "distinct_1": Mean("distinct_1", functools.partial(distinct, 1)),
    "distinct_2": Mean("distinct_2", functools.partial(distinct, 2)),
    "repetition": Mean("repetition", repetition, greater_is_better=False),
    "numeric_match": Mean("numeric_match", numeric_match),
}


def _build(name: str, labels: Sequence[str] | None, judge: JudgeConfig | None, references: Sequence[str]) -> Metric:
    if name in ("accuracy", "macro_f1"):
        known = _labels(name, labels, references)
        return MacroF1(known) if name == "macro_f1" else Mean(name, functools.partial(_accuracy, frozenset(known)))
    if name in ("bleu", "chrf"):
        return _sacrebleu(name)
    if name == "judge":
        return _judge(judge)
    return _SIMPLE[name]


def _sacrebleu(name: str) -> Metric:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # `force` silences a warning about tokenised text; it changes no score.
    return SacreBleu(name, BLEU(force=True) if name == "bleu" else CHRF())


def _judge(config: JudgeConfig | None) -> Metric:
    if config is None:
        raise ConfigError("the metric `judge` needs evaluation.judge: set its base_url and model")
    from heliostat.evaluation.judge import Judge

    return Judge(config)


def _labels(name: str, labels: Sequence[str] | None, references: Sequence[str]) -> tuple[str, ...]:
    """The normalised label set, sorted."""
    found = {normalise_label(reference) for reference in references}
    known = found if labels is None else {normalise_label(label) for label in labels}
    if found - known:
        raise ConfigError(f"evaluation.labels lacks {_shown(found - known)}, which the references hold; add it")
    if not known or len(known) > MAX_LABELS:
        raise ConfigError(
            f"the metric `{name}` needs labels, from 1 to {MAX_LABELS}; there are {len(known)}. Set evaluation.labels, "
            "or take another metric in evaluation.metrics"
        )
    return tuple(sorted(known))


def _accuracy(labels: frozenset[str], example: Example) -> float:
    found = normalise_label(example.prediction)
    return float(found in labels and found == normalise_label(example.reference))


def _shown(labels: set[str]) -> str:
    return ", ".join(f"`{label}`" for label in sorted(labels)[:5])


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def _ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole; 0 where there is nothing."""
    return np.asarray(part / np.where(whole > 0, whole, 1), dtype=np.float64)
