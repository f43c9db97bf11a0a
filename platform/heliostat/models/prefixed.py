"""Models with virtual tokens before every text (prefix and prompt tuning), ready to generate. Knows PEFT, no training.

Both are run as prefixes, that is keys and values in the cache: those of a prompt's virtual tokens are what the model
computes for them, so they are worked out once. PEFT's own way with prompts gives padded rows wrong positions.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM, PeftType, PrefixTuningConfig
from transformers import DynamicCache

from heliostat.models.virtual import VirtualTokens


class VirtualTokensModel(PeftModelForCausalLM, VirtualTokens):  # type: ignore[misc]  # PEFT is not typed
    """PEFT's model, with one generation config for both it and the model inside."""

    @property
    def generation_config(self) -> Any:
        """What `generate()` falls back to."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.base_model.generation_config = value


def load(model: Any, folder: Path) -> VirtualTokensModel:
    """The adapter in `folder` on its base `model`, whose config then tells of so many positions fewer."""
    config = PeftConfig.from_pretrained(folder)
    loaded = VirtualTokensModel(model, config)
    loaded.load_adapter(str(folder), "default", use_safetensors=True)
    if config.peft_type == PeftType.PROMPT_TUNING:
        loaded = _as_prefix(loaded.eval())
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        model.config.max_position_embeddings = positions - config.num_virtual_tokens
    return loaded


@torch.no_grad()
def _as_prefix(prompted: VirtualTokensModel) -> VirtualTokensModel:
    base, width = prompted.get_base_model(), prompted.active_peft_config.num_virtual_tokens
    virtual = prompted.get_prompt(1).to(base.dtype)
    cache = base(inputs_embeds=virtual, past_key_values=DynamicCache(config=base.config), use_cache=True)
    pairs = [tensor[0] for layer in cache.past_key_values.layers for tensor in (layer.keys, layer.values)]
    stacked = torch.stack(pairs)  # [2 x layers, heads, tokens, size of a head]
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        num_virtual_tokens=width,
        num_layers=len(pairs) // 2,
        num_attention_heads=stacked.shape[1],
        token_dim=stacked.shape[1] * stacked.shape[3],
    )
    prefixed = VirtualTokensModel(base, config)
    prefixed.prompt_encoder["default"].load_prompt_embeddings(stacked.permute(2, 0, 1, 3).reshape(width, -1))
    return prefixed
