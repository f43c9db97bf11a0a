"""The `generation` and `evaluation` sections: decoding settings, and how a model is scored."""

from pydantic import Field, NonNegativeInt, PositiveInt

from heliostat.config import StrictModel


class GenerationSettings(StrictModel):
    """Decoding settings, by transformers' GenerationConfig names. They travel with the model in its bundle.

    None leaves the setting to the model's own generation_config.json.
    """

    max_new_tokens: PositiveInt = 64
    do_sample: bool = False
    temperature: float | None = Field(None, gt=0)
    top_k: NonNegativeInt | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    no_repeat_ngram_size: NonNegativeInt | None = None
    num_beams: PositiveInt | None = None
    length_penalty: float | None = None


class EvaluationConfig(StrictModel):
    """How `heliostat evaluate` scores a model on the test split."""

    batch_size: PositiveInt = 16
    baseline: str | None = None
    """A model scored beside the evaluated one: `base` (what training started from) or any model reference."""
    group_by: str | None = None
    """Column of the test rows by which exact match is also reported."""
