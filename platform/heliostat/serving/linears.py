"""The weight of the output layer laid out for small batches on CPUs. Knows layers, not models; results stay the same.

A decode step multiplies matrices of as many rows as there are requests. For 2 to 64 rows, oneDNN is up to twice as fast
on weights in its own layout, which is a copy; the output layer, the largest by far in a small model, is worth it.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

# More rows, as in prefill, and a single one are as fast without oneDNN's layout.
_PACKED_ROWS = range(2, 65)


class PackedLinear(nn.Module):
    """A linear layer with a second copy of its weight, in oneDNN's layout."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _PACKED_ROWS[-1])
        # A buffer, so that whoever shares a model's tensors shares this one too.
        self.register_buffer("_packed", packed, persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What `nn.Linear` gives, for `inputs` of shape (..., in features)."""
        if inputs.shape[:-1].numel() in _PACKED_ROWS:
            packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")
            return packed
        return linear(inputs, self.weight, self.bias)


def arrange(model: Any) -> None:
    """Lay out a transformers model's output layer in place, where it is on a CPU; may be called twice."""
    known = model.dtype in (torch.float32, torch.bfloat16)
    head = model.get_output_embeddings()
    # Its weight is often the input embedding's too, which is read by rows: it keeps its layout.
    if model.device.type == "cpu" and known and type(head) is nn.Linear and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        model.set_output_embeddings(PackedLinear(head))
