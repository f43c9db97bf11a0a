"""Score a model on rows of data: the likelihood of the references, and metrics of what it generates. Knows no files.

The work is cut into pieces (packed rows, batches of prompts) that are the same wherever they are done, so this process
and Ray actors (`actors`) come to equal results.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig

from heliostat.data import formats
from heliostat.data.config import DataConfig
from heliostat.data.packing import PackedDataset, PackedRow, collate, collate_pairs
from heliostat.data.records import Row
from heliostat.data.tokens import DocumentEncoder, TokenDataset, encode
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation import bootstrap, choices, classification, generate, metrics
from heliostat.evaluation.bootstrap import Interval
from heliostat.evaluation.choices import ChoiceWork
from heliostat.evaluation.classification import ClassificationWork, Confusion
from heliostat.evaluation.config import EvaluationConfig, GenerationSettings
from heliostat.evaluation.metrics import Example, Metric
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.evaluation.questions import question_of
from heliostat.models import base
from heliostat.models.base import InferenceModel
from heliostat.models.pairs import target_logits
from heliostat.models.virtual import VirtualTokens
from heliostat.tasks import IGNORED

Advance = Callable[[int], None]
Decoding: TypeAlias = GenerationConfig | GenerationSettings | None


@dataclass(frozen=True)
class Scores:
    """What one model reached on one set of rows."""

    n: int
    metrics: dict[str, float]
    """Loss, perplexity, token accuracy, and the chosen metrics, but those that scored no row at all."""
    intervals: dict[str, Interval]
    """Bootstrap intervals of the chosen metrics."""
    unscored: dict[str, int]
    """Rows that a metric could not score; only of metrics with such rows."""
    groups: dict[str, dict[str, float]]
    """Exact match and n by the value of the `group_by` column."""
    examples: list[Example]
    per_example: dict[str, list[float]]
    """The chosen metrics of each row by itself; NaN where it could not be scored."""
    confusion: Confusion | None = None
    """Of a classifier."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from, in a form that any process can load."""

    path: str
    """A bundle, model folder or reference."""
    untrained_seed: int | None = None
    """Not None: the random weights of this seed instead of the stored ones."""
    chat_template: str | None = None
    """Instead of the model's own."""

    def load(self, device: str = "cpu") -> InferenceModel:
        """The model, ready to generate.

        Raises:
            ModelError: it does not exist, is damaged, or must not be trusted.
        """
        if self.untrained_seed is None:
            loaded = base.load_for_inference(self.path, device=device)
        else:
            loaded = base.load_untrained(base.resolve(self.path), seed=self.untrained_seed)
            loaded.model.to(device)
        if self.chat_template is not None:
            loaded.tokenizer.chat_template = self.chat_template
        return loaded


class Runner(Protocol):
    """Something that has a model and works with it: `Local`, or a pool of Ray actors."""

    @property
    def chat_template(self) -> str | None:
        """The chat template that the model's tokenizer has."""
        ...

    def likelihood(self, rows: Sequence[Row], data: DataConfig) -> dict[str, float]:
        """As the function `likelihood`."""
        ...

    def answer(self, job: "Job", rows: int, advance: Advance) -> list[Example]:
        """The examples of so many rows, in their order; `advance` is told how many are done, as they are."""
        ...


@dataclass(frozen=True)
class Local:
    """A model in this process."""

    loaded: InferenceModel

    @property
    def chat_template(self) -> str | None:
        """The chat template that the model's tokenizer has."""
        template: str | None = self.loaded.tokenizer.chat_template
        return template

    def likelihood(self, rows: Sequence[Row], data: DataConfig) -> dict[str, float]:
        """As the function `likelihood`."""
        return likelihood(self.loaded, rows, data)

    def answer(self, job: "Job", rows: int, advance: Advance) -> list[Example]:
        """The job's pieces, done one after the other."""
        work = job(self.loaded)
        found: dict[int, Example] = {}
        for number in range(len(work)):
            done = work.piece(number)
            found |= done
            advance(len(done))
        return [found[index] for index in range(rows)]


