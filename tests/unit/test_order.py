"""The order of the data follows from seed and step alone: not from the workers, nor from where a run was stopped."""

import numpy as np
import pytest

from heliostat.training import order

CUTS = [(1, 8), (2, 4), (4, 2), (8, 1)]


@pytest.mark.parametrize(("workers", "accumulation"), CUTS)
@pytest.mark.parametrize("size", [1, 3])
def test_workers_and_accumulation_share_out_the_global_batch(workers: int, accumulation: int, size: int) -> None:
    batch = order.global_batch(5, workers * accumulation * size, num_rows=1000, seed=1)
    parts = [order.micro_batches(batch, rank, workers, size) for rank in range(workers)]
    assert [len(part) for part in parts] == [accumulation] * workers
    assert {len(micro) for part in parts for micro in part} == {size}
    assert sorted(np.concatenate([micro for part in parts for micro in part])) == sorted(batch)


def test_the_cut_does_not_change_the_batch() -> None:
    def rows(workers: int, accumulation: int, step: int) -> list[int]:
        batch = order.global_batch(step, 8, num_rows=50, seed=3)
        parts = [order.micro_batches(batch, rank, workers, 1) for rank in range(workers)]
        assert {len(part) for part in parts} == {accumulation}
        return sorted(int(row) for part in parts for micro in part for row in micro)

    for step in range(20):
        assert len({tuple(rows(*cut, step)) for cut in CUTS}) == 1


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_workers_computes_the_same_micro_batches(workers: int, size: int) -> None:
    """So what is random in one can be seeded by its number. What does not divide is filled up with no rows."""
    batch = order.global_batch(5, 12, num_rows=1000, seed=1)
    parts = [order.micro_batches(batch, rank, workers, size) for rank in range(workers)]
    steps = order.accumulation_steps(12, workers, size)
    assert [len(part) for part in parts] == [steps] * workers
    numbered = {number * workers + rank: micro for rank in range(workers) for number, micro in enumerate(parts[rank])}
    expected = batch.reshape(-1, size).tolist()
    assert [numbered[number].tolist() for number in range(12 // size)] == expected
    assert {row for number in range(12 // size, steps * workers) for row in numbered[number].tolist()} <= {-1}
    assert (steps - 1) * workers * size < 12, "no more than one round is filled up"


def test_randomness_is_of_a_micro_batch() -> None:
    seeds = {order.random_seed(*place) for place in np.ndindex(3, 20, 5)}
    assert len(seeds) == 3 * 20 * 5
    assert order.random_seed(1, 2, 3) == order.random_seed(1, 2, 3)
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(("num_rows", "size"), [(10, 4), (7, 7), (5, 16), (1, 3), (64, 8)])
def test_every_epoch_is_a_new_permutation(num_rows: int, size: int) -> None:
    epochs = 6
    steps = -(-epochs * num_rows // size)
    stream = np.concatenate([order.global_batch(step, size, num_rows, seed=1) for step in range(steps)])
    found = stream[: epochs * num_rows].reshape(epochs, num_rows)
    assert np.array_equal(np.sort(found), np.tile(np.arange(num_rows), (epochs, 1)))
    if num_rows >= 7:
        assert len({tuple(epoch) for epoch in found.tolist()}) == epochs


def test_the_order_is_pure_in_seed_and_step() -> None:
    steps = [order.global_batch(step, 8, 100, seed=1).tolist() for step in range(40)]
    backwards = [order.global_batch(step, 8, 100, seed=1).tolist() for step in reversed(range(40))]
    assert backwards[::-1] == steps, "nothing is remembered from call to call"
    np.random.default_rng(5)
    np.random.seed(5)
    assert order.global_batch(3, 8, 100, seed=1).tolist() == steps[3]
    assert order.global_batch(3, 8, 100, seed=2).tolist() != steps[3]


def test_batch_sizes_cut_the_same_stream() -> None:
    """A run with half the batch sees the same rows in the same order."""
    small = np.concatenate([order.global_batch(step, 4, 30, seed=1) for step in range(20)])
    large = np.concatenate([order.global_batch(step, 8, 30, seed=1) for step in range(10)])
    assert np.array_equal(small, large)


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4])
def test_evaluation_sees_every_row_once_with_equally_many_batches(num_rows: int, workers: int, size: int) -> None:
    parts = [order.evaluation_batches(num_rows, rank, workers, size) for rank in range(workers)]
    assert len({len(part) for part in parts}) == 1
    assert {len(batch) for part in parts for batch in part} == {size}
    seen = np.concatenate([batch for part in parts for batch in part])
    assert sorted(seen[seen >= 0]) == list(range(num_rows))
    assert len(seen) - num_rows < workers * size, "no more filling than one round"


@pytest.mark.parametrize(
    ("num_rows", "batch", "epochs", "max_steps", "expected"),
    [
        (100, 10, 1, None, 10),
        (101, 10, 1, None, 11),
        (100, 10, 2.5, None, 25),
        (100, 10, 0.01, None, 1),
        (3, 64, 1, None, 1),
        (100, 10, 3, 7, 7),
        (100, 10, 1, 700, 700),
    ],
)
def test_total_steps(num_rows: int, batch: int, epochs: float, max_steps: int | None, expected: int) -> None:
    assert order.total_steps(num_rows, batch, epochs, max_steps) == expected
