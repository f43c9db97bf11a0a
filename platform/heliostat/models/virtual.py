"""What is special about a model with virtual tokens before every text. Knows nothing of PEFT, which `prefixed` does."""

from typing import Any

from transformers import DynamicCache


class VirtualTokens:
    """What such a model is, beside what PEFT makes of it; its tokens are keys and values in the cache."""

    get_base_model: Any
    get_prompt: Any


def start(model: Any, rows: int) -> tuple[Any, DynamicCache]:
    """What to call with tokens, and the cache that comes before them: of the virtual tokens if `model` has any."""
    if isinstance(model, VirtualTokens):
        return model.get_base_model(), model.get_prompt(rows)
    return model, DynamicCache(config=model.config)
