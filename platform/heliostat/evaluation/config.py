"""The `generation` and `evaluation` sections: decoding settings, and how a model is scored."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from heliostat.config import StrictModel

MetricName = Literal[
    "exact_match",
    "cloze_em",
    "token_f1",
    "accuracy",
    "macro_f1",
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "distinct_1",
    "distinct_2",
    "repetition",
    "numeric_match",
    "judge",
]

LOWER_IS_BETTER: frozenset[MetricName] = frozenset({"repetition"})


# What counts only where `do_sample` is true.
SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p")


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
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    no_repeat_ngram_size: NonNegativeInt | None = None
    num_beams: PositiveInt | None = None
    length_penalty: float | None = None
    stop_strings: list[str] | None = None


class JudgeConfig(StrictModel):
    """A model behind an OpenAI-compatible endpoint that scores answers from 0 to 100 (metric `judge`)."""

    base_url: str
    model: str
    rubric: str = "How correct and helpful is the answer? 0: wrong or useless, 100: as good as the reference."
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    max_concurrent_requests: PositiveInt = 8
    max_retries: NonNegativeInt = 3
    timeout_s: PositiveFloat = 60


class EvaluationConfig(StrictModel):
    """How `heliostat evaluate` scores a model on the test split."""

    metrics: list[MetricName] = Field(["exact_match"], min_length=1)
    """What generated answers are scored by; loss, perplexity and token accuracy always come along."""
    labels: list[str] | None = None
    """The label set of accuracy and macro F1, and the candidates of `scoring: likelihood`; default: the labels that
    occur among the references."""
    scoring: Literal["generate", "likelihood"] = "generate"
    """Where answers come from: the model writes them; or it is given candidates (the entities of `format: cloze`, else
    the labels), and the likeliest one is its answer."""
    length_normalization: bool = False
    """Of `scoring: likelihood`: compare mean log-probabilities of a candidate's tokens instead of their sum."""
    few_shot: NonNegativeInt = 0
    """Training rows, drawn by the seed, that come before every prompt with their answers."""
    judge: JudgeConfig | None = None
    batch_size: PositiveInt = 16
    baseline: str | None = None
    """A model scored beside the evaluated one: `base` (what training started from) or any model reference."""
    group_by: str | None = None
    """Column of the test rows by which exact match is also reported."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Of the bootstrap intervals."""
    num_workers: NonNegativeInt = 0
    """Ray actors that generate side by side; 0 generates in this process, without Ray."""
    use_gpu: bool = False
    resources_per_worker: dict[str, float] | None = None
    """Ray resources of one actor; default: 1 CPU, and 1 GPU with use_gpu."""
