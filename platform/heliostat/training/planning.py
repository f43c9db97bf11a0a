"""`heliostat plan`: memory, speed and hours of a training before it starts. Knows what to try, and loads no weights."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from heliostat import machine, state
from heliostat.data import prepare, splits
from heliostat.data.packing import PackedDataset
from heliostat.errors import ConfigError
from heliostat.experiment import ExperimentConfig
from heliostat.models import adapters, base, freezing
from heliostat.training import gpus, order, setup, zero
from heliostat.training.footprint import Footprint, Worker, footprint
from heliostat.training.gpus import Gpu
from heliostat.training.tracing import Attention, Batch, Step, trace

_CUDA = 1_300_000_000
"""What CUDA's context and kernels take (https://huggingface.co/docs/transformers/model_memory_anatomy)."""
_USABLE = 0.95
"""Of a GPU's memory; the rest is lost between the blocks of PyTorch's allocator."""
_ADAPTERS = ("lora", "ia3")
_METHODS = ("full", "freeze", *_ADAPTERS)


@dataclass(frozen=True)
class Work:
    """What the data asks for."""

    batch: Batch
    steps: int
    tokens: int
    """Of all steps, padding not counted."""


@dataclass(frozen=True)
class Device:
    """What one worker computes on: memory in bytes it may use, floating-point operations a second at the peak."""

    name: str
    memory: float
    flops: float
    runtime: int

    @property
    def on_gpu(self) -> bool:
        """Whether the memory is not the machine's."""
        return self.name != "cpu"


@dataclass(frozen=True)
class Option:
    """One way to train, and what it takes of each worker."""

    settings: dict[str, Any]
    """Keys of the configuration that make it so."""
    step: Step
    memory: Footprint
    fits: bool
    tokens_per_second: float | None
    """Of all workers; None where the bus to the machine's memory decides, not the device."""
    hours: float | None


def plan(config: ExperimentConfig, device_name: str | None, mfu: float) -> dict[str, Any]:
    """What each way to train the configuration takes on a GPU of the given name, or on `cpu`.

    `mfu`: part of the peak speed that is reached; what is computed twice counts as reached.

    Raises:
        ConfigError: the GPU is unknown or has no bf16; or as `heliostat.training.trainer.train`, before it starts.
    """
    setup.check(config)
    if config.data.task != "causal_lm":
        raise ConfigError(f"data.format={config.data.format}: plans are made for causal language models only, so far")
    if config.adapter.method not in _METHODS:
        raise ConfigError(
            f"adapter.method={config.adapter.method}: plans are made for {', '.join(_METHODS)} only, so far; train a "
            "few steps with training.max_steps and read `memory_gib` in metrics.jsonl"
        )
    device = _device(config, device_name or _default(config))
    with tempfile.TemporaryDirectory() as folder:
        rows = splits.load_splits(config.data, config.seed, ("train", "validation"))
        source = setup.load_source(config, rows["train"], Path(folder) / "init")
        tokens = prepare.prepare(
            rows, source.data(config.data), source.tokenizer, config.seed, state.token_cache()
        ).splits["train"]
        work = _work(config, tokens)
        options = list(_options(config, source.path, work, device, mfu))
    fitting = [option for option in options if option.fits]
    return {
        "model": config.model.model_name_or_path or "from scratch",
        "device": asdict(device),
        "workers": _workers(config),
        "precision": config.training.precision,
        "mfu": mfu,
        "work": asdict(work),
        "options": [asdict(option) | {"total": option.memory.total} for option in options],
        "recommended": fitting[0].settings if fitting else None,
    }


def _workers(config: ExperimentConfig) -> int:
    """The fewest that train: then each has most to hold."""
    return max(1, config.training.min_workers)


def _default(config: ExperimentConfig) -> str:
    if config.training.use_gpu:
        raise ConfigError(f"training.use_gpu is true: say which GPU with --gpu: {', '.join(gpus.GPUS)}")
    return "cpu"


def _device(config: ExperimentConfig, name: str) -> Device:
    workers, precision = _workers(config), config.training.precision
    if name.lower() == "cpu":
        speed = _cpu_speed(getattr(torch, precision))
        return Device("cpu", machine.available_bytes() / workers, speed / workers, psutil.Process().memory_info().rss)
    gpu: Gpu = gpus.find(name)
    if precision == "bfloat16" and not gpu.bf16:
        raise ConfigError(f"training.bf16: {name} does not compute in bf16; use training.bf16=false training.fp16=true")
    return Device(name, gpu.memory * _USABLE, gpu.flops_32 if precision == "float32" else gpu.flops_16, _CUDA)


