"""The order of the data: a pure function of (seed, global step), independent of the number of workers.

The rows of all epochs form one endless stream (each epoch a new permutation); step s learns from the s-th global batch
of it. So 1 worker x 8 accumulation steps, 2 x 4 and 8 x 1 see the same batches, and a resumed run goes on with the very
next.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def total_steps(num_rows: int, global_batch: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: `max_steps`, or enough to see every row `epochs` times."""
    return max_steps or max(1, math.ceil(epochs * num_rows / global_batch))


def global_batch(step: int, size: int, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Row numbers of optimizer step `step` (from 0), shape [size]."""
    positions = np.arange(step * size, (step + 1) * size)
    epochs, places = np.divmod(positions, num_rows)
    return np.array(
        [_permutation(num_rows, seed, int(e))[p] for e, p in zip(epochs, places, strict=True)], dtype=np.int64
    )


def accumulation_steps(global_batch: int, world_size: int, size: int) -> int:
    """Micro-batches of `size` rows that each worker computes for one global batch."""
    return math.ceil(global_batch / (world_size * size))


def micro_batches(batch: NDArray[np.int64], rank: int, world_size: int, size: int) -> list[NDArray[np.int64]]:
    """The parts of a batch that worker `rank` computes: `accumulation_steps` of `size` rows each; -1 stands for no row.

    Number i of the list is number i x world_size + rank of the batch, whatever the number of workers. Every worker gets
    equally many, as ZeRO needs.
    """
    steps = accumulation_steps(len(batch), world_size, size)
    padded = np.full(steps * world_size * size, -1, dtype=np.int64)
    padded[: len(batch)] = batch
    return list(padded.reshape(steps, world_size, size)[:, rank])


def evaluation_batches(num_rows: int, rank: int, world_size: int, size: int) -> list[NDArray[np.int64]]:
    """The same for all rows once."""
    return micro_batches(np.arange(num_rows), rank, world_size, size)


def random_seed(seed: int, step: int, number: int) -> int:
    """Seeds dropout and noise of micro-batch `number` of a step: with any number of workers, and after a restart."""
    return int(np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_rows)
