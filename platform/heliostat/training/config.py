"""The `training` section. Names are Hugging Face's TrainingArguments', and Ray's for Ray things."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from heliostat.config import StrictModel
from heliostat.evaluation.config import MetricName

Reporter = Literal["mlflow", "tensorboard"]


def _num_workers(value: Any) -> int | tuple[int, int]:
    match value:
        case bool():
            pass
        case int() if value >= 0:
            return value
        case [int(least), int(most)] if 1 <= least <= most:
            return least, most
    raise ValueError(f"must be a number of workers, or [min, max] for as many as there is room for (given: {value})")


class TrainingConfig(StrictModel):
    """The optimisation, its checkpoints, and the workers it runs on."""

    num_workers: Annotated[
        int | tuple[int, int],
        PlainValidator(_num_workers, json_schema_input_type=NonNegativeInt | tuple[PositiveInt, PositiveInt]),
    ] = 1
    """Ray Train workers; 0 trains in this process, without Ray; [min, max]: as many as the cluster has room for."""
    elastic_resize_monitor_interval_s: PositiveFloat = 60
    """With num_workers [min, max]: how often to see whether more fit. They go on from the last checkpoint."""
    use_gpu: bool = False
    resources_per_worker: dict[str, float] | None = None
    """Ray resources of one worker; default: 1 CPU, and 1 GPU with use_gpu."""
    max_failures: int = Field(3, ge=-1)
    """Worker losses survived before the run fails; -1: no limit."""
    deepspeed: str = "zero2"
    """zero0, zero1, zero2, zero3, zero3_offload, or the path of a DeepSpeed JSON file."""
    per_device_train_batch_size: PositiveInt = 8
    """Sequences in one forward pass of one worker."""
    per_device_eval_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    """Global batch = workers x per_device_train_batch_size x gradient_accumulation_steps; with num_workers [min, max],
    for max workers. Fewer workers accumulate more steps, and the global batch stays."""
    num_train_epochs: PositiveFloat = 1
    max_steps: PositiveInt | None = None
    """Optimizer steps; overrides num_train_epochs."""
    learning_rate: NonNegativeFloat = 2e-4
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        "cosine"
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    warmup_steps: NonNegativeInt | None = None
    """Overrides warmup_ratio."""
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: PositiveFloat = 1e-8
    max_grad_norm: NonNegativeFloat = 1.0
    """0: no clipping."""
    neftune_noise_alpha: PositiveFloat | None = None
    """Noise on the embeddings while training, alpha / sqrt(max_length x width) at most (NEFTune, Jain et al. 2023,
    arXiv:2310.05914: 5 to 15)."""
    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = None
    """Of `data.format: classification`, how much a text of each label counts: {label: weight}, or `balanced`, by which
    all labels together count the same however rare they are."""
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    logging_steps: PositiveInt = 1
    report_to: list[Reporter] = Field(["mlflow"])
    """Where metrics go beside the run folder's journal; `all` is [mlflow, tensorboard]."""
    eval_steps: PositiveInt | None = None
    """Steps between evaluations; default: once an epoch, and at the end."""
    save_steps: PositiveInt | None = None
    """Steps between checkpoints; default: as eval_steps."""
    save_total_limit: int = Field(2, ge=2)
    """Checkpoints kept on disk: should the newest be damaged, the one before it is used."""
    async_save: bool = False
    """Train on while a checkpoint is written, from a copy of this worker's shards in CPU memory."""
    load_best_model_at_end: bool = True
    """The final model is the best one by metric_for_best_model; False: the last one."""
    metric_for_best_model: Literal["eval_loss"] | MetricName = "eval_loss"
    """eval_loss, or a metric of generated answers to the validation rows, which are scored beside the training."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations without a lower validation loss."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        if value == "all":
            return ["mlflow", "tensorboard"]
        return [value] if isinstance(value, str) else value

    @field_validator("report_to")
    @classmethod
    def _with_mlflow(cls, value: list[Reporter]) -> list[Reporter]:
        if "mlflow" not in value:
            raise ValueError("runs and models are registered in MLflow; write [mlflow, tensorboard], or all")
        return value

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other; keep one")
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def precision(self) -> Literal["float32", "bfloat16", "float16"]:
        """Torch's name of the dtype of weights in forward and backward."""
        if self.bf16:
            return "bfloat16"
        return "float16" if self.fp16 else "float32"

    @property
    def chosen_by_task(self) -> bool:
        """Whether the final model is chosen by a metric of generated answers."""
        return self.load_best_model_at_end and self.metric_for_best_model != "eval_loss"

    @property
    def global_batch_size(self) -> int:
        """Sequences that one optimizer step learns from, over all workers."""
        return max(1, self.max_workers) * self.per_device_train_batch_size * self.gradient_accumulation_steps

    def ray_resources(self) -> dict[str, Any]:
        """What one worker asks of Ray."""
        return self.resources_per_worker or {"CPU": 1, **({"GPU": 1} if self.use_gpu else {})}
