"""Training goes on while a checkpoint is written, and what is written is what was to be saved."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkpoints as benchmark
from heliostat.errors import ResourceError
from heliostat.training import checkpoint, shards
from heliostat.training.saving import Saver
from heliostat.training.worker import LocalSession

FILE = "mp_rank_00_model_states.pt"


class Engine:
    """Hands its writer what a DeepSpeed engine does: live tensors, one of them in two places."""

    checkpoint_engine: Any = None

    def __init__(self) -> None:
        self.weight = torch.zeros(3)

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        content = {"module": {"a": self.weight, "b": self.weight.view(3)}, "shapes": [self.weight.shape]}
        self.checkpoint_engine.save(content, f"{folder}/{tag}/{FILE}")


class Session(LocalSession):
    """Notes what is reported."""

    def __init__(self) -> None:
        super().__init__()
        self.reported: list[str] = []

    def report(self, folder: Path, metrics: dict[str, float]) -> None:
        self.reported.append(folder.name)


@pytest.fixture
def session() -> Iterator[Session]:
    with Session() as made:
        yield made


def saver(root: Path, session: Session, *, background: bool = True) -> Saver:
    return Saver(root, "attempt-01", session, keep=2, trained_only=False, background=background)


def saved(root: Path, step: int) -> Any:
    return torch.load(checkpoint.at(root, "attempt-01", step, 1).shards / FILE, weights_only=False)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    event, write = threading.Event(), shards.write

    def wait(files: shards.Files, folder: Path) -> None:
        assert event.wait(60)
        write(files, folder)

    monkeypatch.setattr(shards, "write", wait)
    return event


def test_training_goes_on_and_changes_nothing_of_what_is_written(
    tmp_path: Path, session: Session, gate: threading.Event
) -> None:
    engine, made, state = Engine(), saver(tmp_path, session), {"step": 1}
    made.save(engine, state, {"step": 1})
    engine.weight += 1
    state["step"] = 2
    assert not checkpoint.at(tmp_path, "attempt-01", 1, 1).is_finished
    assert (session.reported, made.has_failed) == ([], False)
    gate.set()
    made.save(engine, state, {"step": 2})
    assert session.reported == ["step_000001-w1"], "the one before is whole before the next begins"
    made.settle()
    assert session.reported == ["step_000001-w1", "step_000002-w1"]
    assert checkpoint.at(tmp_path, "attempt-01", 1, 1).state() == {"step": 1}
    for step in (1, 2):
        content = saved(tmp_path, step)
        assert content["module"]["a"].tolist() == [step - 1] * 3
        assert content["module"]["a"].data_ptr() == content["module"]["b"].data_ptr(), "tied weights are written once"
        assert content["shapes"] == [torch.Size([3])]
    made.settle()
    assert len(session.reported) == 2


@pytest.mark.parametrize("background", [True, False])
def test_what_must_be_whole_at_once_is(tmp_path: Path, session: Session, *, background: bool) -> None:
    engine, made = Engine(), saver(tmp_path, session, background=background)
    for step in (1, 2, 3):
        made.save(engine, {"step": step}, {"step": step}, at_once=background)
        assert checkpoint.at(tmp_path, "attempt-01", step, 1).faults() == []
    assert [found.step for found in checkpoint.newest_first(tmp_path)] == [3, 2]


def test_a_write_that_failed_is_told_and_nothing_is_left_of_it(
    tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, failed = saver(tmp_path, session), threading.Event()
    made.save(Engine(), {"step": 1}, {"step": 1}, at_once=True)

    def fail(files: shards.Files, folder: Path) -> None:
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "write", fail)
    made.save(Engine(), {"step": 2}, {"step": 2})
    assert failed.wait(60)
    with pytest.raises(ResourceError, match=r"no room to write .*step_000002-w1 \(worker 0: .* No space left"):
        made.settle()
    assert [found.step for found in checkpoint.newest_first(tmp_path)] == [1]
    made.settle()
    assert session.reported == ["step_000001-w1"]


def test_the_benchmark_measures_both_ways() -> None:
    found = benchmark.measure(width=64, layers=1, saves=2, steps=1)
    assert found.keys() == {
        "parameters", "step_s", "gib", "sync_wait_s", "sync_total_s", "async_wait_s", "async_total_s",
    }  # fmt: skip
    assert found["gib"] * 2**30 > found["parameters"] * 12, "weights and two moments in fp32"
    assert found["async_wait_s"] <= found["async_total_s"]
