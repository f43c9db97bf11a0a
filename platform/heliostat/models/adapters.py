"""Low-rank adapters (LoRA, Hu et al. 2021) through PEFT. Knows nothing of how they are trained."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from heliostat.errors import ConfigError
from heliostat.models import base as base_models
from heliostat.models.config import AdapterConfig
from heliostat.tasks import Task

_TASK_TYPES: dict[Task, str] = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS"}
"""PEFT's names. With SEQ_CLS the head learns whole, and is saved with the adapter."""


def attach(model: Any, config: AdapterConfig, *, base: str, seed: int, task: Task = "causal_lm") -> Any:
    """`model` with freshly initialised adapters (and a classifier's head) as its only trainable weights; equal seeds
    give equal adapters.

    `base` is the reference under which the adapter will look for its base model when it is loaded again.

    Raises:
        ConfigError: lora_target_modules match nothing.
    """
    torch.manual_seed(seed)
    lora = LoraConfig(
        task_type=_TASK_TYPES[task],
        r=config.lora_r,
        lora_alpha=config.lora_alpha or 2 * config.lora_r,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=base,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"adapter.lora_target_modules: {str(error).splitlines()[0]}") from error


def merge(adapter: Path, folder: Path, head: base_models.Head = base_models.NEXT_TOKEN) -> Path:
    """Write the base model with the adapter merged into it (in fp32) to `folder`."""
    model = base_models.load_merged_adapter(adapter, dtype=torch.float32, head=head)
    model.save_pretrained(folder)
    return folder