def _cpu_speed(dtype: torch.dtype) -> float:
    """Operations a second of a matrix product here, the best of a few."""
    matrix = torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(seconds)


def _work(config: ExperimentConfig, tokens: Path) -> Work:
    data, training = config.data, config.training
    rows = PackedDataset.open(tokens, data.max_length, packing=data.packing)
    lengths, labels = rows.num_tokens(slice(None)), rows.num_label_tokens(slice(None))
    steps = order.total_steps(len(rows), training.global_batch_size, training.num_train_epochs, training.max_steps)
    batch = Batch(training.per_device_train_batch_size, int(lengths.max()), max(1, int(labels.max())))
    return Work(batch, steps, round(steps * training.global_batch_size * lengths.mean()))


def _options(config: ExperimentConfig, path: str, work: Work, device: Device, mfu: float) -> Iterator[Option]:
    """The configuration's own way first, then from what costs least to what saves most."""
    traced: dict[tuple[str, bool], Step] = {}
    seen: list[Any] = []
    for settings in ({}, *_ways(config)):
        changed = _changed(config, settings)
        if changed in seen or not _allowed(changed):
            continue
        seen.append(changed)
        key = (changed.adapter.method, changed.training.gradient_checkpointing)
        if key not in traced:
            traced[key] = _traced(changed, path, work.batch, device)
        yield _option(changed, settings, traced[key], work, device, mfu)


def _ways(config: ExperimentConfig) -> Iterator[dict[str, Any]]:
    for method in dict.fromkeys((config.adapter.method, "lora")):
        for checkpointing in (False, True):
            for preset in zero.PRESETS:
                if checkpointing or "offload" not in preset:
                    yield {
                        "adapter.method": method,
                        "training.gradient_checkpointing": checkpointing,
                        "training.deepspeed": preset,
                    }


def _changed(config: ExperimentConfig, settings: dict[str, Any]) -> ExperimentConfig:
    training = {key.removeprefix("training."): value for key, value in settings.items() if key.startswith("training.")}
    method = settings.get("adapter.method", config.adapter.method)
    adapter = {"method": method, **({"freeze": []} if method == "lora" else {})}
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=training),
            "adapter": config.adapter.model_copy(update=adapter),
        }
    )


def _allowed(config: ExperimentConfig) -> bool:
    try:
        setup.check(config)
    except ConfigError:
        return False
    return True


def _traced(config: ExperimentConfig, path: str, batch: Batch, device: Device) -> Step:
    dtype = getattr(torch, config.training.precision)

    def build() -> Any:
        model = base.new_model(path, seed=0, dtype=dtype, attention="sdpa", revision=config.model.revision)
        if config.adapter.method in _ADAPTERS:
            # DeepSpeed casts adapters too, which PEFT leaves in fp32.
            model = adapters.attach(model, config.adapter, base=path, seed=0).to(dtype)
        freezing.freeze(model, config.adapter.freeze)
        return model

    attention = _attention(config.model.attn_implementation or "sdpa", device)
    return trace(build, batch, checkpointing=config.training.gradient_checkpointing, attention=attention)


def _attention(wanted: str, device: Device) -> Attention:
    if wanted == "eager":
        return "eager"
    if wanted.startswith("flash"):
        return "unmasked"
    return "fused" if device.on_gpu else "sdpa"


def _option(
    config: ExperimentConfig, settings: dict[str, Any], step: Step, work: Work, device: Device, mfu: float
) -> Option:
    workers = _workers(config)
    itemsize = getattr(torch, config.training.precision).itemsize
    deepspeed = zero.deepspeed_config(config.training, num_parameters=step.trained)
    memory = footprint(step, deepspeed, Worker(workers, itemsize, device.on_gpu, device.runtime))
    computed = work.batch.rows * work.batch.tokens
    bound = any(name.startswith("offload") for name in deepspeed["zero_optimization"])
    speed = None if bound else workers * mfu * device.flops * computed / step.flops
    return Option(
        settings=_settings(config, settings),
        step=step,
        memory=memory,
        fits=memory.total <= device.memory,
        tokens_per_second=speed,
        hours=work.tokens / speed / 3600 if speed else None,
    )


def _settings(config: ExperimentConfig, settings: dict[str, Any]) -> dict[str, Any]:
    return settings or {
        "adapter.method": config.adapter.method,
        "training.gradient_checkpointing": config.training.gradient_checkpointing,
        "training.deepspeed": config.training.deepspeed,
    }
