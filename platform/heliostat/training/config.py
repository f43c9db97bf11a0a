"""The `training` section. Names are Hugging Face's TrainingArguments', and Ray's for Ray things."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from heliostat.config import StrictModel
from heliostat.evaluation.config import MetricName


class TrainingConfig(StrictModel):
    """The optimisation, its checkpoints, and the workers it runs on."""

    num_workers: NonNegativeInt = 1
    """Ray Train workers; 0 trains in this process, without Ray."""
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
    """Global batch = workers x per_device_train_batch_size x gradient_accumulation_steps."""
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
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    logging_steps: PositiveInt = 1
    eval_steps: PositiveInt | None = None
    """Steps between evaluations; default: once an epoch, and at the end."""
    save_steps: PositiveInt | None = None
    """Steps between checkpoints; default: as eval_steps."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept on disk."""
    load_best_model_at_end: bool = True
    """The final model is the best one by metric_for_best_model; False: the last one."""
    metric_for_best_model: Literal["eval_loss"] | MetricName = "eval_loss"
    """eval_loss, or a metric of generated answers to the validation rows, which are scored beside the training."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations without a lower validation loss."""

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other; keep one")
        return self

    @property
    def chosen_by_task(self) -> bool:
        """Whether the final model is chosen by a metric of generated answers."""
        return self.load_best_model_at_end and self.metric_for_best_model != "eval_loss"

    @property
    def global_batch_size(self) -> int:
        """Sequences that one optimizer step learns from, over all workers."""
        return max(1, self.num_workers) * self.per_device_train_batch_size * self.gradient_accumulation_steps

    def ray_resources(self) -> dict[str, Any]:
        """What one worker asks of Ray."""
        return self.resources_per_worker or {"CPU": 1, **({"GPU": 1} if self.use_gpu else {})}
