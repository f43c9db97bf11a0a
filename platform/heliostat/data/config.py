"""The `data` section: which files, what a row means, how rows become training sequences."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from heliostat.config import StrictModel
from heliostat.tasks import Task

Format = Literal["text", "prompt_completion", "alpaca", "chat", "classification"]


def task_of(data_format: Format) -> Task:
    """What a model learns from rows of this format."""
    return "classification" if data_format == "classification" else "causal_lm"


class DataConfig(StrictModel):
    """Where the rows come from and how they are read."""

    train: str | list[str] | None = None
    """Files, globs, or `hf:NAME[:SPLIT]` of the training rows: .jsonl .json .csv .tsv .parquet .txt"""
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
    """Prompt built from the columns, such as "Message: {text}\\nLabel:" (formats prompt_completion, classification)."""
    completion_template: str | None = None
    labels: list[str] | None = Field(None, min_length=2)
    """The labels of `format: classification`; default: those that occur in the training rows, sorted."""
    text_separator: str | None = None
    """What ends a document in a .txt file, such as "\\n\\n"; default: the file is one document."""
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

    @model_validator(mode="before")
    @classmethod
    def _packing_of_the_task(cls, values: Any) -> Any:
        """Only next-token prediction packs: what is left open is then off."""
        if isinstance(values, dict) and values.get("format") == "classification":
            return {"packing": False, **values}
        return values

    @model_validator(mode="after")
    def _templates_fit_format(self) -> Self:
        if self.prompt_template and self.format not in ("prompt_completion", "classification"):
            raise ValueError("prompt_template belongs to `format: prompt_completion` and `format: classification`")
        if self.completion_template and self.format != "prompt_completion":
            raise ValueError("completion_template belongs to `format: prompt_completion`")
        return self

    @model_validator(mode="after")
    def _settings_of_the_task(self) -> Self:
        if self.task != "causal_lm" and self.packing:
            raise ValueError(f"`packing` does not go with `format: {self.format}`, which has one text a row; drop it")
        if self.task == "classification" and self.train_on_inputs:
            raise ValueError("`train_on_inputs` does not go with `format: classification`, which learns labels alone")
        if self.task != "classification" and self.labels:
            raise ValueError("`labels` belongs to `format: classification`")
        if self.labels and len(set(self.labels)) < len(self.labels):
            raise ValueError("`labels` names a label twice")
        return self

    @property
    def task(self) -> Task:
        """What a model learns from the rows."""
        return task_of(self.format)
