"""The `data` section: which files, what a row means, how rows become training sequences."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from heliostat.config import StrictModel

Format = Literal["text", "prompt_completion", "alpaca", "chat"]


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
    """Prompt built from the columns, such as "Message: {text}\\nLabel:" (format prompt_completion)."""
    completion_template: str | None = None
    text_separator: str | None = None
    """What ends a document in a .txt file, such as "\\n\\n"; default: the file is one document."""
    train_on_inputs: bool = False
    """Also learn the prompt or user tokens of supervised formats."""
    max_length: PositiveInt = 512
    """Tokens of one training sequence (the block that documents are packed into)."""
    packing: bool = True
    excess_length_strategy: Literal["raise", "truncate", "drop"] = "raise"
    """What happens to a supervised sample longer than max_length; `text` documents are split instead."""
    max_train_samples: PositiveInt | None = None
    max_validation_samples: PositiveInt | None = None
    max_test_samples: PositiveInt | None = None

    @model_validator(mode="after")
    def _templates_fit_format(self) -> Self:
        if self.format != "prompt_completion" and (self.prompt_template or self.completion_template):
            raise ValueError("prompt_template and completion_template belong to `format: prompt_completion`")
        return self
