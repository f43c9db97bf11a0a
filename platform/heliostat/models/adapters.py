"""Adapters (LoRA, IA3, prefixes, prompts) through PEFT. Knows nothing of how they are trained."""

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from heliostat.errors import ConfigError, ModelError
from heliostat.models import base as base_models
from heliostat.models import bundle
from heliostat.models.config import AdapterConfig
from heliostat.tasks import Task

_TASK_TYPES: dict[Task, str] = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
"""PEFT's names. With SEQ_CLS the head learns whole, and is saved with the adapter."""

WEIGHTS = "adapter_model.safetensors"
Weights = dict[str, torch.Tensor]
# What an adapter is, by the names here and PEFT's.
_SAME = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "num_virtual_tokens": "num_virtual_tokens",
    "modules_to_save": "modules_to_save",
}


def attach(
    model: Any,
    config: AdapterConfig,
    *,
    base: str,
    seed: int,
    task: Task = "causal_lm",
    new_tokens: Sequence[int] = (),
) -> Any:
    """`model` with a freshly initialised adapter (and a classifier's head) as its only trainable weights.

    Equal seeds give equal adapters.

    `base` is the reference under which the adapter will look for its base model when it is loaded again. `new_tokens`
    are ids whose embeddings learn, in the output layer too. PiSSA changes the model's own weights; see `beginning`.

    Raises:
        ConfigError: the adapter does not fit the model, as when lora_target_modules match nothing.
    """
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = _peft_config(config, base, task)
            if new_tokens:
                adapter.trainable_token_indices = {name: list(new_tokens) for name in _vocabulary_layers(model)}
            return get_peft_model(model, adapter)
    except ValueError as error:
        raise ConfigError(f"adapter.{_decisive(config)}: {str(error).splitlines()[0]}") from error


