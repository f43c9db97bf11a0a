"""The memory that one worker needs: from a step's activations to weights, optimizer and DeepSpeed's buffers.

Arithmetic only: nothing is measured, and nothing is fitted to measurements. With T parameters that learn, F that do
not, N workers, and w bytes a weight (4 in fp32, 2 in 16 bits), each worker keeps

    stage 0     w (T + F)          weights      8 T          Adam's moments, fp32      4 T      masters, if w = 2
    stage 1, 2  w (T + F)                       8 T / N                                4 T / N  in fp32 too
    stage 3     w (T + F) / N                   8 T / N                                4 T / N  in fp32 too

which is figure 1 of the ZeRO paper (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054), but that DeepSpeed
keeps masters beside fp32 weights as well. Gradients and buffers depend on the moment: of those at which a step can need
most (in backward, at its end, in the optimizer) the largest counts. What is there then was read from DeepSpeed 0.19.
"""

from dataclasses import dataclass
from typing import Any

from heliostat.training.tracing import Step

# DeepSpeed's defaults, in elements: what it flattens at a time without ZeRO, and keeps gathered under ZeRO-3.
_FLAT = 500_000_000
_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Footprint:
    """Bytes that one worker needs at the peak of a step: on its device, but for `host`."""

    weights: int
    optimizer: int
    """Adam's moments and fp32 masters."""
    activations: int
    gradients: int
    """What gradients and DeepSpeed's buffers for them add at the peak."""
    runtime: int
    """CUDA's context and kernels, or Python and its libraries."""
    host: int
    """In the machine's memory instead of the device's, with offloading."""

    @property
    def total(self) -> int:
        """All that the device holds."""
        return self.weights + self.optimizer + self.activations + self.gradients + self.runtime


@dataclass(frozen=True)
class Worker:
    """What a worker's memory depends on beside the step and DeepSpeed's configuration."""

    workers: int
    itemsize: int
    """Bytes of a weight in forward and backward."""
    on_gpu: bool
    """Buffers count as soon as they are allocated; a CPU gives memory to what is written."""
    runtime: int


def footprint(step: Step, deepspeed: dict[str, Any], worker: Worker) -> Footprint:
    """What `worker` needs for `step` under a DeepSpeed configuration (of `heliostat.training.zero`)."""
    zero = deepspeed["zero_optimization"]
    if zero["stage"] == 3:
        return _split(step, zero, worker)
    share = -(-step.trained // worker.workers) if zero["stage"] else step.trained
    masters = 4 if zero["stage"] or worker.itemsize == 2 else 0
    peak = _reduced if zero["stage"] else _plain
    return Footprint(
        weights=worker.itemsize * (step.trained + step.frozen),
        optimizer=(8 + masters) * share,
        activations=step.activations,
        gradients=peak(step, zero, worker, accumulates=deepspeed["gradient_accumulation_steps"] > 1) - step.activations,
        runtime=worker.runtime,
        host=0,
    )


def _plain(step: Step, zero: dict[str, Any], worker: Worker, *, accumulates: bool) -> int:
    """Most bytes of activations, gradients and their buffers without ZeRO."""
    gradients = worker.itemsize * step.trained
    # 16-bit gradients are summed up in fp32; fp32 ones are copied side by side to be summed over the workers.
    sums = 4 * step.trained if worker.itemsize == 2 else 0
    flat = 4 * min(step.trained, _FLAT) if worker.itemsize == 4 else 0
    backward = step.activations + gradients if accumulates else step.with_gradients
    return max(backward + (sums if worker.on_gpu or accumulates else 0), gradients + sums + flat)


def _reduced(step: Step, zero: dict[str, Any], worker: Worker, *, accumulates: bool) -> int:
    """The same with ZeRO-1 and 2, which collect gradients in buckets and reduce them to each worker's share."""
    size: int = zero["reduce_bucket_size"]
    share = 4 * -(-step.trained // worker.workers)
    overflows = step.trained > size
    buckets = worker.itemsize * size * (2 if zero.get("overlap_comm") and (worker.on_gpu or overflows) else 1)
    copy = worker.itemsize * min(size, step.trained)
    sums = share if worker.itemsize == 2 else 0
    backward = step.with_gradients
    if zero["stage"] == 2 and (worker.on_gpu or overflows):
        backward = step.activations + buckets + (copy if overflows else 0)
    kept = share if accumulates else 0
    return max(backward + kept, buckets + copy + max(sums, kept), share + (0 if sums else share))


def _split(step: Step, zero: dict[str, Any], worker: Worker) -> Footprint:
    """Stage 3: every worker has a share of the weights, and gathers what it computes with."""
    share, size = -(-step.trained // worker.workers), zero["reduce_bucket_size"]
    optimizer_on_host, weights_on_host = "offload_optimizer" in zero, "offload_param" in zero
    stored = worker.itemsize * -(-(step.trained + step.frozen) // worker.workers)
    copy = worker.itemsize * min(size, step.trained)
    # Gradients in fp32 for the optimizer: where it is, and for good on the host.
    update = 4 * share
    backward = step.activations + (copy if step.trained > size else 0)
    peak = max(backward, copy, update if worker.itemsize == 2 and not optimizer_on_host else 0)
    states, gradients = 12 * share, worker.itemsize * share
    host = (states + gradients + update if optimizer_on_host else 0) + (stored if weights_on_host else 0)
    weights = worker.itemsize * min(step.trained + step.frozen, _LIVE) + (0 if weights_on_host else stored)
    return Footprint(
        weights=weights,
        # A CPU's own memory is the host's.
        optimizer=(0 if optimizer_on_host else states) + (0 if worker.on_gpu else host),
        activations=step.activations,
        gradients=peak - step.activations + worker.itemsize * size + (0 if optimizer_on_host else gradients),
        runtime=worker.runtime,
        host=host if worker.on_gpu else 0,
    )
