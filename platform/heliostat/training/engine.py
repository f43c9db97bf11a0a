"""A model in a DeepSpeed engine: optimizer, schedule, ZeRO; and its weights out again. Knows no data, no steps."""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# DeepSpeed picks its accelerator at import, and would look for one that this process was not given.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.chunked_cross_entropy import install_chunked_causal_lm_loss
from transformers import get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from heliostat.training import zero
from heliostat.training.config import TrainingConfig

deepspeed.utils.logger.setLevel(logging.ERROR)
# The shared-memory all-reduce for CPUs is compiled at first use (about 50 s, needs a compiler); gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Logits that a CPU handles at a time in the loss: 1 MiB in fp32 stays in its cache. GPUs have a kernel of their own.
_CACHED_LOGITS = 2**18


def compute_dtype(training: TrainingConfig) -> torch.dtype:
    """The dtype of weights in forward and backward; DeepSpeed keeps fp32 master weights beside 16-bit ones."""
    dtype: torch.dtype = getattr(torch, training.precision)
    return dtype


@contextlib.contextmanager
def sharded_loading(training: TrainingConfig) -> Iterator[None]:
    """Under ZeRO-3, models made inside are split over the workers as they load; otherwise nothing changes."""
    if zero.stage(training) < 3:
        yield
        return
    # transformers looks for this object while from_pretrained runs; it must be alive then.
    marker = HfDeepSpeedConfig(zero.deepspeed_config(training, num_parameters=1))
    yield
    del marker


def add_noise(model: Any, alpha: float, length: int) -> None:
    """Disturb the embeddings of `model` while it trains (NEFTune, Jain et al. 2023, arXiv:2310.05914, algorithm 1).

    `length`: tokens of a row. The noise is uniform between +-alpha / sqrt(length x width).
    """

    def disturbed(embedding: Any, _: object, output: torch.Tensor) -> torch.Tensor:
        if not embedding.training:
            return output
        bound = alpha / math.sqrt(length * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-bound, bound)

    model.get_input_embeddings().register_forward_hook(disturbed)


def chunk_loss(model: Any) -> None:
    """Let a causal language model compute its loss without fp32 copies of all logits."""
    vocab_size = model.config.get_text_config().vocab_size
    install_chunked_causal_lm_loss(model, block_rows=max(1, _CACHED_LOGITS // vocab_size))


def build(
    model: Any,
    training: TrainingConfig,
    *,
    total_steps: int,
    loraplus_lr_ratio: float | None = None,
    accumulation_steps: int | None = None,
    universal: bool = False,
) -> Any:
    """The DeepSpeed engine around `model`, in an already initialised process group.

    `accumulation_steps` replaces the configuration's; a `universal` engine loads what `shards.convert` makes.
    """
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(model, training, loraplus_lr_ratio or 1.0)
    num_parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
    config = zero.deepspeed_config(training, num_parameters=num_parameters)
    if zero.stage(training) == 0 and compute_dtype(training) == torch.float32:
        _clip_before_steps(optimizer, trained, training.max_grad_norm)
        config["gradient_clipping"] = 0.0
    config["gradient_accumulation_steps"] = accumulation_steps or training.gradient_accumulation_steps
    if universal:
        config["checkpoint"] = {"load_universal": True}
    built, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=optimizer,
        lr_scheduler=_scheduler(optimizer, training, total_steps),
        config=config,
        dist_init_required=False,
    )
    # Scripts that DeepSpeed puts beside its shards. A disk that is full then would stop worker 0 alone, and the others
    # would wait for it; `export` does what they are for.
    built._copy_recovery_script = lambda _: None
    built.train()
    return built


def _optimizer(model: Any, training: TrainingConfig, b_ratio: float) -> torch.optim.Optimizer:
    """Fused AdamW; biases and norms (vectors) are not decayed, as usual since GPT-2.

    The B matrices of LoRA learn `b_ratio` times as fast. The first group has the plain rate, which is the one logged.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # IA3 keeps its vectors as matrices of one row or column.
    vectors = [p for name, p in trained if _dimensions(p) < 2 or "ia3_l" in name]
    fast = [p for name, p in trained if "lora_B" in name and b_ratio != 1]
    apart = {id(parameter) for parameter in (*vectors, *fast)}
    rate, decay = training.learning_rate, training.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in trained if id(p) not in apart], "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": fast, "weight_decay": decay, "lr": rate * b_ratio},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


def _clip_before_steps(optimizer: torch.optim.Optimizer, parameters: list[Any], max_norm: float) -> None:
    """Clip where DeepSpeed leaves the step to the plain optimizer: there it would clip, but not tell the norm."""

    def clip(plain: Any, *_: object) -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
        # Where the engine looks for `get_global_grad_norm`.
        plain._global_grad_norm = norm

    optimizer.register_step_pre_hook(clip)


def _dimensions(parameter: Any) -> int:
    """Dimensions of the whole parameter; under ZeRO-3 the local tensor is an empty placeholder."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _scheduler(optimizer: torch.optim.Optimizer, training: TrainingConfig, total_steps: int) -> Any:
    warmup = training.warmup_steps if training.warmup_steps is not None else round(training.warmup_ratio * total_steps)
    return get_scheduler(training.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


def last_learning_rate(engine: Any) -> float:
    """The rate that the next step will use."""
    return float(engine.get_lr()[0])


def export(engine: Any, folder: Path, *, rank: int) -> None:
    """Write the weights as safetensors to `folder`, replacing it. All workers must call it.

    Raises:
        OSError, SafetensorError: on worker 0, whose write failed; the folder is as it was.
    """
    if engine.zero_optimization_stage() == 3:
        weights = engine._consolidated_16bit_state_dict()
    else:
        weights = engine.module_state_dict()
    if rank == 0:
        _replace(folder, lambda target: engine.module.save_pretrained(target, state_dict=weights))


def export_adapter(engine: Any, folder: Path, save: Callable[[Any, Path], None], *, rank: int) -> None:
    """Let `save` write the adapter to `folder`, replacing it: it is given the model, with all that learns whole.

    All workers must call it; raises as `export` does.
    """
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(trained, enabled=engine.zero_optimization_stage() == 3):
        if rank == 0:
            _replace(folder, lambda target: save(engine.module, target))


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
