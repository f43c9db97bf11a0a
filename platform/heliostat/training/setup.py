"""What is settled before workers start: model, tokenizer, number of steps. Runs in the driver; knows no Ray."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from heliostat.data import formats
from heliostat.data.config import DataConfig
from heliostat.data.packing import PackedDataset
from heliostat.data.records import Row
from heliostat.data.streams import Stream
from heliostat.data.tokens import TokenDataset
from heliostat.errors import ConfigError
from heliostat.experiment import ExperimentConfig
from heliostat.models import base, freezing, quantised, scratch
from heliostat.models.config import AdapterConfig, ModelConfig
from heliostat.models.languages import set_languages
from heliostat.registry import versions
from heliostat.training import event_files, order, zero
from heliostat.training.runs import Run
from heliostat.training.spec import WorkerSpec


@dataclass(frozen=True)
class Source:
    """Where the weights, or the config of new ones, come from; the tokenizer; and the labels of a classifier."""

    path: str
    from_scratch: bool
    tokenizer: Any
    labels: tuple[str, ...] = ()
    continues: str | None = None
    """Folder of the adapter to go on with; `path` is then its base."""
    new_tokens: tuple[int, ...] = ()
    """Ids that the tokenizer was given, and the model does not have yet."""
    adapter: AdapterConfig | None = None
    """The settings of that adapter; None: those of the configuration."""

    def data(self, data: DataConfig) -> DataConfig:
        """The section with the labels in it."""
        return data.model_copy(update={"labels": list(self.labels)}) if self.labels else data


def check(config: ExperimentConfig) -> None:
    """Refuse what cannot work before anything is written.

    Raises:
        ConfigError: naming the keys that contradict each other.
    """
    training = config.training
    if config.data.train is None:
        raise ConfigError("data.train is missing: name the files to train on")
    if training.fp16 and not training.use_gpu:
        raise ConfigError("training.fp16 needs training.use_gpu=true; CPUs train in fp32 or bf16")
    if config.model.scratch and config.adapter.method != "full":
        raise ConfigError(
            f"adapter.method={config.adapter.method} adapts an existing model, but model.scratch makes a "
            "new one; drop one"
        )
    if training.class_weights and config.data.task != "classification":
        raise ConfigError(f"training.class_weights needs data.format=classification, not {config.data.format}; drop it")
    event_files.check(training.report_to)
    zero.deepspeed_config(training, num_parameters=1)
    _check_adapter(config)


def _check_adapter(config: ExperimentConfig) -> None:
    adapter, training = config.adapter, config.training
    new_tokens = config.model.add_tokens or config.model.add_special_tokens
    if config.data.task == "classification" and (adapter.method not in ("full", "freeze", "lora") or new_tokens):
        raise ConfigError(
            "data.format=classification goes with adapter.method full, freeze and lora, and without model.add_tokens"
        )
    split = f"which training.deepspeed={training.deepspeed} splits; use zero2" if zero.stage(training) == 3 else None
    if split and adapter.use_dora:
        raise ConfigError(f"adapter.use_dora needs whole weights for its magnitudes, {split}, or leave use_dora out")
    if adapter.method == "qlora":
        quantised.require()
        if split:
            raise ConfigError(f"adapter.method=qlora needs its packed weights whole, {split}, or adapter.method=lora")
    if adapter.method == "prefix" and training.gradient_checkpointing:
        raise ConfigError(
            "adapter.method=prefix and training.gradient_checkpointing exclude each other: the prefix is in a cache, "
            "which checkpointing leaves out; set gradient_checkpointing=false, or adapter.method=prompt"
        )
    if new_tokens:
        _check_new_tokens(adapter, split)
    if adapter.has_virtual_tokens and config.data.packing:
        raise ConfigError(
            f"adapter.method={adapter.method} puts its virtual tokens before a row, so that of packed documents only "
            "the first would see them in their place; set data.packing=false, or adapter.method=lora"
        )


def _check_new_tokens(adapter: AdapterConfig, split: str | None) -> None:
    if adapter.method in ("ia3", "prefix", "prompt") or freezing.EMBEDDINGS in adapter.freeze:
        raise ConfigError(
            f"model.add_tokens: with adapter.method={adapter.method}, the embeddings of new tokens would not learn; "
            "use lora or full, or leave `embeddings` out of adapter.freeze"
        )
    if split and adapter.keeps_base:
        raise ConfigError(f"model.add_tokens: an adapter needs the embeddings whole, {split}, or adapter.method=full")


def check_best(config: ExperimentConfig, rows: Mapping[str, Sequence[Row]]) -> None:
    """Refuse to choose the best model by what cannot be measured.

    Raises:
        ConfigError: naming training.metric_for_best_model.
    """
    if not config.training.chosen_by_task:
        return
    key = f"training.metric_for_best_model={config.training.metric_for_best_model}"
    if "validation" not in rows:
        raise ConfigError(f"{key} needs validation rows; set data.validation or data.validation_size")
    if config.data.format == "text":
        raise ConfigError(f"{key} compares answers, which `format: text` has none of; use eval_loss")


def load_source(config: ExperimentConfig, rows: Sequence[Row], folder: Path) -> Source:
    """Look up the model; or train a tokenizer on the training `rows` and write a new model's config to `folder`.

    Raises:
        ModelError, RegistryError: the model cannot be found, loaded or trusted.
        ConfigError: the model is only an adapter; or the new model's config, or data.max_length, does not fit.
    """
    path = _new_source(config, rows, folder) if config.model.scratch else _existing_source(config)
    adapter, continues = None, None
    if (Path(path) / base.ADAPTER_CONFIG).exists():
        if config.data.task == "classification":
            raise ConfigError("model.model_name_or_path: training of a classifier does not go on with an adapter")
        from heliostat.models import adapters  # PEFT takes seconds to import

        adapter, continues = adapters.continued(Path(path), config.adapter), path
        path = base.base_of(Path(path))
    tokenizer = base.load_tokenizer(continues or path, None if continues else config.model.revision)
    _set_languages(tokenizer, config)
    new_chat = config.model.scratch is not None and config.data.format == "chat"
    _set_chat_template(tokenizer, config.model.chat_template or ("chatml" if new_chat else None))
    model = base.load_config(path, config.model.revision)
    _check_architecture(model, config)
    positions = getattr(model, "max_position_embeddings", None)
    taken = (adapter or config.adapter).num_virtual_tokens if config.adapter.has_virtual_tokens else 0
    if positions is not None and config.data.max_length + taken > positions:
        room = f"{positions} positions" + (f" less the {taken} of adapter.num_virtual_tokens" if taken else "")
        raise ConfigError(f"data.max_length={config.data.max_length} is more than the model's {room}; lower it")
    new_tokens = _add_tokens(tokenizer, config.model)
    if continues and new_tokens:
        raise ConfigError("model.add_tokens: an adapter that training goes on with cannot take new tokens; drop them")
    labels = formats.label_names(rows, config.data)
    return Source(path, config.model.scratch is not None, tokenizer, labels, continues, new_tokens, adapter)


def _set_languages(tokenizer: Any, config: ExperimentConfig) -> None:
    source, target = config.model.src_lang, config.model.tgt_lang
    if config.data.task == "seq2seq":
        set_languages(tokenizer, source, target)
    elif source or target:
        raise ConfigError(
            f"model.src_lang and tgt_lang belong to data.format=seq2seq, not {config.data.format}; drop them"
        )


def _add_tokens(tokenizer: Any, model: ModelConfig) -> tuple[int, ...]:
    before = len(tokenizer)
    tokenizer.add_tokens(model.add_tokens)
    tokenizer.add_tokens(model.add_special_tokens, special_tokens=True)
    return tuple(range(before, len(tokenizer)))


def _check_architecture(model: Any, config: ExperimentConfig) -> None:
    """Only pairs teach an encoder-decoder, and nothing else learns from pairs."""
    pairs = config.data.task == "seq2seq"
    if pairs and not model.is_encoder_decoder:
        raise ConfigError(
            f"data.format=seq2seq trains an encoder-decoder (bart, t5, ...), but `{model.model_type}` is a decoder "
            "alone; use prompt_completion"
        )
    if config.data.task == "causal_lm" and model.is_encoder_decoder:
        raise ConfigError(
            f"data.format={config.data.format} trains a decoder, but `{model.model_type}` has an encoder; use seq2seq"
        )


def _new_source(config: ExperimentConfig, rows: Sequence[Row], folder: Path) -> str:
    new, data = config.model.scratch, config.data
    assert new is not None
    if not folder.exists():
        chat = data.format == "chat"
        pairs = data.task == "seq2seq"
        texts = _texts(rows.sample() if isinstance(rows, Stream) else rows, data)
        tokenizer = scratch.train_tokenizer(texts, new.vocab_size, data.max_length, chat=chat, ends=pairs)
        scratch.write(folder, tokenizer, new.model_type, new.config, data.max_length)
    return str(folder)


def _existing_source(config: ExperimentConfig) -> str:
    reference = config.model.model_name_or_path or ""
    path = base.resolve(versions.resolve(reference).path)
    if (Path(path) / base.ADAPTER_CONFIG).exists() and not config.adapter.keeps_base:
        raise ConfigError(
            f"model.model_name_or_path: {reference} holds an adapter and no whole model, and adapter.method="
            f"{config.adapter.method} trains whole ones; set the adapter's method to go on with it, or merge it first: "
            "heliostat merge MODEL FOLDER"
        )
    if config.data.task != "classification" and base.task_of(path) == "classification":
        raise ConfigError(
            f"model.model_name_or_path: {reference} is a classifier, which data.format={config.data.format} does not "
            "train; name a language model, or use data.format=classification"
        )
    return path


def _texts(rows: Iterable[Row], data: DataConfig) -> Iterator[str]:
    """What a new tokenizer learns from: the rows' texts, without the marks of a chat template."""
    for row in rows:
        if data.task == "classification":
            yield formats.prompt_of(row, data, None)[0]
        elif data.format == "chat":
            yield from formats.dialogue_of(row, data).texts()
        else:
            yield from (segment.text for segment in formats.to_segments(row, data, None))


