"""The training loop in this process: settings that must not change the losses, and those that decide when to stop."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.data.tokens import encode
from heliostat.errors import ResourceError
from heliostat.models import base
from heliostat.models.config import AdapterConfig
from heliostat.training import engine
from heliostat.training.config import TrainingConfig
from heliostat.training.spec import WorkerSpec
from heliostat.training.worker import LocalSession, Progress, Worker
from tests import tiny

STEPS = 4


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without dropout, and tokens of chats to train on and to validate with."""
    root = tmp_path_factory.mktemp(request.param)
    tiny.write_model(root / "model", request.param, **tiny.NO_DROPOUT[request.param])
    for name, first in (("train", 0), ("validation", 40)):
        texts = tiny.TEXTS[first : first + 40]
        rows = [
            Row(
                {
                    "messages": [
                        {"role": "user", "content": text},
                        {"role": "assistant", "content": text[::-1][: 5 + i]},
                    ]
                },
                "",
            )
            for i, text in enumerate(texts)
        ]
        encode(rows, tiny.tokenizer(), DataConfig(format="chat", max_length=128)).save(root / name, name)
    return root


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def train(
    folder: Path, run: Path, method: str = "full", adapter: dict[str, Any] | None = None, **settings: Any
) -> tuple[Progress, dict[str, list[float]]]:
    """Train in this process; the progress and the journal's values by metric."""
    values = {
        "num_workers": 0,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "deepspeed": "zero2",
        **settings,
    }
    training = TrainingConfig.model_validate(values)
    run.mkdir()
    spec = WorkerSpec(
        run_folder=str(run),
        attempt="attempt-01",
        model=str(folder / "model"),
        revision=None,
        from_scratch=False,
        attention=None,
        adapter=AdapterConfig.model_validate({"method": method, "lora_r": 4, **(adapter or {})}),
        training=training,
        train_tokens=str(folder / "train"),
        validation_tokens=str(folder / "validation"),
        max_length=128,
        packing=True,
        pad_token_id=1,
        total_steps=training.max_steps or STEPS,
        eval_steps=training.eval_steps or 2,
        save_steps=2,
        export_all=False,
        seed=3,
    )
    with LocalSession() as session:
        progress = Worker(spec, session).run()
    found: dict[str, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line)["metrics"].items():
            found.setdefault(name, []).append(value)
    return progress, found


