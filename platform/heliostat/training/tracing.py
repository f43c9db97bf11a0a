"""One training step without weights: what it would keep in memory and compute. Knows no data, workers or optimizers.

The model's own forward and backward run on tensors that have shapes and no content (PyTorch's FakeTensorMode), and
every storage is counted from when it is made until it is freed. So whatever autograd keeps is in the figure, for any
architecture and adapter, where formulas such as Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198, section 4)
hold for one.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from heliostat.errors import ModelError

Attention = Literal["eager", "sdpa", "fused", "unmasked"]
"""How attention is computed: plainly; as PyTorch does it on CPUs; by its kernels for GPUs, which keep no probabilities
where there is dropout either; or by flash attention on flattened rows, which needs no mask."""


@dataclass(frozen=True)
class Batch:
    """The shape of what one worker computes at a time."""

    rows: int
    tokens: int
    """Of a row, padding included."""
    learned: int
    """Most learned tokens of a row: logits are computed for so many of each."""


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass over a batch takes. Sizes are bytes, weights not included."""

    trained: int
    """Parameters that learn."""
    frozen: int
    """Parameters that do not."""
    activations: int
    """Most that is there at once beside weights and gradients."""
    with_gradients: int
    """Most that is there at once beside weights, if gradients stay where backward leaves them."""
    flops: int
    """Floating-point operations; a multiplication and an addition are two."""


def trace(build: Callable[[], Any], batch: Batch, *, checkpointing: bool, attention: Attention) -> Step:
    """Build the model without weights and count one step of it; with `checkpointing`, blocks are computed twice.

    Raises:
        ModelError: what the model computes depends on the values of its weights or tokens.
    """
    try:
        with torch.device("meta"):
            model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.set_attn_implementation(attention)
        with FakeTensorMode():
            _to_cpu(model)
            return _count(model, batch)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"this architecture cannot be planned: what it computes depends on values ({error.func}); "
            "train a few steps with training.max_steps and read `memory_gib` in metrics.jsonl"
        ) from error


def _to_cpu(model: Any) -> None:
    """Take tensors of the meta device for those of a CPU, without content either: kernels are chosen by the device."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None:
                    owned[name] = made.setdefault(id(tensor), _empty(tensor))


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def _count(model: Any, batch: Batch) -> Step:
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    live = _Live([*parameters, *model.buffers()])
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(live.count_gradient)
    with live:
        logits = model(**_inputs(batch), use_cache=False).logits
        loss = _Loss.apply(logits)  # type: ignore[no-untyped-call]  # torch's, and so below
        del logits
        loss.backward()
    number = sum(parameter.numel() for parameter in trained)
    return Step(
        trained=number,
        frozen=sum(parameter.numel() for parameter in parameters) - number,
        activations=live.peak,
        with_gradients=live.peak_with_gradients,
        flops=live.flops,
    )


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """A batch as `training.objectives.learned_positions` makes it, without labels."""
    return {
        "input_ids": torch.zeros((batch.rows, batch.tokens), dtype=torch.long),
        "position_ids": torch.zeros((batch.rows, batch.tokens), dtype=torch.long),
        "logits_to_keep": torch.zeros((batch.rows, batch.learned), dtype=torch.long),
    }


class _Loss(torch.autograd.Function):
    """A loss as large as DeepSpeed's chunked cross entropy: it keeps the logits, and makes a gradient of their size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return torch.empty_like(logits)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that are alive, apart from the given tensors'."""

    def __init__(self, without: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.peak_with_gradients = 0
        self.flops = 0
        self._now = 0
        self._gradients = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in without}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if formula := _FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self._now)
        self.peak_with_gradients = max(self.peak_with_gradients, self._now + self._gradients)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._now += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size

    def count_gradient(self, parameter: Tensor) -> None:
        """What a parameter got is a gradient from now on; it is freed here, and counted as if it were not."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._gradients += gradient.numel() * gradient.element_size()


def _fused(*args: Any, dropout: float = 0.0, **kwargs: Any) -> Any:
    """PyTorch's attention without dropout, for which CPUs have a fused kernel too; it keeps what GPUs' kernels keep."""
    return sdpa_attention_forward(*args, dropout=0.0, **kwargs)


def _no_mask(*_: Any, **__: Any) -> None:
    """Flash attention knows the documents by their borders."""


def _forward_flops(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Of softmax(q k) v, with q and k [rows, heads, tokens, width]: two products, what a mask hides included."""
    rows, heads, tokens, width = query.shape
    return 4 * rows * heads * tokens * key.shape[2] * width


def _backward_flops(_: Tensor, query: Tensor, key: Tensor, *__: Any, **___: Any) -> int:
    """Five products: four for the gradients, and one to have the probabilities again (Dao et al. 2022)."""
    return _forward_flops(query, key) * 5 // 2


# PyTorch's own counts lack attention on CPUs.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
}
for _name, _mask in (("fused", sdpa_mask), ("unmasked", _no_mask)):
    AttentionInterface.register(_name, _fused)
    AttentionMaskInterface.register(_name, _mask)
