"""The `data` section: which files, what a row means, how rows become training sequences."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from heliostat.config import StrictModel
from heliostat.tasks import Task

Format = Literal["text", "prompt_completion", "alpaca", "chat", "cloze", "classification", "seq2seq"]
Severity = Literal["info", "warning", "error"]
Check = Literal[
    "nothing_learned",
    "eos_not_learned",
    "truncated",
    "dropped",
    "empty",
    "duplicates",
    "validation_leakage",
    "test_leakage",
    "unseen_label",
    "label_imbalance",
]

SEVERITIES: dict[Check, Severity] = {
    "nothing_learned": "error",
    "eos_not_learned": "error",
    "truncated": "warning",
    "dropped": "warning",
    "empty": "warning",
    "duplicates": "warning",
    "validation_leakage": "warning",
    "test_leakage": "error",
    "unseen_label": "warning",
    "label_imbalance": "warning",
}
"""How bad it is that a check finds something, unless `data.audit.severity` says otherwise."""
_TASKS: dict[Format, Task] = {"classification": "classification", "seq2seq": "seq2seq"}


def task_of(data_format: Format) -> Task:
    """What a model learns from rows of this format."""
    return _TASKS.get(data_format, "causal_lm")


class AuditConfig(StrictModel):
    """What an audit of the data finds, before every training and by `heliostat audit`, and when that ends the command.

    Each `max_*` is the fraction up to which a finding is told as `info` only, whatever its severity.
    """

    fail_on: Literal["warning", "error"] = "error"
    """The least severity that ends the command."""
    severity: dict[Check, Severity | Literal["ignore"]] = Field(default_factory=dict)
    """Check -> its severity, or ignore; for those that are to be other than usual."""
    max_truncated: float = Field(0.05, ge=0, le=1)
    """Of the documents of a split: cut at max_length, so that their end is not learned."""
    max_dropped: float = Field(0.05, ge=0, le=1)
    """Of the rows of a split: left out as too long."""
    max_empty: float = Field(0, ge=0, le=1)
    """Of the rows of a split: with an empty prompt or message."""
    max_duplicates: float = Field(0.1, ge=0, le=1)
    """Of the rows of a split: equal to an earlier one, white space aside."""
    max_leakage: float = Field(0.01, ge=0, le=1)
    """Of the validation or test rows: also in a split that the model is trained or chosen on."""
    max_label_share: float = Field(0.95, ge=0, le=1)
    """Of the training rows: with the most frequent label."""
    samples: NonNegativeInt = 2
    """Training documents that are shown."""

    @model_validator(mode="after")
    def _nothing_learned_is_an_error(self) -> Self:
        if "nothing_learned" in self.severity:
            raise ValueError("a split that teaches nothing cannot be trained on; leave nothing_learned out of severity")
        return self

    def severity_of(self, check: Check) -> Severity | Literal["ignore"]:
        """How bad it is that this check finds something."""
        return self.severity.get(check, SEVERITIES[check])


class TrainSource(StrictModel):
    """One data set of a mixture."""

    path: str
    """A file, a glob, a URI of either, or `hf:NAME[:SPLIT]`."""
    weight: PositiveFloat = 1.0
    """How often each of its rows comes in an epoch: 2 is twice, 0.25 is a quarter of them."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Field of the format -> column of these files, where it is not that of data.columns."""


