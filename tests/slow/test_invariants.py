"""What must not change the outcome: the cut of the global batch, ZeRO, packing, being stopped, a disk that is full."""

import dataclasses
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.data.tokens import encode
from heliostat.models.config import AdapterConfig
from heliostat.training import checkpoint
from heliostat.training.config import TrainingConfig
from heliostat.training.spec import WorkerSpec
from tests import forked, tiny
from tests.slow import command

STEPS = 6
GLOBAL_BATCH = 8
CUTS = {"1x8": (1, 8), "2x4": (2, 4), "8x1": (8, 1)}
METHODS = ("full", "lora")
STAGES = ("zero0", "zero2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and tokens of documents whose completions have very different lengths."""
    root = tmp_path_factory.mktemp("invariants")
    tiny.write_model(root / "model", "llama")
    for name, rows in (("train", 70), ("validation", 20)):
        words = " ".join(tiny.TEXTS).split()
        documents = [
            Row({"prompt": tiny.TEXTS[i % 40], "completion": " ".join(words[i : i + 1 + i * 7 % 29])}, f"{name}:{i}")
            for i in range(rows)
        ]
        encode(documents, tiny.tokenizer(), DataConfig(format="prompt_completion", max_length=64)).save(
            root / name, name
        )
    return root


def spec(
    folder: Path, run: str, workers: int, accumulation: int, stage: str, method: str, steps: int = STEPS
) -> WorkerSpec:
    """A run of `steps` steps that saves every 2 and evaluates every 3."""
    (folder / run).mkdir(exist_ok=True)
    training = TrainingConfig(
        num_workers=workers,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=3e-3,
        deepspeed=stage,
        weight_decay=0.1,
        load_best_model_at_end=False,
        async_save=method == "lora",
    )
    return WorkerSpec(
        run_folder=str(folder / run),
        attempt="attempt-01",
        model=str(folder / "model"),
        revision=None,
        from_scratch=False,
        attention=None,
        adapter=AdapterConfig(
            method=method, lora_r=4, lora_dropout=0.1, loraplus_lr_ratio=4 if method == "lora" else None
        ),
        training=training,
        train_tokens=str(folder / "train"),
        validation_tokens=str(folder / "validation"),
        max_length=64,
        packing=True,
        pad_token_id=1,
        total_steps=steps,
        eval_steps=3,
        save_steps=2,
        export_all=False,
        seed=7,
    )


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    """The exported weights."""
    (file,) = (folder / run / "weights").glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """All runs that the tests compare, in one process tree."""
    cuts = [
        (spec(folder, f"{method}-{cut}-{stage}", workers, accumulation, stage, method), workers)
        for method in METHODS
        for stage in STAGES
        for cut, (workers, accumulation) in CUTS.items()
        if stage == "zero2" or cut == "2x4"
    ]
    forked.run(cuts)
    return folder


@pytest.fixture(scope="module")
def resumed(folder: Path) -> Path:
    """The same runs by two attempts: of the first, only the checkpoint after step 4 is whole."""
    specs = [spec(folder, f"{method}-{stage}-resumed", 2, 4, stage, method) for method in METHODS for stage in STAGES]
    forked.run([(first, 2) for first in specs])
    for first in specs:
        newest = checkpoint.at(first.checkpoints, "attempt-01", STEPS, 2)
        (newest.folder / "manifest_1.json").unlink()
    forked.run([(dataclasses.replace(first, attempt="attempt-02"), 2) for first in specs])
    return folder


@pytest.fixture(scope="module")
def resized(folder: Path) -> Path:
    """The same runs by 3, then 2, then 3 workers. 3 do not divide the global batch of 8."""
    specs = [spec(folder, f"{method}-{stage}-resized", 2, 4, stage, method) for method in METHODS for stage in STAGES]
    forked.run([(each, workers, until) for each in specs for workers, until in ((3, 2), (2, 4), (3, None))])
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("run", ["2x4-zero2", "8x1-zero2", "2x4-zero0", "2x4-zero3"])
def test_cut_of_the_global_batch_does_not_matter(finished: Path, method: str, run: str) -> None:
    reference = f"{method}-1x8-zero2"
    for metric in ("loss", "eval_loss", "grad_norm"):
        expected = command.journal(finished / reference, metric)
        assert len(expected) >= 3
        assert command.journal(finished / f"{method}-{run}", metric) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_workers_that_come_and_go_do_not_matter(finished: Path, resized: Path, method: str, stage: str) -> None:
    run = resized / f"{method}-{stage}-resized"
    assert list(command.journal(run, "progress.start")) == [0, 2, 4]
    for metric in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        expected = command.journal(finished / f"{method}-2x4-{stage}", metric)
        assert command.journal(run, metric) == pytest.approx(expected, rel=1e-5)
    assert not (run / "checkpoints" / "universal").exists()


@pytest.mark.parametrize("method", METHODS)
def test_training_learns(finished: Path, method: str) -> None:
    losses = command.journal(finished / f"{method}-1x8-zero2", "eval_loss")
    assert losses[STEPS] < losses[0] - 0.02


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_ends_with_the_same_weights(finished: Path, resumed: Path, method: str, stage: str) -> None:
    assert list(command.journal(resumed / f"{method}-{stage}-resumed", "progress.start")) == [0, 4]
    after, unbroken = weights(resumed, f"{method}-{stage}-resumed"), weights(finished, f"{method}-2x4-{stage}")
    assert after.keys() == unbroken.keys()
    for name in unbroken:
        assert torch.equal(after[name], unbroken[name]), name


def test_a_full_disk_leaves_the_checkpoints_before_and_the_run_goes_on_once_there_is_room(
    finished: Path, folder: Path
) -> None:
    """On a small tmpfs, in a mount namespace: two checkpoints fit, and the third does not."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let its users mount a tmpfs")
    kept = sum(path.stat().st_size for path in (finished / "full-2x4-zero2" / "checkpoints").rglob("*.*"))
    first, out = spec(folder, "full-disk", 2, 4, "zero2", "full"), folder / "full-disk-out"
    out.mkdir()
    (out / "jobs").write_bytes(pickle.dumps([(first, 2)]))
    train = f"{sys.executable} -m tests.forked {out}/jobs"
    script = f"""
        mount -t tmpfs -o size={int(kept * 1.3)} tmpfs {first.run_folder}
        {train} >{out}/told 2>&1 && exit 1
        ls {first.checkpoints}/attempt-01 >{out}/left
        mount -o remount,size={kept * 10} {first.run_folder}
        {train} >{out}/rest 2>&1 || exit 2
        cp -r {first.run_folder}/weights {first.run_folder}/metrics.jsonl {out}
    """
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    told = (out / "told").read_text()
    full = (
        rf"ResourceError: no room to write {first.checkpoints}/attempt-01/step_000006-w2 \(worker \d: .*No space left"
    )
    assert len(re.findall(full, told)) == 2, "both workers end, and say why"
    assert (out / "left").read_text().split() == ["step_000002-w2", "step_000004-w2"]
    assert list(command.journal(out, "progress.start")) == [0, 4]
    after, unbroken = weights(folder, "full-disk-out"), weights(finished, "full-2x4-zero2")
    assert all(torch.equal(after[name], unbroken[name]) for name in unbroken)
