"""What the KV cache needs. Knows sizes, not what is allocated."""

from typing import Any

import torch
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from heliostat import machine
from heliostat.errors import ResourceError


def check_cache(config: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    """See that a cache of so many tokens fits beside what is there now. `config`: the text model's.

    Raises:
        ResourceError: it does not; the message says how many bytes are needed, and how many there are.
    """
    needed = cache_bytes(config, tokens, dtype)
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.available_bytes()
    if needed > available:
        raise ResourceError(
            f"serving.cache_tokens={tokens} needs {needed} bytes of memory and {available} are available; lower it"
        )


def cache_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of so many tokens in all layers."""
    per_layer = 2 * find_num_key_value_heads(config) * find_head_dim(config)
    return int(config.num_hidden_layers * per_layer * dtype.itemsize * tokens)