def evaluate(
    runner: Runner,
    rows: Sequence[Row],
    data: DataConfig,
    settings: Decoding,
    config: EvaluationConfig,
    *,
    prefix: PromptPrefix | None = None,
    advance: Advance = lambda done: None,
) -> Scores:
    """Loss, perplexity and token accuracy; for all formats but `text` also the metrics of the answers.

    For `classification`: the loss, accuracy, macro F1 and the other metrics of the labels, and what was taken for what.

    `settings` None decodes by the model's own defaults; `prefix` None is the bundle's own, and loss knows no other.
    `advance` is told how many rows were answered.

    Raises:
        DataError: a row is wrong, or has no `group_by` column.
        ConfigError: a metric lacks its settings.
    """
    if data.format in ("text", "classification") and (config.scoring == "likelihood" or config.few_shot):
        raise ConfigError(
            f"evaluation.scoring and few_shot need completions, which `format: {data.format}` has none of"
        )
    if data.format == "text":
        return Scores(len(rows), runner.likelihood(rows, data), {}, {}, {}, [], {})
    groups = _groups(rows, config.group_by) if config.group_by else {}
    # Before the work: wrong settings should not cost hours.
    references = [formats.reference_of(row, data) for row in rows]
    own = ("accuracy", "macro_f1") if data.task == "classification" else ()
    names = list(dict.fromkeys([*own, *config.metrics]))
    chosen = metrics.build(names, labels=config.labels, judge=config.judge, references=references)
    job = answers(rows, data, settings, config, prefix)
    likelihoods = {} if data.task == "classification" else runner.likelihood(rows, data)
    examples = runner.answer(job, len(rows), advance)
    if data.task == "classification":
        likelihoods = {"loss": mean_loss(examples)}
    scores = summarise(likelihoods, examples, chosen, groups, config.confidence)
    return replace(scores, confusion=classification.confusion(examples)) if data.task == "classification" else scores


def mean_loss(examples: Sequence[Example]) -> float:
    """Mean cross-entropy of a classifier's examples, in nats."""
    found = [(example.probabilities or {})[example.reference] for example in examples]
    return sum(-math.log(max(probability, 5e-324)) for probability in found) / len(found)


def answers(
    rows: Sequence[Row],
    data: DataConfig,
    settings: Decoding,
    config: EvaluationConfig,
    prefix: PromptPrefix | None = None,
) -> "Job":
    """What makes a model answer the rows: generate, or choose by likelihood, as `config.scoring` says.

    Raises:
        ConfigError, DataError: there is nothing to choose from.
    """
    if config.scoring == "generate":
        return functools.partial(
            prediction_work, rows=list(rows), data=data, config=settings, batch_size=config.batch_size, prefix=prefix
        )
    return functools.partial(
        ChoiceWork,
        rows=list(rows),
        data=data,
        choices=choices.candidates(rows, data, config.labels),
        batch_size=config.batch_size,
        length_normalization=config.length_normalization,
        prefix=prefix,
    )


def summarise(
    likelihoods: Mapping[str, float],
    examples: list[Example],
    chosen: Sequence[Metric],
    groups: Mapping[str, list[int]],
    confidence: float,
) -> Scores:
    """The scores of the examples; `groups` holds the indices of each group's examples."""
    statistics = {metric.name: metric.statistics(examples) for metric in chosen}
    unscored = {name: int((~metrics.scored(rows)).sum()) for name, rows in statistics.items()}
    usable = [metric for metric in chosen if unscored[metric.name] < len(examples)]
    matches = [metrics.exact_match(example) for example in examples]
    return Scores(
        n=len(examples),
        metrics={**likelihoods, **{m.name: metrics.score(m, statistics[m.name]) for m in usable}},
        intervals={m.name: bootstrap.interval(m, statistics[m.name], confidence=confidence) for m in usable},
        unscored={name: count for name, count in unscored.items() if count},
        groups={
            name: {"exact_match": sum(matches[index] for index in indices) / len(indices), "n": len(indices)}
            for name, indices in groups.items()
        },
        examples=examples,
        per_example={m.name: metrics.scores_of_examples(m, statistics[m.name]).tolist() for m in chosen},
    )


def likelihood(loaded: InferenceModel, rows: Sequence[Row], data: DataConfig) -> dict[str, float]:
    """Mean next-token loss in nats, its perplexity, and how often the most likely token is the reference's."""
    work = LikelihoodWork(loaded, rows, data)
    return mean_likelihood([work.piece(number) for number in range(len(work))])


RowLikelihood = tuple[float, int, int]
"""Summed loss, correct tokens and learned tokens of one packed row."""


