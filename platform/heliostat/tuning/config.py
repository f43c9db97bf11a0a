"""The `tune_training` and `tune_decoding` sections: what is searched, by what, and how much it may cost."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from heliostat.config import StrictModel

Searcher = Literal["optuna", "random", "grid"]


class SearchConfig(StrictModel):
    """What both searches have in common. Names are Ray Tune's for Ray Tune's things."""

    space: dict[str, Any] = Field(default_factory=dict)
    """Key -> {uniform: [low, high]}, {loguniform: [low, high]}, {randint: [low, high)}, {choice: [...]}, {grid: [...]}
    or a list, which is a choice. `when: {other_key: value}` beside it makes a parameter conditional."""
    searcher: Searcher = "optuna"
    """optuna: tree-structured Parzen estimator; random; grid: every combination of the choices."""
    num_samples: PositiveInt = 16
    """Trials; `grid` runs all of its combinations instead."""
    max_concurrent_trials: PositiveInt | None = None
    """Default: as many as fit into the free resources."""
    time_budget_s: PositiveFloat | None = None
    reduction_factor: float = Field(3, gt=1)
    """ASHA lets one of so many trials go on past each rung."""


class TuneTrainingConfig(SearchConfig):
    """`heliostat tune-training`: trials are trainings with other values of any dotted key."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Settings of the trials alone, such as {training.num_train_epochs: 1}, to make them cheaper than the training."""
    metric: str = "eval_loss"
    """eval_loss, eval_perplexity, loss, or a metric of generated answers such as exact_match."""
    mode: Literal["min", "max"] | None = None
    """Default: the metric's own direction."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    grace_period: float = Field(0.2, gt=0, le=1)
    """Part of a trial's steps before it may be stopped."""
    gpu_hours: PositiveFloat | None = None
    """Budget of all trials together."""
    then: Literal["nothing", "train"] = "nothing"
    """train: train with the best values, without `overrides`, and register the model."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_pbt(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("scheduler") in ("pbt", "pb2"):
            raise ValueError(
                "scheduler: population based training copies checkpoints between trials, which trials that are Ray "
                "Train (V2) runs do not hand to Ray Tune; use asha, median or none"
            )
        return values


class TuneDecodingConfig(SearchConfig):
    """`heliostat tune-decoding`: trials generate with other decoding settings or prompts; nothing is trained.

    Keys of the space are those of `generation`, `system_prompt` (choices of texts) and `few_shot` (choices: a count of
    training rows, or a list of [prompt, answer] pairs, put before every prompt).
    """

    metric: str | dict[str, float] | None = None
    """A metric of the evaluation (default: the first of evaluation.metrics), made large or small as it is better; or
    a weighted sum {metric: weight}, made large: give a metric that should be small a negative weight."""
    constraints: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Upper limits of the winner's mean `tokens` or `seconds` (of compute) per prompt."""
    prompts: PositiveInt = 128
    """Rows of the validation split that settings are compared on."""
    holdout_prompts: PositiveInt = 256
    """Other rows of the validation split, on which the winner is compared with greedy decoding."""
    min_prompts: PositiveInt = 16
    """Prompts that every setting is tried on before it may be stopped."""
    num_seeds: PositiveInt = 3
    """Seeds of the comparison on the held-out prompts, where the winner samples."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Of the bootstrap intervals; the winner replaces greedy decoding only if its gain's interval is above zero."""
    resources_per_trial: dict[str, float] = Field(default_factory=lambda: {"CPU": 1.0})

    @model_validator(mode="after")
    def _known_constraints(self) -> Self:
        unknown = self.constraints.keys() - {"tokens", "seconds"}
        if unknown:
            raise ValueError(f"constraints: unknown `{min(unknown)}`; there are tokens and seconds")
        return self
