"""The whole configuration of an experiment: one YAML file. Knows the sections, not what is done with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from heliostat import config
from heliostat.config import StrictModel
from heliostat.data.config import DataConfig
from heliostat.evaluation.config import EvaluationConfig, GenerationSettings
from heliostat.models.config import AdapterConfig, ModelConfig
from heliostat.registry.config import PromotionConfig, RegistryConfig
from heliostat.serving.config import ServingConfig
from heliostat.training.config import TrainingConfig
from heliostat.tuning.config import TuneDecodingConfig, TuneTrainingConfig

SYNONYMS = {
    # LLaMA-Factory, axolotl, TRL and older transformers names -> ours
    "base_model": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "test_file": "data.test",
    "val_size": "data.validation_size",
    "val_set_size": "data.validation_size",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "block_size": "data.max_length",
    "sample_packing": "data.packing",
    "train_on_prompt": "data.train_on_inputs",
    "dataset_processes": "data.preprocessing_num_workers",
    "dataset_num_proc": "data.preprocessing_num_workers",
    "max_samples": "data.max_train_samples",
    "finetuning_type": "adapter.method",
    "lora_rank": "adapter.lora_r",
    "lora_target": "adapter.lora_target_modules",
    "micro_batch_size": "training.per_device_train_batch_size",
    "train_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "num_epochs": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "gradient_clipping": "training.max_grad_norm",
    "early_stopping_steps": "training.early_stopping_patience",
    "ray_num_workers": "training.num_workers",
    "output_dir": "storage_path",
    "run_name": "name",
    "mlflow_experiment_name": "registry.experiment_name",
}


class ExperimentConfig(StrictModel):
    """One experiment: data, model, training, registry, serving, and the searches."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the run folders, the MLflow experiment and the registered model, unless these are named themselves."""
    seed: int = Field(42, ge=0, lt=2**32)
    storage_path: str | None = None
    """Folder of the run folders, or a URI (s3://...) for trainings; default: `runs` in the state folder."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on with an unfinished run of the same config; never: start a new one; must: fail if there is none."""
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    generation: GenerationSettings = GenerationSettings()
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig = RegistryConfig()
    promotion: PromotionConfig = PromotionConfig()
    serving: ServingConfig = ServingConfig()
    tune_training: TuneTrainingConfig = TuneTrainingConfig()
    tune_decoding: TuneDecodingConfig = TuneDecodingConfig()

    @property
    def experiment_name(self) -> str:
        """Name of the MLflow experiment."""
        return self.registry.experiment_name or self.name

    @property
    def registered_model_name(self) -> str:
        """Name of the registered model."""
        return self.registry.registered_model_name or self.name


def load(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment's YAML and overrides.

    Raises:
        ConfigError: see `heliostat.config.load`.
    """
    return config.load(ExperimentConfig, path, overrides, SYNONYMS)


def schema() -> dict[str, Any]:
    """The JSON schema of the YAML file, for editors (`# yaml-language-server: $schema=...`)."""
    return ExperimentConfig.model_json_schema()
