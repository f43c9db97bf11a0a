"""The whole configuration: its schema is true, every YAML here loads, other tools' names are understood."""

from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from heliostat import config, experiment
from heliostat.errors import ConfigError
from heliostat.experiment import SYNONYMS, ExperimentConfig
from heliostat.models.config import ScratchConfig
from heliostat.training.config import TrainingConfig

REPOSITORY = Path(__file__).parents[2]
YAMLS = sorted([*REPOSITORY.glob("jobs/**/*.yaml"), *REPOSITORY.glob("platform/heliostat/quickstart/*.yaml")])
MINIMAL = "name: x\nmodel: {model_name_or_path: gpt2}\ndata: {train: a.jsonl}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> ExperimentConfig:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return experiment.load(path, overrides)


def test_there_are_examples() -> None:
    assert {path.parent.name for path in YAMLS} >= {"cron", "quickstart"}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_yaml_loads_fits_the_schema_and_survives_being_dumped(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = experiment.load(path)
    assert capsys.readouterr().err == "", "the examples use the canonical keys"
    jsonschema.validate(yaml.safe_load(path.read_text()), experiment.schema())
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(config.dump(loaded))
    assert experiment.load(dumped) == loaded
    jsonschema.validate(yaml.safe_load(dumped.read_text()), experiment.schema())


def test_the_schema_is_one_and_refuses_what_loading_refuses() -> None:
    schema = experiment.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    good: dict[str, Any] = yaml.safe_load(MINIMAL)
    jsonschema.validate(good, schema)
    for bad in ({"zzz": 1}, {"name": "a b"}, {"training": {"num_workers": -1}}, {"data": {"format": "csv"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**good, **bad}, schema)
        with pytest.raises(ValueError, match="validation error"):
            ExperimentConfig.model_validate({**good, **bad})


def test_every_key_is_explained_or_known_from_the_library_it_is_named_after() -> None:
    """The docstrings of the keys reach the editor through the schema."""
    properties = experiment.schema()["$defs"]["TrainingConfig"]["properties"]
    assert properties["deepspeed"]["description"].startswith("zero0, zero1, zero2")
    assert experiment.schema()["properties"]["resume"]["description"].startswith("auto: go on with an unfinished run")


def test_synonyms_name_keys_that_exist_and_are_none_themselves() -> None:
    keys = set(config.dotted_keys(ExperimentConfig))
    assert set(SYNONYMS.values()) <= keys
    leaves = {key.rsplit(".", 1)[-1] for key in keys}
    assert not set(SYNONYMS) & leaves, "a synonym that is also a key would never be read as the one or the other"


LLAMA_FACTORY = """\
name: x
model_name_or_path: /models/llama
finetuning_type: lora
lora_rank: 8
lora_target: q_proj
dataset: a.jsonl
cutoff_len: 1024
val_size: 0.1
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
bf16: true
output_dir: saves
"""
AXOLOTL = """\
name: x
base_model: /models/llama
adapter: {method: lora, lora_r: 8, lora_target_modules: q_proj}
datasets: [a.jsonl]
sequence_len: 1024
sample_packing: true
val_set_size: 0.1
micro_batch_size: 1
gradient_accumulation_steps: 8
lr: 1e-4
num_epochs: 3
lr_scheduler: cosine
bf16: true
output_dir: saves
"""


@pytest.mark.parametrize("text", [LLAMA_FACTORY, AXOLOTL], ids=["LLaMA-Factory", "axolotl"])
def test_files_of_other_tools_are_understood(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load(tmp_path, text)
    assert loaded.model.model_name_or_path == "/models/llama"
    assert (loaded.adapter.method, loaded.adapter.lora_r, loaded.adapter.lora_target_modules) == ("lora", 8, "q_proj")
    assert (loaded.data.max_length, loaded.data.validation_size) == (1024, 0.1)
    assert loaded.data.train in ("a.jsonl", ["a.jsonl"])
    expected = TrainingConfig(
        per_device_train_batch_size=1, gradient_accumulation_steps=8, learning_rate=1e-4, num_train_epochs=3,
        lr_scheduler_type="cosine", bf16=True,
    )  # fmt: skip
    assert loaded.training == expected
    assert loaded.storage_path == "saves"
    notices = capsys.readouterr().err.splitlines()
    assert len(notices) >= 8
    assert all(" is read as `" in notice for notice in notices)


@pytest.mark.parametrize("synonym", sorted(SYNONYMS))
def test_each_synonym_beside_its_key_is_refused(synonym: str, tmp_path: Path) -> None:
    """Which of the two is meant, no one can know."""
    key = SYNONYMS[synonym]
    with pytest.raises(ConfigError, match=f"`{synonym}` means `{key}`, which is also given"):
        load(tmp_path, MINIMAL, f"{key}=1", f"{synonym}=2")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.bf16=true", "training.fp16=true"], "`training`: bf16 and fp16 exclude each other; keep one"),
        (["model.model_name_or_path=null"], "`model`: give exactly one of `model_name_or_path` (an existing model) "
         "and `scratch` (a new one)"),
        (["model.scratch={}"], "`model`: give exactly one of"),
        (["data.prompt_template=about {x}"], "`data`: prompt_template belongs to prompt_completion, classification, "),
        (["name=a/b"], "override name: `name`: String should match pattern"),
        (["seed=-1"], "override seed: `seed`: Input should be greater than or equal to 0 (given: -1)"),
        (["resume=yes"], "override resume: `resume`: Input should be 'auto', 'never' or 'must' (given: true)"),
        (["training.num_workers=1.5"], "override training.num_workers: `training.num_workers`: must be a number "
         "of workers, or [min, max] for as many as there is room for (given: 1.5)"),
        (["training.num_workers=[3, 2]"], "must be a number of workers, or [min, max]"),
        (["training.num_workers=[0, 2]"], "must be a number of workers, or [min, max]"),
        (["training.save_total_limit=1"], "greater than or equal to 2"),
        (["generation.temperature=0"], "override generation.temperature: `generation.temperature`: Input should be "
         "greater than 0"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused(overrides: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL, *overrides)
    assert expected in str(caught.value)


def test_names_follow_from_the_experiments_name(tmp_path: Path) -> None:
    plain = load(tmp_path, MINIMAL)
    assert (plain.experiment_name, plain.registered_model_name) == ("x", "x")
    named = load(tmp_path, MINIMAL, "registry.experiment_name=e", "registry.registered_model_name=m")
    assert (named.experiment_name, named.registered_model_name) == ("e", "m")


def test_global_batch_and_resources_follow_from_the_training_section() -> None:
    training = TrainingConfig(num_workers=4, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert training.global_batch_size == 24
    assert training.model_copy(update={"num_workers": 0}).global_batch_size == 6
    assert training.ray_resources() == {"CPU": 1}
    assert TrainingConfig(use_gpu=True).ray_resources() == {"CPU": 1, "GPU": 1}
    own = TrainingConfig(use_gpu=True, resources_per_worker={"CPU": 8, "GPU": 2})
    assert own.ray_resources() == {"CPU": 8, "GPU": 2}


def test_keys_of_a_new_models_config_are_kept_as_written(tmp_path: Path) -> None:
    text = "name: x\nmodel: {scratch: {model_type: llama, config: {hidden_size: 64, rope_scaling: null}}}\ndata: {}\n"
    assert load(tmp_path, text).model.scratch == ScratchConfig(
        model_type="llama", config={"hidden_size": 64, "rope_scaling": None}
    )