def _set_chat_template(tokenizer: Any, template: str | None) -> None:
    if template == "chatml":
        tokenizer.chat_template = formats.CHATML
    elif template is not None:
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"model.chat_template: `{template}` is neither `chatml` nor a readable file: {error}"
            ) from error


def class_weights(
    wanted: Literal["balanced"] | dict[str, float] | None, labels: Sequence[str], tokens: TokenDataset
) -> tuple[float, ...] | None:
    """How much a text of each label counts.

    `balanced`: texts / (labels x texts of that label), as scikit-learn's `class_weight`. Labels that are not named
    count once.

    Raises:
        ConfigError: a label that there is not, or that balancing would need texts of.
    """
    if wanted is None:
        return None
    if wanted != "balanced":
        if unknown := sorted(wanted.keys() - set(labels)):
            raise ConfigError(
                f"training.class_weights: there is no label `{unknown[0]}`; there are {', '.join(labels)}"
            )
        return tuple(wanted.get(label, 1.0) for label in labels)
    counts = np.bincount(tokens.input_ids[tokens.offsets[1:] - 1], minlength=len(labels)).tolist()
    if 0 in counts:
        raise ConfigError(
            f"training.class_weights=balanced: no training row has the label `{labels[counts.index(0)]}`; "
            "drop it from data.labels, or give the weights themselves"
        )
    return tuple(len(tokens) / (len(labels) * count) for count in counts)


