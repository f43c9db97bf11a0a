"""The DeepSpeed dict as a pure function of the configuration. Imports neither DeepSpeed nor torch.

ZeRO: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054.
"""

import json
from pathlib import Path
from typing import Any

from heliostat.errors import ConfigError
from heliostat.training.config import TrainingConfig

PRESETS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "contiguous_gradients": True, "overlap_comm": True},
    "zero3": {"stage": 3, "contiguous_gradients": True, "overlap_comm": True},
    "zero3_offload": {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}
# DeepSpeed's default bucket of 5e8 elements reserves 2 GB of fp32 even for the smallest model.
_MAX_BUCKET = 200_000_000


def deepspeed_config(training: TrainingConfig, *, num_parameters: int) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`, for a model with `num_parameters` trainable parameters.

    Raises:
        ConfigError: `training.deepspeed` is no preset and no readable JSON file, or the file contradicts the YAML.
    """
    config = _preset(training.deepspeed) if training.deepspeed in PRESETS else _user_file(training)
    zero = config.setdefault("zero_optimization", {})
    bucket = max(1, min(num_parameters, _MAX_BUCKET))
    for key in (
        "reduce_bucket_size",
        "allgather_bucket_size" if zero.get("stage", 0) < 3 else "stage3_prefetch_bucket_size",
    ):
        if zero.get(key, "auto") == "auto":
            zero[key] = bucket
    config.update(_owned(training))
    # Plain torch AdamW everywhere: the same optimizer on CPU and GPU, and nothing to compile.
    config.update({"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False})
    config.setdefault("steps_per_print", 2**31)
    return config


def stage(training: TrainingConfig) -> int:
    """The ZeRO stage that `training.deepspeed` asks for."""
    config = _preset(training.deepspeed) if training.deepspeed in PRESETS else _read_json(training.deepspeed)
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _preset(name: str) -> dict[str, Any]:
    return {"zero_optimization": json.loads(json.dumps(PRESETS[name]))}


def _owned(training: TrainingConfig) -> dict[str, Any]:
    """What the YAML decides; a DeepSpeed file may repeat it or say "auto", but not contradict it."""
    return {
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": training.bf16},
        "fp16": {"enabled": training.fp16},
    }


def _user_file(training: TrainingConfig) -> dict[str, Any]:
    config = _read_json(training.deepspeed)
    for key, ours in {**_owned(training), "train_batch_size": training.global_batch_size}.items():
        theirs = config.pop(key, "auto")
        if isinstance(ours, dict):
            theirs = theirs.get("enabled", "auto") if isinstance(theirs, dict) else theirs
            ours = ours["enabled"]
        if theirs not in ("auto", ours):
            raise ConfigError(
                f"{training.deepspeed}: `{key}` is {theirs}, but the YAML's training section says {ours}; drop it"
            )
    if "checkpoint" in config:
        raise ConfigError(f"{training.deepspeed}: `checkpoint`: Heliostat writes checkpoints itself; drop it")
    _check_optimizer(training, config.pop("optimizer", {}))
    if any(value != "auto" for value in config.pop("scheduler", {}).get("params", {}).values()):
        raise ConfigError(
            f"{training.deepspeed}: `scheduler` is set by training.lr_scheduler_type and warmup_*; drop it"
        )
    return config


def _check_optimizer(training: TrainingConfig, optimizer: dict[str, Any]) -> None:
    if optimizer.get("type", "AdamW") not in ("AdamW", "Adam"):
        raise ConfigError(f"{training.deepspeed}: `optimizer.type` {optimizer['type']} is not supported; AdamW is used")
    ours = {
        "lr": training.learning_rate,
        "betas": [training.adam_beta1, training.adam_beta2],
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    for key, value in ours.items():
        if optimizer.get("params", {}).get(key, "auto") not in ("auto", value):
            raise ConfigError(f"{training.deepspeed}: `optimizer.params.{key}` contradicts the YAML ({value}); drop it")


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"training.deepspeed: `{path}` is neither a preset ({', '.join(PRESETS)}) nor an existing JSON file"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"training.deepspeed: {path}: is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"training.deepspeed: {path}: must be a JSON object")
    for key in ("zero_optimization", "optimizer", "scheduler"):
        _object(_object(content, key, path), "params", path)
    return content


def _object(content: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"training.deepspeed: {path}: `{key}` must be a JSON object")
    return value