@pytest.fixture(scope="module", params=["full", "lora"])
def plain(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(method, journal) of a run with plain settings."""
    return request.param, train(folder, tmp_path_factory.mktemp("plain") / "run", request.param)[1]


def user_file(path: Path) -> str:
    """A DeepSpeed JSON as people have them, with values left to the trainer."""
    content = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {"stage": 1},
    }
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "setting",
    ["gradient_checkpointing", "zero0", "zero1", "zero3", "zero3_offload", "json", "accumulation", "async_save"],
)
def test_how_it_is_computed_does_not_matter(folder: Path, plain: Any, setting: str, tmp_path: Path) -> None:
    method, expected = plain
    special: dict[str, dict[str, Any]] = {
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "async_save": {"async_save": True},
        "json": {"deepspeed": user_file(tmp_path / "deepspeed.json")},
        "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    }
    _, found = train(folder, tmp_path / "run", method, **special.get(setting, {"deepspeed": setting}))
    for metric in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        assert found[metric] == pytest.approx(expected[metric], rel=1e-5), metric


def test_bf16_stays_close_and_is_exported_as_bf16(folder: Path, plain: Any, tmp_path: Path) -> None:
    method, expected = plain
    _, found = train(folder, tmp_path / "run", method, bf16=True)
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)
    (weights,) = (tmp_path / "run" / "weights").glob("*.safetensors")
    kinds = {tensor.dtype for tensor in load_file(weights).values()}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_rslora": True}, {"loraplus_lr_ratio": 16}], ids=str)
def test_variants_of_lora_learn_alike_on_split_weights(folder: Path, variant: dict[str, Any], tmp_path: Path) -> None:
    stages = ["zero0", "zero2"] if "use_dora" in variant else ["zero0", "zero2", "zero3"]
    plain, *losses = (
        train(folder, tmp_path / str(number), "lora", adapter, deepspeed=stage)[1]["loss"]
        for number, (adapter, stage) in enumerate([({}, "zero2"), *((variant, stage) for stage in stages)])
    )
    for found in losses:
        assert found == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] == pytest.approx(plain[0], rel=1e-5), "all begin as nothing"
    assert losses[0][-1] != pytest.approx(plain[-1], rel=1e-4)


@pytest.mark.parametrize("part", ["embeddings", "all-but-last-1", r"\.attn\.|self_attn"])
def test_what_is_frozen_stays_and_the_rest_learns(folder: Path, part: str, tmp_path: Path) -> None:
    before = load_file(folder / "model" / "model.safetensors")
    losses = []
    for stage in ("zero2", "zero3"):
        frozen = {"freeze": [part]}
        _, found = train(folder, tmp_path / stage, "freeze", frozen, deepspeed=stage, gradient_checkpointing=True)
        losses.append(found["loss"])
        (file,) = (tmp_path / stage / "weights").glob("*.safetensors")
        for name, weight in load_file(file).items():
            is_frozen = {
                "embeddings": "embed_tokens" in name or "wte" in name or "wpe" in name,
                "all-but-last-1": ".1." not in name,
            }.get(part, "attn." in name)
            assert torch.equal(weight, before[name]) == is_frozen, name
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_noise_on_embeddings_disturbs_training_only_and_follows_the_seed(folder: Path, tmp_path: Path) -> None:
    plain, noisy, again = (
        train(folder, tmp_path / str(number), neftune_noise_alpha=alpha)[1]
        for number, alpha in enumerate((None, 5.0, 5.0))
    )
    assert noisy["eval_loss"][0] == plain["eval_loss"][0]
    assert noisy["loss"] == again["loss"]
    assert noisy["loss"][0] != plain["loss"][0]


def test_noise_is_as_large_as_the_paper_says(folder: Path) -> None:
    model = base.load_model(str(folder / "model"), dtype=torch.float32)
    embedding, ids = model.get_input_embeddings(), torch.arange(2, 66)[None]
    clean = embedding(ids)
    engine.add_noise(model, alpha=5.0, length=64)
    noise = embedding.train()(ids) - clean
    bound = 5 / math.sqrt(64 * clean.shape[-1])
    assert 0.95 * bound < noise.abs().max() <= bound + 1e-6
    assert torch.equal(embedding.eval()(ids), clean)


def test_every_metric_is_logged(plain: Any) -> None:
    _, found = plain
    assert len(found["loss"]) == len(found["grad_norm"]) == len(found["tokens_per_second"]) == STEPS
    assert len(found["eval_loss"]) == 3, "before training and every second step"
    assert found["eval_perplexity"] == pytest.approx([math.exp(loss) for loss in found["eval_loss"]])
    assert found["memory_gib"][-1] > 0
    assert found["epoch"] == sorted(found["epoch"])


def test_logged_losses_are_means_over_the_steps_between(folder: Path, plain: Any, tmp_path: Path) -> None:
    method, expected = plain
    _, found = train(folder, tmp_path / "run", method, logging_steps=2)
    pairs = [sum(expected["loss"][i : i + 2]) / 2 for i in (0, 2)]
    assert found["loss"] == pytest.approx(pairs, rel=1e-6)


def test_early_stopping_keeps_the_best_weights(folder: Path, tmp_path: Path) -> None:
    """A learning rate that wrecks the model: evaluations get worse, and the best one's weights are what is left."""
    progress, found = train(
        folder, tmp_path / "run", max_steps=40, eval_steps=1, learning_rate=0.05, lr_scheduler_type="constant",
        early_stopping_patience=3, max_grad_norm=0,
    )  # fmt: skip
    assert progress.stopped_early
    assert progress.step == progress.best_step + 3 < 40
    losses = found["eval_loss"][1:]
    assert progress.best_loss == min(losses)
    assert losses.index(min(losses)) == progress.best_step - 1
    evaluated = reloaded_validation_loss(folder, tmp_path / "run")
    assert evaluated == pytest.approx(progress.best_loss, rel=1e-5)


def test_a_machine_without_the_shared_folders_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"worker 0 on .* has no .*/elsewhere/train: .* all machines share"):
        train(tmp_path / "elsewhere", tmp_path / "run")


def test_only_the_newest_checkpoints_are_kept(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "run", max_steps=8, save_total_limit=2)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints" / "attempt-01").iterdir())
    assert kept == ["step_000006-w1", "step_000008-w1"]


def reloaded_validation_loss(folder: Path, run: Path) -> float:
    """Mean loss of the exported weights, document by document."""
    from heliostat.data.tokens import TokenDataset

    model = base.load_model(str(run / "weights"), dtype=torch.float32).eval()
    tokens = TokenDataset.open(folder / "validation")
    total = count = 0.0
    for index in range(len(tokens)):
        ids, mask = tokens.document(index)
        labels = torch.where(torch.tensor(mask), torch.tensor(ids).long(), -100)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor(ids).long()[None], labels=labels[None]).loss
        learned = int(mask[1:].sum())
        total, count = total + loss.item() * learned, count + learned
    return total / count