@dataclass(frozen=True)
class Plan:
    """The size of a run."""

    train_rows: int
    fill: float
    """Part of the computed positions that are real tokens."""
    steps_per_epoch: float
    spec: WorkerSpec

    def __str__(self) -> str:
        total = self.spec.total_steps
        return (
            f"{self.train_rows:,} sequences of up to {self.spec.max_length} tokens ({self.fill:.1%} full), "
            f"{total:,} steps of {self.spec.training.global_batch_size} ({total / self.steps_per_epoch:.1f} epochs)"
        )


def plan(config: ExperimentConfig, run: Run, source: Source, tokens: dict[str, Path], evaluations: int = 1) -> Plan:
    """Count the steps and put together what the workers must know.

    Unless the configuration says how often, there is an evaluation once an epoch, and about `evaluations` at the least.
    """
    data, training = config.data, config.training
    rows = PackedDataset.open(tokens["train"], data.max_length, packing=data.packing)
    per_epoch = len(rows) / training.global_batch_size
    total = order.total_steps(len(rows), training.global_batch_size, training.num_train_epochs, training.max_steps)
    eval_steps = training.eval_steps or max(1, min(round(per_epoch), math.ceil(total / evaluations)))
    spec = WorkerSpec(
        run_folder=str(run.folder),
        attempt=run.attempt,
        model=source.path,
        revision=config.model.revision,
        from_scratch=source.from_scratch,
        attention=config.model.attn_implementation,
        adapter=source.adapter or config.adapter,
        training=training,
        train_tokens=str(tokens["train"]),
        validation_tokens=str(tokens["validation"]) if "validation" in tokens else None,
        max_length=data.max_length,
        packing=data.packing,
        pad_token_id=source.tokenizer.pad_token_id,
        total_steps=total,
        eval_steps=eval_steps,
        save_steps=training.save_steps or eval_steps,
        export_all=training.chosen_by_task,
        seed=config.seed,
        task=data.task,
        labels=source.labels,
        class_weights=class_weights(training.class_weights, source.labels, rows.tokens),
        continues=source.continues,
        new_tokens=source.new_tokens,
        vocabulary=len(source.tokenizer),
    )
    return Plan(len(rows), rows.fill, per_epoch, spec)
