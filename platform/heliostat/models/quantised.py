"""A base model in 4 or 8 bits, for adapters to learn on (QLoRA), through bitsandbytes. Knows nothing of adapters.

Dettmers et al. 2023, arXiv:2305.14314 (nf4), and 2022, arXiv:2208.07339 (int8).
"""

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from heliostat.errors import ConfigError


def require() -> None:
    """See that bitsandbytes is installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("adapter.method=qlora needs bitsandbytes; install the extra: pip install 'heliostat[qlora]'")


def loading(bits: int, *, double: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told to quantise the linear layers, but the output layer, as it loads.

    `double`: the scales of 4-bit blocks are quantised too. `dtype`: what is computed in.
    """
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
    }
    place = device.index or 0 if device.type == "cuda" else device.type
    return {
        "quantization_config": BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True})),
        "device_map": {"": place},
    }


def keep_weights(model: Any) -> None:
    """Switch off what changes 4-bit weights under way.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks them for each evaluation and back, rounding the scales to 16
    bits; and it fails where a layer is narrower than a block.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