class DataConfig(StrictModel):
    """Where the rows come from and how they are read."""

    train: str | list[str | TrainSource] | None = None
    """Files, globs, URIs of them (s3://...), or `hf:NAME[:SPLIT]` of the training rows: .jsonl .json .csv .tsv .parquet
    .txt, or text files of parallel lines as `train.{en,de}` (columns `en` and `de`); or data sets with weights:
    [{path: a.jsonl, weight: 2}, {path: b.jsonl}]."""
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    validation_size: float = Field(0.05, ge=0)
    """Part of the training rows kept for validation when `validation` is not given: a fraction below 1, or a count."""
    test_size: float = Field(0, ge=0)
    """The same for the test split."""
    format: Format = "text"
    columns: dict[str, str] = Field(default_factory=dict)
    """Field of the format -> column of the file, such as {prompt: question, completion: answer}."""
    column_names: list[str] | None = None
    """Names of the columns of a csv or tsv file without a header line."""
    prompt_template: str | None = None
    """Prompt built from the columns, such as "Message: {text}\\nLabel:" (formats prompt_completion, classification,
    cloze, and seq2seq, whose source it is)."""
    completion_template: str | None = None
    labels: list[str] | None = Field(None, min_length=2)
    """The labels of `format: classification`; default: those that occur in the training rows, sorted."""
    text_separator: str | None = None
    """What ends a document in a .txt file, such as "\\n\\n"; default: the file is one document."""
    streaming: bool = False
    """For a corpus (`format: text`) that does not fit into memory: .jsonl, .parquet and .txt files are read a piece at
    a time and tokenised by several processes. Held-out sizes are then fractions, kept nearly."""
    preprocessing_num_workers: PositiveInt | None = None
    """Processes that tokenise with `streaming`; default: as many as there are CPUs."""
    train_on_inputs: bool = False
    """Also learn the prompt or user tokens of supervised formats."""
    max_length: PositiveInt = 512
    """Tokens of one training sequence (the block that documents are packed into)."""
    packing: bool = True
    """Put several documents into one row. Always off for tasks whose models cannot keep them apart."""
    excess_length_strategy: Literal["raise", "truncate", "drop"] = "raise"
    """What happens to a supervised sample longer than max_length; `text` documents are split instead."""
    max_train_samples: PositiveInt | None = None
    max_validation_samples: PositiveInt | None = None
    max_test_samples: PositiveInt | None = None
    audit: AuditConfig = AuditConfig()

    @property
    def sources(self) -> list[TrainSource]:
        """The data sets of `train`."""
        given = [self.train] if isinstance(self.train, str) else self.train or []
        return [TrainSource(path=source) if isinstance(source, str) else source for source in given]

    @property
    def is_mixture(self) -> bool:
        """Whether `train` gives data sets by weights."""
        return isinstance(self.train, list) and any(isinstance(source, TrainSource) for source in self.train)

    @model_validator(mode="before")
    @classmethod
    def _packing_of_the_task(cls, values: Any) -> Any:
        """Only next-token prediction packs: what is left open is then off."""
        if isinstance(values, dict) and values.get("format") in _TASKS:
            return {"packing": False, **values}
        return values

    @model_validator(mode="after")
    def _templates_fit_format(self) -> Self:
        if self.prompt_template and self.format not in ("prompt_completion", "classification", "cloze", "seq2seq"):
            raise ValueError("prompt_template belongs to prompt_completion, classification, cloze and seq2seq")
        if self.completion_template and self.format not in ("prompt_completion", "seq2seq"):
            raise ValueError("completion_template belongs to `format: prompt_completion` or `seq2seq`")
        if self.format == "cloze" and self.columns:
            raise ValueError(
                "`columns` does not go with `format: cloze`, whose files have one form; set prompt_template"
            )
        return self

    @model_validator(mode="after")
    def _streaming_reads_corpora(self) -> Self:
        if not self.streaming:
            return self
        if self.format != "text":
            raise ValueError(f"`streaming` reads `format: text`, not {self.format}; drop it")
        if self.is_mixture:
            raise ValueError("`streaming` does not go with weights or columns of data sets; name the files alone")
        if self.validation_size >= 1 or self.test_size >= 1:
            raise ValueError(
                "with `streaming`, validation_size and test_size are fractions below 1, because each row is assigned "
                "by itself; max_validation_samples limits how many are used"
            )
        if self.validation_size + self.test_size >= 1:
            raise ValueError("validation_size and test_size leave nothing to train on; make them smaller")
        return self

    @model_validator(mode="after")
    def _settings_of_the_task(self) -> Self:
        if self.task != "causal_lm" and self.packing:
            raise ValueError(f"`packing` does not go with `format: {self.format}`, which has one text a row; drop it")
        if self.task != "causal_lm" and self.train_on_inputs:
            raise ValueError(f"`train_on_inputs` does not go with `format: {self.format}`, whose inputs are only read")
        if self.task != "classification" and self.labels:
            raise ValueError("`labels` belongs to `format: classification`")
        if self.labels and len(set(self.labels)) < len(self.labels):
            raise ValueError("`labels` names a label twice")
        return self

    @property
    def task(self) -> Task:
        """What a model learns from the rows."""
        return task_of(self.format)