class LikelihoodWork:
    """The likelihood of rows of data, in pieces: packed rows, the same on every machine."""

    def __init__(self, loaded: InferenceModel, rows: Sequence[Row], data: DataConfig) -> None:
        loaded.check_task(data.task)
        encoded = encode(rows, loaded.tokenizer, data)
        tokens = TokenDataset(encoded.input_ids, encoded.loss_mask, encoded.offsets, {})
        # Virtual tokens stand before a row: each document needs one of its own.
        packing = data.task == "causal_lm" and not isinstance(loaded.model, VirtualTokens)
        self._packed = PackedDataset(tokens, data.max_length, packing=packing)
        self._loaded = loaded

    def __len__(self) -> int:
        return len(self._packed)

    def piece(self, number: int) -> RowLikelihood:
        """What the packed row adds to the sums."""
        logits, labels = self._scores(self._packed.row(number))
        learned = labels != IGNORED
        loss = functional.cross_entropy(logits[learned], labels[learned], reduction="sum")
        return loss.item(), int((logits.argmax(-1) == labels)[learned].sum()), int(learned.sum())

    @torch.inference_mode()
    def _scores(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Logits [tokens, vocabulary] of the tokens that `labels` [tokens] names."""
        model, pad = self._loaded.model, self._loaded.tokenizer.pad_token_id
        pairs = self._loaded.task == "seq2seq"
        given = collate_pairs([row], pad) if pairs else collate([row], pad, flatten=False)
        batch = {name: torch.as_tensor(value, device=model.device) for name, value in given.items()}
        if pairs:
            return target_logits(model, batch)[0], batch["labels"][0]
        labels = batch.pop("labels")
        return model(**batch, use_cache=False).logits[0, :-1].float(), labels[0, 1:]


def mean_likelihood(parts: Sequence[RowLikelihood]) -> dict[str, float]:
    """Loss, perplexity and token accuracy over all packed rows."""
    loss, hits, count = (sum(part[place] for part in parts) for place in range(3))
    mean = loss / max(1, count)
    return {"loss": mean, "perplexity": metrics.perplexity(mean), "token_accuracy": hits / max(1, count)}


def predict(
    loaded: InferenceModel,
    rows: Sequence[Row],
    data: DataConfig,
    config: Decoding,
    *,
    batch_size: int,
    seed: int = 0,
    prefix: PromptPrefix | None = None,
    advance: Advance = lambda done: None,
) -> list[Example]:
    """What the model generates for each row, in the order of the rows.

    `config` None decodes by the model's own defaults, GenerationSettings go on top of those, and a GenerationConfig is
    all there is. `prefix` None is the bundle's own. Prompts of similar length share batches.

    Raises:
        DataError: a row is wrong, or its prompt leaves no position for an answer.
    """
    job = functools.partial(
        prediction_work, rows=rows, data=data, config=config, batch_size=batch_size, seed=seed, prefix=prefix
    )
    return Local(loaded).answer(job, len(rows), advance)


def prediction_work(
    loaded: InferenceModel, rows: Sequence[Row], data: DataConfig, config: Decoding, *, batch_size: int, **how: Any
) -> "PredictionWork | ClassificationWork":
    """The work that the data's task needs; `how` are the other keywords of PredictionWork."""
    if data.task == "classification":
        return ClassificationWork(loaded, rows, data, batch_size=batch_size)
    return PredictionWork(loaded, rows, data, config, batch_size=batch_size, **how)


class PredictionWork:
    """The predictions for rows of data, in pieces: batches of prompts, the same on every machine."""

    def __init__(
        self,
        loaded: InferenceModel,
        rows: Sequence[Row],
        data: DataConfig,
        config: Decoding,
        *,
        batch_size: int,
        seed: int = 0,
        prefix: PromptPrefix | None = None,
    ) -> None:
        loaded.check_task(data.task)
        own = PromptPrefix.of(loaded.manifest) if prefix is None else prefix
        template = formats.chat_template(loaded.tokenizer, data)
        self._loaded, self._seed = loaded, seed
        self._questions = [question_of(row, data, template, own) for row in rows]
        self._ids = DocumentEncoder(loaded.tokenizer, data).prompts([question.asked for question in self._questions])
        self._config = (
            config if isinstance(config, GenerationConfig) else generate.generation_config(loaded.model, config)
        )
        self._batches = generate.batches(loaded.model, self._ids, self._config, batch_size)

    def __len__(self) -> int:
        return len(self._batches)

    def piece(self, number: int) -> dict[int, Example]:
        """The examples of one batch, by the index of their row."""
        batch, tokenizer = self._batches[number], self._loaded.tokenizer
        prompts = [self._ids[index] for index in batch.prompts]
        options = {"config": self._config, "pad_token_id": tokenizer.pad_token_id, "tokenizer": tokenizer}
        outputs = generate.generate_batch(self._loaded.model, prompts, batch, seed=self._seed, **options)
        texts = generate.decode(tokenizer, outputs, self._config)
        found = {}
        for index, text, output in zip(batch.prompts, texts, outputs, strict=True):
            question = self._questions[index]
            reference, *others = question.references
            found[index] = Example(question.prompt, text, reference, len(output), others=tuple(others))
        return found


Job: TypeAlias = Callable[[InferenceModel], PredictionWork | ChoiceWork | ClassificationWork]
"""Makes the work of answering with a loaded model."""


def _groups(rows: Sequence[Row], column: str) -> dict[str, list[int]]:
    """Indices of the rows by the value of the column, in the order of the values."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if column not in row.fields:
            raise DataError(
                f"{row.origin}: evaluation.group_by: has no column `{column}`; it has {', '.join(row.fields)}"
            )
        groups.setdefault(str(row.fields[column]), []).append(index)
    return dict(sorted(groups.items()))
