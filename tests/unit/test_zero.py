"""The DeepSpeed configuration: what the presets are, what a user's file may say, and what it must not contradict."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from heliostat.errors import ConfigError
from heliostat.training import zero
from heliostat.training.config import TrainingConfig

STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def config(num_parameters: int = 1000, **settings: Any) -> dict[str, Any]:
    return zero.deepspeed_config(TrainingConfig(**settings), num_parameters=num_parameters)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ds.json"


def from_file(file: Path, content: Any, **settings: Any) -> dict[str, Any]:
    file.write_text(json.dumps(content))
    return config(deepspeed=str(file), **settings)


def test_the_presets_are_the_stages_they_are_named_after() -> None:
    assert STAGES.keys() == zero.PRESETS.keys()
    for name, stage in STAGES.items():
        made = config(deepspeed=name)["zero_optimization"]
        assert made["stage"] == zero.stage(TrainingConfig(deepspeed=name)) == stage
        assert ("offload_optimizer" in made) == ("offload_param" in made) == (name == "zero3_offload")


@pytest.mark.parametrize("preset", list(STAGES))
def test_the_yaml_decides_batches_clipping_and_precision(preset: str) -> None:
    made = config(
        deepspeed=preset, per_device_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.5, bf16=True,
        num_workers=7,
    )  # fmt: skip
    assert made["train_micro_batch_size_per_gpu"] == 3
    assert made["gradient_accumulation_steps"] == 5
    assert made["gradient_clipping"] == 0.5
    assert (made["bf16"], made["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert "optimizer" not in made, "the optimizer is built in Python"
    assert "scheduler" not in made


def test_the_function_is_pure() -> None:
    presets = copy.deepcopy(zero.PRESETS)
    first = config(deepspeed="zero3_offload")
    second = config(deepspeed="zero3_offload")
    assert first == second
    first["zero_optimization"]["offload_param"]["device"] = "nvme"
    assert config(deepspeed="zero3_offload") == second
    assert presets == zero.PRESETS


@pytest.mark.parametrize("preset", list(STAGES))
def test_buckets_are_no_larger_than_the_model_or_the_limit(preset: str) -> None:
    for parameters, expected in ((0, 1), (1000, 1000), (10**10, 200_000_000)):
        made = config(parameters, deepspeed=preset)["zero_optimization"]
        buckets = {key: value for key, value in made.items() if "bucket" in key}
        other = "stage3_prefetch_bucket_size" if STAGES[preset] == 3 else "allgather_bucket_size"
        assert buckets == {"reduce_bucket_size": expected, other: expected}


def test_a_users_file_is_kept_with_autos_filled_in(file: Path) -> None:
    content = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 77, "stage3_prefetch_bucket_size": "auto",
                              "offload_param": {"device": "nvme", "nvme_path": "/fast"}},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-8, "weight_decay": 0.0}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
        "wall_clock_breakdown": True,
        "steps_per_print": 5,
    }  # fmt: skip
    made = from_file(file, content, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    assert made["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 77, "stage3_prefetch_bucket_size": 1000,
        "offload_param": {"device": "nvme", "nvme_path": "/fast"},
    }  # fmt: skip
    assert made["wall_clock_breakdown"] is True
    assert made["steps_per_print"] == 5
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["bf16"] == {"enabled": False}
    assert "auto" not in json.dumps(made)
    assert not {"optimizer", "scheduler", "train_batch_size"} & made.keys()
    assert zero.stage(TrainingConfig(deepspeed=str(file))) == 3


def test_a_file_may_repeat_what_the_yaml_says(file: Path) -> None:
    content = {
        "train_batch_size": 48, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0, "bf16": {"enabled": True}, "fp16": {"enabled": False},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.999]}},
    }  # fmt: skip
    settings = {"num_workers": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "bf16": True,
                "learning_rate": 1e-3}  # fmt: skip
    assert from_file(file, content, **settings) == from_file(file, {}, **settings)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu` is 2, but the YAML's .* says 8"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps` is 4"),
        ({"checkpoint": {"writer": {}}}, "Heliostat writes checkpoints itself"),
        ({"train_batch_size": 64}, "train_batch_size` is 64, but the YAML's training section says 8"),
        ({"gradient_clipping": 0.1}, "gradient_clipping` is 0.1"),
        ({"bf16": {"enabled": True}}, "bf16` is True, but the YAML's training section says False"),
        ({"fp16": {"enabled": True}}, "fp16` is True"),
        ({"bf16": True}, "bf16` is True"),
        ({"optimizer": {"type": "Lamb"}}, r"optimizer\.type` Lamb is not supported"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, r"optimizer\.params\.lr` contradicts the YAML"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, r"optimizer\.params\.betas` contradicts"),
        ({"optimizer": {"params": {"eps": 1}}}, r"optimizer\.params\.eps` contradicts"),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, r"optimizer\.params\.weight_decay` contradicts"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, "scheduler` is set by training.lr"),
    ],
)
def test_contradictions_are_named(content: dict[str, Any], key: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        from_file(file, content)
    assert str(caught.value).startswith(f"{file}: `")


@pytest.mark.parametrize("text", ["{", "", "[]", "3", "\xff"])
def test_a_file_that_is_no_json_object_is_named(text: str, file: Path) -> None:
    file.write_text(text, encoding="latin-1")
    with pytest.raises(
        ConfigError, match=r"training\.deepspeed: .*ds\.json: (is not readable JSON|must be a JSON obj)"
    ):
        config(deepspeed=str(file))


@pytest.mark.parametrize("content", [{"zero_optimization": 2}, {"optimizer": "AdamW"}, {"scheduler": []},
                                     {"optimizer": {"params": 1}}])  # fmt: skip
def test_a_section_of_a_wrong_type_is_no_traceback(content: dict[str, Any], file: Path) -> None:
    with pytest.raises(ConfigError, match=r"ds\.json: `[a-z_.]+` must be a JSON object"):
        from_file(file, content)


def test_what_is_neither_preset_nor_file_is_told() -> None:
    with pytest.raises(ConfigError, match=r"`zero4` is neither a preset \(zero0, zero1, zero2, .*\) nor an existing"):
        config(deepspeed="zero4")
    with pytest.raises(ConfigError, match="is not readable JSON"):
        config(deepspeed="/")


def test_the_module_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, heliostat.training.zero; print({'torch', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