def go_on(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder` as its only trainable weights.

    Raises:
        ModelError: the two do not fit together.
    """
    with base_models.errors_named(str(folder)):
        config = PeftConfig.from_pretrained(folder)
        if not config.is_prompt_learning:
            return PeftModel.from_pretrained(model, str(folder), is_trainable=True, use_safetensors=True)
        config.inference_mode = False
        prompted = get_peft_model(model, config)
        with torch.no_grad():
            weight = prompted.prompt_encoder["default"].embedding.weight
            weight.copy_(load_file(folder / WEIGHTS)["prompt_embeddings"])
        return prompted


def continued(folder: Path, config: AdapterConfig) -> AdapterConfig:
    """The settings of the adapter in `folder`, for a training that goes on with it as `config` says.

    Raises:
        ConfigError: it is of another method, or `config` itself sets something that it is not.
    """
    adapter, wanted = PeftConfig.from_pretrained(folder), _peft_config(config, "base")
    if adapter.peft_type != wanted.peft_type:
        raise ConfigError(
            f"adapter.method={config.method}: {folder} holds an adapter of the kind {adapter.peft_type}; to go on with "
            "it, set its method"
        )
    if getattr(adapter, "prefix_projection", False):
        raise ConfigError(f"{folder}: the network that made this prefix is not in the bundle, so it cannot learn on")
    if config.init_lora_weights is not True:
        raise ConfigError(f"adapter.init_lora_weights is for new adapters, and {folder} is one to go on with; drop it")
    found = {}
    for name, theirs in _SAME.items():
        value = getattr(adapter, theirs, None)
        if value is None:
            continue
        found[name] = sorted(value) if isinstance(value, set) else value
        # What has its default is not said: a run's config.yaml has all keys.
        said = getattr(config, name) != AdapterConfig.model_fields[name].default
        if said and getattr(wanted, theirs) != value:
            raise ConfigError(f"adapter.{name}={getattr(config, name)}: {folder} has {found[name]}; drop the key")
    return config.model_copy(update=found)


def beginning(model: Any) -> Weights | None:
    """What `save` must know of a freshly attached adapter that took its weights out of the model's own (PiSSA)."""
    began = getattr(_config(model), "init_lora_weights", True)
    if not str(began).startswith("pissa"):
        return None
    return {name: weight.detach().cpu().clone() for name, weight in get_peft_model_state_dict(model).items()}


def save(model: Any, folder: Path, began: Weights | None) -> None:
    """Write the adapter to `folder`, to be used on the base as it was before the adapter was attached.

    A PiSSA adapter becomes a plain one of twice the rank, the difference of what it is and what it `began` as: W +
    BA - B'A' (Meng et al. 2024, arXiv:2404.02948, appendix C). Up to rounding, it gives the same model.
    """
    # `auto` looks the base up, to see whether its vocabulary has grown.
    model.save_pretrained(folder, save_embedding_layers=False)
    if began is None:
        return
    trained = load_file(folder / WEIGHTS)
    save_file(
        {name: _difference(name, now, began) for name, now in trained.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    plain = PeftConfig.from_pretrained(folder)
    plain.init_lora_weights = True
    plain.lora_alpha *= 2**0.5 if plain.use_rslora else 2
    plain.r *= 2
    plain.save_pretrained(folder)


def merge(adapter: Path, folder: Path, head: base_models.Head = base_models.NEXT_TOKEN) -> Path:
    """Write the base model with the adapter merged into it (in fp32) to `folder`.

    Raises:
        ModelError: the base cannot be loaded, or is another one.
    """
    model = base_models.load_adapter(adapter, dtype=torch.float32, head=head)
    model.save_pretrained(folder)
    return folder


def merge_bundle(source: Path, target: Path) -> Path:
    """Write the bundle at `target` that the adapter bundle `source` becomes, merged into its base (in fp32).

    Raises:
        ModelError: `source` is no bundle of an adapter, or one that cannot be merged; or the base is another one.
        ConfigError: `target` is there already.
    """
    manifest = bundle.verify(source)
    if not (source / base_models.ADAPTER_CONFIG).exists():
        raise ModelError(f"{source}: holds no adapter, so there is nothing to merge")
    if base_models.task_of(str(source)) == "classification":
        raise ModelError(f"{source}: is a classifier; train it again with adapter.merge: true")
    if base_models.has_virtual_tokens(source):
        raise ModelError(f"{source}: has virtual tokens, which cannot be merged into weights; it is served as it is")
    if target.exists():
        raise ConfigError(f"{target}: is there already; name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        return bundle.write(
            target,
            weights=merge(source, Path(scratch)),
            tokenizer=base_models.load_tokenizer(str(source)),
            generation_config=GenerationConfig.from_pretrained(source),
            manifest={**manifest, "merged_from": str(source)},
        )


def _vocabulary_layers(model: Any) -> list[str]:
    """Names of the embeddings and, where it has weights of its own, of the output layer."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [first] if last is None or last.weight is first.weight else [first, last]
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def _difference(name: str, now: torch.Tensor, began: Weights) -> torch.Tensor:
    before = began[name].to(now)
    if ".lora_A." in name:
        return torch.cat([now, before], dim=0)
    return torch.cat([now, -before], dim=1) if ".lora_B." in name else now


def _config(model: Any) -> PeftConfig:
    assert isinstance(model, PeftModel)
    return model.active_peft_config


def _peft_config(config: AdapterConfig, base: str, task: Task = "causal_lm") -> PeftConfig:
    common: dict[str, Any] = {"task_type": _TASK_TYPES[task], "base_model_name_or_path": base}
    if config.method == "prefix":
        common |= {"num_virtual_tokens": config.num_virtual_tokens, "prefix_projection": config.prefix_projection}
        return PrefixTuningConfig(**common, encoder_hidden_size=config.encoder_hidden_size)
    if config.method == "prompt":
        text = {"prompt_tuning_init_text": config.prompt_tuning_init_text, "tokenizer_name_or_path": base}
        return PromptTuningConfig(
            **common,
            num_virtual_tokens=config.num_virtual_tokens,
            prompt_tuning_init=config.prompt_tuning_init,
            **(text if config.prompt_tuning_init == "TEXT" else {}),
        )
    common["modules_to_save"] = config.modules_to_save
    if config.method == "ia3":
        chosen = {"target_modules": config.target_modules, "feedforward_modules": config.feedforward_modules}
        return IA3Config(**common, **chosen)
    return LoraConfig(
        **common,
        r=config.lora_r,
        lora_alpha=config.lora_alpha or 2 * config.lora_r,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,
    )


def _decisive(config: AdapterConfig) -> str:
    """The key that decides where the adapter goes."""
    return {"ia3": "target_modules", "prefix": "method", "prompt": "method"}.get(config.method, "lora_target_modules")
